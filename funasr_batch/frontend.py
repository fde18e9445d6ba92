"""From samples to the features that FunASR's models read: log-mel filter bank, LFR, CMVN.

Everything is float32 numpy on the CPU. The numbers are those of FunASR's `WavFrontend`
(`funasr/frontends/wav_frontend.py`), which calls torchaudio's port of Kaldi's fbank, with dither
switched off. numpy releases the GIL in all that takes time here, so threads scale.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from funasr_batch.errors import CheckpointError
from funasr_batch.gemm import matmul
from funasr_batch.records import SAMPLE_RATE, FloatArray

MEL_BINS = 80
FRAME_LENGTH = SAMPLE_RATE * 25 // 1000
FRAME_SHIFT = SAMPLE_RATE * 10 // 1000

_INT16_SCALE = np.float32(1 << 15)
_PRE_EMPHASIS = np.float32(0.97)
_LOWEST_HZ = 20.0
_ENERGY_FLOOR = np.finfo(np.float32).eps
_BLOCK_FRAMES = 256
"""Frames processed at a time: their spectra fit the processor's cache (0.5 MB)."""


def fbank(samples: FloatArray) -> FloatArray:
    """Log energies of 80 mel bands: float32 [frames, 80] of mono float32 audio in [-1, 1].

    25 ms Hamming windows every 10 ms, only where a whole window fits:
    frames = 1 + (n - 400) // 160. A clip shorter than a window is one window of its own length,
    as in FunASR; fewer than two samples give no frame.
    """
    if len(samples) < 2:
        return np.empty((0, MEL_BINS), np.float32)
    frames = sliding_window_view(samples, min(FRAME_LENGTH, len(samples)))[::FRAME_SHIFT]
    energies = np.empty((len(frames), MEL_BINS), np.float32)
    for start in range(0, len(frames), _BLOCK_FRAMES):
        block = slice(start, start + _BLOCK_FRAMES)
        energies[block] = _mel_energies(frames[block])
    np.maximum(energies, _ENERGY_FLOOR, out=energies)
    return np.log(energies, out=energies)


def low_frame_rate(frames: FloatArray, stack: int, stride: int) -> FloatArray:
    """Stacks `stack` neighbouring frames around every `stride`-th one.

    float32 [T, D] to [ceil(T / stride), stack * D]; output i holds the frames from
    i * stride - (stack - 1) // 2 on, oldest first, with the first and last frame repeated
    beyond the ends.
    """
    centres = np.arange(0, len(frames), stride)
    return _stacked(frames, centres, stack)


@dataclass(frozen=True, slots=True, eq=False)
class Cmvn:
    """Global mean and variance normalisation of stacked frames."""

    shift: FloatArray
    """float32 [D], the negative means."""
    scale: FloatArray
    """float32 [D], the inverse standard deviations."""

    def apply(self, features: FloatArray) -> FloatArray:
        """float32 [..., D] to the same shape."""
        return (features + self.shift) * self.scale


def parse_am_mvn(text: str) -> Cmvn:
    """Reads the text of an `am.mvn` file (a Kaldi nnet of two components).

    Raises CheckpointError when a vector is missing, malformed or of another length than the other.
    """
    shift = _am_mvn_vector(text, "AddShift")
    scale = _am_mvn_vector(text, "Rescale")
    if len(shift) != len(scale):
        raise CheckpointError(f"am.mvn holds {len(shift)} shifts but {len(scale)} scales")
    return Cmvn(shift, scale)


@dataclass(frozen=True, slots=True, eq=False)
class FrontEnd:
    """The front end of one model: how many frames it stacks and how they are normalised."""

    lfr_m: int
    """Frames in a stack: 7 for recognition, 5 for the VAD."""
    lfr_n: int
    """Frames from one stack to the next: 6 for recognition, 1 for the VAD."""
    cmvn: Cmvn | None

    def __post_init__(self) -> None:
        if self.cmvn is not None and len(self.cmvn.shift) != self.lfr_m * MEL_BINS:
            raise CheckpointError(
                f"am.mvn normalises {len(self.cmvn.shift)} values, "
                f"but {self.lfr_m} stacked frames have {self.lfr_m * MEL_BINS}"
            )

    def features(self, samples: FloatArray) -> FloatArray:
        """float32 [L, lfr_m * 80] of a whole clip, with L = ceil(frames / lfr_n)."""
        return self.normalise(low_frame_rate(fbank(samples), self.lfr_m, self.lfr_n))

    def normalise(self, features: FloatArray) -> FloatArray:
        return features if self.cmvn is None else self.cmvn.apply(features)


