"""The pieces of a recording that are recognised in one go, cut while the recording streams in.

`Segmenter` cuts where a VAD found speech: stretches over the length limit are split at their
quietest points and short neighbours are merged. Two do without a VAD: `WindowCutter` cuts windows
over everything, each overlapping the one before, and `ContextCutter` pieces that touch, each with
the audio around it. All take the recording's PCM blocks in order and keep only the audio that is
not cut yet.

Segment boundaries lie on the 10 ms grid of feature frames; only the last may end off it, where
the recording ends.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from funasr_batch.errors import UsageError
from funasr_batch.records import FRAME_SAMPLES, SAMPLE_RATE, Clip, FloatArray, Segment, Span

if TYPE_CHECKING:
    from funasr_batch.vad import VoiceActivityStream

HOP = SAMPLE_RATE // 100
"""Samples between two feature frames, and between two possible cuts."""

SMOOTHING_HOPS = 24
"""A cut is as quiet as the 240 ms around it: longer than a stop consonant's closure, which is
silent too, and shorter than a pause between phrases."""

VAD_LAG = 20 * SAMPLE_RATE
"""By how many samples a VAD may trail: it has reported a span when that much audio has followed
the span's end, and outside spans its `pending` is never further back. A `pending` further back
means a span that has been open since then."""


@dataclass(frozen=True, slots=True)
class SegmentPolicy:
    """How long segments may be and what is merged. All values are seconds.

    Raises `UsageError` for values that make no sense. A target, window or overlap that does not
    go with a smaller limit is reduced to fit it, so that `max_seconds` can be set alone.
    """

    max_seconds: float = 30.0
    """No segment is longer. The models were trained on utterances up to about this length."""
    target_seconds: float = 12.0
    """Short neighbours are merged up to this length. It gives a few-word utterance the context
    of the sentence around it, and stays within the lengths on which Paraformer does best (its
    authors advise at most 20 s) with room for batches of similar length."""
    max_gap_seconds: float = 1.0
    """Neighbours further apart are not merged: the pause would cost time and invite invention."""
    pad_seconds: float = 0.0
    """Audio added on both sides of speech, up to half the pause. 0 for VADs that pad already."""
    window_seconds: float = 20.0
    """Length of a window when there is no VAD."""
    overlap_seconds: float = 2.0
    """What two neighbouring windows share: room for the word that one of them cuts in two."""
    piece_seconds: float = 10.0
    """Longest piece that is encoded with its context. Text comes piece by piece, so it sets the
    latency; the LLM reads shorter ones with less of the sentence, and the context costs more of
    the encoder's time."""
    left_context_seconds: float = 3.0
    """Audio that the encoder hears before a piece. It costs time but no latency, hence more of it
    than on the right."""
    right_context_seconds: float = 2.0
    """Audio that the encoder hears after a piece: a few words, so that the last one is not cut
    off. benchmarks/chunked_encoder.py measures what more of either would bring."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            is_length = limit.name in ("max_seconds", "window_seconds", "piece_seconds")
            least = 1.0 if is_length else 0.0
            if not (math.isfinite(value) and value >= least):
                raise UsageError(
                    f"{limit.name} is {value}", hint=f"It must be a number from {least:g} up."
                )


class Segmenter:
    """Turns one recording's PCM blocks into clips of speech.

    Speech spans that touch count as one (a VAD with a length limit of its own cuts in mid-word).
    What is longer than the limit is split, each time at the quietest point of the later half of
    what is allowed, and no piece of it is shorter than a quarter of the limit. Then a span is
    merged into the segment before it while the pause is short and the whole stays within the
    target. Every sample of every span is in exactly one segment, and cuts between pieces are
    shared by both.

    The result depends on the spans alone, not on block sizes or on when the VAD reports a span,
    as long as it keeps within `VAD_LAG`. Speech that goes on and on is cut before the VAD reports
    it, by the same rule. So at most 1.25 max_seconds + max_gap_seconds + 2 pad_seconds + `VAD_LAG`
    of audio is held, and the blocks at both ends of that stretch.
    """

    def __init__(self, policy: SegmentPolicy, vad: VoiceActivityStream) -> None:
        self._vad = vad
        self._max = _on_grid(policy.max_seconds)
        self._target = min(_on_grid(policy.target_seconds), self._max)
        self._max_gap = round(policy.max_gap_seconds * SAMPLE_RATE)
        self._pad = round(min(policy.pad_seconds, policy.max_seconds / 4) * SAMPLE_RATE)
        self._audio = _RecentAudio()
        self._clips = _ClipQueue(self._audio)
        self._group: Span | None = None
        """What the next segment holds so far: its first sample on the grid, its last from a VAD."""

    @property
    def held_samples(self) -> int:
        """Samples of audio in memory."""
        return self._audio.held

    def accept(self, block: FloatArray) -> list[Clip]:
        """Take the next samples, float32 [n], and return the clips that they completed.

        The block is kept, not copied: it must not be changed afterwards.
        """
        self._audio.append(block)
        for span in self._vad.accept(block):
            self._add(span)
        self._look_ahead(self._vad.pending)
        clips = self._clips.take_complete()
        self._audio.forget(self._first_needed(self._vad.pending))
        return clips

    def finish(self) -> list[Clip]:
        """End the recording and return the last clips."""
        for span in self._vad.finish():
            self._add(span)
        if self._group is not None:
            self._close(self._split(self._group), next_start=None)
        return self._clips.take_all()

    def _add(self, span: Span) -> None:
        if self._group is not None and span.start > self._group.end:
            self._close_or_merge(self._split(self._group), span)
        if span.end <= self._clips.cut:
            return
        start = self._padded_start(span.start) if self._group is None else self._group.start
        self._group = self._split_what_is_certain(Span(start, span.end))

    def _close_or_merge(self, group: Span, following: Span) -> None:
        """Keep the group for the span that follows to extend, or make it a segment."""
        near = following.start - group.end <= self._max_gap
        if near and following.end - group.start <= self._target:
            self._group = group
        else:
            self._close(group, next_start=following.start)

    def _look_ahead(self, pending: int) -> None:
        """Decide what no later span can change; `pending` is where the next one may start."""
        certain = self._audio.end - VAD_LAG
        is_open = certain > pending
        if self._group is not None and pending > self._group.end:
            # Nothing can touch it any more: as when the next span comes, it is split before its
            # length counts.
            group = self._group = self._split(self._group)
            too_far = pending - group.end > max(self._max_gap, 2 * self._pad)
            too_long = is_open and certain - group.start > self._target
            if too_far or too_long:
                self._close(group, next_start=pending)
        if is_open:
            self._split_open_span(pending, certain)

    def _split_open_span(self, start: int, certain: int) -> None:
        group = self._group
        stretch = Span(self._padded_start(start) if group is None else group.start, certain)
        rest = self._split_what_is_certain(stretch)
        if rest.start > stretch.start:
            # The rest of the open span becomes a group when the VAD reports it.
            reported = 0 if group is None else group.end
            self._group = Span(rest.start, reported) if reported > rest.start else None

    def _split_what_is_certain(self, speech: Span) -> Span:
        """Split off what would be split off however far the speech goes on."""
        while speech.end - speech.start >= self._max + self._max // 4:
            speech = self._split_once(speech)
        return speech

    def _split(self, speech: Span) -> Span:
        """Split pieces off speech that ends here until the rest is within the limit."""
        while speech.end - speech.start > self._max:
            speech = self._split_once(speech)
        return speech

    def _split_once(self, speech: Span) -> Span:
        latest = min(speech.start + self._max, speech.end - self._max // 4)
        cut = self._audio.quietest(speech.start + self._max // 2, latest)
        self._clips.put(speech.start, cut)
        return Span(cut, speech.end)

    def _close(self, group: Span, next_start: int | None) -> None:
        """Make the group a segment, padded up to the middle of the pause before `next_start`."""
        end = min(group.end + self._pad, group.start + self._max)
        if next_start is not None:
            end = min(end, (group.end + next_start) // 2)
        self._clips.put(group.start, _grid_ceil(end))
        self._group = None

    def _padded_start(self, start: int) -> int:
        return max(_grid_floor(start - self._pad), self._clips.cut)

    def _first_needed(self, pending: int) -> int:
        first = self._padded_start(pending) if self._group is None else self._group.start
        return min(first, self._clips.first_needed)


class WindowCutter:
    """Turns one recording's PCM blocks into overlapping windows that cover all of it.

    Each window but the first starts `overlap_seconds` before the end of the one before
    (`Segment.overlap`). A window is at most `window_seconds` long and may be up to an eighth
    shorter, so that the middle of the overlap, where two texts that disagree are joined, falls
    on the quietest point there. The last window has at least a quarter of a window of audio that
    is new. Silence is cut like everything else.

    The result does not depend on block sizes. At most 1.25 window_seconds are held, and the
    blocks at both ends of that stretch.
    """

    def __init__(self, policy: SegmentPolicy) -> None:
        window_seconds = min(policy.window_seconds, policy.max_seconds)
        self._window = _on_grid(window_seconds)
        # No sample may be in three windows, whatever the cuts: hence a quarter.
        self._half_overlap = _on_grid(min(policy.overlap_seconds, window_seconds / 4) / 2)
        self._least_new = _on_grid(window_seconds / 4)
        self._search = _on_grid(window_seconds / 8)
        self._audio = _RecentAudio()
        self._clips = _ClipQueue(self._audio)
        self._start = 0

    @property
    def held_samples(self) -> int:
        """Samples of audio in memory."""
        return self._audio.held

    def accept(self, block: FloatArray) -> list[Clip]:
        """Take the next samples, float32 [n], and return the windows that they completed.

        The block is kept, not copied: it must not be changed afterwards.
        """
        self._audio.append(block)
        # From here on a window's end no longer depends on where the recording ends.
        while self._audio.end - self._start >= self._window + self._least_new:
            self._cut_window()
        clips = self._clips.take_complete()
        self._audio.forget(self._start)
        return clips

    def finish(self) -> list[Clip]:
        """End the recording and return the last windows."""
        while self._audio.end - self._start > self._window:
            self._cut_window()
        if self._audio.end > self._start:
            self._clips.put(self._start, self._audio.end)
        return self._clips.take_all()

    def _cut_window(self) -> None:
        latest = min(self._start + self._window, self._audio.end - self._least_new)
        latest = _grid_floor(latest) - self._half_overlap
        middle = self._audio.quietest(latest - self._search, latest)
        self._clips.put(self._start, middle + self._half_overlap)
        self._start = middle - self._half_overlap


class ContextCutter:
    """Turns one recording's PCM blocks into pieces that touch, each with the audio around it.

    Every sample is in exactly one piece and may be in the context of its neighbours too
    (`Clip.lead`, `Clip.tail`), so that an encoder hears what is around a cut although each frame
    is read once. A piece is at most `piece_seconds` long and may be up to a quarter shorter, so
    that the cut falls on the quietest point there; the last two share what is left, and neither
    is shorter than a quarter.

    Cuts and contexts lie on the grid of encoder frames that begins with the recording: the frames
    of all pieces together are those of the whole recording.

    The result does not depend on block sizes. At most left_context_seconds + piece_seconds and
    the longer of right_context_seconds and a quarter of a piece are held, and the blocks at both
    ends of that stretch.
    """

    def __init__(self, policy: SegmentPolicy) -> None:
        self._longest = _on_frames(min(policy.piece_seconds, policy.max_seconds))
        self._search = self._least_new = _frames_ceil(self._longest // 4)
        self._lead = _on_frames(policy.left_context_seconds)
        self._audio = _RecentAudio()
        self._clips = _ClipQueue(self._audio, self._lead, _on_frames(policy.right_context_seconds))
        self._start = 0

    @property
    def held_samples(self) -> int:
        """Samples of audio in memory."""
        return self._audio.held

    def accept(self, block: FloatArray) -> list[Clip]:
        """Take the next samples, float32 [n], and return the pieces that they completed.

        The block is kept, not copied: it must not be changed afterwards.
        """
        self._audio.append(block)
        # From here on a piece's end no longer depends on where the recording ends.
        while self._audio.end - self._start >= self._longest + self._least_new:
            self._cut_piece()
        clips = self._clips.take_complete()
        self._audio.forget(min(self._start - self._lead, self._clips.first_needed))
        return clips

    def finish(self) -> list[Clip]:
        """End the recording and return the last pieces."""
        while self._audio.end - self._start > self._longest:
            self._cut_piece()
        if self._audio.end > self._start:
            self._clips.put(self._start, self._audio.end)
        return self._clips.take_all()

    def _cut_piece(self) -> None:
        latest = min(self._start + self._longest, self._audio.end - self._least_new)
        cut = self._audio.quietest(latest - self._search, latest, FRAME_SAMPLES)
        self._clips.put(self._start, cut)
        self._start = cut


class _RecentAudio:
    """The latest samples of a recording, addressed by their position in the recording."""

    def __init__(self) -> None:
        self._blocks: deque[FloatArray] = deque()
        self._start = 0
        self.end = 0

    @property
    def held(self) -> int:
        return self.end - self._start

    def append(self, block: FloatArray) -> None:
        self._blocks.append(np.asarray(block, dtype=np.float32))
        self.end += len(block)

    def forget(self, before: int) -> None:
        while self._blocks and self._start + len(self._blocks[0]) <= before:
            self._start += len(self._blocks.popleft())

    def read(self, start: int, end: int) -> FloatArray:
        """A copy of samples [start, end), so that no clip keeps a decoder's block alive."""
        parts: list[FloatArray] = []
        position = self._start
        for block in self._blocks:
            if position >= end:
                break
            parts.append(block[max(start - position, 0) : end - position])
            position += len(block)
        return np.concatenate(parts)

    def quietest(self, earliest: int, latest: int, step: int = HOP) -> int:
        """The point in [earliest, latest] with the least energy around it.

        Points are multiples of `step`, itself one of `HOP`. Among equals it is the last one: longer
        pieces give the model more context.
        """
        first, last = earliest // step * step, latest // step * step
        reach = SMOOTHING_HOPS // 2 * HOP
        samples = self.read(first - reach, last + reach)
        energy = np.square(samples, dtype=np.float64).reshape(-1, HOP).sum(axis=1)
        smoothed = np.convolve(energy, np.ones(SMOOTHING_HOPS), mode="valid")[:: step // HOP]
        return first + step * (len(smoothed) - 1 - int(np.argmin(smoothed[::-1])))


class _ClipQueue:
    """Segments in order, numbered, that wait for the last of their samples.

    `lead` and `tail` are the samples that each clip has before and after its segment, as far as
    the recording has them.
    """

    def __init__(self, audio: _RecentAudio, lead: int = 0, tail: int = 0) -> None:
        self._audio = audio
        self._lead, self._tail = lead, tail
        self._waiting: deque[Segment] = deque()
        self._count = 0
        self.cut = 0
        """End of the last segment."""

    @property
    def first_needed(self) -> int:
        """The first sample that a waiting segment needs; the end of the audio without one."""
        return self._waiting[0].start - self._lead if self._waiting else self._audio.end

    def put(self, start: int, end: int) -> None:
        overlap = max(self.cut - start, 0)
        self._waiting.append(Segment(self._count, start, end, overlap))
        self._count += 1
        self.cut = end

    def take_complete(self) -> list[Clip]:
        clips = []
        while self._waiting and self._waiting[0].end + self._tail <= self._audio.end:
            clips.append(self._clip(self._waiting.popleft()))
        return clips

    def take_all(self) -> list[Clip]:
        """Every segment that waits, cut to the recording's end."""
        clips = self.take_complete()
        for segment in self._waiting:
            end = min(segment.end, self._audio.end)
            clips.append(self._clip(Segment(segment.index, segment.start, end, segment.overlap)))
        self._waiting.clear()
        return clips

    def _clip(self, segment: Segment) -> Clip:
        start = max(segment.start - self._lead, 0)
        end = min(segment.end + self._tail, self._audio.end)
        samples = self._audio.read(start, end)
        return Clip(segment, samples, segment.start - start, end - segment.end)


def _on_grid(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE) // HOP * HOP


def _on_frames(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE) // FRAME_SAMPLES * FRAME_SAMPLES


def _frames_ceil(samples: int) -> int:
    return -(-samples // FRAME_SAMPLES) * FRAME_SAMPLES


def _grid_floor(sample: int) -> int:
    return sample // HOP * HOP


def _grid_ceil(sample: int) -> int:
    return -(-sample // HOP) * HOP
