"""Segments by their invariants, on scripted VADs over synthetic audio and on real recordings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from funasr_batch.errors import UsageError
from funasr_batch.frontend import FrontEnd
from funasr_batch.records import FRAME_SAMPLES, SAMPLE_RATE, Clip, FloatArray, Span
from funasr_batch.segments import (
    HOP,
    VAD_LAG,
    ContextCutter,
    Segmenter,
    SegmentPolicy,
    WindowCutter,
)

SECOND = SAMPLE_RATE


class ScriptedVad:
    """Reports given spans, each `lag` samples after its end, as a VAD with a hangover does."""

    def __init__(self, spans: Sequence[Span], lag: int = 0) -> None:
        self._left = list(spans)
        self._lag = lag
        self._heard = 0
        self._last_end = 0

    @property
    def pending(self) -> int:
        silent_until = max(self._last_end, self._heard - self._lag)
        return min(silent_until, self._left[0].start) if self._left else silent_until

    def accept(self, samples: FloatArray) -> list[Span]:
        self._heard += len(samples)
        return self._take(self._heard - self._lag)

    def finish(self) -> list[Span]:
        return self._take(self._heard)

    def _take(self, until: int) -> list[Span]:
        spans = []
        while self._left and self._left[0].end <= until:
            spans.append(self._left.pop(0))
            self._last_end = spans[-1].end
        return spans


def noise(seconds: float, seed: int = 0) -> FloatArray:
    """Noise whose level changes every 100 ms, from digital silence to loud."""
    generator = np.random.default_rng(seed)
    steps = round(seconds * 10)
    levels = generator.choice([0.0, 0.003, 0.03, 0.3], size=steps)
    samples = np.repeat(levels, SECOND // 10) * generator.uniform(-1, 1, steps * SECOND // 10)
    return samples.astype(np.float32)


def loud_with_pauses(seconds: float, pauses: Iterable[float], level: float = 0.01) -> FloatArray:
    """Loud noise that is `level` times as loud for 240 ms around each of the given times."""
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, round(seconds * SECOND))
    for pause in pauses:
        audio[round((pause - 0.12) * SECOND) : round((pause + 0.12) * SECOND)] *= level
    return audio.astype(np.float32)


def blocks_of(audio: FloatArray, sizes: Sequence[int]) -> Iterable[FloatArray]:
    """The audio in blocks of the given sizes, over and over."""
    start, turn = 0, 0
    while start < len(audio):
        size = sizes[turn % len(sizes)]
        yield audio[start : start + size]
        start, turn = start + size, turn + 1


def run(
    cutter: Segmenter | WindowCutter | ContextCutter, audio: FloatArray, sizes: Sequence[int]
) -> list[Clip]:
    clips = []
    for block in blocks_of(audio, sizes):
        clips += cutter.accept(block)
    return clips + cutter.finish()


def segment(
    audio: FloatArray, spans: Sequence[Span], policy: SegmentPolicy | None = None, lag: int = 0
) -> list[tuple[float, float]]:
    """Start and end of each segment in seconds, by way of one-second blocks."""
    segmenter = Segmenter(policy or SegmentPolicy(), ScriptedVad(spans, lag))
    clips = run(segmenter, audio, [SECOND])
    return [(clip.segment.start / SECOND, clip.segment.end / SECOND) for clip in clips]


def most_held(vad: ScriptedVad, audio: FloatArray) -> int:
    segmenter = Segmenter(SegmentPolicy(), vad)
    held = []
    for block in blocks_of(audio, [SECOND]):
        segmenter.accept(block)
        held.append(segmenter.held_samples)
    return max(held)


def seconds(*spans: tuple[float, float]) -> list[Span]:
    return [Span(round(start * SECOND), round(end * SECOND)) for start, end in spans]


def check_clips(clips: Sequence[Clip], audio: FloatArray, longest: int) -> None:
    assert [clip.segment.index for clip in clips] == list(range(len(clips)))
    for clip in clips:
        start, end = clip.segment.start, clip.segment.end
        assert 0 <= start < end <= len(audio)
        assert end - start <= longest
        assert start % HOP == 0
        assert end % HOP == 0 or end == len(audio)
        assert clip.samples.dtype == np.float32
        assert np.array_equal(clip.samples, audio[start:end])


# --- short speech: merging ---------------------------------------------------------------------


def test_no_speech_no_segments() -> None:
    assert segment(noise(30), []) == []
    assert segment(np.zeros(0, np.float32), []) == []


def test_neighbours_are_merged_up_to_the_target() -> None:
    spans = seconds((1, 4), (4.5, 8), (8.5, 12.9), (13.2, 15))
    assert segment(noise(40), spans) == [(1, 12.9), (13.2, 15)]


def test_distant_neighbours_are_not_merged() -> None:
    spans = seconds((1, 2), (3, 4), (5.01, 6))
    assert segment(noise(10), spans) == [(1, 4), (5.01, 6)]


def test_an_open_span_waits_with_its_neighbour_until_it_is_too_long_for_it() -> None:
    audio = noise(60)
    assert segment(audio, seconds((0, 2), (2.5, 30)), lag=SECOND)[0] == (0, 2)
    assert segment(audio, seconds((0, 2), (2.5, 11)), lag=SECOND) == [(0, 11)]
    patient = SegmentPolicy(target_seconds=28)
    assert segment(audio, seconds((0, 2), (2.5, 27)), patient) == [(0, 27)]


def test_spans_that_touch_are_one_stretch_of_speech() -> None:
    """A VAD's own cap at 20 s does not decide the cut, the pause at 26 s does."""
    audio = loud_with_pauses(50, [8, 26])
    assert segment(audio, seconds((0, 20), (20, 50))) == [(0, 26), (26, 50)]


