"""The methods of `aspo pairs` beside SeVa's: POVID's, CSR's, SENTINEL's pairs and unpaired rows."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import argparse
import copy
import json
import math
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aspo import world
from aspo.data import Collator, encode_prompt, encode_response, load_images, load_rows, validate_rows, write_rows
from aspo.generation import SentenceEnd, cut_sentence, decode_behind, generate_answers, generate_sentences
from aspo.model import HeadParams
from aspo.pairs import command as pairs
from aspo.pairs import csr, povid, sentinel
from aspo.pairs import next_sentences as steps
from aspo.pairs.next_sentences import Candidate, last_sentence_logps
from aspo.pairs.noise import add_noise, image_seeds
from aspo.sentences import split_sentences
from aspo.shards import job
from aspo.world.data import rows as world_rows
from aspo.world.language import DESCRIBE
from aspo.world.scenes import Scene, Thing


@pytest.fixture(scope="module")
def vlm():
    return world.load_vlm()


def command(*argv):
    parser = argparse.ArgumentParser()
    pairs.add_arguments(parser)
    return pairs.run(parser.parse_args([str(a) for a in argv]))


METHODS = {
    "povid": ("--model", "world", "--temperature", 1, "--max-new-tokens", 40),
    "csr": ("--model", "world", "--scorer", "world", "--candidates", 2, "--beams", 1),
    "sentinel": ("--model", "world", "--judge", "truth", "--candidates", 4),
}


def method_command(method, out, *argv):
    data = ("--data", "world:train", "--limit", 4, "--batch-size", 2)
    return command("--method", method, *METHODS[method], *data, "--out", out, *argv)


# ---- one more sentence ----


def test_sentences_one_by_one_are_the_whole_answer(vlm):
    model, processor = vlm
    rows = world_rows("validation", 4)
    whole = generate_answers(model, processor, rows, max_new_tokens=64)
    texts, alive = [""] * len(rows), list(range(len(rows)))
    while alive:
        made = generate_sentences(
            model, processor, [rows[n] for n in alive], [texts[n] for n in alive], temperature=0.0, batch_size=3
        )
        for n, sentence in zip(alive, made, strict=True):
            assert sentence.complete and sentence.text.strip().count(".") == 1
            texts[n] += sentence.text
        alive = [n for n, sentence in zip(alive, made, strict=True) if not sentence.ends]
    assert texts == [answer.text for answer in whole]


def test_padding_with_the_end_of_turn_token_ends_no_answer(vlm):
    model, processor = vlm
    rows = world_rows("validation", 4)
    beginnings = ["", "The ring is", "The ring is pink.", "The"]  # the second one is done first
    options = {"temperature": 1.0, "seed": 5}
    before = generate_sentences(model, processor, rows, beginnings, **options)
    other = copy.deepcopy(processor)
    other.tokenizer.pad_token = other.tokenizer.eos_token
    assert generate_sentences(model, other, rows, beginnings, **options) == before
    assert not any(sentence.ends for sentence in before)


def test_a_row_is_ended_by_its_second_sentence(vlm):
    tokenizer = vlm[1].tokenizer
    ids = [tokenizer(f"Say it. {text}")["input_ids"] for text in ("The ring is pink. The", "The ring is pink. ", "The")]
    start = len(tokenizer("Say it.")["input_ids"])
    rows = torch.tensor([row[: start + 6] + [tokenizer.pad_token_id] * (start + 6 - len(row)) for row in ids])
    stop = SentenceEnd(tokenizer, rows[:, :start], split_sentences)
    assert [stop(rows[:, : start + n], None).tolist() for n in (5, 6)] == [[False] * 3, [True, False, False]]
    assert stop(rows[:, : start + 1], None).tolist() == [True, False, False]  # once ended it stays so


def test_a_sentence_that_is_cut_off_is_not_complete(vlm):
    model, processor = vlm
    made = generate_sentences(model, processor, world_rows("validation", 1), [""], max_new_tokens=3, temperature=0.0)
    assert not made[0].complete and not made[0].ends and made[0].text
    with pytest.raises(ValueError, match="1 beginnings for 2 rows"):
        generate_sentences(model, processor, world_rows("validation", 2), [""])


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        (" A cat sits. It", False, (" A cat sits.", True, False)),
        (" A cat sits.", False, (" A cat sits.", False, False)),
        (" A cat sits.", True, (" A cat sits.", True, True)),
        (" A cat sits. It sleeps.", True, (" A cat sits.", True, False)),
        (" It is 3.5 m tall", False, (" It is 3.5 m tall", False, False)),
        ("\n\nDr. Smith waves. He", False, ("\n\nDr. Smith waves.", True, False)),
        ("", True, ("", True, True)),
        (" \n", False, ("", False, False)),
    ],
)
def test_the_first_sentence_of_what_was_generated(text, ended, expected):
    sentence = cut_sentence(text, ended)
    assert (sentence.text, sentence.complete, sentence.ends) == expected


def test_sentences_that_are_cut_off_or_say_image_are_no_candidates():
    asked = [("A cat.", True, False), ("A <image> cat.", True, False), ("A", False, False), ("A cat.", True, True)]
    assert [(s.text, s.ends) for s in steps.distinct([steps.NextSentence(*a) for a in asked])] == [
        ("A cat.", False),
        ("A cat.", True),
    ]


class _Pieces:
    """Decodes as SentencePiece does: the first piece's space is lost."""

    def decode(self, pieces, skip_special_tokens):
        return "".join(pieces).replace("_", " ").removeprefix(" ")


