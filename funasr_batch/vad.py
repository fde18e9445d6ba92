"""Voice activity detection: audio in blocks of any size in, spans of speech out.

`FsmnVadStream` is FunASR's FSMN-VAD, `SileroVadStream` the embedded detector. Each is fed one
recording and scores it in pieces of a fixed length, so that its spans do not depend on how the
recording was cut into blocks. The networks are passed in; nothing here imports MLX.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from funasr_batch.errors import UsageError
from funasr_batch.frontend import FRAME_SHIFT, FeatureStream, FrontEnd
from funasr_batch.models.silero_vad import CONTEXT, WINDOW, SileroVad, State
from funasr_batch.records import SAMPLE_RATE, SAMPLES_PER_MS, FloatArray, Span

_FSMN_PIECE = 10 * SAMPLE_RATE
_SILERO_PIECE = 320 * WINDOW
"""Samples that the networks score at a time, about ten seconds."""

_FRAME_MS = 10
_DYNAMIC_THRESHOLD = 0.5
"""What the dynamic schedule takes for `speech_noise_threshold`."""
_DYNAMIC_END_SILENCE_MS = (
    (10_000, 2000),
    (20_000, 1000),
    (30_000, 800),
    (40_000, 600),
    (50_000, 400),
    (60_000, 200),
)
"""Up to so much accumulated time (first), so much silence ends a span (second)."""
_DYNAMIC_SHORTEST_MS = 100

CacheT = TypeVar("CacheT")


class VoiceActivityStream(Protocol):
    """Finds speech in one recording.

    Spans come in time order, do not overlap, and lie inside the recording.
    """

    @property
    def pending(self) -> int:
        """The earliest sample at which a span that is still to come may start; never falls."""
        ...

    def accept(self, samples: FloatArray) -> list[Span]:
        """Spans that are known to be complete after this block: float32 [any number]."""
        ...

    def finish(self) -> list[Span]:
        """The remaining spans, at the end of the recording."""
        ...


class SilenceScorer(Protocol[CacheT]):
    """A network that scores consecutive pieces of features; see `models.fsmn_vad.FsmnVad`."""

    def scores(self, features: FloatArray, cache: CacheT | None) -> tuple[FloatArray, CacheT]: ...


@dataclass(frozen=True, slots=True)
class FsmnVadOptions:
    """Settings of the state machine; defaults and meanings are those of FunASR's `VADXOptions`.

    Raises UsageError for values that make no sense.
    """

    max_end_silence_ms: int = 800
    """Silence that ends a span, if the schedule is explicit. 150 ms of it pass before the
    smoothing window falls silent; pauses below about `max_end_silence_ms - 240` do not count."""
    speech_noise_threshold: float = 0.6
    """A frame is speech if P(speech) is at least this much above P(silence), if the schedule is
    explicit. A threshold t on P(speech) itself is 2 t - 1 here."""
    schedule: Literal["explicit", "dynamic"] = "explicit"
    """`dynamic` is what FunASR has done by default since 1.3.9: at every `chunk_ms` it decides
    anew how much silence ends a span, less the longer one has been open, and takes 0.5 as the
    threshold."""
    chunk_ms: int = 60_000
    """FunASR's `chunk_size`: how often the dynamic schedule decides."""
    max_single_segment_ms: int = 60_000
    """Longer spans are cut; the next span starts where the cut is."""
    window_size_ms: int = 200
    """Length of the smoothing window."""
    sil_to_speech_ms: int = 150
    """Speech within the window that starts speech."""
    speech_to_sil_ms: int = 150
    """Speech within the window at or below which speech ends."""
    lookback_start_ms: int = 200
    """A span starts this long before the smoothing window in which speech was found."""
    lookahead_end_ms: int = 100
    """Silence that is left at the end of a span."""

    def __post_init__(self) -> None:
        shortest = min(
            self.max_end_silence_ms,
            self.sil_to_speech_ms,
            self.speech_to_sil_ms,
            self.lookback_start_ms,
            self.lookahead_end_ms,
        )
        if shortest < 0 or self.window_size_ms < max(_FRAME_MS, self.sil_to_speech_ms):
            raise UsageError(
                "VAD: durations cannot be negative, nor the window below its threshold"
            )
        if self.chunk_ms < _FRAME_MS or self.max_single_segment_ms < 1000:
            raise UsageError("VAD: chunks take 10 ms or more, and the longest segment 1 s or more")
        if not -1.0 <= self.speech_noise_threshold <= 1.0:
            raise UsageError("VAD: the threshold lies between -1 and 1")


