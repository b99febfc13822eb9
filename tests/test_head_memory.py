"""Nothing that trains holds an N x V array: from the model's inputs through the head and the loss to the backward.

Every registered objective, the on-policy step of `aspo online`, and the judge of `aspo rewards --method tldr`.

The most that is allocated at a time is measured at two vocabulary sizes with the same tokens. Whatever has an entry for
each token and each vocabulary entry makes the difference at least N x 3V numbers; what has a row for each vocabulary
entry (embedding, head) is made before. Positive controls: the same path with full logits, and an objective that makes
such an array of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import tiny_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from aspo.model import HeadParams
from aspo.online.trainer import KL_KINDS, OnlineOptions, OnlineTrainer
from aspo.rewards.tldr import TokenJudge
from aspo.shared_prefix.forward import PairForward, batch_to, objective_inputs
from aspo_kernels import SentenceLayout, objectives, tiles

ITEMS, ROLES, PROMPT, RESPONSE, HIDDEN = 2, 4, 3, 64, 32
TOKENS = ITEMS * ROLES * RESPONSE  # N
SMALL, LARGE = 2_000, 8_000  # V and 4V
LOGITS = TOKENS * (LARGE - SMALL) * 4  # bytes: what full fp32 logits would grow by
OURS = sorted(n for n in objectives.names() if objectives.get(n).function.__module__.startswith("aspo_kernels."))


@pytest.fixture(autouse=True)
def tiles_far_below_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 KiB, so that the workspace is the same at both sizes; by default one tile would hold all of so few tokens."""
    small = tiles.TileSize(tokens=128, bytes=2**17, width=256, gradient_tokens=128)
    monkeypatch.setattr(tiles, "CPU_TILE", small)
    monkeypatch.setattr(tiles, "GPU_TILES", ((0, small),))


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most that is allocated at a time during a step, over what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:  # sees into custom operators too
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def made_batch(vocabulary: int) -> dict[str, Any]:
    """Two items of four responses each, with everything that an objective may read."""
    generator = torch.Generator().manual_seed(0)
    rows, length = ITEMS * ROLES, PROMPT + RESPONSE
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    labels[:, : PROMPT - 1] = -100
    sentence_ids = (torch.arange(length) > length // 2).long().expand(rows, length)
    item = torch.arange(rows)
    layout = SentenceLayout.from_labels(labels, sentence_ids, group=item % ITEMS, role=item // ITEMS)
    assert layout.num_tokens == TOKENS
    return {
        "model_inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "layout": layout,
        "similarity": torch.rand(layout.chosen_sentences.numel()),
        "rejected_similarity": torch.rand(layout.num_sentences),
        "sentence_weights": torch.rand(layout.num_sentences),
        "token_scores": torch.randn(TOKENS),
        "negative_log_q": -torch.rand(rows),
        "desirable": torch.tensor([True, False]),
    }


def made_policy(vocabulary: int, trained_head: bool = False) -> torch.nn.Module:
    """A Llama with LoRA, the usual case: its head is frozen; or one whose head trains."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **sizes))
    if not trained_head:
        return get_peft_model(policy, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    policy.get_input_embeddings().requires_grad_(False)
    return policy


Step = tuple[Callable[[], object], torch.nn.Module]  # a step, and what it trains


def growth_of(prepare: Callable[[int], Step], device: str) -> float:
    """The peak at 4V less that at V, as a share of what N x V fp32 logits would have grown by.

    prepare: makes the step of a model with that many vocabulary entries.
    """
    peaks = []
    for vocabulary in (SMALL, LARGE):
        step, model = prepare(vocabulary)
        step()  # loads code, compiles kernels
        for p in model.parameters():
            p.grad = None
        peaks.append(peak_bytes(step, device))
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(g is not None and g.abs().sum() > 0 for g in trained)
    return (peaks[1] - peaks[0]) / LOGITS


def growth(name: str, device: str, backend: str = "auto", own_reference: bool = False, **policy: bool) -> float:
    """`growth_of` an objective's forward and backward."""
    objective = objectives.get(name)

    def prepare(vocabulary: int) -> Step:
        batch = batch_to(made_batch(vocabulary), torch.device(device))
        batch |= {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        model = made_policy(vocabulary, **policy).to(device)
        reference = made_policy(vocabulary, trained_head=True).to(device) if own_reference else None
        forward = PairForward(model, reference, "mask", objective.difference_only, backend)

        def step() -> None:
            numbers = forward.numbers(batch, objective.needs_reference, objective.reads)
            reductions = "auto" if backend == "reference" else backend
            x = objective_inputs(batch, numbers, reductions, objective.reads, 2.0 * RESPONSE)
            objective(x).losses.mean().backward()

        return step, model

    return growth_of(prepare, device)


@pytest.mark.parametrize("name", OURS)
def test_no_objective_holds_tokens_times_vocabulary(name, device):
    assert growth(name, device) < 0.02


@pytest.mark.parametrize("name", ["dpo", "tdpo", "wpo"])
def test_nor_with_a_reference_of_its_own(name, device):
    assert growth(name, device, own_reference=True) < 0.02


@pytest.mark.parametrize("name", ["dpo", "tdpo", "wpo"])
def test_nor_with_a_head_that_trains(name, device):
    """Its gradient has an entry for each of the head's, V x H: 1/16 of the logits here, and at most three such."""
    assert growth(name, device, own_reference=True, trained_head=True) < 3.5 * HIDDEN / TOKENS


# --- the steps that are no objective's ---


def online_growth(kl: str, device: str) -> float:
    """`growth_of` a round's step: what is kept of the answers, and the clipped update on them."""

    def prepare(vocabulary: int) -> Step:
        model = made_policy(vocabulary, trained_head=True).to(device)
        loop = OnlineTrainer(model, tiny_tokenizer(), None, None, OnlineOptions(kl=kl))  # type: ignore[arg-type]
        loop.collator = lambda rows: made_batch(vocabulary)  # type: ignore[assignment]
        loop.round = 1  # the first one compares the head with the model's logits at each row's last position
        return lambda: loop.update([loop.rollout([])]), loop.policy

    return growth_of(prepare, device)


def judge_growth(device: str) -> float:
    """`growth_of` a training step of TLDR's judge."""

    def prepare(vocabulary: int) -> Step:
        judge = TokenJudge(made_policy(vocabulary, trained_head=True).to(device), tiny_tokenizer(), 1e-3, 0)
        judge.collator = lambda rows: made_batch(vocabulary)  # type: ignore[assignment]
        return lambda: judge.step([]), judge.policy

    return growth_of(prepare, device)


@pytest.mark.parametrize("kl", KL_KINDS)
def test_nor_does_the_on_policy_step(kl, device):
    assert online_growth(kl, device) < 0.02


def test_nor_does_the_token_judge(device):
    assert judge_growth(device) < 0.02


# --- what the measurement would see ---


@pytest.mark.parametrize("name", ["dpo", "tdpo", "wpo", "sft"])
def test_full_logits_are_seen(name, device):
    assert growth(name, device, backend="reference") > 0.9


def test_full_logits_of_the_other_steps_are_seen(monkeypatch, device):
    for name in ("logps", "logps_pair", "token_kl"):
        monkeypatch.setattr(HeadParams, name, partialmethod(getattr(HeadParams, name), backend="reference"))
    assert judge_growth(device) > 0.9
    for kl in KL_KINDS:
        assert online_growth(kl, device) > 0.9


def test_an_objective_with_such_an_array_is_seen(monkeypatch, device):
    monkeypatch.setattr(objectives, "_REGISTRY", dict(objectives._REGISTRY))

    @objectives.register("naive")
    def naive(x: objectives.Inputs) -> objectives.Result:
        """DPO, whose log-probabilities are picked out of a table of tokens and vocabulary entries."""
        vocabulary = LARGE if int(x.layout.targets.max()) >= SMALL else SMALL
        table = F.one_hot(x.layout.targets, vocabulary).to(torch.float16) * x.token_logratios[:, None].half()
        h = x.sum_by(table.sum(1).to(x.logps.dtype), x.layout.response_token_offsets)
        chosen, rejected = x.pair(h)
        return objectives.Result(-F.logsigmoid(0.1 * (chosen - rejected)))

    assert growth("naive", device) > 0.4  # half precision: half of fp32's