class FeatureStream:
    """Features of a recording that arrives in blocks.

    Joined, they are `FrontEnd.features` of the whole recording, whatever the block sizes. After
    n samples, all features are out whose stack lies within the 1 + (n - 400) // 160 frames so far.
    """

    def __init__(self, frontend: FrontEnd) -> None:
        self._frontend = frontend
        self._left = (frontend.lfr_m - 1) // 2
        self._samples = np.empty(0, np.float32)
        """Audio from the start of the next frame on."""
        self._frames = np.empty((0, MEL_BINS), np.float32)
        """Frames from `_first` on: those that a later stack still needs."""
        self._first = 0
        self._emitted = 0

    def accept(self, samples: FloatArray) -> FloatArray:
        """float32 [any number, lfr_m * 80]: the features that this block completes."""
        self._samples = np.concatenate((self._samples, samples))
        if len(self._samples) >= FRAME_LENGTH:
            self._add_frames()
        right = self._frontend.lfr_m - 1 - self._left
        return self._emit_until(-(-(self._total - right) // self._frontend.lfr_n))

    def finish(self) -> FloatArray:
        """The features of the recording's end, whose stacks repeat its last frame."""
        if self._total == 0:
            self._add_frames()
        return self._emit_until(-(-self._total // self._frontend.lfr_n))

    @property
    def _total(self) -> int:
        return self._first + len(self._frames)

    def _add_frames(self) -> None:
        new = fbank(self._samples)
        self._frames = np.concatenate((self._frames, new))
        self._samples = self._samples[len(new) * FRAME_SHIFT :]

    def _emit_until(self, end: int) -> FloatArray:
        stride = self._frontend.lfr_n
        centres = np.arange(self._emitted, end) * stride - self._first
        features = _stacked(self._frames, centres, self._frontend.lfr_m)
        self._emitted = max(self._emitted, end)
        unneeded = min(self._emitted * stride - self._left, self._total) - self._first
        if unneeded > 0:
            self._frames = self._frames[unneeded:]
            self._first += unneeded
        return self._frontend.normalise(features)


def _stacked(frames: FloatArray, centres: npt.NDArray[np.intp], stack: int) -> FloatArray:
    if len(centres) == 0:
        return np.empty((0, stack * frames.shape[1]), np.float32)
    offsets = np.arange(stack) - (stack - 1) // 2
    indices = np.clip(centres[:, None] + offsets, 0, len(frames) - 1)
    stacked: FloatArray = frames[indices].reshape(len(centres), stack * frames.shape[1])
    return stacked


def _mel_energies(frames: FloatArray) -> FloatArray:
    """float32 [T, window] of samples to [T, 80], before the logarithm."""
    length = frames.shape[1]
    fft_size = _power_of_two_from(length)
    centred = frames * _INT16_SCALE
    centred -= centred.mean(axis=1, keepdims=True)
    windowed = np.zeros((len(frames), fft_size), np.float32)
    emphasised = windowed[:, :length]
    # The sample before a frame's first counts as equal to it.
    emphasised[:, 0] = centred[:, 0]
    emphasised[:, 1:] = centred[:, :-1]
    emphasised *= -_PRE_EMPHASIS
    emphasised += centred
    emphasised *= _hamming(length)
    spectrum = np.fft.rfft(windowed)
    power: FloatArray = np.square(spectrum.real)
    power += np.square(spectrum.imag)
    return matmul(power, mel_bank(fft_size))


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _hamming(length: int) -> FloatArray:
    """The symmetric Hamming window; numpy's has 0.54 and 0.46 as well."""
    return np.hamming(length).astype(np.float32)


@functools.cache
def mel_bank(fft_size: int) -> FloatArray:
    """float32 [fft_size / 2 + 1, 80]: triangles from 20 Hz to Nyquist, linear on the mel scale."""

    def mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.multiply(1127.0, np.log1p(hertz / 700.0))

    lowest, highest = mel(np.array([_LOWEST_HZ, SAMPLE_RATE / 2]))
    edges = np.linspace(lowest, highest, MEL_BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(fft_size // 2 + 1) * SAMPLE_RATE / fft_size)[:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    bank: FloatArray = np.maximum(np.minimum(rising, falling), 0.0).astype(np.float32)
    return bank


def _am_mvn_vector(text: str, component: str) -> FloatArray:
    # "<AddShift> 400 400 <LearnRateCoef> 0 [ … ]"; the numbers before the bracket are dimensions.
    match = re.search(rf"<{component}>\s+(\d+)\s+\d+[^\[]*\[([^\]]*)\]", text)
    if match is None:
        raise CheckpointError(f"am.mvn has no <{component}> vector")
    try:
        vector = np.array(match[2].split(), np.float32)
    except ValueError as error:
        raise CheckpointError(f"am.mvn: <{component}> is not a list of numbers") from error
    if len(vector) != int(match[1]) or not np.isfinite(vector).all():
        raise CheckpointError(
            f"am.mvn: <{component}> should hold {match[1]} finite numbers, it holds {len(vector)}"
        )
    return vector
