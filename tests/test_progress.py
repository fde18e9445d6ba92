"""What people and programs are told, and that telling them never disturbs the run."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import StorageError
from funasr_batch.run.progress import (
    Broadcast,
    EventLog,
    FileResult,
    LineProgress,
    LiveProgress,
    QuietProgress,
    Reporter,
    RunSummary,
    choose_reporter,
    displayable,
    format_seconds,
)
from funasr_batch.run.stats import FileStats, RunTally

DONE = FileResult(
    PurePath("talks/a.mp3"),
    "done",
    FileStats(192.0, 4.1, {"decode": 0.5, "encode": 3.5}, 700, 3000, 3200),
)
FAILED = FileResult(PurePath("talks/\x1b[2Jb\n.wav"), "failed", reason="no audio\ntrack")
PARTIAL = FileResult(PurePath("c.flac"), "partial", FileStats(8.0, 0.5), "damaged at 8.0 s")
SKIPPED = FileResult(PurePath("d.wav"), "skipped", reason="done, nothing changed")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(reporter: Reporter, results: tuple[FileResult, ...]) -> None:
    """A run with these results."""
    tally = RunTally()
    reporter.run_started(len(results), 200.0)
    for result in results:
        if result.outcome != "skipped":
            reporter.file_started(result.path)
        if result.stats is not None:
            reporter.file_advanced(result.path, result.stats.audio_seconds / 2)
            reporter.file_advanced(result.path, result.stats.audio_seconds / 2)
        reporter.file_finished(result)
        tally.add(result.outcome, result.stats)
    reporter.warning("the disk\ris nearly full")
    failures = tuple(result for result in results if result.outcome in ("failed", "partial"))
    stats = tally.result(wall_seconds=5.0, model_load_seconds=1.25)
    reporter.run_finished(RunSummary(stats, failures, exit_code=1))


ALL = (SKIPPED, DONE, FAILED, PARTIAL)


class TestLines:
    def test_a_line_for_each_file_worked_on_and_a_table(self) -> None:
        stream = io.StringIO()
        report(LineProgress(stream), ALL)
        lines = stream.getvalue().splitlines()
        assert lines[:4] == [
            "[2/4] talks/a.mp3  done  3m12s in 4.1s (47×)",
            r"[3/4] talks/\x1b[2Jb\n.wav  failed  no audio\ntrack",
            "[4/4] c.flac  partial  8.0s in 0.5s (16×)  damaged at 8.0 s",
            r"warning: the disk\ris nearly full",
        ]
        assert lines[4:12] == [
            "files        1 done, 1 partial, 1 skipped, 1 failed",
            "audio        3m20s",
            "time         5.0s and 1.2s to load the model",
            "speed        40× real time (RTF 0.0250)",
            "tokens       700 (140/s)",
            "batch fill   94%",
            "  decode     0.5s",
            "  encode     3.5s",
        ]
        assert lines[12].startswith("peak memory  ")
        assert lines[13:] == [
            r"failed: talks/\x1b[2Jb\n.wav: no audio\ntrack",
            "partial: c.flac: damaged at 8.0 s",
        ]

    def test_a_night_without_news_is_one_line(self) -> None:
        stream = io.StringIO()
        reporter = LineProgress(stream)
        reporter.run_started(500, None)
        tally = RunTally()
        for _ in range(500):
            reporter.file_finished(SKIPPED)
            tally.add("skipped")
        stats = tally.result(wall_seconds=0.2, model_load_seconds=0.0)
        reporter.run_finished(RunSummary(stats, (), 0))
        assert stream.getvalue() == "nothing to do: 500 done before\n"

    def test_quiet_prints_failures_only(self) -> None:
        stream = io.StringIO()
        report(QuietProgress(stream), ALL)
        assert stream.getvalue().splitlines() == [
            r"failed: talks/\x1b[2Jb\n.wav: no audio\ntrack",
            "partial: c.flac: damaged at 8.0 s",
        ]


class TestLive:
    def show(self, environ: dict[str, str], results: tuple[FileResult, ...] = ALL) -> str:
        terminal = Terminal()
        reporter = choose_reporter(terminal, environ)
        assert isinstance(reporter, LiveProgress)
        report(reporter, results)
        return terminal.getvalue()

    def test_failures_table_and_nothing_left_of_the_display(self) -> None:
        text = self.show({"TERM": "xterm-256color"})
        assert r"failed: talks/\x1b[2Jb\n.wav: no audio\ntrack" in text
        assert "\x1b[2J" not in text, "a name moved the cursor"
        table = text[text.rindex("files") :]
        assert "1 done, 1 partial, 1 skipped, 1 failed" in table
        assert "40× real time (RTF 0.0250)" in table
        assert "damaged at 8.0 s" in table
        assert text.rstrip().endswith("\x1b[0m"), "the last failure, in red"
        assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is back"

    def test_names_are_never_markup(self) -> None:
        name = "[bold red]x[] :smile: [link=a]"
        text = self.show({"TERM": "xterm"}, (FileResult(PurePath(name), "failed", reason="[b]"),))
        assert f"failed: {name}: [b]" in text

    def test_no_color(self) -> None:
        text = self.show({"TERM": "xterm-256color", "NO_COLOR": "1"})
        assert "\x1b[31m" not in text
        assert "\x1b[31m" in self.show({"TERM": "xterm-256color", "NO_COLOR": ""})

    def test_the_display_shows_files_speed_and_time_left(self) -> None:
        from rich.console import Console

        reporter = LiveProgress(Terminal(), colour=False)
        reporter.run_started(12, 400.0)
        try:
            for number in range(8):
                reporter.file_started(PurePath(f"talks/{number}\n.mp3"))
            reporter.file_advanced(PurePath("talks/0\n.mp3"), 100.0)
            reporter.file_finished(FAILED)
            console = Console(file=io.StringIO(), width=100)
            with console.capture() as capture:
                console.print(reporter._display())
        finally:
            reporter._live.stop()  # type: ignore[union-attr]
        text = capture.get()
        assert "1/12 files" in text
        assert "× real time" in text
        assert "left" in text
        assert "1 failed" in text
        assert r"talks/0\n.mp3  1m40s" in text
        assert r"talks/5\n.mp3" in text
        assert r"talks/6\n.mp3" not in text
        assert "and 2 more" in text


class TestChoosing:
    @pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {}, {"TERM": "unknown"}])
    def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
        self, environ: dict[str, str]
    ) -> None:
        assert isinstance(choose_reporter(Terminal(), environ), LineProgress)

    def test_what_is_no_terminal_gets_lines(self) -> None:
        assert isinstance(choose_reporter(io.StringIO(), {"TERM": "xterm"}), LineProgress)

    def test_stderr_that_was_closed_before_the_start(self) -> None:
        report(choose_reporter(None, {"TERM": "xterm"}), ALL)

    def test_rich_is_loaded_for_the_live_display_only(self) -> None:
        code = """
