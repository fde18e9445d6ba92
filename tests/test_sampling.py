"""From logits to tokens: the penalties of `transformers`, the nucleus, chances and confidences.

`data/transformers_penalties.json` holds random logits before and after the real
`RepetitionPenaltyLogitsProcessor` and `NoRepeatNGramLogitsProcessor` (in this order, where both are
asked for), called with the history as `input_ids`; null stands for -inf. The file says which
versions of transformers and torch made it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.decoding.sampling import (
    NOTHING,
    Sampling,
    choose,
    histories_of_block,
    penalise,
    with_newest,
)

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "transformers_penalties.json").read_text()
)["cases"]


def sampling_of(case: dict[str, Any]) -> Sampling:
    return Sampling(
        repetition_penalty=case["repetition_penalty"], no_repeat_ngram=case["no_repeat_ngram"]
    )


def logits_of(values: list[float | None]) -> np.ndarray:
    return np.array([-np.inf if value is None else value for value in values], np.float32)


def history_of(ids: list[int], size: int) -> list[int]:
    return [NOTHING] * (size - len(ids)) + ids


# --- Penalties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 9])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_penalties_are_those_of_transformers(case: dict[str, Any], room: int) -> None:
    """However much room there is before the history."""
    history = history_of(case["history"], len(case["history"]) + room)

    logits = mx.array(logits_of(case["logits"]))[None]
    [ours] = np.array(penalise(logits, mx.array([history], mx.int32), sampling_of(case)))

    # One float32 product or quotient: the last bit may be rounded in another way.
    np.testing.assert_allclose(ours, logits_of(case["expected"]), rtol=2e-7, atol=0)


def test_the_cases_change_something() -> None:
    changed = [case for case in CASES if case["logits"] != case["expected"]]
    banned = [case for case in CASES if None in case["expected"]]
    assert len(changed) > len(CASES) / 2
    assert len({case["no_repeat_ngram"] for case in banned}) >= 3


@pytest.mark.parametrize("shape", [(8, 7), (7, 8), (4, 14)], ids=str)
def test_rows_and_positions_are_penalised_each_by_its_own_history(shape: tuple[int, int]) -> None:
    """All cases of a setting at once, as rows [B, N] of a pass that checks drafts."""
    for setting in {sampling_of(case) for case in CASES}:
        chosen = [case for case in CASES if sampling_of(case) == setting]
        chosen = (chosen * 7)[: math.prod(shape)]
        logits = np.stack([logits_of(case["logits"]) for case in chosen]).reshape(*shape, -1)
        histories = np.array([history_of(case["history"], 44) for case in chosen])

        ours = penalise(mx.array(logits), mx.array(histories.reshape(*shape, -1)), setting)

        expected = np.stack([logits_of(case["expected"]) for case in chosen])
        actual = np.array(ours).reshape(len(chosen), -1)
        np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_nothing_said_is_nothing_penalised(size: int) -> None:
    logits = mx.random.normal((2, 9), key=mx.random.key(0))
    history = mx.full((2, size), NOTHING, mx.int32)
    for ngram in (0, 1, 2, 5, 7):
        penalised = penalise(
            logits, history, Sampling(repetition_penalty=1.5, no_repeat_ngram=ngram)
        )
        assert mx.array_equal(penalised, logits)


def test_by_default_logits_and_choice_are_untouched() -> None:
    logits = mx.random.normal((3, 50), key=mx.random.key(1))
    history = mx.array([[3, 3, 3, 3]] * 3)
    assert penalise(logits, history, Sampling()) is logits
    assert penalise(logits, None, Sampling(repetition_penalty=2.0)) is logits
    assert not Sampling().needs_history
    assert Sampling().is_greedy

    ids, _ = choose(logits, Sampling(), None)
    assert np.array(ids).tolist() == np.array(logits).argmax(-1).tolist()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_ngram_is_never_said_twice(length: int) -> None:
    """Greedy choices from changing logits, until nothing is left that may be said."""
    history, said = mx.full((1, 80), NOTHING, mx.int32), [NOTHING]
    for step in range(64):  # of 4 tokens there are 64 triples
        logits = mx.random.normal((1, 4), key=mx.random.key(step))
        penalised = penalise(logits, history, Sampling(no_repeat_ngram=length))
        if not mx.isfinite(penalised).any():
            break
        ids, _ = choose(penalised, Sampling(), None)
        history = with_newest(history, ids)
        said.append(int(ids[0]))
    ngrams = list(zip(*(said[1 + n :] for n in range(length)), strict=False))
    assert len(set(ngrams)) == len(ngrams) >= {1: 4, 2: 10, 3: 30}[length]


# --- Histories ------------------------------------------------------------------------------------


def test_a_history_moves_on() -> None:
    history = mx.array([[NOTHING, NOTHING, 1], [4, 5, 6]])
    assert with_newest(history, mx.array([2, 7])).tolist() == [[NOTHING, 1, 2], [5, 6, 7]]


def test_each_position_of_a_block_has_the_history_before_it() -> None:
    history, block = mx.array([[NOTHING, 8, 1], [4, 5, 6]]), mx.array([[1, 2, 3], [6, 0, 9]])
    assert histories_of_block(history, block).tolist() == [
        [[NOTHING, 8, 1], [8, 1, 2], [1, 2, 3]],
        [[4, 5, 6], [5, 6, 0], [6, 0, 9]],
    ]
    assert histories_of_block(history, block[:, :1]).tolist() == history[:, None].tolist()


# --- Confidence -----------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    exact = exact - exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("scale", [0.1, 3, 30])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)], ids=["greedy", "sampled"]
)
def test_log_probabilities_are_the_models_own(sampling: Sampling, scale: float) -> None:
    """At temperature 1 and over all tokens, whatever they were chosen by."""
    logits = scale * mx.random.normal((4, 3, 200), key=mx.random.key(2))
    ids, log_probs = choose(logits, sampling, mx.random.key(3))
    expected = np.take_along_axis(log_softmax(np.array(logits)), np.array(ids)[..., None], axis=-1)

    assert log_probs.dtype == mx.float32
    # float32 logits of up to 100 and sums of 200 exponentials. Measured: 4e-6.
    np.testing.assert_allclose(np.array(log_probs), expected[..., 0], rtol=1e-6, atol=1e-5)


def test_bfloat16_logits_have_float32_log_probabilities() -> None:
    logits = (3 * mx.random.normal((5, 100), key=mx.random.key(4))).astype(mx.bfloat16)
    ids, log_probs = choose(logits, Sampling(), None)
    exact = log_softmax(np.array(logits.astype(mx.float32)))
    expected = np.take_along_axis(exact, np.array(ids)[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(np.array(log_probs), expected, rtol=0, atol=1e-5)


def test_a_certain_token_has_log_probability_zero() -> None:
    _, log_probs = choose(mx.array([[0.0, 200.0, 0.0]]), Sampling(), None)
    assert float(log_probs[0]) == pytest.approx(0, abs=1e-6)


# --- Sampling -------------------------------------------------------------------------------------


def draws(logits: np.ndarray, sampling: Sampling, count: int, seed: int = 0) -> np.ndarray:
    many = mx.broadcast_to(mx.array(logits), (count, len(logits)))
    ids, _ = choose(many, sampling, mx.random.key(seed))
    return np.array(ids)


def nucleus_of(probabilities: np.ndarray, top_p: float) -> tuple[set[int], set[int]]:
    """The tokens that are surely in the nucleus, and those that may be: sums are rounded."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    sure, possible = before < top_p - 1e-5, before < top_p + 1e-5
    least = probabilities[order][possible].min() * (1 - 1e-5)
    ties = set(np.flatnonzero(probabilities >= least).tolist())
    most = probabilities[order][~possible].max(initial=0)
    certain = {int(id) for id in order[sure] if probabilities[id] > most * (1 + 1e-5)}
    return certain, ties


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=12),
    st.floats(1e-6, 0.999),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 99),
)
def test_only_the_nucleus_is_sampled_from(
    values: list[float], top_p: float, temperature: float, seed: int
) -> None:
    logits = np.array(values, np.float32)
    probabilities = np.exp(log_softmax(logits / np.float32(temperature)))
    drawn = set(draws(logits, Sampling(temperature, top_p), 300, seed).tolist())
    _, possible = nucleus_of(probabilities, top_p)
    assert drawn
    assert drawn <= possible


