"""`aspo train`: options from YAML and flags, then a run that goes on where an earlier one was stopped."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch.distributed as dist
from torch import nn
from transformers import HfArgumentParser, ProgressCallback, TrainingArguments

from aspo.cli import did_you_mean
from aspo.config import LORA_DEFAULTS, AspoConfig
from aspo.data import load_rows, validate_rows
from aspo.meters import Progress
from aspo.model import load_model
from aspo.objective_options import OBJECTIVE_OPTIONS
from aspo.output_folder import check_room, held
from aspo.recipes.recipe import command_parser
from aspo.resume import Interrupt, write_json
from aspo.run_record import check_start, earlier_run, is_finished, now, record_path, run_record, start_settings
from aspo.shards import Processes
from aspo.trainer import AspoTrainer
from aspo.yaml_files import flag_values, read_yaml

DESCRIPTION = """Train a model on preference pairs.

  aspo train --model_name_or_path llava-hf/llava-1.5-7b-hf --train_data pairs/ --output_dir runs/aspo
  aspo train --config aspo.yaml --beta 0.2        flags win over the file's values

Rows have TRL's columns (prompt, chosen, rejected, images); `aspo score` adds the similarity that alpha > 0 uses.
output_dir gets checkpoints, the final adapter or model with its processor, run.json and log_history.json. The same
command run again goes on from the last complete checkpoint; Ctrl-C finishes the step, saves and stops."""
USAGE = "aspo train [--config FILE] --model_name_or_path MODEL --train_data ROWS --output_dir FOLDER [options]"
EPILOG = "All options of transformers' TrainingArguments are taken too (--help-all lists them)."
CHECKPOINTING = "activation_checkpointing"  # gradient_checkpointing in older transformers
GROUPS = {  # the options that --help shows, in this order; the others are in --help-all
    "model": (
        *("model_name_or_path", "dtype", "attn_implementation", "load_in_4bit", "freeze_vision", "disable_dropout"),
        "use_liger_kernel",
    ),
    "data": ("train_data", "eval_data", "image_root", "max_length"),
    "step": (
        *("shared_prefix", "prefix_attention", "padding_free", "token_budget", "vision_cache"),
        *("precompute_ref_log_probs", "reference_cache", "kernel_backend", "forward_tokens"),
    ),
    "objective": ("loss_type", "loss_weights", *OBJECTIVE_OPTIONS, "objective_kwargs", "plugins"),
    "LoRA": ("use_lora", *LORA_DEFAULTS),
    "training": (
        *("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
        *("bf16", CHECKPOINTING if hasattr(TrainingArguments, CHECKPOINTING) else "gradient_checkpointing", "seed"),
        *("use_cpu", "logging_steps", "report_to", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
        *("save_steps", "save_total_limit", "resume_from_checkpoint"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of AspoConfig; ours come first in --help, the rest only in --help-all."""
    parser.description, parser.epilog, parser.usage = DESCRIPTION, EPILOG, USAGE
    show_all = "--help-all" in sys.argv
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it")
    parser.add_argument("--help-all", action="help", help="show every option, transformers' too")
    hints = get_type_hints(AspoConfig)
    options = {option.name: option for option in dataclasses.fields(AspoConfig)}
    shown = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in options if name not in shown)
    for title, names in {**GROUPS, "transformers": rest}.items():
        group = parser.add_argument_group(title)
        for name in names:
            options[name].type = hints[name]
            before = len(parser._actions)
            HfArgumentParser._parse_dataclass_field(group, options[name])  # type: ignore[arg-type]
            for action in parser._actions[before:]:
                _tidy(action, hidden=name in rest and not show_all)


