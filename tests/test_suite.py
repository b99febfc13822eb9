"""Benchmarks from their own files: scores against hand arithmetic, resuming, the judge, and the command end to end."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import io
import json
import shutil
import threading
import time
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
import torch
from suite_judge import serve
from tiny import tiny_image, tiny_llava

from aspo import cli
from aspo import evaluate as command
from aspo.evaluation.metrics import summarise
from aspo.evaluation.statistics import compare
from aspo.generation import Answer
from aspo.report import read_evaluation
from aspo.suite import run as suite_run
from aspo.suite.amber import AMBER, AMBER_D, Associations
from aspo.suite.benchmark import Source
from aspo.suite.chair import CHAIR, CocoObjects
from aspo.suite.command import OWN
from aspo.suite.hallusion import HALLUSION
from aspo.suite.judge import Judge
from aspo.suite.mmhal import MMHAL
from aspo.suite.mmvp import MMVP, chosen
from aspo.suite.pope import POPE
from aspo.suite.run import Options, run_benchmark, select
from aspo.suite.shr import SHR, sentences

FIXTURES = Path(__file__).parent / "suite_fixtures"
MODEL = torch.nn.Linear(2, 2)


def files(name, folder):
    """A copy of a benchmark's fixture, with an image of its own wherever its rows look for one."""
    root = folder / name
    shutil.copytree(FIXTURES / name, root)
    for number, path in enumerate(dict.fromkeys(p for row in OWN[name].load(Source(root)) for p in row["images"])):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tiny_image(box=(0, 0, 1 + number, 20)).save(path)
    return root


class Said:
    """Stands in for generation: `answers` in the rows' order, or by prompt; counts the rows it was asked."""

    def __init__(self, monkeypatch, answers):
        self.answers, self.asked = answers, []
        monkeypatch.setattr(suite_run, "generate_answers", self)
        monkeypatch.setattr("aspo.evaluation.identity.processor_settings", lambda *_: {})  # MODEL has no configuration

    def __call__(self, model, processor, rows, **options):
        self.asked += [row["prompt"] for row in rows]
        texts = [self.answers.pop(0) for _ in rows]
        return [Answer(text, len(text.split()) + 1, True) for text in texts]


def score(benchmark, root, monkeypatch, answers, judge=None, **options):
    """(figures, items) of a benchmark on the stub's answers."""
    Said(monkeypatch, list(answers))
    rows = select(benchmark.load(Source(root)), None)
    items = run_benchmark(benchmark, rows, MODEL, None, Options(**options), judge, workers=2)
    assert [item["id"] for item in items] == [row["id"] for row in rows]
    return summarise([item["counts"] for item in items]), items


def test_pope(tmp_path, monkeypatch):
    # random:      yes "Yes, there is."  no "Yes."  yes "No"  no "I cannot tell."
    #              right 1 of 4; "yes" 2 of 4; F1 = 2*1 / (2*1 + 1 false yes + 1 missed) = 1/2; 1 of 4 unanswered
    # popular:     yes "yes"  no "No, there is no table."     right 2 of 2, F1 = 2 / 2
    # adversarial: no "Yes"  yes "Yes"                        right 1 of 2, F1 = 2 / (2 + 1)
    # all:         right 4 of 8; hits 3, false yes 2, missed 1: F1 = 6 / 9; "yes" 5 of 8
    answers = ["Yes, there is.", "Yes.", "No", "I cannot tell.", "yes", "No, there is no table.", "Yes", "Yes"]
    figures, items = score(POPE, files("pope", tmp_path), monkeypatch, answers)
    accuracy = [figures[f"yes_no_accuracy_{split}"] for split in ("random", "popular", "adversarial", "all")]
    assert accuracy == [1 / 4, 1, 1 / 2, 4 / 8]
    f1 = [figures[f"yes_no_f1_{split}"] for split in ("random", "popular", "adversarial", "all")]
    assert f1 == pytest.approx([1 / 2, 1, 2 / 3, 2 / 3])
    assert (figures["yes_ratio_random"], figures["yes_ratio_all"]) == (1 / 2, 5 / 8)
    assert (figures["yes_no_unanswered_random"], figures["yes_no_unanswered_all"]) == (1 / 4, 1 / 8)
    assert {item["cluster"] for item in items} == {f"COCO_val2014_00000000000{k}.jpg" for k in (1, 2)}


