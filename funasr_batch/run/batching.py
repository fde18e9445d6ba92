"""Groups segments of different files into batches that waste little on padding.

A batch is padded to its longest item, so items of like length belong together. Segments wait in a
small pool; each batch takes the one that has waited longest and its nearest neighbours in length.
Because every batch takes the oldest, an item that came when `k` others waited leaves with one of
the next `k + 1` batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Limits of one batch, and how many items wait so that there is a choice of lengths."""

    max_padded_frames: int
    """Longest item x number of items never exceeds this, unless one item alone does."""
    max_items: int
    lookahead_items: int
    """Items that must wait before a batch is taken..."""
    lookahead_frames: int
    """...or frames, whichever comes first: this bounds the memory of the pool."""
    min_fill: float = 0.8
    """A batch stays smaller rather than hold more padding than 1 - min_fill."""

    def __post_init__(self) -> None:
        limits = (
            self.max_padded_frames,
            self.max_items,
            self.lookahead_items,
            self.lookahead_frames,
        )
        if min(limits) < 1 or not 0.0 <= self.min_fill <= 1.0:
            raise ValueError(f"limits must be at least 1 and min_fill between 0 and 1: {self}")


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """One segment: `length` in frames, and whatever the caller wants back with it."""

    length: int
    payload: T


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Items to recognise together, from the shortest to the longest."""

    items: tuple[Item[T], ...]

    @property
    def real_frames(self) -> int:
        return sum(item.length for item in self.items)

    @property
    def padded_frames(self) -> int:
        return len(self.items) * max(item.length for item in self.items)


class Batcher(Generic[T]):
    """A pool of waiting items. Not for use by several threads at once."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._arrivals = 0
        self._waiting: dict[int, Item[T]] = {}  # by arrival: the first is the oldest
        self._by_length: list[tuple[int, int]] = []  # (length, arrival), ascending
        self._frames = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting_frames(self) -> int:
        return self._frames

    def add(self, item: Item[T]) -> None:
        """Raises ValueError when the item has no frames: there is nothing to recognise."""
        if item.length < 1:
            raise ValueError(f"an item must have at least one frame: {item.length}")
        self._waiting[self._arrivals] = item
        insort(self._by_length, (item.length, self._arrivals))
        self._arrivals += 1
        self._frames += item.length

    def take(self, flush: bool) -> Batch[T] | None:
        """The next batch: None while too few wait for a good one, or, with `flush`, none at all."""
        if not self._waiting or not (flush or self._is_full()):
            return None
        first, last = self._neighbours_of_oldest()
        taken = self._by_length[first:last]
        del self._by_length[first:last]
        items = tuple(self._waiting.pop(arrival) for _, arrival in taken)
        self._frames -= sum(item.length for item in items)
        return Batch(items)

    def _is_full(self) -> bool:
        policy = self._policy
        return (
            len(self._waiting) >= policy.lookahead_items or self._frames >= policy.lookahead_frames
        )

    def _neighbours_of_oldest(self) -> tuple[int, int]:
        """Bounds in `_by_length` of the batch around the oldest item.

        Grows to whichever side is nearer in length, as long as the batch with that item in it
        keeps all limits; when the nearer side does not fit, the other one is tried.
        """
        arrival, oldest = next(iter(self._waiting.items()))
        first = bisect_left(self._by_length, (oldest.length, arrival))
        last = first + 1
        real = oldest.length
        while True:
            sides = []
            if first > 0:
                length = self._by_length[first - 1][0]
                sides.append((oldest.length - length, length, first - 1, last))
            if last < len(self._by_length):
                length = self._by_length[last][0]
                sides.append((length - oldest.length, length, first, last + 1))
            for _, length, new_first, new_last in sorted(sides):
                longest = self._by_length[new_last - 1][0]
                if self._fits(new_last - new_first, longest, real + length):
                    first, last, real = new_first, new_last, real + length
                    break
            else:
                return first, last

    def _fits(self, count: int, longest: int, real: int) -> bool:
        padded = count * longest
        return (
            count <= self._policy.max_items
            and padded <= self._policy.max_padded_frames
            and real >= self._policy.min_fill * padded
        )
