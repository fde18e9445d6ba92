"""Seconds, speeds and memory of files and runs."""

from __future__ import annotations

import json
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.run.stats import (
    FileStats,
    RunTally,
    StageClock,
    peak_memory_bytes,
    share,
)


def test_a_stage_adds_up_over_threads_without_loss() -> None:
    clock = StageClock()

    def work() -> None:
        for _ in range(2000):
            clock.add("encode", 0.25)
            clock.add("decode", 0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds() == {"decode": 4000.0, "encode": 2000.0}
    assert list(clock.seconds()) == ["decode", "encode"], "in the order of the work"


def test_a_stage_that_fails_is_timed_too() -> None:
    clock = StageClock()
    with pytest.raises(KeyError), clock.measure("vad"):
        raise KeyError
    assert clock.seconds()["vad"] > 0.0


def test_ratios_of_a_file() -> None:
    stats = FileStats(120.0, 4.0, tokens=400, real_frames=900, padded_frames=1000)
    assert stats.rtf == pytest.approx(1 / 30)
    assert stats.speed == pytest.approx(30)
    assert stats.tokens_per_second == pytest.approx(100)
    assert stats.batch_fill == pytest.approx(0.9)


@pytest.mark.parametrize(("audio", "wall"), [(0.0, 0.0), (0.0, 2.0), (2.0, 0.0)])
def test_every_number_is_finite_also_without_audio(audio: float, wall: float) -> None:
    numbers = FileStats(audio, wall).as_dict()
    flat = [value for value in numbers.values() if not isinstance(value, dict)]
    assert all(math.isfinite(value) for value in flat)
    json.dumps(numbers, allow_nan=False)


def test_the_keys_are_those_of_the_json_output() -> None:
    numbers = FileStats(1.0, 1.0, {"decode": 0.1, "encode": 0.9}).as_dict()
    assert {"audio_seconds", "wall_seconds", "rtf", "speed", "stages"} <= set(numbers)
    assert numbers["stages"] == {"decode": 0.1, "encode": 0.9}


def test_what_was_not_transcribed_never_flatters_the_speed() -> None:
    tally = RunTally()
    tally.add("done", FileStats(60.0, 3.0, {"encode": 2.0}, tokens=10))
    tally.add("partial", FileStats(40.0, 2.0, {"decode": 1.0, "encode": 0.5}, tokens=5))
    before = tally.result(wall_seconds=4.0, model_load_seconds=1.5)
    for _ in range(1000):
        tally.add("skipped")
    tally.add("rendered")
    tally.add("failed")
    run = tally.result(wall_seconds=4.0, model_load_seconds=1.5)
    assert run.work == before.work
    assert run.work.speed == pytest.approx(25.0)
    assert run.work.stages == {"decode": 1.0, "encode": 2.5}
    assert run.work.tokens == 15
    assert run.files == 1004
    assert list(run.outcomes.items()) == [
        ("done", 1),
        ("partial", 1),
        ("rendered", 1),
        ("skipped", 1000),
        ("failed", 1),
    ]
    assert run.model_load_seconds == 1.5
    json.dumps(run.as_dict(), allow_nan=False)


@given(st.floats(0, 1000), st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_shares_of_a_batch_add_up(seconds: float, frames: list[int]) -> None:
    shares = share(seconds, frames)
    assert len(shares) == len(frames)
    assert sum(shares) == pytest.approx(seconds)
    ranked = sorted(zip(frames, shares, strict=True))
    assert [value for _, value in ranked] == sorted(shares)


def test_peak_memory_is_in_bytes() -> None:
    held = bytearray(b"x") * (64 * 2**20)
    assert len(held) < peak_memory_bytes() < 2**40
