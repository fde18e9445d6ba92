"""The front end and the noise of training, on the device and in batches.

`log_mel` computes what `funasr_batch.frontend.fbank` computes, for a padded batch of waveforms;
`tests/test_training_features.py` holds the two together.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from funasr_batch.frontend import mel_bank

FRAME, SHIFT, FFT = 400, 160, 512
_FLOOR = 1.1920929e-07
_WINDOW = mx.array((0.54 - 0.46 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))), mx.float32)
_MEL = mx.array(mel_bank(FFT))


def log_mel(waves: mx.array) -> mx.array:
    """waves float32 [B, S] with full scale 1.0 -> log mel energies float32 [B, frames, 80]."""
    batch, size = waves.shape
    frames = 1 + (size - FRAME) // SHIFT
    waves = mx.contiguous(waves * 32768.0)
    x = mx.as_strided(waves, (batch, frames, FRAME), (size, SHIFT, 1))
    x = x - mx.mean(x, axis=-1, keepdims=True)
    previous = mx.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    x = mx.pad((x - 0.97 * previous) * _WINDOW, [(0, 0), (0, 0), (0, FFT - FRAME)])
    spectrum = mx.fft.rfft(x, axis=-1)
    power = mx.square(mx.real(spectrum)) + mx.square(mx.imag(spectrum))
    return mx.log(mx.maximum(power @ _MEL, _FLOOR))


def stack_frames(mel: mx.array, frame_counts: mx.array) -> mx.array:
    """Low frame rate 7/6 of each item by its own length: [B, F, 80] -> [B, ceil(F / 6), 560]."""
    batch, frames, bins = mel.shape
    length = -(-frames // 6)
    index = mx.arange(length)[:, None] * 6 + mx.arange(7)[None, :] - 3
    index = mx.clip(index.reshape(1, -1), 0, (frame_counts - 1)[:, None])
    stacked = mx.take_along_axis(mel, index[..., None], axis=1)
    return stacked.reshape(batch, length, 7 * bins)


def add_noise(waves: mx.array, noise: mx.array, snr_db: mx.array, gain_db: mx.array) -> mx.array:
    """Mixes noise [B, S] into waves [B, S] at `snr_db` [B], then scales by `gain_db` [B]."""
    speech = mx.sqrt(mx.mean(mx.square(waves), axis=1, keepdims=True) + 1e-10)
    level = mx.sqrt(mx.mean(mx.square(noise), axis=1, keepdims=True) + 1e-10)
    mixed = waves + noise * (speech / level) * mx.power(10.0, -snr_db / 20)[:, None]
    peak = mx.max(mx.abs(mixed), axis=1, keepdims=True) + 1e-5
    return mixed / peak * mx.power(10.0, gain_db / 20)[:, None]


def augment_mel(mel: mx.array, key: mx.array) -> mx.array:
    """Random vocal tract length and equaliser curve, then SpecAugment: two masks on each axis.

    Sources: Jaitly and Hinton 2013, "Vocal Tract Length Perturbation"; Park et al. 2019.
    """
    batch, frames, bins = mel.shape
    keys = mx.random.split(key, 4)
    mel = _warp_frequencies(mel, keys[3])
    curve = mx.random.normal((batch, 6), key=keys[0]) * 1.5
    position = mx.linspace(0, 5, bins)
    left = mx.clip(mx.floor(position), 0, 4).astype(mx.int32)
    share = position - left
    mel = mel + (curve[:, left] * (1 - share) + curve[:, left + 1] * share)[:, None, :]
    mean = mx.mean(mel, axis=(1, 2), keepdims=True)
    mel = mx.where(_masks(batch, bins, 10, keys[1])[:, None, :], mean, mel)
    return mx.where(_masks(batch, frames, 8, keys[2])[:, :, None], mean, mel)


def _warp_frequencies(mel: mx.array, key: mx.array) -> mx.array:
    """Reads each item's bins at positions scaled by 0.9 to 1.1 and shifted by up to 2 bins."""
    batch, _, bins = mel.shape
    draw = mx.random.uniform(-1, 1, (2, batch, 1), key=key)
    position = mx.clip(
        mx.arange(bins)[None, :] * (1 + 0.1 * draw[0]) + 2 * draw[1], 0, bins - 1.001
    )
    left = mx.floor(position).astype(mx.int32)
    share = (position - left)[:, None, :]
    low = mx.take_along_axis(mel, left[:, None, :], axis=2)
    high = mx.take_along_axis(mel, left[:, None, :] + 1, axis=2)
    return low * (1 - share) + high * share


def _masks(batch: int, size: int, longest: int, key: mx.array) -> mx.array:
    """bool [B, size]: true inside two random stretches of up to `longest`."""
    start_key, length_key = mx.random.split(key)
    start = mx.random.uniform(0, size, (batch, 2, 1), key=start_key)
    length = mx.random.uniform(0, longest, (batch, 2, 1), key=length_key)
    place = mx.arange(size)[None, None, :]
    return mx.any((place >= start) & (place < start + length), axis=1)
