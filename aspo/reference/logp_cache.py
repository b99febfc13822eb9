"""ReferenceCache: log-probabilities of the reference, one (tokens,) fp32 tensor for each response, found by content.

    folder/meta.json                   the settings they were made with; who opens the folder must have equal ones
    folder/shard-<random>.safetensors  some hundred rows each, written whole or not at all

A row's key is a hash of its prompt, responses and image bytes, and of the settings. Nothing about sentences is in it:
log-probabilities are per token, and responses can be cut into other sentences over the same cache.
Axes of a shard: K rows, R responses of all of them, N tokens of all responses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aspo.atomic import write_atomic
from aspo.folder import image_bytes, image_entries, row_name
from aspo.validate import response_text
from aspo_kernels import SentenceLayout

META_FILE, SHARDS = "meta.json", "shard-*.safetensors"
HASHED = "sha256:"  # how a setting begins that is a hash: errors name it without its value
ROUNDING = 1e-3  # nats above 0 that a log-probability may be by rounding

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]


class Shard(NamedTuple):
    """Offsets of rows over responses (K+1,), of responses over tokens (R+1,), and logps (N,)."""

    responses: list[int]
    tokens: list[int]
    logps: Tensor

    def row(self, index: int) -> list[Tensor]:
        """One (tokens,) fp32 tensor for each response of a row."""
        first, end = self.responses[index], self.responses[index + 1]
        return [self.logps[self.tokens[r] : self.tokens[r + 1]] for r in range(first, end)]


class ReferenceCache:
    """The log-probabilities in a folder. Make one with `open` (must be there) or `create` (made if absent).

    Several processes may write into one folder at a time; each finds what the others wrote after `reload`. Pickled, a
    cache is its folder and settings, and is opened again where it is unpickled.

    Args (of both):
        folder: where it is.
        settings: what log-probabilities depend on besides the row, by name (`aspo.reference.settings`);
            `responses` lists the columns whose log-probabilities are kept, in the order of the collator's roles.

    Raises ValueError where the folder was made with other settings (they are named), FileNotFoundError (open) where it
    holds no cache. A shard that is damaged is named in a warning, and its rows count as missing.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(dict(settings)))
        meta = _read_meta(self.folder / META_FILE)
        if changed := _differences(meta["settings"], self.settings):
            raise ValueError(
                f"the reference cache {self.folder} was made with other settings: {'; '.join(changed)}. "
                "Name another folder, or delete this one to compute it again"
            )
        self.made_with: str = meta["made_with"]
        self.damaged: list[Path] = []
        self._prefix = json.dumps(self.settings, sort_keys=True).encode()
        self._index: dict[bytes, tuple[Shard, int]] = {}
        self.reload()

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any]) -> ReferenceCache:
        """A cache that is there."""
        if not (Path(folder) / META_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no reference cache (no {META_FILE}): make it with `aspo reference`"
            )
        return cls(folder, settings)

    @classmethod
    def create(cls, folder: str | Path, settings: Mapping[str, Any]) -> ReferenceCache:
        """A cache that is there, or a new one."""
        path = Path(folder) / META_FILE
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            made_with = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
            meta = json.dumps({"settings": dict(settings), "made_with": made_with}, indent=1)
            write_atomic(path, [meta.encode() + b"\n"])
        return cls(folder, settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferenceCache, (self.folder, self.settings)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, row: Row) -> bool:
        return self.key(row) in self._index

    @property
    def num_tokens(self) -> int:
        """Log-probabilities kept."""
        return sum(len(values) for shard, index in self._index.values() for values in shard.row(index))

    def key(self, row: Row) -> bytes:
        """The row's key, 32 bytes. Its images are read, not decoded."""
        return hashlib.sha256(self._prefix + _content(row, self.settings["responses"])).digest()

    def has(self, key: bytes) -> bool:
        """Whether a row's log-probabilities are there, by its key."""
        return key in self._index

    def missing(self, rows: Sequence[Row]) -> list[int]:
        """Indices of the rows whose log-probabilities are not there."""
        return [index for index in range(len(rows)) if rows[index] not in self]

    def get(self, row: Row) -> list[Tensor]:
        """One (tokens,) fp32 tensor for each response of the row, by role. ValueError where it is not there."""
        found = self._index.get(self.key(row))
        if found is None:
            raise ValueError(
                f"{row_name(row)}: the reference cache {self.folder} does not have it (another prompt, response or "
                "image makes another row): run `aspo reference` on this data to add what is missing"
            )
        return found[0].row(found[1])

    def add(self, entries: Mapping[bytes, Sequence[Tensor]]) -> Path:
        """Write rows as one shard: key -> (tokens,) fp32 tensors, one for each response. Returns its path."""
        responses = [values for row in entries.values() for values in row]
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8).view(len(entries), 32),
            "responses": torch.tensor([len(row) for row in entries.values()]),
            "lengths": torch.tensor([len(values) for values in responses]),
            "logps": torch.cat([values.to("cpu", torch.float32) for values in responses]),
        }
        path = self.folder / SHARDS.replace("*", secrets.token_hex(8))
        write_atomic(path, [save(tensors, metadata={"sha256": _checksum(tensors)})])
        self._enter(tensors)
        return path

    def reload(self) -> None:
        """Read the folder again, with what other processes have written since."""
        self._index, self.damaged = {}, []
        for path in sorted(self.folder.glob(SHARDS)):  # of a row that is in two shards, every process takes the same
            try:
                self._enter(_read_shard(path))
            except (OSError, ValueError, SafetensorError) as error:
                self.damaged.append(path)
                logger.warning("%s is damaged (%s): its rows count as missing", path, error)

    def remove_damaged(self) -> None:
        """Delete the shards that could not be read."""
        while self.damaged:
            self.damaged.pop().unlink(missing_ok=True)

    def _enter(self, tensors: Mapping[str, Tensor]) -> None:
        responses, tokens = (_offsets(tensors[name]) for name in ("responses", "lengths"))
        shard = Shard(responses, tokens, tensors["logps"])
        for index, key in enumerate(tensors["keys"].numpy()):
            self._index.setdefault(key.tobytes(), (shard, index))


