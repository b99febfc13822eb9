"""Benchmarks through lmms-eval and VLMEvalKit: stand-ins take the real command line and write the real files."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llava
from transformers import LlavaForConditionalGeneration

from aspo import evaluate as command
from aspo.evaluation.statistics import compare
from aspo.model import load_model
from aspo.report import read_evaluation
from aspo.suite import harness, lmms_eval, vlmevalkit
from aspo.suite.judge import Judge

# What lmms-eval 0.7 writes: <output_path>/<model>/<date>_results.json and <date>_samples_<task>.jsonl
LMMS_EVAL = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "output_path", "limit"):
    parser.add_argument("--" + name)
parser.add_argument("--log_samples", action="store_true")
args = parser.parse_args()
if "fails" in args.tasks:
    sys.exit(3)
if os.environ.get("SAMPLES") == "none":  # 0.7 catches what a task raises, prints it, and ends with 0
    sys.exit(0)
folder = pathlib.Path(args.output_path) / "model"
folder.mkdir(parents=True, exist_ok=True)
values = json.loads(os.environ["SAMPLES"])
results = {args.tasks: {"alias": args.tasks, "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}
asked = {"arguments": vars(args), "judge": {k: os.environ.get(k) for k in ("OPENAI_API_URL", "MODEL_VERSION")}}
(folder / "20250101_000000_results.json").write_text(json.dumps({"results": results, **asked}))
lines = [{"doc_id": k, "target": "x", "filtered_resps": [f"said {k}"], **value} for k, value in enumerate(values)]
text = "".join(json.dumps(line) + chr(10) for line in lines)
(folder / f"20250101_000000_samples_{args.tasks}.jsonl").write_text(text)
"""
# What VLMEvalKit writes: <work-dir>/<model>/T<day>_G<commit>/<model>_<dataset>_acc.csv and the record beside it
VLMEVALKIT = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
for name in ("config", "work-dir", "judge"):
    parser.add_argument("--" + name)
parser.add_argument("--reuse", action="store_true")
args = parser.parse_args()
config = json.loads(pathlib.Path(args.config).read_text())
(model,), (task,) = config["model"], config["data"]
folder = pathlib.Path(args.work_dir) / model / "T20250101_G0"
folder.mkdir(parents=True, exist_ok=True)
assert os.environ["PRED_FORMAT"] == "json"
(folder / f"{model}_{task}_acc.csv").write_text('"split","Overall","colour"\\n"none","0.5","0.25"\\n')
answers = folder / f"{model}_{task}.json"
if not answers.exists():  # it goes on from what is there, whichever model wrote it
    said = pathlib.Path(config["model"][model]["model_path"]).name
    answers.write_text(json.dumps([{"index": 1, "prediction": said}, {"index": 2, "prediction": "B"}]))
