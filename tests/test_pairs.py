"""Pairs: the noise schedule, the verdicts, and a run that is stopped and goes on with the same pairs."""

import argparse
import json

import numpy as np
import pytest
import torch
import transformers
from families import family
from PIL import Image
from tiny import COLOURS, PROMPT, tiny_image, tiny_llava
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from aspo.data import Collator, load_rows, validate_rows
from aspo.generation import Answer, generate
from aspo.pairs import command as pairs
from aspo.pairs import povid, seva
from aspo.pairs.command import add_noise, image_seeds, judge, make_pairs, noise_schedule, recorded
from aspo.pairs.noise import copies_of_a_still
from aspo.shards import Engine, Processes, job


def test_schedule_has_the_papers_values():
    abar = noise_schedule()
    expected = {300: 0.962, 500: 0.745, 700: 0.351, 800: 0.218, 999: 0.081}
    assert {t: round(float(abar[t]), 3) for t in expected} == expected
    assert (abar.diff() < 0).all() and abar[0] < 1


@pytest.mark.parametrize("step", [0, 500, 999])
def test_noise_keeps_unit_variance_and_the_signals_share(step):
    abar = float(noise_schedule()[step])
    x = torch.randn(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    noised = add_noise(x, step, [1])
    eps = (noised - abar**0.5 * x) / (1 - abar) ** 0.5
    assert eps.mean().abs() < 0.01 and (eps.std() - 1).abs() < 0.01
    assert (eps * x).mean().abs() < 0.01  # independent of the image


def test_noise_of_an_image_does_not_depend_on_its_batch():
    x = torch.randn(3, 3, 8, 8)
    batch = add_noise(x, 500, [5, 6, 7])
    alone = torch.cat([add_noise(x[i : i + 1], 500, [5 + i]) for i in range(3)])
    assert torch.equal(batch, alone)
    assert not torch.equal(add_noise(x, 500, [5, 6, 8])[2], batch[2])
    packed = add_noise(torch.zeros(40, 12), 500, [5, 6])  # patches of two images in one tensor
    assert packed.shape == (40, 12) and packed.std() > 0.4


VIDEO_READERS = [f"{n}ImageProcessor{backend}" for n in ("Qwen2VL", "Glm4v", "Glm46V") for backend in ("", "Pil")]


@pytest.mark.parametrize("name", VIDEO_READERS)
def test_noise_of_a_still_has_its_steps_strength(name):
    """A kernel that averages over the copies of a still, as Conv3d's may, sees noise of the step, not of half of it."""
    processor = argparse.Namespace(image_processor=getattr(transformers, name)())
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(112, 112, 3), dtype=np.uint8))
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert copies_of_a_still(processor) == 2
    noised = add_noise(pixels, 500, [1], copies_of_a_still(processor))
    assert noised.shape == pixels.shape
    abar = float(noise_schedule()[500])
    eps = ((noised - abar**0.5 * pixels) / (1 - abar) ** 0.5).view(len(pixels), 3, 2, -1)
    assert torch.equal(eps[:, :, 0], eps[:, :, 1]) and (eps.mean(dim=2).std() - 1).abs() < 0.03


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (4, 3, 5, 2)])  # copies around the colours, and of each pixel
def test_copies_in_another_order_are_refused(shape):
    one = torch.randn([1 if size == 2 else size for size in shape])
    with pytest.raises(ValueError, match="patches of 30 values do not hold each of 3 colours 2 times over"):
        add_noise(one.expand(shape).reshape(4, 30), 500, [0], copies=2)
    with pytest.raises(ValueError, match="patches of 31 values"):
        add_noise(torch.zeros(4, 31), 500, [0], copies=2)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_models_of_stills_with_copies_are_read_behind_the_same_noise_in_both(name):
    model, processor = family(name)
    row = {**colour_rows()[0], "chosen": "It is red."}
    seen = []
    model.model.visual.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seva.noised_answers(model, processor, [row], 500, 0, 0, max_new_tokens=1, batch_size=1)
    povid.alternative_ids(model, processor, [row], 500, 0)
    assert len(seen) == 2 and torch.equal(*seen)
    copies = seen[0].view(len(seen[0]), 3, 2, -1)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1]) and copies[:, :, 0].std() > 0.4


def test_noise_keeps_the_dtype():
    assert add_noise(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), 500, [0]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="noise step is 1000"):
        add_noise(torch.zeros(1), 1000, [0])


def test_seeds_come_from_seed_row_and_image():
    row = {"id": "a", "images": [1, 2]}
    seeds = [image_seeds(row, 0), image_seeds(row, 1), image_seeds({**row, "id": "b"}, 0)]
    assert len({s for two in seeds for s in two}) == 6
    assert image_seeds(row, 0) == seeds[0]


@pytest.mark.parametrize(
    ("clean", "noised", "verdict"),
    [
        (("A cat.", True), ("A dog.", True), "made"),
        (("A cat.", True), (" A cat. ", True), "identical"),
        ((" ", True), ("A dog.", True), "empty"),
        (("A cat.", True), ("", True), "empty"),
        (("A cat.", True), ("A dog", False), "unfinished"),
        (("A cat", False), ("A dog.", True), "unfinished"),
        (("A <image> cat.", True), ("A dog.", True), "image mark"),
        (("A cat.", True), ("<image>", True), "image mark"),
    ],
)
def test_verdicts(clean, noised, verdict):
    assert judge(*(Answer(text, 3, finished) for text, finished in (clean, noised))) == verdict


def test_answers_that_say_image_would_make_rows_that_training_refuses():
    row = {"id": "a", "prompt": PROMPT, "images": [tiny_image("red")], "chosen": "A <image> cat.", "rejected": "A dog."}
    with pytest.raises(ValueError, match="column 'chosen': it holds '<image>'"):
        validate_rows([row])
    own, made = Answer(row["chosen"], 0, True), Answer("A dog.", 3, True)
    assert judge(own, made) == "made"  # povid's rows may have answers that show images


