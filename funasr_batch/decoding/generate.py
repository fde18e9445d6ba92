"""Writes the texts of many prompts with one LLM: a batch whose rows come and go.

A row whose text has ended is given to the next waiting prompt, so the batch stays full; when
nobody waits any more it shrinks. Plain passes run one ahead of the host, which reads each token
while the device is at the next. Passes that check drafts (speculative.py) are read at once, because
what comes next depends on them.

This module knows token ids, not texts, segments or audio.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from funasr_batch.decoding.kv_cache import KvCache
from funasr_batch.decoding.sampling import (
    NOTHING,
    Sampling,
    choose,
    histories_of_block,
    penalise,
    with_newest,
)
from funasr_batch.decoding.speculative import Draft, Mode, accepted
from funasr_batch.errors import RecognitionError
from funasr_batch.models.layers import on_gpu
from funasr_batch.models.qwen3 import Qwen3
from funasr_batch.records import FloatArray

BLOCKS_GPU = (8, 32)
BLOCKS_CPU = (2, 4, 8, 16, 32)
"""How many positions a pass that checks drafts may have: the newest token and drafted ones. A GPU
prepares itself anew for every shape and hardly notices empty places; a CPU pays for each."""
LONGEST_BLOCK = 32
FIRST_REACH = 7
"""Drafted tokens of a row's first pass; as many again after each that was right to the end."""
CAPACITY_STEP = 256
MOST_CAPACITY = 4096
"""Positions that a row of the cache holds at most; longer texts are seen through a window. A minute
of speech with the whole budget takes some 700, 50 ordinary hotwords a few hundred more."""
MAX_LOGITS_BYTES = 1 << 30
"""Of one pass that checks drafts."""
AHEAD_BYTES = 256 << 20
"""A larger cache is not handed to a pass while the one before it runs: a GPU could not write into
it in place then, and would copy all of it."""


class StretchPlanner(Protocol):
    """Decides how the next passes are made; see speculative.Gate."""

    def next_stretch(self) -> tuple[Mode, int]: ...
    def record(self, mode: Mode, tokens: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt to go on from."""

    embeddings: mx.array = field(repr=False)
    """[P, D]: its tokens and its audio, embedded."""
    max_tokens: int
    draft: Draft | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """What the LLM wrote after a prompt, without the token that ended it."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Natural logarithms of the model's probability of each id."""
    ended: bool
    """False when `max_tokens` ended it."""


@dataclass(slots=True)
class Tally:
    """What a call has cost."""

    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0
    passes: int = 0
    """Of the network after the prompts, whatever the number of rows."""
    row_passes: int = 0
    """Passes, counted once for each row that was at work: without drafts, tokens to be had."""
    tokens: int = 0
    """Generated, the ends among them."""
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True, eq=False)
class _Row:
    """A text in the making."""

    index: int
    request: Request
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    newest: int = NOTHING
    """The last token, which the cache does not hold yet."""
    reach: int = FIRST_REACH
    ended: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """The tokens of a pass that the host has not read yet."""

    rows: list[_Row | None]
    ids: mx.array
    log_probs: mx.array


def generate(
    llm: Qwen3,
    requests: Sequence[Request],
    *,
    stops: frozenset[int],
    rows: int,
    sampling: Sampling | None = None,
    planner: StretchPlanner | None = None,
) -> tuple[list[Generated], Tally]:
    """Goes on from every prompt until a stop token or its `max_tokens`, `rows` at a time.

    The texts do not depend on `rows`, on the other requests or on drafts (greedy, in float32; in
    bfloat16 two equally probable tokens may change places). `planner` decides when drafts are
    checked; without one, or when tokens are sampled, they never are. Results are in the order of
    the requests.

    Raises RecognitionError when the network's numbers are not finite.
    """
    if not requests:
        return [], Tally()
    run = _Run(llm, requests, stops, min(rows, len(requests)), sampling or Sampling(), planner)
    return run.all(), run.tally