def test_chair(tmp_path, monkeypatch):
    # image  true                    answer                                         named (absent)
    # 1      car dog person          two men, a dog, a puppy, a chair               person dog dog (chair)
    # 2      chair                   a stool and a table                            chair (dining table)
    # 3      toilet                  a toilet with its seat up                      toilet: its seat is no chair
    # 4      bird, dining table      a baby bird                                    bird: "baby" is no person here
    # 5      knife                   a hot dog and a teddy bear                     (hot dog) (teddy bear)
    # CHAIR_i = 4 absent / 10 named; CHAIR_s = 3 of 5 answers; coverage = (2 + 1 + 1 + 1 + 0) / (3 + 1 + 1 + 2 + 1)
    by_image = {
        "1": "Two men and a dog. A puppy sits in a chair.",
        "2": "A stool and a table.",
        "3": "A toilet with its seat up.",
        "4": "A baby bird.",
        "5": "A hot dog and a teddy bear.",
    }
    root = files("chair", tmp_path)
    order = [row["id"] for row in CHAIR.load(Source(root))]
    assert sorted(order) == list("12345") and order != list("12345")  # drawn, always in the same order
    figures, items = score(CHAIR, root, monkeypatch, [by_image[k] for k in order])
    assert (figures["chair_i"], figures["chair_s"], figures["object_coverage"]) == (4 / 10, 3 / 5, 5 / 8)
    assert {item["id"]: item["absent"] for item in items} == {
        **{"1": ["chair"], "2": ["dining table"], "3": [], "4": []},
        "5": ["hot dog", "teddy bear"],
    }


def test_the_words_of_coco():
    words = CocoObjects(
        ["person, man, woman, baby, passenger", "train", "bear", "knife, knive", "mouse", "bear, panda"]
    )
    assert words.named("Women, a passenger and a baby") == ["person"] * 3
    assert words.named("a passenger train, an adult bear, baby bears, pandas") == ["train", "bear", "bear", "bear"]
    assert words.named("Train tracks, a train track; trains on tracks") == ["train"]
    assert words.named("Women with manes under skies") == ["person"]
    assert words.named("Three knives, two mice, women. Seats.") == ["knife", "mouse", "person"]


def test_amber(tmp_path, monkeypatch):
    # image 1, true sky forest person, expected of a liar cloud dog: man = person, camera is safe, trees = forest,
    #   dogs and clouds are absent ("can be seen" names no can): named 5, absent 2, covered 2 of 3, expected 2 of 2
    # image 2, true sea ship ship, lures bird person: boats = ship (one of the two), water = sea: named and covered 2
    # image 3, true grass dog, lure tree: dog, ground = grass, a can is absent: named 3, absent 1, covered 2 of 2
    # CHAIR = 3/10, Cover = 6/8, Hal = 2/3 answers, Cog = 2 / (2 + 2 + 1)
    # questions (truth: said): no: No; no: Yes | yes: No; no: No | yes: Yes; no: "Unsure."
    #   existence: right 1/2, "no" said 1, true 2, hit 1: F1 = 2/3.  attribute: 1/2; said 2, true 1, hit 1: F1 = 2/3
    #   relation: 1/2; said 0: precision undefined, recall 0/1.  all: 3/6; said 3, true 4, hit 2: F1 = 4/7
    answers = [
        "A man with a camera stands by trees. Dogs can be seen under clouds.",
        "Two boats on the water.",
        "A dog on the ground and a can.",
        *("No.", "Yes.", "No.", "No", "Yes", "Unsure."),
    ]
    figures, items = score(AMBER, files("amber", tmp_path), monkeypatch, answers)
    names = ("amber_chair", "amber_cover", "amber_hal", "amber_cog")
    assert [figures[name] for name in names] == [3 / 10, 6 / 8, 2 / 3, 2 / 5]
    kinds = ("existence", "attribute", "relation", "all")
    assert [figures[f"amber_{kind}_accuracy"] for kind in kinds] == [1 / 2] * 4
    assert [figures[f"amber_{kind}_f1"] for kind in kinds] == pytest.approx([2 / 3, 2 / 3, 0, 4 / 7])
    assert [figures[f"amber_{kind}_precision"] for kind in kinds] == [1, 1 / 2, None, 2 / 3]
    assert [figures[f"amber_{kind}_recall"] for kind in kinds] == [1 / 2, 1, 0, 2 / 4]
    assert figures["amber_relation_unanswered"] == 1 / 2
    assert figures["amber_score"] == pytest.approx((1 - 3 / 10 + 4 / 7) / 2)
    assert [item.get("absent") for item in items[:3]] == [["dog", "cloud"], [], ["can"]]


