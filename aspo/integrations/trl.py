"""AspoDPOTrainer: TRL's DPOTrainer with our loss, our collator and our columns; everything else is TRL's.

TRL's `compute_loss` calls `_compute_loss`, which is replaced. The forward still goes through the wrapped model (DDP,
autocast): the model's own forward gets one more mode, as TRL's fused head does. Axes: B pairs, N counted tokens.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.meters import Meters, record
from aspo.model import base_model, check_head, inference, output_head, trunk_hidden
from aspo.validate import validate_rows
from aspo_kernels import SentenceLayout, gather_hidden, objectives

# TRL's or transformers' option -> why it is refused. Values that do nothing are fine.
UNSUPPORTED = {
    "precompute_ref_log_probs": "TRL's cache has neither images nor sentences; give the rows per-token "
    "ref_chosen_logps and ref_rejected_logps, or train with aspo.trainer.AspoTrainer",
    "precompute_ref_batch_size": "nothing is computed ahead; leave it out",
    "padding_free": "TRL ignores it; leave it off",
    "pad_to_multiple_of": "batches are as wide as their longest row; leave it out",
    "ld_alpha": "no objective of ours takes it; train with trl.DPOTrainer",
    "use_weighting": "WPO is no objective of ours; train with trl.DPOTrainer, or weigh pairs by a column sample_weight",
    "router_aux_loss_coef": "the router's loss of a mixture of experts is not added; set it to 0",
    "label_smoothing_factor": "it smooths a token loss that is never computed; for dpo use label_smoothing",
    "parallelism_config": "a batch must not be cut over processes by tokens; leave it out",
    "torch_compile": "the loss runs the model's trunk, which would not be compiled; compile the model yourself",
}
DEFAULTS = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05}
DEFAULTS["truncation_mode"] = "keep_start"
REFUSED_COLUMNS = ("tools", "chat_template_kwargs")
COLUMNS = (
    *("prompt", "chosen", "rejected", "image", "images", "rejected_images", "chosen_images", "negative_images"),
    *("chosen_sentences", "rejected_sentences", "chosen_similarity", "sample_weight", "id"),
    *("ref_chosen_logps", "ref_rejected_logps"),
)


@dataclass
class AspoDPOConfig(DPOConfig):
    """TRL's DPOConfig with the options of our objectives.

    loss_type names objectives of `aspo_kernels.objectives` ("sigmoid" is our "dpo"). An option that is None has its
    objective's own default. Raises ValueError for an option that the objective does not take or the loss would ignore.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective_kwargs"]  # noqa: RUF012  the base's spelling

    loss_type: list[str] = field(
        default_factory=lambda: ["aspo"],
        metadata={"help": "Objective(s): aspo, sigmoid (= dpo), ipo, hinge, simpo, sft, or registered ones."},
    )
    beta: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Reward scale: reward = beta * log-ratio. Default: 0.1 (simpo: 2)."}
    )
    label_smoothing: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "dpo: share of pairs taken to be swapped, [0, 0.5). Default: 0."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "aspo: share of similarity in a sentence's weight, [0, 1]. Default: 0.5."}
    )
    normalizer: str | None = field(
        default=None, metadata={"help": "aspo: R_c/R_c*, one of sentence, token, none, reward. Default: sentence."}
    )
    perplexity: str | None = field(
        default=None, metadata={"help": "aspo: whose perplexity, policy or reference. Default: policy."}
    )
    perplexity_scale: str | None = field(
        default=None, metadata={"help": "aspo: min-max over ppl or nll. Default: ppl."}
    )
    gamma: float | None = field(default=None, metadata={"help": "simpo: target margin. Default: 1."})
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of an objective of your own, as JSON."}
    )
    kernel_backend: str = field(
        default="auto", metadata={"help": "Loss kernels: auto, torch, triton, or reference (full logits, to compare)."}
    )

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
        for name, why in UNSUPPORTED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"{name}={value!r} is not supported: {why}")
        for name, default in DEFAULTS.items():
            if (value := getattr(self, name, default)) != default:
                raise ValueError(f"{name}={value!r} has no effect on these objectives: leave it at {default!r}")
        AspoConfig._settle_objective(self)  # type: ignore[arg-type]  # it reads no option but those above

    def objective(self) -> objectives.Objective:
        """The objective that `loss_type` and `loss_weights` name."""
        return AspoConfig.objective(self)  # type: ignore[arg-type]

    def objective_options(self) -> dict[str, Any]:
        """The keyword options to call the objective with."""
        return AspoConfig.objective_options(self)  # type: ignore[arg-type]


class AspoDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer`, with an `AspoDPOConfig`; the arguments are TRL's.

    Rows are TRL's, with the optional columns of docs/data.md (chosen_sentences, chosen_similarity, sample_weight, ...).
    The loss of a micro-batch is the mean over its pairs of sample_weight * loss; micro-batches are averaged, as TRL
    does. Not logged: entropy, mean_token_accuracy and logits/*, for which the head would have to be read again.

    Raises ValueError for what TRL's trainer can do and this one cannot: compute_metrics, `predict`, a collator of
    another kind, prompt learning, tools, the router's loss of a mixture of experts, DeepSpeed's ZeRO-3.
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
        self._needs_similarity = "aspo" in args.loss_type and self.objective_options["alpha"] > 0
        super().__init__(model, ref_model, args, **kwargs)
        self._refuse_unsupported()
        self.data_collator = collator or Collator(self.processing_class, args.max_length)
        for each in (self.model, self.ref_model):
            if each is not None:
                _add_logps_mode(base_model(self.accelerator.unwrap_model(each, keep_torch_compile=False)))
        self._head_checked = False
        for dataset in _datasets(self.train_dataset, self.eval_dataset):
            self._check_rows(dataset)

    def _refuse_unsupported(self) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel) and policy.active_peft_config.is_prompt_learning:
            raise ValueError(f"{policy.peft_type} puts tokens in front of the prompt, which is not supported: use LoRA")
        if self.aux_loss_enabled:
            raise ValueError("the model adds its router's loss, which is not supported: set router_aux_loss_coef to 0")
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("DeepSpeed's ZeRO-3 keeps the output head in parts, which is not supported: use ZeRO-2")
        if self.is_fsdp_enabled:
            raise ValueError("FSDP keeps the output head in parts, which is not supported: use DDP or ZeRO-2")
        output_head(policy)

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
        layout = inputs["layout"].to(self.accelerator.device)
        self._require_similarity(inputs["similarity"])
        if not inputs["tree"].is_plain:
            raise ValueError("the collator shares prefixes or packs rows: give it shared_prefix=padding_free=False")
        model_inputs = inputs["model_inputs"]
        self._check_head(model_inputs)
        with self.accelerator.autocast():
            ref_logps = self._reference_logps(inputs, layout) if self.objective.needs_reference else None
            logps = model(**model_inputs, layout=layout, kernel_backend=self.args.kernel_backend)
        given = objectives.Inputs(layout, logps, ref_logps, inputs["similarity"], self.args.kernel_backend)
        result = self.objective(given, **self.objective_options)
        self._record(given, result, inputs)
        losses = result.losses
        if inputs["sample_weight"] is not None:
            losses = losses * inputs["sample_weight"].to(losses.dtype)
        return losses.mean()

    def _reference_logps(self, inputs: Mapping[str, Any], layout: SentenceLayout) -> Tensor:
        """(N,) from the rows' own columns; else from ref_model, or from the policy's base as TRL does with PEFT."""
        if inputs["ref_logps"] is not None:
            return inputs["ref_logps"]
        policy = self.accelerator.unwrap_model(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            checkpointing: Any = self.args.gradient_checkpointing_kwargs
            stack.enter_context(disable_gradient_checkpointing(self.model, checkpointing))
            if self.ref_model is None:
                stack.enter_context(use_adapter(policy, "ref" if "ref" in policy.peft_config else None))
            model = self.model if self.ref_model is None else self.ref_model
            return model(**inputs["model_inputs"], layout=layout, kernel_backend=self.args.kernel_backend)

    def _check_head(self, model_inputs: Mapping[str, Any]) -> None:
        """Once: hidden states times head are the model's own logits."""
        if not self._head_checked:
            policy = self.accelerator.unwrap_model(self.model)
            with inference(policy), self.accelerator.autocast():
                check_head(policy, model_inputs)
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

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Trainer's estimate, from the model's own inputs."""
        return super().floating_point_ops(inputs["model_inputs"])

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        super()._track_num_input_tokens(inputs["model_inputs"])


def _datasets(train: Any, evaluation: Any) -> list[Any]:
    evaluation = list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation]
    return [dataset for dataset in (train, *evaluation) if dataset is not None]


def _add_logps_mode(model: Any) -> None:
    """`model(**inputs, layout=layout)` returns (N,) log-probabilities of the counted tokens, and builds no logits.

    In the forward of the model itself, because wrappers (DDP, autocast, PEFT) act on calls of it.
    """
    forward = model.forward

    @functools.wraps(forward)  # `generate` checks its arguments against the signature
    def with_logps(
        self: Any, *args: Any, layout: SentenceLayout | None = None, kernel_backend: str = "auto", **kwargs: Any
    ) -> Any:
        if layout is None:
            return forward(*args, **kwargs)
        hidden = gather_hidden(trunk_hidden(self, kwargs), layout)
        return output_head(self).logps(hidden, layout.targets, kernel_backend)

    model.forward = types.MethodType(with_logps, model)