class FsmnStateMachine:
    """Decides from frames of 10 ms where speech starts and ends.

    The rules are those of FunASR `funasr/models/fsmn_vad_streaming/model.py`, multi-utterance mode.
    All its numbers count frames; spans are [start, end) in frames from the recording's start.
    """

    def __init__(self, options: FsmnVadOptions) -> None:
        self._options = options
        self._latency = (options.window_size_ms + options.lookback_start_ms) // _FRAME_MS
        self._lookahead = options.lookahead_end_ms // _FRAME_MS
        self._longest = options.max_single_segment_ms // _FRAME_MS
        self.set_end_silence(options.max_end_silence_ms)
        self._window = _SmoothingWindow(options)
        self._silent_frames = 0
        """Frames since the smoothing window fell silent."""
        self._start: int | None = None
        """First frame of the open span."""
        self._free = 0
        """Frames before this one belong to earlier spans."""
        self._frame = 0
        """The frame that comes next."""

    def set_end_silence(self, milliseconds: int) -> None:
        """The silence that ends a span from the next frame on."""
        self._end_silence = max(milliseconds - self._options.speech_to_sil_ms, 0) / _FRAME_MS

    @property
    def in_speech(self) -> bool:
        return self._start is not None

    @property
    def pending(self) -> int:
        """The earliest frame at which the next span can start."""
        if self._start is not None:
            return self._start
        return max(self._free, self._frame - self._latency)

    def advance(self, speech: Iterable[bool]) -> Iterator[tuple[int, int]]:
        """Takes one decision for each frame, and yields the spans that they end."""
        for is_speech in speech:
            last = self._last_frame_of_span(is_speech)
            if last is not None:
                yield self._end_span(last)
            self._frame += 1

    def finish(self) -> Iterator[tuple[int, int]]:
        """Ends an open span where the recording ends."""
        if self.in_speech:
            yield self._end_span(self._frame - 1)

    def _last_frame_of_span(self, is_speech: bool) -> int | None:
        """Takes a frame. If the open span is thereby over: its last frame."""
        was_speech = self._window.is_speech
        self._window.put(is_speech)
        silent = not (was_speech or self._window.is_speech)
        self._silent_frames = self._silent_frames + 1 if silent else 0

        if self._start is None:
            if self._window.is_speech:
                self._start = self.pending
            return None
        if silent and self._silent_frames >= self._end_silence:
            return self._frame - max(int(self._end_silence) - self._lookahead - 1, 0)
        if self._frame - self._start + 1 > self._longest:
            return self._frame
        return None

    def _end_span(self, last: int) -> tuple[int, int]:
        assert self._start is not None
        span = (self._start, last + 1)
        self._free = last + 1
        self._start = None
        self._window = _SmoothingWindow(self._options)
        return span


class _SmoothingWindow:
    """Whether there is speech, from how many of the last frames were speech."""

    def __init__(self, options: FsmnVadOptions) -> None:
        length = options.window_size_ms // _FRAME_MS
        self._frames = deque([False] * length, maxlen=length)
        self._speech_frames = 0
        self._speech_from = options.sil_to_speech_ms // _FRAME_MS
        self._silence_up_to = options.speech_to_sil_ms // _FRAME_MS
        self.is_speech = False

    def put(self, is_speech: bool) -> None:
        self._speech_frames += is_speech - self._frames[0]
        self._frames.append(is_speech)
        if self.is_speech:
            self.is_speech = self._speech_frames > self._silence_up_to
        else:
            self.is_speech = self._speech_frames >= self._speech_from


class DynamicSchedule:
    """FunASR's dynamic silence: what ends a span is decided once for each chunk.

    Time accumulates in steps of a chunk while a span stays open across chunk boundaries, and
    starts again from zero with every chunk that completes a span.
    """

    def __init__(self, chunk_ms: int) -> None:
        self._chunk_ms = chunk_ms
        self._open_ms = 0

    def begin_chunk(self, in_speech: bool) -> int:
        """Milliseconds of silence that end a span within the chunk that now begins."""
        if in_speech:
            self._open_ms += self._chunk_ms
        for limit, silence in _DYNAMIC_END_SILENCE_MS:
            if self._open_ms <= limit:
                return silence
        return _DYNAMIC_SHORTEST_MS

    def span_ended(self) -> None:
        self._open_ms = 0


