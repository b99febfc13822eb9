"""The same numbers through TRL's own code, values and gradients, where TRL has the same loss."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from items import Item, batch, inputs, item

from aspo_kernels import linear_logps, objectives
from aspo_kernels.family.policy_gradient import sampled_kl
from aspo_kernels.objectives import Inputs

pytest.importorskip("trl", minversion="1.16")
import aspo  # noqa: F401  makes torchvision importable beside a CPU torch
from aspo.online.trainer import OnlineOptions, OnlineTrainer, Rollout, token_losses


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
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            gather=gather,
            gather_for_metrics=gather,
            reduce=lambda values, reduction: values,
            num_processes=1,
        ),
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


def trl_dpo_step(
    x: Inputs, loss_type: str | Mapping[str, float], beta: float, **settings: object
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """DPOTrainer._compute_loss and what it logs; loss_type: one, or several with their weights."""
    module = importlib.import_module("trl.trainer.dpo_trainer")
    weights = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    defaults = {"f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "use_weighting": False, "ld_alpha": None}
    more = {"log_sum_sq_probs": padded(settings.pop("log_sum_sq_probs"), x)} if "log_sum_sq_probs" in settings else {}
    types = {"loss_types": list(weights), "loss_weights": list(weights.values())}
    trainer = stub(**types, beta=beta, **{**defaults, **settings})
    chosen, rejected = sums(x.ref_logps, x).chunk(2)
    rows = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    rows |= dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), counted(x))
    loss = module.DPOTrainer._compute_loss(trainer, lambda **_: outputs(x, x.logps, **more), rows, False)
    return loss, trainer._metrics["train"]


def trl_dpo(x: Inputs, loss_type: str | Mapping[str, float], beta: float, **settings: object) -> torch.Tensor:
    return trl_dpo_step(x, loss_type, beta, **settings)[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    grads = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    assert grads[1].any()
    torch.testing.assert_close(*grads, rtol=rtol, atol=1e-7 if leaf.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.8])
@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("hinge", "hinge")])
def test_dpo_and_its_nearest(name, loss_type, beta):
    x = inputs(pairs())
    result = objectives.get(name)(x, beta=beta)
    theirs, logged = trl_dpo_step(x, loss_type, beta)
    assert_same(result.losses.mean(), theirs, x.logps)
    for ours, name_there in {"chosen_rewards": "chosen", "rejected_rewards": "rejected", "margins": "margins"}.items():
        assert float(result.stats[ours].mean()) == pytest.approx(logged[f"rewards/{name_there}"][0], abs=1e-10)


def test_sft():
    """Of one pair: TRL's `sft` is a mean over the batch's tokens, ours over its pairs."""
    for i in pairs():
        x = inputs([i])
        assert_same(objectives.get("sft")(x).losses.mean(), trl_dpo(x, "sft", 0.3), x.logps)


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


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"dpo": 0.8, "sft": 0.3}, {"sigmoid": 0.8, "sft": 0.3}),
        ({"ipo": 0.6, "dpo": 0.25, "hinge": 1.7}, {"ipo": 0.6, "sigmoid": 0.25, "hinge": 1.7}),
        ({"dpo": 0.8, "hinge": -0.5}, {"sigmoid": 0.8, "hinge": -0.5}),
    ],
)
def test_a_weighted_sum(ours, theirs):
    """The chosen responses are of one length: TRL's `sft` is a mean over the batch's tokens, ours over its pairs."""
    shapes = [([2, 2], [4, 2]), ([4], [3]), ([1, 3], [1, 2, 2]), ([1, 1, 2], [1])]
    x = inputs([item(*shape, 0, seed) for seed, shape in enumerate(shapes)])
    assert_same(objectives.weighted_sum(ours)(x, beta=0.3).losses.mean(), trl_dpo(x, theirs, 0.3), x.logps)


# --- the clipped token step of `aspo online` ---

LENGTHS = [5, 2, 7, 1]  # of answers: their tokens stand in one row, as the step has them


def token_step() -> dict[str, torch.Tensor]:
    """logps, old and ref log-probabilities, and a reward for each token, some of them 0: (N,) each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, sum(LENGTHS), generator=generator, dtype=torch.float64)
    logps = -3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    rewards = noise[2].masked_fill(noise[3] > 1, 0.0)
    return {"logps": logps.requires_grad_(), "old": logps.detach() + 0.3 * noise[0],
            "ref": logps.detach() + 0.5 * noise[1], "rewards": rewards}  # fmt: skip


def trl_grpo(x: dict[str, torch.Tensor], answers: slice, loss_type: str, beta: float, parts: int) -> tuple:
    """GRPOTrainer._compute_loss of some of the answers, one of a step's `parts` micro-batches: its loss and metrics."""
    module = importlib.import_module("trl.trainer.grpo_trainer")
    rows = {k: torch.nn.utils.rnn.pad_sequence(v.split(LENGTHS)[answers], batch_first=True) for k, v in x.items()}
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in LENGTHS[answers]], batch_first=True).long()
    trainer = stub(
        loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=0.2, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=parts),
        current_gradient_accumulation_steps=parts,
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows["logps"], rows["logps"].detach(), None),
    )  # fmt: skip
    read = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": rows["rewards"], "old_per_token_logps": rows["old"], "ref_per_token_logps": rows["ref"],
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }  # fmt: skip
    return module.GRPOTrainer._compute_loss(trainer, None, read), trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])  # both are means over all tokens here
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_the_clipped_token_step(beta, loss_type):
    x = token_step()
    kl = sampled_kl(x["logps"], x["ref"])
    result = token_losses(x["logps"], x["old"], x["rewards"], kl, OnlineOptions(kl="k3", kl_coef=beta, clip=0.2))
    theirs, metrics = trl_grpo(x, slice(None), loss_type, beta, 1)
    assert_same(result.losses.mean(), theirs, x["logps"])
    assert 0 < result.clipped.sum() < (result.ratios - 1).abs().gt(0.2).sum()  # on the costly side it does not hold
    assert float(result.clipped.double().mean()) == pytest.approx(metrics["clip_ratio/region_mean"][0])
    assert beta == 0 or float(kl.detach().mean()) == pytest.approx(metrics["kl"][0])


def test_a_step_of_several_micro_batches():
    """`OnlineTrainer.update` beside TRL's accumulation: the mean is over the step's tokens, not the micro-batches'."""
    x, cuts = token_step(), [(slice(0, 1), slice(0, 5)), (slice(1, 4), slice(5, 15))]  # answers, and their tokens
    step = [Rollout({"of": tokens}, x["rewards"][tokens], x["old"][tokens], torch.empty(0)) for _, tokens in cuts]
    loop = SimpleNamespace(
        options=OnlineOptions(kl="k3", kl_coef=0.4, max_grad_norm=1e9),
        numbers=lambda batch, _: (x["logps"][batch["of"]], sampled_kl(x["logps"][batch["of"]], x["ref"][batch["of"]])),
        optimizer=SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None),
        parameters=[x["logps"]],
    )
    figures = OnlineTrainer.update(loop, step)
    theirs = sum(trl_grpo(x, answers, "dapo", 0.4, 2)[0] for answers, _ in cuts)
    assert figures["loss"] == pytest.approx(float(theirs.detach()), rel=1e-12)
    torch.testing.assert_close(x["logps"].grad, torch.autograd.grad(theirs, x["logps"])[0], rtol=1e-10, atol=1e-12)
