"""What `aspo plan --gpus N` prints, and what would lift what is in the way."""

from __future__ import annotations

from aspo.scaling.hardware import MARGIN
from aspo.scaling.job import Plan
from aspo.scaling.sharding import Held

GIB, GB = 2**30, 1e9


def report(plan: Plan, price: float | None = None) -> str:
    """The plan as text. price: of a GPU-hour, in the user's money."""
    cluster = plan.cluster
    shape = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.per_node}"
    lines = [
        f"{cluster.gpus} GPUs ({shape}), {plan.strategy}, {plan.step.pairs} pairs a GPU and {plan.batch:,} a step; "
        f"{'LoRA' if plan.args.use_lora else 'full fine-tuning'}, {plan.size.numbers / 1e6:,.1f} M numbers train",
        *(
            ["HSDP is planned here alone: `aspo train` refuses accelerate's parallelism_config"]
            * (plan.shards < cluster.gpus)
        ),
        "",
        "a GPU holds",
        *(f"  {part.name:26}{part.bytes / GIB:9,.2f} GiB  {_shared_out(part)}" for part in plan.parts),
        f"  {'together':26}{plan.held / GIB:9,.2f} GiB  of {cluster.room / GIB:,.1f} "
        f"({MARGIN:.0%} of {cluster.gpu.memory:g} GB): {'fits' if plan.fits else 'DOES NOT FIT'}",
        "",
        "a GPU sends in a step                 in its node   to other nodes",
        *(f"  {t.name:34}{(t.sent - t.across) / GB:9,.3f} GB  {t.across / GB:9,.3f} GB" for t in plan.sends),
        "",
        "a step takes, each alone",
        *(f"  {name:34}{value:9,.3f} s" for name, value in plan.seconds().items()),
    ]
    return "\n".join([*lines, *_times(plan, price), "", *advice(plan)])


def _shared_out(part: Held) -> str:
    replicated = part.name in ("weights", "reference", "gradients", "optimiser", "gathered and reduced")
    if part.over > 1:
        return f"1/{part.over} of it"
    return "whole in each" if replicated else "of its own pairs"


def _times(plan: Plan, price: float | None) -> list[str]:
    fast, slow = plan.step_seconds()
    hours = plan.hours
    gpu_hours = [h * plan.cluster.gpus for h in hours]
    lines = [
        f"  {'all at once .. network after it':34}{fast:9,.3f} .. {slow:,.3f} s: "
        f"{3600 * plan.batch / slow:,.0f} .. {3600 * plan.batch / fast:,.0f} pairs an hour",
        "",
        f"{plan.pairs:,} pairs, {plan.args.num_train_epochs:g} epoch(s): {_duration(*hours)}, "
        f"{_duration(*gpu_hours, of='GPU-')}{_money(gpu_hours[1], price)}",
    ]
    for job in plan.offline():
        needed = job.name != "aspo reference" or plan.step.cached_reference
        gpus, cores = _duration(job.gpu_hours, of="GPU-"), _duration(job.core_hours, of="core-")
        lines.append(
            f"  {job.name + ('' if needed else ' (if cached)'):28}{gpus:>20}, {cores}, "
            f"{job.bytes / GB:,.1f} GB on the disk{_money(job.gpu_hours, price)}"
        )
    saves = f"  {plan.saves} checkpoints of {plan.saved / GB:,.1f} GB, and reading the weights: "
    lines.append(f"{saves}{_duration(plan.around_hours)} of that")
    return lines


def _duration(*hours: float, of: str = "") -> str:
    """Hours, or minutes where they are few."""
    few, digits = max(hours) < 2, 1 if max(hours) < 100 else 0
    return " .. ".join(f"{60 * h if few else h:,.{digits}f}" for h in hours) + f" {of}{'minutes' if few else 'hours'}"


def _money(gpu_hours: float, price: float | None) -> str:
    return "" if price is None else f", costs {gpu_hours * price:,.0f}"


def advice(plan: Plan) -> list[str]:
    """What is in the way, what comes next, and what would lift the first."""
    (first, most), (second, next_most) = plan.in_the_way[:2]
    if first == "memory":
        return [f"in the way: memory. {lift(plan, first)}"]
    return [
        f"in the way: {first}, {most:.3f} s a step; next: {second}, at {next_most / most:.0%} of that.",
        lift(plan, first),
    ]


def lift(plan: Plan, what: str) -> str:
    """The options that exist for a part of the machine, in the order in which to try them."""
    step, several = plan.step, plan.cluster.nodes > 1
    ways = {
        "memory": [
            *(["--activation_checkpointing"] if not step.checkpointing else []),
            *(["--strategy fsdp2 or zero3"] if plan.strategy in ("ddp", "zero2") and plan.cluster.gpus > 1 else []),
            *(["fewer pairs a GPU"] if step.pairs > 1 else []),
            *(["--precompute_ref_log_probs"] if not (plan.args.use_lora or step.cached_reference) else []),
            *(["LoRA"] if not plan.args.use_lora else []),
            *(["more GPUs"] if plan.shards > 1 else []),
        ],
        "compute": [
            *([] if step.cached_reference else ["--precompute_ref_log_probs where the pairs are read more than once"]),
            *(["a shared prefix"] if not step.shared else []),
            *(["no --activation_checkpointing, where memory allows"] if step.checkpointing else []),
            "more GPUs: nothing else in the step takes as long",
        ],
        "memory bandwidth": ["more pairs a GPU: weights are read once however many there are"],
        "network in the node": ["more pairs a GPU", *_less_network(plan)],
        "network across nodes": [
            *([f"HSDP, weights gathered within the node (planned with --dp_shard_size {plan.cluster.per_node}; "
               "`aspo train` refuses it so far)"]
              if several and plan.strategy == "fsdp2" and plan.shards > plan.cluster.per_node else []),
            "more pairs a GPU",
            *_less_network(plan),
        ],
        "batches on the CPU": ["more --dataloader_num_workers and cores", "smaller pictures in the dataset"],
        "loading, saving": [
            *(["a larger --save_steps"] if plan.saves else []),
            *(["fsdp_state_dict_type SHARDED_STATE_DICT"] if plan.strategy == "fsdp2" and plan.saves else []),
            *([] if plan.args.use_lora or not plan.saves else ["LoRA"]),
            "faster storage",
        ],
        "storage": ["the dataset on the nodes' own disks", "smaller pictures in the dataset"],
    }  # fmt: skip
    return "what would lift it: " + "; ".join(ways[what]) + "."


def _less_network(plan: Plan) -> list[str]:
    if plan.strategy in ("fsdp2", "zero3") and plan.args.use_lora:
        return ["--strategy ddp where the model fits: LoRA's gradients are all it sends"]
    return [] if plan.args.use_lora else ["LoRA"]
