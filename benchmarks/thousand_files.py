"""A thousand short recordings and thirty broken ones: nothing is lost, and nothing is done twice.

    python benchmarks/thousand_files.py
    python benchmarks/thousand_files.py --speech sample_audio --model sample-paraformer

The recordings are cut from the WAV, FLAC, MP3 and Ogg files of `--speech`; without it they are
tones and noise. Three runs are timed: the first does everything; the second finds all but the
broken ones done and tries those again; in the third the broken ones are gone, so that it has
nothing to do. The script ends with 1 when a recording was lost or a broken one not named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

Samples = npt.NDArray[np.float32]


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="thousand-") as folder:
        root = Path(folder, "recordings")
        print(f"machine      {_machine()}")
        seconds = make_recordings(root, options.files, options.speech)
        broken = make_broken(root / "broken")
        print(f"recordings   {options.files:,}, {seconds:,.0f} s of audio; {len(broken)} broken")
        faults = []
        first = run(root, options.model)
        print(f"first run    {_described(first)}")
        faults += _faults(first, expected_code=1)
        faults += unexplained(first, broken)
        if first.good < options.files * 0.97:
            faults.append(f"only {first.good} recordings done")
        second = run(root, options.model)
        print(f"second run   {_described(second)}, the broken ones tried again")
        faults += _faults(second, expected_code=1)
        for path in broken:
            path.unlink()
        third = run(root, options.model)
        print(f"third run    {_described(third)}")
        faults += _faults(third, expected_code=0)
        if set(third.outcomes) != {"skipped"}:
            faults.append("the third run had something to do")
    for name, reason in sorted(first.reasons.items()):
        print(f"  {name:<32} {reason}")
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1000, help="how many good recordings")
    parser.add_argument("--speech", type=Path, help="a folder of recordings to cut from")
    parser.add_argument("--model", default="sample-paraformer", help="name or folder of a model")
    return parser.parse_args()


def _machine() -> str:
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"MLX {version('mlx')}"
    )


# --- The recordings


def make_recordings(root: Path, count: int, speech: Path | None) -> float:
    """Writes good recordings of 1 to 3 s in twenty folders; returns their seconds in all."""
    generator = np.random.default_rng(2)
    sound = np.concatenate(list(_read(speech))) if speech else _synthetic(generator)
    total = 0.0
    for number in range(count):
        length = int(generator.uniform(1, 3) * RATE)
        start = int(generator.integers(0, len(sound) - length))
        folder = root / f"{number % 20:02}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:04}{SUFFIXES[number % len(SUFFIXES)]}"
        soundfile.write(path, sound[start : start + length], RATE)
        total += length / RATE
    return total


def _read(folder: Path) -> Iterator[Samples]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            if rate == RATE:
                yield samples[:, 0]


def _synthetic(generator: np.random.Generator) -> Samples:
    times = np.arange(60 * RATE) / RATE
    tones = sum(np.sin(2 * np.pi * hertz * times) for hertz in (220, 330, 550))
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * times)  # about as often as syllables come
    noise = generator.standard_normal(len(times))
    return (0.1 * envelope * tones + 0.01 * noise).astype(np.float32)


def make_broken(folder: Path) -> list[Path]:
    """Two of each kind of fault."""
    folder.mkdir()
    sound = _synthetic(np.random.default_rng(3))[: 2 * RATE]
    paths = []
    for name, spoil in BROKEN.items():
        for copy in (1, 2):
            path = folder / f"{Path(name).stem}-{copy}{Path(name).suffix}"
            path.write_bytes(spoil(sound))
            paths.append(path)
    return paths


def _encoded(sound: Samples, format: str, subtype: str | None = None) -> bytes:
    with tempfile.SpooledTemporaryFile(1 << 24) as file:
        soundfile.write(file, sound, RATE, format=format, subtype=subtype)
        file.seek(0)
        return bytes(file.read())


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


BROKEN: dict[str, Callable[[Samples], bytes]] = {
    "empty.wav": lambda sound: b"",
    "empty.mp3": lambda sound: b"",
    "header-only.wav": lambda sound: _encoded(sound, "WAV")[:44],
    "header-cut.wav": lambda sound: _encoded(sound, "WAV")[:20],
    "half.wav": lambda sound: _half(_encoded(sound, "WAV")),
    "half.flac": lambda sound: _half(_encoded(sound, "FLAC")),
    "text.wav": lambda sound: b"Minutes of the meeting\n" * 100,
    "page.flac": lambda sound: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "playlist.mp3": lambda sound: b"#EXTM3U\n#EXTINF:2,\n../00/0000.wav\n",
    "concat.wav": lambda sound: b"ffconcat version 1.0\nfile ../00/0000.wav\n",
    "zeros.m4a": lambda sound: bytes(5000),
    "one-hertz.wav": lambda sound: _patched(_encoded(sound, "WAV"), 24, b"\1\0\0\0"),
    "no-channels.wav": lambda sound: _patched(_encoded(sound, "WAV"), 22, b"\0\0"),
    "noise.ogg": lambda sound: b"OggS" + np.random.default_rng(4).bytes(5000),
    "not-a-number.wav": lambda sound: _encoded(sound * np.float32("nan"), "WAV", "FLOAT"),
}


# --- The runs


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    seconds: float
    outcomes: Counter[str]
    reasons: dict[str, str]
    """Of each recording with which something was wrong, by its path below the input folder."""
    stats: dict[str, Any]
    err: str

    @property
    def good(self) -> int:
        return sum(self.outcomes[name] for name in ("done", "no_speech", "skipped"))


def run(root: Path, model: str) -> Ended:
    events = root.parent / "events.jsonl"
    events.unlink(missing_ok=True)
    command = [sys.executable, "-m", "funasr_batch", root, "--model", model, "--events", events]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    told = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    finished = [event for event in told if event["event"] in _ENDS]
    return Ended(
        ended.returncode,
        seconds,
        Counter(event.get("status") or _ENDS[event["event"]] for event in finished),
        {
            event["path"]: event["reason"]
            for event in finished
            if event.get("reason") and event["event"] != "file_skipped"
        },
        told[-1]["stats"],
        ended.stderr,
    )


_ENDS = {"file_finished": "done", "file_failed": "failed", "file_skipped": "skipped"}


def _faults(ended: Ended, *, expected_code: int) -> Iterator[str]:
    if ended.code != expected_code:
        yield f"exit code {ended.code}, not {expected_code}"
    if "Traceback" in ended.err:
        yield ended.err


def unexplained(ended: Ended, broken: list[Path]) -> Iterator[str]:
    """The broken recordings of which the run did not say what is wrong."""
    for path in broken:
        if f"broken/{path.name}" not in ended.reasons:
            yield f"{path.name} is not named with a reason"


def _described(ended: Ended) -> str:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in ended.outcomes.most_common())
    text = f"{ended.seconds:6.2f} s, exit {ended.code}: {outcomes}"
    if ended.stats["audio_seconds"]:
        memory = ended.stats["peak_memory_bytes"] / 2**20
        text += f"; {ended.stats['speed']:,.0f} x real time, {memory:,.0f} MiB"
    return text


if __name__ == "__main__":
    sys.exit(main())