def test_the_space_before_a_continuation_is_kept():
    assert decode_behind(_Pieces(), ["_red", "."], ["_It", "_is"]) == " It is"
    assert decode_behind(_Pieces(), [], ["_It"]) == "It"


def test_a_sentences_log_probability_is_the_mean_over_its_own_tokens(vlm):
    model, processor = vlm
    row = world_rows("validation", 1)[0]
    prompt = encode_prompt(processor, row["prompt"], load_images(row))
    for beginning, sentence in (
        ("", "The ring is red."),
        ("The ring is red. The star is blue.", " The heart is pink."),
    ):
        ids, offsets = encode_response(processor, prompt, beginning + sentence)
        batch = Collator(processor, responses=("chosen",))([{**row, "chosen": beginning + sentence}])
        with torch.no_grad():
            logits = model(**batch["model_inputs"]).logits[0]
        logps = logits[batch["layout"].hidden_index].log_softmax(-1)[range(len(ids)), ids]
        own = [n for n, (_, end) in enumerate(offsets[:-1]) if end > len(beginning)]
        value = next(last_sentence_logps(model, processor, [row], [beginning], [sentence], 4))
        assert len(own) == 5 and value == pytest.approx(float(logps[own].mean()), abs=1e-5)


# ---- POVID ----


def naive_alternatives(model, processor, row, step, seed):
    """argmax of the model's own logits over the chosen response behind the noised image."""
    batch = Collator(processor, responses=("chosen",))([{k: row[k] for k in ("prompt", "images", "chosen")}])
    inputs = dict(batch["model_inputs"])
    inputs["pixel_values"] = add_noise(inputs["pixel_values"], step, image_seeds(row, seed))
    with torch.no_grad():
        return model(**inputs).logits[0][batch["layout"].hidden_index].argmax(-1).tolist()