def test_amber_s_words():
    words = Associations(
        {
            "sky": [],
            "can": [],
            "leave": [],
            "ship": ["boat"],
            "bus": [],
            "child": [],
            "man": [],
            "ski": [],
            "glass": [],
        },
        [],
    )
    assert words.nouns("It can leave. Two cans. A can, the leaves; buses and children. CAN") == [
        *("can", "can", "leave", "bus", "child"),
    ]
    assert words.nouns("Manes under blue skies, men on skis, buses, glasses") == ["sky", "man", "ski", "bus", "glass"]
    assert words.owner("boat", ["sky", "ship", "ship"]) == 1 and words.owner("sky", ["ship"]) is None


def test_shr(tmp_path, monkeypatch):
    # 11  A cat sits. The cat is red. [A cat sits.] It is calm.   correct, hallucination, cannot judge   words 3 4 3
    # 12  A dog runs.                                             correct                                      3
    # 13  Two boats. A bird.                                      hallucination, correct                       2 2
    # 14  A tree. A house.                                        correct, no verdict                          2
    # 15  (empty)                                                 not asked
    # SHR = 2 / 7 judged; by words (4 + 2) / 19; cannot judge 1/7; 8 sentences, 1 verdict unread; 8/5 an answer
    answers = [
        "A cat sits. The cat is red. A cat sits. It is calm.",
        "A dog runs.",
        "Two boats. A bird.",
        "A tree. A house.",
        "",
    ]
    replies = {
        "The cat is red": "1: correct - it does\n2: hallucination - it is grey\n3: cannot judge - mood",
        "A dog runs": "1: Correct",
        "A bird": "Here they are:\n**1. Hallucination**: nothing is known of two\n2) correct - fine",
        "A tree": "1: correct - yes\nand so on",
    }
    root = files("shr", tmp_path)
    with serve(lambda prompt: next(reply for mark, reply in replies.items() if mark in prompt)) as (url, seen):
        figures, items = score(SHR, root, monkeypatch, answers, Judge(url, "judge"))
    assert figures["shr_judged"] == 2 / 7 and figures["shr_words"] == 6 / 19
    assert (figures["shr_cannot_judge"], figures["shr_sentences"]) == (1 / 7, 8 / 5)
    assert figures["judge_unparsed"] == 1 / 8 and figures["empty"] == 1 / 5
    assert len(seen) == 4 and items[4]["judge"] == []
    assert [s["verdict"] for s in items[3]["sentences"]] == ["correct", None]
    (kept,) = items[0]["judge"]  # what was asked and said stands beside the item
    assert kept["reply"] == replies["The cat is red"]
    assert "[0.10, 0.50, 0.60, 0.75]: a cat on a chair" in kept["prompt"] and "The cat is grey." in kept["prompt"]
    assert sentences("A. B C. B. D") == ["A", "B C", "D"]


def test_mmhal(tmp_path, monkeypatch):
    # ratings 6 3 | 2 | 0 | none | 5: mean 16/5; below 3: 2 of 5; attribute (6 + 3)/2; 1 of 6 replies unread
    ratings = [
        "Good.\nRating: 6",
        "rating: 3",
        "**Rating**: 2",
        "Rating: 1? No.\nRating: 0",
        "Rating: seven",
        "Rating: 5/6",
    ]
    answers = [f"answer {k}" for k in range(6)]
    root = files("mmhal", tmp_path)
    with serve(lambda prompt: ratings[int(prompt.rpartition("answer ")[2])]) as (url, _):
        figures, items = score(MMHAL, root, monkeypatch, answers, Judge(url, "judge"))
    assert (figures["mmhal_score"], figures["mmhal_hallucination"]) == (16 / 5, 2 / 5)
    assert (figures["mmhal_attribute"], figures["mmhal_counting"], figures["mmhal_adversarial"]) == (9 / 2, 2, 5)
    assert figures["judge_unparsed"] == 1 / 6 and figures["mmhal_holistic"] is None
    assert "mmhal_relation" not in figures and [item["rating"] for item in items] == [6, 3, 2, 0, None, 5]
    assert "Things in the image: Cat, Chair" in items[0]["judge"][0]["prompt"]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating (0-6): 4", 4), ("Rating [0 to 6] = 0", 0), ("Rating 0\N{EN DASH}6\n**5**", 5), ("Rating: 4/6", 4),
        ("My rating, from 0 to 6, follows. Rating: 2", 2), ("Rating: 0", 0), ("Rating: 0-6", None),
        ("Rating: 4-5", None), ("Rating: 10", None), ("Rating (0-6): seven", None),
    ],
)  # fmt: skip
def test_a_scale_is_no_rating(reply, rating):
    row = {"type": "other", "own": {}}
    assert MMHAL.score(row, "", [reply])["rating"] == rating


