"""FiSAO's on-policy loop (`aspo online`): answer, score the answers' tokens, take clipped steps, and again.

A round: the current policy answers some prompts by sampling (temperature 1); the verifier gives each object word of an
answer its reward r; the log-probabilities of the answers' tokens are kept as old_logp; then `epochs` passes over the
answers, one optimiser step for each `batch_size` of them, with rho_t = exp(logp_t - old_logp_t) and

    loss = mean_t [ -min(rho_t r_t, clip(rho_t, 1 - eps, 1 + eps) r_t) + kl_coef * kl_t ]

over the step's generated tokens, however they are cut into micro-batches; or, with kl "reward", without the last term
and with r_t - kl_coef * (logp_t - ref_logp_t) in place of r_t (`token_losses`). docs/fisao.md says what is whose.
Axes: N generated tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from aspo.data import Collator
from aspo.generation import Answer, generate_answers
from aspo.model import check_head, inference, output_head, trunk_hidden
from aspo.policy import LoraOptions, add_lora, disable_dropout
from aspo.resume import write_json
from aspo.rewards.verifier import Calibration, Verifier
from aspo.shared_prefix.forward import batch_to, counted_rows
from aspo.training_state import load_checkpoint, save_checkpoint
from aspo_kernels.family.policy_gradient import PolicyGradient, clipped_policy_gradient, sampled_kl

HISTORY_FILE = "log_history.json"
KL_KINDS = ("full", "k3", "reward")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class OnlineOptions(LoraOptions):
    """What makes an on-policy run what it is."""

    rounds: int = 100
    prompts_per_round: int = 64
    batch_size: int = 16  # answers of an optimiser step
    micro_batch_size: int = 4  # of them in one forward pass
    epochs: int = 2  # passes over a round's answers
    clip: float = 0.2
    kl_coef: float = 0.1
    kl: str = "full"  # docs/fisao.md: which divergence, and how its gradient is estimated
    learning_rate: float = 1e-5  # constant
    max_grad_norm: float = 1.0
    max_new_tokens: int = 256
    generation_batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round", "batch_size", "micro_batch_size", "epochs", "max_new_tokens",
                     "generation_batch_size", "lora_r", "lora_alpha"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.kl_coef < float("inf") or not 0 < self.clip < 1:
            raise ValueError(f"kl_coef is {self.kl_coef} (0 or more), clip is {self.clip} (between 0 and 1)")
        if self.kl not in KL_KINDS:
            raise ValueError(f"kl is {self.kl!r}; choose one of {', '.join(KL_KINDS)}")


@dataclass(frozen=True)
class Rollout:
    """A micro-batch of answers as they were generated.

    batch: of the collator, on the device. rewards, old_logps: (N,). ref_rows: (N, H), what the reference's head reads.
    """

    batch: dict[str, Any]
    rewards: Tensor
    old_logps: Tensor
    ref_rows: Tensor


class OnlineTrainer:
    """The loop's state: the policy, its optimiser, and how many rounds are done.

    Args:
        model: loaded by `aspo.model.load_model`; LoRA layers are put on it, and it is the reference without them.
        verifier, calibration: what scores the answers.
    """

    def __init__(
        self, model: Any, processor: Any, verifier: Verifier, calibration: Calibration, options: OnlineOptions
    ) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("the start model is an adapter: merge it into its base first (merge_and_unload)")
        torch.manual_seed(options.seed)  # the adapter's random start
        self.options, self.processor = options, processor
        self.verifier, self.calibration = verifier, calibration
        self.policy = add_lora(model, options)
        disable_dropout(self.policy)
        self.policy.eval()
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)
        self.head, self.collator = output_head(self.policy), Collator(processor, responses=("chosen",))
        self.device = self.head.weight.device
        self.round = 0
        self.stepped = False  # whether the round in hand has changed the policy
        self.saved: Path | None = None  # the checkpoint of this round, or of the last one that has one
        self.history: list[dict[str, float]] = []

    # ---- one round ----

    def run_round(self, prompts: Sequence[Row]) -> dict[str, float]:
        """Answer, score and step; returns the round's figures, which are in `history` too."""
        options, figures = self.options, {"round": self.round + 1.0}
        answers = generate_answers(
            self.policy,
            self.processor,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=1.0,
            seed=round_seed(options.seed, self.round),
            batch_size=options.generation_batch_size,
        )
        rows = self.scored_rows(prompts, answers)
        figures |= _answer_figures(answers, rows)
        if rows:
            size = options.micro_batch_size
            steps = [rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
            micro = [[self.rollout(step[i : i + size]) for i in range(0, len(step), size)] for step in steps]
            totals: dict[str, list[float]] = {}
            for _ in range(options.epochs):
                for step in micro:
                    for name, value in self.update(step).items():
                        totals.setdefault(name, []).append(value)
            figures |= {name: sum(values) / len(values) for name, values in totals.items()}
            made = [rollout for step in micro for rollout in step]
            figures["kl/policy_ref"] = float(torch.cat([e.old_logps - self._ref_logps(e) for e in made]).mean())
            figures["answer/retokenised"] = _retokenised(made, rows)
        self.round += 1
        self.stepped = False
        self.history.append(figures)
        return figures

    def scored_rows(self, prompts: Sequence[Row], answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Rows that the collator reads: the answers that say something, with their words' rewards."""
        kept = [(row, answer) for row, answer in zip(prompts, answers, strict=True) if answer.text.strip()]
        found = self.verifier.scores([row for row, _ in kept], [[answer.text] for _, answer in kept])
        return [
            {
                **{name: row[name] for name in ("id", "prompt", "images") if row.get(name) is not None},
                "chosen": answer.text,
                "chosen_token_scores": self.calibration.spans(words[0]),
                "unfinished": not answer.finished,
                "sampled_tokens": answer.num_tokens,
            }
            for (row, answer), words in zip(kept, found, strict=True)
        ]

    def rollout(self, rows: Sequence[Row]) -> Rollout:
        """Collate answers, and keep what the policy and its reference say of them now."""
        batch = batch_to(self.collator(rows), self.device)
        with inference(self.policy):
            if self.round == 0 and not self.history:
                check_head(self.policy, batch["model_inputs"])
            with self.policy.disable_adapter():
                ref_rows = counted_rows(trunk_hidden(self.policy, batch["model_inputs"]), batch["layout"])
            old_logps, _ = self.numbers(batch, ref_rows)
        return Rollout(batch, batch["token_scores"].to(self.device), old_logps, ref_rows)

    def numbers(self, batch: Mapping[str, Any], ref_rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities under the policy and (N,) what `token_losses` takes as kl; no logits are built."""
        rows = counted_rows(trunk_hidden(self.policy, batch["model_inputs"]), batch["layout"])
        targets = batch["layout"].targets
        if self.options.kl == "full":
            found = self.head.token_kl(rows, ref_rows, self.head, targets)
            return found.logps, found.kl
        logps, ref_logps = self.head.logps_pair(rows, ref_rows, targets)
        if self.options.kl == "reward":
            return logps, (logps - ref_logps).detach()
        return logps, sampled_kl(logps, ref_logps)

    def _ref_logps(self, rollout: Rollout) -> Tensor:
        with torch.no_grad():
            return self.head.logps(rollout.ref_rows, rollout.batch["layout"].targets)

    def update(self, step: Sequence[Rollout]) -> dict[str, float]:
        """One optimiser step over micro-batches; the loss is the mean over all their tokens."""
        options, total = self.options, sum(e.old_logps.numel() for e in step)
        sums = dict.fromkeys(("loss", "kl", "clip_share", "rewarded"), 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for rollout in step:
            logps, kl = self.numbers(rollout.batch, rollout.ref_rows)
            result = token_losses(logps, rollout.old_logps, rollout.rewards, kl, options)
            loss = result.losses.sum() / total
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["kl"] += float(kl.detach().sum()) / total
            rewarded = rollout.rewards != 0
            sums["clip_share"] += float((result.clipped & rewarded).sum())
            sums["rewarded"] += float(rewarded.sum())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm))
        if not norm < float("inf"):
            raise ValueError(f"the gradient's norm is {norm} in round {self.round + 1}: lower learning_rate")
        self.stepped = True
        self.optimizer.step()
        clipped = sums["clip_share"] / max(sums.pop("rewarded"), 1.0)
        return {**sums, "clip_share": clipped, "grad_norm": norm}

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """checkpoint-<round>: the adapter, the optimiser and the history, once a round; older ones are removed."""
        if self.saved != (target := folder / f"checkpoint-{self.round}"):
            state = {"round": self.round, "history": self.history}
            save_checkpoint(folder, self.round, self.policy, self.optimizer, state)
            self.saved = target
        write_json(folder / HISTORY_FILE, self.history)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of `save`, to the same bits."""
        state, _ = load_checkpoint(checkpoint, self.policy, self.optimizer)
        self.round, self.history, self.saved = state["round"], state["history"], checkpoint

    def save_final(self, folder: Path) -> None:
        """The adapter and the processor, as `aspo train` leaves them."""
        self.policy.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)


def token_losses(
    logps: Tensor, old_logps: Tensor, rewards: Tensor, kl: Tensor, options: OnlineOptions
) -> PolicyGradient:
    """The clipped losses of N tokens. All (N,).

    kl: divergences, differentiable, which are added; for "reward" `logps - ref_logps`, detached, which the rewards are
    reduced by: in the mean over the sampling policy's tokens, with the gradient of kl_coef * KL(policy || reference).
    """
    if options.kl == "reward":
        return clipped_policy_gradient(logps, old_logps, rewards - options.kl_coef * kl, clip=options.clip, kl_coef=0.0)
    token_kl = kl if options.kl_coef else None
    return clipped_policy_gradient(logps, old_logps, rewards, token_kl, clip=options.clip, kl_coef=options.kl_coef)


def round_seed(seed: int, number: int) -> int:
    """Of a round's sampling: rounds are far apart, since generation seeds its batches seed, seed + 16, ..."""
    return seed + 1_000_003 * (number + 1)


def round_prompts(rows: Sequence[Row], options: OnlineOptions, number: int) -> list[Row]:
    """The prompts of a round: all are gone through in an order of their own before any comes again."""
    order: list[int] = []
    epoch, skip = divmod(number * options.prompts_per_round, len(rows))
    while len(order) < skip + options.prompts_per_round:
        order += random.Random(f"{options.seed}:{epoch}").sample(range(len(rows)), len(rows))
        epoch += 1
    return [rows[i] for i in order[skip : skip + options.prompts_per_round]]


def _retokenised(made: Sequence[Rollout], rows: Sequence[Row]) -> float:
    """Share of answers whose text the tokenizer cuts into another number of tokens than were sampled."""
    lengths = [n for e in made for n in e.batch["layout"].response_token_offsets.diff().tolist()]
    return sum(n != row["sampled_tokens"] for n, row in zip(lengths, rows, strict=True)) / len(rows)


def _answer_figures(answers: Sequence[Answer], rows: Sequence[Row]) -> dict[str, float]:
    """Means over a round's answers."""
    rewards = [value for row in rows for _, _, value in row["chosen_token_scores"]]
    count, words = len(answers), max(len(rewards), 1)
    return {
        "reward/word": sum(rewards) / words,
        "reward/answer": sum(rewards) / max(len(rows), 1),
        "reward/positive": sum(value > 0 for value in rewards) / words,
        "reward/negative": sum(value < 0 for value in rewards) / words,
        "answer/tokens": sum(answer.num_tokens for answer in answers) / count,
        "answer/object_words": len(rewards) / count,
        "answer/unfinished": sum(not answer.finished for answer in answers) / count,
        "answer/empty": (count - len(rows)) / count,
    }
