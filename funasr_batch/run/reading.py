"""From a recording on disk to clips with features: the part of the work that threads share.

A reader emits `ClipRead` for each segment as it is cut and ends with exactly one of `FileRead` and
`ReadFailed`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from funasr_batch.audio import open_audio
from funasr_batch.errors import AudioError, FileError, UnstableError, VanishedError
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import SAMPLE_RATE, Excerpt, FloatArray, Segment, SourceInfo
from funasr_batch.run.stats import Stage, StageClock
from funasr_batch.run.storage import file_digest

ARRAY_BLOCK = SAMPLE_RATE
"""Samples of an array that are cut at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One recording to transcribe."""

    audio: Path | FloatArray
    """A file, or mono float32 samples at 16 kHz."""
    channel: int | None = None
    track: int | str | None = None


@dataclass(frozen=True, slots=True)
class FileOpened:
    job: Job
    clock: StageClock
    started: float
    """`time.perf_counter()` when work on it began."""


@dataclass(frozen=True, slots=True)
class ClipRead:
    job: Job
    segment: Segment
    features: FloatArray | Excerpt = field(repr=False)


@dataclass(frozen=True, slots=True)
class FileRead:
    """The recording's end: all of its `segments` clips were emitted before."""

    job: Job
    segments: int
    info: SourceInfo
    partial: bool
    """Less audio came out than the file declares, or a part of it was damaged."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReadFailed:
    job: Job
    error: FileError
    stage: Stage


class StoppedError(Exception):
    """Raised by an `Emit`, or between two blocks, when nobody is left to read for."""


ReadEvent: TypeAlias = FileOpened | ClipRead | FileRead | ReadFailed
Emit: TypeAlias = Callable[[ReadEvent], None]
IsOver: TypeAlias = Callable[[], bool]


def read(job: Job, recognizer: Recognizer, emit: Emit, is_over: IsOver) -> None:
    """Reads one recording to its end. What goes wrong with it is emitted, never raised.

    Raises StoppedError when `is_over` says so: hours of silence emit nothing for a long time.
    """
    clock = StageClock()
    emit(FileOpened(job, clock, time.perf_counter()))
    try:
        if isinstance(job.audio, Path):
            emit(_read_file(job, job.audio, recognizer, clock, emit, is_over))
        else:
            emit(_read_array(job, job.audio, recognizer, clock, emit, is_over))
    except FileError as error:
        emit(ReadFailed(job, error, "decode"))
    except StoppedError:
        raise
    except OSError as error:
        reason = f"{_blamed(job)}cannot be read: {error.strerror or error}"
        emit(ReadFailed(job, AudioError(reason), "decode"))
    except Exception as error:
        # A decoder's bug costs one recording, like its bad input.
        reason = f"{_blamed(job)}decoding ended with {type(error).__name__}: {error}"
        emit(ReadFailed(job, AudioError(reason), "decode"))


def _blamed(job: Job) -> str:
    return f"{job.audio}: " if isinstance(job.audio, Path) else ""


def _read_file(
    job: Job,
    path: Path,
    recognizer: Recognizer,
    clock: StageClock,
    emit: Emit,
    is_over: IsOver,
) -> FileRead:
    before = _identity(path)
    with clock.measure("decode"):
        sha256 = file_digest(path)
    with open_audio(path, channel=job.channel, track=job.track) as stream:
        segments = _cut(job, _timed(stream, clock), recognizer, clock, emit, is_over)
        report, info = stream.report, stream.info
    if _identity(path) != before:
        raise UnstableError(
            f"{path}: changed while it was read", hint="It is tried again in the next run."
        )
    return FileRead(
        job,
        segments,
        SourceInfo(str(path), sha256, report.seconds, info.sample_rate, info.channels),
        partial=report.is_partial,
        warnings=report.warnings,
    )


def _read_array(
    job: Job,
    samples: FloatArray,
    recognizer: Recognizer,
    clock: StageClock,
    emit: Emit,
    is_over: IsOver,
) -> FileRead:
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(
            f"the array has shape {samples.shape} and dtype {samples.dtype}",
            hint="Give mono floating-point samples at 16 kHz in [-1, 1], shape (n,).",
        )
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise AudioError("the array holds samples that are NaN or infinite")
    blocks = (samples[at : at + ARRAY_BLOCK] for at in range(0, len(samples), ARRAY_BLOCK))
    segments = _cut(job, blocks, recognizer, clock, emit, is_over)
    digest = hashlib.sha256(samples.tobytes()).hexdigest()
    info = SourceInfo("", digest, len(samples) / SAMPLE_RATE, SAMPLE_RATE, 1)
    return FileRead(job, segments, info, partial=False, warnings=())


def _cut(
    job: Job,
    blocks: Iterable[FloatArray],
    recognizer: Recognizer,
    clock: StageClock,
    emit: Emit,
    is_over: IsOver,
) -> int:
    """Emits the clips of a recording and returns how many there were."""
    cutter = recognizer.cutter()
    count = 0
    for block in chain(blocks, (None,)):
        if is_over():
            raise StoppedError
        with clock.measure("vad"):
            clips = cutter.finish() if block is None else cutter.accept(block)
        for clip in clips:
            with clock.measure("features"):
                features = recognizer.features(clip)
            if len(features):
                emit(ClipRead(job, clip.segment, features))
                count += 1
    return count


def _timed(blocks: Iterable[FloatArray], clock: StageClock) -> Iterator[FloatArray]:
    """The blocks, with the time spent on decoding each."""
    iterator = iter(blocks)
    while True:
        with clock.measure("decode"):
            block = next(iterator, None)
        if block is None:
            return
        yield block


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise VanishedError(f"{path}: is not there any more") from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
