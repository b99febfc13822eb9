"""TLDR's token judge: perturbed captions, the head and its training, rewards in rows."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aspo.cli import Parser
from aspo.data import load_rows, validate_rows
from aspo.folder import write_rows
from aspo.generation import Answer
from aspo.model import load_model
from aspo.rewards import tldr
from aspo.rewards.command import add_arguments, run
from aspo.rewards.object_words import ObjectVocabulary, ObjectWord, load_vocabulary
from aspo.rewards.tldr import TokenJudge, held_out, measure_answers, perturbed, scoring
from aspo.training_state import checkpoints
from aspo.world.language import judge as judge_claims
from aspo.world.scenes import Scene


def rewards(*arguments: Any) -> int:
    parser = Parser(prog="aspo rewards", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def scenes():
    return load_rows("world:calibration", kind="prompt", limit=30)


@pytest.fixture
def judge():
    return TokenJudge(*load_model("world", device="cpu"), 1e-3, 0)


# --- perturbed captions ---


def test_a_swapped_word_of_a_scene_is_false_and_the_others_are_true(scenes):
    vocabulary = load_vocabulary("world")
    rng = random.Random(0)
    swapped = 0
    for row in scenes:
        made = perturbed(row, vocabulary, rng)
        scene, text = Scene.from_json(row["scene"]), made["chosen"]
        claims = judge_claims(text, scene)
        assert [text[a:b] for a, b, _ in made["chosen_token_scores"]] == [w.entry for w in vocabulary.words(text)]
        for start, end, score in made["chosen_token_scores"]:
            word = text[start:end]
            swapped += score < 0
            claim = next(c for c in claims if c.start <= start < c.end)
            if word in scene.by_shape or claim.subject == word:  # a shape
                assert (score > 0) == (word in scene.by_shape)
            elif score < 0 and claim.subject in scene.by_shape:  # a colour, its shape as it was
                assert claim.verdict == "false"
    assert 20 < swapped < 120  # a fifth of about 300 words


def test_words_of_a_caption_are_swapped_for_objects_that_are_not_there():
    vocabulary = ObjectVocabulary(["dog, puppy", "cat", "bird", "tree"])
    row = {
        "id": "a",
        "prompt": "What?",
        "caption": "Dogs chase a cat. A puppy sleeps.",
        "objects": ["dog", "cat", "bird"],
    }
    seen = set()
    for seed in range(40):
        made = perturbed(row, vocabulary, random.Random(seed))
        spans = made["chosen_token_scores"]
        assert len(spans) == 3 and "caption" not in made
        for (start, end, score), said in zip(spans, ("Dogs", "cat", "puppy"), strict=True):
            new = made["chosen"][start:end]
            seen.add(new)
            assert (new == said) if score > 0 else new == {"Dogs": "Trees", "cat": "tree", "puppy": "tree"}[said]
    assert seen == {"Dogs", "cat", "puppy", "Trees", "tree"}
    everything = {**row, "objects": ["dog", "cat", "bird", "tree"]}
    assert all(score > 0 for _, _, score in perturbed(everything, vocabulary, random.Random(0))["chosen_token_scores"])
    with pytest.raises(ValueError, match="row 'b': no true caption"):
        perturbed({"id": "b", "prompt": "What?"}, vocabulary, random.Random(0))


# --- the judge ---


def test_the_head_starts_from_the_log_probability_and_reads_both_states(judge, scenes):
    rows = [perturbed(row, load_vocabulary("world"), random.Random(0)) for row in scenes.select(range(2))]
    batch = judge.collator(rows)
    logits, scores, offsets = judge.logits(rows)
    with torch.no_grad():
        outer = judge.policy.get_base_model()
        full = outer(**batch["model_inputs"]).logits.float().log_softmax(-1).flatten(0, 1)
    layout = batch["layout"]
    logps = full[layout.hidden_index].gather(1, layout.targets[:, None])[:, 0]
    torch.testing.assert_close(logits.detach(), 3.0 + 0.5 * logps, atol=1e-4, rtol=0)
    assert scores.shape == logits.shape and offsets.tolist()[-1] == len(logits)
    logits.sum().backward()
    size = judge.head_params.weight.shape[1]
    grad = judge.head.weight.grad[0]
    assert grad[1 : 1 + size].any() and grad[1 + size :].any() and not torch.equal(grad[1 : 1 + size], grad[1 + size :])


def test_a_token_is_judged_without_what_follows_it(judge):
    row = dict(load_rows("world:calibration", kind="prompt", limit=1)[0])
    with torch.no_grad():
        judge.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        short, _, _ = judge.logits([{**row, "chosen": "The circle is red.", "chosen_token_scores": []}])
        long, _, _ = judge.logits(
            [{**row, "chosen": "The circle is red. The star is blue.", "chosen_token_scores": []}]
        )
    torch.testing.assert_close(short[:5], long[:5], atol=1e-4, rtol=1e-4)


def test_the_judge_learns_a_swapped_word(judge, scenes):
    vocabulary = load_vocabulary("world")
    rows = [perturbed(row, vocabulary, random.Random(3)) for row in scenes.select(range(8))]
    losses = [judge.step(rows) for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        logits, scores, _ = judge.logits(rows)
    assert float(logits[scores > 0].mean()) > float(logits[scores < 0].mean()) + 1


def test_a_words_logit_is_the_mean_of_its_tokens(judge):
    row = dict(load_rows("world:calibration", kind="prompt", limit=1)[0])
    row["chosen"] = "The circle is red. A zebra. Two red stars."
    words = ObjectVocabulary(["red", "zebra", "circle"]).words(row["chosen"])
    with torch.no_grad():
        logits, _, _ = judge.logits([{**row, "chosen_token_scores": []}])
    tokens = judge.collator.processor.tokenizer(row["chosen"], return_offsets_mapping=True)["offset_mapping"]
    expected = []
    for word in words:
        inside = [n for n, (a, b) in enumerate(tokens) if a < word.end and word.start < b]
        expected.append(float(logits[inside].mean()))
    assert len(tokens) > len(row["chosen"].split()) + 3  # the unknown word has several
    assert judge.word_logits([row], [words])[0] == pytest.approx(expected, abs=1e-4)
    assert judge.word_logits([row], [[]]) == [[]]


def test_a_response_is_judged_behind_the_images_that_it_is_read_with(judge, monkeypatch):
    row = dict(load_rows("world:calibration", kind="prompt", limit=1)[0])
    other = load_rows("world:train", kind="prompt", limit=1)[0]["images"]
    row |= {"chosen": "A circle.", "rejected": "A star."}
    seen = []

    def looked(rows, words):
        seen.append([row["images"] for row in rows])
        return [[0.0] * len(found) for found in words]

    monkeypatch.setattr(judge, "word_logits", looked)
    judge.base = 0.5
    scoring(judge, load_vocabulary("world"))([{**row, "rejected_images": []}, {**row, "rejected_images": other}])
    assert seen == [[row["images"], row["images"]], [row["images"], other]]  # of chosen, then of rejected


def test_the_reward_takes_the_base_rate_out(judge):
    judge.base = 0.8
    assert judge.reward(math.log(0.8 / 0.2)) == pytest.approx(0.0)
    # p = 0.5 at a base of 0.8: odds 1 over odds 4, p' = 0.2
    assert judge.reward(0.0) == pytest.approx(2 * 0.2 - 1)
    assert -1 <= judge.reward(-50.0) < -0.999 and 0.999 < judge.reward(50.0) <= 1


def test_the_last_tenth_is_kept_from_training():
    rows = [{"id": n} for n in range(30)]
    train, measure = held_out(rows)
    assert [row["id"] for row in measure] == [27, 28, 29] and len(train) == 27
    assert len(held_out([{"id": n} for n in range(5000)])[1]) == 200
    with pytest.raises(ValueError, match="needs two at least"):
        held_out(rows[:1])


# --- the command ---


def command(data: Path, out: Path) -> tuple[Any, ...]:
    return ("--method", "tldr", "--model", "world", "--objects", "world", "--train", "world:calibration",
            "--train-limit", 30, "--epochs", 2, "--learning-rate", 1e-3, "--data", data, "--out", out,
            "--max-new-tokens", 32, "--device", "cpu")  # fmt: skip


def test_tldr_from_data_to_rows_and_on_after_a_stop(tmp_path, monkeypatch, capsys):
    data = tmp_path / "pairs"
    texts = ["The circle is red. The star is blue.", "Nothing at all."]
    prompts = load_rows("world:train", kind="prompt", limit=3)
    write_rows(data, [{**row, "chosen": texts[0], "rejected": texts[1], "chosen_sentences": [[0, 19], [19, 36]]}
                      for row in prompts])  # fmt: skip
    rewards(*command(data, tmp_path / "whole"))
    assert "3 responses without any" in capsys.readouterr().out
    original = TokenJudge.step

    def stopping(self, rows, calls=[]):  # noqa: B006  one list for all calls
        calls.append(1)
        if len(calls) == 3:  # in the second epoch
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(TokenJudge, "step", stopping)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        rewards(*command(data, stopped))
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-1"]
    rewards(*command(data, stopped))
    for name in ("rows.jsonl", "tldr.json"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    heads = [load_file(folder / "head.safetensors") for folder in (stopped, tmp_path / "whole")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[1])
    with safe_open(stopped / "head.safetensors", "pt") as file:
        assert 0.7 < float(file.metadata()["base"]) < 0.9

    rows = load_rows(stopped)
    validate_rows(rows)
    for row in rows:
        spans = [(int(a), int(b)) for a, b, _ in row["chosen_token_scores"]]
        assert [texts[0][a:b] for a, b in spans] == ["circle", "red", "star", "blue"] and row[
            "rejected_token_scores"
        ] == []
        assert all(-1 <= value <= 1 for _, _, value in row["chosen_token_scores"])
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens: 32 -> 33\)"):
        rewards(*command(data, stopped), "--max-new-tokens", 33)
    figures = json.loads((stopped / "tldr.json").read_text())
    assert {"accuracy", "auc", "object_word_auc", "own_answers_auc"} <= figures.keys()


def test_captions_of_which_some_have_no_truth(tmp_path, monkeypatch):
    """The judge is measured on answers to the others; a caption that cannot be used stops it before the training."""
    scenes = [dict(row) for row in load_rows("world:calibration", kind="prompt", limit=31)]
    only = [{"prompt": row["prompt"], "images": row["images"], "caption": "The circle is red."} for row in scenes]
    write_rows(tmp_path / "data", [{**scenes[30], "chosen": "A circle.", "rejected": "A star."}])
    asked = []

    def counted(*arguments, original=tldr.generate_answers, **options):
        asked.append([row["id"] for row in arguments[2]])
        return original(*arguments, **options)

    def judged(name, last):
        write_rows(tmp_path / name, [*scenes[:29], {**last, "id": "last"}])
        train = ("--train", tmp_path / name, "--train-limit", 30, "--epochs", 1)
        return rewards(*command(tmp_path / "data", tmp_path / f"of {name}"), *train)

    monkeypatch.setattr(tldr, "generate_answers", counted)
    assert judged("mixed", only[29]) == 0
    assert asked == [[row["id"] for row in scenes[27:29]]]  # three are held out
    assert len(load_rows(tmp_path / "of mixed")) == 1
    monkeypatch.setattr(TokenJudge, "step", lambda *_: pytest.fail("it trained"))
    for bad, says in (
        ({"caption": None}, "no true caption"),
        ({"objects": ["giraffe"]}, "object 'giraffe' is not in the object vocabulary"),
    ):
        with pytest.raises(ValueError, match=f"row 'last': {says}"):
            judged("bad", {**only[29], **bad})
    assert not (tmp_path / "of bad").exists()


def test_a_word_without_a_token_of_its_own_is_not_measured(judge, monkeypatch):
    row = dict(load_rows("world:calibration", kind="prompt", limit=1)[0])
    halves = [ObjectWord(4, 7, "cir", "cir"), ObjectWord(7, 10, "cle", "cle")]
    first, second = judge.word_logits([{**row, "chosen": "The circle is red."}], [halves])[0]
    assert math.isfinite(first) and math.isnan(second)  # its token is the other word's
    monkeypatch.setattr(tldr, "generate_answers", lambda *_, **__: [Answer("A circle, a star and a ring.", 9, True)])
    monkeypatch.setattr(judge, "word_logits", lambda *_: [[2.0, math.nan, 1.0]])
    words = ObjectVocabulary(["circle", "star", "ring"])
    args = argparse.Namespace(max_new_tokens=8, seed=0, batch_size=1)
    measured = measure_answers(judge, None, [{**row, "objects": ["circle"]}], words, args)
    assert measured == {"own_answers_right": 1, "own_answers_wrong": 1, "own_answers_auc": 1.0}


def test_bad_input(tmp_path):
    data = tmp_path / "pairs"
    row = {"id": "a", "prompt": "What?", "images": [], "chosen": "A dog.", "rejected": "A cat."}
    write_rows(data, [row])
    (tmp_path / "objects.txt").write_text("zebra\n")
    write_rows(tmp_path / "captions", [{"id": str(n), "prompt": "What?", "caption": "A dog."} for n in range(4)])
    arguments = ["--method", "tldr", "--model", "world", "--train", tmp_path / "captions", "--data", data, "--device",
                 "cpu", "--out", tmp_path / "out"]  # fmt: skip
    with pytest.raises(ValueError, match="--objects is missing"):
        rewards(*arguments)
    with pytest.raises(ValueError, match="0 object words in 3 captions and none could be swapped"):
        rewards(*arguments, "--objects", tmp_path / "objects.txt")
    scene = dict(load_rows("world:calibration", kind="prompt", limit=3)[2])
    write_rows(tmp_path / "same", [{**scene, "id": "b", "chosen": "A circle.", "rejected": "A star."}])
    with pytest.raises(ValueError, match=f"row 'b' of --data has the image of row '{scene['id']}' of --train"):
        rewards(*command(tmp_path / "same", tmp_path / "apart"))
    assert not (tmp_path / "apart").exists()
