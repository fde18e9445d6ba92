"""Recognises many recordings at once: reads ahead in threads, batches segments across files.

Reader threads decode, cut and compute features; the calling thread alone runs the model. The
segments of a recording become one transcript as soon as the last of them is done. Nothing is
written here: `pipeline` decides what to read and keeps what comes out.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from funasr_batch.errors import FileError, RecognitionError
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import (
    SAMPLE_RATE,
    FloatArray,
    Status,
    TextSegment,
    Transcript,
)
from funasr_batch.run.batching import Batch, Batcher, BatchPolicy, Item
from funasr_batch.run.reading import (
    ClipRead,
    FileOpened,
    FileRead,
    Job,
    ReadEvent,
    ReadFailed,
    StoppedError,
    read,
)
from funasr_batch.run.stats import FileStats, Stage, StageClock, share
from funasr_batch.run.stopping import StopRequest
from funasr_batch.settings import recognition_digest
from funasr_batch.text.join import join_segments
from funasr_batch.text.language import language_of
from funasr_batch.text.tokens import join_texts

FRAMES_PER_SECOND = 100 / 6
PATIENCE = 5.0
"""Seconds that a reader has to end with the run. One that hangs in a decoder is left behind: it is
a daemon and dies with the process."""
READ_AHEAD = 16
"""Clips that may wait between the readers and the model: about 16 MB of features."""


@dataclass(frozen=True, slots=True)
class Started:
    job: Job


@dataclass(frozen=True, slots=True)
class Advanced:
    job: Job
    seconds: float


@dataclass(frozen=True, slots=True)
class Heard:
    """A segment's text while the recording is still being read; in order of time, without gaps
    but for silence. Only where `stream_encoder` is set."""

    job: Job
    segment: TextSegment


@dataclass(frozen=True, slots=True)
class Finished:
    job: Job
    transcript: Transcript
    stats: FileStats


@dataclass(frozen=True, slots=True)
class Failed:
    job: Job
    error: FileError
    stage: Stage


Event: TypeAlias = Started | Advanced | Heard | Finished | Failed


def transcribe_jobs(
    jobs: Iterable[Job],
    recognizer: Recognizer,
    *,
    workers: int | None = None,
    batch_seconds: float | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Event]:
    """Transcribes jobs and yields what happens to each, ending with Finished or Failed;
    the order of recordings is roughly that of the jobs.

    `workers` is the number of recordings read at the same time. When `stop` is set, the iterator
    ends after the batch in hand, and recordings that are not finished are not mentioned again.
    What `jobs` itself raises is raised here.
    """
    stop = stop or StopRequest()
    workers = workers or _default_workers()
    batcher: Batcher[ClipRead] = Batcher(_batch_policy(recognizer, batch_seconds))
    files: dict[Job, _File] = {}
    with _readers(iter(jobs), recognizer, workers, stop) as events:
        reading = workers
        while (reading or len(batcher)) and not stop.is_set():
            try:
                # Whatever waits is recognised rather than let the device idle.
                event = events.get(timeout=0.2) if len(batcher) == 0 else events.get_nowait()
            except queue.Empty:
                yield from _recognise(batcher.take(flush=True), files, recognizer)
                continue
            match event:
                case None:
                    reading -= 1
                case Exception():
                    raise event
                case FileOpened(job, clock, started):
                    files[job] = _File(clock, started)
                    yield Started(job)
                case ClipRead(job, _, features):
                    batcher.add(Item(len(features), event))
                    yield from _recognise(batcher.take(flush=False), files, recognizer)
                case FileRead(job) if job in files:
                    files[job].read = event
                    yield from _finish_if_complete(job, files, recognizer)
                case ReadFailed(job, error, stage) if files.pop(job, None):
                    yield Failed(job, error, stage)


def transcribe_paths(
    paths: Sequence[Path], recognizer: Recognizer
) -> Iterator[tuple[Path, Transcript | FileError]]:
    """Transcribes files; yields each path once with its transcript or what went wrong."""
    settings = recognizer.settings
    jobs = [Job(path, channel=settings.channel, track=settings.track) for path in paths]
    events = transcribe_jobs(
        jobs, recognizer, workers=settings.workers, batch_seconds=settings.batch_seconds
    )
    for event in events:
        if isinstance(event, Finished | Failed):
            assert isinstance(event.job.audio, Path)
            result = event.transcript if isinstance(event, Finished) else event.error
            yield event.job.audio, result


def transcribe_array(samples: FloatArray, recognizer: Recognizer) -> Transcript:
    """Transcribes mono float32 samples at 16 kHz. Raises FileError when that fails."""
    batch_seconds = recognizer.settings.batch_seconds
    for event in transcribe_jobs(
        [Job(samples)], recognizer, workers=1, batch_seconds=batch_seconds
    ):
        if isinstance(event, Finished):
            return event.transcript
        if isinstance(event, Failed):
            raise event.error
    raise RecognitionError("the recognition ended without a result")


@dataclass(slots=True)
class _File:
    """A recording of which some segments are still to come."""

    clock: StageClock
    started: float
    read: FileRead | None = None
    segments: dict[int, TextSegment] = field(default_factory=dict)
    """By their position in the recording; those without text too."""
    told: int = 0
    """Segments of the beginning whose texts were given out early."""
    tokens: int = 0
    real_frames: int = 0
    padded_frames: int = 0


def _default_workers() -> int:
    """Decoding outruns every model, so a few readers are enough to keep the device busy."""
    return min(8, max(2, (os.cpu_count() or 2) // 2))


def _batch_policy(recognizer: Recognizer, batch_seconds: float | None) -> BatchPolicy:
    # A CPU gains nothing from large batches and loses cache locality (benchmarks/RESULTS.md).
    seconds = batch_seconds or (1200.0 if recognizer.device == "gpu" else 60.0)
    frames = max(1, int(seconds * FRAMES_PER_SECOND))
    # Who wants the first text soon gets a batch of what is there, not of what is yet to be read.
    lookahead = READ_AHEAD if recognizer.settings.stream_encoder else 512
    return BatchPolicy(
        max_padded_frames=frames,
        max_items=min(256, lookahead),
        lookahead_items=lookahead,
        lookahead_frames=2 * frames,
    )


@contextmanager
def _readers(
    jobs: Iterator[Job], recognizer: Recognizer, workers: int, stop: StopRequest
) -> Iterator[queue.Queue[ReadEvent | Exception | None]]:
    """Threads that read jobs into a bounded queue; None marks the end of each.

    An exception in the queue is one that `jobs` raised.
    """
    events: queue.Queue[ReadEvent | Exception | None] = queue.Queue(READ_AHEAD)
    lock = threading.Lock()
    abandoned = threading.Event()

    def is_over() -> bool:
        return stop.is_set() or abandoned.is_set()

    def emit(event: ReadEvent | Exception | None) -> None:
        while not is_over():
            try:
                return events.put(event, timeout=0.2)
            except queue.Full:
                continue
        raise StoppedError

    def work() -> None:
        with suppress(StoppedError):
            while True:
                try:
                    with lock:
                        job = next(jobs, None)
                except Exception as error:
                    return emit(error)
                if job is None:
                    return emit(None)
                read(job, recognizer, emit, is_over)

    threads = [threading.Thread(target=work, name=f"reader-{n}") for n in range(workers)]
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        yield events
    finally:
        abandoned.set()
        for thread in threads:
            thread.join(PATIENCE)


def _recognise(
    batch: Batch[ClipRead] | None, files: dict[Job, _File], recognizer: Recognizer
) -> Iterator[Event]:
    """Runs the model on a batch and hands each result to its recording."""
    clips = [item.payload for item in batch.items if item.payload.job in files] if batch else []
    if not clips:
        return
    for clip, recognition, frames in _run_model(clips, files, recognizer):
        file = files.get(clip.job)
        if file is None:  # another of its clips failed in this batch
            continue
        if isinstance(recognition, RecognitionError):
            del files[clip.job]
            yield Failed(clip.job, recognition, "encode")
            continue
        with file.clock.measure("text"):
            text = recognizer.text_segment(clip.segment, recognition)
        file.segments[clip.segment.index] = text
        file.tokens += len(recognition.token_ids)
        file.real_frames += len(clip.features)
        file.padded_frames += frames
        new = clip.segment.end - clip.segment.start - clip.segment.overlap
        yield Advanced(clip.job, new / SAMPLE_RATE)
        if recognizer.settings.stream_encoder:
            yield from _heard(clip.job, file)
        yield from _finish_if_complete(clip.job, files, recognizer)


def _heard(job: Job, file: _File) -> Iterator[Event]:
    """The texts that nothing earlier is missing for any more."""
    while (text := file.segments.get(file.told)) is not None:
        file.told += 1
        if text.text:
            yield Heard(job, text)


def _run_model(
    clips: Sequence[ClipRead], files: dict[Job, _File], recognizer: Recognizer
) -> Iterator[tuple[ClipRead, Any, int]]:
    """Each clip with its recognition, or the RecognitionError in its place, and the frames it
    cost; a batch that fails is tried one by one."""
    lengths = [len(clip.features) for clip in clips]
    try:
        result = recognizer.recognise([clip.features for clip in clips])
    except Exception as error:
        if len(clips) == 1:
            yield clips[0], RecognitionError(f"the model failed: {error}"), lengths[0]
            return
        for clip in clips:
            yield from _run_model([clip], files, recognizer)
        return
    encode = share(result.encode_seconds, lengths)
    decode = share(result.decode_seconds, lengths)
    for index, (clip, recognition) in enumerate(zip(clips, result.recognitions, strict=True)):
        if clip.job in files:
            files[clip.job].clock.add("encode", encode[index])
            files[clip.job].clock.add(recognizer.decode_stage, decode[index])
        yield clip, recognition, max(lengths)


def _finish_if_complete(
    job: Job, files: dict[Job, _File], recognizer: Recognizer
) -> Iterator[Event]:
    file = files[job]
    if file.read is None or len(file.segments) < file.read.segments:
        return
    del files[job]
    transcript, stats = _assemble(file, file.read, recognizer)
    yield Finished(job, transcript, stats)


def _assemble(file: _File, read: FileRead, recognizer: Recognizer) -> tuple[Transcript, FileStats]:
    with file.clock.measure("text"):
        segments = _in_order(file.segments, joined=recognizer.windows_overlap)
        text = join_texts(segment.text for segment in segments)
    stats = FileStats(
        audio_seconds=read.info.duration,
        wall_seconds=time.perf_counter() - file.started,
        stages=file.clock.seconds(),
        tokens=file.tokens,
        real_frames=file.real_frames,
        padded_frames=file.padded_frames,
    )
    settings = recognizer.settings
    transcript = Transcript(
        source=read.info,
        model=recognizer.info,
        settings_digest=recognition_digest(settings),
        language=language_of(text) if settings.language == "auto" else settings.language,
        segments=segments,
        status=_status(read, text),
        warnings=read.warnings,
        stats=stats.as_dict(),
    )
    return transcript, stats


def _status(read: FileRead, text: str) -> Status:
    if read.partial:
        return "partial"
    if not text:
        return "no_speech"
    return "done_with_warnings" if read.warnings else "done"


def _in_order(segments: dict[int, TextSegment], *, joined: bool) -> tuple[TextSegment, ...]:
    """The segments that have text, by time; of overlapping windows each keeps its own words."""
    texts = [segments[index] for index in sorted(segments)]
    if joined:
        texts = join_segments(texts)
    return tuple(text for text in texts if text.text)
