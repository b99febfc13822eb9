"""`aspo online`: train on the model's own answers, rewarded token by token (FiSAO's loop, `aspo.online.trainer`)."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from aspo.model import load_model
from aspo.online.trainer import HISTORY_FILE, KL_KINDS, OnlineOptions, OnlineTrainer, round_prompts
from aspo.resume import Interrupt, check_settings, write_json
from aspo.rewards.object_words import ObjectVocabulary
from aspo.rewards.verifier import Calibration, Verifier, check_answerable
from aspo.rows import load_rows
from aspo.scorers import load_scorer
from aspo.scores import progress_bar
from aspo.training_state import checkpoints
from aspo.validate import validate_rows

RUN_FILE = "run.json"
# May differ when a run goes on: it can be made longer, and need less memory.
FREE_ON_RESUME = ("rounds", "micro_batch_size", "device", "finished")

DESCRIPTION = """\
Train a model on its own answers with token rewards: sample answers, score their object words, take clipped steps with a
divergence from the start model, and again.

  aspo rewards --method fisao --model world --scorer world --objects world --calibrate world:calibration --out runs/cal
  aspo online --model world --data world:train --calibration runs/cal/calibration.json --out runs/online

The calibration says which scorer, vocabulary and baselines make the rewards. --out gets the LoRA adapter, run.json and
log_history.json (mean reward, divergence, share of clipped tokens, answer length for each round). The same command run
again goes on from the last checkpoint; Ctrl-C finishes the round, saves and stops."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo online`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--model", required=True, help="folder or hub name of the start model, which is the reference; world = embedded"
    )
    add("--data", required=True, help="prompts with images, as `aspo pairs` takes them")
    add("--calibration", required=True, help="calibration.json of `aspo rewards --method fisao`")
    add("--out", required=True, type=Path, help="folder to write")
    add("--save-rounds", type=int, default=10, help="rounds between two checkpoints (default: 10)")
    add("--limit", type=int, help="only the first prompts (default: all)")
    add("--image-root", help="where relative image paths start (default: the folder of --data)")
    add("--dtype", default="float32", help="weights' type: float32, bfloat16, float16 or auto (default: float32)")
    add("--device", help="torch device (default: the accelerator if there is one, else cpu)")
    texts = {
        "rounds": "rounds of answering and stepping",
        "prompts_per_round": "prompts of a round; all are used before any comes again",
        "batch_size": "answers of an optimiser step",
        "micro_batch_size": "answers in one forward pass; changes memory, and the result by rounding only",
        "epochs": "passes over a round's answers",
        "clip": "eps: how far a token's probability ratio counts",
        "kl_coef": "weight of the divergence",
        "kl": "full = KL(reference || policy) over the vocabulary, k3 = that gradient from the sampled tokens, "
        "reward = KL(policy || reference), taken from the reward of each token",
        "learning_rate": "of AdamW, constant",
        "max_grad_norm": "largest norm of a gradient",
        "max_new_tokens": "longest answer",
        "generation_batch_size": "answers generated at a time",
        "seed": "of the order, the sampling and the adapter's start",
        "lora_r": "LoRA rank",
        "lora_alpha": "LoRA scale: the update is multiplied by lora_alpha / lora_r",
    }
    defaults = OnlineOptions()
    for name, text in texts.items():
        default = getattr(defaults, name)
        choices = KL_KINDS if name == "kl" else None
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(default), default=default, choices=choices, help=f"{text} (default: {default})")
    add(
        "--lora-target-modules",
        nargs="+",
        help="layers, or one regular expression (default: the language model's linear)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `aspo online`; 0 when done. Raises KeyboardInterrupt when stopped by Ctrl-C, state saved."""
    options = OnlineOptions(**{f.name: getattr(args, f.name) for f in fields(OnlineOptions) if f.init})
    if args.save_rounds < 1:
        raise ValueError(f"--save-rounds is {args.save_rounds}; it must be at least 1")
    calibration = Calibration.load(args.calibration)
    rows = load_rows(args.data, kind="prompt", limit=args.limit, image_root=args.image_root)
    validate_rows(rows, "prompt")
    check_answerable(rows)
    record = {
        **{name: getattr(args, name) for name in ("model", "data", "limit", "image_root", "dtype", "device")},
        **asdict(options),
        "prompts": len(rows),
        "calibration": calibration.to_json(),
    }
    there = "checkpoints" if checkpoints(args.out) else None
    before = check_settings(args.out / RUN_FILE, record, "aspo online", there, free=FREE_ON_RESUME)
    if before.get("finished") and before["rounds"] >= options.rounds:
        print(f"{args.out} is finished ({before['rounds']} rounds); give more --rounds, or another --out")
        return 0
    trainer = OnlineTrainer(
        *load_model(args.model, args.dtype, device=args.device),
        load_verifier(calibration, args.device),
        calibration,
        options,
    )
    if found := checkpoints(args.out):
        trainer.load(found[-1])
    write_json(args.out / RUN_FILE, {**record, "finished": False})
    with progress_bar() as bar, Interrupt() as interrupt:
        task = bar.add_task("rounds", total=options.rounds, completed=trainer.round)
        while trainer.round < options.rounds and not interrupt.told:
            try:
                figures = trainer.run_round(round_prompts(rows, options, trainer.round))
            except Exception:
                if trainer.round and not trainer.stepped:  # a row that cannot be scored costs no finished round
                    trainer.save(args.out)
                raise
            bar.console.print(round_line(figures))
            write_json(args.out / HISTORY_FILE, trainer.history)
            bar.advance(task)
            if trainer.round % args.save_rounds == 0:
                trainer.save(args.out)
        trainer.save(args.out)
    if trainer.round < options.rounds:
        raise KeyboardInterrupt
    trainer.save_final(args.out)
    write_json(args.out / RUN_FILE, {**record, "finished": True})
    print(f"{trainer.round} rounds done, adapter in {args.out}")
    return 0


def load_verifier(calibration: Calibration, device: str | None = None) -> Verifier:
    """The verifier that a calibration was made with. Raises ValueError where its scorer has other weights now."""
    scorer = load_scorer(calibration.scorer, device)
    if scorer.identity != calibration.identity:
        raise ValueError(
            f"the scorer {calibration.scorer} has other weights ({scorer.identity}) than those that were calibrated "
            f"({calibration.identity}): calibrate again (`aspo rewards`)"
        )
    return Verifier(scorer, ObjectVocabulary(calibration.vocabulary), calibration.template)


def round_line(figures: dict[str, float]) -> str:
    """A round's figures for people."""
    shown = {
        "reward a word": ("reward/word", "+.3f"),
        "KL": ("kl/policy_ref", ".4f"),
        "clipped": ("clip_share", ".3f"),
        "tokens": ("answer/tokens", ".1f"),
    }
    parts = [f"{label} {figures[name]:{form}}" for label, (name, form) in shown.items() if name in figures]
    return f"round {figures['round']:.0f}: " + ", ".join(parts)
