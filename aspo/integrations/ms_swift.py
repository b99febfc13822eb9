"""ms-swift: `swift rlhf --rlhf_type dpo --external_plugins my_plugin.py`, where my_plugin.py calls `register`.

    from aspo.integrations import ms_swift
    ms_swift.register("aspo", alpha=0.5)

The rows' columns chosen_sentences, chosen_similarity and sample_weight reach the loss with
`--remove_unused_columns false`. Tokens, template, images, reference, LoRA and the loop are ms-swift's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

if __name__.startswith("_swift_external_"):  # its folder is on sys.path now, where our trl.py would hide TRL
    raise ImportError(
        "do not pass this file itself: --external_plugins takes a file of your own with the lines `from "
        "aspo.integrations import ms_swift` and `ms_swift.register(...)`, see examples/ms_swift_plugin.py"
    )

from swift.rlhf_trainers import DPOTrainer
from swift.trainers.trainer_factory import TrainerFactory

from aspo.integrations.common import Settings, labelled_logps, refuse
from aspo.integrations.labelled import Scored, labelled_layout

COLUMNS = ("chosen_sentences", "chosen_similarity", "sample_weight")
IGNORED = {
    "loss_type": (["sigmoid"], "name the objective in register(...)"),
    "loss_weights": (None, "give weights to register({name: weight, ...})"),
    "label_smoothing": (0, "give it to register('dpo', label_smoothing=...)"),
    "rpo_alpha": (None, "register({'dpo': 1.0, 'sft': rpo_alpha})"),
    "ld_alpha": (None, "no objective of ours takes it"),
    "f_divergence_type": ("reverse_kl", "no objective of ours takes it"),
    "reference_free": (False, "use an objective without a reference, e.g. register('simpo')"),
    "use_weighting": (False, "weigh pairs by a column sample_weight"),
    "discopop_tau": (0.05, "no objective of ours takes it"),
}
IGNORED_BY_TEMPLATE = {
    "packing": (False, "train with aspo.trainer.AspoTrainer and padding_free"),
    "padding_free": (False, "train with aspo.trainer.AspoTrainer and padding_free"),
    "sequence_parallel_size": (1, "a row must not be cut over processes"),
}


class AspoSwiftTrainer(DPOTrainer):
    """ms-swift's DPOTrainer with one of our objectives in `get_batch_loss_metrics`."""

    settings: Settings  # set by `register`

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        refuse(kwargs["args"], IGNORED)
        refuse(kwargs["template"], IGNORED_BY_TEMPLATE)
        super().__init__(model, ref_model, *args, **kwargs)
        if self.is_encoder_decoder or self.aux_loss_enabled:
            raise ValueError("encoder-decoders and a mixture of experts' router loss are not supported")

    def get_batch_loss_metrics(
        self, model: Any, batch: Mapping[str, Any], train_eval: str = "train", pair_loss_scale: Any = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs of sample_weight * loss, and its metrics."""
        if pair_loss_scale is not None or "loss_scale" in batch:
            raise ValueError("packing and loss_scale would be ignored: leave them out")
        inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in COLUMNS}
        labels = inputs.pop("labels")
        inputs.pop("text_position_ids", None)
        layout, similarity = labelled_layout(labels.cpu(), self.tokenizer, _scored(batch, len(labels) // 2))
        layout = layout.to(labels.device)
        weight = batch.get("sample_weight")
        weight = None if weight is None else torch.as_tensor(weight, device=labels.device, dtype=torch.float32)
        similarity = None if similarity is None else similarity.to(labels.device)
        with self.accelerator.autocast():
            ref_logps = self._reference_logps(inputs, layout) if self.settings.objective.needs_reference else None
            policy = self.accelerator.unwrap_model(model)
            logps = labelled_logps(model, policy, inputs, layout, self.settings.backend)
        loss, metrics = self.settings.loss(layout, logps, ref_logps, similarity, weight, self.beta)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value for name, value in metrics.items()}

    def _reference_logps(self, inputs: Mapping[str, Any], layout: Any) -> Tensor:
        reference = self.model if self.ref_model is None else self.ref_model
        own = self.null_ref_context() if self.ref_model is None else contextlib.nullcontext()
        with torch.no_grad(), own:
            unwrapped = self.accelerator.unwrap_model(reference)
            return labelled_logps(reference, unwrapped, inputs, layout, self.settings.backend)


def _scored(batch: Mapping[str, Any], pairs: int) -> list[Scored | None]:
    """The chosen rows' sentences, where the batch has the columns."""
    spans, values = batch.get("chosen_sentences"), batch.get("chosen_similarity")
    if spans is None:
        if values is not None:
            raise ValueError("the rows have chosen_similarity without the chosen_sentences that it belongs to")
        return [None] * pairs
    return [Scored([tuple(s) for s in spans[i]], None if values is None else list(values[i])) for i in range(pairs)]


def register(objective: str | Mapping[str, float] = "aspo", **options: Any) -> None:
    """Make `--rlhf_type dpo` train `objective` (a name, or names with weights) with its options; beta is `--beta`.

    Raises ValueError for an option that the objective does not take.
    """
    AspoSwiftTrainer.settings = Settings.make(objective, **options)
    TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.{AspoSwiftTrainer.__name__}"
