"""The same numbers through TRL's own code, values and gradients, where TRL has the same loss."""

from __future__ import annotations

import importlib
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from items import Item, batch, inputs

from aspo_kernels import linear_logps, objectives
from aspo_kernels.objectives import Inputs

pytest.importorskip("trl", minversion="1.16")
import aspo  # noqa: F401  makes torchvision importable beside a CPU torch


def pairs(dtype: torch.dtype = torch.float64) -> list[Item]:
    return [{r: a for r, a in i.items() if r < 2} for i in batch(dtype)]


def padded(values: torch.Tensor, x: Inputs) -> torch.Tensor:
    """(N,) -> (R, T): TRL's rows, chosen first."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(x.lengths.long().tolist())), batch_first=True)


def sums(values: torch.Tensor, x: Inputs) -> torch.Tensor:
    return torch.stack([part.sum() for part in values.split(x.lengths.long().tolist())])


def counted(x: Inputs) -> torch.Tensor:
    """(R, 1 + T) completion mask: one token of a prompt, and the response."""
    return torch.cat([torch.zeros(len(x.lengths), 1), padded(torch.ones_like(x.logps), x)], 1).long()


def stub(**settings: object) -> SimpleNamespace:
    """What TRL's methods read of their trainer besides the loss's own settings."""

    def gather(values):
        return values

    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=gather, gather_for_metrics=gather),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def outputs(x: Inputs, logps: torch.Tensor, **more: torch.Tensor) -> SimpleNamespace:
    """A model's answer as TRL's patched forward gives it."""
    logps = padded(logps, x)
    return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > -1, **more)


def trl_dpo(x: Inputs, loss_type: str, beta: float, **settings: object) -> torch.Tensor:
    """DPOTrainer._compute_loss."""
    module = importlib.import_module("trl.trainer.dpo_trainer")
    defaults = {"f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "use_weighting": False, "ld_alpha": None}
    more = {"log_sum_sq_probs": padded(settings.pop("log_sum_sq_probs"), x)} if "log_sum_sq_probs" in settings else {}
    trainer = stub(loss_types=[loss_type], loss_weights=[1.0], beta=beta, **{**defaults, **settings})
    chosen, rejected = sums(x.ref_logps, x).chunk(2)
    rows = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    rows |= dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), counted(x))
    return module.DPOTrainer._compute_loss(trainer, lambda **_: outputs(x, x.logps, **more), rows, False)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    grads = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    assert grads[1].any()
    torch.testing.assert_close(*grads, rtol=rtol, atol=1e-7 if leaf.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge")])
def test_dpo_and_its_nearest(name, loss_type, beta):
    x = inputs(pairs())
    assert_same(objectives.get(name)(x, beta=beta).losses.mean(), trl_dpo(x, loss_type, beta), x.logps)


def test_label_smoothing():
    """TRL's `aot` sorts the batch's pairs; of one pair it is DPO with smoothed labels."""
    for i in pairs():
        x = inputs([i])
        ours = objectives.get("dpo")(x, beta=0.3, label_smoothing=0.2).losses.mean()
        assert_same(ours, trl_dpo(x, "aot", 0.3, label_smoothing=0.2), x.logps)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js_divergence"])
def test_f_divergences(name):
    x = inputs(pairs())
    ours = objectives.get("f_dpo")(x, beta=0.3, f_divergence=name).losses.mean()
    assert_same(ours, trl_dpo(x, "sigmoid", 0.3, f_divergence_type=name), x.logps)


@pytest.mark.parametrize("f_alpha", [0.5, -1.0, 2.0, 1.0])
def test_alpha_divergence(f_alpha):
    """In fp32: TRL takes no fp64 here."""
    x = inputs(pairs(torch.float32))
    ours = objectives.get("f_dpo")(x, beta=0.3, f_divergence="alpha_divergence", f_alpha=f_alpha).losses.mean()
    theirs = trl_dpo(x, "sigmoid", 0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=f_alpha)
    assert_same(ours, theirs, x.logps, rtol=1e-5)


def test_wpo():
    """log sum_v p_v^2 too is TRL's own, from the hidden states."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    x = inputs(pairs(torch.float32))
    hidden, head = torch.randn(x.layout.num_tokens, 16, requires_grad=True), torch.randn(200, 16)
    targets = torch.randint(200, (x.layout.num_tokens,))
    logps, _, log_sum_sq, *_ = chunked.ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, 64)
    x = replace(
        x,
        logps=linear_logps(hidden, head, targets),
        sharp_logps=linear_logps(hidden.detach(), head, targets, temperature=0.5),
    )
    torch.testing.assert_close(2 * x.logps.detach() - x.sharp_logps, log_sum_sq, rtol=1e-5, atol=1e-5)
    ours = objectives.get("wpo")(x, beta=0.3).losses.mean()
    theirs = replace(x, logps=logps)
    weighted = trl_dpo(theirs, "sigmoid", 0.3, use_weighting=True, log_sum_sq_probs=log_sum_sq)
    assert_same(ours, weighted, hidden, rtol=1e-4)


def trl_average(method: str, module: str, cls: str, x: Inputs, **settings: object) -> torch.Tensor:
    """A loss of TRL's experimental trainers that takes average log-probabilities: (B,)."""
    trainer_class = getattr(importlib.import_module(module), cls)
    chosen, rejected = (sums(x.logps, x) / x.lengths).chunk(2)
    return getattr(trainer_class, method)(stub(**settings), chosen, rejected)[0]


@pytest.mark.filterwarnings("ignore")
def test_simpo():
    x = inputs(pairs())
    settings = {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.0, "alpha": 0.0}
    theirs = trl_average("cpo_loss", "trl.experimental.cpo.cpo_trainer", "CPOTrainer", x, **settings)
    assert_same(objectives.get("simpo")(x, beta=1.5, gamma=0.4).losses.mean(), theirs.mean(), x.logps)


@pytest.mark.filterwarnings("ignore")
def test_orpo():
    """TRL's odds ratio (in fp32) beside the likelihood term, which is `sft` here."""
    x = inputs(pairs())
    ratio = trl_average("odds_ratio_loss", "trl.experimental.orpo.orpo_trainer", "ORPOTrainer", x, beta=0.3)
    theirs = objectives.get("sft")(x).losses.mean() - ratio.double().mean()
    ours = objectives.get("orpo")(x, beta=0.3).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, x.logps, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("labels", [[True, False, False, True], [True] * 4, [False] * 4])
def test_kto(labels):
    """KTOTrainer._compute_loss: role 0 the completion, role 1 the other prompt's, from which it estimates the KL."""
    module = importlib.import_module("trl.trainer.kto_trainer")
    x = inputs(pairs(), desirable=torch.tensor(labels))
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    mask, answer = counted(x)[:4], outputs(x, x.logps)
    answer = SimpleNamespace(**{name: rows[:4] for name, rows in vars(answer).items()})
    policy, ref = sums(x.logps, x), sums(x.ref_logps, x)
    trainer = stub(
        loss_type="kto", calculate_KL=True, _compute_kl_logps=lambda model, batch: policy[4:].detach(), **options
    )
    rows = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": torch.tensor(labels),
        "ref_logps": ref[:4], "ref_KL_logps": ref[4:],
    }  # fmt: skip
    theirs = module.KTOTrainer._compute_loss(trainer, lambda **_: answer, rows, False)
    result = objectives.get("kto")(x, **options)
    assert_same(result.losses.mean(), theirs, x.logps)
    assert float(result.stats["kl"]) == pytest.approx(trainer._metrics["train"]["kl"][0])
