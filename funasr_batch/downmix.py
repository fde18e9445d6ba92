"""Many channels to one: the mean, one channel, or one channel where the mean would cancel.

A stereo recording with one microphone wired the wrong way round has the same voice in both
channels with opposite signs; its mean is silence. Each window of the recording is looked at by
itself, so nothing has to be known of the rest, and the gain moves from one choice to another
within `FADE_SECONDS`, so that a change is not heard as a click.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from funasr_batch.records import FloatArray

WINDOW_SECONDS = 0.5
"""How much is judged at a time: many periods of any voice, and short enough to lose little."""
FADE_SECONDS = 0.01
CANCELS_BELOW = 0.2
ADDS_UP_ABOVE = 0.5
"""Between the two the last choice stands. For the measure see `_coherence`."""
SILENCE_POWER = 1e-6
"""A channel power of -60 dBFS; below it there is nothing to judge."""


class Downmixer:
    """Mixes one recording, window by window, in time order."""

    def __init__(self, channel: int | None = None) -> None:
        """`channel` counts from 1; None mixes all of them."""
        self._wanted = channel
        self._cancelling: int | None = None
        self._weights = np.zeros(0, np.float32)
        self._channels = 1
        self._cancelled: Counter[int] = Counter()

    def mix(self, window: FloatArray, rate: int) -> FloatArray:
        """float32 [n, channels] at `rate` Hz -> float32 [n]."""
        self._channels = window.shape[1]
        if self._channels == 1:
            return window[:, 0]
        if self._wanted is not None:
            return np.ascontiguousarray(window[:, self._wanted - 1])
        self._judge(window)
        if self._cancelling is not None:
            self._cancelled[self._cancelling] += len(window)
        return self._blend(window, rate)

    @property
    def description(self) -> str:
        """`mono`, `mean`, `channel N` or `antiphase: channel N`, with N from 1."""
        if self._channels == 1:
            return "mono"
        if self._wanted is not None:
            return f"channel {self._wanted}"
        if self._cancelled:
            return f"antiphase: channel {self._cancelled.most_common(1)[0][0] + 1}"
        return "mean"

    def _judge(self, window: FloatArray) -> None:
        if self._cancelling is not None and self._cancelling >= window.shape[1]:
            self._cancelling = None
        powers, coherence = _coherence(window)
        if powers.mean() < SILENCE_POWER:
            return
        if coherence > ADDS_UP_ABOVE:
            self._cancelling = None
        elif coherence < CANCELS_BELOW and self._cancelling is None:
            self._cancelling = int(powers.argmax())

    def _blend(self, window: FloatArray, rate: int) -> FloatArray:
        channels = window.shape[1]
        weights = np.full(channels, 1 / channels, np.float32)
        if self._cancelling is not None:
            weights[:] = 0
            weights[self._cancelling] = 1
        mixed: FloatArray = window @ weights
        before, self._weights = self._weights, weights
        if len(before) == channels and not np.array_equal(before, weights):
            fade = window[: max(1, round(rate * FADE_SECONDS))]
            falling = np.linspace(1, 0, len(fade), endpoint=False, dtype=np.float32)
            mixed[: len(fade)] += falling * (fade @ (before - weights))
        return mixed


def _coherence(window: FloatArray) -> tuple[FloatArray, float]:
    """The power of each channel [channels], and the power of the sum over the sum of the powers.

    The ratio is the number of channels when all are alike, 1 when they have nothing in common
    (also when only one sounds), 0 when they cancel. Constant offsets are left out.
    """
    frames, channels = window.shape
    means = np.ones(frames, np.float32) @ window / frames
    powers = np.einsum("nc,nc->c", window, window) / frames - np.square(means)
    added = window @ np.ones(channels, np.float32)
    together = float(added @ added / frames - np.square(means.sum()))
    return powers, together / max(float(powers.sum()), 1e-30)
