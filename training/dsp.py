"""Resampling, time stretching and simple recording channels in numpy, for one core each.

Audio is float32 [samples] with full scale 1.0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_ZERO_CROSSINGS = 16
_PASS_BAND = 0.94
"""Cut-off of the resampler as a part of the lower Nyquist frequency."""
_MIN_BLOCK = 256


def resample(audio: FloatArray, up: int, down: int) -> FloatArray:
    """Change the rate by `up / down` with a Hann-windowed sinc of 16 zero crossings a side.

    Every `down` input samples give `up` output samples through the same filters, so the whole is
    one product of overlapping input blocks with a matrix that holds these filters in its columns.

    Returns float32 [ceil(samples * up / down)].
    """
    repeat = max(1, -(-_MIN_BLOCK // down))
    filters, reach = _filters(up * repeat, down * repeat)
    step = down * repeat
    length = -(-len(audio) * up // down)
    blocks = max(1, -(-len(audio) // step))
    padded = np.zeros(blocks * step + 2 * reach, dtype=np.float32)
    padded[reach : reach + len(audio)] = audio
    windows = np.lib.stride_tricks.sliding_window_view(padded, step + 2 * reach)[::step]
    return np.asarray(windows @ filters, dtype=np.float32).reshape(-1)[:length]


@lru_cache(maxsize=64)
def _filters(up: int, down: int) -> tuple[FloatArray, int]:
    """Filters float32 [down + 2 * reach, up] and how far they reach past the block."""
    cut_off = _PASS_BAND * min(1.0, up / down)
    width = _ZERO_CROSSINGS / cut_off
    reach = int(np.ceil(width))
    inputs = np.arange(down + 2 * reach)[:, None] - reach
    distance = np.arange(up)[None, :] * (down / up) - inputs
    window = np.where(np.abs(distance) < width, 0.5 + 0.5 * np.cos(np.pi * distance / width), 0.0)
    filters: FloatArray = (cut_off * np.sinc(cut_off * distance) * window).astype(np.float32)
    return filters, reach


def stretch(audio: FloatArray, factor: float, rate: int) -> FloatArray:
    """Make `audio` `factor` times as long at the same pitch (WSOLA, Verhelst and Roelands 1993).

    Frames of 32 ms are overlapped by half; each is shifted by up to 8 ms to where it continues the
    frame before it best.
    """
    frame = rate * 32 // 1000 // 2 * 2
    hop, tolerance = frame // 2, rate * 8 // 1000
    frames = max(1, round(len(audio) * factor / hop))
    padded = np.pad(audio, (tolerance, frame + hop + 2 * tolerance))
    window = np.hanning(frame + 1)[:frame].astype(np.float32)
    stretched = np.zeros((frames + 1) * hop, dtype=np.float32)
    natural = padded[tolerance : tolerance + frame]
    for index in range(frames):
        centre = min(round(index * hop / factor), len(audio)) + tolerance
        region = padded[centre - tolerance : centre + tolerance + frame]
        shift = int(np.argmax(np.correlate(region, natural, "valid")))
        start = centre - tolerance + shift
        stretched[index * hop : index * hop + frame] += window * padded[start : start + frame]
        natural = padded[start + hop : start + hop + frame]
        if len(natural) < frame:
            natural = np.pad(natural, (0, frame - len(natural)))
    return stretched[: round(len(audio) * factor)]


def reverberate(
    audio: FloatArray, rate: int, decay: float, wet: float, rng: np.random.Generator
) -> FloatArray:
    """Add a room: noise that decays by 60 dB in `decay` seconds, `wet` times as strong as the
    direct sound. The length stays, so token times hold."""
    taps = int(decay * rate)
    tail = rng.standard_normal(taps).astype(np.float32)
    tail *= np.exp(-6.9 * np.arange(taps, dtype=np.float32) / taps)
    tail *= wet / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    size = _fft_size(len(audio) + taps)
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(tail, size)
    return np.fft.irfft(spectrum, size)[: len(audio)].astype(np.float32)


def band_limit(audio: FloatArray, rate: int, low: float, high: float) -> FloatArray:
    """Keep `low` to `high` Hz, with edges that fall over a sixth of an octave or so."""
    size = _fft_size(len(audio))
    frequency = np.fft.rfftfreq(size, 1 / rate)
    response = 1 / (1 + (low / np.maximum(frequency, 1e-3)) ** 8) / (1 + (frequency / high) ** 24)
    limited = np.fft.irfft(np.fft.rfft(audio, size) * response, size)
    return limited[: len(audio)].astype(np.float32)


def mu_law(audio: FloatArray) -> FloatArray:
    """Quantise to the 8 bits of ITU-T G.711 mu-law (its continuous form)."""
    compressed = np.sign(audio) * np.log1p(255 * np.minimum(np.abs(audio), 1)) / np.log(256)
    levels = np.round(compressed * 127) / 127
    return np.asarray(
        np.sign(levels) * np.expm1(np.abs(levels) * np.log(256)) / 255, dtype=np.float32
    )


def _fft_size(length: int) -> int:
    """The next length of the form 2^k or 3 * 2^k."""
    size = 1 << max(length - 1, 1).bit_length()
    return size * 3 // 4 if length <= size * 3 // 4 else size
