"""LLaMA-Factory: call `install` before `run_exp`, and `stage: dpo` trains one of our objectives.

    from aspo.integrations import llama_factory
    from llamafactory.train.tuner import run_exp

    llama_factory.install("aspo", alpha=0.5, scored_rows=load_rows("runs/scored"))
    run_exp()

LLaMA-Factory drops columns that it does not know, so the sentences of a chosen answer are looked up by its text (and
image) in `scored_rows`. Tokens, template, images, reference, LoRA and the loop are LLaMA-Factory's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from llamafactory.train.dpo import trainer as dpo
from torch import Tensor

from aspo.integrations.common import Settings, labelled_logps, refuse
from aspo.integrations.labelled import Scored, ScoredRows, labelled_layout, token_offsets
from aspo_kernels.layout import IGNORE_INDEX

BATCH_KEY = "aspo_layout"
IGNORED = {
    "pref_loss": ("sigmoid", "name the objective in install(...)"),
    "pref_ftx": (0.0, "install({'dpo': 1.0, 'sft': pref_ftx})"),
    "pref_bco_weight": (0.0, "no objective of ours is BCO"),
    "dpo_label_smoothing": (0.0, "give it to install('dpo', label_smoothing=...)"),
    "simpo_gamma": (0.5, "give it to install('simpo', gamma=...)"),
    "ld_alpha": (None, "no objective of ours takes it"),
}


class _Collator:
    """LLaMA-Factory's collator, and the layout of what it makes."""

    def __init__(self, collator: Any, tokenizer: Any, scored: ScoredRows | None) -> None:
        self.collator, self.tokenizer, self.scored = collator, tokenizer, scored

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        scored: list[Scored | None] = [None] * len(features)
        if self.scored is not None:
            scored = [self.scored.find(self._chosen(feature), feature.get("images")) for feature in features]
        batch = self.collator(features)
        batch[BATCH_KEY] = labelled_layout(batch["labels"], self.tokenizer, scored)
        return batch

    def _chosen(self, feature: Mapping[str, Any]) -> str:
        ids = [token for token in feature["chosen_labels"] if token != IGNORE_INDEX]
        return token_offsets(self.tokenizer, ids)[0]


class AspoLlamaFactoryTrainer(dpo.CustomDPOTrainer):
    """LLaMA-Factory's CustomDPOTrainer with one of our objectives in `get_batch_loss_metrics`."""

    settings: Settings  # set by `install`
    scored: ScoredRows | None = None

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any = None, **kwargs: Any) -> None:
        refuse(finetuning_args, IGNORED)
        tokenizer = kwargs.get("tokenizer") or kwargs.get("processing_class")
        kwargs["data_collator"] = _Collator(kwargs["data_collator"], tokenizer, self.scored)
        super().__init__(model, ref_model, finetuning_args, processor, **kwargs)

    def get_batch_loss_metrics(
        self, model: Any, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean of the pairs' losses, and its metrics."""
        device = batch["labels"].device
        layout, similarity = batch[BATCH_KEY]
        layout, similarity = layout.to(device), None if similarity is None else similarity.to(device)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", BATCH_KEY)}
        with self.accelerator.autocast():
            ref_logps = self._reference_logps(inputs, layout) if self.settings.objective.needs_reference else None
            policy = self.accelerator.unwrap_model(model)
            logps = labelled_logps(model, policy, inputs, layout, self.settings.backend)
        loss, metrics = self.settings.loss(layout, logps, ref_logps, similarity, None, self.beta)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value for name, value in metrics.items()}

    def _reference_logps(self, inputs: Mapping[str, Any], layout: Any) -> Tensor:
        reference = self.model if self.ref_model is None else self.ref_model
        unwrapped = self.accelerator.unwrap_model(reference)
        with torch.no_grad(), unwrapped.disable_adapter() if self.ref_model is None else contextlib.nullcontext():
            return labelled_logps(reference, unwrapped, inputs, layout, self.settings.backend)


def install(
    objective: str | Mapping[str, float] = "aspo",
    *,
    scored_rows: Iterable[Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Make `stage: dpo` train `objective` (a name, or names with weights) with its options; beta is `pref_beta`.

    scored_rows: rows with chosen_sentences and chosen_similarity; None = sentences are cut here, without similarity.
    Raises ValueError for an option that the objective does not take, or where it needs similarities.
    """
    AspoLlamaFactoryTrainer.settings = Settings.make(objective, **options)
    if scored_rows is None and AspoLlamaFactoryTrainer.settings.needs_similarity:
        raise ValueError("alpha is above 0, but there are no scored_rows: run `aspo score`, or set alpha=0 (ASPO-P)")
    AspoLlamaFactoryTrainer.scored = None if scored_rows is None else ScoredRows(scored_rows)
    dpo.CustomDPOTrainer = AspoLlamaFactoryTrainer
