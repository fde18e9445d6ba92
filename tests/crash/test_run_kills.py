"""Whole runs that are killed at random moments and started again until they come to their end.

What they leave must be what a run leaves that nobody disturbed, byte for byte. Only the statistics
in the JSON, which say how long the work took, are not compared.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from command import ALONE, TIMEOUT, Command, comparable, record
from tiny_model import write_tiny_model

from funasr_batch.run.manifest import read_manifest

COUNT = 10
KILLS = 6
TEMPORARY = re.compile(r"\.funasr-[0-9a-f]{16}\.tmp")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("user")
    return Command.with_home(folder / "home", write_tiny_model(folder / "model"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(COUNT):
        record(folder / f"{number % 3}" / f"{number}.wav", 4.0 + 3 * number, start=number)
    (folder / "broken.wav").write_text("broken")
    return folder


def outputs(out: Path) -> dict[str, object]:
    """What readers see in the output folder."""
    whole = comparable(out) if out.is_dir() else {}
    return {name: content for name, content in whole.items() if not TEMPORARY.search(name)}


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_until_it_is_done(
    command: Command, recordings: Path, tmp_path: Path, seed: int
) -> None:
    assert command(recordings, "-o", tmp_path / "clean", *ALONE).code == 1
    whole = outputs(tmp_path / "clean")
    assert len(whole) == 3 * COUNT
    generator = random.Random(seed)
    out = tmp_path / "out"
    kept: dict[str, object] = {}
    for _ in range(KILLS):
        process = command.start(recordings, "-o", out, *ALONE)
        assert process.stderr is not None
        for _ in range(generator.randint(0, 3)):
            process.stderr.readline()
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=TIMEOUT)
        now = outputs(out)
        assert now == {name: whole[name] for name in now}, "what is there is whole"
        assert kept.keys() <= now.keys(), "what was there stays"
        kept = now
    assert len(kept) > 0
    ended = command(recordings, "-o", out, *ALONE)
    assert ended.code == 1, ended.err
    assert outputs(out) == whole
    assert not [path for path in out.rglob("*") if TEMPORARY.search(path.name)]


def test_what_a_killed_run_finished_is_not_done_again(
    command: Command, recordings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = command.start(recordings, "-o", out, "--workers", "1")
    assert process.stderr is not None
    while b" done " not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=TIMEOUT)
    manifest = read_manifest(out)
    assert manifest is not None
    with manifest:
        done = {
            os.path.relpath(out / os.fsdecode(entry.path), recordings)
            for entry in manifest.all_entries()
            if entry.status == "done"
        }
    assert done
    log = tmp_path / "log"
    ended = command(recordings, "-o", out, "--events", log)
    assert f"{COUNT - len(done)} done, {len(done)} skipped, 1 failed" in ended.err
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    started = {event["path"] for event in events if event["event"] == "file_started"}
    assert not started & done
    assert len(started | done) == COUNT + 1
