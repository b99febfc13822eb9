"""The clipped token step, and the on-policy loop on the embedded world."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aspo import cli
from aspo.cli import Parser
from aspo.data import load_rows, write_rows
from aspo.generation import Answer
from aspo.model import load_model, response_logps
from aspo.online.command import add_arguments, run
from aspo.online.trainer import OnlineOptions, OnlineTrainer, round_prompts, round_seed, token_losses
from aspo.rewards.object_words import ObjectVocabulary
from aspo.rewards.verifier import Calibration, Verifier
from aspo.scorers import load_scorer
from aspo.training_state import checkpoints, load_checkpoint, save_checkpoint
from aspo_kernels import linear_token_kl
from aspo_kernels.family.policy_gradient import clipped_policy_gradient, sampled_kl

CALIBRATION = Calibration(0.07, -0.1, 0.09, 0.0, 0.8, {}, scorer="world", template="The {}")
ANSWERS = [Answer("The circle is red. The star is blue.", 13, True), Answer("The ring is pink", 4, False),
           Answer("Nothing here.", 4, True), Answer("The heart is brown. The ring is green.", 13, True)]  # fmt: skip


# --- the step as a function ---


def test_the_step_by_hand():
    logps = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.5, -0.5, -1.1])
    advantages, kl = torch.tensor([2.0, 1.0, -1.0, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    result = clipped_policy_gradient(logps, old, advantages, kl, clip=0.2, kl_coef=0.5)
    rho = torch.exp(torch.tensor([0.0, 0.5, -0.5, 0.1]))
    torch.testing.assert_close(result.ratios, rho)
    # rho above 1.2 and the reward positive, rho below 0.8 and the reward negative: both are held
    torch.testing.assert_close(result.losses, torch.tensor([-2.0, -1.2, 0.8, 0.0]) + 0.5 * kl)
    assert result.clipped.tolist() == [False, True, True, False]
    result.losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-2.0, 0.0, 0.0, 0.0]))


def test_a_ratio_beyond_the_clip_on_the_costly_side_keeps_its_gradient():
    logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    result = clipped_policy_gradient(logps, torch.tensor([-1.5, -0.5]), torch.tensor([-1.0, 1.0]), kl_coef=0.0)
    result.losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([1.0, -1.0]) * result.ratios)
    assert not result.clipped.any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"token_kl": None}, "token_kl is missing"),
        ({"kl_coef": 0.0}, "token_kl is given"),
        ({"old_logps": torch.zeros(2)}, "old_logps must be floating point"),
        ({"advantages": torch.tensor([0.0, 1.0, float("nan")])}, r"advantages\[2\] is nan"),
    ],
)
def test_bad_steps(change, says):
    values = {"logps": torch.zeros(3), "old_logps": torch.zeros(3), "advantages": torch.zeros(3),
              "token_kl": torch.zeros(3), **change}  # fmt: skip
    with pytest.raises(ValueError, match=says):
        clipped_policy_gradient(**values)


def test_the_sampled_divergence_agrees_with_the_full_one():
    torch.manual_seed(0)
    policy, ref = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    head = torch.randn(12, 8, dtype=torch.float64)
    p, q = (torch.log_softmax(x @ head.T, -1)[0] for x in (policy, ref))
    every = torch.arange(12)
    mean = (p.exp() * sampled_kl(p[every], q[every])).sum()  # over tokens drawn from the policy
    torch.testing.assert_close(mean, (p.exp() * (p - q)).sum())
    # and in the mean its gradient is that of the other direction, which linear_token_kl computes
    x = policy.clone().requires_grad_()
    logps = torch.log_softmax(x @ head.T, -1)[0]
    (p.exp() * sampled_kl(logps, q)).sum().backward()
    y = policy.clone().requires_grad_()
    linear_token_kl(y, ref, head, None, torch.tensor([0])).kl.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("off_policy", [False, True])
def test_a_divergence_in_the_reward_pulls_along_the_gradient_of_kl_policy_reference(off_policy):
    generator = torch.Generator().manual_seed(0)
    free, ref, old = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    free.requires_grad_()
    logps, q = free.log_softmax(-1), ref.log_softmax(-1)
    old = (0.05 * old + free.detach()).log_softmax(-1) if off_policy else logps.detach()  # within the clip
    options = OnlineOptions(kl="reward", kl_coef=0.3, clip=0.5)
    result = token_losses(logps, old, torch.zeros_like(q), (logps - q).detach(), options)
    (found,) = torch.autograd.grad((old.exp() * result.losses).sum(), free, retain_graph=True)  # the mean over tokens
    (expected,) = torch.autograd.grad(0.3 * (logps.exp() * (logps - q)).sum(), free, retain_graph=True)
    (other,) = torch.autograd.grad(0.3 * (q.exp() * (q - logps)).sum(), free)
    torch.testing.assert_close(found, expected)
    assert (found - other).abs().max() > 0.05  # KL(reference || policy) pulls elsewhere


# --- the loop ---


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("world", "cpu")


@pytest.fixture(scope="module")
def prompts():
    return load_rows("world:train", kind="prompt", limit=4)


def trainer(scorer: Any, **options: Any) -> OnlineTrainer:
    settings = OnlineOptions(**{"prompts_per_round": 4, "batch_size": 4, "micro_batch_size": 2, "max_new_tokens": 24,
                                "learning_rate": 1e-3, "lora_r": 4, **options})  # fmt: skip
    verifier = Verifier(scorer, ObjectVocabulary(["circle", "star", "ring", "heart", "red", "blue", "pink"]), "The {}")
    return OnlineTrainer(*load_model("world", device="cpu"), verifier, CALIBRATION, settings)


@pytest.mark.parametrize("kl", ["full", "k3"])
def test_the_first_step_has_ratio_one_exactly(scorer, prompts, kl):
    loop = trainer(scorer, kl=kl)
    with torch.no_grad():  # away from the reference
        for name, parameter in loop.policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made = loop.rollout(loop.scored_rows(prompts, ANSWERS))
    logps, divergence = loop.numbers(made.batch, made.ref_rows)
    assert logps.requires_grad and torch.equal(logps.detach(), made.old_logps)
    ratios = clipped_policy_gradient(logps, made.old_logps, made.rewards, divergence).ratios
    assert torch.equal(ratios, torch.ones_like(ratios))
    assert float(divergence.detach().mean()) > 1e-4


def test_old_and_reference_log_probabilities_are_the_models_own(scorer, prompts):
    loop = trainer(scorer)
    rows = loop.scored_rows(prompts, ANSWERS)
    made = loop.rollout(rows)
    start = load_model("world", device="cpu")
    (expected,) = response_logps(*start, rows, collator=loop.collator)
    torch.testing.assert_close(made.old_logps, expected.logps, atol=1e-5, rtol=0)  # LoRA starts as no change
    torch.testing.assert_close(loop._ref_logps(made), expected.logps, atol=1e-5, rtol=0)


def test_tokens_of_object_words_are_rewarded_and_an_unfinished_answer_has_no_end(scorer, prompts):
    loop = trainer(scorer)
    rows = loop.scored_rows(prompts, [*ANSWERS[:3], Answer("", 1, True)])
    assert [row["id"] for row in rows] == [prompts[i]["id"] for i in range(3)]  # the empty answer is left out
    made = loop.rollout(rows)
    texts = [loop.processor.tokenizer.decode([t]) for t in made.batch["layout"].targets.tolist()]
    assert texts.count("</s>") == 2
    words = {text.strip() for text, reward in zip(texts, made.rewards.tolist(), strict=True) if reward}
    assert words and words <= {"circle", "red", "star", "blue", "ring", "pink"}


def test_without_reward_and_divergence_there_is_no_gradient(scorer, prompts):
    loop = trainer(scorer, kl_coef=0.0)
    made = loop.rollout(loop.scored_rows(prompts, ANSWERS))
    figures = loop.update([replace(made, rewards=torch.zeros_like(made.rewards))])
    assert figures["grad_norm"] == 0.0 and figures["loss"] == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in loop.parameters)
    assert loop.update([made])["grad_norm"] > 0


def test_a_rewarded_tokens_log_probability_rises_and_a_punished_ones_falls(scorer, prompts):
    for sign in (1.0, -1.0):
        loop = trainer(scorer, kl_coef=0.0)
        made = loop.rollout(loop.scored_rows(prompts, ANSWERS))
        rewards = torch.zeros_like(made.rewards)
        rewards[3] = sign
        loop.update([replace(made, rewards=rewards)])
        with torch.no_grad():
            logps, _ = loop.numbers(made.batch, made.ref_rows)
        assert sign * float(logps[3] - made.old_logps[3]) > 1e-4


def test_the_divergence_pulls_back_to_the_reference(scorer, prompts):
    loop = trainer(scorer, kl_coef=1.0)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made = loop.rollout(loop.scored_rows(prompts, ANSWERS))
    made = replace(made, rewards=torch.zeros_like(made.rewards))
    first = loop.update([made])["kl"]
    for _ in range(5):
        last = loop.update([made])["kl"]
    assert last < 0.8 * first


def test_a_divergence_in_the_reward_pulls_sampled_tokens_to_the_reference(scorer, prompts):
    loop = trainer(scorer, kl="reward", kl_coef=1.0)
    with torch.no_grad():
        for name, parameter in loop.policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made = loop.rollout(loop.scored_rows(prompts, ANSWERS))
    ref = loop._ref_logps(made)
    made = replace(made, rewards=torch.zeros_like(made.rewards))
    figures = [loop.update([made]) for _ in range(4)]
    assert figures[0]["kl"] == pytest.approx(float((made.old_logps - ref).mean()), abs=1e-5)
    assert all(f["grad_norm"] > 0 and f["clip_share"] == 0 for f in figures)
    with torch.no_grad():
        logps, _ = loop.numbers(made.batch, made.ref_rows)
    assert (logps - ref).square().mean() < 0.9 * (made.old_logps - ref).square().mean()


def test_micro_batches_change_nothing(scorer, prompts):
    gradients = []
    for size in (1, 3, 4):
        loop = trainer(scorer, micro_batch_size=size, max_grad_norm=1e9)
        rows = loop.scored_rows(prompts, ANSWERS)
        loop.update([loop.rollout(rows[i : i + size]) for i in range(0, 4, size)])
        gradients.append(torch.cat([p.grad.flatten() for p in loop.parameters]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=2e-5 * float(gradients[0].abs().max()), rtol=0)


def test_all_prompts_come_before_any_comes_again():
    rows = [{"id": n} for n in range(10)]
    options = OnlineOptions(prompts_per_round=4)
    drawn = [row["id"] for number in range(5) for row in round_prompts(rows, options, number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and drawn[:10] != list(range(10))
    many = OnlineOptions(prompts_per_round=25)
    assert len(round_prompts(rows, many, 3)) == 25
    assert len({round_seed(0, n) for n in range(5)}) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [({"epochs": 0}, "epochs is 0"), ({"clip": 1.0}, "clip is 1.0"), ({"kl": "k1"}, "kl is 'k1'"),
     ({"learning_rate": 0.0}, "learning_rate"), ({"kl_coef": -0.1}, "kl_coef is -0.1")],
)  # fmt: skip
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        OnlineOptions(**options)


# --- the command ---


def online(*arguments: Any) -> int:
    parser = Parser(prog="aspo online", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def calibration(scorer, tmp_path) -> Path:
    vocabulary = ("blue", "circle", "green", "orange", "pink", "purple", "red", "square", "star", "yellow")
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(replace(CALIBRATION, identity=scorer.identity, vocabulary=vocabulary).to_json()))
    return path


def command(calibration: Path, out: Path, rounds: int) -> tuple[Any, ...]:
    return ("--model", "world", "--data", "world:train", "--limit", 12, "--calibration", calibration, "--out", out,
            "--rounds", rounds, "--prompts-per-round", 6, "--batch-size", 3, "--micro-batch-size", 3, "--device", "cpu",
            "--max-new-tokens", 24, "--learning-rate", 1e-3, "--lora-r", 4, "--save-rounds", 1)  # fmt: skip


def test_a_stopped_run_goes_on_to_the_same_weights(calibration, tmp_path, monkeypatch):
    online(*command(calibration, tmp_path / "whole", 3))
    original = OnlineTrainer.run_round

    def stopping(self, prompts):
        if self.round == 1 and not (tmp_path / "was").exists():
            (tmp_path / "was").touch()
            original(self, prompts)
            raise KeyboardInterrupt("killed behind the second round's steps")
        return original(self, prompts)

    monkeypatch.setattr(OnlineTrainer, "run_round", stopping)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        online(*command(calibration, stopped, 3))
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-1"]
    online(*command(calibration, stopped, 3))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (stopped, tmp_path / "whole")]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    history = json.loads((stopped / "log_history.json").read_text())
    assert history == json.loads((tmp_path / "whole" / "log_history.json").read_text())
    assert [figures["round"] for figures in history] == [1, 2, 3]
    for name in (
        "reward/word",
        "kl",
        "kl/policy_ref",
        "clip_share",
        "answer/tokens",
        "grad_norm",
        "answer/retokenised",
    ):
        assert all(name in figures for figures in history), name
    assert history[0]["kl/policy_ref"] == pytest.approx(0, abs=1e-6) and history[-1]["kl/policy_ref"] > 0
    load_model(stopped, device="cpu")  # an adapter with its processor, as `aspo train` leaves one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_round_saves_and_stops(calibration, tmp_path, monkeypatch, capsys, number):
    def run(out):
        return cli.main(["online", *map(str, command(calibration, tmp_path / out, 3)), "--save-rounds", "10"])

    assert run("whole") == 0
    original = OnlineTrainer.run_round

    def told(self, prompts):
        if self.round == 1:
            os.kill(os.getpid(), number)
        return original(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "run_round", told)
        assert run("out") == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert run("out") == 0
    weights = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_checkpoint_is_there_until_its_replacement_is(scorer, tmp_path, monkeypatch):
    loop = trainer(scorer)
    save_checkpoint(tmp_path, 3, loop.policy, loop.optimizer, "first")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("aspo.training_state.save_file", killed)
        save_checkpoint(tmp_path, 3, loop.policy, loop.optimizer, "second")
    assert load_checkpoint(checkpoints(tmp_path)[-1], loop.policy, loop.optimizer)[0] == "first"
    save_checkpoint(tmp_path, 3, loop.policy, loop.optimizer, "third")
    assert load_checkpoint(checkpoints(tmp_path)[-1], loop.policy, loop.optimizer)[0] == "third"


def test_a_round_is_saved_once(calibration, tmp_path, monkeypatch):
    saved, scores = [], Verifier.scores

    def counted(folder, number, *others):
        saved.append(number)
        save_checkpoint(folder, number, *others)

    def second_fails(self, rows, answers):
        if saved:
            raise ValueError("row 'a': its similarity is not finite")
        return scores(self, rows, answers)

    monkeypatch.setattr("aspo.online.trainer.save_checkpoint", counted)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not finite"):
        patch.setattr(Verifier, "scores", second_fails)
        online(*command(calibration, tmp_path, 2))
    assert saved == [1]
    online(*command(calibration, tmp_path, 2))
    assert saved == [1, 2]


def test_a_round_that_cannot_be_scored_costs_no_finished_one(calibration, tmp_path, monkeypatch):
    online(*command(calibration, tmp_path / "whole", 3), "--save-rounds", 10)
    out, scores, calls = tmp_path / "out", Verifier.scores, []

    def third_fails(self, rows, answers):
        calls.append(rows)
        if len(calls) == 3:
            raise ValueError("row 'a': its similarity is not finite")
        return scores(self, rows, answers)

    monkeypatch.setattr(Verifier, "scores", third_fails)
    with pytest.raises(ValueError, match="not finite"):
        online(*command(calibration, out, 3), "--save-rounds", 10)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    online(*command(calibration, out, 3), "--save-rounds", 10)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "whole")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])


def test_an_error_between_a_rounds_steps_keeps_no_half_round(calibration, tmp_path, monkeypatch):
    update, steps = OnlineTrainer.update, []

    def fourth_fails(self, step):  # the second round's second step
        steps.append(self.round)
        if len(steps) == 4:
            raise ValueError("the gradient's norm is nan")
        return update(self, step)

    monkeypatch.setattr(OnlineTrainer, "update", fourth_fails)
    with pytest.raises(ValueError, match="norm is nan"):
        online(*command(calibration, tmp_path / "out", 2), "--epochs", 1, "--save-rounds", 10)
    assert steps == [0, 0, 1, 1] and not checkpoints(tmp_path / "out")


def test_a_prompt_with_two_images_is_refused_before_the_first_round(calibration, tmp_path):
    rows = [dict(row) for row in load_rows("world:train", kind="prompt", limit=2)]
    rows[1] |= {"id": "both", "images": rows[0]["images"] + rows[1]["images"]}
    write_rows(tmp_path / "data", rows)
    with pytest.raises(ValueError, match="row 'both': it has 2 images; its answers are scored against one: drop it"):
        online(*command(calibration, tmp_path / "out", 1), "--data", tmp_path / "data")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_smaller_micro_batches(calibration, tmp_path):
    out = tmp_path / "out"
    online(*command(calibration, out, 1))
    online(*command(calibration, out, 2), "--micro-batch-size", 1)
    assert [figures["round"] for figures in json.loads((out / "log_history.json").read_text())] == [1, 2]
    assert json.loads((out / "run.json").read_text())["micro_batch_size"] == 1


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(calibration, tmp_path, capsys):
    out = tmp_path / "out"
    online(*command(calibration, out, 1))
    online(*command(calibration, out, 1))
    assert "is finished (1 rounds)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"begun with other settings \(clip: 0.2 -> 0.3\)"):
        online(*command(calibration, out, 1), "--clip", 0.3)
    online(*command(calibration, out, 2))  # more rounds go on
    assert len(json.loads((out / "log_history.json").read_text())) == 2
    known = json.loads(calibration.read_text())
    calibration.write_text(json.dumps({**known, "identity": "CLIP-0"}))
    with pytest.raises(ValueError, match="has other weights"):
        online(*command(calibration, tmp_path / "other", 1))
    calibration.write_text('{"mu": 1}')
    with pytest.raises(ValueError, match="is no calibration of"):
        online(*command(calibration, tmp_path / "other", 1))
