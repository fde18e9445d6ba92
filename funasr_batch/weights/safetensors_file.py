"""The safetensors format: a header in JSON, then the tensors' bytes without gaps.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …}
    data       offsets count from its start

Written here because a conversion has to stream, and checked here because MLX's reader believes
what the header says. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import CheckpointError

Array: TypeAlias = npt.NDArray[Any]

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 8

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its values."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A header that has been checked against the size of its file."""

    path: Path
    specs: Mapping[str, TensorSpec]
    positions: Mapping[str, int]
    """Where each tensor's bytes begin, from the start of the file."""

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """One float32 tensor, without MLX."""
        spec = self.specs[name]
        if spec.dtype != "F32":
            raise CheckpointError(f"{self.path}: {name} is {spec.dtype}, not F32")
        return self.read_raw(name).view("<f4").reshape(spec.shape)

    def read_raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor, uint8 [nbytes]."""
        with self.path.open("rb") as file:
            file.seek(self.positions[name])
            return np.frombuffer(file.read(self.specs[name].nbytes), np.uint8)


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Array]
) -> str:
    """Writes a new file tensor by tensor, syncs it to the disk and returns its sha256.

    `read(name)` is called once for each tensor; its array's bytes are written as they are, so
    bfloat16 is given as its raw bits. Only one tensor is held in memory at a time.
    """
    # Wide items first, as the reference writer does: every tensor is then aligned to its items.
    order = sorted(specs, key=lambda name: -ITEM_BYTES[specs[name].dtype])
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(_encode_header(specs, order))
        for name in order:
            put(_tensor_bytes(name, specs[name], read(name)))  # no name keeps the array alive
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _tensor_bytes(name: str, spec: TensorSpec, array: Array) -> memoryview:
    if array.nbytes != spec.nbytes:
        raise ValueError(f"{name}: {array.nbytes} bytes for {spec}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _encode_header(specs: Mapping[str, TensorSpec], order: list[str]) -> bytes:
    entries = {}
    position = 0
    for name in order:
        spec = specs[name]
        end = position + spec.nbytes
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def read_header(path: Path) -> Header:
    """Reads the header and checks it: known dtypes, and offsets that tile the file exactly.

    Raises:
        CheckpointError: the header is not true of this file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
                raise ValueError(f"its header claims {length} bytes")
            text = file.read(length)
        entries = json.loads(text, object_pairs_hook=_unique_keys)
        if not isinstance(entries, dict):
            raise ValueError("its header is no dictionary")
        entries.pop("__metadata__", None)
        return _checked_header(path, entries, start=_LENGTH.size + length, size=size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}",
            hint="Delete the folder it is in and convert or download the model again.",
        ) from error


def _checked_header(path: Path, entries: dict[str, Any], *, start: int, size: int) -> Header:
    places = sorted(_place(name, entry) for name, entry in entries.items())
    position = 0
    for begin, end, name, _ in places:
        if begin != position:
            raise ValueError(f"{name[:80]!a} begins at byte {begin} instead of {position}")
        position = end
    if start + position != size:
        raise ValueError(f"its tensors end at byte {start + position} of {size}")
    return Header(
        path,
        specs={name: spec for _, _, name, spec in places},
        positions={name: start + begin for begin, _, name, _ in places},
    )


def _place(name: str, entry: Any) -> tuple[int, int, str, TensorSpec]:
    match entry:
        case {"dtype": str() as dtype, "shape": [*shape], "data_offsets": [begin, end], **rest}:
            numbers = (*shape, begin, end)
            if (
                not rest
                and dtype in ITEM_BYTES
                and len(shape) <= MAX_DIMENSIONS
                and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
            ):
                spec = TensorSpec(dtype, tuple(shape))
                if end - begin == spec.nbytes:
                    return begin, end, name, spec
    raise ValueError(f"the entry of {name[:80]!a} is not possible")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result
