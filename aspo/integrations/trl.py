"""AspoDPOTrainer: TRL's DPOTrainer with our loss, our collator and our columns; everything else is TRL's.

TRL's `compute_loss` calls `_compute_loss`, which is replaced. The forward still goes through the wrapped model (DDP,
autocast): the model's own forward gets one more mode, as TRL's fused head does. Axes: B pairs, N counted tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt
from trl.trainer.utils import use_adapter

from aspo.data import Collator
from aspo.integrations.common import forward_runs, refuse
from aspo.meters import Meters, record
from aspo.model import check_head, inference, output_head
from aspo.objective_options import ObjectiveOptions
from aspo.policy import MERGE
from aspo.shared_prefix.attention import with_route
from aspo.shared_prefix.exact import settle_sharing
from aspo.shared_prefix.forward import PairForward, mean_pair_tokens, objective_inputs, tree_inputs
from aspo.start import (
    autocast_dtype,
    check_columns,
    check_roles,
    every_dataset,
    first_rows,
    length_target,
    needs_similarity,
)
from aspo.validate import validate_rows
from aspo.vision.tower import VisionFeatures
from aspo_kernels import objectives

NO_OBJECTIVE = "no objective of ours takes it; train with trl.DPOTrainer"
IGNORED = {  # option of TRL's or transformers' -> its harmless value, and what to do instead of another one
    "precompute_ref_log_probs": (
        False,
        "TRL's cache has neither images nor sentences; give the rows per-token ref_chosen_logps and "
        "ref_rejected_logps, or train with aspo.trainer.AspoTrainer",
    ),
    "precompute_ref_batch_size": (None, "nothing is computed ahead"),
    "pad_to_multiple_of": (None, "batches are as wide as their longest row"),
    "truncation_mode": ("keep_start", "only the end of a response is ever cut"),
    "ld_alpha": (None, NO_OBJECTIVE),
    "f_divergence_type": ("reverse_kl", NO_OBJECTIVE),
    "f_alpha_divergence_coef": (0.5, NO_OBJECTIVE),
    "discopop_tau": (0.05, NO_OBJECTIVE),
    "use_weighting": (False, "weigh pairs by a column sample_weight, or train with trl.DPOTrainer"),
    "router_aux_loss_coef": (0.0, "the router's loss of a mixture of experts is not added; set it to 0"),
    "label_smoothing_factor": (0.0, "it smooths a token loss that is never computed; for dpo use label_smoothing"),
    "parallelism_config": (None, "a batch must not be cut over processes by tokens"),
    "torch_compile": (
        False,
        "the loss runs the model's trunk, which stays as it is; compile that yourself",
    ),
}
REFUSED_COLUMNS = ("tools", "chat_template_kwargs")
COLUMNS = (
    *("prompt", "chosen", "rejected", "image", "images", "rejected_images", "chosen_images", "negative_images"),
    *("chosen_sentences", "rejected_sentences", "chosen_similarity", "sample_weight", "id"),
    *("ref_chosen_logps", "ref_rejected_logps", "rejected_similarity", "negative_log_q", "unfinished"),
    *("chosen_sentence_weights", "rejected_sentence_weights", "chosen_token_scores", "rejected_token_scores"),
    "chosen_alternative_ids",
)


@dataclass
class AspoDPOConfig(ObjectiveOptions, DPOConfig):  # type: ignore[misc]  # beta may be None: the objective's own
    """TRL's DPOConfig with the options of our objectives.

    loss_type names objectives of `aspo_kernels.objectives` ("sigmoid" is our "dpo"). An option that is None has its
    objective's own default. Raises ValueError for an option that the objective does not take or the loss would ignore.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective_kwargs"]  # noqa: RUF012  the base's spelling

    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        self.loss_type = ["dpo" if name == "sigmoid" else name for name in self.loss_type]
        for name in self.loss_type:
            if name not in objectives.names():
                raise ValueError(
                    f"loss_type {name!r} is no objective of ours ({', '.join(objectives.names())}): train with "
                    "trl.DPOTrainer, or write it with aspo_kernels.objectives.register"
                )
        super().__post_init__()
        refuse(self, IGNORED)
        self.check_choices()
        self.settle_objective()
        objective = self.objective()
        if "desirable" in objective.reads:
            raise ValueError("kto reads unpaired rows, which a DPOTrainer has not: use aspo.trainer.AspoTrainer")
        if length_target(objective, self.objective_options()) == "dataset":
            raise ValueError("target='dataset' is AspoTrainer's: use target 'batch' or 'pair' here")


class AspoDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer`, with an `AspoDPOConfig`; the arguments are TRL's.

    Rows are TRL's, with the optional columns of docs/data.md (chosen_sentences, chosen_similarity, sample_weight, ...).
    Prompt and image are computed once for both responses where that is exact, each image once a step (`shared_prefix`,
    `vision_cache`). The loss of a micro-batch is the mean over its pairs of sample_weight * loss; micro-batches are
    averaged, as TRL does. Not logged: entropy, mean_token_accuracy, logits/*, which would need the head once more.

    Raises ValueError for what TRL's trainer can do and this one cannot: compute_metrics, `predict`, a collator of
    another kind, prompt learning, tools, the router's loss of a mixture of experts, DeepSpeed, FSDP.
    """

    _tag_names = ["trl", "dpo", "aspo"]  # noqa: RUF012  the base's spelling
    args: AspoDPOConfig
    model: Any
    ref_model: Any

    def __init__(self, model: Any, ref_model: Any = None, args: AspoDPOConfig | None = None, **kwargs: Any) -> None:
        args = AspoDPOConfig() if args is None else args
        if not isinstance(args, AspoDPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; AspoDPOTrainer takes an AspoDPOConfig")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics wants logits, which are never built; evaluate with `aspo eval`")
        collator = kwargs.pop("data_collator", None)
        if collator is not None and not isinstance(collator, Collator):
            raise ValueError(
                f"data_collator is a {type(collator).__name__}; only an aspo.data.Collator makes our batch"
            )
        self.objective: objectives.Objective = args.objective()
        self.objective_options = args.objective_options()
        self._needs_similarity = needs_similarity(self.objective_options)
        self._pair_tokens: float | None = None
        packed, args.padding_free = args.padding_free, False  # TRL has none, and would say that there is none
        super().__init__(model, ref_model, args, **kwargs)
        args.padding_free = packed
        self._refuse_unsupported()
        for dataset in every_dataset(self.train_dataset, self.eval_dataset):
            self._check_rows(dataset)
        self.data_collator = collator or Collator(self.processing_class, args.max_length)
        self._head_checked = False
        self._settle_step()

    def _refuse_unsupported(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("DeepSpeed and FSDP are not supported so far: use one process, or several with DDP")
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel) and policy.active_peft_config.is_prompt_learning:
            raise ValueError(f"{policy.peft_type} puts tokens in front of the prompt, which is not supported: use LoRA")
        if self.aux_loss_enabled:
            raise ValueError("the model adds its router's loss, which is not supported: set router_aux_loss_coef to 0")
        output_head(policy)

    def _settle_step(self) -> None:
        """Share prefixes and pack rows where the first rows show that the model takes it; look once at each image."""
        collator: Any = self.data_collator
        train: Any = self.train_dataset
        options: Any = self.args  # settle_sharing reads what both configurations have
        first = first_rows([train])
        self.route = settle_sharing(self.model, collator, first, options, autocast_dtype(self.accelerator))
        if self.ref_model is not None and collator.makes_trees:
            with_route(self.accelerator.unwrap_model(self.ref_model), self.route)
        folder = os.path.join(str(self.args.output_dir), "vision_cache") if self.args.vision_cache == "disk" else None
        self.vision = VisionFeatures([self.model, self.ref_model], self.args.vision_cache, folder)

    # ---- rows ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows stay text: the collator makes tokens of them, with the sentence of each."""
        if "prompt" not in next(iter(dataset)):
            extra = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            dataset = dataset.map(extract_prompt, **extra)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(COLUMNS)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._check_rows(dataset)
        return super()._remove_unused_columns(dataset, description)

    def _check_rows(self, dataset: Any) -> None:
        """ValueError where the first row has what would be ignored, or lacks what is needed."""
        row = next(iter(dataset))
        for column in REFUSED_COLUMNS:
            if row.get(column):
                raise ValueError(f"column {column!r} would change the prompt, which is not supported: drop it")
        validate_rows([row])
        check_columns(self.args.loss_type, self.objective_options, [row])
        self._require_similarity(row.get("chosen_similarity"))

    def _require_similarity(self, similarity: Any) -> None:
        if similarity is None and self._needs_similarity:
            raise ValueError(
                f"alpha is {self.objective_options['alpha']}, but the rows have no chosen_similarity: run `aspo score` "
                "on them, or set alpha to 0 (perplexity alone, ASPO-P)"
            )

    # ---- the loss ----

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool) -> Tensor:
        """mean over pairs of sample_weight * objective; DPO's is -log sigmoid(beta (h(y_c) - h(y_r)))."""
        if return_outputs:
            raise ValueError("logits are never built, so there is nothing to predict or to compute_metrics from")
        inputs = {**inputs, "layout": inputs["layout"].to(self.accelerator.device)}
        self._require_similarity(inputs["similarity"])
        check_roles(self.args.loss_type, self.objective, inputs["layout"])
        policy = self.accelerator.unwrap_model(self.model)
        self._check_head(policy, inputs)
        forward = PairForward(
            policy,
            None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model),
            self.route,
            self.objective.difference_only,
            self.args.kernel_backend,
            self.vision,
        )
        with self.accelerator.autocast():
            inputs = self._with_reference(forward, inputs)
            reads = self.objective.reads
            with forward_runs(policy, lambda **_: forward.numbers(inputs, self.objective.needs_reference, reads)):
                numbers = model()
        tokens = self._pair_tokens if self.model.training else None
        given = objective_inputs(inputs, numbers, self.args.kernel_backend, reads, tokens)
        result = self.objective(given, **self.objective_options)
        self._record(given, result, inputs)
        losses = result.losses
        if inputs["sample_weight"] is not None:
            losses = losses * inputs["sample_weight"].to(losses.dtype)
        return losses.mean()

    def _with_reference(self, forward: PairForward, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """With ref_logps where training goes on from an adapter: the reference is TRL's copy of it, named "ref"."""
        policy: Any = forward.policy
        copied = self.ref_model is None and "ref" in policy.peft_config
        if not copied or not self.objective.needs_reference or inputs["ref_logps"] is not None:
            return inputs
        if "token_kl" in self.objective.reads:
            raise ValueError(
                f"{self.objective.name} reads the reference's whole distribution at each token, and training goes on "
                f"from an adapter here, whose copy gives log-probabilities alone: {MERGE}"
            )
        with inference(policy), use_adapter(policy, "ref"):
            return {**inputs, "ref_logps": forward.logps(inputs, with_reference=False)[0]}

    def _check_head(self, policy: Any, inputs: Mapping[str, Any]) -> None:
        """Once: hidden states times head are the model's own logits."""
        if not self._head_checked:
            with inference(policy), self.accelerator.autocast():
                check_head(policy, tree_inputs(policy, inputs["model_inputs"], inputs["tree"], self.route))
            self._head_checked = True

    @torch.no_grad()
    def _record(self, given: objectives.Inputs, result: objectives.Result, inputs: Mapping[str, Any]) -> None:
        """Add the batch's metrics to TRL's, each the mean over processes."""
        mode = "train" if self.model.training else "eval"
        meters = Meters()
        record(meters, given, result)
        means = meters.drain()
        values = torch.tensor(list(means.values()), device=self.accelerator.device)
        for name, value in zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True):
            self._metrics[mode][name].append(value)
        if mode == "train":
            tokens = torch.tensor(inputs["tree"].num_unshared_tokens, device=self.accelerator.device)
            self._total_train_tokens += int(self.accelerator.reduce(tokens, "sum"))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if length_target(self.objective, self.objective_options) == "batch" and batch_samples:
            self._pair_tokens = mean_pair_tokens(batch_samples, self.accelerator)
        return super()._get_num_items_in_batch(batch_samples, device)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Trainer's estimate, from the model's own inputs."""
        return super().floating_point_ops(inputs["model_inputs"])

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        super()._track_num_input_tokens(inputs["model_inputs"])
