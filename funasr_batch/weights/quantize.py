"""Linear layers in 8 or 4 bits: which of them, and their tensors before and after.

Affine quantisation as MLX defines it (`mx.quantize`): of every `group_size` neighbours along a
layer's input, w ~ scale * code + bias. A quantised layer `X` has the tensors that
`mlx.nn.QuantizedLinear` names: `X.weight`, its codes packed into uint32, `X.scales` and `X.biases`.

Scales and biases are numbers that bfloat16 holds, and codes are chosen after they were rounded: a
model is then the same in bfloat16 and float32. Rounding them under codes that were chosen before,
as `mx.quantize` does with bfloat16 weights, makes the error of 8 bits a third larger.

Never quantised: embeddings, norms, convolutions, the CTC head; and layers whose input is not a
multiple of 32 wide (in Nano the first encoder layer's 560).

MLX is imported only where tensors are worked on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

GROUP_SIZE: Final = 64
"""Weights that share a scale and a bias."""
SMALL_GROUP_SIZE: Final = 32
"""The same, in layers whose input is a multiple of 32 wide but not of 64."""
BITS: Final = (4, 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits of the linear layers; None leaves them as they are. `str()` is the canonical spec."""

    encoder: int | None = None
    """Of the audio encoder and the adaptor."""
    llm: int | None = None

    def __post_init__(self) -> None:
        if not {self.encoder, self.llm} <= {None, *BITS}:
            raise ValueError("bits are 4 or 8")

    def __str__(self) -> str:
        parts = (("encoder", self.encoder), ("llm", self.llm))
        return ",".join(f"{part}={bits}" for part, bits in parts if bits is not None) or "none"

    def __bool__(self) -> bool:
        """Whether anything is quantised at all."""
        return (self.encoder, self.llm) != (None, None)

    def description(self) -> dict[str, int | None]:
        """What `model.json` says of it."""
        return {"encoder": self.encoder, "llm": self.llm, "group_size": GROUP_SIZE}

    @classmethod
    def from_description(cls, value: object) -> Quantization:
        """Reads what `description` gave. Raises ValueError where it is not that."""
        match value:
            case {"encoder": int() | None as encoder, "llm": int() | None as llm, **rest} if (
                rest == {"group_size": GROUP_SIZE}
            ):
                return cls(encoder, llm)
            case _:
                raise ValueError("not a quantisation of this version")


NONE: Final = Quantization()
PRESETS: Final[Mapping[str, Quantization]] = MappingProxyType(
    {
        "none": NONE,
        "int8": Quantization(encoder=8),
        "int8-all": Quantization(encoder=8, llm=8),
        "int4": Quantization(encoder=8, llm=4),
    }
)
"""`int8` leaves the language model as it is; no preset takes the encoder below 8 bits."""


def parse_quantization(text: str) -> Quantization:
    """The plan that a preset's name or a spec such as `encoder=8,llm=4` stands for.

    Raises:
        ValueError: it is neither.
    """
    text = text.strip().casefold()
    if text in PRESETS:
        return PRESETS[text]
    bits: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(encoder|llm)\s*=\s*([48])\s*", part)
        if match is None or match[1] in bits:
            raise ValueError(f"{text[:80]!r} is no quantisation")
        bits[match[1]] = int(match[2])
    return Quantization(**bits)


def quantizable(name: str, shape: tuple[int, ...], plan: Quantization) -> int | None:
    """The bits that `plan` gives a checkpoint's tensor; None where it stays as it is."""
    bits = _planned_bits(name, shape, plan)
    return bits if bits is not None and group_size(shape[1]) is not None else None


def group_size(width: int) -> int | None:
    """Weights of a group in a layer with inputs of `width`; None where groups do not fit."""
    for size in (GROUP_SIZE, SMALL_GROUP_SIZE):
        if width >= size and width % size == 0:
            return size
    return None


def unquantizable(shapes: Iterable[tuple[str, tuple[int, ...]]], plan: Quantization) -> list[str]:
    """Names of weights that the plan means and that keep their type, as groups do not fit."""
    return [
        name
        for name, shape in shapes
        if _planned_bits(name, shape, plan) is not None and group_size(shape[1]) is None
    ]