HALLUSION_SAID = ["Yes.", "No.", "Yes.", "Yes.", "I do not know.", "Yes", "Yes", "Maybe."]


def test_hallusionbench(tmp_path, monkeypatch):
    # figure, question: truth, said        right                       right
    # VD 0 0: yes yes  1     VD 0 1: no no   1     VS 0 0: yes, unknown without an image  1    VS 0 1: no yes     0
    # VD 1 0: no yes   0     VD 1 1: yes yes 1     VS 1 0: yes yes                        1    VS 1 1: yes maybe  0
    # aAcc = 5/8. Questions over their figures: VD 0 no, VD 1 yes, VS 0 yes, VS 1 no: qAcc 2/4.
    # Figures: VD 0 yes, VD 1 no, VS 1 no (VS 0 is no figure): fAcc 1/3. Original 3/4, edited 2/4. Uncertain 2/8.
    figures, items = score(HALLUSION, files("hallusionbench", tmp_path), monkeypatch, HALLUSION_SAID)
    names = ("aacc", "qacc", "facc", "easy", "hard", "uncertain")
    assert [figures[f"hallusion_{name}"] for name in names] == [5 / 8, 2 / 4, 1 / 3, 3 / 4, 2 / 4, 2 / 8]
    assert {item["cluster"] for item in items} == {"VD/illusion/0", "VS/chart/0"}


def test_hallusionbench_judged(tmp_path, monkeypatch):
    # The judge takes the place of our matching: here it finds the first two answers wrong and cannot be read once.
    verdicts = ["incorrect", "Incorrect.", "incorrect", "correct", "unclear", "correct", "incorrect", "Hm."]
    said = [f"{answer} #{k}" for k, answer in enumerate(HALLUSION_SAID)]
    with serve(lambda prompt: verdicts[int(prompt.rstrip().rpartition("#")[2])]) as (url, _):
        figures, items = score(HALLUSION, files("hallusionbench", tmp_path), monkeypatch, said, Judge(url, "judge"))
    # right: VD 1 1, VS 0 0 (unclear without an image), VS 1 0: 3/8; questions: VS 0 alone 1/4; figures 0/3; unread 1/8
    assert [figures[f"hallusion_{name}"] for name in ("aacc", "qacc", "facc")] == [3 / 8, 1 / 4, 0]
    assert figures["judge_unparsed"] == 1 / 8 and items[7]["verdict"] == "unread"


def test_a_hard_question_is_right_on_all_its_edited_figures(tmp_path, monkeypatch):
    # The fixture's, and a third figure for both questions of VD: VD 2 0 is answered rightly (VD 1 0 was not), VD 2 1
    # wrongly (VD 1 1 was right). Each of VD's questions is then right on one of two: hard is VS 1 0 of 4, as a question
    # counts once. Alone they would make 3 of 6. The original figure's are what they were.
    root = files("hallusionbench", tmp_path)
    rows = json.loads((root / "HallusionBench.json").read_text())
    edited = [row for row in rows if row["category"] == "VD" and row["figure_id"] == "1"]
    rows += [{**row, "figure_id": "2", "filename": "./hallusion_bench/VD/illusion/0_2.png"} for row in edited]
    (root / "HallusionBench.json").write_text(json.dumps(rows))
    tiny_image(box=(0, 0, 9, 9)).save(root / "hallusion_bench" / "VD" / "illusion" / "0_2.png")
    figures, items = score(HALLUSION, root, monkeypatch, [*HALLUSION_SAID, "No.", "No."])
    assert (figures["hallusion_hard"], figures["hallusion_easy"]) == (1 / 4, 3 / 4)
    assert sum(item["counts"].get("hallusion_hard", 0) for item in items) == 4


