"""Tells people and programs how a run goes. Everything here writes to stderr or to the events file.

All reporters have the methods of `Reporter` and are called by one thread. A reader that goes away
(a closed pipe, a full disk under the events file) never disturbs the run.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol, TextIO

from funasr_batch.errors import StorageError
from funasr_batch.run.stats import FileStats, Outcome, RunStats

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

    from funasr_batch.records import TextSegment


@dataclass(frozen=True, slots=True)
class FileResult:
    """How one recording ended."""

    path: PurePath
    """As it is shown: relative to the folder that was given."""
    outcome: Outcome
    stats: FileStats | None = None
    """None unless it was transcribed in this run."""
    reason: str | None = None
    """Why it failed, is partial or was skipped."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How the run ended."""

    stats: RunStats
    failures: tuple[FileResult, ...]
    """The failed and the partial recordings."""
    exit_code: int
    left: int = 0
    """Recordings that the run did not come to: it was stopped, or had a limit."""


class Reporter(Protocol):
    """What the run tells. Paths are relative to the folder that was given."""

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        """`audio_seconds` is the sum of what is to be transcribed, None when it is not known."""

    def file_started(self, path: PurePath) -> None: ...

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        """`seconds` more of its audio are done, silence included."""

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        """The next text of a recording that is not finished yet; only where texts come early."""

    def file_finished(self, result: FileResult) -> None:
        """Also for a recording that never started: skipped, or failed at once."""

    def warning(self, text: str) -> None: ...

    def run_finished(self, summary: RunSummary) -> None: ...


def choose_reporter(
    stream: TextIO | None, environ: Mapping[str, str]
) -> LiveProgress | LineProgress:
    """A live display on a terminal that can move its cursor, plain lines anywhere else.

    `stream` is `sys.stderr`, which is None in a process that was started with stderr closed.
    """
    if (
        stream is not None
        and stream.isatty()
        and environ.get("TERM", "dumb") not in ("dumb", "unknown")
    ):
        return LiveProgress(stream, colour=not environ.get("NO_COLOR"))
    return LineProgress(stream)


class QuietProgress:
    """Failures and nothing else."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = TolerantStream(stream)

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        pass

    def file_started(self, path: PurePath) -> None:
        pass

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        pass

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        pass

    def file_finished(self, result: FileResult) -> None:
        if result.outcome in ("failed", "partial"):
            self._stream.write_line(_failure_line(result))

    def warning(self, text: str) -> None:
        pass

    def run_finished(self, summary: RunSummary) -> None:
        pass


class LineProgress:
    """A plain line for each recording that was worked on, and a plain table at the end.

    Skipped recordings are only counted, so that a night without news is short.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = TolerantStream(stream)
        self._files = 0
        self._finished = 0

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        self._files = files

    def file_started(self, path: PurePath) -> None:
        pass

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        pass

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        pass

    def file_finished(self, result: FileResult) -> None:
        self._finished += 1
        if result.outcome != "skipped":
            counter = f"{self._finished:>{len(str(self._files))}}/{self._files}"
            self._stream.write_line(f"[{counter}] {_result_line(result)}")

    def warning(self, text: str) -> None:
        self._stream.write_line(f"warning: {displayable(text)}")

    def run_finished(self, summary: RunSummary) -> None:
        for line in summary_lines(summary):
            self._stream.write_line(line)


