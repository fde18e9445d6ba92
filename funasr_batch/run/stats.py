"""Where the time went: seconds per stage, speed and memory, of one file and of the run.

Speed counts only recordings that were transcribed in this run. What was skipped, or rendered again
from a kept transcript, adds neither its audio nor a file to it; loading the model is told apart.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

Stage: TypeAlias = Literal[
    "decode",
    "vad",
    "features",
    "encode",
    "predict/decode",
    "prefill/generate",
    "text",
    "write",
]
"""Stages in the order of the work; `decode` is that of audio. A model has one of the two pairs."""

STAGES: tuple[Stage, ...] = get_args(Stage)

JsonStats: TypeAlias = dict[str, float | int | dict[str, float]]


class StageClock:
    """Adds up the seconds that the stages of one file took, in whichever thread they ran."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Stage, float] = {}

    def add(self, stage: Stage, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Time a block, also when it ends with an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def seconds(self) -> dict[Stage, float]:
        """Seconds of the stages that ran, in the order of `STAGES`."""
        with self._lock:
            return {stage: self._seconds[stage] for stage in STAGES if stage in self._seconds}


Outcome: TypeAlias = Literal[
    "done", "done_with_warnings", "no_speech", "partial", "rendered", "skipped", "failed"
]
"""How the run left a recording: a `records.Status` when it transcribed it."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class FileStats:
    """What it took to transcribe one recording."""

    audio_seconds: float
    wall_seconds: float
    stages: Mapping[Stage, float] = field(default_factory=dict)
    tokens: int = 0
    real_frames: int = 0
    """Frames that the encoder was given."""
    padded_frames: int = 0
    """Frames that it computed: with this file's share of the padding of its batches."""

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work for a second of audio; 0 when there is no audio."""
        return _ratio(self.wall_seconds, self.audio_seconds)

    @property
    def speed(self) -> float:
        """Seconds of audio done in a second."""
        return _ratio(self.audio_seconds, self.wall_seconds)

    @property
    def tokens_per_second(self) -> float:
        return _ratio(self.tokens, self.wall_seconds)

    @property
    def batch_fill(self) -> float:
        """Share of the computed frames that were not padding; 1 when none were computed."""
        return self.real_frames / self.padded_frames if self.padded_frames else 1.0

    def as_dict(self) -> JsonStats:
        """As in the JSON output, the manifest and the events; every number is finite."""
        return {
            "audio_seconds": round(self.audio_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "rtf": round(self.rtf, 5),
            "speed": round(self.speed, 2),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "batch_fill": round(self.batch_fill, 4),
            "stages": {stage: round(seconds, 4) for stage, seconds in self.stages.items()},
        }


@dataclass(frozen=True, slots=True)
class RunStats:
    """What a run did."""

    work: FileStats
    """All recordings transcribed in this run together, with the run's own wall seconds."""
    outcomes: Mapping[Outcome, int]
    """How many recordings ended in each way; those that never happened are absent."""
    model_load_seconds: float
    """Not part of `work.wall_seconds`."""
    peak_memory_bytes: int

    @property
    def files(self) -> int:
        return sum(self.outcomes.values())

    def as_dict(self) -> dict[str, object]:
        return {
            "files": self.files,
            "outcomes": dict(self.outcomes),
            **self.work.as_dict(),
            "model_load_seconds": round(self.model_load_seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class RunTally:
    """Adds up a run, file by file, in constant memory. Used by one thread."""

    def __init__(self) -> None:
        self._outcomes: dict[Outcome, int] = {}
        self._sum = FileStats(0.0, 0.0)

    def add(self, outcome: Outcome, stats: FileStats | None = None) -> None:
        """`stats` is None for a recording that was not transcribed in this run."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        if stats is not None:
            self._sum = _add(self._sum, stats)

    def result(self, *, wall_seconds: float, model_load_seconds: float) -> RunStats:
        """`wall_seconds` is the run's, without the loading of the model."""
        return RunStats(
            work=replace(self._sum, wall_seconds=wall_seconds),
            outcomes={name: self._outcomes[name] for name in OUTCOMES if name in self._outcomes},
            model_load_seconds=model_load_seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )


def share(seconds: float, frames: Sequence[int]) -> list[float]:
    """Split the seconds of a batch among its items, in proportion to their frames."""
    total = sum(frames)
    if total == 0:
        return [seconds / len(frames) for _ in frames]
    return [seconds * count / total for count in frames]


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0


def _add(total: FileStats, stats: FileStats) -> FileStats:
    stages = dict(total.stages)
    for stage, seconds in stats.stages.items():
        stages[stage] = stages.get(stage, 0.0) + seconds
    return FileStats(
        audio_seconds=total.audio_seconds + stats.audio_seconds,
        wall_seconds=total.wall_seconds + stats.wall_seconds,
        stages={stage: stages[stage] for stage in STAGES if stage in stages},
        tokens=total.tokens + stats.tokens,
        real_frames=total.real_frames + stats.real_frames,
        padded_frames=total.padded_frames + stats.padded_frames,
    )