def test_mmvp(tmp_path, monkeypatch):
    # pair 1: (a) right, b. right; pair 2: "open" right for (a), wrong for (b); pair 3: neither, (b) right
    # pairs 1/3, single questions 1+1 + 1+0 + 0+1 = 4/6, neither option 1/6
    said = ["(a)", "b.", "The wings are open.", "Open", "It is hard to say.", "The answer is (b)"]
    figures, _ = score(MMVP, files("mmvp", tmp_path), monkeypatch, said)
    names = ("mmvp_pair_accuracy", "mmvp_accuracy", "mmvp_unanswered")
    assert [figures[name] for name in names] == [1 / 3, 4 / 6, 1 / 6]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "a"), ("a)", "a"), ("B. Closed", "b"), ("(B) closed", "b"), ("It is (a), I think", "a"),
        ("The answer is b", "b"), ("Answer: A.", "a"), ("A butterfly with open wings", "a"), ("closed", "b"),
        ("The answer is a butterfly", None), ("open or closed", None), ("", None), ("reopened", None),
    ],
)  # fmt: skip
def test_which_option_an_answer_chooses(text, letter):
    assert chosen(text, {"a": "open", "b": "closed"}) == letter


def test_mmvp_judged(tmp_path, monkeypatch):
    replies = iter(["yes", "Yes.", "no", "yes", "No, it is not", "what?"])  # pairs: 1 of 3; single 3 of 6; unread 1
    with serve(lambda prompt: next(replies)) as (url, _):
        Said(monkeypatch, [f"answer {k}" for k in range(6)])
        rows = MMVP.load(Source(files("mmvp", tmp_path)))
        items = run_benchmark(MMVP, rows, MODEL, None, Options(), Judge(url, "judge"), workers=1)
    figures = summarise([item["counts"] for item in items])
    assert (figures["mmvp_pair_accuracy"], figures["mmvp_accuracy"]) == (1 / 3, 3 / 6)
    assert figures["judge_unparsed"] == 1 / 6


def test_a_limit_keeps_groups_whole(tmp_path):
    assert len(select(MMVP.load(Source(files("mmvp", tmp_path))), 3)) == 4  # pairs
    assert len(select(HALLUSION.load(Source(files("hallusionbench", tmp_path))), 1)) == 4  # a set
    pope = select(POPE.load(Source(files("pope", tmp_path))), 1)
    assert [row["id"] for row in pope] == ["random/1", "random/2", "popular/1", "adversarial/1"]  # all about one image


def test_answers_are_asked_as_told(tmp_path, monkeypatch):
    rows = POPE.load(Source(files("pope", tmp_path)))
    said, seen = Said(monkeypatch, ["Yes"] * 8), []
    run_benchmark(POPE, rows, MODEL, None, Options(append=" Say yes or no.", batch_size=3), save=seen.append)
    assert all(prompt.endswith("? Say yes or no.") for prompt in said.asked) and len(seen) == 8


def test_the_answers_in_the_originals_forms(tmp_path, monkeypatch):
    _, items = score(POPE, files("pope", tmp_path), monkeypatch, ["Yes"] * 8)
    made = POPE.answers(POPE.load(Source(tmp_path / "pope")), items)
    assert made["popular"] == [
        {"question": "Is there a person in the image?", "answer": "Yes"},
        {"question": "Is there a dining table in the image?", "answer": "Yes"},
    ]
    _, items = score(AMBER_D, files("amber", tmp_path), monkeypatch, ["Yes, it is.", "no", "Hm", "a", "b", "c"])
    made = AMBER_D.answers(AMBER_D.load(Source(tmp_path / "amber")), items)
    assert made[:3] == [{"id": 4, "response": "Yes"}, {"id": 5, "response": "No"}, {"id": 6, "response": "Hm"}]


# Files that are not what they should be: one line that says where and what


def broken(tmp_path, name, file, edit):
    root = files(name, tmp_path)
    path = root / file
    path.write_text(edit(path.read_text()))
    return Source(root)


