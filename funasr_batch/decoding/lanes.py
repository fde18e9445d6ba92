"""How the segments of a batch go through an encoder: together on a GPU, side by side on a CPU.

Most of MLX's CPU kernels run on one thread, and padded batches leave the caches
(benchmarks/RESULTS.md), so on a CPU each segment has a stream and a core of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from funasr_batch.cpu import available_cores
from funasr_batch.errors import RecognitionError
from funasr_batch.models.layers import on_gpu
from funasr_batch.records import FloatArray


@dataclass(frozen=True, slots=True)
class Lane:
    """Segments that go through the network together, padded to the longest."""

    places: tuple[int, ...]
    """Where they stand in the batch."""
    stream: mx.ThreadLocalStream | mx.Device


def rounds(batch: Sequence[Sized], streams: Sequence[mx.ThreadLocalStream]) -> Iterator[list[Lane]]:
    """The lanes that run at the same time; segments of like length together.

    Without streams the whole batch is one lane.
    """
    places = sorted(range(len(batch)), key=lambda place: len(batch[place]))
    if not streams:
        yield [Lane(tuple(places), mx.default_device())]
        return
    cores = len(streams)
    for first in range(0, len(places), cores):
        together = places[first : first + cores]
        lanes = [Lane((place,), stream) for place, stream in zip(together, streams, strict=False)]
        if 2 * len(lanes) > cores:
            yield lanes
        else:  # too few to keep the cores busy: one by one, with every product on all cores
            yield from ([lane] for lane in lanes)


def cpu_streams() -> tuple[mx.ThreadLocalStream, ...]:
    """A stream for each core; none for a GPU, which one padded batch keeps busy."""
    if on_gpu():
        return ()
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(available_cores()))


def padded(batch: Sequence[FloatArray]) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """Features [L_i, D] as float32 [B, L, D], zero past each item's length, and the lengths."""
    lengths = np.array([len(item) for item in batch], dtype=np.int32)
    features = np.zeros((len(batch), int(lengths.max()), batch[0].shape[1]), dtype=np.float32)
    for row, item in zip(features, batch, strict=True):
        row[: len(item)] = item
    return features, lengths


def require_finite(values: FloatArray) -> None:
    """Raises RecognitionError for NaN and infinity, which would otherwise pass for silence."""
    if not np.isfinite(values).all():
        raise RecognitionError("the network's output is not finite")