def test_povid_rows_of_every_kind(vlm, tmp_path, capsys):
    model, processor = vlm
    own = world_rows("train", 5)
    own[0] |= {"chosen": "The ring is blue. The heart is orange.", "rejected": "The ring is pink.", "source": "mine"}
    own[1] |= {"chosen": "The diamond is pink."}
    own[3] |= {"chosen": "The ring is blue.", "rejected": "The ring is blue."}
    own[4]["images"] = []
    write_rows(tmp_path / "data", own)
    argv = ("--method", "povid", "--model", "world", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert command(*argv, "--noise-step", 700, "--seed", 3, "--max-new-tokens", 40) == 0
    out = capsys.readouterr().out
    assert "3 pairs of 5 rows" in out and "dropped 1: the row has no image" in out
    assert "dropped 1: chosen and rejected are the same" in out
    made = load_rows(tmp_path / "out")
    validate_rows(made)
    by_id = {row["id"]: row for row in made}
    for row in own[:3]:
        assert {**row, **by_id[row["id"]]}["prompt"] == DESCRIBE
    first, second, third = (by_id[row["id"]] for row in own[:3])
    assert (first["chosen"], first["rejected"], first["source"]) == (own[0]["chosen"], own[0]["rejected"], "mine")
    assert second["chosen"] == own[1]["chosen"] and second["rejected"].strip()
    assert third["chosen"] == generate_answers(model, processor, [own[2]], max_new_tokens=40)[0].text
    differ = 0
    for row in made:
        prompt = encode_prompt(processor, row["prompt"], load_images(row))
        ids, _ = encode_response(processor, prompt, row["chosen"])
        assert row["chosen_alternative_ids"] == naive_alternatives(model, processor, row, 700, 3)
        assert len(row["chosen_alternative_ids"]) == len(ids)
        differ += sum(a != b for a, b in zip(row["chosen_alternative_ids"], ids, strict=True))
    assert differ > 0 and f"{differ} of them another under noise" in out


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation gave out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "view" not in str(func) and "split" not in str(func):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_the_likeliest_tokens_come_without_the_logits(bias):
    hidden, weight = torch.randn(50, 4), torch.randn(600, 4)
    added = torch.randn(600) * 3 if bias else None
    expected = (hidden @ weight.T + (0 if added is None else added)).argmax(-1)
    with Largest() as largest:
        found = povid.argmax_tokens(hidden, HeadParams(weight, added, logit_scale=0.5, softcap=20.0), elements=600 * 7)
    assert torch.equal(found, expected) and largest.elements == 600 * 7


def test_povid_errors(tmp_path):
    argv = ("--method", "povid", "--model", "world", "--out", tmp_path / "out", "--data")
    row = {"id": "a", "prompt": DESCRIBE, "images": world_rows("train", 1)[0]["images"]}
    for n, (columns, message) in enumerate(
        (
            ({"rejected": "Yes."}, "row 0 .id 'a'. has a rejected response but no chosen one"),
            ({"chosen": " ", "rejected": "Yes."}, "column 'chosen': it is empty"),
            ({"negative_images": row["images"]}, "column 'negative_images': povid's tokens are not read beside them"),
            ({"images": []}, "none of the 1 rows of .* has an image; --method povid needs them"),
        )
    ):
        write_rows(tmp_path / str(n), [row | columns])
        with pytest.raises(ValueError, match=message):
            command(*argv, tmp_path / str(n))
    assert not (tmp_path / "out").exists()


# ---- CSR ----


class Script:
    """A sampler that says what it is told: beginning -> candidates; keeps what it was asked."""

    def __init__(self, script):
        self.script, self.asked = script, []

    def candidates(self, rows, beginnings, count, seed):
        self.asked.append([*beginnings])
        return [[Candidate(*c) for c in self.script[beginning]] for beginning in beginnings]


def fixed_similarity(values):
    return lambda sentences: {(name, text): values[text] for name, texts in sentences.items() for text in texts}


def test_a_tree_worked_out_by_hand():
    script = Script(
        {
            "": [("A.", False, -1.0), ("B.", False, -2.0), ("C.", False, -3.0), ("", True, 0.0)],
            "A.": [(" D.", True, -1.0), (" E.", False, 0.0)],
            "C.": [(" D.", True, -3.0), ("", True, 0.0)],
            "A. E.": [("", True, 0.0), (" E.", False, 0.0)],
            "A. E. E.": [(" E.", False, 0.0)],
        }
    )
    cosine = fixed_similarity({"A.": 0.5, "B.": 0.4, "C.": 0.1, "D.": 0.3, "E.": 0.2})
    options = {"candidates": 4, "max_sentences": 4, "seed": 0, "beams": 1, "clip_weight": 0.9}
    row = {"id": "x", "prompt": "?", "images": ["i"]}
    ended = csr.grow([row], script, cosine, options, 0)["x"]
    scores = {beam.text: beam.scores for beam in ended}
    a, c = 0.1 * -1 + 0.9 * 0.5, 0.1 * -3 + 0.9 * 0.1  # B is neither the best nor the worst: it goes no further
    expected = {"A. D.": (a, 0.1 * -1 + 0.9 * 0.3), "C. D.": (c, 0.1 * -3 + 0.9 * 0.3), "C.": (c,), "A. E.": (a, 0.18)}
    assert scores.keys() == expected.keys()
    assert all(scores[text] == pytest.approx(expected[text]) for text in expected)
    assert script.asked == [[""], ["A.", "C."], ["A. E."], ["A. E. E."]]
    made = csr.pair(row, ended)
    assert made.status == "made"
    assert (made.rows[0]["chosen"], made.rows[0]["rejected"]) == ("A. E.", "C.")
    assert made.rows[0]["chosen_score"] == pytest.approx((a + 0.18) / 2)


def test_which_beams_go_on_and_which_pairs_are_dropped():
    beams = [csr.Beam(str(n), (float(n),)) for n in (3, 1, 2, 5, 4)]
    assert [beam.text for beam in csr.best_and_worst(beams, 1)] == ["5", "1"]
    assert [beam.text for beam in csr.best_and_worst(beams, 2)] == ["5", "4", "2", "1"]
    assert [beam.text for beam in csr.best_and_worst(beams, 3)] == ["5", "4", "3", "2", "1"]
    row = {"id": "x", "prompt": "?"}
    assert csr.pair(row, []).status == "unfinished" and csr.pair(row, beams[:1]).status == "identical"
    assert csr.pair(row, [csr.Beam("a", (1.0,)), csr.Beam("b", (1.0,))]).status == "no contrast"
    words = {name: csr.DROPPED[name] for name in ("unfinished", "identical", "no contrast")}
    assert "only one" in words["identical"] and "only one" not in words["unfinished"]


def test_csr_chooses_what_scores_higher(tmp_path, capsys):
    assert method_command("csr", tmp_path / "out") == 0
    rows = load_rows(tmp_path / "out")
    validate_rows(rows)
    assert "answers that ended" in capsys.readouterr().out
    assert len(rows) >= 2 and all(row["chosen_score"] > row["rejected_score"] for row in rows)
    truth = {"chosen": 0, "rejected": 0}
    for row in rows:
        for column in truth:
            claims = pairs_judge(row[column], row["scene"])
            truth[column] += sum(claims) / len(claims)
    assert truth["chosen"] < truth["rejected"]  # shares of false sentences


def pairs_judge(text, scene):
    return [claim.verdict == "false" for claim in sentinel.judge_text(text, Scene.from_json(scene))]


class _Scorer:
    """Cosines that are NaN for every image from the third on, where `bad`."""

    identity = "test"

    def __init__(self, bad):
        self.bad, self.seen = bad, 0

    def image_features(self, images):
        self.seen += len(images)
        return torch.full((len(images), 2), math.nan if self.bad and self.seen > 2 else 0.5)

    def text_features(self, texts):
        return torch.tensor([[len(text) / 100, 0.1 * (len(text) % 7)] for text in texts])


def test_a_similarity_that_is_not_finite_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(csr, "load_scorer", lambda name, device: _Scorer(bad=True))
    ids = [row["id"] for row in world_rows("train", 4)]
    with pytest.raises(ValueError, match=f"row '{ids[2]}': the similarity of '.*' to its image is nan"):
        method_command("csr", tmp_path / "out", "--shard-rows", 2)
    (shard,) = (tmp_path / "out" / "shards" / "pairs").glob("*.jsonl")
    kept = shard.read_bytes()
    assert [json.loads(line)["id"] for line in kept.splitlines()[1:3]] == ids[:2]
    monkeypatch.setattr(csr, "load_scorer", lambda name, device: _Scorer(bad=False))
    assert method_command("csr", tmp_path / "out", "--shard-rows", 2) == 0
    assert list(pairs.recorded(tmp_path / "out")) == ids
    assert shard.read_bytes() == kept


# ---- SENTINEL ----

SCENE = Scene((Thing("circle", "red", "small", "top"), Thing("star", "blue", "large", "left"))).to_json()
WALK = {"candidates": 4, "max_sentences": 8, "seed": 0, "language": "en"}


def test_an_answer_that_goes_on_with_what_is_true():
    red, blue, green = "The circle is red.", " The star is blue.", " The star is green."
    script = Script(
        {
            "": [("The circle is pink.", False, None), ("Hello there.", False, None), (red, False, None)],
            red: [(f" {red}", False, None), (" It is large.", False, None), (" It is small.", False, None)],
            f"{red} It is small.": [(blue, False, None)],
            f"{red} It is small.{blue}": [(green, True, None), (" There are two objects.", True, None)],
        }
    )
    row = {"id": "x", "prompt": "?", "images": ["i"], "scene": SCENE}
    (made,) = sentinel.walk([row], script, sentinel.truth([row]), WALK, 0)
    beginning = f"{red} It is small.{blue}"
    assert [(r["id"], r["chosen"], r["rejected"]) for r in made.rows] == [
        ("x-s0", red, "The circle is pink."),
        ("x-s1", f"{red} It is small.", f"{red} It is large."),  # "It" is judged by what stands before it
        ("x-s2", f"{beginning} There are two objects.", beginning + green),
    ]
    assert all(r["unfinished"] and r["scene"] == SCENE for r in made.rows)
    assert made.counts == {"steps with both": 3, "steps without a hallucinated sentence": 1}
    assert len(script.asked) == 4  # the faithful sentence ended the answer


@pytest.mark.parametrize(
    ("candidates", "outcome"),
    [
        ([("The circle is pink.", False, None)], "steps without a faithful sentence"),
        ([("", True, None)], "steps without a new sentence"),
        ([("The circle is red.", True, None)], "steps without a hallucinated sentence"),
    ],
)
def test_an_answer_without_contrast(candidates, outcome):
    row = {"id": "x", "prompt": "?", "images": ["i"], "scene": SCENE}
    (made,) = sentinel.walk([row], Script({"": candidates}), sentinel.truth([row]), WALK, 0)
    assert made.status == "no contrast" and not made.rows and made.counts == {outcome: 1}


def test_similarity_as_the_verifier():
    cosine = fixed_similarity({"a": 0.3, "b": 0.5, "c": 0.1, "d": 0.49})
    asked = {"x": ["a", "b", "c"], "y": ["b", "d"], "z": [], "w": ["a"]}
    assert sentinel.by_similarity(cosine, 0.02)({}, asked) == {
        ("x", "b"): True,
        ("x", "c"): False,
        ("y", "b"): True,
        ("w", "a"): True,
    }
    assert sentinel.by_similarity(cosine, 0.0)({}, {"y": ["b", "d"]}) == {("y", "b"): True, ("y", "d"): False}
    assert sentinel.by_similarity(cosine, 0.0)({}, {"x": ["b", "b"]}) == {("x", "b"): True}  # ended, and not


@pytest.mark.parametrize("beginning", ["", "The circle is red."])
def test_a_sentence_without_words_is_neither_faithful_nor_hallucinated(beginning):
    verify = sentinel.truth([{"id": "x", "scene": SCENE}])
    asked = {"x": [".", "...", "It is small.", "The star is red."]}
    verdicts = verify({"x": beginning}, asked)
    assert verdicts.pop(("x", "The star is red.")) is False
    assert verdicts == ({("x", "It is small."): True} if beginning else {})


def test_what_both_sides_share_is_the_same_tokens(vlm, tmp_path):
    _, processor = vlm
    assert method_command("sentinel", tmp_path / "out") == 0
    rows = load_rows(tmp_path / "out")
    validate_rows(rows)
    assert len(rows) >= 4
    for row in rows:
        prompt = encode_prompt(processor, row["prompt"], load_images(row))
        (chosen, offsets), (rejected, _) = (encode_response(processor, prompt, row[c]) for c in ("chosen", "rejected"))
        starts = [claim.start for claim in sentinel.judge_text(row["chosen"], Scene.from_json(row["scene"]))]
        shared = sum(end <= starts[-1] for _, end in offsets[:-1])
        assert chosen[:shared] == rejected[:shared] and chosen[shared:] != rejected[shared:]
        read = Collator(processor)([row])["layout"].targets.tolist()
        assert read == chosen[:-1] + rejected[:-1]  # no end-of-turn token is taught
        assert shared == 5 * (len(starts) - 1)  # of the world's sentences all have five tokens
        verdicts = [pairs_judge(row[c], row["scene"]) for c in ("chosen", "rejected")]
        assert not any(verdicts[0]) and verdicts[1][-1] and verdicts[0][:-1] == verdicts[1][:-1]


# ---- unpaired rows ----


def test_unpaired_rows(tmp_path, capsys, monkeypatch):
    own = world_rows("train", 2)
    own[0] |= {"chosen": "Yes.", "rejected": "No."}
    own[1] |= {"chosen": "It is", "rejected": "It was", "unfinished": True, "rejected_images": own[0]["images"]}
    own[1]["sample_weight"] = 0.5
    write_rows(tmp_path / "data", own)
    monkeypatch.setattr(pairs, "load_model", None)
    argv = ("--method", "unpaired", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert command(*argv, "--model", "world", "--seed", 1) == 0  # `aspo run` gives both to every method
    assert "4 rows of 2 pairs" in capsys.readouterr().out
    made = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    name = own[0]["id"]
    assert [(row["id"], row["completion"], row["label"]) for row in made[:2]] == [
        (f"{name}-chosen", "Yes.", True),
        (f"{name}-rejected", "No.", False),
    ]
    assert [row.get("unfinished") for row in made] == [None, None, True, True]
    assert [row.get("sample_weight") for row in made] == [None, None, 0.5, 0.5]
    assert made[0]["images"] == made[1]["images"] == made[3]["images"] != made[2]["images"]
    write_rows(tmp_path / "prompts", world_rows("train", 1))
    with pytest.raises(ValueError, match="column 'chosen': missing"):
        command("--method", "unpaired", "--data", tmp_path / "prompts", "--out", tmp_path / "other")


# ---- all methods ----


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_with_the_same_rows(method, tmp_path, monkeypatch):
    method_command(method, tmp_path / "whole")
    part = tmp_path / "part"

    def write(path, key, parts, real=job.write_shard):
        done.append(key)
        if len(done) in (1, 3):
            raise KeyboardInterrupt  # the shard's images are there, the shard is not
        real(path, key, parts)

    done = []
    monkeypatch.setattr(job, "write_shard", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            method_command(method, part, "--shard-rows", 2)
    method_command(method, part, "--shard-rows", 2)
    assert len(done) == 4 and len(set(done)) == 2
    for name in ("rows.jsonl", "done.jsonl", "settings.json"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((part / "settings.json").read_text())["method"] == method
    with pytest.raises(ValueError, match=f"was begun with other settings .method: {method} -> seva"):
        command("--model", "world", "--data", "world:train", "--out", part)


def test_another_seed_gives_other_pairs(tmp_path):
    for seed in (0, 1):
        method_command("povid", tmp_path / str(seed), "--seed", seed)
    assert (tmp_path / "0" / "rows.jsonl").read_bytes() != (tmp_path / "1" / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--method", "csr"), "--method csr needs --model"),
        (("--method", "csr", "--model", "world"), "csr scores sentences against the image: give --scorer"),
        (("--method", "sentinel", "--model", "world"), "--judge similarity scores .*: give --scorer"),
        (("--method", "csr", "--model", "world", "--noise-step", 3), "--noise-step is not read by --method csr"),
        (("--model", "world", "--scorer", "world"), "--scorer is not read by --method seva"),
        (("--method", "unpaired", "--batch-size", 3), "--batch-size is not read by --method unpaired"),
        (
            ("--method", "sentinel", "--model", "world", "--judge", "truth", "--scorer", "world"),
            "--scorer is not read by",
        ),
        (("--method", "sentinel", "--model", "world", "--judge", "eye"), "--judge is 'eye'"),
        ((*("--method", "csr"), *METHODS["csr"], "--temperature", 0), "--temperature is 0; next sentences are sampled"),
        (
            (*("--method", "csr"), *METHODS["csr"], "--engine", "x"),
            "--engine is 'x'; it must be one of transformers, vllm",
        ),
        ((*("--method", "csr"), *METHODS["csr"], "--clip-weight", 1.5), "--clip-weight is 1.5; it must be 0 to 1"),
        ((*("--method", "csr"), *METHODS["csr"], "--language", "xx"), "language 'xx'"),
        ((*("--method", "csr"), *METHODS["csr"], "--engine", "vllm"), "needs the package vllm, which is not installed"),
    ],
)
def test_options_that_do_not_fit(argv, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # also where it is installed
    with pytest.raises(ValueError, match=message):
        command(*argv, "--data", "world:train", "--limit", 2, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_fit(tmp_path):
    row = {**world_rows("train", 1)[0], "id": "a"}
    write_rows(tmp_path / "two", [{**row, "images": row["images"] * 2}])
    write_rows(tmp_path / "blind", [{k: v for k, v in row.items() if k != "scene"}])
    out = ("--out", tmp_path / "out")
    with pytest.raises(ValueError, match="row 'a': it has 2 images; sentences are judged against exactly one"):
        command("--method", "csr", *METHODS["csr"], "--data", tmp_path / "two", *out)
    with pytest.raises(ValueError, match="row 'a': --judge truth needs its 'scene'"):
        command("--method", "sentinel", *METHODS["sentinel"], "--data", tmp_path / "blind", *out)


# ---- vLLM ----


class _Vllm(types.ModuleType):
    """Stands for vLLM: its call signatures, the world's model behind them, one completion of two sentences or more."""

    def __init__(self, vlm):
        super().__init__("vllm")
        model, processor = vlm
        module = self
        module.calls, module.built = [], None

        class SamplingParams:
            def __init__(self, *, n, temperature, max_tokens, seed, logprobs, stop_token_ids):
                self.__dict__.update(locals())

        class LLM:
            def __init__(self, model, *, dtype, seed, limit_mm_per_prompt):
                module.built = {"model": model, "dtype": dtype, "seed": seed, "limit": limit_mm_per_prompt}

            def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
                module.calls.append((prompts, sampling_params))
                return [self._answer(*asked) for asked in zip(prompts, sampling_params, strict=True)]

            def _answer(self, prompt, params):
                text = processor.tokenizer.decode(prompt["prompt_token_ids"])
                assert len(prompt["multi_modal_data"]["image"]) == 1
                inputs = processor(
                    text=text, images=prompt["multi_modal_data"]["image"], add_special_tokens=False, return_tensors="pt"
                )
                torch.manual_seed(params.seed)
                found = model.generate(
                    **inputs,
                    do_sample=True,
                    max_new_tokens=params.max_tokens,
                    num_return_sequences=params.n,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                new = found.sequences[:, inputs["input_ids"].shape[1] :]
                outputs = []
                for row, ids in enumerate(new.tolist()):
                    end = next((k for k, token in enumerate(ids) if token in params.stop_token_ids), None)
                    ids = ids if end is None else ids[: end + 1]
                    logps = [found.logits[k][row].log_softmax(-1)[token].item() for k, token in enumerate(ids)]
                    given = [{token: types.SimpleNamespace(logprob=x)} for token, x in zip(ids, logps, strict=True)]
                    reason = "length" if end is None else "stop"
                    outputs.append(types.SimpleNamespace(token_ids=ids, logprobs=given, finish_reason=reason))
                return types.SimpleNamespace(outputs=outputs)

        self.SamplingParams, self.LLM = SamplingParams, LLM


def test_vllm_by_its_call_signatures(vlm, tmp_path, monkeypatch):
    model, processor = vlm
    stub = _Vllm(vlm)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr(pairs, "load_model", None)  # vLLM loads the model
    assert method_command("csr", tmp_path / "out", "--engine", "vllm", "--max-new-tokens", 14) == 0
    assert stub.built["model"] == str(world.assets_dir() / "vlm") and stub.built["limit"] == {"image": 1}
    prompts, parameters = stub.calls[0]
    image_token = processor.image_token_id
    assert all(prompt["prompt_token_ids"].count(image_token) == 1 for prompt in prompts)
    assert {p.n for p in parameters} == {2} and len({p.seed for p in parameters}) == len(parameters)
    rows = load_rows(tmp_path / "out")
    validate_rows(rows)
    options = {**csr.OPTIONS, "model": "world", "max_new_tokens": 14}
    from aspo.pairs.vllm_sampler import VllmSampler

    row, beginning = rows[0], "The ring is blue."
    for begun in ("", beginning):
        (found,) = VllmSampler(options, True).candidates([row], [begun], 4, 7)
        expected = last_sentence_logps(
            model, processor, [row] * len(found), [begun] * len(found), [c.text for c in found], 8
        )
        for candidate, value in zip(found, expected, strict=True):
            assert candidate.text.startswith(" The" if begun else "The") and candidate.text.endswith(".")
            assert candidate.logp == pytest.approx(value, abs=1e-4)  # one token a word: the same tokens
    (blind,) = VllmSampler(options, False).candidates([row], [""], 2, 7)
    assert all(c.logp is None for c in blind) and stub.calls[-1][1][0].logprobs is None


def test_vllm_does_not_load_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: merge it first"):
        steps.load_sampler({"engine": "vllm", "model": str(tmp_path)}, lambda: None, True)
