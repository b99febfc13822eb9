"""What loading a model may do: read safetensors, and run code of transformers; its own code only where that is asked.

Models come from strangers. A pickle (pytorch_model.bin, adapter_model.bin) can run anything while it is read, and so
can Python files that a model's folder or hub page brings along (`auto_map`). Every `from_pretrained` goes through
`pretrained` or `model`. docs/untrusted.md says what is trusted and what is not.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import dynamic_module_utils
from transformers.trainer_pt_utils import safe_globals

from aspo.cli import TRUST_VARIABLE

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def trusts_code() -> bool:
    """Whether models may bring code of their own."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def pretrained(loader: Any, path: str | Path, **options: Any) -> Any:
    """`loader.from_pretrained(path, ...)`, refusing a model's own Python code. Raises ValueError naming the flag."""
    try:
        return loader.from_pretrained(path, trust_remote_code=trusts_code(), **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} brings Python code of its own, which is not run: take a version that transformers knows (often "
            "called ...-hf), or, if you have read that code and trust it, say so: aspo --trust_remote_code COMMAND ..."
        ) from error


def model(loader: Any, path: str | Path, **options: Any) -> Any:
    """`pretrained` for a model: its weights are safetensors. Raises ValueError for pickles, and says how to convert."""
    refuse_pickles(path)
    try:
        return pretrained(loader, path, use_safetensors=True, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(_no_safetensors(path, "no safetensors")) from error


def refuse_pickles(path: str | Path, wanted: str = "*model*.safetensors") -> None:
    """ValueError for a folder that keeps its weights in pickles alone, and none in files like `wanted`."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob(wanted)):
        return
    if found := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise ValueError(_no_safetensors(path, f"a pickle ({found[0]})"))


def _no_safetensors(path: str | Path, what: str) -> str:
    return (
        f"{path} has {what} for its weights; only safetensors are read, because reading a pickle can run anything. If "
        "you trust it, convert it once: load it with transformers and call model.save_pretrained(folder)"
    )


def refuse_code(checkpoint: str | Path, own: str | Path) -> None:
    """ValueError for a checkpoint whose reading could run something. own: the output folder, whose files are ours.

    Trainer reads its files with `weights_only`, which refuses all but numbers too, but halfway and at length; here they
    are looked through first. The sharded files of FSDP and DeepSpeed are read as plain pickles by these libraries.
    """
    folder = Path(checkpoint)
    files = [path for pattern in ("*.pt", "*.pth", "*model*.bin", "optimizer*.bin") for path in folder.glob(pattern)]
    for file in filter(zipfile.is_zipfile, files):
        with safe_globals():
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if found:
            names = ", ".join(sorted(found)[:3])
            raise ValueError(f"{file} holds {names}, which is more than numbers: it is not loaded")
    sharded = any(path for pattern in ("*/.metadata", "latest") for path in folder.glob(pattern))
    if sharded and not trusts_code() and not folder.resolve().is_relative_to(Path(own).resolve()):
        raise ValueError(
            f"{folder} is a sharded checkpoint (FSDP's or DeepSpeed's), which can run anything while it is read: go on "
            "in its own --output_dir, or, if you trust it, say so: aspo --trust_remote_code train ..."
        )


@contextmanager
def unasked() -> Iterator[None]:
    """Inside, transformers does not ask at the terminal whether to run a model's code: it refuses."""
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
