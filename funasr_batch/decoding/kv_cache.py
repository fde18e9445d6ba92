"""The keys and values of earlier positions, for rows that are at different places in their texts.

Every row has `capacity` slots, allocated once and written in place. Position p of a row is in slot
p; past the capacity a row goes round in a ring that spares its first `sinks` slots, so a text of
any length is attended to through a window (Xiao et al. 2023, "Efficient Streaming Language Models
with Attention Sinks"). Which slot holds what is known on the host, in numpy; the device sees only
where to write and a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from funasr_batch.models.qwen3 import Context, LayerCache, Qwen3Config

MASK_STEP = 128
"""Slots that are looked at when rows differ are a multiple of this: CUDA prepares its attention
anew for every shape."""

_EMPTY = -1

Integers = npt.NDArray[np.int64]


def bytes_per_row(config: Qwen3Config, capacity: int, dtype: mx.Dtype) -> int:
    """Memory of one row of a cache."""
    return 2 * config.layers * config.kv_heads * config.head_width * capacity * dtype.size


@dataclass(frozen=True, slots=True)
class Window:
    """What a position may look back to."""

    recent: int
    """So many positions, its own included..."""
    sinks: int
    """...and the first ones of its row, where the instructions are."""


class KvCache:
    """Keys and values of all layers for a fixed number of rows.

    A pass is opened with `admit` (prompts into empty rows) or `extend` (new positions of all
    rows), which return what the network takes, and rows are then cut to what is valid with `keep`.
    """

    def __init__(
        self, config: Qwen3Config, rows: int, capacity: int, block: int, dtype: mx.Dtype
    ) -> None:
        """`capacity` slots for each row; `block` is the largest number of positions of a pass."""
        shape = (rows, config.kv_heads, capacity, config.head_width)
        self.keys = [mx.zeros(shape, dtype) for _ in range(config.layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(config.layers)]
        self.lengths: Integers = np.zeros(rows, np.int64)
        """Positions that each row has seen."""
        self.capacity = capacity
        self._block = block
        sinks = min(64, capacity // 4)
        # A pass overwrites the oldest slots before any of its positions looks: hence the block.
        self.window = Window(recent=capacity - sinks - block, sinks=sinks)
        self._positions: Integers = np.full((rows, capacity), _EMPTY)
        """The position that each slot holds."""

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that is kept on the device."""
        return [*self.keys, *self.values]

    def admit(
        self, rows: Sequence[int], prompts: Sequence[int]
    ) -> tuple[Context, list[LayerCache]]:
        """Opens a pass of prompts, of these lengths, padded on the right, into rows of their own.

        What the rows held before is forgotten. The pass attends within the prompts alone.
        """
        longest = max(prompts)
        taken = np.zeros((len(rows), self.capacity), np.int64)
        self._positions[list(rows)] = _EMPTY
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            kept = self._kept_of(prompt)
            slots = self._slots(kept)
            self._positions[row, slots] = kept
            taken[number, slots] = kept
            self.lengths[row] = prompt
        identity = longest <= self.capacity
        used = longest if identity else self.capacity
        source = None if identity else mx.array(taken[:, None, :, None])
        layers: list[LayerCache] = [
            _Admission(self, layer, list(rows), used, source) for layer in range(len(self.keys))
        ]
        return Context(len(rows), 0, "causal"), layers

    def extend(self, count: int) -> tuple[Context, list[LayerCache]]:
        """Opens a pass of `count` new positions in every row, each after what the row has."""
        if count > self._block:
            raise ValueError(f"{count} positions in a pass that was announced as {self._block}")
        lengths = self.lengths
        positions = lengths[:, None] + np.arange(count)
        slots = self._slots(positions)
        np.put_along_axis(self._positions, slots, positions, axis=1)
        self.lengths = lengths + count
        begin = int(lengths[0])
        in_step = begin + count <= self.capacity - self._block and bool((lengths == begin).all())
        if in_step and count == 1:
            seen, mask = begin + 1, None
        else:
            # CUDA prepares its attention anew for every shape: few shapes, and a mask.
            seen = min(self.capacity, -(-int(slots.max() + 1) // MASK_STEP) * MASK_STEP)
            hidden = np.where(self._visible(positions, seen), np.float32(0), -np.float32(np.inf))
            mask = mx.array(hidden[:, None]).astype(self.keys[0].dtype)
        if in_step:
            layers: list[LayerCache] = [
                _InStep(self, layer, begin, begin + count, seen) for layer in range(len(self.keys))
            ]
            return Context(self.rows, begin, mask), layers
        where = mx.array(slots.astype(np.int32)[:, None, :, None])
        layers = [_Apart(self, layer, where, seen) for layer in range(len(self.keys))]
        return Context(self.rows, mx.array(lengths.astype(np.int32)), mask), layers

    def keep(self, counts: Integers) -> None:
        """Cuts every row to so many positions: what a pass wrote past them never was."""
        stale = self._positions >= counts[:, None]
        self._positions[stale] = _EMPTY
        self.lengths = np.minimum(self.lengths, counts)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, in this order."""
        chosen = mx.array(list(rows))
        self.keys = [keys[chosen] for keys in self.keys]
        self.values = [values[chosen] for values in self.values]
        self.lengths = self.lengths[list(rows)]
        self._positions = self._positions[list(rows)]

    def _slots(self, positions: Integers) -> Integers:
        sinks = self.window.sinks
        ring = sinks + (positions - sinks) % (self.capacity - sinks)
        return np.where(positions < self.capacity, positions, ring)

    def _kept_of(self, prompt: int) -> Integers:
        """The positions of a prompt that its row has room for."""
        if prompt <= self.capacity:
            return np.arange(prompt)
        sinks = self.window.sinks
        recent = np.arange(prompt - (self.capacity - sinks), prompt)
        return np.concatenate([np.arange(sinks), recent])

    def _visible(self, positions: Integers, seen: int) -> npt.NDArray[np.bool_]:
        """bool [B, N, seen]: which slots each of the positions [B, N] looks at."""
        held = self._positions[:, None, :seen]
        query = positions[:, :, None]
        recent = (held > query - self.window.recent) | (held < self.window.sinks)
        return (held != _EMPTY) & (held <= query) & recent


@dataclass(frozen=True, slots=True)
class _Admission:
    """One layer while prompts are admitted."""

    cache: KvCache
    layer: int
    rows: list[int]
    used: int
    source: mx.array | None
    """The position of the prompt that goes into each slot, where not all of them are kept."""

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        for kept, new in ((self.cache.keys, keys), (self.cache.values, values)):
            if self.source is not None:
                new = mx.take_along_axis(new, self.source, axis=2)
            if self.rows == list(range(self.cache.rows)):
                kept[self.layer][:, :, : self.used] = new
            else:
                kept[self.layer][mx.array(self.rows), :, : self.used] = new
        return keys, values


@dataclass(frozen=True, slots=True)
class _InStep:
    """One layer in a pass of rows that have all seen equally much."""

    cache: KvCache
    layer: int
    begin: int
    end: int
    seen: int

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        kept = (self.cache.keys, self.cache.values)
        for whole, new in zip(kept, (keys, values), strict=True):
            whole[self.layer][:, :, self.begin : self.end] = new
        return tuple(whole[self.layer][:, :, : self.seen] for whole in kept)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Apart:
    """One layer in a pass of rows at different places."""

    cache: KvCache
    layer: int
    slots: mx.array
    seen: int

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        kept = (self.cache.keys, self.cache.values)
        for whole, new in zip(kept, (keys, values), strict=True):
            slots = mx.broadcast_to(self.slots, new.shape)
            whole[self.layer] = mx.put_along_axis(whole[self.layer], slots, new, axis=2)
        return tuple(whole[self.layer][:, :, : self.seen] for whole in kept)  # type: ignore[return-value]
