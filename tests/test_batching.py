"""Batches of segments: everything comes out once, within the limits, and little is padded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.run.batching import Batch, Batcher, BatchPolicy, Item

LENGTHS = st.lists(st.integers(1, 500), max_size=80)
POLICIES = st.builds(
    BatchPolicy,
    max_padded_frames=st.integers(1, 1500),
    max_items=st.integers(1, 12),
    lookahead_items=st.integers(1, 30),
    lookahead_frames=st.integers(1, 5000),
    min_fill=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)


def run(lengths: list[int], policy: BatchPolicy) -> list[Batch[int]]:
    """Batches in the order in which they are taken, each as soon as it can be."""
    batcher: Batcher[int] = Batcher(policy)
    batches = []
    for arrival, length in enumerate(lengths):
        batcher.add(Item(length, arrival))
        while batch := batcher.take(flush=False):
            batches.append(batch)
    while batch := batcher.take(flush=True):
        batches.append(batch)
    assert len(batcher) == 0
    assert batcher.waiting_frames == 0
    return batches


@given(LENGTHS, POLICIES)
def test_every_item_comes_out_exactly_once_and_unchanged(
    lengths: list[int], policy: BatchPolicy
) -> None:
    items = [item for batch in run(lengths, policy) for item in batch.items]
    assert sorted((item.payload, item.length) for item in items) == list(enumerate(lengths))


@given(LENGTHS, POLICIES)
def test_limits_hold_unless_one_item_alone_is_over(lengths: list[int], policy: BatchPolicy) -> None:
    for batch in run(lengths, policy):
        assert batch.real_frames == sum(item.length for item in batch.items)
        assert batch.padded_frames == len(batch.items) * max(i.length for i in batch.items)
        assert len(batch.items) <= policy.max_items
        if len(batch.items) > 1:
            assert batch.padded_frames <= policy.max_padded_frames
            assert batch.real_frames >= policy.min_fill * batch.padded_frames


@given(LENGTHS, POLICIES)
def test_the_pool_is_bounded(lengths: list[int], policy: BatchPolicy) -> None:
    batcher: Batcher[int] = Batcher(policy)
    for arrival, length in enumerate(lengths):
        batcher.add(Item(length, arrival))
        assert len(batcher) <= policy.lookahead_items
        assert batcher.waiting_frames < policy.lookahead_frames + length
        while batcher.take(flush=False):
            pass
        assert len(batcher) < policy.lookahead_items
        assert batcher.waiting_frames < policy.lookahead_frames


@given(LENGTHS, POLICIES)
def test_no_item_waits_longer_than_those_before_it(lengths: list[int], policy: BatchPolicy) -> None:
    batcher: Batcher[int] = Batcher(policy)
    ahead: dict[int, int] = {}  # batches that may still leave before the item does

    def take(flush: bool) -> bool:
        batch = batcher.take(flush)
        if batch is None:
            return False
        for item in batch.items:
            del ahead[item.payload]
        for arrival in ahead:
            ahead[arrival] -= 1
            assert ahead[arrival] >= 0
        return True

    for arrival, length in enumerate(lengths):
        ahead[arrival] = len(batcher)
        batcher.add(Item(length, arrival))
        while take(flush=False):
            pass
    while take(flush=True):
        pass


def test_neighbours_in_length_go_together() -> None:
    policy = BatchPolicy(10_000, 3, 100, 10**6)
    lengths = [100, 500, 104, 480, 97, 510]
    batches = run(lengths, policy)
    assert [[item.length for item in batch.items] for batch in batches] == [
        [97, 100, 104],
        [480, 500, 510],
    ]


def test_one_item_over_the_limit_goes_alone() -> None:
    batches = run([50, 2000, 60], BatchPolicy(1000, 8, 100, 10**6, min_fill=0.0))
    assert [[item.length for item in batch.items] for batch in batches] == [[50, 60], [2000]]


def test_nothing_is_taken_before_there_is_a_choice() -> None:
    batcher: Batcher[str] = Batcher(BatchPolicy(1000, 8, 3, 10**6))
    assert batcher.take(flush=True) is None
    batcher.add(Item(10, "a"))
    batcher.add(Item(10, "b"))
    assert batcher.take(flush=False) is None
    batcher.add(Item(10, "c"))
    batch = batcher.take(flush=False)
    assert batch is not None
    assert [item.payload for item in batch.items] == ["a", "b", "c"]


def test_a_very_unlike_item_does_not_join() -> None:
    batches = run([10, 1000], BatchPolicy(10_000, 8, 100, 10**6, min_fill=0.8))
    assert [len(batch.items) for batch in batches] == [1, 1]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        Batcher(BatchPolicy(1, 1, 1, 1)).add(Item(0, None))
    with pytest.raises(ValueError, match="at least 1"):
        BatchPolicy(0, 1, 1, 1)
    with pytest.raises(ValueError, match="min_fill"):
        BatchPolicy(1, 1, 1, 1, min_fill=1.5)


def speech_lengths(count: int) -> list[int]:
    """Lengths of VAD segments in frames of 60 ms: log-normal about 4 s, at most 30 s."""
    draw = random.Random(1)
    seconds = (min(30.0, max(0.4, draw.lognormvariate(1.4, 0.8))) for _ in range(count))
    return [max(1, round(value / 0.06)) for value in seconds]


def padding_in_order_of_arrival(lengths: list[int], policy: BatchPolicy) -> float:
    batches: list[list[int]] = [[]]
    for length in lengths:
        grown = [*batches[-1], length]
        too_large = len(grown) * max(grown) > policy.max_padded_frames
        if too_large or len(grown) > policy.max_items:
            grown = [length]
            batches.append(grown)
        batches[-1] = grown
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def test_little_is_padded_on_lengths_of_real_speech() -> None:
    lengths = speech_lengths(3000)
    policy = BatchPolicy(4000, 32, 256, 10**9)
    batches = run(lengths, policy)
    padding = 1 - sum(lengths) / sum(batch.padded_frames for batch in batches)
    assert padding < 0.12  # measured 0.104
    assert padding < padding_in_order_of_arrival(lengths, policy) / 5  # measured 0.646
    assert len(batches) < 1.9 * sum(lengths) / policy.max_padded_frames
