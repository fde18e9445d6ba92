"""What `funasr_batch/models/cpu_kernels.py` and the preparations of `cpu.py` gain on this CPU.

    python benchmarks/cpu_kernels.py

Shapes are those of Paraformer-large and 40 s of audio. Each pair is measured in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import machine

from funasr_batch.cpu import available_cores, blas_threads, load_fast_blas, prepare_cpu

if __name__ == "__main__" and sys.argv[1:] == ["freed-memory"]:
    load_fast_blas()  # and leave the allocator as it is
else:
    prepare_cpu()

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from funasr_batch.models import cpu_kernels
from funasr_batch.models.layers import PARAFORMER_EPS, SanmEncoderLayer
from funasr_batch.models.paraformer import _advance, _advance_on_cpu

REPEATS = 15
FRAMES, WIDTH, HEADS, VOCABULARY = 667, 512, 4, 8404

Way = Callable[[], Any]


def main() -> None:
    print(machine.describe())
    print(f"milliseconds, medians of {REPEATS} and best\n")
    print(f"{'':28}{'MLX':>18}{'ours':>18}{'MLX/ours':>10}")
    report("attention, 4 heads", *attention())
    report("LayerNorm", *layer_norm())
    report("FSMN, kernel 11", *fsmn())
    report("confidence of 167 tokens", *confidence())
    report("BLSTM of 2001 steps", *blstm(), repeats=3)
    print(f"\n{'':28}{'glibc default':>18}{'prepare_cpu':>18}")
    freed_memory()
    print(f"\n{'8 clips, 4 encoder layers':28}{'padded':>18}{'one by one':>18}{'side by side':>18}")
    row("", measure(batches(), 3))


def attention() -> tuple[Way, Way]:
    q, k, v = (_random(1, HEADS, FRAMES, WIDTH // HEADS) for _ in range(3))
    scale = 0.088
    return (
        lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale),
        lambda: cpu_kernels.attention(q, k, v, scale, None),
    )


def layer_norm() -> tuple[Way, Way]:
    x, norm = _random(1, FRAMES, WIDTH), nn.LayerNorm(WIDTH, PARAFORMER_EPS)
    return (
        lambda: norm(x),
        lambda: cpu_kernels.layer_norm(x, norm.weight, norm.bias, PARAFORMER_EPS),
    )


def fsmn() -> tuple[Way, Way]:
    x, weight = _random(1, FRAMES + 10, WIDTH), _random(WIDTH, 1, 11)
    return (
        lambda: mx.conv1d(x, weight.swapaxes(1, 2), groups=WIDTH),
        lambda: cpu_kernels.depthwise_convolution(x, weight),
    )


def confidence() -> tuple[Way, Way]:
    logits = _random(1, 167, VOCABULARY)
    return (
        lambda: mx.exp(mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1)),
        lambda: cpu_kernels.peak_probability(logits),
    )


def blstm() -> tuple[Way, Way]:
    gates, weights = _random(2, 1, 3 * FRAMES, 4 * WIDTH), 0.04 * _random(2, 4 * WIDTH, WIDTH)
    return lambda: _advance(gates, weights), lambda: _advance_on_cpu(gates, weights)


def freed_memory() -> None:
    """The allocator is set once in a process, so the other setting needs another process."""
    command = (sys.executable, __file__, "freed-memory")
    plain = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, seconds, before in zip(
        FREED_MEMORY, measure(_large_arrays()), plain.splitlines(), strict=True
    ):
        row(name, [[float(value) for value in before.split()], seconds])


FREED_MEMORY = ("ReLU, 22 MB", "encoder layer, 4 clips of 20 s")


def _large_arrays() -> list[Way]:
    hidden = _random(4, FRAMES, 4 * WIDTH)
    layer, x = _layer(), _random(4, FRAMES // 2, WIDTH)
    return [lambda: nn.relu(hidden), lambda: layer(x, None)]


def batches() -> list[Way]:
    layers = [_layer() for _ in range(4)]
    clips = [_random(1, FRAMES, WIDTH) for _ in range(8)]
    batch = mx.concatenate(clips)
    streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(available_cores())]

    def through(x: mx.array) -> mx.array:
        for layer in layers:
            x = layer(x, None)
        return x

    def in_lanes(count: int) -> None:
        for first in range(0, len(clips), count):
            with blas_threads(1) if count > 1 else nullcontext():
                lanes = []
                for clip, stream in zip(clips[first : first + count], streams, strict=False):
                    with mx.stream(stream):
                        lanes.append(through(clip))
                mx.eval(lanes)

    return [lambda: through(batch), lambda: in_lanes(1), lambda: in_lanes(len(streams))]


def report(name: str, theirs: Way, ours: Way, repeats: int = REPEATS) -> None:
    columns = measure([theirs, ours], repeats)
    ratio = statistics.median(columns[0]) / statistics.median(columns[1])
    row(name, columns, f"{ratio:10.1f}")


def row(name: str, columns: Sequence[Sequence[float]], end: str = "") -> None:
    cells = "".join(
        f"{1e3 * statistics.median(column):10.2f}{1e3 * min(column):8.2f}" for column in columns
    )
    print(f"{name:28}{cells}{end}", flush=True)


def measure(ways: Sequence[Way], repeats: int = REPEATS) -> list[list[float]]:
    """Seconds of each run of each way, after one to warm up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, column in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            result = way()
            if result is not None:
                mx.eval(result)
            if repeat > 0:
                column.append(time.perf_counter() - started)
    return seconds


def _layer() -> SanmEncoderLayer:
    layer = SanmEncoderLayer(WIDTH, WIDTH, HEADS, 4 * WIDTH, 11, 0, PARAFORMER_EPS)
    layer.update(tree_map(lambda value: 0.04 * _random(*value.shape), layer.parameters()))
    mx.eval(layer.parameters())
    return layer


def _random(*shape: int) -> mx.array:
    values = mx.random.normal(shape)
    mx.eval(values)
    return values


if __name__ == "__main__":
    if sys.argv[1:] == ["freed-memory"]:
        for column in measure(_large_arrays()):
            print(*column)
    else:
        main()