@pytest.mark.parametrize(
    ("name", "file", "edit", "message"),
    [
        ("pope", "coco_pope_random.json", lambda t: t.replace('"label"', '"truth"'), "row 1 has no 'label'; it has"),
        ("pope", "coco_pope_random.json", lambda t: t.replace('"yes"', '"maybe"'), "label is 'maybe'"),
        ("pope", "coco_pope_random.json", lambda t: t + "{\n", "line 5 is no JSON"),
        ("pope", "coco_pope_random.json", lambda t: "", "holds no rows"),
        ("chair", "synonyms.txt", lambda t: t.replace("toilet", "loo"), "category 'toilet', which synonyms.txt lacks"),
        ("chair", "annotations/captions_val2014.json", lambda t: "[]", "is a list; it must be an object"),
        ("amber", "data/annotations.json", lambda t: t.replace('"id": 9', '"id": 10'), "query 9 has no row"),
        ("amber", "data/annotations.json", lambda t: t.replace('"relation"', '"colour"'), "type 'colour'"),
        ("amber", "data/relation.json", lambda t: t[:-3], "relation.json is no JSON"),
        ("shr", "VG/image_data.json", lambda t: t.replace('"image_id": 15', '"image_id": 5'), "image 15 of val_images"),
        ("mmhal", "response_template.json", lambda t: t.replace('"other"', '"more"'), "question_type 'more'"),
        ("hallusionbench", "HallusionBench.json", lambda t: t.replace('"VS"', '"VT"'), "category 'VT'"),
        ("hallusionbench", "HallusionBench.json", lambda t: t.replace('n_id": "1"', 'n_id": "0"'), "twice"),
        ("mmvp", "Questions.csv", lambda t: t.replace("(a) Yes (b) No", "Yes, No"), "look like"),
        ("mmvp", "Questions.csv", lambda t: t.rstrip().rpartition("\n")[0], "holds 5 rows; they come in pairs"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, name, file, edit, message):
    with pytest.raises(ValueError, match=message):
        OWN[name].load(broken(tmp_path, name, file, edit))


def test_two_files_for_one_are_both_named_and_none_is_taken(tmp_path):
    root = files("pope", tmp_path)
    shutil.copy(root / "coco_pope_random.json", root / "aokvqa_pope_random.json")
    with pytest.raises(
        ValueError, match=r"several \*pope_random.json\*: aokvqa_pope_random.json, coco_pope_random.json"
    ):
        POPE.load(Source(root))
    coco = files("chair", tmp_path)
    captions = coco / "annotations"
    (captions / "captions_val2014.json").rename(captions / "captions_val2017.json")
    assert CHAIR.load(Source(coco))
    shutil.copy(captions / "captions_val2017.json", captions / "captions_train2017.json")
    with pytest.raises(ValueError, match=r"captions_train2017.json, annotations.captions_val2017.json"):
        CHAIR.load(Source(coco))


@pytest.mark.parametrize("name", sorted(set(OWN) - {"amber-g", "amber-d"}))
def test_a_missing_file_or_image_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"has no .*: docs/suite.md"):
        OWN[name].load(Source(tmp_path))
    root = files(name, tmp_path)
    rows = OWN[name].load(Source(root))
    Path(next(path for row in rows for path in row["images"])).unlink()
    with pytest.raises(ValueError, match=r"^the image .* is missing: --suite-images"):
        select(rows, None)
    elsewhere = OWN[name].load(Source(root, tmp_path / "elsewhere"))
    assert all(path.startswith(str(tmp_path / "elsewhere")) for row in elsewhere for path in row["images"])


# The judge


def test_the_judge_s_request(tmp_path):
    with serve(lambda prompt: "fine") as (url, seen):
        assert Judge(url + "/", "some/model", key="secret")("Hello") == "fine"
    assert seen[0]["body"] == {
        "model": "some/model",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
    }
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["authorization"] == "Bearer secret"
    assert "secret" not in repr(Judge(url, "m", key="secret"))


def test_the_judge_is_asked_again_where_that_may_help():
    with serve([503, 429, {"choices": []}, "at last"], retry_after="0") as (url, seen):
        assert Judge(url, "m", wait_s=0.01)("Hello") == "at last"
    assert len(seen) == 4
    with serve([b'{"choices": [', "whole"]) as (url, seen):  # the connection is cut
        assert Judge(url, "m", wait_s=0.01)("Hello") == "whole"
    with serve([401, "never"]) as (url, seen), pytest.raises(ValueError, match=r"refuses: HTTP 401: .*status 401"):
        Judge(url, "m", wait_s=0.01)("Hello")
    assert len(seen) == 1
    with serve([500] * 9) as (url, seen), pytest.raises(ValueError, match=r"in 3 tries \(HTTP 500.*to go on"):
        Judge(url, "m", tries=3, wait_s=0.01)("Hello")
    with pytest.raises(ValueError, match=r"did not answer in 2 tries .*refused"):
        Judge(url, "m", tries=2, wait_s=0.01)("Hello")  # nobody listens there any more
    with pytest.raises(ValueError, match="looks like http"):
        Judge("localhost:8000", "m")


def test_replies_on_their_way_are_saved_where_another_request_is_refused(monkeypatch):
    refused, saved = threading.Event(), []

    def reply(self, body):
        prompt = json.loads(body)["messages"][0]["content"]
        if prompt == "refused":
            refused.set()
            raise urllib.error.HTTPError("http://h", 401, "no more", Message(), io.BytesIO())
        refused.wait(10)
        time.sleep(0.3)  # the other's failure is known by now
        if prompt == "late":
            return json.dumps({"choices": [{"message": {"content": "said"}}]}).encode()
        raise OSError("cut")  # would be asked again for half a minute

    monkeypatch.setattr(Judge, "_post", reply)
    judge, start = Judge("http://h/v1", "m", wait_s=10), time.monotonic()
    prompts = ["late", "refused", "cut", "never asked"]
    with pytest.raises(ValueError, match="no more"):
        suite_run._ask(judge, prompts, 3, {}, saved.append, lambda *_: None)
    assert [line["reply"] for line in saved] == ["said"] and time.monotonic() - start < 5


def test_waits_grow_and_are_told_by_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr("aspo.suite.judge.time.sleep", waits.append)
    with serve([500, 500, 500, "done"]) as (url, _):
        Judge(url, "m", wait_s=2)("Hello")
    with serve([429, "done"], retry_after="7") as (url, _):
        Judge(url, "m", wait_s=2)("Hello")
    assert waits == [2, 4, 8, 7]


# The command


def arguments(tmp_path, suite, root, **changes):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = {"model": "m", "suite": suite, "suite-data": root, "out": tmp_path / "out.json", "batch-size": 2} | changes
    return parser.parse_args(
        [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    )


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("aspo.suite.command.load_model", lambda *_, **__: (MODEL, None))
    return lambda answers: Said(monkeypatch, list(answers))


def test_the_command_goes_on_where_it_was_stopped(tmp_path, stub, capsys):
    root = files("shr", tmp_path)
    texts = ["One cat. Two.", "A dog.", "A boat.", "A tree.", "A lamp."]
    stub(texts[:4])  # and then there is nothing left to say
    with pytest.raises(IndexError), serve(lambda prompt: "1: correct\n2: correct") as (url, _):
        command.run(arguments(tmp_path, "shr", root, judge=url, **{"judge-model": "j"}))
    partial = tmp_path / "out.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:
        file.write('{"key": "cut off')

    said = stub(texts[4:])
    with serve(["1: correct", "1: correct", 500, 500, 500, 500, 500, 500]) as (url, seen):
        args = arguments(tmp_path, "shr", root, judge=url, **{"judge-model": "j", "judge-workers": 1})
        with pytest.raises(ValueError, match="did not answer in 6 tries"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("aspo.suite.judge.time.sleep", lambda s: None)
            command.run(args)
    assert len(said.asked) == 1 and len(seen) == 8

    said = stub([])
    with serve(lambda prompt: "1: hallucination\n2: correct") as (url, seen):
        assert command.run(arguments(tmp_path, "shr", root, judge=url, **{"judge-model": "j"})) == 0
        first = json.loads((tmp_path / "out.json").read_text())
        assert len(seen) == 3 and not partial.exists()
        assert command.run(arguments(tmp_path, "shr", root, judge=url, **{"judge-model": "j"})) == 0
        assert len(seen) == 3 and json.loads((tmp_path / "out.json").read_text()) == first  # all was kept
    # 11 has two sentences and one verdict; 12 is correct; the last three, judged at last, hallucinated: 3 of 5
    assert (first["summary"]["shr_judged"], first["summary"]["judge_unparsed"]) == (3 / 5, 1 / 6)
    assert first["judge"] == {"url": url, "model": "j"} and first["suite"] == "shr"
    assert json.loads((tmp_path / "out.answers.json").read_text())["12"] == "A dog."
    out = capsys.readouterr().out
    assert "SHR: hallucinated / sentences with a verdict (%)" in out and "verdicts could not be read" in out


def test_two_systems_are_compared_with_paired_intervals(tmp_path, stub):
    root = files("mmvp", tmp_path)
    for name, said in (("base", ["(a)"] * 6), ("better", ["(a)", "(b)"] * 3)):
        stub(said)
        command.run(arguments(tmp_path, "mmvp", root, out=tmp_path / f"{name}.json"))
    items = {name: read_evaluation(tmp_path / f"{name}.json") for name in ("base", "better")}
    comparison = compare(items, [("better", "base")])
    gain = comparison.differences["better", "base"]["mmvp_pair_accuracy"]
    assert (gain.value, gain.low, gain.high) == (1, 1, 1) and comparison.clusters == 3
    assert comparison.differences["better", "base"]["mmvp_accuracy"].value == 1 / 2


@pytest.mark.parametrize(
    ("suite", "changes", "message"),
    [
        ("pop", {}, "did you mean pope"),
        ("zebra", {}, "neither we nor lmms-eval nor VLMEvalKit"),
        ("shr", {}, "SHR needs a judge: --judge"),
        ("pope", {"judge": "http://h/v1", "judge-model": "m"}, "scored without a judge: drop --judge"),
        ("mmvp", {"judge": "http://h/v1"}, "go together"),
        ("mmvp", {"judge": "h", "judge-model": "m"}, "looks like http"),
        ("mmvp", {"judge-workers": "0", "judge": "http://h/v1", "judge-model": "m"}, "at least 1"),
        ("pope", {"suite-data": "nowhere"}, "is no folder; download POPE: https://github.com/RUCAIBox/POPE"),
        ("pope", {"suite-data": None}, "^give --suite-data DIR: POPE's files, downloaded from https://github.com"),
        ("pope", {"harness": "lmms-eval"}, "which is scored here: drop it"),
        ("pope", {"data": "rows"}, "--data is not read with --suite"),
        ("pope", {"minimal-pairs": "2"}, "--minimal-pairs is not read with --suite"),
        (None, {"suite-data": "x", "data": "rows"}, "--suite-data goes with --suite NAME"),
        (None, {"suite-data": None}, "nothing to evaluate on"),
        ("pope", {"out": "."}, "is a folder; name a file"),
        ("pope", {"limit": "0"}, "--limit is 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, suite, changes, message):
    with pytest.raises(ValueError, match=message):
        command.run(arguments(tmp_path, suite, files("pope", tmp_path), **changes))


def test_a_foreign_result_is_not_written_over(tmp_path, stub):
    (tmp_path / "out.json").write_text('{"items": []}')
    with pytest.raises(ValueError, match="is no result of `aspo eval --suite`"):
        command.run(arguments(tmp_path, "pope", files("pope", tmp_path)))
    assert (tmp_path / "out.json").read_text() == '{"items": []}'


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize(
    ("suite", "judged", "figure"),
    [
        ("pope", False, "yes_no_accuracy_all"), ("chair", False, "chair_s"), ("amber", False, "amber_cover"),
        ("shr", True, "shr_judged"), ("mmhal", True, "mmhal_score"), ("hallusionbench", False, "hallusion_aacc"),
        ("mmvp", False, "mmvp_pair_accuracy"),
    ],
)  # fmt: skip
def test_a_real_model_end_to_end(tmp_path, llava, suite, judged, figure):
    root = files(suite, tmp_path)
    with serve(lambda prompt: "1: hallucination\nRating: 4") as (url, seen):
        judge = {"judge": url, "judge-model": "j"} if judged else {}
        args = arguments(tmp_path, suite, root, model=llava, **{"batch-size": 16, "max-new-tokens": 6, **judge})
        assert command.run(args) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert figure in result["summary"] and bool(seen) == judged
    assert all(1 <= item["tokens"] <= 6 for item in result["items"])
    assert len(result["items"]) == len(OWN[suite].load(Source(root)))
    assert (tmp_path / "out.answers.json").is_file()


def test_a_report_shows_the_benchmark_s_figures(tmp_path, stub, capsys):
    root = files("mmvp", tmp_path)
    for name, said in (("base", ["(a)"] * 6), ("better", ["(a)", "(b)"] * 3)):
        stub(said)
        command.run(arguments(tmp_path, "mmvp", root, out=tmp_path / f"{name}.json"))
    evals = [str(tmp_path / f"{name}.json") for name in ("base", "better")]
    assert cli.main(["report", "--evals", *evals, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "MMVP" in page and "pair accuracy" in page and "+100.0" in page
