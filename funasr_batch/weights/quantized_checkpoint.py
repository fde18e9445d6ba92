"""Converted folders with quantised tensors: writing one, and loading any folder by a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import CheckpointError
from funasr_batch.weights.checkpoint import (
    CTC_VOCABULARY_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    write_checkpoint,
)
from funasr_batch.weights.quantize import (
    BITS,
    NONE,
    Quantization,
    group_size,
    quantizable,
    quantize_tensor,
    quantize_tensors,
)
from funasr_batch.weights.safetensors_file import Header, TensorSpec, read_header

if TYPE_CHECKING:
    import mlx.core as mx

_QUANTIZED_FROM = ("F32", "BF16", "F16")


def load_tensors(
    checkpoint: Checkpoint, plan: Quantization, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], Quantization]:
    """The tensors of a model in `dtype`, quantised as `plan` says, and how they are quantised.

    A folder that was quantised when it was written is loaded as it is: a plan that says nothing
    leaves it so. Memory holds the result and one tensor of the source.

    Raises:
        CheckpointError: the folder cannot be loaded, or is quantised in another way.
    """
    held = checkpoint.quantization
    if held is None:
        return quantize_tensors(checkpoint.load_tensors(), plan, dtype), plan
    if plan not in (NONE, held):
        raise CheckpointError(
            f"{checkpoint.folder} is quantised already, by {held}; it cannot become {plan}",
            hint="Leave out --quantize, or use the model that the folder was made from.",
        )
    return quantize_tensors(checkpoint.load_tensors(), NONE, dtype), held


def plain_specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """What the tensors would be if they were not quantised, for `check_tensors`.

    A layer whose scales and biases do not fit its weight is given as it is, and so found out there.
    """
    specs = dict(checkpoint.specs)
    for name, spec in checkpoint.specs.items():
        if spec.dtype == "U32" and len(spec.shape) == 2 and checkpoint.quantization is not None:
            plain = _plain_spec(name, specs, checkpoint.quantization)
            if plain is not None:
                layer = name.removesuffix(".weight")
                del specs[f"{layer}.scales"], specs[f"{layer}.biases"]
                specs[name] = plain
    return specs


def _plain_spec(
    name: str, specs: Mapping[str, TensorSpec], plan: Quantization
) -> TensorSpec | None:
    rows, words = specs[name].shape
    layer = name.removesuffix(".weight")
    for bits in BITS:
        width = words * 32 // bits
        size = group_size(width)
        if size is not None and quantizable(name, (rows, width), plan) == bits:
            groups = TensorSpec("BF16", (rows, width // size))
            if specs.get(f"{layer}.scales") == specs.get(f"{layer}.biases") == groups:
                return TensorSpec("BF16", (rows, width))
    return None


def save_quantized(checkpoint: Checkpoint, destination: Path, plan: Quantization) -> Path:
    """Writes a converted folder that holds the quantised tensors, and returns `destination`.

    A plan that says nothing makes a copy. Memory holds one tensor at a time, and of the layers
    behind it the scales and biases (a sixteenth of the 8-bit weights), which the format puts later.

    Raises:
        CheckpointError: the model is quantised already, has no layers that `plan` means, or there
            is something else at `destination`.
        StorageError: the disk refuses.
    """
    if plan and checkpoint.quantization is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is quantised already, by {checkpoint.quantization}",
            hint="Use the model that the folder was made from.",
        )
    specs = _quantized_specs(checkpoint, plan)
    if plan and specs.keys() == checkpoint.specs.keys():
        raise CheckpointError(
            f"{checkpoint.folder} has no layers that {plan} could quantise",
            hint="Only Fun-ASR-Nano can be quantised.",
        )
    reader = _Reader(read_header(checkpoint.folder / WEIGHTS_FILE), plan)
    write_checkpoint(
        destination,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        tokens=checkpoint.tokens,
        cmvn=checkpoint.cmvn,
        tensors=specs,
        read=reader.read,
        source=checkpoint.source,
        files=_files(checkpoint),
        quantization=plan if plan else checkpoint.quantization,
    )
    return destination


def _quantized_specs(checkpoint: Checkpoint, plan: Quantization) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.specs.items():
        bits = quantizable(name, spec.shape, plan)
        size = group_size(spec.shape[1]) if bits is not None else None
        if bits is None or size is None:
            specs[name] = spec
            continue
        if spec.dtype not in _QUANTIZED_FROM:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {spec.dtype}, not floating-point"
            )
        rows, width = spec.shape
        layer = name.removesuffix(".weight")
        specs[name] = TensorSpec("U32", (rows, width * bits // 32))
        specs[f"{layer}.scales"] = TensorSpec("BF16", (rows, width // size))
        specs[f"{layer}.biases"] = TensorSpec("BF16", (rows, width // size))
    return specs


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    found = {
        TOKENIZER_FILE: checkpoint.tokenizer,
        CTC_VOCABULARY_FILE: checkpoint.ctc_vocabulary,
    }
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


class _Reader:
    """Gives the bytes of the quantised tensors, each once and a layer's weight first."""

    def __init__(self, header: Header, plan: Quantization) -> None:
        self._header = header
        self._plan = plan
        self._waiting: dict[str, npt.NDArray[np.uint8]] = {}

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        if name in self._waiting:
            return self._waiting.pop(name)
        raw = self._header.read_raw(name)
        spec = self._header.specs[name]
        if quantizable(name, spec.shape, self._plan) is None:
            return raw
        pieces = {
            key: _bytes(piece)
            for key, piece in quantize_tensor(name, _array(raw, spec), self._plan).items()
        }
        weight = pieces.pop(name)
        self._waiting |= pieces
        return weight


def _array(raw: npt.NDArray[np.uint8], spec: TensorSpec) -> mx.array:
    import mlx.core as mx

    dtypes = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
    return mx.array(raw).view(dtypes[spec.dtype]).reshape(spec.shape)


def _bytes(piece: mx.array) -> npt.NDArray[np.uint8]:
    import mlx.core as mx

    return np.array(piece.reshape(-1).view(mx.uint8))
