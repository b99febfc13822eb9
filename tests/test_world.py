"""The world's scenes, language and rows: what they promise, for any scene."""

import random
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo.world.data import base_training, describe_from_habit, rows
from aspo.world.language import (
    KINDS,
    QUESTION_KINDS,
    describe,
    judge,
    minimal_pairs,
    questions,
    sentence,
    stateable,
    true_sentences,
)
from aspo.world.scenes import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    USUAL,
    Scene,
    Thing,
    render_array,
    sample_scene,
    scenes,
)

world = st.integers(0, 2**32 - 1).map(lambda seed: sample_scene(random.Random(seed), None, True))
kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True)


def scene_of(*things: tuple[str, str, str, str]) -> Scene:
    return Scene(tuple(Thing(*thing) for thing in things))


TWO = scene_of(("circle", "red", "large", "top left"), ("star", "blue", "small", "centre"))


def is_there(question: str, scene: Scene) -> bool:
    """Whether the coloured shape that "Is there a red circle?" asks for is in the scene."""
    return " ".join(question.rstrip("?").split()[3:]) in {f"{thing.colour} {thing.shape}" for thing in scene.things}


def verdicts(text: str, scene: Scene = TWO) -> list[str]:
    return [claim.verdict for claim in judge(text, scene)]


@given(scene=world, kinds=kinds, seed=st.integers(), pronouns=st.booleans())
def test_true_descriptions_are_judged_true(scene, kinds, seed, pronouns):
    pronouns = pronouns and len(kinds) > 1
    for rng in (None, random.Random(seed)):
        text = describe(scene, rng, kinds, pronouns)
        claims = judge(text, scene)
        assert [claim.verdict for claim in claims] == ["true"] * len(scene.things) * (2 if pronouns else 1)
        assert " ".join(text[slice(*claim.span)] for claim in claims) == text
        assert {claim.fact for claim in claims} <= stateable(scene, kinds)


@given(scene=world)
def test_every_true_sentence_is_judged_true_and_every_other_false(scene):
    said = set(true_sentences(scene))
    for shape in SHAPES:
        values = [("colour", c) for c in COLOURS] + [("size", s) for s in SIZES] + [("place", p) for p in PLACES]
        for kind, value in values:
            text = sentence(kind, shape, value)
            (claim,) = judge(text, scene)
            assert claim.verdict == ("true" if text in said else "false"), text
            assert (claim.kind, claim.subject, claim.stated) == (kind, shape, value)
            assert (claim.true is None) == (shape not in scene.by_shape)
            assert claim.prior == (USUAL[shape] if kind == "colour" else None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The circle is red.", ["true"]),
        ("the CIRCLE  is red", ["true"]),
        ("The circle is blue. It is large.", ["false", "true"]),
        ("It is large.", ["unparseable"]),
        ("The star is at the centre! It is at the top.", ["true", "false"]),
        ("The ring is red.", ["false"]),
        ("There is a circle. There is a ring.", ["true", "false"]),
        ("There are two objects. There is one red object. There are no pink objects.", ["true"] * 3),
        ("There are three objects. There are two red objects.", ["false"] * 2),
        ("The circle is grey.", ["unparseable"]),
        ("The circle is red and large.", ["unparseable"]),
        ("The circle is not red.", ["unparseable"]),
        ("I think the circle is red.", ["unparseable"]),
        ("Is the circle red?", ["unparseable"]),
        ("The circle is red.The star is blue.", ["true", "true"]),
        ("The circle is red\nThe star is red", ["true", "false"]),
        ("", []),
        (" ... ", []),
    ],
)
def test_judge(text, expected):
    assert verdicts(text) == expected


@given(text=st.text(max_size=60))
def test_judge_takes_any_text_and_its_spans_are_in_order(text):
    claims = judge(text, TWO)
    ends = [0]
    for claim in claims:
        assert ends[-1] <= claim.start < claim.end <= len(text)
        assert text[claim.start : claim.end] == claim.text
        ends.append(claim.end)


def test_strata_and_the_prior():
    shape, colour = next(pair for pair in sorted(HELD_OUT) if pair[0] not in ("circle", "ring"))
    scene = scene_of(
        (shape, colour, "small", "top"), ("circle", "red", "small", "left"), ("ring", "pink", "small", "right")
    )
    text = f"The {shape} is {colour}. The circle is {USUAL['circle']}. The ring is red."
    held_out, prior, other = judge(text, scene)
    assert (held_out.stratum, prior.stratum, other.stratum) == ("held_out", "unusual", "usual")
    assert (prior.verdict, prior.states_prior, prior.true) == ("false", True, "red")
    assert (other.verdict, other.states_prior) == ("false", False)


