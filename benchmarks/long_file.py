"""Memory and speed on one very long recording, through the command line as a user runs it.

    python benchmarks/long_file.py                         10 hours with the sample model
    python benchmarks/long_file.py --hours 0.5 --model ./folder

Speech of `--speech` is repeated with pauses of up to 8 s and streamed to a FLAC file in the
temporary folder (about 0.6 GB for 10 hours), which is deleted at the end. The script ends with 1
when the run failed, used more than `--limit` of memory, or left a part of the recording out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import machine
import numpy as np
import numpy.typing as npt
import soundfile

RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
LONGEST_PAUSE = 8.0
NOISE = 1e-3
"""Of the pauses: -60 dB, a quiet room."""


def main() -> int:
    options = _options()
    sys.stdout.reconfigure(line_buffering=True)
    print(machine.describe())
    with tempfile.TemporaryDirectory(prefix="long-") as scratch:
        recording = Path(scratch, "long.flac")
        started = time.perf_counter()
        written = write_recording(recording, options.hours * 3600, options.speech)
        print(
            f"recording   {written / 3600:.2f} h, {recording.stat().st_size / 1e6:,.0f} MB, "
            f"written in {time.perf_counter() - started:.0f} s"
        )
        run = transcribe(recording, Path(scratch, "out"), options.model)
        faults = []
        if run.code:
            faults.append(f"exit code {run.code}")
        else:
            segments, end = _transcript(Path(scratch, "out", "long.json"))
            print(f"transcript  {segments:,} segments, the last ends at {end / 3600:.3f} h")
            if end < written - 2 * LONGEST_PAUSE:
                faults.append(f"the transcript ends {written - end:.0f} s before the recording")
    print(f"wall time   {run.seconds:,.1f} s, RTF {run.seconds / written:.4f}, ", end="")
    print(f"{written / run.seconds:,.0f} x real time")
    print(f"processor   {run.processor_seconds:,.1f} s")
    print(f"peak RSS    {run.peak / 1e6:,.0f} MB (limit {options.limit * 1e3:,.0f} MB)")
    if run.peak > options.limit * 1e9:
        faults.append("too much memory")
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--model", default="sample-paraformer", help="name or folder of a model")
    parser.add_argument(
        "--speech",
        type=Path,
        default=Path(__file__).parent.parent / "sample_audio",
        help="a folder of recordings at 16 kHz",
    )
    parser.add_argument("--limit", type=float, default=1.5, help="gigabytes of memory allowed")
    return parser.parse_args()


def write_recording(path: Path, seconds: float, speech: Path) -> float:
    """Streams speech and pauses to a mono file; returns its length in seconds."""
    with soundfile.SoundFile(path, "w", RATE, channels=1, subtype="PCM_16") as file:
        for block in _speech_and_pauses(speech):
            file.write(block)
            if file.frames >= seconds * RATE:
                return file.frames / RATE
    raise AssertionError("the blocks never end")


def _speech_and_pauses(folder: Path) -> Iterator[npt.NDArray[np.float32]]:
    recordings = list(_recordings(folder))
    if not recordings:
        sys.exit(f"{folder} has no recording at {RATE} Hz in {', '.join(SUFFIXES)}")
    generator = np.random.default_rng(0)
    for samples in cycle(recordings):
        yield samples
        pause = int(generator.uniform(0.3, LONGEST_PAUSE) * RATE)
        yield NOISE * generator.standard_normal(pause, dtype=np.float32)


def _recordings(folder: Path) -> Iterator[npt.NDArray[np.float32]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            if rate == RATE:
                yield samples[:, 0]


@dataclass(frozen=True, slots=True)
class Run:
    code: int
    seconds: float
    processor_seconds: float
    peak: int
    """Bytes of resident memory at most."""


def transcribe(recording: Path, out: Path, model: str) -> Run:
    command = (sys.executable, "-m", "funasr_batch", recording, "-o", out, "--model", model)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would wait once more
    peak = usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss
    return Run(process.returncode, seconds, usage.ru_utime + usage.ru_stime, peak)


def _transcript(path: Path) -> tuple[int, float]:
    """Number of segments, and the end of the last in seconds."""
    segments = json.loads(path.read_text(encoding="utf-8"))["segments"]
    return len(segments), segments[-1]["end"] if segments else 0.0


if __name__ == "__main__":
    sys.exit(main())
