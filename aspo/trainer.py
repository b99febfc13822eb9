"""AspoTrainer: transformers.Trainer with a preference loss taken from hidden states, so that no logits are built.

Axes: B pairs, R = 2B rows of a batch, T padded length, H hidden size, N counted tokens.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from aspo.checkpoints import WholeCheckpoints, being_read
from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.even_batches import PLACEHOLDER
from aspo.finite import FiniteLosses
from aspo.meters import FallingRewards, Meters, record
from aspo.model import base_model, check_head, inference, load_model, output_head
from aspo.packing import TokenBatches
from aspo.policy import MERGE, check_attention, check_liger, disable_dropout, load_weights, policy_and_reference
from aspo.processes import inside, summed, summed_tensor
from aspo.reference.fill import cached_reference, settings_for
from aspo.resume import SaveHistory
from aspo.sharded import check_images_alike, check_sharding, is_sharded, prepare_reference, with_even_parts
from aspo.shared_prefix.forward import PairForward, mean_pair_tokens, objective_inputs, parts_of, tree_inputs
from aspo.start import (
    autocast_dtype,
    check_columns,
    check_roles,
    check_start,
    check_unpaired,
    dataset_pair_tokens,
    every_dataset,
    length_target,
    needs_similarity,
    response_columns,
    settle_batches,
)
from aspo.vision.tower import VisionFeatures
from aspo_kernels import objectives


class AspoTrainer(WholeCheckpoints, TokenBatches):
    """Preference training of a (vision-)language model; the objective, LoRA and the rest come from `args`.

    Args:
        model: a transformers model, a PeftModel with a fresh LoRA adapter, or a name for `aspo.model.load_model`.
        args: the options.
        train_dataset, eval_dataset: rows as `aspo.data` describes them (a datasets.Dataset or any sequence of dicts).
        processing_class: the model's processor, or its tokenizer where it reads text only.
        data_collator: other than `aspo.data.Collator(processing_class, args.max_length)`. What a Collator shares and
            packs is set by args, on a copy: yours stays as it is.
        ref_model: a reference of your own. Default: the base model with the adapter off (LoRA), or a frozen copy of
            the model as it is given here (full fine-tuning).

    The loss of an optimiser step is the mean over its pairs of sample_weight * loss, however they are cut into
    micro-batches. Raises ValueError for what is not supported, see `AspoConfig`.
    """

    args: AspoConfig
    model: Any
    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole accumulation window

    def __init__(
        self,
        model: nn.Module | str,
        args: AspoConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        ref_model: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, AspoConfig):
            raise ValueError(f"args is a {type(args).__name__}; AspoTrainer takes an AspoConfig")
        if isinstance(model, str):
            options: dict[str, Any] = {"load_in_4bit": args.load_in_4bit}
            options["attn_implementation"] = args.attn_implementation
            model, processor = load_model(model, args.weights_dtype(), **options)
            processing_class = processing_class or processor
        if processing_class is None and data_collator is None:
            raise ValueError("processing_class is missing: pass the model's processor (or tokenizer)")
        if len(set(getattr(base_model(model), "hf_device_map", None) or {"": 0}.values())) > 1:
            raise ValueError("the model is spread over several devices, which is not supported yet; load it on one")
        self.objective: objectives.Objective = args.objective()
        self.objective_options = args.objective_options()
        self._needs_similarity = needs_similarity(self.objective_options)
        self._check_datasets(args, train_dataset, eval_dataset)

        self._starts_at_reference = ref_model is None and not isinstance(model, PeftModel)
        set_seed(args.seed)  # the adapter's random start
        needs_copy = self.objective.needs_reference and not args.precompute_ref_log_probs
        model, self.ref_model = policy_and_reference(model, args, ref_model, needs_copy)
        output_head(model)  # refuses an adapter on the head before anything runs
        check_attention(model)
        if args.use_liger_kernel:
            check_liger(model, args.device)
        if args.disable_dropout:
            disable_dropout(model)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval()
        if isinstance(data_collator, Collator):
            data_collator = copy.copy(data_collator)  # what is set on it below is this trainer's own
        self._meters = {"train": Meters(), "eval": Meters()}
        self._falling = FallingRewards()
        self._finite = FiniteLosses()
        self._head_checked = self._start_checked = self._settled = False
        self._eval_loss = [0.0, 0.0]  # of this process: sum over pairs, pairs
        self._pair_tokens: float | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or Collator(processing_class, args.max_length, responses=response_columns(self.objective)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[SaveHistory(), *callbacks],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # before loss_is_scaled_for_ga, Trainer asked this
        check_sharding(self.accelerator, self.model, self.ref_model, self.objective, args)
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.accelerator, self.ref_model)
        self._target = length_target(self.objective, self.objective_options)
        if self._target == "dataset":
            self._pair_tokens = dataset_pair_tokens(self.data_collator, train_dataset)
        self._own_reference = ref_model is not None
        self._whole_settings = None
        self._goes_on = False
        if not is_sharded(self.accelerator):
            self._settle_step()
        elif args.precompute_ref_log_probs:  # the rest once the model is wrapped: before, no process can run it alone
            autocast, reference = autocast_dtype(self.accelerator), self._reference or self._policy
            self._whole_settings = settings_for(reference, self.data_collator, autocast)

    def _check_datasets(self, args: AspoConfig, train_dataset: Any, eval_dataset: Any) -> None:
        """ValueError where rows lack what the objective lives on, or would leave KTO alone with one."""
        if "desirable" in self.objective.reads:
            check_unpaired(args, train_dataset, eval_dataset)
        for dataset in every_dataset(train_dataset, eval_dataset):
            if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
                if not len(dataset):
                    continue
                self._require_similarity(dataset[0].get("chosen_similarity"))  # a stream's as it comes
            check_columns(args.loss_type, self.objective_options, dataset)

    def _settle_step(self) -> None:
        """Cache the reference, look once at each image, share and pack: what the options say and the model takes."""
        args, autocast = self.args, autocast_dtype(self.accelerator)
        datasets = every_dataset(self.train_dataset, self.eval_dataset)
        if args.precompute_ref_log_probs and self.objective.needs_reference:  # by the model as it is, its own attention
            self._precompute_reference(datasets)
        folder = os.path.join(str(args.output_dir), "vision_cache") if args.vision_cache == "disk" else None
        models = [self._policy, self._reference]
        self.vision = VisionFeatures(models, args.vision_cache, folder, is_sharded(self.accelerator))
        reference = (self._reference, self._own_reference)
        self.route = settle_batches(self._policy, reference, self.data_collator, datasets, args, autocast)
        if isinstance(self.data_collator, Collator):  # not before: what is shared is tried in one piece
            self.data_collator.forward_tokens = args.forward_tokens
        elif args.forward_tokens is not None:
            raise ValueError("forward_tokens needs aspo.data.Collator: leave data_collator out")
        self._settled = True

    def _precompute_reference(self, datasets: Sequence[Any]) -> None:
        """Fill the cache with what it lacks of all rows, check a sample, and let go of a reference of its own."""
        if not isinstance(self.data_collator, Collator):
            raise ValueError("precompute_ref_log_probs needs aspo.data.Collator: leave data_collator out")
        if isinstance(self.ref_model, PeftModel):  # the cache is of a model without its adapter
            raise ValueError(f"ref_model is an adapter, and precompute_ref_log_probs reads plain models: {MERGE}")
        folder = self.args.reference_cache or os.path.join(str(self.args.output_dir), "reference")
        self.data_collator.reference = cached_reference(
            folder,
            self._reference or self._policy,
            self.data_collator,
            datasets,
            autocast_dtype(self.accelerator),
            self.args.per_device_eval_batch_size,
            self._whole_settings,
            as_it_was=not (self._goes_on and self.ref_model is None and not isinstance(self._policy, PeftModel)),
        )
        self.ref_model = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's; a sharded model's step is settled here, where it is wrapped and no row is read yet.

        Each training begins here, also that of another batch size: what one before it left unlogged is dropped.
        """
        self._meters["train"], self._falling, self._finite = Meters(), FallingRewards(), FiniteLosses()
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._first_step = self.state.global_step
        self._goes_on = resume_from_checkpoint is not None  # with the checkpoint's weights, where they are in shards
        if not self._settled:
            settle = self._settle_step
            if self.ref_model is not None:
                settle = functools.partial(inside, self.ref_model, settle, inner=self._reference)
            inside(model, settle, inner=self._policy)
        return model, loader

    # ---- the loss ----

    @property
    def _policy(self) -> Any:
        """The model that trains, out of its wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)

    @property
    def _reference(self) -> Any:
        """The reference's own model, out of its wrappers; None = the policy without its adapter, or not needed."""
        return None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)

    def _require_similarity(self, similarity: Any) -> None:
        if similarity is None and self._needs_similarity:
            raise ValueError(
                f"alpha is {self.objective_options['alpha']}, but the rows have no chosen_similarity: run `aspo score` "
                "on them, or set alpha to 0 (perplexity alone, ASPO-P)"
            )

    def pair_losses(
        self, inputs: Mapping[str, Any], model: nn.Module | None = None
    ) -> tuple[objectives.Inputs, objectives.Result]:
        """The objective of a collated batch: what it read, and its losses (B,) with statistics.

        model: the policy as it is to be called, with its wrappers; None: `self.model`.
        """
        inputs = {**inputs, "layout": inputs["layout"].to(self.args.device)}
        self._require_similarity(inputs["similarity"])
        check_roles(self.args.loss_type, self.objective, inputs["layout"])
        policy = self._policy
        forward = PairForward(
            policy,
            self._reference,
            self.route,
            self.objective.difference_only,
            self.args.kernel_backend,
            self.vision,
            self.ref_model,
        )
        wanted = inputs, self.objective.needs_reference, self.objective.reads
        with self.accelerator.autocast():
            numbers = inside(model or self.model, lambda: forward.numbers(*wanted), inner=policy)
        tokens = self._pair_tokens if self.model.training or self._target == "dataset" else None
        given = objective_inputs(inputs, numbers, self.args.kernel_backend, self.objective.reads, tokens)
        return given, self.objective(given, **self.objective_options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """sum_pairs sample_weight * loss / (pairs of the accumulation window; this batch's where it is None)."""
        has_images = any("pixel" in name for part in parts_of(inputs) for name in part["model_inputs"])
        check_images_alike(self.accelerator, self._policy, has_images)
        if self.args.forward_tokens is not None and is_sharded(self.accelerator):
            inputs = with_even_parts(inputs, self.accelerator, self._policy)
        if not self._head_checked:
            self._check_head(model, inputs)
        given, result = self.pair_losses(inputs, model)
        training = self.model.training
        if training and not self._start_checked:
            self._check_start(given, result)
        losses = result.losses
        if inputs["sample_weight"] is not None:
            losses = losses * inputs["sample_weight"].to(losses.dtype)
        if inputs.get(PLACEHOLDER):
            losses = losses * 0.0
        else:
            record(self._meters["train" if training else "eval"], given, result)
        loss = losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
        if training:
            self._finite.note(self.state.global_step, inputs["ids"], loss)
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, {}) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's, which under DeepSpeed casts all floats to the model's type; right for the model's own inputs, but
        log-probabilities, similarities and weights stay fp32."""
        kept = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in kept})
        return others | {name: value.to(self.args.device) for name, value in kept.items()}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int | Tensor:
        """Pairs of the accumulation window, in all processes."""
        if self.accelerator.num_processes > 1 and any(PLACEHOLDER not in batch for batch in batch_samples):
            raise ValueError(
                "data_collator's batches lack 'placeholder' (True where one of their rows has it), which several "
                "processes need: leave data_collator out, or add it"
            )
        counted = [batch for batch in batch_samples if not batch.get(PLACEHOLDER)]
        if self._target == "batch":
            self._pair_tokens = mean_pair_tokens(counted, self.accelerator)
        pairs = sum(batch["layout"].num_items for batch in counted)
        return pairs if self.accelerator.num_processes == 1 else summed_tensor(torch.tensor(pairs), self.accelerator)

    # ---- checks of the first batch ----

    def _check_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        policy = self._policy
        with inference(policy), self.accelerator.autocast():
            tree = inputs.get("tree")
            own = inputs["model_inputs"]
            check_head(policy, own if tree is None else tree_inputs(policy, own, tree, self.route), model)
        self._head_checked = True

    def _check_start(self, inputs: objectives.Inputs, result: objectives.Result) -> None:
        self._start_checked = True
        if self.state.global_step > 0 or inputs.ref_logps is None:
            return
        deterministic = self.args.disable_dropout and self.args.neftune_noise_alpha is None
        equal = self._starts_at_reference and deterministic
        self.start_loss = check_start(self.objective, self.objective_options, inputs, result, equal)

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The mean loss of a batch; predictions would be logits, which are never built."""
        inputs = dict(self._prepare_inputs(dict(inputs)))
        layout: Any = inputs["layout"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        pairs = 0 if inputs.get(PLACEHOLDER) else layout.num_items
        self._eval_loss = [self._eval_loss[0] + float(loss) * pairs, self._eval_loss[1] + pairs]
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop; the loss and the metrics are means over pairs, whatever the last batch's size."""
        if not self._settled:
            raise ValueError("a sharded model (FSDP, DeepSpeed) is evaluated during training only: train it first")
        self._eval_loss = [0.0, 0.0]
        self._meters["eval"] = Meters()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._meters["eval"].drain().items()}
        total, pairs = summed({"loss": self._eval_loss})["loss"]
        if not pairs:  # the same sum in all processes
            raise ValueError("evaluation saw no pair: give more eval rows, or turn dataloader_drop_last off")
        loss = {f"{metric_key_prefix}_loss": total / pairs}
        if not self.is_in_train:  # else `train` does, with the training rows'
            self.vision.flush()
        return output._replace(metrics={**(output.metrics or {}), **loss, **metrics})

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the window's means added to a training line."""
        if "train_loss" in logs and self.state.global_step == self._first_step:
            return  # of no step: the run was at its end
        if "loss" in logs:
            self._finite.check()
            logs = {**logs, **self._meters["train"].drain()}
            # Single responses: a window may hold good ones only, and bad ones are meant to fall.
            if self.objective.needs_reference and "desirable" not in self.objective.reads:
                self._falling.look(logs)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Trainer's estimate, from the model's own inputs."""
        return sum(super(AspoTrainer, self).floating_point_ops(part["model_inputs"]) for part in parts_of(inputs))

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Trainer's count, of all parts at once: it sums over the processes, which may have other numbers of parts."""
        parts = [part["model_inputs"] for part in parts_of(inputs)]
        whole = {name: torch.cat([p[name].flatten() for p in parts]) for name in ("input_ids", "attention_mask")}
        super()._track_num_input_tokens(whole)

    # ---- checkpoints ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's train; resume_from_checkpoint=True goes on from the last *complete* checkpoint of output_dir."""
        try:
            done = super().train(*args, **kwargs)
            self._finite.check(p for p in self.model.parameters() if p.requires_grad)  # what came after the last log
            return done
        finally:
            if self._settled:
                self.vision.flush()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._finite.check(p for p in self.model.parameters() if p.requires_grad)
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with being_read(resume_from_checkpoint):
            if isinstance(self.model, PeftModel) or is_sharded(self.accelerator):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or is_sharded(self.accelerator):
            super()._load_best_model()
        else:
            load_weights(self.model, str(self.state.best_model_checkpoint))
