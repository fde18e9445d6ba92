"""Joins the texts of overlapping windows so that what both heard is there once.

Two windows read the overlap independently, each worst near its own edge, where it lacks context
and may hold half a word. Their tokens are aligned there by text and time (a global alignment in
the manner of Needleman and Wunsch, 1970, without a price for gaps), and the text passes from the
left window to the right one within the longest run on which they agree, as near to the middle of
the overlap as that allows. Where they agree on nothing it passes at the middle.

Words without times are aligned by their text alone: the longest run of words that the end of the
left window shares with the beginning of the right one.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeGuard

from funasr_batch.records import TextSegment, Token, Word
from funasr_batch.text.tokens import render_text

SAME_TOKEN_MS = 300
"""Readings of one token are closer than this: CIF peaks move by one or two frames of 60 ms with
the context, and the same character is seldom said again so soon."""

UNRELIABLE_EDGE_MS = 300
"""Tokens that reach this close to the edge of their window prove nothing: about half a word."""

PACE_SLACK, SPARE_WORDS = 2.0, 3
"""How many more words an overlap may hold than by its share of the window: speech has pauses, and
may be twice as dense in the overlap as on average."""

LEAST_AGREED_WORDS = 2
"""Words in a row on which texts without times must agree: a single one, such as 的 or `the`, is
often elsewhere in both by chance."""


@dataclass(frozen=True, slots=True)
class TextWindow:
    """What was recognised in one window. Times are milliseconds from the recording's start."""

    start_ms: int
    end_ms: int
    tokens: tuple[Token, ...] | tuple[Word, ...]
    """In time order; words where their times were not measured."""


def join_segments(segments: Sequence[TextSegment]) -> list[TextSegment]:
    """Cuts the texts of overlapping windows to what `join_windows` lets each of them keep.

    `segments` are all windows of one recording in time order, those without text among them.
    """
    windows = [
        TextWindow(segment.start, segment.end, segment.tokens or segment.words)
        for segment in segments
    ]
    stretches = _stretches(windows)
    joined = []
    for segment, window, stretch, kept in zip(
        segments, windows, stretches, _kept(windows, stretches), strict=True
    ):
        tokens = tuple(token for token in kept if isinstance(token, Token))
        words = tuple(word for word in kept if isinstance(word, Word))
        text = _cut_text(segment.text, window.tokens, stretch)
        joined.append(replace(segment, text=text, tokens=tokens, words=words))
    return joined


def join_windows(windows: Sequence[TextWindow]) -> list[tuple[Token, ...] | tuple[Word, ...]]:
    """Give each token of an overlap to one of the two windows.

    `windows` are those of one recording, in time order, no moment being in three of them. The
    result has for each window the tokens that it keeps, a stretch of its own; one after the other
    they are the recording's tokens. Where the times of neighbours kept from two windows cross,
    they are made to meet; texts and confidences are never changed.
    """
    return _kept(windows, _stretches(windows))


def _kept(
    windows: Sequence[TextWindow], stretches: Sequence[range]
) -> list[tuple[Token, ...] | tuple[Word, ...]]:
    kept = [
        window.tokens[stretch.start : stretch.stop]
        for window, stretch in zip(windows, stretches, strict=True)
    ]
    heard = [index for index, tokens in enumerate(kept) if tokens]
    for before, after in pairwise(heard):
        left, right = kept[before], kept[after]
        if _are_timed(left) and _are_timed(right):
            last, first = _meeting(left[-1], right[0])
            kept[before], kept[after] = (*left[:-1], last), (first, *right[1:])
    return kept


def _stretches(windows: Sequence[TextWindow]) -> list[range]:
    """Which of its tokens each window keeps."""
    firsts = [0] * len(windows)
    ends = [len(window.tokens) for window in windows]
    for index, (left, right) in enumerate(pairwise(windows)):
        if left.end_ms > right.start_ms:
            ends[index], firsts[index + 1] = _hand_over(left, right)
    return [range(first, max(first, end)) for first, end in zip(firsts, ends, strict=True)]


def _hand_over(left: TextWindow, right: TextWindow) -> tuple[int, int]:
    """How many tokens the left window keeps, and the first that the right one keeps."""
    if not (left.tokens and right.tokens):
        return len(left.tokens), 0
    if _are_timed(left.tokens) and _are_timed(right.tokens):
        overlap = right.start_ms, left.end_ms
        return _hand_over_timed(left.tokens, right.tokens, *overlap)
    return _hand_over_by_words(left, right)


def _are_timed(tokens: tuple[Token, ...] | tuple[Word, ...]) -> TypeGuard[tuple[Token, ...]]:
    return all(isinstance(token, Token) for token in tokens)


# --- Texts with times


