"""A run that is told to stop keeps what is finished, and the next one goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import TIMEOUT, Command, files, record, without_mlx

COUNT = 30


@pytest.fixture
def many(recordings: Path) -> Path:
    """More than a run can do before a signal reaches it."""
    for number in range(COUNT):
        record(recordings / f"{number:02}.wav", 12.0, start=number)
    return recordings


def wait_for_first(process: subprocess.Popen[bytes]) -> None:
    """Returns when a recording has been kept."""
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    while line.startswith("warning: "):  # such as that there is no fast BLAS here
        line = process.stderr.readline().decode()
    assert line.startswith("[ 1/30] "), line


def end(process: subprocess.Popen[bytes]) -> str:
    """What it said before it ended by itself."""
    try:
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return err.decode()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_the_first_signal_keeps_what_is_finished(
    command: Command, many: Path, number: signal.Signals
) -> None:
    process = command.start(many)
    wait_for_first(process)
    process.send_signal(number)
    said = end(process)
    assert process.returncode == 128 + number, said
    assert "finishing the batch in hand" in said
    assert "for the next run" in said
    assert "Traceback" not in said
    done = len(list(many.glob("*.json")))
    assert 1 <= done < COUNT
    if number == signal.SIGTERM:
        ended = command(many)
        assert ended.code == 0
        assert f"{COUNT - done} done, {done} skipped" in ended.err
        assert len(files(many)) == 4 * COUNT


def test_the_second_signal_ends_it_at_once(command: Command, many: Path) -> None:
    sabotage = (
        "import time; import funasr_batch.recognizer as m\n"
        "m.Recognizer.recognise = lambda *_: time.sleep(600)"
    )
    process = command.start(many, sabotage=sabotage)
    assert process.stderr is not None
    # The stuck model is reached soon after the lock is taken.
    while not (many / ".funasr-batch" / "manifest.sqlite3").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == (
        b"funasr-batch: finishing the batch in hand; once more ends at once\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    end(process)
    assert process.returncode == 128 + signal.SIGTERM


def test_hangup_is_ignored_under_nohup(command: Command, recordings: Path) -> None:
    for number in range(6):
        record(recordings / f"{number}.wav", 12.0, start=number)
    process = command.start(
        recordings, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    said = end(process)
    assert process.returncode == 0, said
    assert "6 done" in said


def test_an_interrupt_before_the_run_has_begun(
    command: Command, recordings: Path, tmp_path: Path
) -> None:
    fifo = tmp_path / "list"
    os.mkfifo(fifo)
    process = command.start("--from-file", fifo)
    with fifo.open("wb"):  # it waits for the list now
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = end(process)
    assert process.returncode == 128 + signal.SIGINT
    assert said == ""


def test_an_interrupt_while_outputs_are_only_laid_out_again(
    command: Command, recordings: Path, tmp_path: Path
) -> None:
    for number in range(COUNT):
        record(recordings / f"{number:02}.wav", 1.0, start=number)
    assert command(recordings).code == 0
    process = command.start(recordings, "--bom", env=without_mlx(tmp_path))
    wait_for_first(process)
    process.send_signal(signal.SIGINT)
    said = end(process)
    assert process.returncode in (0, 128 + signal.SIGINT), said
    ended = command(recordings, "--bom", env=without_mlx(tmp_path))
    assert ended.code == 0
    texts = [path.read_bytes() for path in recordings.glob("*.txt")]
    assert len(texts) == COUNT
    assert all(text.startswith(b"\xef\xbb\xbf") for text in texts)
