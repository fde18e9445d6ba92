"""CTC without a search: the best label of each frame, and where given labels were said.

Connectionist temporal classification (Graves et al., 2006) gives each frame a label or a blank; a
text is the labels in a row once equal neighbours are merged and blanks are dropped. Everything here
works on arrays that are in main memory already and needs numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from funasr_batch.records import FloatArray


class Run(NamedTuple):
    """A label that was read off frames `first` to `last`, both included."""

    label: int
    first: int
    last: int


def collapse(labels: npt.NDArray[np.integer], blank: int) -> list[Run]:
    """Merge equal neighbours and drop blanks; `labels` is int [frames], one for each frame."""
    if len(labels) == 0:
        return []
    firsts = np.flatnonzero(np.append(True, labels[1:] != labels[:-1]))
    lasts = np.append(firsts[1:], len(labels)) - 1
    return [
        Run(label, first, last)
        for label, first, last in zip(
            labels[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True
        )
        if label != blank
    ]


def forced_alignment(
    scores: FloatArray, target: Sequence[int], blank_scores: FloatArray
) -> list[tuple[int, int]] | None:
    """The frames in which each label of a text was said, on the likeliest path.

    `scores` is float32 [frames, len(target)]: column s holds the log-probability of `target[s]` in
    each frame, so that the other tens of thousands of labels need not leave the accelerator;
    `blank_scores`, float32 [frames], that of the blank.

    Returns for each label a half-open range of frames [start, end), at least one frame long, in
    order and without overlap; the frames between two of them are blank. None when no path has a
    probability above 0: there are fewer frames than labels (two equal labels in a row need a blank
    between them), or a label is impossible.

    Viterbi's algorithm over the states blank, label 1, blank, label 2, …, blank, in float64: over a
    thousand frames float32 sums are off by more than two paths may differ.
    """
    frames, labels = len(blank_scores), len(target)
    if scores.shape != (frames, labels):
        raise ValueError(f"scores are {scores.shape}, not {(frames, labels)}")
    repeated = sum(left == right for left, right in pairwise(target))
    if labels == 0:
        return []
    if frames < labels + repeated:
        return None

    emissions = np.full((frames, 2 * labels + 1), blank_scores[:, None], dtype=np.float64)
    emissions[:, 1::2] = scores
    emissions[np.isnan(emissions)] = -np.inf
    path = _best_path(emissions, _may_skip_blank(target))
    if path is None:
        return None
    states = np.arange(1, 2 * labels, 2)
    starts = np.searchsorted(path, states, side="left")
    ends = np.searchsorted(path, states, side="right")
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _may_skip_blank(target: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool [states]: the label may follow the label before it directly, being another one."""
    labels = np.asarray(target)
    allowed = np.zeros(2 * len(labels) + 1, dtype=np.bool_)
    allowed[3::2] = labels[1:] != labels[:-1]
    return allowed


def _best_path(
    emissions: npt.NDArray[np.float64], may_skip: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64] | None:
    """The state of each frame, int64 [frames], or None; `emissions` is [frames, states]."""
    frames, states = emissions.shape
    steps = np.zeros((frames, states), dtype=np.uint8)  # how many states back the path came from
    best = np.full(states, -np.inf)
    best[:2] = emissions[0, :2]
    moves = np.full((3, states), -np.inf)
    everyone = np.arange(states)
    for frame in range(1, frames):
        moves[0] = best
        moves[1, 1:] = best[:-1]
        moves[2, 2:] = np.where(may_skip[2:], best[:-2], -np.inf)
        steps[frame] = moves.argmax(axis=0)
        best = moves[steps[frame], everyone] + emissions[frame]

    state = states - 1 if best[-1] >= best[-2] else states - 2
    if not np.isfinite(best[state]):
        return None
    path = np.empty(frames, dtype=np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(steps[frame, state])
    return path
