"""The front end against a slow restatement of its definition, and the promises of its stream."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.errors import CheckpointError
from funasr_batch.frontend import (
    MEL_BINS,
    Cmvn,
    FeatureStream,
    FrontEnd,
    fbank,
    low_frame_rate,
    mel_bank,
    parse_am_mvn,
)
from funasr_batch.records import FloatArray

FLOOR = np.log(np.float32(1.1920929e-07))


def noise(samples: int, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


def slow_fbank(samples: FloatArray) -> np.ndarray:
    """Kaldi's definition in float64, one frame and one band at a time."""
    rows = []
    for start in range(0, len(samples) - 399, 160):
        x = samples[start : start + 400].astype(np.float64) * 32768
        x -= x.mean()
        x = x - 0.97 * np.concatenate((x[:1], x[:-1]))
        x *= 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 399)
        power = np.abs(np.fft.fft(x, 512)[:257]) ** 2
        mel = 1127 * np.log(1 + np.arange(257) * 31.25 / 700)
        low, high = 1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700)
        width = (high - low) / (MEL_BINS + 1)
        row = []
        for band in range(MEL_BINS):
            triangle = np.maximum(0, 1 - np.abs(mel - (low + (band + 1) * width)) / width)
            triangle[256] = 0
            row.append(np.log(max(power @ triangle, 1.1920929e-07)))
        rows.append(row)
    return np.array(rows)


def test_fbank_follows_kaldis_definition() -> None:
    # 300 frames cross the boundary between two blocks of the computation.
    samples = noise(400 + 299 * 160)

    difference = fbank(samples) - slow_fbank(samples)

    assert difference.shape == (300, 80)
    assert np.abs(difference).max() < 5e-3
    assert np.sqrt(np.mean(difference**2)) < 1e-4


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (1, 0), (2, 1), (3, 1), (399, 1), (400, 1), (559, 1), (560, 2), (16000, 98)],
)
def test_a_frame_for_each_whole_window_and_one_for_a_shorter_clip(
    samples: int, frames: int
) -> None:
    energies = fbank(noise(samples))

    assert energies.shape == (frames, 80)
    assert energies.dtype == np.float32
    assert np.isfinite(energies).all()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5])
def test_a_constant_signal_is_at_the_floor(level: float) -> None:
    energies = fbank(np.full(1600, level, np.float32))

    # Pre-emphasis follows the removal of the mean, so nothing is left.
    np.testing.assert_array_equal(energies, np.full((8, 80), FLOOR, np.float32))


@pytest.mark.parametrize("hertz", [250, 1000, 4000])
def test_a_tone_is_loudest_in_its_own_band(hertz: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16000)

    loudest = fbank(tone.astype(np.float32)).mean(axis=0).argmax()

    assert mel_bank(512)[hertz * 512 // 16000].argmax() == loudest


def test_the_input_is_left_alone() -> None:
    samples = noise(3200)
    before = samples.copy()
    FrontEnd(7, 6, Cmvn(np.ones(560, np.float32), np.ones(560, np.float32))).features(samples)
    np.testing.assert_array_equal(samples, before)


@given(
    frames=st.integers(1, 60),
    stack=st.integers(1, 9),
    stride=st.integers(1, 8),
)
def test_low_frame_rate_repeats_the_first_and_last_frame(
    frames: int, stack: int, stride: int
) -> None:
    indices = np.arange(frames, dtype=np.float32)[:, None]

    stacked = low_frame_rate(indices, stack, stride)

    assert stacked.tolist() == [
        [min(max(i + j - (stack - 1) // 2, 0), frames - 1) for j in range(stack)]
        for i in range(0, frames, stride)
    ]


def test_stacks_hold_whole_frames_oldest_first() -> None:
    frames = np.arange(3 * 80, dtype=np.float32).reshape(3, 80)

    assert low_frame_rate(frames, 3, 1)[1].tolist() == list(range(240))


@pytest.mark.parametrize(
    ("samples", "features"), [(8000, 8), (16000, 17), (80000, 83), (480000, 500)]
)
def test_lengths_of_paraformers_features(samples: int, features: int) -> None:
    assert FrontEnd(7, 6, None).features(np.zeros(samples, np.float32)).shape == (features, 560)


AM_MVN = """<Nnet>
<Splice> 2 2
[ 0 ]
<AddShift> 2 2
<LearnRateCoef> 0 [ -8.25 -9.5 ]
<Rescale> 2 2
<LearnRateCoef> 0 [ 0.125 2e-1 ]
</Nnet>
"""


def test_am_mvn_shifts_before_it_scales() -> None:
    cmvn = parse_am_mvn(AM_MVN)

    normalised = cmvn.apply(np.array([[8.25, 10.5], [9.25, 9.5]], np.float32))

    np.testing.assert_allclose(normalised, [[0, 0.2], [0.125, 0]], rtol=1e-6)
    assert normalised.dtype == np.float32


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("<AddShift>", "<Shift>", "no <AddShift>"),
        ("<Rescale> 2 2", "<Rescale>", "no <Rescale>"),
        ("-9.5 ]", "]", "should hold 2 finite numbers, it holds 1"),
        ("2e-1", "nan", "finite"),
        ("2e-1", "two", "not a list of numbers"),
        ("<Rescale> 2 2\n<LearnRateCoef> 0 [ 0.125 2e-1 ]", "<Rescale> 1 1 [ 1 ]", "2 shifts"),
    ],
)
def test_a_damaged_am_mvn_is_refused(old: str, new: str, complaint: str) -> None:
    assert old in AM_MVN
    with pytest.raises(CheckpointError, match=complaint):
        parse_am_mvn(AM_MVN.replace(old, new))


def test_normalisation_of_another_width_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"2 values.* 7 stacked frames have 560"):
        FrontEnd(7, 6, parse_am_mvn(AM_MVN))


def in_blocks(stream: FeatureStream, samples: FloatArray, sizes: list[int]) -> FloatArray:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(stream.accept(samples[position : position + size]))
        position += size
    return np.concatenate((*pieces, stream.accept(samples[position:]), stream.finish()))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(0, 6000),
    sizes=st.lists(st.integers(0, 1500), max_size=8),
    lfr=st.sampled_from([(7, 6), (5, 1), (1, 1), (2, 5)]),
)
def test_a_stream_gives_what_the_whole_gives(
    length: int, sizes: list[int], lfr: tuple[int, int]
) -> None:
    width = lfr[0] * MEL_BINS
    cmvn = Cmvn(noise(width, 1), noise(width, 2))
    frontend = FrontEnd(*lfr, cmvn)
    samples = noise(length)

    streamed = in_blocks(FeatureStream(frontend), samples, sizes)

    np.testing.assert_allclose(streamed, frontend.features(samples), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 2000), max_size=8))
def test_a_stream_holds_back_only_what_later_frames_complete(sizes: list[int]) -> None:
    stream = FeatureStream(FrontEnd(5, 1, None))
    heard = given_out = 0
    for size in sizes:
        heard += size
        given_out += len(stream.accept(noise(size)))
        frames = 1 + (heard - 400) // 160 if heard >= 400 else 0
        assert given_out == max(0, frames - 2)