class FsmnVadStream(Generic[CacheT]):
    """FSMN-VAD on one recording. Span boundaries are multiples of 10 ms."""

    def __init__(
        self,
        network: SilenceScorer[CacheT],
        frontend: FrontEnd,
        options: FsmnVadOptions = FsmnVadOptions(),
    ) -> None:
        self._network = network
        self._cache: CacheT | None = None
        self._features = FeatureStream(frontend)
        self._machine = FsmnStateMachine(options)
        self._schedule: DynamicSchedule | None = None
        threshold = options.speech_noise_threshold
        if options.schedule == "dynamic":
            self._schedule = DynamicSchedule(options.chunk_ms)
            threshold = _DYNAMIC_THRESHOLD
        self._chunk = options.chunk_ms * SAMPLES_PER_MS
        self._largest_silence = np.float32((1.0 - threshold) / 2.0)
        """Of the probability of silence in a frame that counts as speech."""
        self._samples = _SampleQueue()

    @property
    def pending(self) -> int:
        return self._machine.pending * FRAME_SHIFT

    def accept(self, samples: FloatArray) -> list[Span]:
        self._samples.put(samples)
        spans: list[Span] = []
        while len(self._samples) >= (size := self._piece_size()):
            spans += self._detect(self._next_features(size))
        return spans

    def finish(self) -> list[Span]:
        # FunASR begins a chunk after the last whole one even if no sample is left for it.
        tail = self._next_features(len(self._samples))
        spans = self._detect(np.concatenate((tail, self._features.finish())))
        return spans + [_span_of_frames(frames) for frames in self._machine.finish()]

    def _piece_size(self) -> int:
        """Samples up to where the next piece or chunk of the schedule ends."""
        position = self._samples.taken
        return min(_FSMN_PIECE - position % _FSMN_PIECE, self._chunk - position % self._chunk)

    def _next_features(self, size: int) -> FloatArray:
        if self._schedule is not None and self._samples.taken % self._chunk == 0:
            self._machine.set_end_silence(self._schedule.begin_chunk(self._machine.in_speech))
        return self._features.accept(self._samples.take(size))

    def _detect(self, features: FloatArray) -> list[Span]:
        if len(features) == 0:
            return []
        silence, self._cache = self._network.scores(features, self._cache)
        speech = (silence <= self._largest_silence).tolist()
        spans = [_span_of_frames(frames) for frames in self._machine.advance(speech)]
        if spans and self._schedule is not None:
            self._schedule.span_ended()
        return spans


def _span_of_frames(frames: tuple[int, int]) -> Span:
    return Span(frames[0] * FRAME_SHIFT, frames[1] * FRAME_SHIFT)


