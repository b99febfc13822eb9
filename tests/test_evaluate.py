"""`aspo eval` with a fake model whose answers are known: which counts come out, and what is computed again."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import json
import math
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import tiny_llava
from transformers import ByT5Tokenizer

from aspo import evaluate as command
from aspo.evaluate import evaluate
from aspo.evaluation import identity, judges
from aspo.evaluation import minimal_pairs as module
from aspo.evaluation.identity import fingerprint, model_identity
from aspo.evaluation.judges import Options, scene_counts
from aspo.evaluation.metrics import ObjectVocabulary, summarise
from aspo.evaluation.minimal_pairs import margins
from aspo.evaluation.statistics import compare
from aspo.folder import load_images, write_rows
from aspo.generation import Answer
from aspo.model import load_model
from aspo.rows import load_rows
from aspo.world.language import judge, minimal_pairs, questions
from aspo.world.scenes import HELD_OUT, USUAL, Scene, Thing

HELD = next(iter(sorted(HELD_OUT)))
SCENE = Scene(
    (
        Thing("circle", USUAL["circle"], "large", "top left"),
        Thing("square", USUAL["star"], "small", "top"),
        Thing(HELD[0], HELD[1], "small", "centre")
        if HELD[0] not in ("circle", "square")
        else Thing("cross", USUAL["cross"], "small", "centre"),
        Thing("triangle", USUAL["heart"], "large", "bottom"),
    )
)


def _row(index, **more):
    return {
        "id": f"row{index}",
        "prompt": "Describe the picture.",
        "images": [Image.new("RGB", (4, 4), (index, 0, 0))],
    } | more


class Fake:
    """Stands in for generation and log-probabilities; counts how many rows it was asked."""

    def __init__(self, answer):
        self.answer, self.rows = answer, 0

    def generate(self, model, processor, rows, **options):
        self.rows += len(rows)
        texts = [self.answer(row) for row in rows]
        return [Answer(text, len(text.split()) + 1, True) for text in texts]

    def margins(self, model, processor, rows, pairs, batch_size):
        """Every true sentence is 2 nats likelier than the false one."""
        return [[2.0 for _ in of_row] for of_row in pairs]


@pytest.fixture
def fake(monkeypatch):
    def answer(row):
        if not row["prompt"].startswith("Describe"):
            return "Yes."
        square = f"The square is {USUAL['square']}."
        return f"The circle is {USUAL['circle']}. {square} The ring is red. Blub. {square}"

    fake = Fake(answer)
    monkeypatch.setattr(judges, "generate_answers", fake.generate)
    monkeypatch.setattr(judges, "margins", fake.margins)
    monkeypatch.setattr(identity, "processor_settings", lambda *_: {})  # MODEL has no configuration
    return fake


MODEL = torch.nn.Linear(2, 2)


def test_a_world_answer_by_hand(fake):
    (item,) = evaluate(MODEL, None, [_row(0, scene=SCENE.to_json())])
    figures = summarise([item["counts"]])
    ring_there = "ring" in SCENE.by_shape
    # true: circle; false: square (twice), ring (absent); Blub cannot be parsed.
    assert figures["hallucinated_sentences"] == pytest.approx(3 / 4)
    assert figures["shr"] == pytest.approx(3 / 5)
    assert (figures["coverage"], figures["claim_precision"]) == (1 / 4, 1 / 3)
    assert (figures["duplicate"], figures["unparseable"], figures["eos"]) == (1 / 5, 1 / 5, 1.0)
    assert (figures["false_claims_consistent"], figures["false_claims_violating"]) == (0.0, 1.0)
    assert figures["chair_i"] == (0 if ring_there else 1 / 4)
    assert figures["tokens"] == 18
    assert (figures["yes_no_accuracy_all"], figures["yes_ratio_all"]) == (0.5, 1.0)  # says yes to everything
    assert figures["minimal_pair_accuracy"] == 1.0
    assert item["minimal_pairs"][0]["margin"] == 2.0
    assert item["sentences"][1] == {
        "text": f"The square is {USUAL['square']}.",
        "verdict": "false",
        "true": USUAL["star"],
    }


def test_held_out_pairs_are_a_stratum_of_their_own():
    shape, colour = HELD
    scene = Scene((Thing(shape, colour, "small", "top"),))
    counts = scene_counts(judge(f"The {shape} is {USUAL[shape]}.", scene), scene)
    assert (counts["claims_held_out"], counts["false_held_out"]) == (1, 1)
    assert (counts["claims_violating"], counts["false_violating"], counts["claims_consistent"]) == (1, 1, 0)


def test_questions_are_balanced_and_limited(fake):
    (item,) = evaluate(MODEL, None, [_row(0, scene=SCENE.to_json())], Options(questions=2, minimal_pairs=1))
    asked = item["questions"]
    assert [(q["split"], q["answer"]) for q in asked] == [
        (s, a) for s in ("random", "popular", "adversarial") for a in ("yes", "no")
    ]
    assert all((q["question"], q["answer"]) in questions(SCENE, q["split"]) for q in asked)
    (pair,) = item["minimal_pairs"]
    assert (pair["true"], pair["false"]) in minimal_pairs(SCENE)


def test_nothing_is_asked_where_none_is_wanted(fake):
    (item,) = evaluate(MODEL, None, [_row(0, scene=SCENE.to_json())], Options(questions=0, minimal_pairs=0))
    figures = summarise([item["counts"]])
    assert fake.rows == 1 and "minimal_pair_accuracy" not in figures and "yes_no_accuracy_all" not in figures


def test_a_scenes_row_may_name_its_cluster(fake):
    rows = [_row(0, scene=SCENE.to_json()), _row(0, scene=SCENE.to_json()) | {"id": "b", "cluster": "twice"}]
    items = evaluate(MODEL, None, rows, Options(questions=0))
    assert "cluster" not in items[0] and items[1]["cluster"] == "twice"


def test_question_rows_cluster_by_image(fake):
    rows = [
        _row(0, prompt="Is there a dog?", question="Is there a dog?", answer="Yes", split="random"),
        _row(0, prompt="Is there a cat?", question="Is there a cat?", answer="no", split="popular") | {"id": "b"},
        _row(1, prompt="Is there a dog?", question="Is there a dog?", answer="no", split="random") | {"id": "c"},
    ]
    items = evaluate(MODEL, None, rows)
    figures = summarise([item["counts"] for item in items])
    assert (figures["yes_no_accuracy_random"], figures["yes_no_accuracy_popular"]) == (0.5, 0.0)
    assert items[0]["cluster"] == items[1]["cluster"] != items[2]["cluster"]
    assert evaluate(MODEL, None, [rows[0] | {"cluster": 0}])[0]["cluster"] == 0


def test_object_rows(fake):
    vocabulary = ObjectVocabulary(["circle, disc", "square", "ring"])
    (item,) = evaluate(MODEL, None, [_row(0, objects=["disc"])], vocabulary=vocabulary)
    figures = summarise([item["counts"]])
    assert item["named"] == ["circle", "square", "ring", "square"]
    assert (figures["chair_i"], figures["chair_s"], figures["object_coverage"]) == (3 / 4, 1.0, 1.0)
    assert "coverage" not in figures


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        ({}, {"options": Options(questions=2)}, True),
        ({"options": Options(questions=2)}, {"options": Options(questions=2, seed=5)}, True),
        ({"options": Options(minimal_pairs=1)}, {"options": Options(minimal_pairs=1, seed=5)}, True),
        ({}, {"row": {"scene": Scene(SCENE.things[:3]).to_json()}}, True),
        ({}, {"row": {"prompt": "Describe it."}}, True),
        ({}, {"row": {"images": _row(1)["images"]}}, True),
        ({}, {"options": Options(temperature=0.5, max_new_tokens=9, batch_size=3)}, False),
        ({"options": Options(questions=0)}, {"options": Options(questions=0, seed=5)}, False),
        ({}, {"model": torch.nn.Linear(2, 2)}, False),
    ],
)
def test_systems_that_were_asked_other_things_are_not_compared(fake, one, other, differs):
    def items(model=MODEL, options=None, row=None):
        return evaluate(model, None, [_row(0, scene=SCENE.to_json()) | (row or {})], options)

    both = {"a": items(**one), "b": items(**other)}
    if differs:
        with pytest.raises(ValueError, match=r"a and b were asked different things in 1 of 1 items \(such as 'row0'\)"):
            compare(both)
        older = {name: [{k: v for k, v in item.items() if k != "asked"} for item in of] for name, of in both.items()}
        assert compare(older).items == 1
    else:
        assert compare(both).items == 1


def test_a_finished_item_is_not_computed_again(fake):
    rows = [_row(k, scene=SCENE.to_json()) for k in range(5)]
    options = Options(batch_size=2, questions=0, minimal_pairs=0)
    saved = []
    items = evaluate(MODEL, None, rows, options, save=lambda batch: saved.append(list(batch)))
    assert [len(batch) for batch in saved] == [2, 2, 1] and fake.rows == 5
    done = {item["key"]: item for batch in saved[:2] for item in batch}
    again = evaluate(MODEL, None, rows, options, done=done)
    assert again == items and fake.rows == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"model": torch.nn.Linear(2, 2)},
        lambda a: a | {"options": Options(seed=1)},
        lambda a: a | {"options": Options(max_new_tokens=3)},
        lambda a: a | {"rows": [_row(1, scene=SCENE.to_json())]},
        lambda a: a | {"rows": [_row(0, scene=SCENE.to_json(), prompt="Describe it.")]},
        lambda a: a | {"rows": [_row(0, scene=Scene(SCENE.things[:3]).to_json())]},
    ],
)
def test_another_model_row_or_option_is_computed_again(fake, change):
    arguments = {"model": MODEL, "rows": [_row(0, scene=SCENE.to_json())], "options": Options()}
    done = {item["key"]: item for item in evaluate(processor=None, **arguments)}
    before = fake.rows
    evaluate(processor=None, done=done, **arguments)
    assert fake.rows == before
    evaluate(processor=None, done=done, **change(arguments))
    assert fake.rows > before


def test_a_real_model_end_to_end(tmp_path):
    """A tiny LLaVA on scenes of the world; one margin is worked out again from the model's own logits."""
    model, processor = load_model(tiny_llava(tmp_path))
    rows = load_rows("world:validation", kind="prompt", limit=3)
    options = Options(max_new_tokens=6, questions=2, minimal_pairs=2, batch_size=2)
    items = evaluate(model, processor, rows, options)
    assert [item["id"] for item in items] == rows["id"]
    assert all(item["counts"]["pairs"] == 2 and item["counts"]["all_asked"] == 6 for item in items)
    assert all(1 <= item["counts"]["tokens"] <= 6 for item in items)

    pair = items[2]["minimal_pairs"][1]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rows[2]["prompt"]}]}],
        add_generation_prompt=True,
    )
    total = {}
    for kind in ("true", "false"):
        count = len(processor.tokenizer(pair[kind], add_special_tokens=False).input_ids)
        inputs = processor(text=[prompt + pair[kind]], images=[load_images(rows[2])], return_tensors="pt")
        with torch.no_grad():
            logps = model(**inputs).logits[0, :-1].log_softmax(-1)
        total[kind] = logps.gather(-1, inputs["input_ids"][0, 1:, None])[-count:].sum().item()
    assert pair["margin"] == pytest.approx(total["true"] - total["false"], abs=1e-4)