def _tidy(action: argparse.Action, hidden: bool) -> None:
    """Leave options that were not given out of the namespace; one spelling and the default in the help."""
    default = action.default
    action.default = argparse.SUPPRESS
    if hidden or action.option_strings[0].startswith("--no_"):
        action.help = argparse.SUPPRESS
        return
    text = (action.help or "").strip()
    if default not in (None, argparse.SUPPRESS, "", []):
        value = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
        text = f"{text} Default: {value}" + (f" (--no_{action.dest} turns it off)." if default is True else ".")
    action.help = text.replace("%%", "%").replace("%", "%%")
    action.option_strings = action.option_strings[:1]  # the spelling with dashes is understood, but not shown
    action.metavar = "VALUE"


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file's options. Raises ValueError naming a key that is no option."""
    options = read_yaml(path) or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{path} must hold `option: value` lines, not a {type(options).__name__}")
    known = [option.name for option in dataclasses.fields(AspoConfig)]
    for key in options:
        if key not in known:
            raise ValueError(f"{path}: unknown option {key!r}" + did_you_mean(str(key), known))
    return dict(options)


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line flags, so that a file's values are read as the flags' are (YAML reads 1e-5 as text)."""
    flags: list[str] = []
    for key, value in options.items():
        if value is not None:
            flags += [f"--{key}", *flag_values(key, value)]
    return flags


def parse_config(args: argparse.Namespace) -> AspoConfig:
    """The AspoConfig of parsed arguments, over those of --config."""
    given = {key: value for key, value in vars(args).items() if key != "config"}
    if getattr(args, "config", None):
        parser = command_parser("train")
        if not Path(args.config).is_file():
            raise ValueError(f"--config {args.config}: {'a folder' if Path(args.config).is_dir() else 'no such file'}")
        from_file = read_config(args.config)
        nulls = {key: None for key, value in from_file.items() if value is None}
        try:
            parsed = vars(parser.parse_args(as_flags(from_file)))
        except (argparse.ArgumentError, ValueError) as error:
            raise ValueError(f"{args.config}: {error}") from None
        given = {**nulls, **{key: value for key, value in parsed.items() if key != "config"}, **given}
    for key, what in (
        ("model_name_or_path", "the start model"),
        ("train_data", "the preference rows"),
        ("output_dir", "the folder for the results"),
    ):
        if not given.get(key):
            raise ValueError(f"--{key} is missing: {what}")
    hints = get_type_hints(AspoConfig)
    for key, value in given.items():
        if value is None and type(None) not in get_args(hints[key]):
            raise ValueError(f"--{key} is null: give it a value, or leave it out")
    try:
        return AspoConfig(**given)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:  # transformers' own, over values of ours
        raise ValueError(f"the options cannot be used together: {type(error).__name__}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; 0 when done. Raises KeyboardInterrupt when stopped by Ctrl-C, state saved."""
    train(parse_config(args))
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # gloo's threads may abort a process that ends without
    return 0


def train(config: AspoConfig) -> None:
    """Load, go on from where an earlier run in output_dir stopped, train, and save model, processor and run.json.

    A finished run is left alone. Raises ValueError on bad rows, where output_dir holds a run of other settings, and
    where another run is at work in it.
    """
    evaluates = config.eval_strategy != "no"
    if evaluates != bool(config.eval_data):
        given, missing = ("eval_strategy", "eval_data") if evaluates else ("eval_data", "eval_strategy")
        raise ValueError(f"--{given} is given, but --{missing} is not: give both or neither")
    kind = "unpaired" if "desirable" in config.objective().reads else "preference"
    rows = _load(config.train_data, kind, config.image_root)
    eval_rows = _load(config.eval_data, kind, config.image_root) if config.eval_data else None
    record = run_record(config, rows)
    if not is_finished(config, record):  # else nothing is written
        with held(str(config.output_dir)):
            if not is_finished(config, record):  # as the run that was waited for may be
                _train(config, rows, eval_rows, record)
                return
    if config.process_index == 0:
        print(f"{config.output_dir} is finished; choose another --output_dir to train again", file=sys.stderr)


def _train(config: AspoConfig, rows: Any, eval_rows: Any, record: dict[str, Any]) -> None:
    before, checkpoint = earlier_run(config, record)
    model, processor = load_model(
        config.model_name_or_path or "",
        config.weights_dtype(),
        attn_implementation=config.attn_implementation,
        load_in_4bit=config.load_in_4bit,
    )
    record["start"] = start_settings(model, processor)
    if before and checkpoint:
        check_start(config, before, record)
        record["started"] = before["started"]
    trainer = AspoTrainer(model, config, rows, eval_rows, processor)
    if config.save_strategy != "no":
        Processes.current().once("", lambda: check_room(str(config.output_dir), trainer.model, config.optim))
    is_main = config.process_index == 0
    if is_main:
        print(_headline(config, trainer.model, len(rows), checkpoint), file=sys.stderr)
    trainer.remove_callback(ProgressCallback)
    progress = Progress()
    if not config.disable_tqdm:
        trainer.add_callback(progress)
    trainer.accelerator.wait_for_everyone()  # all have read what was there before
    if is_main:
        write_json(record_path(config), record)
    with contextlib.closing(progress), Interrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    if is_main:
        write_json(record_path(config), {**record, "finished": now(), "steps": trainer.state.global_step})


def _headline(config: AspoConfig, model: nn.Module, pairs: int, checkpoint: str | None) -> str:
    """What begins, in a line."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    return (
        f"{' + '.join(config.loss_type)} on {pairs:,} pairs; {trainable:,} of {total:,} parameters train; "
        + (f"{config.world_size} processes; " if config.world_size > 1 else "")
        + (f"going on from {checkpoint}" if checkpoint else f"results in {config.output_dir}")
    )


def _load(source: str | None, kind: str, image_root: str | None) -> Any:
    try:
        rows = load_rows(source, kind=kind, image_root=image_root)
    except ValueError as error:  # which names the other commands' option
        raise ValueError(str(error).replace("--image-root", "--image_root")) from error
    validate_rows(rows, kind)
    return rows