# ---- what a row is ----


def _content(row: Row, responses: Sequence[str]) -> bytes:
    """What a row's log-probabilities depend on: prompt, responses, and the bytes of its images in their order."""
    prompt = row["prompt"]
    content: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    for column in responses:
        content[column] = row[column]
        with contextlib.suppress(ValueError):  # a message that holds more than text stays one
            content[column] = response_text(row[column])
    if row.get("unfinished"):  # no end-of-turn token then
        content["unfinished"] = True
    if row.get("chosen_alternative_ids") is not None:  # a response of its own
        content["chosen_alternative_ids"] = list(row["chosen_alternative_ids"])
    for column in ("images", "negative_images", *(f"{column}_images" for column in responses)):
        if entries := image_entries(row, column):
            content[column] = [_image_hash(entry) for entry in entries]
    return json.dumps(_plain(content), sort_keys=True).encode()


def _plain(value: Any) -> Any:
    """A prompt or message as JSON has it. datasets fills absent keys with None: left out."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _image_hash(value) if isinstance(value, Image.Image) else value


def _image_hash(entry: Any) -> str:
    """A hash of an image entry's bytes. A PIL image is encoded as PNG once: later it is known by its pixels."""
    if not isinstance(entry, Image.Image):
        return hashlib.sha256(image_bytes(entry)).hexdigest()
    besides = repr((entry.mode, entry.size, entry.getpalette(), entry.info)).encode()  # what PNG keeps besides pixels
    pixels = hashlib.sha256(besides + entry.tobytes()).digest()
    if pixels not in _encoded:
        _encoded[pixels] = hashlib.sha256(image_bytes(entry)).hexdigest()
    return _encoded[pixels]


_encoded: dict[bytes, str] = {}


# ---- log-probabilities of a batch, of a row's columns ----


def split_by_row(logps: Tensor, layout: SentenceLayout) -> list[list[Tensor]]:
    """(N,) log-probabilities in a layout's order -> for each item one (tokens,) tensor a response, by role."""
    offsets = layout.response_token_offsets.tolist()
    rows: list[list[Tensor]] = [[] for _ in range(layout.num_items)]
    groups, roles = layout.group.tolist(), layout.role.tolist()
    for response in sorted(range(layout.num_responses), key=lambda r: roles[r]):
        rows[groups[response]].append(logps[offsets[response] : offsets[response + 1]])
    return rows


def check_logps(values: Iterable[Tensor]) -> list[Tensor]:
    """(tokens,) fp32 tensors on the CPU. ValueError where one is empty, not finite or above 0."""
    checked = [x.detach().to("cpu", torch.float32) for x in values]
    for response, x in enumerate(checked):
        if x.dim() != 1 or not x.numel():
            raise ValueError(f"response {response}: log-probabilities of shape {tuple(x.shape)}; one a token is needed")
        if bad := torch.nonzero(~(x.isfinite() & (x <= ROUNDING))).flatten().tolist():
            raise ValueError(
                f"response {response}, token {bad[0]}: its log-probability is {float(x[bad[0]])}, but must be finite "
                "and at most 0: the model overflows (try dtype float32 or bfloat16), or these are none"
            )
    return checked


def logp_columns(row: Row, responses: Sequence[str] = ("chosen", "rejected")) -> list[Tensor] | None:
    """A row's own `ref_<response>_logps` (a list of floats a token), one fp32 tensor each; None where it has none."""
    columns = [f"ref_{column}_logps" for column in responses]
    given = [column for column in columns if row.get(column) is not None]
    if not given:
        return None
    if len(given) < len(columns):
        absent = next(column for column in columns if column not in given)
        raise ValueError(f"it has {given[0]!r}, but no {absent!r}: give both or none")
    for column in columns:
        if isinstance(row[column], str | float | int):
            raise ValueError(
                f"column {column!r}: it is {row[column]!r}, but must be a list with one log-probability a token: drop "
                "it if it is a sum over the response, as other trainers keep it under this name"
            )
    return check_logps(torch.as_tensor(row[column], dtype=torch.float32) for column in columns)


# ---- files ----


def _offsets(lengths: Tensor) -> list[int]:
    return [0, *lengths.cumsum(0).tolist()]


def _differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings that differ, in words."""
    changed = []
    for name in {**made, **wanted}:
        old, new = made.get(name), wanted.get(name)
        if old != new:
            hashed = all(isinstance(value, str) and value.startswith(HASHED) for value in (old, new))
            changed.append(f"{name} changed" if hashed else f"{name} was {old}, now it is {new}")
    return changed


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(meta["settings"]), "made_with": str(meta["made_with"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a reference cache's ({error!r}): delete the folder, or name another"
        ) from error


def _read_shard(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        metadata = file.metadata() or {}
    if metadata.get("sha256") != _checksum(tensors):
        raise ValueError("its content is not what was written")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
