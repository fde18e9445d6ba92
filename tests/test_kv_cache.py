"""The cache of keys and values against attention over the whole history, computed without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.decoding.kv_cache import MASK_STEP, KvCache, Window, bytes_per_row
from funasr_batch.models.qwen3 import Context, LayerCache, Qwen3Config

HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 8, 2
CONFIG = Qwen3Config(
    vocabulary=32,
    width=16,
    layers=LAYERS,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_width=WIDTH,
    units=16,
    eps=1e-6,
    rope_theta=1e6,
)
# Softmax and sums of at most some hundred float32 products, beside float64. Measured: 8e-7.
TOLERANCE = 1e-5

Layer = list[tuple[np.ndarray, np.ndarray]]
"""The key and the value of each position of a row, [KV_HEADS, WIDTH] each."""


def new_row() -> list[Layer]:
    return [[] for _ in range(LAYERS)]


@dataclass
class Player:
    """Makes passes with random queries, keys and values, and checks what each of them attends to.

    `history` is the plain truth: everything that a row was given and was not cut off again.
    """

    rows: int
    capacity: int
    block: int
    seed: int = 0
    history: list[list[Layer]] = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.cache = KvCache(CONFIG, self.rows, self.capacity, self.block, mx.float32)
        self.history = [new_row() for _ in range(self.rows)]

    @property
    def lengths(self) -> list[int]:
        return [len(row[0]) for row in self.history]

    def admit(self, rows: Sequence[int], prompts: Sequence[int]) -> None:
        context, layers = self.cache.admit(rows, prompts)
        for row in rows:
            self.history[row] = new_row()
        assert offsets(context, len(rows)) == [0] * len(rows)
        self._play(context, layers, rows, prompts, window=None)
        assert self.cache.lengths.tolist() == self.lengths

    def extend(self, count: int) -> Context:
        before = self.lengths
        context, layers = self.cache.extend(count)
        assert offsets(context, self.rows) == before
        everyone = range(self.rows)
        self._play(context, layers, everyone, [count] * self.rows, window=self.cache.window)
        assert self.cache.lengths.tolist() == self.lengths
        return context

    def keep(self, counts: Sequence[int]) -> None:
        self.cache.keep(np.array(counts))
        for row, count in zip(self.history, counts, strict=True):
            for layer in row:
                del layer[count:]
        assert self.cache.lengths.tolist() == self.lengths

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        self.history = [[list(layer) for layer in self.history[row]] for row in rows]
        self.rows = len(rows)
        assert self.cache.rows == self.rows
        assert self.cache.lengths.tolist() == self.lengths

    def _play(
        self,
        context: Context,
        layers: list[LayerCache],
        rows: Sequence[int],
        counts: Sequence[int],
        window: Window | None,
    ) -> None:
        assert context.rows == len(rows)
        longest = max(counts)
        for number, layer in enumerate(layers):
            q = self._normal(len(rows), HEADS, longest)
            k, v = (self._normal(len(rows), KV_HEADS, longest) for _ in range(2))
            keys, values = layer.extend(mx.array(k), mx.array(v))
            attended = mx.fast.scaled_dot_product_attention(
                mx.array(q), keys, values, scale=WIDTH**-0.5, mask=context.mask
            )
            ours = np.array(attended)
            for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
                begin = len(self.history[row][number])
                self.history[row][number] += [
                    (k[place, :, n], v[place, :, n]) for n in range(count)
                ]
                expected = attention(q[place, :, :count], self.history[row][number], begin, window)
                np.testing.assert_allclose(ours[place, :, :count], expected, atol=TOLERANCE)

    def _normal(self, *shape: int) -> np.ndarray:
        # Keys twice as large as usual: weights far from equal, so that a wrong one shows.
        return 2 * self.random.standard_normal((*shape, WIDTH), np.float32)


def offsets(context: Context, rows: int) -> list[int]:
    if isinstance(context.offset, int):
        return [context.offset] * rows
    return np.array(context.offset).tolist()


def attention(queries: np.ndarray, history: Layer, begin: int, window: Window | None) -> np.ndarray:
    """queries [HEADS, N, WIDTH] of positions from `begin` on, over a row's history, in float64."""
    keys, values = (
        np.repeat(np.stack(one, axis=1), HEADS // KV_HEADS, axis=0).astype(np.float64)
        for one in zip(*history, strict=True)
    )
    query = begin + np.arange(queries.shape[1])[:, None]
    key = np.arange(len(history))[None]
    seen = key <= query
    if window is not None:
        seen &= (key > query - window.recent) | (key < window.sinks)
    scores = queries @ keys.transpose(0, 2, 1) * WIDTH**-0.5
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


# --- Within the capacity --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_in_step(rows: int) -> None:
    player = Player(rows, capacity=64, block=4)
    player.admit(range(rows), [9] * rows)
    for count in (1, 1, 4, 1, 3, 1):
        context = player.extend(count)
        assert isinstance(context.offset, int)  # the fast way is taken at all
        assert (context.mask is None) == (count == 1)


def test_rows_apart() -> None:
    player = Player(3, capacity=64, block=4)
    player.admit(range(3), [9, 2, 17])
    for count in (1, 1, 4, 1, 3, 1):
        player.extend(count)
    assert player.lengths == [20, 13, 28]


@pytest.mark.parametrize("rows", [[1], [2, 0], [1, 3]])
def test_prompts_are_admitted_while_other_rows_go_on(rows: list[int]) -> None:
    player = Player(4, capacity=64, block=2)
    player.admit(range(4), [9, 4, 7, 5])
    player.extend(1)
    player.extend(2)
    player.admit(rows, [6, 11][: len(rows)])
    for _ in range(3):
        player.extend(1)
    player.admit([3], [1])
    player.extend(2)


def test_a_row_that_was_given_anew_sees_nothing_of_the_text_before() -> None:
    """What is left of the longer text lies in slots that the shorter one has not reached."""
    player = Player(2, capacity=64, block=1)
    player.admit([0, 1], [40, 40])
    player.admit([1], [3])
    for _ in range(4):
        player.extend(1)
    assert player.lengths == [44, 7]


def test_rejected_drafts_are_rolled_back() -> None:
    player = Player(3, capacity=64, block=5)
    player.admit(range(3), [9, 2, 17])
    player.extend(5)
    player.keep([10, 7, 19])
    player.extend(5)
    player.keep([11, 8, 24])
    player.extend(1)
    player.extend(5)


def test_rows_in_step_stay_in_step_after_a_roll_back() -> None:
    player = Player(2, capacity=64, block=5)
    player.admit(range(2), [9, 9])
    player.extend(5)
    player.keep([11, 11])
    player.extend(1)
    player.extend(5)
    player.keep([12, 99])  # more than there is: nothing is cut
    assert player.lengths == [12, 17]
    player.extend(2)


def test_select_keeps_rows_in_the_order_that_is_asked_for() -> None:
    player = Player(4, capacity=64, block=2)
    player.admit(range(4), [9, 4, 7, 5])
    player.extend(2)
    player.select([3, 1])
    assert player.lengths == [7, 6]
    player.extend(2)
    player.select([1])
    player.extend(1)
    player.admit([0], [5])
    player.extend(1)


# --- Past the capacity ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 5])
def test_a_long_row_goes_round_in_a_ring(block: int) -> None:
    """Three times round, one position at a time and in blocks."""
    player = Player(1, capacity=24, block=block)
    assert player.cache.window == Window(recent=24 - 6 - block, sinks=6)
    player.admit([0], [5])
    while player.lengths[0] < 80:
        player.extend(1 if player.lengths[0] % 2 else block)


def test_long_and_short_rows_together() -> None:
    player = Player(3, capacity=24, block=3)
    player.admit(range(3), [3, 20, 13])
    for step in range(20):
        player.extend(1 + step % 3)
        if step == 9:
            player.admit([1], [2])


@pytest.mark.parametrize("prompt", [23, 24, 25, 30, 70])
def test_a_prompt_that_does_not_fit(prompt: int) -> None:
    """It sees all of itself; what follows sees its first positions and the newest."""
    player = Player(3, capacity=24, block=2)
    player.admit(range(3), [prompt, 4, 26])
    player.extend(2)
    player.extend(1)
    player.admit([1, 2], [5, prompt])
    for _ in range(10):
        player.extend(2)


def test_drafts_are_rolled_back_in_the_ring() -> None:
    """What a rejected draft overwrote was out of the window of all that follow."""
    player = Player(2, capacity=24, block=5)
    player.admit(range(2), [23, 40])
    for step in range(20):
        player.extend(5)
        player.keep(
            [length - 5 + 1 + (step + row) % 4 for row, length in enumerate(player.lengths)]
        )


@st.composite
def plays(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    steps: list[tuple[str, list[int]]] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["admit", "extend", "extend", "keep", "select"]))
        steps.append((kind, draw(st.lists(st.integers(0, 60), min_size=8, max_size=8))))
    return steps