def test_boundaries_are_rounded_outwards_to_the_frame_grid() -> None:
    spans = [Span(1_001, 3_001), Span(40_001, 41_000)]
    policy = SegmentPolicy(max_gap_seconds=0)
    clips = run(Segmenter(policy, ScriptedVad(spans)), noise(10), [SECOND])
    assert [(clip.segment.start, clip.segment.end) for clip in clips] == [
        (960, 3_040),
        (40_000, 41_120),
    ]


def test_spans_on_the_same_grid_step_stay_disjoint() -> None:
    spans = [Span(0, 1_601), Span(1_603, 1_700), Span(1_701, 4_000)]
    policy = SegmentPolicy(max_gap_seconds=0)
    clips = run(Segmenter(policy, ScriptedVad(spans)), noise(1), [SECOND])
    assert [(clip.segment.start, clip.segment.end) for clip in clips] == [
        (0, 1_760),
        (1_760, 4_000),
    ]


def test_padding_stops_in_the_middle_of_a_pause_and_at_the_recordings_ends() -> None:
    policy = SegmentPolicy(max_gap_seconds=0, pad_seconds=0.4)
    spans = seconds((0.1, 2), (2.5, 4), (8, 9.9))
    assert segment(noise(10), spans, policy) == [(0, 2.25), (2.25, 4.4), (7.6, 10)]


def test_padding_does_not_lengthen_beyond_the_limit() -> None:
    policy = SegmentPolicy(max_seconds=10, pad_seconds=0.4)
    assert segment(noise(20), seconds((5, 14.5)), policy) == [(4.6, 14.6)]


# --- long speech: splitting --------------------------------------------------------------------


def test_long_speech_is_split_at_its_pauses() -> None:
    """Of the pauses at 18, 22 and 26.5 s the deepest one is taken, not the last."""
    audio = loud_with_pauses(90, [10, 22, 40, 62])
    audio *= loud_with_pauses(90, [18, 26.5], level=0.1) / loud_with_pauses(90, [])
    assert segment(audio, seconds((0, 90))) == [(0, 22), (22, 40), (40, 62), (62, 90)]


def test_a_little_over_the_limit_leaves_no_crumb() -> None:
    """The only pause is 1 s before the end; a cut there would leave a crumb."""
    audio = loud_with_pauses(31, [30])
    (first, second) = segment(audio, seconds((0, 31)))
    assert first[1] == second[0]
    assert min(first[1] - first[0], second[1] - second[0]) >= 7.5


def test_exactly_the_limit_is_not_split() -> None:
    assert segment(noise(70), seconds((10, 40))) == [(10, 40)]


def test_speech_without_any_end_is_cut_before_the_vad_reports_it() -> None:
    """The rest of the recording comes after 70 s, the first piece long before that."""
    audio = loud_with_pauses(70, [25])
    segmenter = Segmenter(SegmentPolicy(), ScriptedVad(seconds((0, 70))))
    early = [clip for block in blocks_of(audio, [SECOND]) for clip in segmenter.accept(block)]
    assert [clip.segment.end for clip in early[:1]] == [pytest.approx(25 * SECOND)]