import io, sys
from funasr_batch.run.progress import *
LineProgress(sys.stderr).run_started(1, None)
print("rich" in sys.modules, "numpy" in sys.modules)
"""
        project = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=project)
        assert done.stdout == b"False False\n", done.stderr


class TestFaults:
    @pytest.mark.parametrize("kind", [LineProgress, QuietProgress])
    def test_a_reader_that_went_away(self, kind: type[LineProgress]) -> None:
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
        report(kind(stream), ALL * 5)
        with pytest.raises(BrokenPipeError):
            stream.close()

    def test_a_terminal_that_went_away(self) -> None:
        class Gone(Terminal):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        report(LiveProgress(Gone(), colour=True), ALL)

    def test_a_stream_that_was_closed(self) -> None:
        stream = io.StringIO()
        reporter = LineProgress(stream)
        stream.close()
        report(reporter, ALL)

    def test_a_stream_that_only_knows_ascii(self) -> None:
        data = io.BytesIO()
        stream = io.TextIOWrapper(data, encoding="ascii")
        report(LineProgress(stream), ALL)
        assert rb"(47\xd7)" in data.getvalue()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk_under_the_events(self) -> None:
        log = EventLog(Path("/dev/full"))
        report(log, ALL)
        assert log.broken
        log.close()


class TestEvents:
    def events(self, path: Path, results: tuple[FileResult, ...]) -> list[dict[str, object]]:
        log = EventLog(path)
        report(log, results)
        assert not log.broken
        lines = path.read_text("utf-8").splitlines()  # before close: each line is flushed
        log.close()
        return [json.loads(line) for line in lines]

    def test_every_event_with_its_time_and_what_the_documentation_lists(
        self, tmp_path: Path
    ) -> None:
        events = self.events(tmp_path / "events.jsonl", ALL)
        assert [event["event"] for event in events] == [
            "run_started",
            "file_skipped",
            "file_started",
            "file_finished",
            "file_started",
            "file_failed",
            "file_started",
            "file_finished",
            "warning",
            "run_finished",
        ]
        times = [datetime.fromisoformat(str(event.pop("time"))) for event in events]
        assert times == sorted(times)
        assert all(time.tzinfo is not None for time in times)
        assert events[0] == {"event": "run_started", "files": 4, "audio_seconds": 200.0}
        assert events[1] == {
            "event": "file_skipped",
            "path": "d.wav",
            "reason": "done, nothing changed",
        }
        assert DONE.stats is not None
        assert events[3] == {
            "event": "file_finished",
            "path": "talks/a.mp3",
            "status": "done",
            "stats": DONE.stats.as_dict(),
        }
        assert events[5] == {
            "event": "file_failed",
            "path": str(FAILED.path),
            "reason": r"no audio\ntrack",
        }
        assert events[7]["status"] == "partial"
        assert events[7]["reason"] == "damaged at 8.0 s"
        assert events[9]["exit_code"] == 1
        documented = EventLog.__doc__ or ""
        assert all(f"`{event['event']}`" in documented for event in events)

    @given(st.binary(min_size=1, max_size=20).filter(lambda n: not set(n) & set(b"/\0")))
    def test_any_name_can_be_read_back_from_valid_json(self, name: bytes) -> None:
        path = PurePath(os.fsdecode(name))
        stream = io.BytesIO()
        log = EventLog(Path(os.devnull))
        log._file._stream = io.TextIOWrapper(stream, encoding="utf-8")
        log.file_started(path)
        event = json.loads(stream.getvalue().decode("utf-8"))
        encoded = event.get("path_base64")
        assert (base64.b64decode(encoded) if encoded else event["path"].encode()) == bytes(path)

    def test_a_second_run_is_appended(self, tmp_path: Path) -> None:
        first = self.events(tmp_path / "events.jsonl", (DONE,))
        both = self.events(tmp_path / "events.jsonl", (DONE,))
        assert len(both) == 2 * len(first)

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="events"):
            EventLog(tmp_path)


def test_broadcast_tells_all_the_same() -> None:
    one, two, alone = io.StringIO(), io.StringIO(), io.StringIO()
    report(Broadcast([LineProgress(one), QuietProgress(two)]), ALL)
    report(QuietProgress(alone), ALL)
    assert "[2/4] talks/a.mp3" in one.getvalue()
    assert two.getvalue() == alone.getvalue()


@given(st.text(st.characters()))
def test_what_is_displayed_is_one_harmless_encodable_line(text: str) -> None:
    shown = displayable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert all(char.isprintable() or char == "\u3000" or char.isspace() for char in shown)
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"talk\xff.wav", r"talk\xff.wav"),
        ("录音　一.wav".encode(), "录音　一.wav"),
        ("a\u202egpj.wav".encode(), r"a\u202egpj.wav"),
        (b"tab\t.wav", r"tab\t.wav"),
    ],
)
def test_names_for_display(name: bytes, shown: str) -> None:
    assert displayable(PurePath(os.fsdecode(name))) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0s"),
        (59.94, "59.9s"),
        (59.96, "1m00s"),
        (192, "3m12s"),
        (3599.6, "1h00m"),
        (7530, "2h05m"),
        (360000, "100h00m"),
    ],
)
def test_format_seconds(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown
