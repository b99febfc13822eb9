"""The start model without the prior: a short training starts from the world's model and leaves one that loads."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import sys

import pytest
import torch

from aspo.model import load_model
from aspo.world import load_vlm, sighted

SMALL = {"steps": 2, "count": 24}


@pytest.fixture(scope="module")
def trained():
    model, processor = sighted.train_sighted(**SMALL)
    return model, processor


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sighted", *map(str, arguments)])
    return sighted.main()


def test_it_starts_from_the_worlds_model_and_leaves_its_vision_tower_alone(trained):
    start = load_vlm()[0].state_dict()
    weights = trained[0].state_dict()
    assert start.keys() == weights.keys() and not trained[0].training
    # AdamW moves a weight by the learning rate at most: these are the shipped weights and two small steps
    far = 2 * sighted.LEARNING_RATE
    assert all(torch.allclose(weights[name], start[name], rtol=1e-3, atol=far) for name in start)
    same = {name for name in start if torch.equal(weights[name], start[name])}
    assert same == {name for name in start if "vision_tower" in name} != set()


def test_it_is_the_same_every_time(trained):
    torch.manual_seed(123)  # whatever ran before
    again = sighted.train_sighted(**SMALL)[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in trained[0].state_dict().items())


def test_the_command_writes_a_model_that_loads_and_trains_it_once(trained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sighted, "train_sighted", lambda: calls.append(0) or trained)
    for _ in range(2):
        assert command(monkeypatch, "--out", tmp_path / "sighted", "--noise-steps") == 0
    assert len(calls) == 1
    model, processor = load_model(tmp_path / "sighted", device="cpu")
    expected, weights = trained[0].state_dict(), model.state_dict()
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], value.half().float()) for name, value in expected.items())  # stored as fp16
    assert processor.tokenizer.get_vocab() == trained[1].tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("options", "says"), [({"steps": 0}, "steps is 0; it must be at least 1"), ({"count": 0}, "count is 0")]
)
def test_bad_sizes(options, says):
    with pytest.raises(ValueError, match=says):
        sighted.train_sighted(**(SMALL | options))


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_noise_step_that_is_none_is_refused_before_anything_is_trained(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sighted, "train_sighted", lambda: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "--out", tmp_path / "out", "--noise-steps", 0, step)
    assert stopped.value.code == 2 and f"--noise-steps {step}: must be 0 to 999" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_place_for_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sighted, "train_sighted", lambda: pytest.fail("it trains"))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--out", tmp_path / "out")
    assert "out is a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"