def test_margins_behind_one_prefix_are_those_of_plain_rows(tmp_path, monkeypatch):
    """Rows of 0 to 3 pairs; to the bit on a CPU, since attention by segments adds in the order of a plain row's."""
    model, processor = load_model(tiny_llava(tmp_path))
    rows = list(load_rows("world:validation", kind="prompt", limit=4))
    pairs = [
        minimal_pairs(Scene.from_json(row["scene"]))[:count] for row, count in zip(rows, (2, 0, 3, 2), strict=True)
    ]
    own = model.config.get_text_config()._attn_implementation
    shared = margins(model, processor, rows, pairs, batch_size=2)
    assert model.config.get_text_config()._attn_implementation == own
    assert [len(values) for values in shared] == [2, 0, 3, 2] and len({v for vs in shared for v in vs}) == 7
    monkeypatch.setattr(module, "_can_share", lambda *_: False)
    assert margins(model, processor, rows, pairs, batch_size=2) == shared


def test_fingerprint_sees_every_weight():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)).bfloat16()
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model[1].bias[2] = 1e-3
    assert fingerprint(model) != before


def _edit(path, change):
    """Change a JSON file; `change` gets what it holds."""
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("processor_config.json", lambda held: held["image_processor"]["image_mean"].__setitem__(0, 0.1)),
        ("config.json", lambda held: held["text_config"].update(rms_norm_eps=0.01)),
        ("generation_config.json", lambda held: held.update(eos_token_id=[2, 5])),
        ("tokenizer.json", lambda held: held["model"]["merges"].pop()),
        ("adapter/adapter_config.json", lambda held: held.update(lora_alpha=1)),
    ],
)
def test_answers_are_known_by_all_that_made_them(tmp_path, file, change):
    tiny_llava(tmp_path / "model")
    tuned = get_peft_model(load_model(tmp_path / "model")[0], LoraConfig(target_modules=["q_proj", "v_proj"]))
    tuned.save_pretrained(tmp_path / "model" / "adapter")
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copytree(tmp_path / "model", tmp_path / "edited")
    _edit(tmp_path / "edited" / file, change)
    found = []
    for name in ("model", "moved", "edited"):
        folder = tmp_path / name
        found.append(model_identity(*load_model(folder / "adapter", base=str(folder))))
    assert found[0] == found[1] != found[2]


