"""Token rewards: object words and where they stand, the verifier and its calibration, the command from data to rows."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_clip, tiny_image

from aspo.cli import Parser
from aspo.data import Collator, load_rows, validate_rows
from aspo.folder import write_rows
from aspo.model import load_model
from aspo.rewards.analysis import bleu, rouge_l, sentence_truth
from aspo.rewards.calibrate import answer_rows, calibration_of, judged_scores, summary
from aspo.rewards.command import add_arguments, reward_words, run
from aspo.rewards.object_words import ObjectVocabulary, judge_words, load_vocabulary
from aspo.rewards.token_scores import check_apart
from aspo.rewards.verifier import Calibration, Verifier, auc, calibrate, compare_towers
from aspo.scorers import load_scorer, transformers_scorer
from aspo.world import load_clip_hf
from aspo.world.scenes import Scene, Thing

SCENE = Scene((Thing("circle", "red", "small", "top"), Thing("star", "blue", "large", "left")))


class FakeScorer:
    """Every image is the x axis; a word's cosine with it is what `cosines` says."""

    identity = "fake"

    def __init__(self, **cosines: float) -> None:
        self.cosines = cosines
        self.texts: list[str] = []

    def image_features(self, images: Any) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]] * len(images))

    def text_features(self, texts: Any) -> torch.Tensor:
        self.texts += texts
        values = [self.cosines.get(text.strip("<>"), 0.0) for text in texts]
        return torch.tensor([[value, math.sqrt(max(0.0, 1 - value**2))] for value in values])


def rewards(*arguments: Any) -> int:
    parser = Parser(prog="aspo rewards", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


# --- object words ---


def test_object_words_have_their_places_their_entries_and_their_names():
    vocabulary = ObjectVocabulary(["person, man", "hot dog", "dog, puppy", "giraffe", "Straße"])
    text = "Two  hot\n dogs, a PUPPY and Men? A man on the STRASSE (a straße), puppies."
    found = [(text[w.start : w.end], w.entry, w.name) for w in vocabulary.words(text)]
    assert found == [
        ("hot\n dogs", "hot dog", "hot dog"),
        ("PUPPY", "puppy", "dog"),
        ("Men", "man", "person"),
        ("man", "man", "person"),
        ("STRASSE", "strasse", "strasse"),
        ("straße", "strasse", "strasse"),
        ("puppies", "puppy", "dog"),
    ]
    assert ObjectVocabulary(vocabulary.lines).canonical == vocabulary.canonical
    assert vocabulary.mentions("a girafe") == []
    irregular = ObjectVocabulary(["person, traffic policeman", "computer mouse", "knife, knive", "wolf"])
    text = "Traffic policemen, computer mice, knives, a wolf among wolves"
    assert irregular.mentions(text) == ["person", "computer mouse", "knife", "wolf", "wolf"]


@pytest.mark.parametrize(
    ("said", "name"),
    [("girafe", "giraffe"), ("GIRAFFFE", "giraffe"), ("bananna", "banana"), ("bananas", "banana"),
     ("skatebaord", "skateboard"), ("girrafe", None), ("house", None), ("grasses", None), ("cot", None)],
)  # fmt: skip
def test_small_misspellings_count_and_other_words_do_not(said, name):
    vocabulary = ObjectVocabulary(["giraffe", "banana", "horse", "glasses", "cat", "skateboard"])
    assert [word.name for word in vocabulary.words(f"a {said}.", fuzzy=True)] == ([name] if name else [])


def test_a_word_is_right_by_the_list_of_objects():
    vocabulary = ObjectVocabulary(["dog, puppy", "cat", "car"])
    words = vocabulary.words("A puppy, a car and a cat.")
    assert judge_words("", words, {"objects": ["dog", "CAT"]}, vocabulary) == [True, False, True]
    with pytest.raises(ValueError, match="'bird' is not in the object vocabulary"):
        judge_words("", words, {"objects": ["bird"]}, vocabulary)
    with pytest.raises(ValueError, match="needs 'objects'"):
        judge_words("", words, {}, vocabulary)


def test_a_scenes_shapes_are_right_if_there_and_its_colours_if_their_sentence_is():
    vocabulary = load_vocabulary("world")
    text = "The circle is blue. The star is blue. The ring is red. There are two red objects. Red red."
    found = [word.entry for word in vocabulary.words(text)]
    verdicts = judge_words(text, vocabulary.words(text), {"scene": SCENE.to_json()}, vocabulary)
    assert list(zip(found, verdicts, strict=True)) == [
        ("circle", True), ("blue", False), ("star", True), ("blue", True), ("ring", False), ("red", False),
        ("red", False), ("red", None), ("red", None),
    ]  # fmt: skip


def test_vocabularies_of_the_world_of_the_rows_and_of_a_file(tmp_path):
    assert len(load_vocabulary("world").entries) == 16
    assert "red" not in load_vocabulary("world:shapes").canonical
    assert load_vocabulary("rows", [{"objects": ["Dog", "cat"]}, {"objects": ["dog"]}]).lines == ["cat", "dog"]
    with pytest.raises(ValueError, match="the vocabulary would be empty"):
        load_vocabulary("rows", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="the world has world, world:shapes, world:colours"):
        load_vocabulary("world:sizes")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="the object vocabulary is empty"):
        load_vocabulary(str(tmp_path / "empty.txt"))