class LiveProgress:
    """A display that stays at the foot of the terminal: one bar for the run, the recordings in work
    under it; failures and warnings scroll by above, and a table ends it."""

    _MOST_IN_WORK = 6

    def __init__(self, stream: TextIO, *, colour: bool) -> None:
        from rich.console import Console

        self._console: Console = Console(
            file=TolerantStream(stream),  # type: ignore[arg-type]  # all that rich uses of a file
            force_terminal=True,
            no_color=not colour,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._live: Live | None = None
        self._files = 0
        self._finished = 0
        self._failed = 0
        self._audio_seconds: float | None = None
        self._advanced = 0.0
        self._work_began: float | None = None
        self._in_work: dict[PurePath, float] = {}

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        from rich.live import Live

        self._files, self._audio_seconds = files, audio_seconds
        self._live = Live(
            console=self._console,
            get_renderable=self._display,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def file_started(self, path: PurePath) -> None:
        self._work_began = self._work_began or time.monotonic()
        self._in_work[path] = 0.0

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        self._advanced += seconds
        if path in self._in_work:
            self._in_work[path] += seconds

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        pass

    def file_finished(self, result: FileResult) -> None:
        self._finished += 1
        self._in_work.pop(result.path, None)
        if result.outcome in ("failed", "partial"):
            self._failed += 1
            self._print(_failure_line(result), "red")

    def warning(self, text: str) -> None:
        self._print(f"warning: {displayable(text)}", "yellow")

    def run_finished(self, summary: RunSummary) -> None:
        if self._live is not None:
            self._live.stop()
        self._console.print(_summary_table(summary))
        for line in _failure_lines(summary):
            self._print(line, "red")

    def _print(self, line: str, style: str) -> None:
        from rich.text import Text

        # Not print(style=...): that would colour the display below it too.
        self._console.print(Text(line, style), soft_wrap=True)

    def _display(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done, total = self._progress()
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=total, completed=done, width=30), Text(self._figures()))
        in_work = list(self._in_work.items())
        names = [
            Text(
                f"  {displayable(path)}  {format_seconds(seconds)}",
                style="dim",
                overflow="ellipsis",
                no_wrap=True,
            )
            for path, seconds in in_work[: self._MOST_IN_WORK]
        ]
        if len(in_work) > self._MOST_IN_WORK:
            names.append(Text(f"  and {len(in_work) - self._MOST_IN_WORK} more", style="dim"))
        return Group(line, *names)

    def _progress(self) -> tuple[float, float]:
        """How much is done of how much: seconds of audio when they are known, else files."""
        if self._audio_seconds:
            return min(self._advanced, self._audio_seconds), self._audio_seconds
        return self._finished, max(self._files, 1)

    def _figures(self) -> str:
        figures = [f"{self._finished}/{self._files} files"]
        elapsed = time.monotonic() - self._work_began if self._work_began else 0.0
        if elapsed > 0 and self._advanced > 0:
            figures.append(f"{_speed(self._advanced / elapsed)} real time")
        done, total = self._progress()
        if elapsed > 0 and done > 0:
            figures.append(f"{format_seconds(elapsed * (total - done) / done)} left")
        if self._failed:
            figures.append(f"{self._failed} failed")
        return "  ".join(figures)


class EventLog:
    """JSON lines for programs, each flushed as it is written, appended to a file.

    Every line has `event` and `time` (ISO 8601, UTC). Events and what else they hold:

    - `run_started`: `files`, `audio_seconds` (null when unknown)
    - `file_started`: `path`
    - `segment`: `path`, `id`, `start`, `end` (seconds), `text`, `timing`, as the JSON output has
      them; in order of time while the recording is still being read, which may fail after it;
      with `stream_encoder` only
    - `file_finished`: `path`, `status`, `stats`; `reason` when partial
    - `file_failed`: `path`, `reason`
    - `file_skipped`: `path`, `reason`
    - `warning`: `text`
    - `run_finished`: `exit_code`, `stats`

    `path` is readable text; when the name is not valid UTF-8, `path_base64` holds its bytes.
    """

    def __init__(self, path: Path) -> None:
        """`-` is stdout. Raises `StorageError` when the file cannot be opened."""
        try:
            if path == Path("-"):
                file = os.fdopen(os.dup(1), "w", encoding="utf-8")
            else:
                file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write events to {path}: {error.strerror}") from error
        self._file = TolerantStream(file)

    @property
    def broken(self) -> bool:
        """Whether a line could not be written; none are tried after it."""
        return self._file.broken

    def close(self) -> None:
        self._file.close()

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        self._write("run_started", files=files, audio_seconds=audio_seconds)

    def file_started(self, path: PurePath) -> None:
        self._write("file_started", **_json_path(path))

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        pass

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        self._write(
            "segment",
            **_json_path(path),
            id=segment.id,
            start=segment.start / 1000,
            end=segment.end / 1000,
            text=segment.text,
            timing=segment.timing,
        )

    def file_finished(self, result: FileResult) -> None:
        path = _json_path(result.path)
        if result.outcome in ("failed", "skipped"):
            self._write(f"file_{result.outcome}", **path, reason=_reason(result))
            return
        stats = result.stats.as_dict() if result.stats else None
        reason = {"reason": _reason(result)} if result.reason else {}
        self._write("file_finished", **path, status=result.outcome, stats=stats, **reason)

    def warning(self, text: str) -> None:
        self._write("warning", text=displayable(text))

    def run_finished(self, summary: RunSummary) -> None:
        self._write("run_finished", exit_code=summary.exit_code, stats=summary.stats.as_dict())

    def _write(self, event: str, **values: object) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": now, **values}, ensure_ascii=False)
        self._file.write_line(line)


class Broadcast:
    """Tells several reporters the same."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = tuple(reporters)

    def run_started(self, files: int, audio_seconds: float | None) -> None:
        for reporter in self._reporters:
            reporter.run_started(files, audio_seconds)

    def file_started(self, path: PurePath) -> None:
        for reporter in self._reporters:
            reporter.file_started(path)

    def file_advanced(self, path: PurePath, seconds: float) -> None:
        for reporter in self._reporters:
            reporter.file_advanced(path, seconds)

    def file_heard(self, path: PurePath, segment: TextSegment) -> None:
        for reporter in self._reporters:
            reporter.file_heard(path, segment)

    def file_finished(self, result: FileResult) -> None:
        for reporter in self._reporters:
            reporter.file_finished(result)

    def warning(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.warning(text)

    def run_finished(self, summary: RunSummary) -> None:
        for reporter in self._reporters:
            reporter.run_finished(summary)


class TolerantStream:
    """A text stream that never raises: after its first fault it swallows everything."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = (stream.encoding if stream else None) or "utf-8"

    @property
    def encoding(self) -> str:
        return self._encoding

    @property
    def broken(self) -> bool:
        return self._stream is None

    def isatty(self) -> bool:
        with self._giving_up() as stream:
            return stream.isatty()
        return False

    def write_line(self, line: str) -> None:
        self.write(line + "\n")
        self.flush()

    def write(self, text: str) -> int:
        encodable = text.encode(self._encoding, "backslashreplace").decode(self._encoding)
        with self._giving_up() as stream:
            stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        with self._giving_up() as stream:
            stream.flush()

    def close(self) -> None:
        with self._giving_up() as stream:
            stream.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[TextIO]:
        try:
            yield self._stream or io.StringIO()
        except (OSError, ValueError):  # ValueError: it was closed
            self._stream = None


def displayable(text: str | PurePath) -> str:
    """Text on one line without anything that could move a cursor or hide what is there.

    Control and format characters become escapes; bytes of a name that are not UTF-8 become `\\xff`.
    """
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else _escape(char)
        for char in str(text)
    )


