"""Negatives: each choice against a plain one, going on after a stop, bad data, figures, pictures."""

import json
import math
import shutil
import tracemalloc
import warnings

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_image, tiny_rows

from aspo import cli
from aspo.data import load_rows, validate_rows, write_rows
from aspo.folder import image_bytes, load_images, read_lines
from aspo.negatives import autoencoder
from aspo.negatives import command as negatives
from aspo.negatives import report as negative_report
from aspo.negatives.command import prompt_text
from aspo.negatives.embeddings import Embeddings, image_key
from aspo.negatives.figures import (
    judged,
    reuse_figures,
    scene_in_box,
    similarity_figures,
    truth_figures,
)
from aspo.negatives.pictures import plot_grid, tsne
from aspo.negatives.pool import read_pool
from aspo.negatives.sae import BilinearSae, SaeConfig, load_sae, save_sae
from aspo.negatives.selection import greedy_diverse, log_density, scores, select
from aspo.negatives.sources import Options, crop_box, crops, noised, pick_from_pool
from aspo.pairs import command as pairs

DIM = 12


class PixelScorer:
    """A stand-in for CLIP: an image's features are its 2 x 2 thumbnail, a text's are drawn by its characters."""

    def __init__(self, identity="pixels", broken=()):
        self.identity, self.broken, self.encoded = identity, broken, 0

    def image_features(self, images):
        self.encoded += len(images)
        small = [np.asarray(i.resize((2, 2), Image.Resampling.BOX), dtype=np.float32).ravel() for i in images]
        features = torch.tensor(np.stack(small)) + 1
        features[[n for n, i in enumerate(images) if i.size in self.broken]] = math.nan
        return torch.nn.functional.normalize(features, dim=-1)

    def text_features(self, texts):
        drawn = [torch.randn(DIM, generator=torch.Generator().manual_seed(len(text))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(drawn), dim=-1)


def colour(number):
    """The number-th of many images of different colours; 0 to 124."""
    return Image.new("RGB", (30, 30), (10 + 48 * (number % 5), 10 + 48 * (number // 5 % 5), 10 + 48 * (number // 25)))


def patches(number):
    """An image of 36 patches of its own colours."""
    values = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((30, 30), Image.Resampling.NEAREST)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(rows in a folder, pool in a folder); the command's scorer is the stand-in."""
    monkeypatch.setattr(negatives, "load_scorer", lambda name, device: PixelScorer(name))
    rows = [{**row, "images": [patches(n)]} for n, row in enumerate(tiny_rows(5))]
    rows[3]["images"] = []
    rows[4]["images"] = [colour(1), colour(2)]
    rows[4]["prompt"] = "Compare."
    write_rows(tmp_path / "data", rows)
    (tmp_path / "pool" / "deeper").mkdir(parents=True)
    for n in range(40):
        colour(n).save(tmp_path / "pool" / ("deeper" if n % 2 else "") / f"{n:03}.png")
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that run the command often: pictures take most of its time."""
    for name in ("plot_grid", "plot_projection"):
        monkeypatch.setattr(negative_report, name, lambda *_: None)
    monkeypatch.setattr(autoencoder, "plot_latents", lambda *_: None)


def command(folder, *extra, method="misp", out="out", pool="pool"):
    pooled = ["--pool", str(folder / pool)] if pool and method not in ("crop", "noise") else []
    scorer = [] if "--scorer" in extra else ["--scorer", "pixels"]
    steps = ["--sae-steps", "30", "--latents", "8"] if method == "misp" else []
    base = [
        "negatives",
        "--data",
        str(folder / "data"),
        "--out",
        str(folder / out),
        "--method",
        method,
        "--device",
        "cpu",
    ]
    return cli.main([*base, *pooled, *scorer, *steps, *extra])


def written(folder, out="out"):
    return list(read_lines(folder / out / "rows.jsonl"))


# Selection


def random_pool(rows=4, candidates=30, latents=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    error, codes = torch.rand(rows, candidates, generator=g), torch.rand(rows, candidates, latents, generator=g)
    return error, codes, torch.rand(rows, candidates, generator=g) > 0.2


def test_scores_and_greedy_choice_are_the_plain_loops():
    error, codes, allowed = random_pool()
    score = scores(error, codes, allowed)
    centred = codes - 0.5
    picks, spread = greedy_diverse(score, centred, 5, beta_div=0.7)
    for row in range(len(error)):
        free = [i for i in range(error.shape[1]) if allowed[row, i]]
        top_error, top_norm = max(error[row, free]), max(codes[row, free].sum(-1))
        s = {i: float(error[row, i] / top_error + codes[row, i].sum() / top_norm) for i in free}
        torch.testing.assert_close(score[row, free], torch.tensor([s[i] for i in free]))
        assert all(score[row, i] == -math.inf for i in range(error.shape[1]) if i not in free)
        picked = []
        while len(picked) < 5:

            def gain(i, picked=tuple(picked), row=row, s=s):
                away = [1 - float(torch.cosine_similarity(centred[row, i], centred[row, j], dim=0)) for j in picked]
                return s[i] + 0.7 * min(away, default=0.0)

            picked.append(max((i for i in free if i not in picked), key=gain))
        assert picks[row].tolist() == picked
        away = [
            1 - float(torch.cosine_similarity(centred[row, i], centred[row, picked[0]], dim=0))
            for i in free
            if i != picked[0]
        ]
        assert float(spread[row]) == pytest.approx(max(away) - min(away), abs=1e-5)


def test_equal_scores_go_to_the_first_and_without_diversity_to_the_best():
    same = torch.zeros(1, 6)
    picks, spread = greedy_diverse(same, torch.ones(1, 6, 3), 3)
    assert picks.tolist() == [[0, 1, 2]] and spread.tolist() == [0]
    picks, spread = greedy_diverse(torch.tensor([[0.1, 0.9, 0.5]]), torch.randn(1, 3, 3), 1)
    assert picks.tolist() == [[1]] and spread.isnan().all()
    picks, _ = greedy_diverse(torch.tensor([[0.1, 0.9, 0.5]]), torch.randn(1, 3, 3), 3, beta_div=0.0)
    assert picks.tolist() == [[1, 2, 0]]


def test_density_sums_to_one_over_what_is_allowed():
    error, codes, allowed = random_pool()
    score = scores(error, codes, allowed)
    log_q = log_density(score, temperature=0.5)
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(4))
    assert (log_q[~allowed] == -math.inf).all()
    a, b = allowed[0].nonzero().flatten()[:2].tolist()
    assert float(log_q[0, a] - log_q[0, b]) == pytest.approx(float(score[0, a] - score[0, b]) / 0.5, abs=1e-5)


def test_selection_is_per_row_and_uses_centred_codes():
    sae = BilinearSae(SaeConfig(DIM, DIM, latents=8)).requires_grad_(False)
    sae.code_mean.fill_(0.04)
    dv, text, allowed = torch.randn(3, 20, DIM) / 4, torch.randn(3, DIM) / 4, torch.ones(3, 20, dtype=torch.bool)
    together = select(sae, dv, text, allowed, 4)
    for n in range(3):
        alone = select(sae, dv[n : n + 1], text[n : n + 1], allowed[n : n + 1], 4)
        assert alone.picks[0].tolist() == together.picks[n].tolist()
        torch.testing.assert_close(alone.log_q[0], together.log_q[n])
    codes = sae.codes(dv, text.unsqueeze(1))
    score = scores(sae.error(dv, text.unsqueeze(1), codes), codes, allowed)
    assert together.picks.tolist() == greedy_diverse(score, codes - 0.04, 4)[0].tolist()
    torch.testing.assert_close(together.log_q, score.log_softmax(1).gather(1, together.picks))


def test_selection_refuses_nan_and_too_few():
    with pytest.raises(ValueError, match="a score is NaN"):
        greedy_diverse(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2, 3), 1)
    with pytest.raises(ValueError, match="row 1 has 1 candidates; 2 were asked"):
        greedy_diverse(torch.tensor([[0.0, 1.0], [0.0, -math.inf]]), torch.ones(2, 2, 3), 2)


# Sources


def test_hard_and_random_never_pick_the_image_itself_or_near_duplicates():
    scorer, rows = PixelScorer(), [{"id": "a"}, {"id": "b"}]
    pool = read_pool([{"images": [colour(n)]} for n in [*range(30), 3]])
    assert len(pool.keys) == 30  # the image that is there twice counts once
    features = scorer.image_features(pool.entries)
    pool = type(pool)(pool.keys, pool.entries, pool.scenes, features)
    right, keys = features[[3, 8]], [pool.keys[3], pool.keys[8]]
    cosine = right @ features.T
    limit = float(cosine[0].sort(descending=True).values[4])  # four images are too near to image 3
    hard = pick_from_pool(rows, keys, right, None, pool, Options("hard", 4, duplicate=limit))
    for n, made in enumerate(hard):
        own = (3, 8)[n]
        order = [i for i in cosine[n].argsort(descending=True).tolist() if i != own and cosine[n, i] < limit]
        assert [image_key(e) for e in made.images] == [pool.keys[i] for i in order[:4]] and made.log_q is None
    drawn = [
        pick_from_pool(rows, keys, right, None, pool, Options("random", 3, seed=s, duplicate=limit)) for s in range(200)
    ]
    places = [[pool.keys.index(image_key(e)) for e in made[0].images] for made in drawn]
    allowed = {i for i in range(30) if cosine[0, i] < limit}
    assert {i for p in places for i in p} == allowed and all(len(set(p)) == 3 for p in places)
    assert drawn[0][0].log_q == [-math.log(len(allowed))] * 3


def test_without_a_scorer_the_image_itself_is_known_by_its_content():
    pool = read_pool([{"images": [colour(n)]} for n in range(5)])
    made = pick_from_pool([{"id": "a"}], [pool.keys[2]], None, None, pool, Options("random", 4))
    assert {image_key(entry) for entry in made[0].images} == {*pool.keys} - {pool.keys[2]}


def test_a_pool_without_images_or_with_missing_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data holds no images"):
        read_pool([{"images": []}])
    with pytest.raises(ValueError, match=r"no image file .*gone\.png"):
        read_pool([{"images": [str(tmp_path / "gone.png")]}])


def test_crop_boxes_have_the_area_and_ratio_that_were_asked():
    g = torch.Generator().manual_seed(0)
    boxes = [crop_box((200, 300), (0.01, 0.2), g) for _ in range(400)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 300
        assert 0.7 < (right - left) / (bottom - top) < 1.4
    areas = sorted((r - a) * (b - t) / 60000 for a, t, r, b in boxes)
    assert areas[0] > 0.008 and areas[-1] < 0.21 and 0.08 < areas[200] < 0.13  # uniform: median 0.105
    assert crop_box((2, 1000), (1.0, 1.0), g)[2] <= 2  # no box fits: the largest one around the centre


def test_crops_are_parts_of_the_image_scaled_to_its_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    made = crops({"id": "a"}, image, Options("crop", 3))
    boxes = crop_boxes_of({"id": "a"}, image, 3)
    for part, box in zip(made.images, boxes, strict=True):
        assert part.size == image.size
        np.testing.assert_array_equal(part, image.crop(box).resize(image.size, Image.Resampling.BILINEAR))
    assert len(set(boxes)) == 3 and made.log_q is None and made.scenes is None


def crop_boxes_of(row, image, count):
    from aspo.negatives.sources import generator_of

    g = generator_of(row, 0, "crop")
    return [crop_box(image.size, (0.01, 0.2), g) for _ in range(count)]


def test_noise_has_the_schedules_mean_and_deviation_on_normalised_pixels():
    image = Image.new("RGB", (100, 100), (140, 128, 120))
    options = Options("noise", 2, noise_step=700, pixel_mean=(0.5, 0.4, 0.6), pixel_std=(0.2, 0.1, 0.2))
    first, second = noised({"id": "a"}, image, options).images
    x = (np.asarray(first, dtype=np.float64) / 255 - options.pixel_mean) / options.pixel_std
    clean = (np.asarray(image, dtype=np.float64)[0, 0] / 255 - options.pixel_mean) / options.pixel_std
    abar = 0.351  # of step 700, from the recipe; far enough from 1 that abar for its root would show
    np.testing.assert_allclose(x.mean((0, 1)), abar**0.5 * clean, atol=0.02)
    np.testing.assert_allclose(x.std((0, 1)), (1 - abar) ** 0.5, atol=0.03)
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).mean() > 1
    np.testing.assert_array_equal(noised({"id": "a"}, image, options).images[0], first)


# The command


@pytest.mark.parametrize("method", ["misp", "random", "hard", "crop", "noise"])
def test_every_method_gives_every_row_its_negatives(made, method, capsys):
    assert command(made, "--count", "2", method=method) == 0
    said = capsys.readouterr().out
    assert f"3 rows with 2 {method} negatives each" in said
    assert "kept without negatives 1: the row has no image" in said and "several images" in said
    rows = written(made)
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(5)]
    assert [len(row.get("negative_images", ())) for row in rows] == [2, 2, 2, 0, 0]
    for row in rows[:3]:
        names = {*row["negative_images"], *row["images"]}
        assert len(names) == 3 and all((made / "out" / name).is_file() for name in names)
        assert ("negative_log_q" in row) == (method in ("misp", "random"))
        if method in ("misp", "random"):
            assert len(row["negative_log_q"]) == 2 and all(q < 0 for q in row["negative_log_q"])
    loaded = load_rows(made / "out")
    validate_rows(loaded)
    assert len(load_images(loaded[0], "negative_images")) == 2
    report = json.loads((made / "out" / "selection.json").read_text())
    assert report["rows"] == 3 and report["options"]["method"] == method
    assert -1 <= report["figures"]["pairwise_cosine"]["value"] < 1 and report["figures"]["cosine"]["rows"] == 3
    assert (made / "out" / "grid.png").stat().st_size > 1000
    if method == "misp":
        assert (made / "out" / "latents.png").is_file() and report["figures"]["diversity_range"] > 0
        latents = json.loads((made / "out" / "latents.json").read_text())
        assert latents[0]["top"][0]["row"] in {"row-0", "row-1", "row-2"}


@pytest.mark.parametrize("method", ["misp", "random", "crop"])
def test_a_run_that_was_stopped_ends_as_an_uninterrupted_one(made, no_pictures, method, monkeypatch):
    assert command(made, method=method, out="whole") == 0
    calls = []

    def stop(out, row, of_row, real=negatives._lines):
        calls.append(row["id"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(out, row, of_row)

    small = ("--shard-rows", "1") if method == "crop" else ()  # the others pick for all of these rows at once
    monkeypatch.setattr(negatives, "_lines", stop)
    assert command(made, *small, method=method) == cli.INTERRUPTED
    assert len(list((made / "out" / "shards" / "negatives").glob("*.jsonl"))) == len(small) // 2
    assert not (made / "out" / "rows.jsonl").exists()
    assert command(made, *small, method=method) == 0
    assert len(calls) == (6 if method == "crop" else 7)  # those of the shard that was stopped are made again
    for name in ("rows.jsonl", "selection.json"):
        assert (made / "out" / name).read_bytes() == (made / "whole" / name).read_bytes()
    before = (made / "out" / "rows.jsonl").read_bytes()
    assert command(made, method=method) == 0  # a third time: nothing is made again
    assert (made / "out" / "rows.jsonl").read_bytes() == before
    assert command(made, "--seed", "1", method=method, out="other") == 0
    assert written(made, "other") != written(made)


def test_features_are_encoded_once_and_a_killed_run_keeps_them(tmp_path, made):
    pool = read_pool(made / "pool")
    scorer = PixelScorer()
    first = Embeddings(tmp_path / "e", scorer).images(pool.keys, pool.entries)
    assert scorer.encoded == 40
    again = Embeddings(tmp_path / "e", scorer).images(pool.keys[::-1], pool.entries[::-1])
    torch.testing.assert_close(again, first.flip(0))
    assert scorer.encoded == 40
    other = PixelScorer("another")
    Embeddings(tmp_path / "e", other).images(pool.keys[:3], pool.entries[:3])
    assert other.encoded == 3
    broken = PixelScorer("broken", broken=[(31, 31)])
    bad = Image.new("RGB", (31, 31))
    with pytest.raises(ValueError, match="its CLIP features are not finite"):
        Embeddings(tmp_path / "e", broken, batch_size=4).images([*pool.keys[:8], "x"], [*pool.entries[:8], bad])
    kept = PixelScorer("broken")
    Embeddings(tmp_path / "e", kept).images(pool.keys[:8], pool.entries[:8])
    assert kept.encoded == 0  # those before the broken one
    next((tmp_path / "e").glob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"is no file of features.*delete it"):
        Embeddings(tmp_path / "e", scorer)


def test_images_of_a_data_set_stay_in_its_files(tmp_path, no_pictures):
    """What Python holds while features are made, of 40 images of 120 KB each that a .parquet file holds."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 200, 200, 3), dtype=np.uint8)
    images = [[{"bytes": image_bytes(Image.fromarray(pixels)), "path": None}] for pixels in noise]
    texts = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    columns = {"id": [str(n) for n in range(40)], "images": images} | {name: [t] * 40 for name, t in texts.items()}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data.parquet")
    rows = load_rows(tmp_path / "data.parquet")
    held = []

    class Looking(PixelScorer):
        def image_features(self, images):
            held.append(tracemalloc.get_traced_memory()[0])
            return super().image_features(images)

    del images, columns, noise
    tracemalloc.start()
    try:
        options = Options("hard", 2, duplicate=2.0)
        negatives.add_negatives(rows, tmp_path / "out", options, scorer=Looking(), pool=read_pool(rows))
    finally:
        tracemalloc.stop()
    assert len(held) == 1 and max(held) < 10 * 120_000
    made = written(tmp_path)
    assert all(len({*row["images"], *row["negative_images"]}) == 3 for row in made)


def test_candidates_limit_what_a_row_is_given(made, no_pictures):
    assert command(made, "--candidates", "5", "--count", "5") == 0
    for row in written(made)[:3]:
        assert len(set(row["negative_images"])) == 5
        assert math.fsum(math.exp(q) for q in row["negative_log_q"]) == pytest.approx(1, abs=1e-5)


def test_an_autoencoder_of_other_rows_is_not_gone_on_with(made, no_pictures, capsys):
    assert command(made, "--limit", "2") == 0
    capsys.readouterr()
    before = written(made)
    assert command(made) == cli.USAGE
    assert "an autoencoder that was trained on other rows (another --limit" in capsys.readouterr().err
    assert written(made) == before and command(made, "--limit", "2") == 0
    (made / "out" / "rows.jsonl").unlink()  # stopped before its first shard: the autoencoder is trained anew
    shutil.rmtree(made / "out" / "shards")
    assert command(made) == 0 and command(made, out="whole") == 0
    assert written(made) == written(made, "whole")


def test_an_autoencoder_of_other_prompts_or_images_is_not_taken(made, no_pictures, capsys):
    def autoencoder_of(out="out"):
        return load_sae(made / out / "sae.safetensors")[1]

    def change(**columns):
        rows = [{**dict(row), **columns} if row["id"] == "row-0" else dict(row) for row in load_rows(made / "data")]
        write_rows(made / "data", rows)

    assert command(made) == 0
    first = autoencoder_of()
    change(prompt="And what is that?")
    capsys.readouterr()
    assert command(made) == cli.USAGE  # rows have negatives of it
    assert "an autoencoder that was trained on other rows" in capsys.readouterr().err
    for n, columns in enumerate(({}, {"images": [patches(9)]})):  # stopped before the first shard
        (made / "out" / "rows.jsonl").unlink(missing_ok=True)
        shutil.rmtree(made / "out" / "shards")
        change(**columns)
        assert command(made) == 0 and command(made, out=f"whole-{n}") == 0
        assert autoencoder_of() == autoencoder_of(f"whole-{n}") and written(made) == written(made, f"whole-{n}")
        assert autoencoder_of()["figures"] != first["figures"]
        first = autoencoder_of()


def test_an_autoencoder_of_an_older_version_says_ids_only_and_is_taken(made, no_pictures):
    assert command(made) == 0
    rows, path = written(made), made / "out" / "sae.safetensors"
    sae, about = load_sae(path)
    del about["content"]
    save_sae(sae, path, about)
    before = path.read_bytes()
    assert command(made) == 0
    assert written(made) == rows and path.read_bytes() == before


@pytest.mark.parametrize("prompts", [False, True])
def test_images_of_a_pool_are_looked_for_in_the_image_root_too(made, monkeypatch, prompts):
    """--data, prompts (of which `aspo pairs` makes pairs first) or pairs, and --pool name images of one folder."""
    (made / "rows").mkdir()
    pool = [{"conversations": [{"from": "human", "value": "What?"}], "image": f"{n:03}.png"} for n in (0, 2, 4, 6)]
    (made / "rows" / "pool.json").write_text(json.dumps(pool))
    row = {"prompt": "What?", "image": "008.png"} | ({} if prompts else {"chosen": "A.", "rejected": "B."})
    (made / "rows" / "data.json").write_text(json.dumps([row]))

    def without_a_model(args, original=pairs.run):
        return write_rows(args.out, tiny_rows(1)) if args.method == "seva" else original(args)

    monkeypatch.setattr(pairs, "run", without_a_model)
    options = ("--pool", str(made / "rows" / "pool.json"), "--image-root", str(made / "pool"), "--count", "3")
    base = ["pairs", "--data", str(made / "rows" / "data.json"), "--out", str(made / "out"), "--method", "random"]
    assert cli.main([*base, *options, *(("--model", "world") if prompts else ())]) == 0
    (row,) = written(made)
    assert len(row["negative_images"]) == 3


def test_the_weight_of_diversity_changes_the_picks(made, no_pictures):
    spread = {}
    for weight in ("0", "100"):
        assert command(made, "--beta-div", weight, out=weight) == 0
        spread[weight] = json.loads((made / weight / "selection.json").read_text())["figures"]["pairwise_cosine"]
    assert spread["100"]["value"] < spread["0"]["value"]


def test_noise_is_of_the_pixels_that_were_named(made, no_pictures):
    """It draws each channel towards its own mean, and has the deviation of its own."""
    mean, deviation = (0.3, 0.2, 0.8), (0.1, 0.05, 0.025)
    options = ("--noise-step", "999", "--pixel-mean", *map(str, mean), "--pixel-std", *map(str, deviation))
    assert command(made, "--count", "1", *options, method="noise") == 0
    row = load_rows(made / "out")[0]
    (clean,), (noisy,) = (load_images(row, column) for column in ("images", "negative_images"))
    x, z = (np.asarray(image, dtype=float).reshape(6, 5, 6, 5, 3) / 255 for image in (clean, noisy))  # 5 x 5 patches
    kept = (z.mean((0, 1, 2, 3)) - mean) / (x.mean((0, 1, 2, 3)) - mean)  # the root of abar, of all channels
    np.testing.assert_allclose(kept, kept.mean(), atol=0.05)
    noise = z.var((1, 3), ddof=1).mean((0, 1)) ** 0.5
    np.testing.assert_allclose(noise, (1 - kept.mean() ** 2) ** 0.5 * np.array(deviation), rtol=0.1)


def test_the_pool_is_by_default_the_images_of_the_rows(made, capsys):
    assert command(made, "--count", "2", method="random", pool=None) == 0
    own = {name for row in written(made) for name in row.get("images", ())}
    assert {name for row in written(made)[:3] for name in row["negative_images"]} <= own


def test_bad_input_is_one_line_and_loses_nothing(made, no_pictures, capsys):
    def fails(message, *extra, **options):
        capsys.readouterr()
        assert command(made, *extra, **options) == cli.USAGE
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in said, said

    fails("count is 0; it must be 1 to 16", "--count", "0")
    fails("count is 17; it must be 1 to 16", "--count", "17")
    fails(
        "6 negatives a row were asked, but the pool has 5 distinct images", "--count", "6", method="random", pool=None
    )
    fails("5 negatives were asked, but the pool has 2 images that", "--count", "5", method="random", pool=None)
    fails("--noise-step is not read by --method misp, only by noise", "--noise-step", "5")
    fails("noise-step is 1000; it must be 0 to 999", "--noise-step", "1000", method="noise")
    fails("crop-scale is 0.5 to 0.2", "--crop-scale", "0.5", "0.2", method="crop")
    fails("temperature is 0.0; it must be above 0", "--temperature", "0")
    fails("candidates is 2; it must be at least 3", "--candidates", "2")
    (made / "empty").mkdir()
    fails("has no rows.jsonl", method="random", pool="empty")
    (made / "empty" / "a.png").write_bytes(b"not an image")
    fails("cannot be read: not an image", "--count", "1", method="random", pool="empty")
    fails("already holds rows that `aspo negatives` did not make", out="data")
    # too few that are far enough: named by row, and what was written stays
    assert command(made, method="hard", out="kept") == 0
    before = (made / "kept" / "rows.jsonl").read_bytes()
    fails("3 negatives were asked, but the pool has 0 images", "--duplicate", "-0.5", method="hard", out="near")
    fails("was begun with other settings (count: 3 -> 2)", "--count", "2", method="hard", out="kept")
    colour(100).save(made / "pool" / "new.png")
    fails("was begun with other settings (pool: ", method="hard", out="kept")
    assert (made / "kept" / "rows.jsonl").read_bytes() == before
    fails("it has negative_images already", method="crop", out="twice", **data_of(made, "kept"))
    next((made / "data" / "images").iterdir()).unlink()
    fails("no image file", method="crop", out="missing", **{})


def test_a_run_that_gave_no_row_a_negative_says_so(made, capsys):
    write_rows(made / "data", [{**row, "images": []} for row in tiny_rows(2)])
    assert command(made, method="crop") == cli.USAGE
    told = capsys.readouterr()
    assert "kept without negatives 2: the row has no image" in told.out
    assert "none of the 2 rows of" in told.err.strip().splitlines()[-1]


def data_of(folder, name):
    (folder / "data").rename(folder / "data_before")
    (folder / name).rename(folder / "data")
    return {}


def test_a_scorer_is_needed_where_images_are_compared(made, monkeypatch, capsys):
    base = ["negatives", "--data", str(made / "data"), "--out", str(made / "out"), "--device", "cpu"]
    for method in ("misp", "hard"):
        assert cli.main([*base, "--method", method]) == cli.USAGE
        assert "give --scorer" in capsys.readouterr().err
    assert cli.main([*base, "--method", "random", "--duplicate", "0.9"]) == cli.USAGE
    assert cli.main([*base, "--method", "crop", "--pool", "x"]) == cli.USAGE
    assert "--pool is not read by --method crop" in capsys.readouterr().err
    assert cli.main([*base, "--method", "random", "--pool", str(made / "pool")]) == 0
    assert "cosine" not in json.loads((made / "out" / "selection.json").read_text())["figures"]


def test_a_flat_diversity_term_is_warned_of(made):
    """Images all alike but for a trace: codes hardly differ, centred or not, beside a code mean far from them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = negatives.add_negatives(
            load_rows(made / "data"),
            made / "flat",
            Options(count=2, latents=8, sae_steps=1, duplicate=2.0),
            scorer=PixelScorer(),
            pool=read_pool([{"images": [Image.new("RGB", (30, 30), (100, 100, 100 + n))]} for n in range(6)]),
        )
    told = [str(w.message) for w in caught if "the diversity term hardly varies" in str(w.message)]
    assert bool(told) == (report["figures"]["diversity_range"] < 0.05) and told


def test_prompt_text_is_what_the_user_says():
    assert prompt_text("<image>\nWhat is  this?") == "What is this?"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "and why?"},
    ]
    assert prompt_text(messages) == "What and why?"


# Figures and pictures


def scene(**colours):
    places = ("top left", "top", "top right", "left", "centre")
    things = [
        {"shape": shape, "colour": value, "size": "small", "place": place}
        for (shape, value), place in zip(colours.items(), places, strict=False)
    ]
    return {"things": things, "seed": 0}


def test_truth_figures_by_hand():
    right = scene(circle="red", star="blue")
    rows = [
        {
            "chosen": "The circle is red. The star is pink. Oh.",  # one true, one false, one that cannot be judged
            "scene": right,
            "negative_scenes": [
                scene(circle="red", star="pink"),  # all true
                scene(circle="red", heart="pink"),  # one true, as of the right image
                scene(circle="blue", heart="pink"),  # none
                scene(star="pink"),  # one
            ],
        },
        {"chosen": "The circle is red.", "scene": right, "negative_scenes": [scene(circle="red")] * 4},
        {"chosen": "The circle is red.", "scene": None, "negative_scenes": None},
    ]
    figures = truth_figures(rows)
    assert {name: (mean.value, mean.rows) for name, mean in figures.items()} == {
        "false_negatives": ((0.25 + 1) / 2, 2),
        "as_true": ((0.75 + 1) / 2, 2),
        "true_sentences": ((0.5 + 1) / 2, 2),
        "true_of_right": ((0.5 + 1) / 2, 2),
    }
    assert figures["false_negatives"].error == pytest.approx(0.75 / 2)  # stdev of (.25, 1) / sqrt 2
    assert truth_figures(rows[2:]) == {}
    assert judged("The circle is red. Oh.", right) == [("The circle is red.", True), ("Oh.", None)]


def test_a_crops_truth_is_what_it_shows():
    whole = scene(circle="red", star="blue", heart="green")  # top left, top, top right: middles at x 4, 28, 52; y 4
    assert [t["shape"] for t in scene_in_box(whole, (0, 0, 36, 40))["things"]] == ["circle", "star"]  # half of the star
    assert [t["shape"] for t in scene_in_box(whole, (0, 0, 35, 40))["things"]] == ["circle"]
    assert [t["shape"] for t in scene_in_box(whole, (16, 8, 72, 72))["things"]] == ["star", "heart"]
    assert scene_in_box(whole, (0, 30, 72, 72))["things"] == []


def test_similarity_and_reuse_by_hand():
    e = torch.eye(3)
    half = torch.tensor([0.5, 0.75**0.5, 0])
    figures = similarity_figures(e[:2], torch.stack([torch.stack([e[0], e[1], half]), torch.stack([e[1], e[1], e[1]])]))
    assert figures["cosine"].value == pytest.approx((0.5 + 1) / 2)
    assert figures["pairwise_cosine"].value == pytest.approx(((0 + 0.5 + 0.75**0.5) / 3 + 1) / 2)
    assert "pairwise_cosine" not in similarity_figures(e[:2], e[:2].unsqueeze(1))
    assert reuse_figures([["a", "b"], ["a", "c"]]) == {"distinct": 0.75, "most_used": 1.0}


def test_tsne_keeps_neighbours_together():
    centres = 3 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    x = centres.repeat_interleave(25, 0) + 0.3 * torch.randn(100, 10, generator=torch.Generator().manual_seed(1))
    y = tsne(x, perplexity=10)
    distances = torch.cdist(y, y).fill_diagonal_(math.inf)
    same = distances.topk(10, largest=False).indices // 25 == torch.arange(100).unsqueeze(1) // 25
    assert same.float().mean() > 0.97
    torch.testing.assert_close(tsne(x, perplexity=10), y)
    assert tsne(torch.ones(5, 3)).isfinite().all()  # all alike
    with pytest.raises(ValueError, match="at least 4"):
        tsne(torch.ones(3, 3))
    with pytest.raises(ValueError, match="not finite"):
        tsne(torch.full((5, 3), math.nan))


@pytest.mark.parametrize("text", ["It costs $5_{ and $6.", "$\\frac{$ or $$", "a_b^c \\alpha $x$", "<b>&amp;</b>"])
def test_a_response_is_drawn_as_it_stands(tmp_path, text):
    row = {"id": "a", "prompt": "What?", "images": ["right.png"], "negative_images": ["wrong.png"], "chosen": text}
    for name, colour in (("right", "red"), ("wrong", "blue")):
        tiny_image(colour).save(tmp_path / f"{name}.png")
    plot_grid([row], tmp_path, tmp_path / "grid.png", "misp negatives")
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_on_the_embedded_world_negatives_carry_their_truth(tmp_path):
    from aspo.world.data import rows as world_rows
    from aspo.world.language import describe
    from aspo.world.scenes import Scene

    prompts = world_rows("validation", 6)
    rows = [{**row, "chosen": describe(Scene.from_json(row["scene"])), "rejected": "No."} for row in prompts]
    write_rows(tmp_path / "data", rows)
    base = ["negatives", "--data", str(tmp_path / "data"), "--scorer", "world", "--device", "cpu", "--count", "2"]
    assert cli.main([*base, "--out", str(tmp_path / "m"), "--sae-steps", "20", "--latents", "8"]) == 0
    truth = {
        image_key(entry, tmp_path / "m"): row["scene"] for row in written(tmp_path, "m") for entry in row["images"]
    }
    for row in written(tmp_path, "m"):
        keys = [image_key(entry, tmp_path / "m") for entry in row["negative_images"]]
        assert [truth[key] for key in keys] == row["negative_scenes"]
        assert row["scene"] not in row["negative_scenes"]
    figures = json.loads((tmp_path / "m" / "selection.json").read_text())["figures"]
    assert figures["true_of_right"]["value"] == 1 and figures["true_sentences"]["value"] < 0.9
    assert cli.main([*base, "--out", str(tmp_path / "n"), "--method", "noise"]) == 0
    figures = json.loads((tmp_path / "n" / "selection.json").read_text())["figures"]
    assert figures["false_negatives"]["value"] == 1  # noise changes no truth


def test_tiny_images_still_work():
    assert crops({"id": "a"}, Image.new("RGB", (1, 1)), Options("crop", 2)).images[0].size == (1, 1)
    assert noised({"id": "a"}, tiny_image().resize((1, 3)), Options("noise", 1)).images[0].size == (1, 3)
