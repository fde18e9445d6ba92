"""How much faster than real time the features of Paraformer are computed, by threads.

python benchmarks/frontend.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import machine
import numpy as np

from funasr_batch.frontend import FrontEnd, fbank
from funasr_batch.records import SAMPLE_RATE, FloatArray

CLIPS = 8
CLIP_SECONDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    shape = (CLIPS, CLIP_SECONDS * SAMPLE_RATE)
    clips = list(0.1 * generator.standard_normal(shape, dtype=np.float32))
    features = FrontEnd(lfr_m=7, lfr_n=6, cmvn=None).features

    print(machine.describe())
    print(f"{CLIPS} clips of {CLIP_SECONDS} s, medians of {options.repeats}, times real time")
    print(f"{'threads':8}{'fbank':>10}{'features':>10}")
    for threads in options.threads:
        speeds = [
            speed(function, clips, threads, options.repeats) for function in (fbank, features)
        ]
        print(f"{threads:<8}" + "".join(f"{value:10,.0f}" for value in speeds))


def speed(
    function: Callable[[FloatArray], FloatArray],
    clips: list[FloatArray],
    threads: int,
    repeats: int,
) -> float:
    """Seconds of audio in a second, each clip on one of the threads."""
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first warms up
            started = time.perf_counter()
            list(pool.map(function, clips))
            seconds.append(time.perf_counter() - started)
    return CLIPS * CLIP_SECONDS / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