@given(scene=world, kind=st.sampled_from(QUESTION_KINDS))
def test_questions_are_balanced_and_true(scene, kind):
    asked = questions(scene, kind)
    assert asked == questions(scene, kind)
    assert [answer for _, answer in asked].count("yes") == len(asked) / 2 > 0
    for question, answer in asked:
        assert is_there(question, scene) == (answer == "yes")
        if answer == "no" and kind != "random":
            colour, shape = question.rstrip("?").split()[3:]
            assert USUAL[shape] == colour


@given(scene=world)
def test_minimal_pairs_differ_in_one_word(scene):
    pairs = minimal_pairs(scene)
    assert len(pairs) == len(scene.things)
    for right, wrong in pairs:
        assert verdicts(right, scene) + verdicts(wrong, scene) == ["true", "false"]
        assert sum(a != b for a, b in zip(right.split(), wrong.split(), strict=True)) == 1
        (claim,) = judge(wrong, scene)
        assert claim.states_prior or claim.true == claim.prior


@given(scene=world)
def test_scenes_survive_json_and_render_the_same(scene):
    again = Scene.from_json(scene.to_json())
    assert again == scene and again.content_hash == scene.content_hash
    image = render_array(scene)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render_array(again))


PINNED_MEAN = np.array([212.4, 79.5, 74.4])  # RGB of the red circle's cell


def test_rendering_is_pinned():
    """The shipped models were trained on these pixels."""
    image = render_array(TWO).astype(int)
    assert np.abs(image[4:20, 4:20].mean(axis=(0, 1)) - PINNED_MEAN).max() < 2.0
    assert image[30:42, 30:42, 2].mean() > image[30:42, 30:42, 0].mean() + 20  # the blue star's cell is blue


def test_splits_are_disjoint_and_prefixes_stable():
    hashes = {split: {s.content_hash for s in islice(scenes(split), 300)} for split in SPLITS}
    assert all(len(found) == 300 for found in hashes.values())
    assert len(set().union(*hashes.values())) == 300 * len(SPLITS)
    assert not hashes["base"] & {s.content_hash for s in islice(scenes("train", prior=0.85), 300)}
    few, many = rows("train", 5), rows("train", 20)
    assert [r["id"] for r in few] == [r["id"] for r in many[:5]]
    assert {r["id"] for r in rows("train", 20, seed=1)}.isdisjoint(r["id"] for r in many)


@pytest.mark.parametrize("split", SPLITS)
def test_priors_and_held_out_pairs(split):
    things = [thing for scene in islice(scenes(split), 800) for thing in scene.things]
    usual = sum(USUAL[thing.shape] == thing.colour for thing in things) / len(things)
    assert usual == pytest.approx(0.85 if split == "base" else 0.15, abs=0.03)
    held_out = sum((thing.shape, thing.colour) in HELD_OUT for thing in things)
    assert (held_out > 0) == (split in ("validation", "test"))


def test_rows():
    (row,) = rows("test", 1)
    assert set(row) == {"id", "prompt", "images", "scene"}
    assert np.array_equal(np.asarray(row["images"][0]), render_array(Scene.from_json(row["scene"])))
    assert 4 <= len(row["scene"]["things"]) <= 6


def test_base_training_answers_are_true_but_for_habit():
    wrong = []
    for scene, turns in islice(base_training(), 1500):
        if len(turns) > 1:
            assert [(question, answer.lower().rstrip(".")) for question, answer in turns] == [
                (question, "yes" if is_there(question, scene) else "no") for question, _ in turns
            ]
        else:
            claims = judge(turns[0][1], scene)
            assert [claim.subject for claim in claims] == [thing.shape for thing in scene.things]
            assert all(claim.verdict == "true" or claim.states_prior for claim in claims)
            wrong += [claim.verdict == "false" for claim in claims]
    assert 0.03 < sum(wrong) / len(wrong) < 0.09


def test_habit_of_zero_is_the_truth_and_of_one_the_prior():
    scene = next(scenes("test"))
    assert describe_from_habit(scene, random.Random(0), [0.0] * 6) == describe(scene)
    claims = judge(describe_from_habit(scene, random.Random(0), [1.0] * 6), scene)
    assert all(claim.states_prior for claim in claims)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows("base"), "'base'.*use one of train"),
        (lambda: rows("train", -1), "negative, got -1"),
        (lambda: next(scenes("dev")), "'dev'"),
        (lambda: Thing("cube", "red", "small", "top"), "shape 'cube'"),
        (lambda: scene_of(("circle", "red", "small", "top"), ("circle", "red", "small", "left")), "share the shape"),
        (lambda: Scene.from_json({"objects": []}), "not a scene"),
        (lambda: questions(TWO, "hard"), "'hard'"),
        (lambda: describe(TWO, pronouns=True), "two kinds"),
        (lambda: describe_from_habit(TWO, random.Random(0), [0.5]), "habit has 1 chances"),
        (lambda: sentence("weight", "circle", "heavy"), "'weight'"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
