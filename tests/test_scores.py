"""Scores: each library's own cosine, windows for long sentences, one computation a sentence, restart after a kill."""

import argparse
import json

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLIP_CONTEXT, tiny_clip, tiny_image, tiny_open_clip, tiny_rows
from transformers import CLIPModel, CLIPProcessor

from aspo import scores
from aspo.data import load_rows, validate_rows, write_rows
from aspo.folder import read_lines
from aspo.scorers import equal_windows, load_scorer
from aspo.scores import score_rows

SHORT = ["The star is red.", "It is small."]
LONG = "The small yellow circle is there beside one big blue cube and the background is black only, is it red?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    return {
        "transformers": tiny_clip(root / "hf"),
        "open_clip": tiny_open_clip(root / "oc"),
        "open_clip_own": tiny_open_clip(root / "own", own_tokenizer=False),
    }


def names(folders):
    return [f"{kind.split('_own')[0]}:{folder}" for kind, folder in folders.items()]


def test_transformers_cosines_are_the_models_own(folders):
    model = CLIPModel.from_pretrained(folders["transformers"])
    processor = CLIPProcessor.from_pretrained(folders["transformers"])
    images = [tiny_image("red"), tiny_image("blue")]
    inputs = processor(text=SHORT, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp()
    scorer = load_scorer(f"transformers:{folders['transformers']}")
    torch.testing.assert_close(scorer.image_features(images) @ scorer.text_features(SHORT).T, expected)


@pytest.mark.parametrize("kind", ["open_clip", "open_clip_own"])
def test_open_clip_cosines_are_the_models_own(folders, kind):
    name = f"local-dir:{folders[kind]}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    images = [tiny_image("red"), tiny_image("blue")]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(SHORT), normalize=True)
    scorer = load_scorer(f"open_clip:{folders[kind]}")
    torch.testing.assert_close(scorer.image_features(images) @ scorer.text_features(SHORT).T, image @ text.T)


def test_long_sentences_are_windows_averaged_by_tokens(folders):
    for name in names(folders):
        scorer = load_scorer(name)
        prefix, content, suffix = scorer.tokenise(LONG)
        windows = equal_windows(content, CLIP_CONTEXT - 2)
        assert len(windows) >= 2 and [t for w in windows for t in w] == content
        cosines = []
        image = scorer.image_features([tiny_image()])
        for window in windows:
            ids = torch.full((1, CLIP_CONTEXT), scorer.pad_id)
            row = prefix + window + suffix
            ids[0, : len(row)] = torch.tensor(row)
            with torch.no_grad():
                text = scorer.encode_tokens(ids, (torch.arange(CLIP_CONTEXT) < len(row)).long()[None])
            cosines.append(torch.nn.functional.cosine_similarity(image, text).item())
        expected = sum(c * len(w) for c, w in zip(cosines, windows, strict=True)) / len(content)
        both = scorer.text_features([LONG, SHORT[0]])
        assert (image @ both[0]).item() == pytest.approx(expected, abs=1e-6)
        assert both[1].norm().item() == pytest.approx(1, abs=1e-6)
        # what a tokenizer that cuts would have lost matters
        assert (image @ scorer.text_features([LONG + " No star."])[0]).item() != pytest.approx(expected, abs=1e-6)


def test_a_sentence_without_tokens_of_its_own_has_a_score(folders):
    for name in names(folders):
        assert load_scorer(name).text_features([""]).norm().item() == pytest.approx(1, abs=1e-6)


@given(st.integers(0, 400), st.integers(1, 75))
def test_windows_are_equal_and_few(length, size):
    windows = equal_windows(list(range(length)), size)
    assert [t for w in windows for t in w] == list(range(length))
    assert max(map(len, windows)) <= size and max(map(len, windows)) - min(map(len, windows)) <= 1
    assert len(windows) == max(1, -(-length // size))


def test_identity_follows_the_weights(folders, tmp_path):
    same = load_scorer(f"transformers:{tiny_clip(tmp_path / 'same')}")
    other = load_scorer(f"transformers:{tiny_clip(tmp_path / 'other', seed=1)}")
    assert same.identity == load_scorer(f"transformers:{folders['transformers']}").identity != other.identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "scorer 'clip' is unknown"),
        ("open_clip:", "is unknown"),
        ("open_clip:ViT-B-32", "names no folder and no weights"),
        ("open_clip:ViT-B-32/laion2b_s34", "no weights 'laion2b_s34' for ViT-B-32, .*; near it: laion2b_s34b_b79k"),
        ("open_clip:ViT-B-33/openai", "no architecture 'ViT-B-33'; near it: ViT-B-3.{,60}$"),
        ("open_clip:nope/nope", "no architecture 'nope'; near it: .{,80}$"),
    ],
)
def test_unknown_scorers(name, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(name)


class Counting:
    """A scorer that counts what it encodes: the cosine of image and text is the number of letters / 100."""

    identity = "counting"

    def __init__(self, stop_after=10**9, bad=None):
        self.texts, self.images, self.stop_after, self.bad = [], 0, stop_after, bad

    def image_features(self, images):
        self.images += len(images)
        return torch.ones(len(images), 1)

    def text_features(self, texts):
        self.texts += texts
        if len(self.texts) > self.stop_after:
            raise KeyboardInterrupt
        return torch.tensor([[float("nan") if t == self.bad else len(t) / 100] for t in texts])


def unscored(n):
    return [
        {k: v for k, v in row.items() if k not in ("chosen_sentences", "chosen_similarity")} for row in tiny_rows(n)
    ]


def test_scores_belong_to_their_sentences():
    for row in score_rows(unscored(5), Counting(), columns=("chosen", "rejected"), batch_size=2):
        for column in ("chosen", "rejected"):
            sentences = [row[column][a:b].strip() for a, b in row[f"{column}_sentences"]]
            assert len(sentences) >= 2
            assert row[f"{column}_similarity"] == pytest.approx([len(s) / 100 for s in sentences])


class Redness(Counting):
    """A scorer whose every cosine is the share of red in the image's middle pixel."""

    def image_features(self, images):
        super().image_features(images)
        return torch.tensor([[image.getpixel((15, 15))[0] / 255] for image in images])

    def text_features(self, texts):
        return torch.ones_like(super().text_features(texts))


def test_a_response_is_scored_against_the_images_that_it_is_read_with():
    red, blue = (tiny_image(colour, (0, 0, 30, 30)) for colour in ("red", "blue"))
    rows = [{**row, "images": [red]} for row in unscored(3)]
    rows[1]["rejected_images"] = [blue]
    rows[2] |= {"chosen_images": [blue], "rejected_images": []}
    scorer = Redness()
    found = list(score_rows(rows, scorer, columns=("chosen", "rejected")))
    of_red, of_blue = (scorer.image_features([image]).item() for image in (red, blue))
    for row, expected in zip(found, ((of_red, of_red), (of_red, of_blue), (of_blue, of_red)), strict=True):
        for column, value in zip(("chosen", "rejected"), expected, strict=True):
            assert row[f"{column}_similarity"] == pytest.approx([value] * len(row[f"{column}_sentences"]))
    rows[1]["rejected_images"] = [blue, blue]
    with pytest.raises(ValueError, match="row 'row-1': it has 2 rejected images"):
        list(score_rows(rows, scorer, columns=("chosen", "rejected")))
    list(score_rows(rows, scorer))  # what is not scored may be read with any number


def test_given_sentences_are_kept():
    row = {**unscored(1)[0], "chosen": "A red ball", "chosen_sentences": [[0, 2], [2, 10]]}
    scored = next(score_rows([row], Counting()))
    assert scored["chosen_similarity"] == pytest.approx([0.01, 0.08])


def test_each_sentence_of_an_image_is_scored_once(tmp_path):
    rows = unscored(2)
    rows = [rows[0], rows[1], {**rows[0], "id": "again"}]
    first = Counting()
    done = list(score_rows(rows, first, cache=tmp_path / "c.jsonl"))
    assert len(first.texts) == len(set(first.texts)) and first.images == 2
    second = Counting()
    assert list(score_rows(rows, second, cache=tmp_path / "c.jsonl")) == done
    assert second.texts == [] and second.images == 0


def test_a_killed_run_goes_on(tmp_path):
    rows, cache = unscored(9), tmp_path / "c.jsonl"
    expected = list(score_rows(rows, Counting(), batch_size=2))
    stopped = Counting(stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        list(score_rows(rows, stopped, cache=cache, batch_size=2))
    cache.write_bytes(cache.read_bytes()[:-7])  # the kill came while the last line was written
    kept = len(list(read_lines(cache)))
    again = Counting()
    assert list(score_rows(rows, again, cache=cache, batch_size=2)) == expected
    assert kept > 0 and len(list(read_lines(cache))) == len({line["key"] for line in read_lines(cache)})


def test_another_scorer_or_image_is_scored_anew(tmp_path):
    rows, cache = unscored(1), tmp_path / "c.jsonl"
    list(score_rows(rows, Counting(), cache=cache))
    other = Counting()
    other.identity = "other"
    list(score_rows(rows, other, cache=cache))
    assert other.texts
    repainted = Counting()
    list(score_rows([{**rows[0], "images": [tiny_image("green", (0, 0, 3, 3))]}], repainted, cache=cache))
    assert repainted.texts


def test_bad_rows_are_named():
    rows = unscored(2)
    with pytest.raises(ValueError, match=r"row 'row-1': the similarity of 'There is one .*' to its image is nan"):
        rows[1]["chosen"] = "There is one star."
        list(score_rows(rows, Counting(bad="There is one star.")))
    with pytest.raises(ValueError, match="row 'row-0': it has 2 images"):
        list(score_rows([{**rows[0], "images": rows[0]["images"] * 2}], Counting()))


def command(*argv):
    parser = argparse.ArgumentParser()
    scores.add_arguments(parser)
    return scores.run(parser.parse_args([str(a) for a in argv]))


def test_command(folders, tmp_path, capsys):
    write_rows(tmp_path / "in", unscored(5))
    argv = ("--data", tmp_path / "in", "--out", tmp_path / "out", "--scorer", f"open_clip:{folders['open_clip']}")
    assert command(*argv, "--rejected", "--batch-size", 2) == 0
    assert "of 5 chosen responses" in capsys.readouterr().out
    rows = load_rows(tmp_path / "out")
    validate_rows(rows)
    assert rows["id"] == [f"row-{i}" for i in range(5)]
    assert all(len(r["rejected_similarity"]) == len(r["rejected_sentences"]) == 2 for r in rows)
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert json.loads(before.splitlines()[0])["images"][0].startswith("images/")
    assert command(*argv, "--rejected") == 0  # nothing new: the same file again
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    in_place = (tmp_path / "in", "--out", tmp_path / "in", *argv[4:])
    with pytest.raises(ValueError, match=r"3 rows that would be lost, e\.g\. row 'row-2'"):
        command("--data", *in_place, "--limit", 2)
    assert "chosen_similarity" not in load_rows(tmp_path / "in").column_names
    assert command("--data", *in_place) == 0
    assert (tmp_path / "in" / "rows.jsonl").read_text().count("chosen_similarity") == 5


def test_a_damaged_cache_is_named(tmp_path):
    cache = tmp_path / "scores.jsonl"
    cache.write_text('{"key": "a", "similarity": 0.1}\n{bad\n')
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 2 is no JSON"):
        list(score_rows(unscored(1), Counting(), cache=cache))


def test_command_errors(tmp_path):
    write_rows(tmp_path / "in", unscored(1))
    argv = ("--data", tmp_path / "in", "--out", tmp_path / "out", "--scorer", "world")
    with pytest.raises(ValueError, match="--batch-size is 0"):
        command(*argv, "--batch-size", 0)
    with pytest.raises(ValueError, match="language 'xx'"):
        command(*argv, "--language", "xx")