class ForgetfulVad(ScriptedVad):
    """Opens a span at 0 and never reports it."""

    pending = 0

    def __init__(self) -> None:
        super().__init__([])


def test_speech_that_the_vad_takes_back_is_not_held() -> None:
    assert most_held(ForgetfulVad(), noise(200)) <= 37.5 * SECOND + VAD_LAG + 2 * SECOND


def test_spans_that_touch_without_end_are_not_held() -> None:
    vad = ScriptedVad([Span(start * SECOND, (start + 5) * SECOND) for start in range(0, 200, 5)])
    assert most_held(vad, noise(200)) <= 37.5 * SECOND + VAD_LAG + 2 * SECOND


# --- properties --------------------------------------------------------------------------------

policies = st.builds(
    SegmentPolicy,
    max_seconds=st.sampled_from([1.0, 2.37, 5.0, 12.0, 30.0]),
    target_seconds=st.sampled_from([0.0, 1.5, 12.0, 30.0]),
    max_gap_seconds=st.sampled_from([0.0, 0.2, 1.0]),
    pad_seconds=st.sampled_from([0.0, 0.0, 0.1, 0.4]),
    window_seconds=st.sampled_from([1.0, 7.77, 20.0]),
    overlap_seconds=st.sampled_from([0.0, 0.5, 2.0, 9.0]),
    piece_seconds=st.sampled_from([1.0, 3.33, 10.0]),
    left_context_seconds=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    right_context_seconds=st.sampled_from([0.0, 0.5, 2.0, 12.0]),
)
block_sizes = st.lists(
    st.integers(1_000, 4 * SECOND) | st.sampled_from([1_600, SECOND]), min_size=1, max_size=5
)
lags = st.integers(0, VAD_LAG) | st.integers(-1_600, 0)
"""Below 0: the VAD announces the padding that it adds to a span before the audio is there."""


@st.composite
def recordings(draw: st.DrawFn) -> tuple[FloatArray, list[Span]]:
    """Audio of up to two minutes and the spans of a VAD in it; some of them touch."""
    pieces = draw(
        st.lists(
            st.tuples(
                st.integers(0, 4 * SECOND) | st.just(0),
                st.integers(1, 2 * SECOND) | st.integers(1, 70 * SECOND),
            ),
            max_size=12,
        )
    )
    spans: list[Span] = []
    position = 0
    for gap, length in pieces:
        if position + gap + length > 120 * SECOND:
            break
        spans.append(Span(position + gap, position + gap + length))
        position = spans[-1].end
    total = position + draw(st.integers(0, 3 * SECOND) | st.sampled_from([0, 25 * SECOND]))
    audio = noise(total / SECOND + 1, draw(st.integers(0, 9)))[:total]
    return audio, spans


@settings(max_examples=100, deadline=None)
@given(recordings(), policies, block_sizes, lags)
def test_segments_hold_all_speech_once_within_limits(
    recording: tuple[FloatArray, list[Span]], policy: SegmentPolicy, sizes: list[int], lag: int
) -> None:
    audio, spans = recording
    segmenter = Segmenter(policy, ScriptedVad(spans, lag))
    clips = run(segmenter, audio, sizes)

    check_clips(clips, audio, longest=round(policy.max_seconds * SECOND))
    assert all(a.segment.end <= b.segment.start for a, b in pairwise(clips))
    assert all(clip.segment.overlap == 0 for clip in clips)
    segmented = np.zeros(len(audio), bool)
    for clip in clips:
        segmented[clip.segment.start : clip.segment.end] = True
    speech = np.zeros(len(audio), bool)
    for span in spans:
        assert segmented[span.start : span.end].all()
        speech[span.start : span.end] = True
    assert all(speech[clip.segment.start : clip.segment.end].any() for clip in clips)


@settings(max_examples=60, deadline=None)
@given(recordings(), policies, block_sizes, lags)
def test_blocks_and_the_vads_lag_change_nothing(
    recording: tuple[FloatArray, list[Span]], policy: SegmentPolicy, sizes: list[int], lag: int
) -> None:
    audio, spans = recording
    at_once = run(Segmenter(policy, ScriptedVad(spans)), audio, [max(len(audio), 1)])
    in_blocks = run(Segmenter(policy, ScriptedVad(spans, lag)), audio, sizes)
    assert [clip.segment for clip in in_blocks] == [clip.segment for clip in at_once]