def test_a_slow_tokenizer_is_known_by_its_words(tmp_path):
    model, processor = load_model(tiny_llava(tmp_path))
    processor.tokenizer = ByT5Tokenizer()
    before = model_identity(model, processor)
    processor.tokenizer.add_tokens("cat")
    assert model_identity(model, processor) != before


def test_rows_without_truth_are_refused(fake):
    with pytest.raises(ValueError, match="row 1 has no truth"):
        evaluate(MODEL, None, [_row(0, scene=SCENE.to_json()), _row(1)])
    with pytest.raises(ValueError, match="--objects"):
        evaluate(MODEL, None, [_row(0, objects=["dog"])])
    with pytest.raises(ValueError, match="'zebra'"):
        evaluate(MODEL, None, [_row(0, objects=["zebra"])], vocabulary=ObjectVocabulary(["dog"]))
    with pytest.raises(ValueError, match="even"):
        Options(questions=3)


DOG = {"question": "Is there a dog?", "answer": "no"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**DOG, "split": "hard"}, "column 'split': it is 'hard'; it must be one of random, popular, adversarial, all"),
        ({**DOG, "answer": "Yes."}, "column 'answer': it is 'Yes.'; it must be \"yes\" or \"no\""),
        ({"objects": 3}, "column 'objects': it is 3; it must be a list of names"),
        ({"objects": [3]}, "column 'objects': it is [3]; it must be a list of names"),
        ({"objects": "dog"}, "column 'objects': it is 'dog'; it must be a list of names"),
        ({"objects": ["zebra"]}, "column 'objects': object 'zebra' is not in"),
        ({"scene": {"things": [{"shape": "circle"}]}}, "column 'scene': not a scene"),
        ({**DOG, "id": "first"}, "column 'id': row 0 has it too; ids must differ"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(fake, tmp_path, monkeypatch, row, message):
    rows = [_row(0, **DOG) | {"id": "first"}, _row(1) | row]
    write_rows(tmp_path / "rows", rows)
    (tmp_path / "objects.txt").write_text("dog\ncat\n")
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    said = re.escape(f"row 1 (id '{rows[1]['id']}'), {message}")
    with pytest.raises(ValueError, match=said):
        command.run(_arguments(tmp_path, **{"--objects": str(tmp_path / "objects.txt")}))
    with pytest.raises(ValueError, match=said):
        evaluate(MODEL, None, rows, vocabulary=ObjectVocabulary(["dog", "cat"]))
    assert fake.rows == 0


def _arguments(tmp_path, **changes):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = {"--model": "m", "--data": str(tmp_path / "rows"), "--out": str(tmp_path / "out.json"), "--batch-size": "2"}
    return parser.parse_args([text for pair in (given | changes).items() for text in pair])


def test_the_command_writes_resumes_and_finishes(fake, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "rows", [_row(k, scene=SCENE.to_json()) for k in range(5)])
    monkeypatch.setattr(command, "load_model", lambda *_, **__: (MODEL, None))
    partial = tmp_path / "out.json.partial.jsonl"

    whole = fake.generate

    def killed(model, processor, rows, **options):
        if fake.rows >= 40:
            raise KeyboardInterrupt
        return whole(model, processor, rows, **options)

    monkeypatch.setattr(judges, "generate_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        command.run(_arguments(tmp_path))
    kept = len(partial.read_text().splitlines())
    assert kept in (2, 4)
    with partial.open("a") as file:
        file.write('{"key": "cut off')

    monkeypatch.setattr(judges, "generate_answers", whole)
    assert command.run(_arguments(tmp_path)) == 0
    assert not partial.exists()
    result = json.loads((tmp_path / "out.json").read_text())
    assert [item["id"] for item in result["items"]] == [f"row{k}" for k in range(5)]
    assert result["summary"]["hallucinated_sentences"] == pytest.approx(0.75)
    assert result["intervals"]["hallucinated_sentences"] == [0.75, 0.75]
    assert all(value is None or math.isfinite(value) for value in result["summary"].values())
    assert "hallucinated sentences (%)" in capsys.readouterr().out

    asked = fake.rows
    assert command.run(_arguments(tmp_path)) == 0  # everything is known
    assert fake.rows == asked
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_a_model_that_is_not_there_is_refused_before_rows_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_rows", lambda *_, **__: pytest.fail("rows were made"))
    with pytest.raises(ValueError, match=r"holds no model: neither config\.json nor"):
        command.run(_arguments(tmp_path, **{"--model": str(tmp_path)}))
    with pytest.raises(ValueError, match="is no adapter"):
        command.run(_arguments(tmp_path, **{"--model": "world", "--adapter": str(tmp_path)}))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(fake, tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file"):
        command.run(_arguments(tmp_path, **{"--out": str(tmp_path)}))
    foreign = tmp_path / "foreign.json"
    for content in ('{"rows": 3}', '{"items": [{"id": "of another harness", "counts": {}}]}'):
        foreign.write_text(content)
        with pytest.raises(ValueError, match="is no result of `aspo eval`"):
            command.run(_arguments(tmp_path, **{"--out": str(foreign)}))
        assert foreign.read_text() == content