# --- the verifier and its calibration ---


def test_baselines_scale_and_auc_by_hand():
    found = calibrate([0.3, 0.5, 0.4], [0.1, 0.3])
    assert (found.mu_correct, found.mu_hallucinated) == pytest.approx((0.4, 0.2))
    assert found.scale == pytest.approx(math.sqrt((0.01 + 0.01 + 0 + 0.01 + 0.01) / 3))
    assert found.auc == pytest.approx(5.5 / 6)  # 0.3 against 0.3 is half a win
    assert found.counts == {"correct": 3, "hallucinated": 2}


def test_the_reward_is_piecewise_around_the_baselines():
    of = Calibration(mu_correct=0.4, mu_hallucinated=0.1, scale=0.2, margin=0.05, auc=1.0, counts={})
    for score, reward in ((0.6, 1.0), (0.45, 0.25), (0.44, 0.0), (0.4, 0.0), (0.2, 0.0), (0.06, 0.0), (0.05, -0.25),
                          (-0.1, -1.0)):  # fmt: skip
        assert of.reward(score) == pytest.approx(reward), score
    without = Calibration(0.4, 0.1, 0.2, 0.0, 1.0, {})
    assert [without.reward(x) for x in (0.4, 0.25, 0.1)] == [0.0, 0.0, 0.0]
    assert without.reward(0.5) == pytest.approx(0.5) and without.reward(0.0) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ([0.1, 0.2], [0.2, 0.3], "the verifier does not separate: the mean similarity is 0.1500"),
        ([0.2, 0.2], [0.2, 0.2], "does not separate"),
        ([0.3, 0.3], [0.1, 0.1], "do not vary"),
        ([0.1, 0.2], [], "0 hallucinated object words were found"),
        ([], [0.1, 0.2], "0 correct object words were found"),
    ],
)
def test_a_verifier_that_says_nothing_stops(right, wrong, says):
    with pytest.raises(ValueError, match=says):
        calibrate(right, wrong)


def test_auc_counts_pairs():
    torch.manual_seed(0)
    right, wrong = torch.randint(0, 9, (40,)).tolist(), torch.randint(-2, 7, (30,)).tolist()
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    assert auc(right, wrong) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc([], [1.0]))


def test_a_word_has_one_score_by_its_entry_the_bare_word_is_read_and_no_image_has_none():
    scorer = FakeScorer(giraffe=0.5, cat=-0.25)
    verifier = Verifier(scorer, ObjectVocabulary(["giraffe", "cat", "dog"]))
    rows = [{"images": [tiny_image()]}, {"images": []}]
    scored = verifier.scores(rows, [["Two girafes and a cat.", "A giraffe."], ["A cat.", ""]])
    assert [[[(s.word.entry, s.score) for s in text] for text in row] for row in scored] == [
        [[("giraffe", 0.5), ("cat", -0.25)], [("giraffe", 0.5)]], [[], []]
    ]  # fmt: skip
    assert sorted(scorer.texts) == ["cat", "dog", "giraffe"]
    templated = FakeScorer()
    Verifier(templated, ObjectVocabulary(["cat"]), "<{}>").scores(rows[:1], [["cat"]])
    assert templated.texts == ["<cat>"]
    with pytest.raises(ValueError, match="the place of the word"):
        Verifier(scorer, ObjectVocabulary(["cat"]), "a word")