def format_seconds(seconds: float) -> str:
    """`4.1s`, `3m12s`, `2h05m`: two units at most."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m"


def summary_lines(summary: RunSummary) -> list[str]:
    """The table at the end as plain lines; one line when there was nothing to do."""
    if set(summary.stats.outcomes) <= {"skipped"} and not summary.left:
        return [f"nothing to do: {summary.stats.files:,} done before"]
    rows = _summary_rows(summary)
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows] + _failure_lines(summary)


def _summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    stats, work = summary.stats, summary.stats.work
    rows = [("files", _counts(stats))]
    if summary.left:
        rows.append(("left", f"{summary.left:,} for the next run"))
    if work.audio_seconds > 0:
        rows.append(("audio", format_seconds(work.audio_seconds)))
    rows.append(("time", f"{format_seconds(work.wall_seconds)}{_model_load(stats)}"))
    if work.audio_seconds > 0:
        rows.append(("speed", f"{_speed(work.speed)} real time (RTF {work.rtf:.4f})"))
    if work.tokens:
        rows.append(("tokens", f"{work.tokens:,} ({work.tokens_per_second:,.0f}/s)"))
    if work.padded_frames:
        rows.append(("batch fill", f"{work.batch_fill:.0%}"))
    rows.extend((f"  {stage}", format_seconds(seconds)) for stage, seconds in work.stages.items())
    rows.append(("peak memory", f"{stats.peak_memory_bytes / 2**20:,.0f} MiB"))
    return rows


def _counts(stats: RunStats) -> str:
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in stats.outcomes.items()]
    return ", ".join(counts) or "none"


def _model_load(stats: RunStats) -> str:
    if not stats.model_load_seconds:
        return ""
    return f" and {format_seconds(stats.model_load_seconds)} to load the model"


def _summary_table(summary: RunSummary) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in _summary_rows(summary):
        table.add_row(name, value)
    return table


def _failure_lines(summary: RunSummary) -> list[str]:
    return [_failure_line(result) for result in summary.failures]


def _failure_line(result: FileResult) -> str:
    return f"{result.outcome}: {displayable(result.path)}: {_reason(result)}"


def _result_line(result: FileResult) -> str:
    words = [displayable(result.path), result.outcome.replace("_", " ")]
    if result.stats is not None:
        audio = format_seconds(result.stats.audio_seconds)
        wall = format_seconds(result.stats.wall_seconds)
        words.append(f"{audio} in {wall} ({_speed(result.stats.speed)})")
    if result.reason is not None:
        words.append(_reason(result))
    return "  ".join(words)


def _reason(result: FileResult) -> str:
    return displayable(result.reason or "no reason given")


def _speed(factor: float) -> str:
    return f"{factor:.0f}×" if factor >= 9.95 else f"{factor:.1f}×"


def _json_path(path: PurePath) -> dict[str, str]:
    name = os.fsencode(path)
    try:
        return {"path": name.decode("utf-8")}
    except UnicodeDecodeError:
        return {"path": displayable(path), "path_base64": base64.b64encode(name).decode("ascii")}


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