@settings(max_examples=60, deadline=None)
@given(recordings(), policies, block_sizes, lags)
def test_held_audio_stays_within_the_stated_bound(
    recording: tuple[FloatArray, list[Span]], policy: SegmentPolicy, sizes: list[int], lag: int
) -> None:
    audio, spans = recording
    segmenter = Segmenter(policy, ScriptedVad(spans, lag))
    bound = (
        round(
            (1.25 * policy.max_seconds + policy.max_gap_seconds + 2 * policy.pad_seconds) * SECOND
        )
        + VAD_LAG
        + 2 * max(sizes)
    )
    for block in blocks_of(audio, sizes):
        segmenter.accept(block)
        assert segmenter.held_samples <= bound


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60 * SECOND), policies, block_sizes, st.integers(0, 9))
@example(0, SegmentPolicy(), [SECOND], 0)
@example(20 * SECOND + 1, SegmentPolicy(), [SECOND], 0)
def test_windows_cover_everything_with_the_stated_overlap(
    total: int, policy: SegmentPolicy, sizes: list[int], seed: int
) -> None:
    audio = noise(total / SECOND + 1, seed)[:total]
    cutter = WindowCutter(policy)
    window = min(policy.window_seconds, policy.max_seconds)
    clips = []
    for block in blocks_of(audio, sizes):
        clips += cutter.accept(block)
        assert cutter.held_samples <= 1.25 * window * SECOND + 2 * max(sizes)
    clips += cutter.finish()

    check_clips(clips, audio, longest=round(window * SECOND))
    if total == 0:
        assert clips == []
        return
    segments = [clip.segment for clip in clips]
    assert (segments[0].start, segments[0].overlap, segments[-1].end) == (0, 0, total)
    overlap = min(policy.overlap_seconds, window / 4) * SECOND
    for before, after in pairwise(segments):
        assert before.end - after.start == after.overlap
        assert overlap - 2 * HOP < after.overlap <= overlap
        assert after.end - before.end >= window / 4 * SECOND - HOP
    assert all(a.end <= c.start for a, c in zip(segments, segments[2:], strict=False))

    at_once = run(WindowCutter(policy), audio, [total])
    assert [clip.segment for clip in at_once] == segments


def test_a_windows_overlap_is_centred_on_a_pause() -> None:
    clips = run(WindowCutter(SegmentPolicy()), loud_with_pauses(30, [17.5]), [SECOND])
    first, second = (clip.segment for clip in clips)
    assert (second.start + first.end) / 2 == pytest.approx(17.5 * SECOND)


def test_silence_is_cut_into_windows_too() -> None:
    clips = run(WindowCutter(SegmentPolicy()), np.zeros(60 * SECOND, np.float32), [SECOND])
    assert [(c.segment.start / SECOND, c.segment.end / SECOND) for c in clips] == [
        (0, 20),
        (18, 38),
        (36, 55),
        (53, 60),
    ]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60 * SECOND), policies, block_sizes, st.integers(0, 9))