@settings(max_examples=40, deadline=None)
@given(plays(), st.integers(0, 9), st.sampled_from([(20, 1), (20, 4), (32, 6), (200, 9)]))
def test_whatever_is_done_in_whatever_order(
    steps: list[tuple[str, list[int]]], seed: int, size: tuple[int, int]
) -> None:
    player = Player(3, *size, seed=seed)
    for kind, numbers in steps:
        rows = player.rows
        match kind:
            case "admit":
                chosen = list(dict.fromkeys(number % rows for number in numbers[:3]))
                player.admit(chosen, [1 + number for number in numbers[3 : 3 + len(chosen)]])
            case "extend":
                player.extend(1 + numbers[0] % player.block)
            case "keep":
                # At most a block is ever taken back: more may have been overwritten.
                player.extend(player.block)
                cut = [number % (player.block + 1) for number in numbers[:rows]]
                lengths = zip(player.lengths, cut, strict=True)
                player.keep([length - back for length, back in lengths])
            case "select":
                player.select(list(dict.fromkeys(number % rows for number in numbers)))


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_takes_the_bytes_that_are_announced(rows: int, dtype: mx.Dtype) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = KvCache(CONFIG, rows, 256, 1, dtype)
    mx.eval(cache.arrays)

    expected = rows * bytes_per_row(CONFIG, 256, dtype)
    assert cache.nbytes == expected == mx.get_active_memory() - before
    assert all(array.dtype == dtype for array in cache.arrays)


def test_rows_apart_look_at_few_numbers_of_slots() -> None:
    cache = KvCache(CONFIG, 2, 4 * MASK_STEP, 1, mx.float32)
    cache.admit([0, 1], [1, 2])
    sizes = set()
    for _ in range(3 * MASK_STEP):
        context, _ = cache.extend(1)
        assert isinstance(context.mask, mx.array)
        sizes.add(context.mask.shape[-1])
    assert sizes == {MASK_STEP, 2 * MASK_STEP, 3 * MASK_STEP, 4 * MASK_STEP}


def test_a_pass_larger_than_announced_is_refused() -> None:
    cache = KvCache(CONFIG, 1, 64, 4, mx.float32)
    with pytest.raises(ValueError, match="5 positions in a pass that was announced as 4"):
        cache.extend(5)