@dataclass(frozen=True, slots=True)
class SileroOptions:
    """Settings of the embedded detector, named as in Silero's and whisper's tools.

    Raises UsageError for values that make no sense.
    """

    threshold: float = 0.5
    """A window at or above it starts speech."""
    neg_threshold: float | None = None
    """A window below it may end speech; None for 0.15 below `threshold`."""
    min_speech_ms: int = 250
    """Speech up to this length is dropped."""
    min_silence_ms: int = 300
    """Silence that ends speech."""
    speech_pad_ms: int = 200
    """Added on both sides, up to half of the pause. Silero's own 30 ms cost quiet word edges."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0 or self.negative_threshold > self.threshold:
            raise UsageError("VAD: thresholds lie between 0 and 1, neg_threshold below threshold")
        if min(self.min_speech_ms, self.min_silence_ms, self.speech_pad_ms) < 0:
            raise UsageError("VAD: durations cannot be negative")

    @property
    def negative_threshold(self) -> float:
        if self.neg_threshold is None:
            return max(self.threshold - 0.15, 0.01)
        return self.neg_threshold


class SpeechHysteresis:
    """Turns probabilities of consecutive windows into padded spans of samples.

    The rules are Silero's (`get_speech_timestamps`): speech starts at a window that reaches the
    threshold, and ends where windows fell below the lower threshold once `min_silence_ms` have
    passed without one that reaches the upper threshold again. Only at a recording's end we differ:
    silence too short to end speech is cut off there too, where Silero keeps it.
    """

    def __init__(self, options: SileroOptions) -> None:
        self._threshold = options.threshold
        self._negative_threshold = options.negative_threshold
        self._min_speech = options.min_speech_ms * SAMPLES_PER_MS
        self._min_silence = options.min_silence_ms * SAMPLES_PER_MS
        self._pad = options.speech_pad_ms * SAMPLES_PER_MS
        self._position = 0
        """Start of the window that comes next."""
        self._start: int | None = None
        """Where the open speech starts."""
        self._padded_start: int | None = None
        """The same with its padding; known once the speech is long enough to be kept."""
        self._silent_since: int | None = None
        """Where the open speech ends if no more follows."""
        self._held: Span | None = None
        """The last span while its end is not padded yet: speech may follow in twice the pad."""
        self._released = 0
        """End of the last span that was given out."""

    @property
    def pending(self) -> int:
        if self._held is not None:
            return self._held.start
        if self._padded_start is not None:
            return self._padded_start
        return max(self._released, self._next_start - self._pad)

    def advance(self, probabilities: Iterable[float]) -> Iterator[Span]:
        """Takes the next windows; yields the spans that no later window can change."""
        for probability in probabilities:
            self._take(probability)
            self._position += WINDOW
            yield from self._confirm_speech()
            if self._held is not None and self._next_start - self._held.end >= 2 * self._pad:
                yield self._release(self._held, self._pad)

    def finish(self, length: int) -> Iterator[Span]:
        """The last spans of a recording of `length` samples; they may reach past its end."""
        self._close(length if self._silent_since is None else self._silent_since)
        if self._held is not None:
            yield self._release(self._held, self._pad)

    @property
    def _next_start(self) -> int:
        """Where the next speech starts at the earliest, unpadded."""
        return self._position if self._start is None else self._start

    def _take(self, probability: float) -> None:
        if probability >= self._threshold:
            self._silent_since = None
            if self._start is None:
                self._start = self._position
        elif probability < self._negative_threshold and self._start is not None:
            if self._silent_since is None:
                self._silent_since = self._position
            if self._position - self._silent_since >= self._min_silence:
                self._close(self._silent_since)

    def _close(self, end: int) -> None:
        if self._padded_start is not None:
            self._held = Span(self._padded_start, end)
        self._start = self._padded_start = self._silent_since = None

    def _confirm_speech(self) -> Iterator[Span]:
        """Fixes the start of speech that is sure to be kept, and the end of the span before it."""
        if self._start is None or self._padded_start is not None or self._silent_since is not None:
            return
        if self._position - self._start <= self._min_speech:
            return
        pad = self._pad
        if self._held is not None:
            pad = min(pad, (self._start - self._held.end) // 2)
            yield self._release(self._held, pad)
        self._padded_start = max(0, self._start - pad)

    def _release(self, span: Span, pad: int) -> Span:
        self._held = None
        self._released = span.end + pad
        return Span(span.start, self._released)


class SileroVadStream:
    """Silero VAD on one recording."""

    def __init__(self, network: SileroVad, options: SileroOptions = SileroOptions()) -> None:
        self._network = network
        self._state: State | None = None
        self._context = np.zeros(CONTEXT, np.float32)
        self._hysteresis = SpeechHysteresis(options)
        self._samples = _SampleQueue()

    @property
    def pending(self) -> int:
        return self._hysteresis.pending

    def accept(self, samples: FloatArray) -> list[Span]:
        self._samples.put(samples)
        spans: list[Span] = []
        while len(self._samples) >= _SILERO_PIECE:
            spans += self._detect(self._samples.take(_SILERO_PIECE))
        return spans

    def finish(self) -> list[Span]:
        rest = self._samples.take(len(self._samples))
        length = self._samples.taken
        spans = self._detect(np.pad(rest, (0, -len(rest) % WINDOW)))
        spans += self._hysteresis.finish(length)
        return [Span(span.start, min(span.end, length)) for span in spans]

    def _detect(self, samples: FloatArray) -> list[Span]:
        """Scores float32 [n * WINDOW]."""
        if len(samples) == 0:
            return []
        extended = np.concatenate((self._context, samples))
        self._context = extended[-CONTEXT:]
        windows = sliding_window_view(extended, CONTEXT + WINDOW)[::WINDOW]
        probabilities, self._state = self._network.probabilities(windows, self._state)
        return list(self._hysteresis.advance(probabilities.tolist()))


class _SampleQueue:
    """Audio that waits for a piece to be complete."""

    def __init__(self) -> None:
        self._blocks: list[FloatArray] = []
        self._length = 0
        self.taken = 0
        """Samples that were taken so far."""

    def __len__(self) -> int:
        return self._length

    def put(self, samples: FloatArray) -> None:
        self._blocks.append(samples)
        self._length += len(samples)

    def take(self, size: int) -> FloatArray:
        """The oldest `size` samples."""
        if len(self._blocks) != 1:
            self._blocks = [np.concatenate([np.empty(0, np.float32), *self._blocks])]
        taken, rest = np.split(self._blocks[0], [size])
        self._blocks = [rest]
        self._length -= size
        self.taken += size
        return taken