def quantize_tensors(
    tensors: MutableMapping[str, mx.array], plan: Quantization, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Quantises the layers that `plan` means, one tensor after the other.

    `tensors` are those of a checkpoint, by its names; it is emptied on the way, so that of a
    mapping whose arrays are read when they are used, two full copies are never held.

    Returns:
        `X.weight` uint32 [out, in * bits / 32], `X.scales` and `X.biases` [out, in / group] of
        `dtype` for a quantised layer; other floating-point tensors cast to `dtype`; others as they
        were, among them those that are quantised already.
    """
    import mlx.core as mx

    result: dict[str, mx.array] = {}
    for name in list(tensors):
        pieces = {
            key: piece.astype(dtype) if mx.issubdtype(piece.dtype, mx.floating) else piece
            for key, piece in quantize_tensor(name, tensors.pop(name), plan).items()
        }
        mx.eval(pieces)
        result |= pieces
    return result


def quantize_tensor(name: str, tensor: mx.array, plan: Quantization) -> dict[str, mx.array]:
    """One tensor under its name; or weight, scales and biases (bfloat16) where it is quantised."""
    import mlx.core as mx

    bits = quantizable(name, tensor.shape, plan)
    size = group_size(tensor.shape[-1]) if bits is not None else None
    if bits is None or size is None or not mx.issubdtype(tensor.dtype, mx.floating):
        return {name: tensor}
    rows, width = tensor.shape
    exact = tensor.astype(mx.float32)
    _, scales, biases = (
        piece.astype(mx.bfloat16) for piece in mx.quantize(exact, group_size=size, bits=bits)
    )
    step, origin = (piece.astype(mx.float32)[..., None] for piece in (scales, biases))
    codes = mx.round((exact.reshape(rows, width // size, size) - origin) / step)
    codes = mx.clip(codes, 0, 2**bits - 1).astype(mx.uint32)
    layer = name.removesuffix(".weight")
    return {
        name: _packed(codes.reshape(rows, width), bits),
        f"{layer}.scales": scales,
        f"{layer}.biases": biases,
    }


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes uint32 [rows, width] below 2**bits, `32 / bits` of them in a word, the first lowest."""
    import mlx.core as mx

    per_word = 32 // bits
    shifts = mx.arange(per_word, dtype=mx.uint32) * bits
    words = codes.reshape(codes.shape[0], -1, per_word) << shifts
    return words.sum(axis=-1).astype(mx.uint32)  # the bits do not overlap


def dequantize_tensors(
    tensors: MutableMapping[str, mx.array], plan: Quantization, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Gives plain weights of `dtype` back, one layer after the other; `tensors` is emptied.

    For devices whose quantised product is slow, the CPU first of all: the values are those that the
    quantised layers stand for. `plan` is the one that the tensors were quantised with.
    """
    import mlx.core as mx

    result: dict[str, mx.array] = {}
    for name in [name for name in tensors if not name.endswith((".scales", ".biases"))]:
        tensor, layer = tensors.pop(name), name.removesuffix(".weight")
        if f"{layer}.scales" in tensors:
            scales, biases = (tensors.pop(f"{layer}.{part}") for part in ("scales", "biases"))
            tensor = _plain(tensor, scales, biases, _bits(name, plan))
        if mx.issubdtype(tensor.dtype, mx.floating):
            tensor = tensor.astype(dtype)
        mx.eval(tensor)
        result[name] = tensor
    return result


def _plain(codes: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    import mlx.core as mx

    size = codes.shape[1] * 32 // bits // scales.shape[1]
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, group_size=size, bits=bits)


def quantize_layers(model: nn.Module, plan: Quantization) -> None:
    """Puts `QuantizedLinear` in the place of the layers whose weights `plan` quantises.

    `model` names its layers as the checkpoint does, and is to be filled afterwards with what
    `quantize_tensors` returned: what its layers hold before that is never computed.
    """
    import mlx.nn as nn

    def form(path: str, module: nn.Module) -> dict[str, int] | bool:
        if not isinstance(module, nn.Linear):
            return False
        shape = module.weight.shape
        bits, size = quantizable(f"{path}.weight", shape, plan), group_size(shape[1])
        return False if bits is None or size is None else {"bits": bits, "group_size": size}

    if plan:
        nn.quantize(model, class_predicate=form)


def _bits(name: str, plan: Quantization) -> int:
    bits = _planned_bits(name, (0, 0), plan)
    if bits is None:
        raise ValueError(f"{name} is quantised, and by {plan} it should not be")
    return bits


def _planned_bits(name: str, shape: tuple[int, ...], plan: Quantization) -> int | None:
    if len(shape) != 2 or not name.endswith(".weight"):
        return None
    if name.startswith(("audio_encoder.", "audio_adaptor.")):
        return plan.encoder
    return plan.llm if name.startswith("llm.model.layers.") else None
