"""The options of a training run: transformers' TrainingArguments plus ours.

Names are those of TRL's DPOConfig where the meaning is the same. An option that the run would not use is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from aspo.model import parse_dtype
from aspo.objective_options import ObjectiveOptions

# None in the dataclass means "not given"; __post_init__ fills in what the run uses and refuses the rest.
LORA_DEFAULTS: dict[str, Any] = {
    **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "use_dora": False, "lora_target_modules": None}
}
TRL_NAMES = {"sigmoid": "dpo"}  # TRL's name of a loss -> ours

# Option of transformers' Trainer -> why it is refused. Falsy values are fine.
UNSUPPORTED = {
    "remove_unused_columns": "the collator reads columns that the model does not take; leave it off",
    "torch_compile": "the loss runs the model's trunk, which Trainer would not compile; compile the model yourself",
    "label_smoothing_factor": "it smooths a token loss that is never computed; for DPO use label_smoothing",
    "label_names": "the collator fixes what the loss reads",
    "bf16_full_eval": "it would convert the policy but not its reference; use bf16",
    "fp16_full_eval": "it would convert the policy but not its reference; use fp16",
    "include_for_metrics": "evaluation takes no compute_metrics; the loss and rewards are logged without",
    "batch_eval_metrics": "evaluation takes no compute_metrics; the loss and rewards are logged without",
    "logging_nan_inf_filter": "a loss that is not finite ends the run; leave it off",
    "parallelism_config": "the trainer is parallel over pairs; a sequence or a vocabulary is cut by the functions of "
    "docs/parallel.md",
}


# Options that count something of which a step needs one at least.
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Option of transformers' Trainer -> why it is refused together with token_budget.
WITHOUT_BUDGET = {
    "train_sampling_strategy": "it groups rows by itself; use random or sequential",
    "dataloader_drop_last": "its batches have no set size, so none is incomplete",
    "auto_find_batch_size": "it would try the same batches again; lower token_budget",
}


@dataclass
class AspoConfig(ObjectiveOptions, TrainingArguments):
    """Options of `AspoTrainer` and `aspo train`; docs/training.md describes them all.

    Raises ValueError for an option that the objective does not take, that the run would ignore, or that is not
    supported.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "objective_kwargs"]  # noqa: RUF012  the base's spelling

    # Model
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the start model; 'world' = embedded."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights' type: float32, bfloat16, float16 or auto (as saved). Default: bfloat16 for LoRA on an "
            "accelerator, float32 otherwise."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: sdpa, eager, flash_attention_2."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the frozen weights in 4 bits (QLoRA; needs CUDA and bitsandbytes)."}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Keep the vision tower as it is in full fine-tuning."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn the model's dropout off."})

    # Data
    train_data: str | None = field(
        default=None, metadata={"help": "Preference rows: folder, .jsonl, .json, .parquet, or saved dataset."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Rows for the loss and rewards during training (with --eval_strategy)."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Where relative image paths start. Default: the folder of the data."}
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Most tokens of a row; only the response is ever cut."}
    )

    # The step and the objective (others in ObjectiveOptions)
    padding_free: bool = field(default=False, metadata={"help": "Put a batch's pairs into one row, without padding."})
    token_budget: int | None = field(
        default=None,
        metadata={"help": "Batches of as many pairs as fit into this many tokens, instead of a fixed number of pairs."},
    )
    forward_tokens: int | None = field(
        default=None,
        metadata={
            "help": "At most so many tokens in one forward pass: what a pair has more (many negative images, long "
            "answers) is run in parts, and each again in the backward; the gradient is the same."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Where they are kept; `aspo reference` fills it ahead. Default: output_dir/reference."},
    )
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Modules or .py files to import first, e.g. your objective."}
    )

    # LoRA
    use_lora: bool = field(
        default=True, metadata={"help": "Train LoRA adapters; the reference is the model without them."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank. Default: 16."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale: the update is multiplied by lora_alpha / lora_r. Default: 32."}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapters. Default: 0."})
    use_dora: bool | None = field(
        default=None, metadata={"help": "Weight-decomposed LoRA: magnitude and direction apart. Default: off."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers of the language model, e.g. q_proj v_proj, or one regular expression over full module "
            "names. Default: all its linear layers."
        },
    )

    # Trainer options with other defaults than transformers'
    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate of AdamW; full fine-tuning wants about 1e-6."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Pairs in one forward pass."})
    per_device_eval_batch_size: int = field(default=2, metadata={"help": "Pairs in one forward pass of an evaluation."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule: cosine, linear, constant, ..."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two lines of metrics (below 1: share of the run)."}
    )
    save_steps: float = field(
        default=100, metadata={"help": "Steps between two checkpoints (below 1: share of the run)."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    resume_from_checkpoint: str | None = field(
        default="auto",
        metadata={"help": "auto = go on from output_dir's last complete checkpoint, if any; or a checkpoint's folder."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads all columns."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf losses out of the log."})

    def __post_init__(self) -> None:
        for plugin in self.plugins or ():
            import_plugin(plugin)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.loss_type = [TRL_NAMES.get(name, name) for name in self.loss_type]
        if self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):  # else transformers leaves the timeout out
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        if self.fp16 and self.bf16:
            on_cpu = "" if self.use_cpu or torch.accelerator.is_available() else ", and without a GPU add --use_cpu"
            raise ValueError(f"fp16 and bf16 are both on: choose one{on_cpu}")
        try:
            super().__post_init__()
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            raise ValueError("bf16 is on, but there is no GPU that computes in it: on a CPU add --use_cpu") from error
        self.dataloader_pin_memory &= torch.accelerator.is_available() and not self.use_cpu  # else torch warns
        if self.use_liger_kernel:  # for the body alone: its loss would be another one, and is never run
            self.liger_kernel_config = {"fused_linear_cross_entropy": False, **(self.liger_kernel_config or {})}
        self._refuse_unsupported()
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches:
            raise ValueError("accelerator_config.dispatch_batches is on, but every process reads its rows: turn it off")
        accelerator.dispatch_batches = False  # accelerate would cut every tensor of a stream's batch along dim 0
        if accelerator.split_batches:
            raise ValueError("accelerator_config.split_batches is on: give the pairs of one process instead")
        if self.ddp_find_unused_parameters is None and self.use_lora:
            self.ddp_find_unused_parameters = False  # adapters are in the language model, which every batch runs
        accelerator.even_batches = False  # it repeats rows; `aspo.even_batches` deals the last ones out
        self.settle_objective()
        self._settle_lora()

    def _refuse_unsupported(self) -> None:
        wrong = [f"{name} is {getattr(self, name)}" for name in COUNTS if getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}; the least is 1")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs:g}; it must be positive, or max_steps")
        for name, why in UNSUPPORTED.items():
            value = getattr(self, name, None)
            if value:
                raise ValueError(f"{name}={value!r} is not supported: {why}")
        if self.n_gpu > 1:
            raise ValueError(
                f"one process has {self.n_gpu} devices: start one for each (accelerate launch, torchrun), or set "
                "CUDA_VISIBLE_DEVICES to name one"
            )
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                "fsdp divides a model among processes, and this is one alone: start several, with "
                "accelerate launch --config_file configs/accelerate/fsdp2.yaml -m aspo train ..., and leave --fsdp out"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError("train_sampling_strategy=batch_rebalance is not supported: use token_budget")
        if self.token_budget is not None:
            for name, why in WITHOUT_BUDGET.items():
                if getattr(self, name) in (True, "group_by_length"):
                    raise ValueError(f"{name}={getattr(self, name)!r} does not go with token_budget: {why}")
        parse_dtype(self.dtype)
        self.check_choices()
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}; it must be positive, or null for a number of pairs")
        if self.forward_tokens is not None and self.forward_tokens < 1:
            raise ValueError(f"forward_tokens is {self.forward_tokens}; it must be positive, or null for no limit")
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError("reference_cache is given, but precompute_ref_log_probs is off: turn it on, or drop it")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be positive, or null for no limit")

    def _settle_lora(self) -> None:
        given = [name for name in LORA_DEFAULTS if getattr(self, name) is not None]
        if not self.use_lora:
            if given:
                raise ValueError(f"{', '.join(given)} given, but use_lora is off; drop them or turn use_lora on")
            if self.load_in_4bit:
                raise ValueError("load_in_4bit keeps the weights frozen, but use_lora is off: turn use_lora on")
            return
        for name, default in LORA_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; the least rank is 1")
        if self.lora_dropout and self.disable_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} has no effect with disable_dropout; pass one of the two"
            )
        if not self.freeze_vision:
            raise ValueError(
                "freeze_vision is off, but with LoRA only the adapters train; turn use_lora off, or keep it"
            )

    def weights_dtype(self) -> str:
        """What `dtype` means where it is not given: full fine-tuning needs fp32 weights, or small updates vanish."""
        if self.dtype is not None:
            return self.dtype
        on_accelerator = torch.accelerator.is_available() and not self.use_cpu
        return "bfloat16" if self.use_lora and on_accelerator else "float32"


def import_plugin(plugin: str) -> None:
    """Import a module by name or a Python file by path, once."""
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise ValueError(f"plugin {plugin!r} cannot be imported ({error}); a file's name ends in .py") from error
        return
    path = Path(plugin).resolve()
    if not path.is_file():
        raise ValueError(f"plugin {plugin} is not there")
    if str(path) in _imported:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    _imported.add(str(path))


_imported: set[str] = set()