said = json.loads(answers.read_text())[0]["prediction"]
record = [{"index": 1, "prediction": said, "hit": 1}, {"index": 2, "prediction": "B", "hit": 0}]
(folder / f"{model}_{task}_exact_matching_result.json").write_text(json.dumps(record))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes a stand-in importable, here and in subprocesses."""
    packages = tmp_path / "packages"
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", str(packages))

    def install(module, main):
        (packages / module).mkdir(parents=True)
        (packages / module / "__init__.py").touch()
        (packages / module / "__main__.py").write_text(main)
        importlib.invalidate_caches()

    return install


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def run(tmp_path, suite, model, **changes):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = {"model": model, "suite": suite, "out": tmp_path / "out.json"} | changes
    return command.run(parser.parse_args([text for name, value in given.items() for text in (f"--{name}", str(value))]))


def written(tmp_path):
    return json.loads(max(tmp_path.glob("out.*/run-*/model/*_results.json")).read_text())


def test_lmms_eval_runs_and_its_results_are_items(tmp_path, llava, installed, monkeypatch, capsys):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", json.dumps([{"exact_match": 1.0}, {"exact_match": 0.0}, {"exact_match": 1.0}]))
    assert run(tmp_path, "sqa", llava, limit=3, **{"batch-size": 1}) == 0
    given = written(tmp_path)["arguments"]
    assert (given["model"], given["model_args"]) == ("llava_hf", f"pretrained={llava}")
    assert (given["tasks"], given["limit"], given["batch_size"]) == ("scienceqa_img", "3", "1")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["harness_summary"] == {"exact_match": 0.5} and result["source"] == "lmms-eval"
    assert result["summary"] == {"harness_score": pytest.approx(2 / 3)}
    items = read_evaluation(tmp_path / "out.json")
    assert [item["text"] for item in items] == ["said 0", "said 1", "said 2"]
    assert compare({"a": items, "b": items}, [("a", "b")]).differences["a", "b"]["harness_score"].value == 0
    assert "lmms-eval: exact_match = 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sample", "points"),
    [
        ({"exact_match": 1.0}, (1, 1)),
        ({"gpt_eval_score": {"question_id": "v1_0", "score": 0.4}}, (0.4, 1)),  # MM-Vet
        ({"seed_image": {"pred": "a", "answer": "A"}, "seed_all": {"pred": "a", "answer": "A"}}, (1, 1)),
        ({"coarse perception": {"score": 0.0}, "average": {"score": 0.0}}, (0, 1)),  # MMStar
        ({"gpt_eval_llava_conv": {"scores": [-999, -999]}, "gpt_eval_llava_all": {"scores": [8, 6]}}, (6, 8)),
        ({"gpt_eval_llava_conv": {"scores": [-1, -1]}, "gpt_eval_llava_all": {"scores": [-1, -1]}}, (0, 0)),
        ({"gpt_eval_score": {"index": 3, "answer": "A", "prediction": "A"}, "submission": {}}, None),  # MMBench
    ],
)
def test_points_of_each_task_s_samples(sample, points):
    assert lmms_eval.points_of({"doc_id": 0, "target": "A", "filtered_resps": ["a"], **sample}) == points


def test_a_task_without_single_scores_keeps_its_figures(tmp_path, llava, installed, monkeypatch, capsys):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", json.dumps([{"gpt_eval_score": {"index": 1}}]))
    assert run(tmp_path, "mmbench", llava) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["items"] == [] and result["harness_summary"] == {"exact_match": 0.5}
    assert "keeps no score for single items" in capsys.readouterr().out


def test_an_adapter_is_merged_in(tmp_path, llava, installed, monkeypatch):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", json.dumps([{"exact_match": 1.0}]))
    model, _ = load_model(llava)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path, "gqa", llava, adapter=tmp_path / "adapter") == 0
    folder = Path(written(tmp_path)["arguments"]["model_args"].removeprefix("pretrained="))
    made = LlavaForConditionalGeneration.from_pretrained(folder)
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    merged = adapted.merge_and_unload().get_parameter(weight)
    torch.testing.assert_close(made.get_parameter(weight), merged)
    assert not torch.allclose(made.get_parameter(weight), load_model(llava)[0].get_parameter(weight))
    assert (folder / "processor_config.json").is_file()


def test_judged_benchmarks_get_the_endpoint(tmp_path, llava, installed, monkeypatch):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", json.dumps([{"gpt_eval_score": {"score": 0.5}}]))
    with pytest.raises(ValueError, match="MM-Vet is scored by a judge"):
        run(tmp_path, "mmvet", llava)
    assert run(tmp_path, "mmvet", llava, judge="http://h:1/v1/", **{"judge-model": "j"}) == 0
    assert written(tmp_path)["judge"] == {"OPENAI_API_URL": "http://h:1/v1", "MODEL_VERSION": "j"}
    options = {"judge": Judge("http://h:1/v1", "j"), "batch_size": 1, "limit": None, "dtype": None}
    _, environment = lmms_eval.command("m", "llava", "mmbench_en_dev", tmp_path, **options)
    assert environment["OPENAI_API_URL"] == "http://h:1/v1/chat/completions"  # these tasks post to it as it is


def test_vlmevalkit_runs_and_its_results_are_items(tmp_path, installed, monkeypatch):
    installed("vlmeval", VLMEVALKIT)
    monkeypatch.setattr(
        harness.AutoConfig, "from_pretrained", lambda path, **_: argparse.Namespace(model_type="qwen2_5_vl")
    )
    assert run(tmp_path, "mmstar", "some/qwen") == 0
    (config,) = (json.loads(path.read_text()) for path in tmp_path.glob("out.mmstar/*/vlmevalkit.json"))
    assert config["model"] == {"model": {"class": "Qwen2VLChat", "model_path": "some/qwen"}}
    assert config["data"] == {"MMStar": {"class": "ImageMCQDataset", "dataset": "MMStar"}}
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["harness_summary"] == {"Overall": 0.5, "colour": 0.25} and result["source"] == "vlmevalkit"
    assert result["summary"] == {"harness_score": 0.5} and [item["id"] for item in result["items"]] == ["1", "2"]


def test_results_of_another_model_or_judge_are_not_taken_for_this_one_s(tmp_path, installed, monkeypatch):
    installed("vlmeval", VLMEVALKIT)
    monkeypatch.setattr(
        harness.AutoConfig, "from_pretrained", lambda path, **_: argparse.Namespace(model_type="qwen2_5_vl")
    )

    def answered(model, **changes):
        assert run(tmp_path, "mmvet", model, judge="http://h:1/v1", **{"judge-model": "j"} | changes) == 0
        return json.loads((tmp_path / "out.json").read_text())["items"][0]["text"]

    assert answered("some/qwen") == "qwen" and answered("some/tuned") == "tuned"
    model = tmp_path / "qwen"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for weights in ("first", "second"):  # trained again, in the same place
        (model / "model.safetensors").write_text(weights)
        assert answered(model) == "qwen"
    answered(model, **{"judge-model": "k"})
    answered(model)  # goes on from the files of its own
    assert len(list(tmp_path.glob("out.mmvet/*/vlmevalkit.json"))) == 5


def test_a_run_that_fails_in_silence_has_no_results(tmp_path, llava, installed, monkeypatch):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", json.dumps([{"exact_match": 1.0}]))
    assert run(tmp_path, "gqa", llava) == 0 and written(tmp_path)["arguments"]["batch_size"] == "16"
    monkeypatch.setenv("SAMPLES", "none")
    with pytest.raises(ValueError, match=r"left no \*_results.json below .*run-2; its output above says why"):
        run(tmp_path, "gqa", llava)


def test_the_newest_record_of_vlmevalkit_has_the_items(tmp_path):
    folder = tmp_path / "model" / "T1"
    folder.mkdir(parents=True)
    (folder / "model_X_acc.csv").write_text('"Overall"\n"1"\n')
    for k, record in enumerate(("exact_matching_result", "judge_result", "auxiliary")):
        (folder / f"model_X_{record}.json").write_text(json.dumps([{"index": 1, "prediction": record, "hit": 1}]))
        os.utime(folder / f"model_X_{record}.json", (k % 2, k % 2))  # the judge's is the newest
    assert vlmevalkit.results(tmp_path, "X")[1][0]["text"] == "judge_result"


@pytest.mark.parametrize(
    ("record", "row", "points"),
    [
        ("judge", {"score": 0.4}, (0.4, 1)),  # MM-Vet
        ("openai_result", {"gpt4_score": 8, "score": 6}, (6, 8)),  # LLaVA-Bench
        ("auxmatch", {"score": True}, (1, 1)),  # MME
        ("results", {"eval_score": 0.3}, (0.3, 1)),  # GQA, TextVQA
    ],
)
def test_the_records_of_vlmevalkit(tmp_path, record, row, points):
    folder = tmp_path / "model" / "T1"
    folder.mkdir(parents=True)
    (folder / "model_X_score.csv").write_text('"Overall"\n"1"\n')
    (folder / f"model_X_{record}.json").write_text(json.dumps([{"index": 5, "prediction": "p", **row}]))
    (item,) = vlmevalkit.results(tmp_path, "X")[1]
    assert (item["counts"]["harness_points"], item["counts"]["harness_items"]) == points and item["id"] == "5"


def test_which_harness_is_taken(installed):
    with pytest.raises(ValueError, match=r"none that has it is installed\. lmms-eval has it as gqa: pip install"):
        harness.choose("gqa")
    with pytest.raises(ValueError, match="vlmevalkit does not have vqav2"):
        harness.choose("vqav2", "vlmevalkit")
    installed("vlmeval", VLMEVALKIT)
    assert harness.choose("gqa") == ("vlmevalkit", "GQA_TestDev_Balanced")
    installed("lmms_eval", LMMS_EVAL)
    assert harness.choose("gqa") == ("lmms-eval", "gqa")
    assert harness.choose("gqa", "vlmevalkit") == ("vlmevalkit", "GQA_TestDev_Balanced")
    assert harness.choose("lmms-eval:ai2d") == ("lmms-eval", "ai2d") and harness.known("lmms-eval:ai2d")
    with pytest.raises(ValueError, match="drop one"):
        harness.choose("lmms-eval:ai2d", "vlmevalkit")
    assert not harness.known("lmms-eval:") and not harness.known("other:ai2d")


def test_what_a_harness_cannot_do_is_said(tmp_path, llava, installed, monkeypatch):
    installed("lmms_eval", LMMS_EVAL)
    monkeypatch.setenv("SAMPLES", "[]")
    with pytest.raises(ValueError, match=r"failed with exit status 3; its command was: .*lmms_eval --model llava_hf"):
        run(tmp_path, "lmms-eval:fails", llava)
    for flag, value in (("suite-data", "x"), ("append", "x"), ("max-new-tokens", "3"), ("temperature", "1")):
        with pytest.raises(ValueError, match=f"--{flag} is not read with --suite gqa"):
            run(tmp_path, "gqa", llava, **{flag: value})
    options = {"judge": None, "batch_size": None, "limit": None, "dtype": None}
    with pytest.raises(ValueError, match="comma or an equals sign"):
        lmms_eval.command("a,b", "llava", "gqa", tmp_path, **options)
    with pytest.raises(ValueError, match="qwen2_5_vl has no dtype"):
        lmms_eval.command("a", "qwen2_5_vl", "gqa", tmp_path, **options | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="loads no llava model as transformers saves it"):
        vlmevalkit.command("a", "llava", "MMStar", tmp_path, **options)
    for name in ("limit", "dtype", "batch_size"):
        with pytest.raises(ValueError, match=f"no way to set --{name.replace('_', '-')}: drop it, or use"):
            vlmevalkit.command("a", "qwen2_vl", "MMStar", tmp_path, **options | {name: 3})
    with pytest.raises(ValueError, match="left no"):
        lmms_eval.results(tmp_path / "nothing", "gqa")
    with pytest.raises(ValueError, match="left no table"):
        vlmevalkit.results(tmp_path / "nothing", "MMStar")


def test_a_git_checkout_of_vlmevalkit_is_started_by_its_script(tmp_path, monkeypatch):
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / "vlmeval" / "__init__.py").touch()
    (tmp_path / "run.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    made, _ = vlmevalkit.command(
        "a", "qwen2_vl", "MMStar", tmp_path, judge=None, batch_size=None, limit=None, dtype=None
    )
    assert made[:2] == [sys.executable, str(tmp_path / "run.py")]
