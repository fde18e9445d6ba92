"""CTC read-out beside definitions that are slow and obvious."""

from __future__ import annotations

from itertools import groupby, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.decoding.ctc import Run, collapse, forced_alignment
from funasr_batch.records import FloatArray

BLANK = 3


def log_softmax(logits: np.ndarray) -> FloatArray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised.astype(np.float32)


def align(log_probs: FloatArray, target: list[int]) -> list[tuple[int, int]] | None:
    return forced_alignment(log_probs[:, target], target, log_probs[:, BLANK])


def text_of(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in groupby(path) if label != BLANK]


def best_score(log_probs: FloatArray, target: list[int]) -> float:
    """Over every path there is."""
    frames, labels = log_probs.shape
    exact = log_probs.astype(np.float64)
    return max(
        (
            sum(exact[frame, label] for frame, label in enumerate(path))
            for path in product(range(labels), repeat=frames)
            if text_of(path) == target
        ),
        default=-np.inf,
    )


def path_of(spans: list[tuple[int, int]], target: list[int], frames: int) -> tuple[int, ...]:
    path = [BLANK] * frames
    for (start, end), label in zip(spans, target, strict=True):
        path[start:end] = [label] * (end - start)
    return tuple(path)


class TestGreedy:
    def test_merges_repeats_and_drops_blanks(self) -> None:
        frames = [3, 1, 1, 3, 1, 2, 2, 2, 3]
        runs = [Run(1, 1, 2), Run(1, 4, 4), Run(2, 5, 7)]
        assert collapse(np.array(frames), BLANK) == runs
        log_probs = np.full((9, 4), -9, dtype=np.float32)
        log_probs[range(9), frames] = -0.1
        assert collapse(log_probs.argmax(axis=1), BLANK) == runs

    @pytest.mark.parametrize("frames", [[], [3], [3, 3]])
    def test_nothing_but_blanks(self, frames: list[int]) -> None:
        assert collapse(np.array(frames, dtype=np.int64), BLANK) == []

    @given(st.lists(st.integers(0, 3), max_size=20), st.sampled_from([np.int32, np.uint32]))
    def test_any_path(self, frames: list[int], dtype: type) -> None:
        runs = collapse(np.array(frames, dtype=dtype), BLANK)
        assert [run.label for run in runs] == text_of(tuple(frames))
        for label, first, last in runs:
            assert set(frames[first : last + 1]) == {label}
            assert frames[first - 1 : first] != [label]
            assert frames[last + 1 : last + 2] != [label]


class TestForcedAlignment:
    @pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])
    @pytest.mark.parametrize("target", [[0], [1, 1], [0, 1], [0, 1, 0], [2, 2, 2], [0, 1, 1, 2]])
    def test_is_the_best_of_all_paths(self, frames: int, target: list[int]) -> None:
        for seed in range(5):
            log_probs = log_softmax(np.random.default_rng(seed).normal(size=(frames, 4)) * 3)
            spans = align(log_probs, target)
            expected = best_score(log_probs, target)
            if spans is None:
                assert expected == -np.inf
                continue
            path = path_of(spans, target, frames)
            assert text_of(path) == target
            score = log_probs.astype(np.float64)[range(frames), list(path)].sum()
            # Sums of at most six float64 terms; only their order differs.
            assert score == pytest.approx(expected, abs=1e-12)

    def test_clear_peaks(self) -> None:
        frames = [3, 0, 0, 3, 3, 1, 1, 3, 1, 3]
        log_probs = np.full((10, 4), -5, dtype=np.float32)
        log_probs[range(10), frames] = -0.1
        assert align(log_probs, [0, 1, 1]) == [(1, 3), (5, 7), (8, 9)]

    def test_as_many_frames_as_needed(self) -> None:
        log_probs = log_softmax(np.zeros((3, 4)))
        assert align(log_probs, [0, 0]) == [(0, 1), (2, 3)]
        assert align(log_probs[:2], [0, 0]) is None
        assert align(log_probs[:2], [0, 1]) == [(0, 1), (1, 2)]

    def test_no_label(self) -> None:
        assert align(log_softmax(np.zeros((3, 4))), []) == []
        assert align(np.zeros((0, 4), dtype=np.float32), []) == []
        assert align(np.zeros((0, 4), dtype=np.float32), [1]) is None

    @pytest.mark.parametrize("impossible", [-np.inf, np.nan])
    def test_impossible_label(self, impossible: float) -> None:
        log_probs = log_softmax(np.zeros((6, 4)))
        log_probs[:, 1] = impossible
        assert align(log_probs, [0, 1, 2]) is None
        assert align(log_probs, [0, 2]) is not None

    def test_impossible_blank(self) -> None:
        log_probs = log_softmax(np.zeros((4, 4)))
        log_probs[:, BLANK] = -np.inf
        assert align(log_probs, [0, 0]) is None
        spans = align(log_probs, [0, 1])
        assert spans is not None
        assert BLANK not in path_of(spans, [0, 1], 4)

    def test_long_input(self) -> None:
        """Half a minute of speech whose labels are known."""
        rng = np.random.default_rng(0)
        target = rng.integers(0, 3, size=200).tolist()
        frames = [label for label in target for label in (label, label, BLANK)]
        log_probs = np.full((600, 4), -4, dtype=np.float32)
        log_probs[range(600), frames] = -0.1
        assert align(log_probs, target) == [(3 * n, 3 * n + 2) for n in range(200)]

    def test_shapes_must_agree(self) -> None:
        scores = np.zeros((5, 2), dtype=np.float32)
        with pytest.raises(ValueError, match="scores are"):
            forced_alignment(scores, [1, 2, 3], np.zeros(5, dtype=np.float32))