class _Run:
    def __init__(
        self,
        llm: Qwen3,
        requests: Sequence[Request],
        stops: frozenset[int],
        rows: int,
        sampling: Sampling,
        planner: StretchPlanner | None,
    ) -> None:
        self._llm, self._stops, self._sampling = llm, stops, sampling
        self._planner = planner if sampling.is_greedy else None
        # The longest texts first, so that the batch does not wait for one of them at the end.
        order = sorted(range(len(requests)), key=lambda n: -requests[n].max_tokens)
        self._texts = [_Row(index, requests[index]) for index in order]
        self._waiting = deque(self._texts)
        self._rows: list[_Row | None] = [None] * rows
        longest = max(len(r.embeddings) + r.max_tokens for r in requests) + LONGEST_BLOCK
        capacity = min(MOST_CAPACITY, -(-longest // CAPACITY_STEP) * CAPACITY_STEP)
        self._cache = KvCache(llm.config, rows, capacity, LONGEST_BLOCK, llm.dtype)
        self._inputs = mx.zeros((rows,), mx.int32)
        self._history_size = max(r.max_tokens for r in requests) if sampling.needs_history else 0
        self._history = mx.full((rows, self._history_size), NOTHING, mx.int32)
        self._pending: deque[_Pending] = deque()
        self._key = mx.random.key(sampling.seed)
        self.tally = Tally()

    def all(self) -> list[Generated]:
        while self._waiting or self._active:
            if self._should_refill:
                self._refill()
            self._shrink()
            if self._active:
                self._stretch()
        texts = sorted(self._texts, key=lambda row: row.index)
        return [Generated(tuple(r.ids), tuple(r.log_probs), r.ended) for r in texts]

    @property
    def _active(self) -> int:
        return sum(row is not None and not row.done for row in self._rows)

    @property
    def _should_refill(self) -> bool:
        """Whether enough rows are free: each time costs a GPU a pass of its own."""
        free = len(self._rows) - self._active
        enough = max(1, len(self._rows) // 8) if on_gpu() else 1
        return bool(self._waiting) and free >= min(enough, len(self._waiting))

    # --- Prompts

    def _refill(self) -> None:
        self._read_all()
        started = time.perf_counter()
        free = [place for place, row in enumerate(self._rows) if row is None or row.done]
        new = [self._waiting.popleft() for _ in free[: len(self._waiting)]]
        places = free[: len(new)]
        prompts = [row.request.embeddings for row in new]
        lengths = [len(prompt) for prompt in prompts]
        context, layers = self._cache.admit(places, lengths)
        hidden = self._llm(_padded(prompts), context, layers)
        last = mx.array(lengths)[:, None, None] - 1
        logits = self._llm.logits(mx.take_along_axis(hidden, last, axis=1)[:, 0])
        ids, log_probs = choose(logits, self._sampling, self._next_key())
        where = mx.array(places)
        self._inputs[where] = ids.astype(mx.int32)
        if self._history_size:
            fresh = mx.full((len(new), self._history_size), NOTHING, mx.int32)
            self._history[where] = with_newest(fresh, ids)
        mx.eval(self._inputs, self._history, ids, log_probs, self._cache.arrays)
        for place, row in zip(places, new, strict=True):
            self._rows[place] = row
        self._pending.append(_Pending(list(new), ids, log_probs))
        self._read_all()
        self.tally.prefill_seconds += time.perf_counter() - started

    def _shrink(self) -> None:
        """Gives up rows that nobody waits for, once half of them are idle."""
        active = [place for place, row in enumerate(self._rows) if row and not row.done]
        if self._waiting or not active or 2 * len(active) > len(self._rows):
            return
        self._read_all()
        kept = [place for place in active if not self._done(place)]
        if kept:
            self._rows = [self._rows[place] for place in kept]
            self._cache.select(kept)
            self._inputs = self._inputs[mx.array(kept)]
            self._history = self._history[mx.array(kept)]

    def _done(self, place: int) -> bool:
        row = self._rows[place]
        return row is None or row.done

    # --- Passes

    def _stretch(self) -> None:
        """A number of passes of one kind, until rows have to be filled or given up."""
        mode, passes = self._planner.next_stretch() if self._planner else ("plain", 1 << 30)
        started, before = time.perf_counter(), self.tally.tokens
        advance = self._plain_pass if mode == "plain" else self._drafted_pass
        for _ in range(passes):
            advance()
            if not self._active or self._should_refill:
                break
            if not self._waiting and 2 * self._active <= len(self._rows) > 1:
                break
        self._read_all()
        seconds = time.perf_counter() - started
        self.tally.generate_seconds += seconds
        if self._planner:
            self._planner.record(mode, self.tally.tokens - before, seconds)

    def _plain_pass(self) -> None:
        context, layers = self._cache.extend(1)
        hidden = self._llm(self._llm.embed(self._inputs[:, None]), context, layers)
        logits = penalise(self._llm.logits(hidden[:, -1]), self._known_history(), self._sampling)
        ids, log_probs = choose(logits, self._sampling, self._next_key())
        self._inputs = ids.astype(mx.int32)
        if self._history_size:
            self._history = with_newest(self._history, ids)
        if self._cache.nbytes <= AHEAD_BYTES:
            mx.async_eval(self._inputs, log_probs, self._history)
        self._pending.append(_Pending(list(self._rows), self._inputs, log_probs))
        self._count_pass()
        if len(self._pending) > 1:
            self._read_oldest()
        mx.async_eval(self._inputs, log_probs, self._history)

    def _drafted_pass(self) -> None:
        self._read_all()
        drafts = self._drafts()
        inputs = _block_of([row.newest if row else 0 for row in self._rows], drafts)
        before = self._cache.lengths
        context, layers = self._cache.extend(inputs.shape[1])
        block = mx.array(inputs)
        logits = self._llm.logits(self._llm(self._llm.embed(block), context, layers))
        if self._history_size:
            histories = histories_of_block(self._history, block)
            logits = penalise(logits, histories, self._sampling)
        ids, log_probs = choose(logits, self._sampling, None)
        mx.eval(ids, log_probs)
        self._count_pass()
        taken = self._take_checked(drafts, np.array(ids), np.array(log_probs))
        self._cache.keep(before + np.array(taken))
        self._inputs = mx.array([row.newest if row else 0 for row in self._rows], mx.int32)
        if self._history_size:
            self._history = self._history_of_rows()

    def _drafts(self) -> list[tuple[int, ...]]:
        """What each row's draft proposes, at most a block."""
        room = MAX_LOGITS_BYTES // (4 * self._llm.config.vocabulary * len(self._rows))
        longest = max(1, min(LONGEST_BLOCK, room)) - 1
        drafts: list[tuple[int, ...]] = []
        for row in self._rows:
            if row is None or row.done or row.request.draft is None:
                drafts.append(())
                continue
            left = row.request.max_tokens - len(row.ids) - 1
            limit = max(0, min(row.reach, longest, left))
            drafts.append(tuple(row.request.draft.propose(row.ids, limit))[:limit])
        return drafts

    def _take_checked(
        self, drafts: Sequence[Sequence[int]], ids: np.ndarray, log_probs: FloatArray
    ) -> list[int]:
        """Gives each row what was right of its draft and one token more; returns how many."""
        taken = []
        for row, draft, chosen, scores in zip(self._rows, drafts, ids, log_probs, strict=True):
            if row is None or row.done:
                taken.append(0)
                continue
            right = accepted(draft, chosen.tolist())
            self.tally.drafted += len(draft)
            self.tally.accepted += right
            if draft:
                row.reach = 2 * row.reach + 1 if right == len(draft) else max(3, 2 * right + 1)
            for place in range(right + 1):
                self._take(row, int(chosen[place]), float(scores[place]))
                if row.done:
                    break
            taken.append(right + 1)
        return taken

    # --- Tokens

    def _read_all(self) -> None:
        while self._pending:
            self._read_oldest()

    def _read_oldest(self) -> None:
        pending = self._pending.popleft()
        ids, log_probs = np.array(pending.ids).tolist(), np.array(pending.log_probs).tolist()
        for row, token, log_prob in zip(pending.rows, ids, log_probs, strict=True):
            if row is not None and not row.done:
                self._take(row, token, log_prob)

    def _take(self, row: _Row, token: int, log_prob: float) -> None:
        if not np.isfinite(log_prob):
            raise RecognitionError("the network's output is not finite")
        self.tally.tokens += 1
        row.newest = token
        if token in self._stops:
            row.ended = row.done = True
            return
        row.ids.append(token)
        row.log_probs.append(log_prob)
        row.done = len(row.ids) >= row.request.max_tokens

    def _count_pass(self) -> None:
        self.tally.passes += 1
        self.tally.row_passes += self._active

    def _known_history(self) -> mx.array | None:
        return self._history if self._history_size else None

    def _history_of_rows(self) -> mx.array:
        size = self._history_size
        history = np.full((len(self._rows), size), NOTHING, np.int32)
        for line, row in zip(history, self._rows, strict=True):
            if row is not None and row.ids:
                newest = row.ids[-size:]
                line[-len(newest) :] = newest
        return mx.array(history)

    def _next_key(self) -> mx.array | None:
        if self._sampling.is_greedy:
            return None
        self._key, key = mx.random.split(self._key)
        return key


def _padded(prompts: Sequence[mx.array]) -> mx.array:
    """Prompts [P_i, D], padded on the right: [R, P, D]."""
    longest = max(map(len, prompts))
    return mx.stack([mx.pad(p, [(0, longest - len(p)), (0, 0)]) for p in prompts])


def _block_of(newest: Iterable[int], drafts: Sequence[Sequence[int]]) -> np.ndarray:
    """The inputs of a pass that checks drafts, int32 [B, N]: each row's newest token and its draft.

    N is one of few sizes, so that shapes recur.
    """
    needed = 1 + max(map(len, drafts))
    sizes = BLOCKS_GPU if on_gpu() else BLOCKS_CPU
    size = next(size for size in (1, *sizes) if size >= needed)
    block = np.zeros((len(drafts), size), np.int32)
    for line, token, draft in zip(block, newest, drafts, strict=True):
        line[0] = token
        line[1 : 1 + len(draft)] = draft
    return block