def test_the_nucleus_is_all_of_it() -> None:
    probabilities = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = np.log(probabilities).astype(np.float32)
    expected = {
        0.1: {1},
        0.39: {1},
        0.5: {1, 3},
        0.69: {1, 3},
        0.75: {1, 2, 3},
        0.96: set(range(5)),
    }
    for top_p, nucleus in expected.items():
        assert set(draws(logits, Sampling(1.0, top_p), 2000).tolist()) == nucleus, top_p


def test_the_most_probable_token_always_stays() -> None:
    logits = np.array([1.0, 5.0, 2.0], np.float32)
    assert set(draws(logits, Sampling(1.0, 1e-9), 500).tolist()) == {1}
    assert set(draws(logits, Sampling(1.0, 0.0), 500).tolist()) == {1}


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(1.0, 0.8), Sampling(0.7, 0.9)],
    ids=str,
)
def test_tokens_come_as_often_as_they_are_probable(sampling: Sampling) -> None:
    logits = np.array([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, 1.5, -3.0], np.float32)
    expected = np.exp(log_softmax(logits / sampling.temperature))
    if sampling.top_p < 1:
        certain, possible = nucleus_of(expected, sampling.top_p)
        assert certain == possible  # no tie at the edge
        expected = np.where(np.isin(np.arange(8), list(certain)), expected, 0)
        expected /= expected.sum()
    count = 20_000

    observed = np.bincount(draws(logits, sampling, count), minlength=8)

    assert not observed[expected == 0].any()
    often = expected > 0
    chi_square = np.square(observed - count * expected)[often] / (count * expected[often])
    # The 0.999 quantile of chi-square with 7 degrees of freedom; with fewer it is smaller still.
    # The seed is fixed, so this is passed once and for all or never.
    assert chi_square.sum() < 24.3


def test_the_key_decides() -> None:
    logits = mx.random.normal((50, 20), key=mx.random.key(5))
    sampling = Sampling(1.0)
    first, again, other = (
        choose(logits, sampling, mx.random.key(key))[0].tolist() for key in (0, 0, 1)
    )
    assert first == again != other
