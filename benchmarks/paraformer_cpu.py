"""Speed and memory of a full-size Paraformer-large with random weights on the CPU.

    python benchmarks/paraformer_cpu.py
    python benchmarks/paraformer_cpu.py --funasr-python path/to/python --repeats 5

A clip of 40 s is recognised alone and eight times in a batch. `--funasr-python` names a Python
with FunASR and PyTorch: then the same weights run in FunASR too, in turns with ours, so that
whatever else the machine does meets both. Each side is a process of its own, with the threads it
takes by itself. Needs 5 GB of memory and, for FunASR, 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import large_model
import machine
from large_model import CLIP_SECONDS

STAGES = ("features", "encode", "cif", "decode", "timestamps")
HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    print(machine.describe())
    with tempfile.TemporaryDirectory(prefix="paraformer-") as scratch:
        pythons = [("funasr-batch", sys.executable, "mlx_worker.py")]
        if options.funasr_python:
            pythons.append(("FunASR", options.funasr_python, "funasr_worker.py"))
        workers = []
        for name, python, script in pythons:
            folder = Path(scratch, script)
            large_model.write_hub_files(folder, options.timestamp_head)
            workers.append(_worker(name, python, script, folder))
        try:
            for repeat in range(options.repeats + 1):  # the first warms up
                for batch in options.batches:
                    for worker in workers:
                        worker.measure(batch, keep=repeat > 0)
        finally:
            for worker in workers:
                worker.close()
    print(f"load {os.getloadavg()[0]:.1f} at the end; medians of {options.repeats}\n")
    for batch in options.batches:
        print("\n".join(table(batch, workers)), end="\n\n")
    for worker in workers:
        print(
            f"{worker.name}: loaded in {worker.load_seconds:.1f} s with a peak of "
            f"{_gib(worker.load_peak)}; peak of all {_gib(worker.peak)}; "
            f"{worker.tokens} tokens a clip"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--funasr-python", help="a Python that has FunASR and PyTorch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="clips in a batch")
    parser.add_argument(
        "--timestamp-head", action="store_true", help="a BiCifParaformer, with its BLSTM"
    )
    return parser.parse_args()


@dataclass(slots=True)
class Worker:
    """A process that recognises batches when asked to."""

    name: str
    command: Sequence[str]
    load_seconds: float = 0
    load_peak: int = 0
    peak: int = 0
    tokens: int = 0
    runs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    """Seconds by stage of each run, by batch size."""
    _process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.load_peak = self._answer()["ready"]
        self.load_seconds = time.perf_counter() - started

    def measure(self, batch: int, *, keep: bool) -> None:
        assert self._process.stdin is not None
        print(batch, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak = answer["peak"]
        self.tokens = round(answer["seconds"].pop("tokens"))
        if keep:
            self.runs.setdefault(batch, []).append(answer["seconds"])
        time.sleep(0.3)  # let its threads, which spin for a while, go to sleep

    def median(self, batch: int, stage: str) -> float:
        return statistics.median(run[stage] for run in self.runs[batch])

    def best(self, batch: int, stage: str) -> float:
        return min(run[stage] for run in self.runs[batch])

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early: see above")
        return json.loads(line)


def _worker(name: str, python: str, script: str, folder: Path) -> Worker:
    command = (python, str(HERE / script))
    subprocess.run((*command, "write", str(folder)), check=True, stdout=sys.stderr)
    return Worker(name, (*command, "serve", str(folder)))


def table(batch: int, workers: Sequence[Worker]) -> Iterator[str]:
    audio = batch * CLIP_SECONDS
    title = "one clip of 40 s" if batch == 1 else f"a batch of {batch} clips of 40 s"
    yield title
    names = "".join(f"{worker.name:>14} s{'RTF':>8}" for worker in workers)
    yield f"{'':12}{names}" + ("   ours/theirs" if len(workers) == 2 else "")
    rows = {stage: [worker.median(batch, stage) for worker in workers] for stage in STAGES}
    rows["total"] = [worker.median(batch, "total") for worker in workers]
    rows["best total"] = [worker.best(batch, "total") for worker in workers]
    for name, seconds in rows.items():
        cells = "".join(f"{value:16.3f}{value / audio:8.4f}" for value in seconds)
        ratio = f"{seconds[0] / seconds[1]:14.2f}" if len(seconds) == 2 and seconds[1] else ""
        yield f"{name:12}{cells}{ratio}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
