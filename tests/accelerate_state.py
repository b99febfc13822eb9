"""What a process that a launcher started finds: run by tests/test_accelerate_configs.py, prints one line of JSON."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import json
import os
import sys
import types

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs


def fsdp() -> dict[str, object]:
    """accelerate's own wrapping, from the file's options, of two layers; on a CPU, which it has no state for."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=["Linear"])
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    fields = {"mixed_precision": "no", "parallelism_config": None, "device": torch.device("cpu")}
    accelerator = types.SimpleNamespace(state=state, is_main_process=True, **fields)
    model = fsdp2_prepare_model(accelerator, torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)))
    model(torch.ones(2, 4)).sum().backward()
    shapes = [list(p.to_local().shape) for p in model.parameters()]
    return {"version": plugin.fsdp_version, "reshard": plugin.reshard_after_forward, "shards": shapes}


def zero3() -> dict[str, object]:
    """A step of DeepSpeed's engine from the file's options."""
    kwargs = [InitProcessGroupKwargs(backend="gloo")]  # accelerate names a backend for GPUs only
    accelerator = Accelerator(kwargs_handlers=kwargs)
    plugin = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shards of small ones too
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).sum())
    optimizer.step()
    shapes = [list(p.shape) for p in model.parameters()]
    return {"stage": plugin.zero_stage, "processes": accelerator.num_processes, "shards": shapes}


if __name__ == "__main__":
    what = sys.argv[1:] or ["state"]
    if what == ["zero3"]:
        print(json.dumps(zero3()), flush=True)
    else:
        accelerator = Accelerator(cpu=True)
        found = {
            "processes": accelerator.num_processes,
            "rank": accelerator.process_index,
            "precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
            "sum": int(accelerator.reduce(torch.tensor(accelerator.process_index + 1), "sum")),
        }
        print(json.dumps(found | (fsdp() if what == ["fsdp2"] else {})), flush=True)
    PartialState().destroy_process_group()  # gloo's threads may abort a process that ends without
