"""Random batches of labelled utterances, and the noise that is mixed into them."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.shards import SAMPLE_RATE, Shard, Utterance, read

EOS = 2
FRAME_SAMPLES = 960
FIRE_DELAY = 640
"""Samples after a token's start at which it fires: the timestamp code subtracts these 40 ms."""
CLIMB = 960
"""The running sum climbs from one whole number to the next within twice this."""
SILENCED = 0.01
"""Part of the utterances that are noise alone and must give no text."""
BUCKET_SECONDS = (2.5, 4.0, 5.5, 7.0, 9.0, 12.0, 16.0, 21.0)
TOKENS_PER_SECOND = 9


@dataclass(frozen=True, slots=True)
class Batch:
    waves: np.ndarray = field(repr=False)
    """int16 [B, S]"""
    samples: np.ndarray
    """int32 [B]"""
    sums: np.ndarray = field(repr=False)
    """float32 [B, L + 1], the running sum of the CIF weights to learn, at frame borders."""
    tokens: np.ndarray = field(repr=False)
    """int32 [B, N], with </s>"""
    counts: np.ndarray
    """int32 [B], tokens with </s>"""
    frame_tokens: np.ndarray = field(repr=False)
    """int32 [B, L], the token spoken in each frame, 0 for none."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What an utterance is to teach."""

    sums: np.ndarray
    frame_tokens: np.ndarray
    tokens: np.ndarray


