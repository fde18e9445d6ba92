"""Training must see the features that recognition computes."""

from __future__ import annotations

import numpy as np
import pytest

from funasr_batch.frontend import fbank, low_frame_rate

mx = pytest.importorskip("mlx.core")

from training.features import log_mel, stack_frames  # noqa: E402

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("size", [16_000, 23_457])
def test_log_mel_is_fbank(size: int) -> None:
    waves = RNG.standard_normal((2, size)).astype(np.float32) * 0.1
    mel = np.array(log_mel(mx.array(waves)))
    for wave, row in zip(waves, mel, strict=True):
        np.testing.assert_allclose(row, fbank(wave), atol=2e-3)


def test_stacking_pads_each_item_by_its_own_length() -> None:
    frames = RNG.standard_normal((3, 61, 80)).astype(np.float32)
    counts = np.array([61, 40, 7], dtype=np.int32)
    stacked = np.array(stack_frames(mx.array(frames), mx.array(counts)))
    for row, item, count in zip(stacked, frames, counts, strict=True):
        expected = low_frame_rate(item[:count], 7, 6)
        np.testing.assert_array_equal(row[: len(expected)], expected)
