"""Batched, drafted and refilled decoding against a loop that computes every step from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map_with_path

from funasr_batch.decoding import generate as generating
from funasr_batch.decoding.generate import (
    FIRST_REACH,
    LONGEST_BLOCK,
    Generated,
    Request,
    StretchPlanner,
    generate,
)
from funasr_batch.decoding.kv_cache import KvCache
from funasr_batch.decoding.sampling import Sampling
from funasr_batch.decoding.speculative import Always, Draft, Gate, LookupDraft, SaidText
from funasr_batch.errors import RecognitionError
from funasr_batch.models.qwen3 import Context, Qwen3, Qwen3Config

VOCABULARY = 40
CONFIG = Qwen3Config(
    vocabulary=VOCABULARY,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    units=48,
    eps=1e-6,
    rope_theta=1e6,
)
STOPS = frozenset({7, 19})
PENALTIES = Sampling(repetition_penalty=1.3, no_repeat_ngram=3)
# The same float32 sums in another order. Measured: 6e-6.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm() -> Qwen3:
    model = Qwen3(CONFIG)

    def random(name: str, parameter: mx.array) -> mx.array:
        seed = sum(name.encode()) * 31 + len(name)
        values = mx.random.normal(parameter.shape, key=mx.random.key(seed))
        if parameter.ndim == 1:
            return 1 + 0.1 * values
        # Strong layers beside the embedding: otherwise the newest token is said again and again.
        return values * (0.6 if "embed" in name else 3 / parameter.shape[1] ** 0.5)

    model.update(tree_map_with_path(random, model.parameters()))
    mx.eval(model.parameters())
    return model


def prompt_of(llm: Qwen3, length: int, seed: int) -> mx.array:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length)
    return llm.embed(mx.array(ids))


def request_of(llm: Qwen3, length: int, max_tokens: int, seed: int = 0) -> Request:
    return Request(prompt_of(llm, length, seed), max_tokens)


# --- The naive way --------------------------------------------------------------------------------


def naive(
    llm: Qwen3, request: Request, stops: frozenset[int], sampling: Sampling | None = None
) -> Generated:
    """One token at a time, each from the whole text; no cache, no batch, no draft."""
    ids: list[int] = []
    log_probs: list[float] = []
    while len(ids) < request.max_tokens:
        said = llm.embed(mx.array(ids, mx.int32))
        hidden = llm(mx.concatenate([request.embeddings, said])[None])
        logits = np.array(llm.logits(hidden[0, -1])).astype(np.float64)
        logits = penalised(logits, ids, sampling or Sampling())
        token = int(logits.argmax())
        if token in stops:
            return Generated(tuple(ids), tuple(log_probs), ended=True)
        ids.append(token)
        log_probs.append(float(logits[token] - np.log(np.exp(logits).sum())))
    return Generated(tuple(ids), tuple(log_probs), ended=False)


def penalised(logits: np.ndarray, ids: Sequence[int], sampling: Sampling) -> np.ndarray:
    """As transformers does it, in plain loops; see test_sampling.py."""
    logits = logits.copy()
    penalty, length = sampling.repetition_penalty, sampling.no_repeat_ngram
    for id in set(ids):
        logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
    if length and len(ids) >= length - 1:
        latest = list(ids[len(ids) - length + 1 :])
        for start in range(len(ids) - length + 1):
            if list(ids[start : start + length - 1]) == latest:
                logits[ids[start + length - 1]] = -np.inf
    return logits


def assert_same(ours: Sequence[Generated], expected: Sequence[Generated]) -> None:
    assert [text.ids for text in ours] == [text.ids for text in expected]
    assert [text.ended for text in ours] == [text.ended for text in expected]
    for text, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(text.log_probs, other.log_probs, rtol=0, atol=TOLERANCE)


@dataclass(frozen=True)
class Case:
    """Prompts of different lengths, with what is to follow them."""

    requests: tuple[Request, ...]
    plain: tuple[Generated, ...]
    penalised: tuple[Generated, ...]

    def texts(self, sampling: Sampling | None) -> tuple[Generated, ...]:
        return self.penalised if sampling == PENALTIES else self.plain


@pytest.fixture(scope="module")
def case(llm: Qwen3) -> Case:
    sizes = [(5, 30), (1, 12), (17, 40), (9, 1), (3, 25), (30, 7), (11, 60), (5, 2), (8, 33)]
    requests = tuple(request_of(llm, *size, seed) for seed, size in enumerate(sizes))
    return Case(
        requests,
        tuple(naive(llm, request, STOPS) for request in requests),
        tuple(naive(llm, request, STOPS, PENALTIES) for request in requests),
    )


def test_the_case_has_all_kinds_of_ends(case: Case) -> None:
    for texts in (case.plain, case.penalised):
        assert len({text.ids for text in texts}) == len(texts)
        assert len({len(text.ids) for text in texts}) >= 6
        assert {text.ended for text in texts} == {True, False}
    assert max(len(set(text.ids)) for text in case.plain) > 5


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [None, PENALTIES], ids=["greedy", "penalties"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 64])
def test_texts_do_not_depend_on_the_batch(
    llm: Qwen3, case: Case, rows: int, sampling: Sampling | None
) -> None:
    """With fewer rows than requests, a row is filled again as soon as its text ends."""
    texts, tally = generate(llm, case.requests, stops=STOPS, rows=rows, sampling=sampling)
    assert_same(texts, case.texts(sampling))
    assert tally.tokens == sum(len(text.ids) + text.ended for text in texts)


@pytest.mark.parametrize("rows", [1, 3])
def test_results_are_in_the_order_of_the_requests(llm: Qwen3, case: Case, rows: int) -> None:
    order = [4, 8, 0, 6, 3, 1, 7, 2, 5]
    requests = [case.requests[place] for place in order]
    texts, _ = generate(llm, requests, stops=STOPS, rows=rows)
    assert_same(texts, [case.plain[place] for place in order])


@pytest.mark.parametrize("place", range(4))
def test_one_request(llm: Qwen3, case: Case, place: int) -> None:
    texts, _ = generate(llm, [case.requests[place]], stops=STOPS, rows=8)
    assert_same(texts, [case.plain[place]])


def test_no_request(llm: Qwen3) -> None:
    texts, tally = generate(llm, [], stops=STOPS, rows=4)
    assert texts == []
    assert (tally.passes, tally.tokens) == (0, 0)


def test_one_token_comes_of_the_prompt_alone(llm: Qwen3, case: Case) -> None:
    requests = [replace(request, max_tokens=1) for request in case.requests]
    texts, tally = generate(llm, requests, stops=STOPS, rows=4)
    assert_same(texts, [naive(llm, request, STOPS) for request in requests])
    assert tally.passes == 0


def test_a_text_that_ends_at_once(llm: Qwen3, case: Case) -> None:
    request = case.requests[0]
    first = case.plain[0].ids[0]
    texts, tally = generate(llm, [request, request], stops=frozenset({first}), rows=1)
    assert texts == [Generated((), (), ended=True)] * 2
    assert tally.tokens == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_the_same_request_again_and_again(llm: Qwen3, case: Case, rows: int) -> None:
    """Of one object, in rows that others have left."""
    texts, _ = generate(llm, [case.requests[6]] * 5, stops=STOPS, rows=rows)
    assert_same(texts, [case.plain[6]] * 5)


def test_a_text_longer_than_a_step_of_the_cache(llm: Qwen3) -> None:
    """Beside a short one, past 256 positions, where more slots are looked at."""
    requests = [request_of(llm, 250, 40, seed=1), request_of(llm, 4, 40, seed=2)]
    expected = [naive(llm, request, frozenset()) for request in requests]
    texts, _ = generate(llm, requests, stops=frozenset(), rows=2)
    assert_same(texts, expected)


# --- Drafts ---------------------------------------------------------------------------------------


@dataclass
class InPlace:
    """Proposes a text by place, whatever was said."""

    text: Sequence[int]
    greedy: bool = False
    """Gives more than it is asked for."""

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        assert limit < LONGEST_BLOCK
        return self.text[len(ids) : None if self.greedy else len(ids) + limit]


@dataclass
class Never:
    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        return ()


PLANNERS: dict[str, Callable[[], StretchPlanner | None]] = {
    "drafted": lambda: Always("drafted"),
    "plain": lambda: Always("plain"),
    "gate": lambda: Gate(probe=2, period=5),
    "none": lambda: None,
}


@st.composite
def edits(draw: st.DrawFn) -> Callable[[Sequence[int]], Draft | None]:
    """How a draft comes about from the text that will be said."""
    kind = draw(
        st.sampled_from(["none", "empty", "perfect", "too much", "noise", "lookup", "edit"])
    )
    numbers = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6))
    places = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    deleting = draw(st.booleans())

    def edited(ids: Sequence[int]) -> Draft | None:
        match kind:
            case "none":
                return None
            case "empty":
                return Never()
            case "perfect":
                return InPlace([*ids, *sorted(STOPS), *numbers])
            case "too much":
                return InPlace([*ids, *numbers * 20], greedy=True)
            case "noise":
                return InPlace(numbers * 20)
            case "lookup":
                return LookupDraft(SaidText(ids))
        changed = list(ids)
        for place, number in zip(places, numbers, strict=False):
            if deleting:
                del changed[place : place + 1]
            else:
                changed.insert(place, number)
        return InPlace(changed)

    return edited


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    places=st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True),
    rows=st.integers(1, 6),
    planner=st.sampled_from(sorted(PLANNERS)),
    sampling=st.sampled_from([None, PENALTIES]),
)
def test_no_draft_changes_a_text(
    llm: Qwen3,
    case: Case,
    data: st.DataObject,
    places: list[int],
    rows: int,
    planner: str,
    sampling: Sampling | None,
) -> None:
    expected = [case.texts(sampling)[place] for place in places]
    requests = [
        replace(case.requests[place], draft=data.draw(edits())(text.ids))
        for place, text in zip(places, expected, strict=True)
    ]
    texts, tally = generate(
        llm, requests, stops=STOPS, rows=rows, sampling=sampling, planner=PLANNERS[planner]()
    )
    assert_same(texts, expected)
    assert 0 <= tally.accepted <= tally.drafted
    if planner in ("plain", "none"):
        assert tally.drafted == 0


@pytest.mark.parametrize("planner", ["drafted", "gate"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sampling", [None, PENALTIES], ids=["greedy", "penalties"])
def test_right_drafts_save_passes(
    llm: Qwen3, case: Case, sampling: Sampling | None, rows: int, planner: str
) -> None:
    expected = case.texts(sampling)
    requests = [
        replace(request, draft=InPlace(text.ids))
        for request, text in zip(case.requests, expected, strict=True)
    ]
    texts, tally = generate(
        llm, requests, stops=STOPS, rows=rows, sampling=sampling, planner=PLANNERS[planner]()
    )
    _, plain = generate(llm, requests, stops=STOPS, rows=rows, sampling=sampling)
    assert_same(texts, expected)
    assert tally.accepted == tally.drafted > 0
    assert tally.passes < plain.passes
    assert tally.row_passes < plain.row_passes


def test_drafts_beside_a_longer_history_than_the_text(llm: Qwen3) -> None:
    """A request of few tokens beside one of many: histories are of the size of the longest."""
    requests = [request_of(llm, 4, 6, seed=1), request_of(llm, 9, 70, seed=2)]
    expected = [naive(llm, request, frozenset(), PENALTIES) for request in requests]
    requests = [
        replace(request, draft=InPlace([*text.ids[:4], 0, *text.ids[5:]]))
        for request, text in zip(requests, expected, strict=True)
    ]
    texts, _ = generate(
        llm,
        requests,
        stops=frozenset(),
        rows=2,
        sampling=PENALTIES,
        planner=Always("drafted"),
    )
    assert_same(texts, expected)


# --- Sampling -------------------------------------------------------------------------------------


def test_sampled_texts_follow_their_seed(llm: Qwen3, case: Case) -> None:
    def texts(seed: int, planner: StretchPlanner | None = None) -> list[tuple[int, ...]]:
        requests = [replace(request, draft=InPlace([1] * 50)) for request in case.requests]
        sampling = Sampling(temperature=1.0, seed=seed)
        results, tally = generate(
            llm, requests, stops=STOPS, rows=3, sampling=sampling, planner=planner
        )
        assert tally.drafted == 0
        return [result.ids for result in results]

    assert texts(0) == texts(0) == texts(0, Always("drafted"))
    assert texts(0) != texts(1)


def test_sampled_tokens_have_the_models_own_log_probabilities(llm: Qwen3) -> None:
    request = request_of(llm, 6, 20)
    [text], _ = generate(
        llm, [request], stops=frozenset(), rows=1, sampling=Sampling(temperature=1.5, top_p=0.9)
    )
    said = llm.embed(mx.array(text.ids[:-1]))
    whole = mx.concatenate([request.embeddings, said])
    logits = np.array(llm.logits(llm(whole[None])[0, 5:])).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        text.log_probs, expected[np.arange(20), list(text.ids)], rtol=0, atol=TOLERANCE
    )


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("planner", ["drafted", "none"])
def test_weights_that_are_no_numbers_are_an_error(layer: str, planner: str) -> None:
    broken = Qwen3(CONFIG)
    broken.load_weights(
        [
            (name, mx.full(value.shape, mx.nan) if name == layer else value)
            for name, value in tree_flatten(broken.parameters())
        ]
    )
    request = replace(request_of(broken, 5, 4), draft=InPlace([1, 2, 3]))
    with pytest.raises(RecognitionError, match="not finite"):
        generate(broken, [request], stops=STOPS, rows=1, planner=PLANNERS[planner]())


# --- What it costs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """Stands in for a network: after n it says n + 1."""

    config: Qwen3Config = field(default_factory=lambda: replace(CONFIG, vocabulary=100, layers=1))
    dtype: mx.Dtype = mx.float32

    def embed(self, ids: mx.array) -> mx.array:
        return ids[..., None].astype(mx.float32)

    def __call__(self, embeddings: mx.array, context: Any, caches: Any) -> mx.array:
        return embeddings

    def logits(self, hidden: mx.array) -> mx.array:
        return 20.0 * (mx.arange(100) == hidden + 1)


def count_up(
    *starts: int, draft: Draft | None, planner: StretchPlanner | None = None, **options: Any
) -> tuple[list[Generated], Any]:
    """Each counts on to 19; 20 ends it."""
    requests = [Request(mx.array([[7.0], [start]]), 30, draft) for start in starts]
    options = {"stops": frozenset({20}), "rows": 8, **options}
    return generate(Counting(), requests, planner=planner, **options)  # type: ignore[arg-type]


def test_the_cost_without_drafts() -> None:
    [text], tally = count_up(5, draft=None)
    assert text.ids == tuple(range(6, 20))
    assert text.ended
    # 6 comes of the prompt; 7 to 20 take a pass each; the host sees the 20 one pass later.
    assert (tally.tokens, tally.passes, tally.row_passes) == (15, 15, 15)
    assert (tally.drafted, tally.accepted) == (0, 0)


def test_the_cost_with_right_drafts() -> None:
    [text], tally = count_up(5, draft=InPlace(range(6, 20)), planner=Always("drafted"))
    assert text.ids == tuple(range(6, 20))
    # 6 comes of the prompt. 7 to 13 are drafted and right, 14 comes with them. Of the 15 that may
    # be drafted next there are only 15 to 19; 20 comes with them.
    assert FIRST_REACH == 7
    assert (tally.tokens, tally.passes, tally.row_passes) == (15, 2, 2)
    assert (tally.drafted, tally.accepted) == (12, 12)


def test_the_cost_with_drafts_that_are_partly_right() -> None:
    guess = [6, 7, 8, 0, 0, 0, 12, 13, 14, 15, 16, 17, 18, 19]
    [text], tally = count_up(5, draft=InPlace(guess), planner=Always("drafted"))
    assert text.ids == tuple(range(6, 20))
    passes = [
        (7, 2),  # 7 8 right, then 0 for 9: next, one more than twice what was right is drafted
        (5, 0),  # after 9: 0 0 12 13 14, all in vain
        (3, 0),  # after 10: 0 12 13
        (3, 3),  # after 11: 12 13 14, and 15
        (4, 4),  # after 15: 16 17 18 19, and 20
    ]
    assert tally.drafted == sum(drafted for drafted, _ in passes)
    assert tally.accepted == sum(right for _, right in passes)
    assert (tally.tokens, tally.passes, tally.row_passes) == (15, len(passes), len(passes))


def test_the_cost_of_rows() -> None:
    texts, tally = count_up(17, 5, draft=Never(), planner=Always("drafted"))
    assert [text.ids for text in texts] == [(18, 19), tuple(range(6, 20))]
    # The second is at work for 14 passes, the first for its last 2.
    assert (tally.tokens, tally.passes, tally.row_passes) == (18, 14, 16)


def test_the_cost_of_a_row_that_is_filled_again() -> None:
    _, tally = count_up(17, 5, 17, draft=Never(), planner=Always("drafted"), rows=1)
    assert (tally.tokens, tally.passes, tally.row_passes) == (21, 18, 18)


def test_drafts_end_with_the_budget() -> None:
    """Of a text that never ends, no more is drafted than may still be said."""
    [text], tally = count_up(29, draft=InPlace(range(30, 90)), planner=Always("drafted"))
    assert text.ids == tuple(range(30, 60))
    assert not text.ended
    # 30 of the prompt; 7 and 1; 15 and 1; then 5 are left, of which 4 are worth drafting.
    assert (tally.tokens, tally.passes, tally.drafted, tally.accepted) == (30, 3, 26, 26)


def test_a_draft_that_gives_more_than_it_is_asked_for_is_cut() -> None:
    eager = InPlace(range(30, 90), greedy=True)
    [text], tally = count_up(29, draft=eager, planner=Always("drafted"))
    assert text.ids == tuple(range(30, 60))
    assert (tally.passes, tally.drafted) == (3, 26)


def test_seconds_are_counted(llm: Qwen3, case: Case) -> None:
    _, tally = generate(llm, case.requests, stops=STOPS, rows=2)
    assert tally.prefill_seconds > 0
    assert tally.generate_seconds > 0


# --- Longer than a row of the cache ---------------------------------------------------------------


def windowed(llm: Qwen3, request: Request, recent: int, sinks: int) -> tuple[int, ...]:
    """One token at a time, each from the whole text through a window; no cache."""
    ids: list[int] = []
    prompt = len(request.embeddings)
    while len(ids) < request.max_tokens:
        said = llm.embed(mx.array(ids, mx.int32))
        x = mx.concatenate([request.embeddings, said])[None]
        position = np.arange(x.shape[1])
        behind = position[:, None] - position[None, :]
        # The prompt sees all of itself, in one pass.
        near = (behind < recent) | (position[None, :] < sinks) | (position[:, None] < prompt)
        hidden = np.where((behind >= 0) & near, np.float32(0), -np.float32(np.inf))
        states = llm(x, Context(1, 0, mx.array(hidden[None, None])))
        ids.append(int(np.array(llm.logits(states[0, -1])).argmax()))
    return tuple(ids)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("planner", [None, Always("drafted")], ids=["plain", "drafted"])
def test_texts_longer_than_the_cache_are_seen_through_a_window(
    llm: Qwen3, rows: int, planner: StretchPlanner | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = 64
    monkeypatch.setattr(generating, "CAPACITY_STEP", 1)
    monkeypatch.setattr(generating, "MOST_CAPACITY", capacity)
    window = KvCache(llm.config, 1, capacity, generating.LONGEST_BLOCK, mx.float32).window
    requests = [request_of(llm, size, 40, seed) for seed, size in enumerate((5, 40, 70))]
    expected = [windowed(llm, request, window.recent, window.sinks) for request in requests]
    texts, tally = generate(
        llm,
        [
            replace(request, draft=InPlace([*ids[:9], 0, *ids[10:]]))
            for request, ids in zip(requests, expected, strict=True)
        ],
        stops=frozenset(),
        rows=rows,
        planner=planner,
    )
    assert [text.ids for text in texts] == expected
    assert (tally.accepted > 50) == (planner is not None)