def frames_of(samples: int) -> int:
    return -(-(1 + (samples - 400) // 160) // 6)


def target_sums(tokens: Sequence[tuple[int, int, int]], frames: int) -> np.ndarray:
    """The running sum of alphas at the frame borders, float32 [frames + 1].

    It climbs by 0.9 within 120 ms around the start of each token and rests near whole numbers
    between them, so that a small error of the sum moves no token.
    """
    starts = [start for _, start, _ in tokens]
    last = tokens[-1][2] if tokens else 2 * FRAME_SAMPLES
    fires = np.array([*starts, last], dtype=np.float64)
    fires = np.maximum.accumulate(fires + FIRE_DELAY + np.arange(len(fires)) * 1e-3)
    gaps = np.diff(fires, prepend=fires[0] - 4 * CLIMB, append=fires[-1] + 4 * CLIMB)
    before = np.minimum(CLIMB, gaps[:-1] / 2 * 0.98)
    after = np.minimum(CLIMB, gaps[1:] / 2 * 0.98)
    order = np.arange(len(fires))
    x = np.stack([fires - before, fires, fires + after], axis=1).ravel()
    y = np.stack([order + 0.05, order + 0.5, order + 0.95], axis=1).ravel()
    y[0], y[-1] = 0.0, len(fires)
    borders = np.arange(frames + 1) * FRAME_SAMPLES
    # What climbs into the last frame arrives there: the whole sum is the number of tokens.
    x = np.maximum.accumulate(np.minimum(x, borders[-1] - np.arange(len(x))[::-1]))
    return np.interp(borders, x, y).astype(np.float32)


def frame_tokens(tokens: Sequence[tuple[int, int, int]], frames: int) -> np.ndarray:
    """The token at the middle of each frame, int32 [frames]; 0 where none is spoken."""
    labels = np.zeros(frames, dtype=np.int32)
    for token, start, end in tokens:
        first = max(start // FRAME_SAMPLES, 0)
        labels[first : max(first + 1, end // FRAME_SAMPLES)] = token
    return labels


def label(utterance: Utterance) -> Labels:
    frames = frames_of(len(utterance.samples))
    return Labels(
        target_sums(utterance.tokens, frames),
        frame_tokens(utterance.tokens, frames),
        np.array([token for token, _, _ in utterance.tokens], dtype=np.int32),
    )


def _label_shard(path: Path) -> list[Labels]:
    shard = read(path)
    return [label(shard[index]) for index in range(len(shard))]


class Dataset:
    """The utterances of several folders of shards under one index, with their labels.

    `label_shard` gives the labels of one shard's file; it runs in other processes.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        processes: int,
        label_shard: Callable[[Path], list[Any]] = _label_shard,
    ) -> None:
        paths = [path for folder in folders for path in sorted(folder.glob("*.npy"))]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            self._labels = [x for labels in pool.map(label_shard, paths) for x in labels]
        # The paths from above: a shard that was finished meanwhile has no labels.
        self._shards: list[Shard] = [read(path) for path in paths]
        self._first = np.cumsum([0, *map(len, self._shards)])
        self.lengths = np.concatenate([np.diff(shard.offset) for shard in self._shards])

    def __len__(self) -> int:
        return len(self.lengths)

    def samples(self, index: int) -> np.ndarray:
        """int16 [samples]"""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        offset = self._shards[shard].offset
        place = index - int(self._first[shard])
        return self._shards[shard].audio[offset[place] : offset[place + 1]]

    def labels(self, index: int) -> Any:
        return self._labels[index]


class Batches:
    """An endless stream of random batches, prepared in background threads."""

    def __init__(self, dataset: Dataset, seconds: float, seed: int) -> None:
        self._dataset, self._seconds = dataset, seconds
        durations = dataset.lengths / SAMPLE_RATE
        lowest = (0.1, *BUCKET_SECONDS[:-1])
        self._buckets = [
            np.flatnonzero((durations > low) & (durations <= high))
            for low, high in zip(lowest, BUCKET_SECONDS, strict=True)
        ]
        total = np.array([durations[bucket].sum() for bucket in self._buckets])
        self._shares = total / total.sum()
        self._queue: queue.Queue[Batch] = queue.Queue(maxsize=16)
        self._seeds = np.random.SeedSequence(seed)

    def start(self, threads: int) -> None:
        for child in self._seeds.spawn(threads):
            threading.Thread(target=self._fill, args=(child,), daemon=True).start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._queue.get()

    def _fill(self, seed: np.random.SeedSequence) -> None:
        rng = np.random.default_rng(seed)
        while True:
            bucket = int(rng.choice(len(self._buckets), p=self._shares))
            size = max(8, int(self._seconds / BUCKET_SECONDS[bucket]) // 8 * 8)
            chosen = rng.choice(self._buckets[bucket], size)
            self._queue.put(self._build(chosen, BUCKET_SECONDS[bucket], rng))

    def _build(self, chosen: np.ndarray, seconds: float, rng: np.random.Generator) -> Batch:
        width = int(seconds * SAMPLE_RATE)
        frames, longest = frames_of(width), int(seconds * TOKENS_PER_SECOND) + 2
        batch = Batch(
            waves=np.zeros((len(chosen), width), np.int16),
            samples=self._dataset.lengths[chosen].astype(np.int32),
            sums=np.zeros((len(chosen), frames + 1), np.float32),
            tokens=np.full((len(chosen), longest), EOS, np.int32),
            counts=np.zeros(len(chosen), np.int32),
            frame_tokens=np.zeros((len(chosen), frames), np.int32),
        )
        for row, index in enumerate(chosen):
            labels = self._dataset.labels(int(index))
            own = len(labels.frame_tokens)
            if rng.random() < SILENCED:
                nothing = np.zeros(0, np.int32)
                labels = Labels(target_sums((), own), np.zeros(own, np.int32), nothing)
            else:
                samples = self._dataset.samples(int(index))
                batch.waves[row, : len(samples)] = samples
            batch.sums[row, : own + 1] = labels.sums
            batch.sums[row, own + 1 :] = labels.sums[-1]
            kept = labels.tokens[: longest - 1]
            batch.tokens[row, : len(kept)] = kept
            batch.counts[row] = len(kept) + 1
            batch.frame_tokens[row, :own] = labels.frame_tokens
        return batch


def noise_bank(dataset: Dataset, seconds: int, seed: int) -> np.ndarray:
    """int16 noise: white, pink, brown, mains hum and babble of the dataset's own speakers."""
    rng = np.random.default_rng(seed)
    size = seconds * SAMPLE_RATE
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20.0)
    kinds = []
    for slope in (0.0, 0.5, 1.0):
        spectrum = np.fft.rfft(rng.standard_normal(size)) / frequency**slope
        kinds.append(np.fft.irfft(spectrum, size))
    t = np.arange(size) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * t + k) / k for k in range(1, 12))
    kinds.append(hum + 0.1 * rng.standard_normal(size))
    for _ in range(3):
        babble = np.zeros(size, np.float32)
        for _ in range(8):
            place = 0
            while place < size:
                samples = dataset.samples(int(rng.integers(len(dataset))))[: size - place]
                babble[place : place + len(samples)] += samples
                place += max(len(samples), 1)
        kinds.append(babble)
    return np.concatenate([(x / np.abs(x).max() * 20_000).astype(np.int16) for x in kinds])
