"""`aspo controls`: truth by hand, boundaries that still cover the text, a similarity of the AUC that was asked for."""

import argparse
import itertools
import random
import re

import pytest
import torch

from aspo.data import load_rows
from aspo.folder import write_rows
from aspo.sentences import split_sentences
from aspo.world import controls
from aspo.world.controls import (
    control_weights,
    corrupt_boundaries,
    minmax,
    noised_image,
    sentence_truth,
    similarity_auc,
)
from aspo.world.data import rows as world_rows
from aspo.world.language import describe
from aspo.world.scenes import USUAL, Scene, render
from aspo_kernels import SentenceLayout, objectives


def _rows(n=6, seed=0):
    """Preference rows of the world whose chosen answers state the usual colour in every second sentence."""
    rng = random.Random(seed)
    made = []
    for row in world_rows("train", n):
        scene = Scene.from_json(row["scene"])
        sentences = [f"The {t.shape} is {USUAL[t.shape] if k % 2 else t.colour}." for k, t in enumerate(scene.things)]
        text = " ".join(sentences)
        spans = [list(span) for span in split_sentences(text)]
        truth = sentence_truth(text, spans, scene)
        similarity = [(0.3 if true else 0.1) + rng.uniform(-0.15, 0.15) for true in truth]
        answers = {"chosen": text, "rejected": describe(scene) + " There is a ring."}
        made.append({**row, **answers, "chosen_sentences": spans, "chosen_similarity": similarity})
    return made


def test_truth_by_hand():
    row = world_rows("train", 1)[0]
    scene = Scene.from_json(row["scene"])
    thing, other = scene.things[:2]
    wrong = next(c for c in ("red", "blue") if c != other.colour)
    text = f"The {thing.shape} is {thing.colour}. The {other.shape} is {wrong}. Blub."
    first, second = text.index(". ") + 2, text.index("Blub")
    assert sentence_truth(text, [[0, first], [first, second], [second, len(text)]], scene) == [True, False, None]
    assert sentence_truth(text, [[0, second], [second, len(text)]], scene) == [
        False,
        None,
    ]  # a merged one, partly wrong


def test_weights_are_those_of_their_kind():
    (row,) = _rows(1)
    truth = control_weights(row, "truth", random.Random(0))
    assert set(truth) == {0.0, 1.0} and control_weights(row, "inverse", random.Random(0)) == [1 - w for w in truth]
    own = control_weights(row, "similarity", random.Random(0))
    assert own == minmax(row["chosen_similarity"]) and min(own) == 0.0 and max(own) == 1.0
    shuffles = [control_weights(row, "shuffled", random.Random(seed)) for seed in range(20)]
    assert all(sorted(s) == sorted(own) for s in shuffles) and any(s != own for s in shuffles)
    assert minmax([0.2, 0.2 + 1e-6]) == [0.0, 0.0]
    with pytest.raises(ValueError, match="no chosen_similarity"):
        control_weights({**row, "chosen_similarity": None}, "shuffled", random.Random(0))
    with pytest.raises(ValueError, match="no scene"):
        control_weights({**row, "scene": None}, "truth", random.Random(0))
    with pytest.raises(ValueError, match="has no chosen_sentences: run `aspo score` on the rows first"):
        control_weights({**row, "chosen_sentences": None}, "truth", random.Random(0))


