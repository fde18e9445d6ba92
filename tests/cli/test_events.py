"""`--events`: the run told to programs, a JSON object a line."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from command import TIMEOUT, Command, record


def parse(text: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in text.splitlines()]
    times = [datetime.fromisoformat(event.pop("time")) for event in events]
    assert times == sorted(times)
    return events


def test_the_whole_run(command: Command, recordings: Path, tmp_path: Path) -> None:
    record(recordings / "a.wav", 2.0)
    (recordings / "b.wav").write_text("broken")
    log = tmp_path / "log.jsonl"
    ended = command(recordings, recordings / "gone.wav", "--events", log, "--workers", "1")
    assert (ended.code, ended.out) == (1, "")
    events = parse(log.read_text("utf-8"))
    assert events[0] == {"event": "run_started", "files": 3, "audio_seconds": None}
    assert events[1] == {
        "event": "file_failed",
        "path": str(recordings / "gone.wav"),
        "reason": "does not exist",
    }
    about = {
        name: [event for event in events if event.get("path") == name]
        for name in ("a.wav", "b.wav")
    }
    assert [event["event"] for event in about["a.wav"]] == ["file_started", "file_finished"]
    assert [event["event"] for event in about["b.wav"]] == ["file_started", "file_failed"]
    finished = about["a.wav"][1]
    assert finished["status"] == "done"
    assert finished["stats"]["audio_seconds"] == 2.0
    assert set(finished["stats"]["stages"]) >= {"decode", "vad", "features", "encode", "write"}
    assert events[-1]["event"] == "run_finished"
    assert events[-1]["exit_code"] == 1
    assert events[-1]["stats"]["outcomes"] == {"done": 1, "failed": 2}
    assert events[-1]["stats"]["peak_memory_bytes"] > 10**7


def test_a_second_run_is_appended(command: Command, recordings: Path, tmp_path: Path) -> None:
    record(recordings / "a.wav")
    log = tmp_path / "log.jsonl"
    for _ in range(2):
        assert command(recordings, "--events", log, "-q").code == 0
    events = parse(log.read_text("utf-8"))
    assert [event["event"] for event in events] == [
        *("run_started", "file_started", "file_finished", "run_finished"),
        *("run_started", "file_skipped", "run_finished"),
    ]
    assert events[-2]["reason"] == "done, nothing changed"
    assert "speed" in events[-1]["stats"]
    assert events[-1]["stats"]["audio_seconds"] == 0, "what is skipped flatters no speed"


def test_stdout_is_a_place_for_them(command: Command, recordings: Path) -> None:
    record(recordings / "语音.wav")
    ended = command(recordings, "--events", "-", env={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0
    assert "语音.wav" in [event.get("path") for event in parse(ended.out)]
    assert not (command.home / "-").exists()


def test_their_reader_may_go_away(command: Command, recordings: Path) -> None:
    for number in range(3):
        record(recordings / f"{number}.wav")
    process = command.start(recordings, "--events", "-")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(TIMEOUT) == 0
    assert len(list(recordings.glob("*.srt"))) == 3


def test_a_run_that_is_ended_by_a_fault_says_so(
    command: Command, recordings: Path, tmp_path: Path
) -> None:
    record(recordings / "a.wav")
    sabotage = """
import funasr_batch.run.pipeline as m
from funasr_batch.errors import StorageError
def publish(files): raise StorageError("it is full")
m.publish = publish
"""
    ended = command(recordings, "--events", tmp_path / "log", sabotage=sabotage)
    assert ended.code == 5
    last = parse((tmp_path / "log").read_text("utf-8"))[-1]
    assert (last["event"], last["exit_code"]) == ("run_finished", 5)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_names_that_are_no_text(command: Command, recordings: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n.wav")
    try:
        record(recordings / name)
    except OSError:
        pytest.skip("file names are UTF-8 here")
    assert command(recordings, "--events", tmp_path / "log").code == 0
    paths = [event for event in parse((tmp_path / "log").read_text("utf-8")) if "path" in event]
    assert {event["path"] for event in paths} == {"\\xff\\n.wav"}
    assert {event["path_base64"] for event in paths} == {"/woud2F2"}