def test_a_similarity_that_is_nan_and_a_wrong_number_of_images_name_the_row():
    verifier = Verifier(FakeScorer(cat=math.nan), ObjectVocabulary(["cat"]))
    with pytest.raises(ValueError, match="row 'seven': the similarity of 'cat' to its image is nan"):
        verifier.scores([{"id": "seven", "images": [tiny_image()]}], [["A cat."]])
    with pytest.raises(ValueError, match="row 'eight': it has 2 images"):
        verifier.scores([{"id": "eight", "images": [tiny_image()] * 2}], [["A cat."]])


class ColourScorer(FakeScorer):
    """A red image is the x axis, any other the y axis."""

    def image_features(self, images: Any) -> torch.Tensor:
        super().image_features(images)
        return torch.tensor([[1.0, 0.0] if image.getpixel((15, 15))[0] > 200 else [0.0, 1.0] for image in images])


def test_a_word_is_scored_by_the_image_that_its_response_is_read_with():
    red, blue = (tiny_image(colour, (0, 0, 30, 30)) for colour in ("red", "blue"))
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "Oh, a cat.", "images": [red]}
    rows = [
        {**row, "id": "a"},
        {**row, "id": "b", "rejected_images": [blue]},
        {**row, "id": "c", "rejected_images": []},
    ]
    verifier = Verifier(ColourScorer(cat=0.6), ObjectVocabulary(["cat"]))
    calibration = Calibration(0.0, 0.0, 1.0, 0.0, 1.0, {})  # the reward is the cosine
    found = reward_words(verifier, calibration, rows)
    values = [[spans[column] for column in ("chosen", "rejected")] for spans in found]
    assert values[0] == values[2] == [[(2, 5, pytest.approx(0.6))], [(6, 9, pytest.approx(0.6))]]
    assert values[1] == [[(2, 5, pytest.approx(0.6))], [(6, 9, pytest.approx(0.8))]]
    for images in ({"images": [blue]}, {"images": [tiny_image()], "rejected_images": [blue]}):
        with pytest.raises(ValueError, match="row 'a' of --data has the image of row 'known' of --calibrate"):
            check_apart([{"id": "known", "images": [blue]}], [{**rows[0], **images}], "--calibrate")
    check_apart([{"id": "known", "images": [blue]}], rows[:1], "--calibrate")


@pytest.fixture(scope="module")
def world():
    return load_model("world", device="cpu")


def test_the_models_own_tower_is_known_by_its_features(world, tmp_path):
    clip, processor = load_clip_hf()
    own = compare_towers(world[0], load_scorer("world", "cpu"))
    assert own["own"] and own["layers"] == "4 of 4" and own["difference"] < 1e-4
    assert compare_towers(world[0], transformers_scorer(clip, processor))["own"]
    with torch.no_grad():
        clip.vision_model.encoder.layers[2].mlp.fc1.weight.mul_(1.5)
    changed = compare_towers(world[0], transformers_scorer(clip, processor))
    assert not changed["own"] and changed["layers"] == "2 of 4"
    other = compare_towers(world[0], load_scorer(f"transformers:{tiny_clip(tmp_path / 'clip')}", "cpu"))
    assert not other["own"] and "does not take the scorer's pixels" in other["reason"]


# --- from data to rows ---


def pairs_folder(folder: Path, count: int = 5) -> Path:
    rows = load_rows("world:train", kind="prompt", limit=count)
    texts = ["The circle is red. The star is blue.", "The ring is pink."]
    write_rows(folder, [{**row, "chosen": texts[0], "rejected": texts[1]} for row in rows])
    return folder


FISAO = ("--method", "fisao", "--model", "world", "--scorer", "world", "--objects", "world", "--device", "cpu",
         "--calibrate", "world:calibration", "--calibrate-limit", 24, "--max-new-tokens", 48)  # fmt: skip

TLDR = ("--method", "tldr", "--model", "world", "--objects", "world", "--train", "world:calibration")


def test_fisao_from_data_to_rows(tmp_path, capsys):
    data, out = pairs_folder(tmp_path / "pairs"), tmp_path / "out"
    assert rewards(*FISAO, "--data", data, "--out", out, "--batch-size", 16) == 0
    said = capsys.readouterr().out
    assert "the scorer's image tower is the model's own (4 of 4 layers)" in said and "5 rows scored" in said
    calibration = Calibration.load(out / "calibration.json")
    assert calibration.template == "The {}" and calibration.mu_correct > calibration.mu_hallucinated
    assert Image.open(out / "calibration.png").size[0] > 100

    rows = load_rows(out)
    validate_rows(rows)
    verifier = Verifier(load_scorer("world", "cpu"), load_vocabulary("world"), "The {}")
    _, processor = load_model("world", device="cpu")
    batch = Collator(processor)([rows[0]])
    expected = []
    for text in (rows[0]["chosen"], rows[0]["rejected"]):
        scores = {s.word.start: calibration.reward(s.score) for s in verifier.scores([rows[0]], [[text]])[0][0]}
        ids = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        expected += [scores.get(start + (text[start : start + 1] == " "), 0.0) for start, _ in ids] + [0.0]
    torch.testing.assert_close(batch["token_scores"], torch.tensor(expected))
    assert (batch["token_scores"] != 0).any()