def test_given_weights_of_the_similarity_are_aspo_s():
    """The controls' road and ASPO-S's give the same losses and gradients, up to rounding of the weights to fp32."""
    rows = _rows(4)
    similarity = torch.tensor([s for row in rows for s in row["chosen_similarity"]])
    weights = [w for row in rows for w in control_weights(row, "similarity", random.Random(0))]
    weights = torch.tensor([*weights, *[0.0] * 4])  # and the rejected sentences', which are not read
    counts = [len(row["chosen_sentences"]) for row in rows]
    ids = torch.tensor([[min(t // 2, c - 1) for t in range(12)] for c in counts] + [[0] * 12] * 4)
    layout = SentenceLayout.from_labels(torch.randint(5, (8, 12)), ids)
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = (-torch.rand(layout.num_tokens, generator=generator) for _ in range(2))
    results = []
    for given in ({"similarity": similarity}, {"sentence_weights": weights}):
        x = logps.clone().requires_grad_()
        options = {"alpha": 1.0} if "similarity" in given else {"weights": "given"}
        result = objectives.get("aspo")(objectives.Inputs(layout, x, ref_logps, **given), **options)
        result.losses.sum().backward()
        results.append((result.losses, x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["merge", "split"])
def test_corrupted_boundaries_still_cover_the_text(kind):
    text = "The circle is red. The star is blue. Yes. The heart is at the top left."
    clean = [list(span) for span in split_sentences(text)]
    assert corrupt_boundaries(text, kind, 0.0, random.Random(0)) == clean
    for seed in range(20):
        spans = corrupt_boundaries(text, kind, 0.5, random.Random(seed))
        assert [spans[0][0], spans[-1][1]] == [0, len(text)]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        assert all(text[a:b].strip() for a, b in spans)
    everything = corrupt_boundaries(text, kind, 1.0, random.Random(0))
    assert len(everything) == (1 if kind == "merge" else 7)  # "Yes." has no space to cut at
    many = " ".join([text] * 100)
    lost = len(split_sentences(many)) - len(corrupt_boundaries(many, "merge", 0.3, random.Random(0)))
    assert 0.25 * 399 < lost < 0.35 * 399


def test_similarities_are_weakened_to_the_auc_that_was_asked_for():
    rows = _rows(120)
    before = similarity_auc(rows, [row["chosen_similarity"] for row in rows])
    values, sd = controls.weakened(rows, 0.6, 0)
    assert before > 0.7 and similarity_auc(rows, values) == pytest.approx(0.6, abs=0.003) and sd > 0
    assert values == controls.weakened(rows, 0.6, 0)[0] != controls.weakened(rows, 0.6, 1)[0]
    for target in (0.5, 0.99):
        with pytest.raises(ValueError, match=r"must be above 0.5 and at most the rows' own, 0\.\d+"):
            controls.weakened(rows, target, 0)


def test_an_auc_that_few_rows_cannot_have_is_told():
    """Noise alone may tell the sentences of few rows apart by chance: no deviation brings them down to the target."""
    rows = _rows(6)
    told = []
    for seed in range(40):
        try:
            controls.weakened(rows, 0.52, seed)
        except ValueError as error:
            told.append(str(error))
    assert 0 < len(told) < 40
    assert all(
        re.fullmatch(r"--similarity-auc 0.52 was not met within 0.\d+ on 6 rows: give more rows", t) for t in told
    )


def test_images_under_noise_are_of_the_scene_and_the_seed():
    row, other = world_rows("train", 2)
    clear = render(Scene.from_json(row["scene"]))
    assert noised_image(row, 0, 5).tobytes() == clear.tobytes()
    noised = noised_image(row, 700, 0)
    assert noised.size == clear.size and noised.tobytes() == noised_image(row, 700, 0).tobytes()
    assert len({noised.tobytes(), noised_image(row, 700, 1).tobytes(), noised_image(other, 700, 0).tobytes()}) == 3

    def distance(step):
        a, b = (torch.tensor(list(i.tobytes()), dtype=torch.float32) for i in (clear, noised_image(row, step, 0)))
        return float((a - b).abs().mean())

    assert 0 < distance(200) < distance(500) < distance(900)


def _run(*argv):
    parser = argparse.ArgumentParser()
    controls.add_arguments(parser)
    return controls.run(parser.parse_args(list(map(str, argv))))


def test_the_command_writes_rows_that_training_takes(tmp_path, capsys):
    write_rows(tmp_path / "rows", _rows(40))
    assert _run("--data", tmp_path / "rows", "--out", tmp_path / "w", "--weights", "truth") == 0
    written = load_rows(tmp_path / "w")
    assert [len(r["chosen_sentence_weights"]) for r in written] == [len(r["chosen_sentences"]) for r in written]
    _run("--data", tmp_path / "rows", "--out", tmp_path / "b", "--boundaries", "merge", "--share", 1, "--limit", 3)
    merged = load_rows(tmp_path / "b")
    assert len(merged) == 3 and [len(r["chosen_sentences"]) for r in merged] == [1, 1, 1]
    assert "chosen_similarity" not in merged.column_names  # of other sentences: to be scored again
    _run("--data", tmp_path / "rows", "--out", tmp_path / "a", "--similarity-auc", 0.6)
    _run("--data", "world:train", "--out", tmp_path / "n", "--noise-step", 600, "--limit", 2)
    assert len(load_rows(tmp_path / "n", kind="prompt")) == 2
    assert "chosen_sentence_weights are truth, mean 0." in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 changes given"):
        _run("--data", tmp_path / "rows", "--out", tmp_path / "x", "--weights", "truth", "--noise-step", 3)
    with pytest.raises(ValueError, match="--share 2"):
        _run("--data", tmp_path / "rows", "--out", tmp_path / "x", "--boundaries", "merge", "--share", 2)