def _hand_over_timed(
    left: Sequence[Token], right: Sequence[Token], start_ms: int, end_ms: int
) -> tuple[int, int]:
    """`_hand_over` where the overlap is [start_ms, end_ms)."""
    middle = (start_ms + end_ms) // 2
    edge = min(UNRELIABLE_EDGE_MS, (end_ms - start_ms) // 4)

    # Only what one window may share with the other, and only where it can be believed.
    left_range = [
        index
        for index, token in enumerate(left)
        if token.end > start_ms - SAME_TOKEN_MS and token.end <= end_ms - edge
    ]
    right_range = [
        index
        for index, token in enumerate(right)
        if token.start < end_ms + SAME_TOKEN_MS and token.start >= start_ms + edge
    ]
    agreed = [
        (left_range[i], right_range[j])
        for i, j in _align(
            [left[index] for index in left_range],
            [right[index] for index in right_range],
        )
    ]
    if agreed:
        longest = max(map(len, _runs(agreed)))
        candidates = [pair for run in _runs(agreed) if len(run) == longest for pair in run]
        last, same = min(candidates, key=lambda pair: abs(_midpoint(left[pair[0]]) - middle))
        return last + 1, same + 1
    heard_left = any(token.end > start_ms for token in left)
    heard_right = any(token.start < end_ms for token in right)
    if not (heard_left and heard_right):
        return len(left), 0
    return _hand_over_by_time(left, right, middle)


def _hand_over_by_time(
    left: Sequence[Token], right: Sequence[Token], middle: int
) -> tuple[int, int]:
    """Split at the middle of the overlap, or beside the word of the left window that is there."""
    count = sum(_midpoint(token) < middle for token in left)
    # Both windows may have a reading of the word in the middle; its two midpoints can lie on
    # different sides. Moving the split to the edge of one reading leaves out the other.
    split = middle
    if count > 0:
        split = max(split, left[count - 1].end)
    if count < len(left):
        split = min(split, left[count].start)
    return count, sum(_midpoint(token) < split for token in right)


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


# --- Texts without times


def _hand_over_by_words(left: TextWindow, right: TextWindow) -> tuple[int, int]:
    """Within the longest run of words that both have; without one, by their share of the time."""
    left_share, right_share = _shared_words(left, right)
    left_words = [_normalised(word.text) for word in left.tokens]
    right_words = [_normalised(word.text) for word in right.tokens]
    first = max(0, len(left_words) - _reach(left_share))
    after = min(len(right_words), _reach(right_share))

    def strangeness(run: tuple[int, int, int]) -> float:
        """How much earlier or later in one window than in the other the run lies, in words."""
        left_at, right_at, length = run
        before_end = len(left_words) - left_at - length / 2
        return abs(before_end + right_at + length / 2 - (left_share + right_share) / 2)

    runs = _common_runs(left_words[first:], right_words[:after])
    longest = max((length for _, _, length in runs), default=0)
    if longest >= LEAST_AGREED_WORDS:
        candidates = [(first + i, j, length) for i, j, length in runs if length == longest]
        left_at, right_at, length = min(candidates, key=strangeness)
        half = (length + 1) // 2
        return left_at + half, right_at + half
    return len(left_words) - round(left_share / 2), round(right_share / 2)


def _shared_words(left: TextWindow, right: TextWindow) -> tuple[float, float]:
    """About how many words of each window lie in the overlap."""
    overlap = left.end_ms - right.start_ms
    shares = []
    for window in (left, right):
        if _are_timed(window.tokens):
            shared = [t for t in window.tokens if right.start_ms < t.end and t.start < left.end_ms]
            shares.append(float(len(shared)))
        else:
            shares.append(len(window.tokens) * overlap / (window.end_ms - window.start_ms))
    return shares[0], shares[1]


def _reach(share: float) -> int:
    return math.ceil(PACE_SLACK * share) + SPARE_WORDS


def _common_runs(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where both have the same words: first of the left, first of the right, and how many."""
    runs = []
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            if word != other or (i and j and left[i - 1] == right[j - 1]):
                continue
            length = 1
            while left[i + length : i + length + 1] == right[j + length : j + length + 1] != []:
                length += 1
            runs.append((i, j, length))
    return runs


def _cut_text(text: str, words: Sequence[Token | Word], kept: range) -> str:
    """What a text has of the words that are kept: its own spelling and spaces between them."""
    if len(kept) == len(words):
        return text
    if not kept:
        return ""
    spans = []
    place = 0
    for word in words:
        start = text.find(word.text, place)
        if start < 0:  # the text was written in another way than its words
            return render_text(words[kept.start : kept.stop])
        place = start + len(word.text)
        spans.append((start, place))
    return text[spans[kept[0]][0] : spans[kept[-1]][1]]


def _normalised(text: str) -> str:
    """Equal for what sounds the same: width, case and punctuation do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or folded
