"""Integrate and fire without a loop, beside the loop that defines it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from funasr_batch.decoding.cif import running_sum, token_counts, token_weights

TAIL = 0.45


def batch(*rows: list[float]) -> np.ndarray:
    """Rows of alphas, padded with zeros."""
    alphas = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for row, values in zip(alphas, rows, strict=True):
        row[: len(values)] = values
    return alphas


def sequential_weights(alphas: np.ndarray) -> np.ndarray:
    """Integrate and fire as it is defined, float64: alphas [L] below 1 -> complete tokens [N, L].

    The tail is a frame of its own, whose share is left out: its hidden state is zero.
    """
    tokens = []
    current = np.zeros(len(alphas) + 1)
    total = 0.0
    for frame, alpha in enumerate([*alphas.astype(np.float64), TAIL]):
        if total + alpha >= 1:
            current[frame] = 1 - total
            tokens.append(current[:-1])
            current = np.zeros(len(alphas) + 1)
            current[frame] = total = alpha - (1 - total)
        else:
            current[frame] = alpha
            total += alpha
    return np.array(tokens).reshape(-1, len(alphas))


def test_a_worked_example() -> None:
    alphas = batch([0.2, 0.5, 0.4, 0.3, 0.8, 0.1, 0.4])
    counts = token_counts(alphas, TAIL)
    assert counts.tolist() == [3]
    expected = [
        [0.2, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.1, 0.3, 0.6, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.2, 0.1, 0.4],  # the tail completes it, with nothing to add
    ]
    np.testing.assert_allclose(token_weights(alphas, counts)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("residual", "count"), [(0.44, 2), (0.50, 2), (0.54, 2), (0.55, 3), (0.56, 3)]
)
def test_the_tail_completes_a_token_that_lacks_at_most_its_weight(
    residual: float, count: int
) -> None:
    """A common error is to fire when the *residual* exceeds the tail: 0.50 and 0.54 would."""
    assert token_counts(batch([0.7, 0.9, 0.4, residual]), TAIL).tolist() == [count]


def test_the_running_sum_is_float64_rounded_to_float32() -> None:
    alphas = np.full((1, 4000), 0.1, dtype=np.float32)
    exact = np.cumsum(alphas[0].astype(np.float64))
    np.testing.assert_array_equal(running_sum(alphas)[0], exact.astype(np.float32))
    assert np.any(running_sum(alphas)[0] != np.cumsum(alphas[0]))  # float32 drifts
    assert np.any(running_sum(alphas)[0] != exact)


def test_real_alphas_fire_where_funasrs_do(shared_data: Path) -> None:
    """Of a published Paraformer-large: spikes so close to 1 that rounding decides the frame."""
    real = json.loads((shared_data / "golden/paraformer_cif/ali_example_1.json").read_text())
    with_tail = batch(real["alphas"])
    alphas = with_tail[:, : real["n_frames"]]
    assert with_tail[0, -1] == np.float32(TAIL)

    total = running_sum(with_tail)[0]
    fired = np.flatnonzero(np.diff(np.floor(total), prepend=0))
    assert fired.tolist() == real["idx"]
    # FunASR adds the 1 of a fire before it takes the whole part away, both in float32.
    peaks = (1 + total[fired].astype(np.float32)) - np.floor(total[fired]).astype(np.float32)
    np.testing.assert_array_equal(peaks - np.floor(peaks), np.float32(real["remain"]))

    counts = token_counts(alphas, TAIL)
    assert counts.tolist() == [real["n_tokens"]]
    weights = token_weights(alphas, counts)[0]
    last_frames = [np.flatnonzero(row)[-1] for row in weights]
    assert last_frames == real["idx"]


def test_items_of_a_batch_do_not_touch() -> None:
    rows = [[0.9, 0.8, 0.7], [0.2], [0.6, 0.6, 0.6, 0.6, 0.6], [0.0, 0.0]]
    counts = token_counts(batch(*rows), TAIL)
    assert counts.tolist() == [2, 0, 3, 0]
    weights = token_weights(batch(*rows), counts)
    assert weights.shape == (4, 3, 5)
    assert weights.dtype == np.float32
    for row, count, own in zip(rows, counts, weights, strict=True):
        alone = token_weights(batch(row), np.array([count]))[0]
        np.testing.assert_array_equal(own[:count, : len(row)], alone)
        assert not own[count:].any()
        assert not own[:, len(row) :].any()


def test_a_batch_without_tokens_has_no_rows() -> None:
    alphas = batch([0.1, 0.2], [0.0])
    counts = token_counts(alphas, TAIL)
    assert counts.tolist() == [0, 0]
    assert token_weights(alphas, counts).shape == (2, 0, 2)


def test_an_alpha_above_one_fires_more_than_once() -> None:
    weights = token_weights(batch([0.5, 2.25, 0.75]), np.array([3]))[0]
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 1, 0], [0, 0.75, 0.25]], atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 0.984375, width=32)),
        min_size=1,
        max_size=4,
    )
)
def test_the_matrix_holds_what_the_loop_would_give(rows: list[np.ndarray]) -> None:
    totals = np.array([row.sum(dtype=np.float64) + TAIL for row in rows])
    assume(np.abs(totals - totals.round()).min() > 1e-4)  # there the loop's rounding decides
    alphas = batch(*[row.tolist() for row in rows])

    counts = token_counts(alphas, TAIL)
    weights = token_weights(alphas, counts)

    for row, count, own in zip(rows, counts, weights, strict=True):
        expected = sequential_weights(row)
        assert count == len(expected)
        np.testing.assert_allclose(own[:count, : len(row)], expected, rtol=0, atol=1e-5)
        assert np.all(own.sum(axis=0)[: len(row)] <= row + 1e-5)
        np.testing.assert_allclose(own[: max(count - 1, 0)].sum(axis=1), 1, rtol=0, atol=1e-5)