@example(0, SegmentPolicy(), [SECOND], 0)
@example(10 * SECOND + 1, SegmentPolicy(), [SECOND], 0)
def test_pieces_touch_and_have_the_audio_around_them(
    total: int, policy: SegmentPolicy, sizes: list[int], seed: int
) -> None:
    audio = noise(total / SECOND + 1, seed)[:total]
    cutter = ContextCutter(policy)
    piece = min(policy.piece_seconds, policy.max_seconds) * SECOND
    left, right = policy.left_context_seconds * SECOND, policy.right_context_seconds * SECOND
    clips = []
    for block in blocks_of(audio, sizes):
        clips += cutter.accept(block)
        # A quarter of a piece is rounded up to a frame.
        most = left + piece + max(right, piece / 4 + FRAME_SAMPLES)
        assert cutter.held_samples <= most + 2 * max(sizes)
    clips += cutter.finish()

    segments = [clip.segment for clip in clips]
    assert [segment.index for segment in segments] == list(range(len(clips)))
    edges = [0, *(segment.end for segment in segments)]
    assert [segment.start for segment in segments] == edges[:-1]
    assert edges[-1] == total
    for clip in clips:
        start, end = clip.segment.start, clip.segment.end
        assert 0 < end - start <= piece
        assert end - start >= piece / 4 - FRAME_SAMPLES or total < piece / 4
        assert clip.segment.overlap == 0
        assert clip.lead == min(start, left // FRAME_SAMPLES * FRAME_SAMPLES)
        assert clip.tail == min(total - end, right // FRAME_SAMPLES * FRAME_SAMPLES)
        assert start % FRAME_SAMPLES == clip.lead % FRAME_SAMPLES == 0
        assert np.array_equal(clip.samples, audio[start - clip.lead : end + clip.tail])

    at_once = run(ContextCutter(policy), audio, [max(total, 1)])
    assert [clip.segment for clip in at_once] == segments


@pytest.mark.parametrize("total", [60 * SECOND, 60 * SECOND + 399, 33 * SECOND + 401, 400])
def test_the_frames_of_all_pieces_are_those_of_the_whole_recording(total: int) -> None:
    audio = noise(61, 3)[:total]
    frontend = FrontEnd(7, 6, None)
    own = []
    for clip in run(ContextCutter(SegmentPolicy()), audio, [SECOND]):
        first = clip.lead // FRAME_SAMPLES
        after = first - (clip.segment.start - clip.segment.end) // FRAME_SAMPLES
        own.append(frontend.features(clip.samples)[first:after])
    whole = frontend.features(audio)
    # Frames are the same samples, in other rows of a matrix product: float32 rounding alone.
    np.testing.assert_allclose(np.concatenate(own), whole, rtol=0, atol=1e-4)


def test_a_piece_ends_on_a_pause() -> None:
    clips = run(ContextCutter(SegmentPolicy()), loud_with_pauses(30, [8.5, 17.1]), [SECOND])
    ends = [clip.segment.end / SECOND for clip in clips]
    # Half a frame off the middle of the pause at most: cuts lie between encoder frames.
    assert ends[:2] == pytest.approx([8.5, 17.1], abs=0.03)


def test_a_piece_is_there_as_soon_as_its_end_and_context_are_known() -> None:
    """10 s at most and a quarter of that for the one that follows; not the end of the hour."""
    cutter = ContextCutter(SegmentPolicy())
    heard = [len(cutter.accept(block)) for block in blocks_of(noise(60), [SECOND // 2])]
    assert heard.index(1) == 24
    assert sum(heard) > 4


# --- policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, float("nan"), float("inf")])
def test_a_senseless_limit_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="max_seconds"):
        SegmentPolicy(max_seconds=value)


@pytest.mark.parametrize(
    "name",
    [
        *("target_seconds", "max_gap_seconds", "pad_seconds", "overlap_seconds"),
        *("left_context_seconds", "right_context_seconds"),
    ],
)
def test_negative_durations_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        replace(SegmentPolicy(), **{name: -0.1})


# --- real recordings ---------------------------------------------------------------------------


def test_real_speech_is_split_in_its_pauses(shared_data: Path) -> None:
    """70 s of real speech taken for one span: every cut is far below the mean level."""
    audio, rate = soundfile.read(shared_data / "vad" / "funasr_vad_example.wav", dtype="float32")
    assert rate == SAMPLE_RATE
    clips = run(Segmenter(SegmentPolicy(), ScriptedVad([Span(0, len(audio))])), audio, [SECOND])
    assert len(clips) in (3, 4)
    mean_power = float(np.mean(audio**2))
    for clip in clips[:-1]:
        around = audio[clip.segment.end - 1_600 : clip.segment.end + 1_600]
        assert float(np.mean(around**2)) < 0.02 * mean_power


def test_speech_is_split_before_its_length_decides_about_merging() -> None:
    """Found by `test_blocks_and_the_vads_lag_change_nothing`: a stretch a little over the limit,
    another one a sample later, and a VAD that reports it as late as it may."""
    audio = noise(24.0)
    spans = [Span(0, 16_800), Span(16_801, 17_279)]
    policy = SegmentPolicy(
        max_seconds=1.0, target_seconds=1.0, max_gap_seconds=0.2, window_seconds=1.0
    )
    at_once = run(Segmenter(policy, ScriptedVad(spans)), audio, [len(audio)])
    late = run(Segmenter(policy, ScriptedVad(spans, VAD_LAG - 158)), audio, [1000])
    assert [clip.segment for clip in late] == [clip.segment for clip in at_once]