def test_a_stopped_command_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    data = pairs_folder(tmp_path / "pairs")
    arguments = (*FISAO, "--data", data, "--batch-size", 16)
    rewards(*arguments, "--out", tmp_path / "whole")
    calls = []

    def stopping(self, *args, original=Verifier.scores):
        calls.append(1)
        if len(calls) in (2, 4):  # in the calibration, then in the rows
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Verifier, "scores", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rewards(*arguments, "--out", tmp_path / "stopped")
    rewards(*arguments, "--out", tmp_path / "stopped")
    for name in ("calibration.json", "calibration.jsonl", "rows.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name, lines in (("calibration.jsonl", 21), ("rows.jsonl", 3)):  # as a kill within a batch leaves them
        path = tmp_path / "stopped" / name
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept[:lines]) + kept[lines][:30])
    (tmp_path / "stopped" / "calibration.json").unlink()
    rewards(*arguments, "--out", tmp_path / "stopped")
    for name in ("calibration.json", "calibration.jsonl", "rows.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    done = len(calls)
    rewards(*arguments, "--out", tmp_path / "stopped")
    assert len(calls) == done  # nothing is computed twice


def test_bad_input_is_one_clear_line(tmp_path):
    data, out = pairs_folder(tmp_path / "pairs", 2), tmp_path / "out"
    with pytest.raises(ValueError, match="--scorer is missing: --method fisao needs it"):
        rewards("--method", "fisao", "--model", "world", "--objects", "world", "--calibrate", "x", "--out", out)
    with pytest.raises(ValueError, match="--train is not read by --method fisao, only by tldr: drop it"):
        rewards(*FISAO, "--train", "x", "--out", out)
    with pytest.raises(ValueError, match="name another folder"):
        rewards(*FISAO, "--data", data, "--out", data)
    with pytest.raises(ValueError, match="the rows have no truth"):
        rewards(*FISAO[:-4], "--calibrate", _without_truth(tmp_path / "plain"), "--out", out)
    calibration = load_rows("world:calibration", kind="prompt", limit=3)
    same = tmp_path / "same"
    write_rows(same, [{**calibration[1], "chosen": "A circle.", "rejected": "A star."}])
    with pytest.raises(ValueError, match="of --data has the image of row"):
        rewards(*FISAO, "--data", same, "--out", out)
    assert not out.exists()
    rewards(*FISAO, "--out", out)
    with pytest.raises(ValueError, match=r"begun with other settings \(margin: 0.0 -> 0.1\)"):
        rewards(*FISAO, "--margin", 0.1, "--out", out)
    assert rewards(*FISAO, "--data", data, "--out", out) == 0  # the data may come later


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--method", "changes", "--margin", 0.3), "--margin is not read by --method changes, only by fisao"),
        (
            ("--method", "changes", "--dtype", "bfloat16"),
            "--dtype is not read by --method changes, only by fisao, tldr",
        ),
        (("--method", "changes", "--max-new-tokens", 9), "--max-new-tokens is not read by --method changes"),
        ((*TLDR, "--temperature", 0.2), "--temperature is not read by --method tldr, only by fisao"),
        ((*TLDR, "--margin", 0), "--margin is not read by --method tldr"),
        ((*TLDR, "--learning-rate", 0), "--learning-rate is 0.0; it must be positive"),
        ((*FISAO, "--epochs", 3), "--epochs is not read by --method fisao, only by tldr"),
        ((*FISAO, "--learning-rate", 0.1), "--learning-rate is not read by --method fisao"),
        ((*FISAO, "--analyse", "--margin", 0.1), "--analyse makes no rewards: drop --margin"),
        ((*FISAO, "--analyse"), "--analyse looks at answers to the --calibrate rows: drop --data"),
        ((*FISAO, "--after", "world"), "--after is the second model of --analyse"),
        ((*FISAO, "--margin", -1), "--margin is -1.0; it must be at least 0"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(tmp_path, given, says):
    analysed = ("--analyse" in given) and ("--margin" in given)
    data = () if analysed else ("--data", pairs_folder(tmp_path / "pairs", 1))
    with pytest.raises(ValueError, match=says):
        rewards(*given, *data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_would_stop_it_behind_the_answers_are_refused_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr("aspo.rewards.calibrate.generate_answers", lambda *_, **__: pytest.fail("it answered"))
    rows = [dict(row) for row in load_rows("world:calibration", kind="prompt", limit=3)]
    several = rows[1]["images"] + rows[2]["images"]

    def refused(says: str, *extra: Any, **last: Any) -> None:
        write_rows(tmp_path / "known", [*rows[:2], {**rows[2], **last, "id": "last"}])
        with pytest.raises(ValueError, match=says):
            rewards(*FISAO[:-6], "--calibrate", tmp_path / "known", *extra, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("row 'last': it has 2 images; its answers are scored against one", images=several)
    refused("row 'last': no truth to judge object words by", scene=None)
    refused("row 'last': object 'giraffe' is not in the object vocabulary", objects=["giraffe"])
    refused("row 'last': it has 0 images", "--analyse", images=[])
    (other,) = load_rows("world:train", kind="prompt", limit=1)
    pair = {**other, "id": "pair", "chosen": "A thing.", "rejected": "A circle."}
    write_rows(tmp_path / "pairs", [{**pair, "rejected_images": [tiny_image("red"), tiny_image("blue")]}])
    refused("row 'pair': it has 2 images; words are scored against one", "--data", tmp_path / "pairs")


def _without_truth(folder: Path) -> Path:
    write_rows(folder, [{"id": "a", "prompt": "What?", "images": [tiny_image()]}])
    return folder


def test_bare_words_do_not_separate_in_the_world_and_the_command_says_so(tmp_path):
    with pytest.raises(ValueError, match="the verifier does not separate"):
        rewards(*FISAO, "--template", "{}", "--objects", "world:colours", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "calibration.json").exists()
    assert len((tmp_path / "out" / "calibration.jsonl").read_text().splitlines()) == 24  # what was computed stays


def test_changes_need_no_model(tmp_path):
    data = tmp_path / "pairs"
    row = {
        "id": "a",
        "prompt": "What?",
        "chosen": "The big cat sits on the mat.",
        "rejected": "The big dog sits on the mat.",
    }
    write_rows(data, [row])
    of_a_recipe = ("--model", "world", "--seed", 3)  # `aspo run` gives them to every method
    rewards("--method", "changes", "--data", data, *of_a_recipe, "--out", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "rows.jsonl").read_text())
    (start, end, score), (other, stop, _) = made["chosen_token_scores"][0], made["rejected_token_scores"][0]
    assert "cat" in row["chosen"][start:end] and "dog" in row["rejected"][other:stop] and score == 1.0
    assert "mat" not in row["chosen"][start:end]


def test_the_summary_warns_of_a_weak_verifier():
    found = calibrate([0.2, 0.4, 0.1, 0.35], [0.1, 0.35, 0.2, 0.38])
    found = replace(found, counts={**found.counts, "answers": 4, "unjudged": 0})
    assert found.auc < 0.6 and "mostly noise" in summary(found, [])
    assert "mostly noise" not in summary(replace(found, auc=0.7), [])


# --- evidence ---


def test_bleu_by_hand():
    assert bleu("the cat sat on the mat", ["the cat sat on the mat"]) == pytest.approx(1.0)
    # 1-grams 3 of 4 (one "the" too many is clipped); one added: 2-grams 2 of 4, 3-grams 1 of 3, 4-grams 1 of 2
    precisions = (3 / 4) * (2 / 4) * (1 / 3) * (1 / 2)
    assert bleu("the cat the sat", ["a the cat sat"]) == pytest.approx(precisions**0.25)
    short = math.exp(1 - 4 / 2) * (1 * (1 + 1) / (1 + 1) * 1 * 1) ** 0.25
    assert bleu("the cat", ["the cat sat down"]) == pytest.approx(short)
    assert bleu("", ["a"]) == 0.0 and bleu("dog", ["cat"]) == 0.0


def test_rouge_by_hand():
    assert rouge_l("The cat, sat!", ["the cat sat"]) == 1.0
    assert rouge_l("a b c d", ["a c x d y"]) == pytest.approx(2 * 3 / (4 + 5))
    assert rouge_l("a b", ["x", "b a"]) == pytest.approx(2 * 1 / 4)
    assert rouge_l("", ["x"]) == 0.0


def test_a_sentence_is_right_by_its_claim_or_by_its_object_words():
    text = "The circle is blue. The star is blue. Hm."
    truth = [sentence_truth(text, span, {"scene": SCENE.to_json()}, []) for span in ((0, 20), (20, 38), (38, 41))]
    assert truth == [False, True, None]
    words = [[4, 7, "cat", 0.1, True], [10, 13, "dog", 0.1, False], [30, 33, "cat", 0.1, None]]
    assert [sentence_truth("", s, {}, words) for s in ((0, 9), (0, 15), (20, 40))] == [True, False, None]


def test_analysis_of_two_models(tmp_path, capsys):
    out = tmp_path / "out"
    rewards(*FISAO, "--analyse", "--after", "world", "--out", out)
    result = json.loads((out / "analysis.json").read_text())
    before, after = ({k: v for k, v in result[name].items() if k != "model"} for name in ("before", "after"))
    assert before == after  # the same model, the same seed
    assert before["answers"] == 24 and 0 < before["bleu"] < 1
    areas = [before[level]["auc"] for level in ("token_level", "sentence_level")]
    pearson = before["correlation"]["sentence scores and BLEU"]["pearson"]
    for found in (*areas, pearson):
        assert 0 < found["low"] < found["value"] < found["high"] <= 1
    gap = before["auc_sentence_level_minus_token_level"]
    assert gap["value"] == pytest.approx(areas[1]["value"] - areas[0]["value"]) and gap["low"] < gap["high"]
    changes = result["after_minus_before"].values()  # on the same resamples
    assert len(changes) == 11 and all(change == {"value": 0, "low": 0, "high": 0} for change in changes)
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == result
    assert Image.open(out / "analysis.png").size[0] > 1000


def test_answers_of_other_rows_are_not_taken(world, tmp_path):
    verifier = Verifier(FakeScorer(circle=0.4), load_vocabulary("world:shapes"))
    rows = load_rows("world:calibration", kind="prompt", limit=4)
    answers = answer_rows(lambda: world, rows, verifier, tmp_path / "a.jsonl", batch_size=4, max_new_tokens=24)
    assert all(len(x["words"]) > 0 for x in answers) and judged_scores(answers)[0]
    with pytest.raises(ValueError, match="holds answers to other rows"):
        answer_rows(lambda: world, rows.select([1, 0]), verifier, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"hallucinated object words were found|does not separate"):
        calibration_of(answers, verifier, 0.0, "fake", None)
