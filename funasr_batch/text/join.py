"""Joins the texts of overlapping windows so that what both heard is there once.

Two windows read the overlap independently, each worst near its own edge, where it lacks context
and may hold half a word. Their tokens are aligned there by text and time (a global alignment in
the manner of Needleman and Wunsch, 1970, without a price for gaps), and the text passes from the
left window to the right one within the longest run on which they agree, as near to the middle of
the overlap as that allows. Where they agree on nothing it passes at the middle.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from funasr_batch.records import Token

SAME_TOKEN_MS = 300
"""Readings of one token are closer than this: CIF peaks move by one or two frames of 60 ms with
the context, and the same character is seldom said again so soon."""

UNRELIABLE_EDGE_MS = 300
"""Tokens that reach this close to the edge of their window prove nothing: about half a word."""


@dataclass(frozen=True, slots=True)
class TextWindow:
    """What was recognised in one window. Times are milliseconds from the recording's start."""

    start_ms: int
    end_ms: int
    tokens: tuple[Token, ...]
    """In time order."""


def join_windows(windows: Sequence[TextWindow]) -> list[tuple[Token, ...]]:
    """Give each token of an overlap to one of the two windows.

    `windows` are those of one recording, in time order, no moment being in three of them. The
    result has for each window the tokens that it keeps, a stretch of its own; one after the other
    they are the recording's tokens. Where the times of neighbours kept from two windows cross,
    they are made to meet; texts and confidences are never changed.
    """
    firsts = [0] * len(windows)
    ends = [len(window.tokens) for window in windows]
    for index, (left, right) in enumerate(pairwise(windows)):
        if left.end_ms > right.start_ms:
            ends[index], firsts[index + 1] = _hand_over(left, right)
    kept = [
        list(window.tokens[first:end])
        for window, first, end in zip(windows, firsts, ends, strict=True)
    ]
    for left_tokens, right_tokens in pairwise([tokens for tokens in kept if tokens]):
        left_tokens[-1], right_tokens[0] = _meeting(left_tokens[-1], right_tokens[0])
    return [tuple(tokens) for tokens in kept]


def _hand_over(left: TextWindow, right: TextWindow) -> tuple[int, int]:
    """How many tokens the left window keeps, and the first that the right one keeps."""
    middle = (right.start_ms + left.end_ms) // 2
    edge = min(UNRELIABLE_EDGE_MS, (left.end_ms - right.start_ms) // 4)

    # Only what one window may share with the other, and only where it can be believed.
    left_range = [
        index
        for index, token in enumerate(left.tokens)
        if token.end > right.start_ms - SAME_TOKEN_MS and token.end <= left.end_ms - edge
    ]
    right_range = [
        index
        for index, token in enumerate(right.tokens)
        if token.start < left.end_ms + SAME_TOKEN_MS and token.start >= right.start_ms + edge
    ]
    agreed = [
        (left_range[i], right_range[j])
        for i, j in _align(
            [left.tokens[index] for index in left_range],
            [right.tokens[index] for index in right_range],
        )
    ]
    if agreed:
        longest = max(map(len, _runs(agreed)))
        candidates = [pair for run in _runs(agreed) if len(run) == longest for pair in run]
        last, same = min(candidates, key=lambda pair: abs(_midpoint(left.tokens[pair[0]]) - middle))
        return last + 1, same + 1
    return _hand_over_by_time(left, right, middle)


def _hand_over_by_time(left: TextWindow, right: TextWindow, middle: int) -> tuple[int, int]:
    """Split at the middle of the overlap, or beside the word of the left window that is there."""
    heard_left = any(token.end > right.start_ms for token in left.tokens)
    heard_right = any(token.start < left.end_ms for token in right.tokens)
    if not (heard_left and heard_right):
        return len(left.tokens), 0

    count = sum(_midpoint(token) < middle for token in left.tokens)
    # Both windows may have a reading of the word in the middle; its two midpoints can lie on
    # different sides. Moving the split to the edge of one reading leaves out the other.
    split = middle
    if count > 0:
        split = max(split, left.tokens[count - 1].end)
    if count < len(left.tokens):
        split = min(split, left.tokens[count].start)
    return count, sum(_midpoint(token) < split for token in right.tokens)


def _align(left: Sequence[Token], right: Sequence[Token]) -> list[tuple[int, int]]:
    """Index pairs, increasing in both, of equal tokens, so that the gains add up to the most.

    A gain falls with the square of the distance in time. So one exact pair is worth more than two
    that are off by a third of the limit, and repeated words (no no no) do not slide by one to find
    a further partner.
    """
    gains = [[_gain(a, b) for b in right] for a in left]
    best = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            paired = best[i + 1][j + 1] + gains[i][j]
            best[i][j] = max(best[i + 1][j], best[i][j + 1], paired)

    pairs = []
    i = j = 0
    while i < len(left) and j < len(right):
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            pairs.append((i, j))
            i, j = i + 1, j + 1
    return pairs


def _gain(left: Token, right: Token) -> int:
    apart = abs(_midpoint(left) - _midpoint(right))
    if apart >= SAME_TOKEN_MS or _normalised(left.text) != _normalised(right.text):
        return 0
    return (SAME_TOKEN_MS - apart) ** 2


def _runs(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group pairs that follow each other directly on both sides."""
    runs: list[list[tuple[int, int]]] = []
    for pair in pairs:
        if runs and (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1) == pair:
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def _meeting(left: Token, right: Token) -> tuple[Token, Token]:
    """The two tokens with times that do not cross."""
    if left.end <= right.start:
        return left, right
    meet = min(max((left.end + right.start) // 2, left.start), max(right.end, left.start))
    return replace(left, end=meet), replace(right, start=meet, end=max(right.end, meet))


def _midpoint(token: Token) -> int:
    return (token.start + token.end) // 2


def _normalised(text: str) -> str:
    """Equal for what sounds the same: width, case and punctuation do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or folded
