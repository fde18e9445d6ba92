"""Writes `.pt` files and whole models in FunASR's layout, byte by byte and without PyTorch.

A pickle here is a concatenation of opcodes, so that a test can also write what PyTorch never would.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
TRUE, FALSE, NONE = b"\x88", b"\x89", b"N"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(qualified: str) -> bytes:
    module, _, attribute = qualified.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def integers(values: tuple[int, ...]) -> bytes:
    return sequence(*map(integer, values))


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + sequence(*arguments) + b"R"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def storage(key: str, kind: str, length: int) -> bytes:
    return (
        sequence(text("storage"), name(f"torch.{kind}"), text(key), text("cpu"), integer(length))
        + b"Q"
    )


def tensor(
    source: bytes, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0
) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        source,
        integer(offset),
        integers(shape),
        integers(strides),
        FALSE,
        call("collections.OrderedDict"),
    )


def write_archive(
    path: Path,
    description: bytes,
    storages: Mapping[str, bytes],
    *,
    prefix: str = "model",
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A zip archive laid out as `torch.save` does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", description)
        if byteorder is not None:
            archive.writestr(f"{prefix}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{prefix}/data/{key}", data)
        archive.writestr(f"{prefix}/version", b"3\n")
    return path


def array_tensor(key: str, array: np.ndarray[Any, Any]) -> bytes:
    strides = tuple(step // array.itemsize for step in array.strides)
    return tensor(storage(key, KINDS[array.dtype.name], array.size), array.shape, strides)


def write_pt(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A state dict of contiguous arrays, one storage each; uint16 stands for bfloat16."""
    tensors = {
        label: array_tensor(str(index), array)
        for index, (label, array) in enumerate(arrays.items())
    }
    storages = {str(index): array.tobytes() for index, array in enumerate(arrays.values())}
    return write_archive(path, program(dictionary(tensors)), storages)


def cmvn_text(shift: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> str:
    """Kaldi's nnet text, as in `am.mvn`."""

    def row(values: np.ndarray[Any, Any]) -> str:
        return " ".join(repr(float(value)) for value in values)

    width = len(shift)
    return (
        f"<Nnet>\n<Splice> {width} {width}\n[ 0 ]\n"
        f"<AddShift> {width} {width}\n<LearnRateCoef> 0 [ {row(shift)} ]\n"
        f"<Rescale> {width} {width}\n<LearnRateCoef> 0 [ {row(scale)} ]\n</Nnet>\n"
    )


def write_funasr_folder(folder: Path, *, seed: int = 0) -> Path:
    """A complete, tiny model of the kind `Paraformer`; its tensors are not those of a real one."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "model": "Paraformer",
        "encoder": "SANMEncoder",
        "encoder_conf": {"output_size": 4, "num_blocks": 1},
        "frontend_conf": {"n_mels": 2, "lfr_m": 3, "lfr_n": 2},
        "optim_conf": {"lr": 0.1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "tokens.json").write_text(json.dumps(["<blank>", "<s>", "</s>", "好"]), "utf-8")
    shift, scale = generator.normal(size=(2, 6)).astype(np.float32)
    (folder / "am.mvn").write_text(cmvn_text(shift, scale), "utf-8")
    arrays = {
        "encoder.norm.weight": generator.normal(size=4).astype(np.float32),
        "encoder.linear.weight": generator.normal(size=(3, 4)).astype(np.float32),
    }
    write_pt(folder / "model.pt", arrays)
    return folder