def colour_rows():
    """Pale colours: noise hides them."""
    grey = Image.new("RGB", (30, 30), (128, 128, 128))
    images = {name: Image.blend(grey, tiny_image(name, (0, 0, 30, 30)), 0.3) for name in COLOURS}
    return [{"id": n, "prompt": PROMPT, "images": [image], "scene": {"colour": n}} for n, image in images.items()]


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """The folder of a tiny model taught, in seconds, to name an image's colour and stop."""
    folder = tiny_llava(tmp_path_factory.mktemp("model"))
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    rows = [{**row, "chosen": f"It is {row['id']}."} for row in colour_rows()]
    batch = Collator(processor, responses=("chosen",))(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        logits = model(**batch["model_inputs"]).logits.flatten(0, 1)[batch["layout"].hidden_index]
        loss = torch.nn.functional.cross_entropy(logits, batch["layout"].targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    assert generate(model, processor, rows, max_new_tokens=12) == [row["chosen"] for row in rows]
    return folder


def many_rows():
    rows = [{**row, "id": f"{row['id']}-{n}"} for n in range(3) for row in colour_rows()]
    return [*rows[:5], {"id": "no image", "prompt": "Hello."}, *rows[5:]]


OPTIONS = {"noise_step": 900, "max_new_tokens": 12, "batch_size": 3}


def run_to_end(folder, out, **options):
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    make_pairs(model, LlavaProcessor.from_pretrained(folder), load_rows(many_rows(), kind="prompt"), out, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_pairs_and_their_records(answering, tmp_path, temperature):
    run_to_end(answering, tmp_path, **OPTIONS, temperature=temperature)
    status = recorded(tmp_path)
    assert list(status) == [row["id"] for row in many_rows()]
    assert status["no image"] == "no image"
    made = [name for name, verdict in status.items() if verdict == "made"]
    rows = load_rows(tmp_path)
    validate_rows(rows)
    assert rows["id"] == made and len(made) >= 2
    for row in rows:
        assert row["scene"] == {"colour": row["id"].split("-")[0]} and row["chosen"] != row["rejected"]
        if temperature == 0:
            assert row["chosen"] == f"It is {row['scene']['colour']}."  # the clean image's answer
    assert all(verdict in ("made", "no image", *pairs.DROPPED) for verdict in status.values())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_stopped_run_goes_on_with_the_same_pairs(answering, tmp_path, temperature, monkeypatch):
    run_to_end(answering, tmp_path / "whole", **OPTIONS, temperature=temperature)
    whole = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    records = (tmp_path / "whole" / "done.jsonl").read_bytes()
    part = tmp_path / "part"
    small = Engine(Processes.current(), shard_rows=3)  # one batch each: five shards
    for stop in (1, 2, 4):  # killed behind so many shards; the next one is torn

        def write(path, key, parts, real=job.write_shard, stop=stop):
            real(path, key, parts)
            if len(list(path.parent.glob("*.jsonl"))) > stop:
                path.write_bytes(path.read_bytes()[:-5])
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(job, "write_shard", write)
            run_to_end(answering, part, **OPTIONS, temperature=temperature, engine=small)
        assert not (part / "rows.jsonl").exists()
    run_to_end(answering, part, **OPTIONS, temperature=temperature, engine=small)
    assert (part / "rows.jsonl").read_bytes() == whole
    assert (part / "done.jsonl").read_bytes() == records


def test_noise_and_greedy_answers_do_not_depend_on_the_batch(answering, tmp_path):
    for size in (1, 5):
        run_to_end(answering, tmp_path / str(size), **{**OPTIONS, "batch_size": size})
    assert (tmp_path / "1" / "rows.jsonl").read_bytes() == (tmp_path / "5" / "rows.jsonl").read_bytes()


def command(*argv):
    parser = argparse.ArgumentParser()
    pairs.add_arguments(parser)
    return pairs.run(parser.parse_args([str(a) for a in argv]))


@pytest.fixture
def prompts(tmp_path):
    rows = []
    for row in many_rows():
        if row.get("images"):
            row["images"][0].save(tmp_path / f"{row['id']}.png")
            row = {
                "id": row["id"],
                "image": f"{row['id']}.png",
                "conversations": [{"from": "human", "value": "<image>\n" + PROMPT}],
            }
        rows.append(row)
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    return tmp_path / "prompts.json"


def test_command(answering, prompts, tmp_path, capsys, monkeypatch):
    argv = ("--model", answering, "--data", prompts, "--out", tmp_path / "out", "--noise-step", 900)
    argv += ("--max-new-tokens", 12, "--batch-size", 4)
    assert command(*argv, "--limit", 6) == 0
    assert command(*argv) == 0  # more prompts: goes on
    out = capsys.readouterr().out.splitlines()[-4:]
    assert any("pairs of 13 prompts" in line for line in out)
    assert "  dropped 1: the prompt has no image" in out
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    validate_rows(load_rows(tmp_path / "out"))
    monkeypatch.setattr(pairs, "load_model", None)  # all is done: the model is not needed
    assert command(*argv) == 0
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"was begun with other settings \(seed: 0 -> 1\):"):
        command(*argv, "--seed", 1)


def test_command_errors(answering, prompts, tmp_path):
    argv = ("--model", answering, "--data", prompts, "--out", tmp_path / "out")
    for bad, message in (
        (("--noise-step", 1000), "--noise-step is 1000; it must be 0 to 999"),
        (("--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("--temperature", -1), "--temperature is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            command(*argv, *bad)
    with pytest.raises(ValueError, match="holds no model"):
        command(*argv[2:], "--model", tmp_path)
    assert not (tmp_path / "out").exists()  # what could not begin leaves nothing behind
    with pytest.raises(ValueError, match="no pair was made of 5 prompts"):
        command(*argv, "--max-new-tokens", 1, "--limit", 5)
    rows = json.loads(prompts.read_text())
    prompts.write_text(json.dumps([rows[0], rows[0]]))
    with pytest.raises(ValueError, match="row 'red-0' is there more than once"):
        command(*argv)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "rows.jsonl").write_text("")
    prompts.write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match="already holds rows that `aspo pairs` did not make"):
        command("--model", answering, "--data", prompts, "--out", tmp_path / "foreign")
