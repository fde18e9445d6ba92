"""Times for the words of a language model, which writes text but does not say when it was spoken.

`align_words` takes them from another recogniser's timed tokens of the same audio: the two texts are
aligned by the fewest edits (Levenshtein, 1966; Wagner and Fischer, 1974), and where they agree the
time was measured. What they do not agree on is placed by interpolation between measured anchors,
never beyond them. `words_from_ctc` takes them from a forced alignment of the text itself, where
every label is measured.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from funasr_batch.records import Token, Word
from funasr_batch.text.nano_words import Wording, word_spans
from funasr_batch.text.timestamps import MAX_TOKEN_MS


class LabelSpan(NamedTuple):
    """When a label of a text was said."""

    first: int
    """Bytes [first, after) of the text's UTF-8 are the label's."""
    after: int
    start_ms: float
    """From the start of the recording, as are all times here."""
    end_ms: float


class _Char(NamedTuple):
    """A letter or digit, normalised; times in milliseconds."""

    char: str
    owner: int
    """Which word or token it is of."""
    start: float = 0.0
    end: float = 0.0


class _Span(NamedTuple):
    start: float
    end: float


def align_words(
    words: Sequence[Word], timed: Sequence[Token], start_ms: int, end_ms: int
) -> tuple[Token, ...]:
    """Give `words` the times of `timed`, another recogniser's tokens of the same segment.

    Case, width and punctuation do not count. A word with at least one character in common takes the
    time of what it has in common, and for the rest of its letters as much more as they need at the
    same pace. Words with none lie between their nearest neighbours that have some, in the time in
    which the other recogniser heard something else there, or else in the whole gap, shared by
    length of text: interpolation within measured anchors. `coverage` says how much is measured.
    Numbers written in digits by one and in words by the other have nothing in common.

    The result has a token for each word. Its times are monotone and in [start_ms, end_ms]; each
    token is at least 1 ms long if there is a millisecond for each.
    """
    chars = _word_chars(words)
    heard = list(_timed_chars(timed, start_ms, end_ms))
    matches = _matches(chars, heard)
    firsts: dict[int, int] = {}  # of each word that has one, its first match in the timed text
    lasts: dict[int, int] = {}
    for place, match in sorted(matches.items()):
        firsts.setdefault(chars[place].owner, match)
        lasts[chars[place].owner] = match

    def heard_between(before: int, after: int) -> _Span | None:
        others = heard[lasts.get(before, -1) + 1 : firsts.get(after, len(heard))]
        return _Span(others[0].start, others[-1].end) if others else None

    spans = _filled(
        words, _anchored(words, chars, heard, matches), _Span(start_ms, end_ms), heard_between
    )
    return _tokens(words, spans, start_ms, end_ms)


def coverage(words: Sequence[Word], timed: Sequence[Token]) -> float:
    """The share of the words' letters and digits that the timed text has too, 0 to 1.

    Below a half there is more interpolated than measured: better use the segment's own times.
    """
    chars = _word_chars(words)
    heard = list(_timed_chars(timed, 0, 0))
    return len(_matches(chars, heard)) / len(chars) if chars else 0.0


def words_from_ctc(
    said: Wording, labels: Sequence[LabelSpan], start_ms: int, end_ms: int
) -> tuple[Token, ...]:
    """Give the words of a text the times at which its CTC labels were said.

    `labels` are in order; those that hold no letter may be left out. A word lasts from its first
    letter to its last; letters of one label share its time. CTC marks a label by a peak, often of
    one frame, so a word's last label is taken to go on, until the next word but not longer than
    `MAX_TOKEN_MS`. A word without labels lies between its neighbours. Bounds are those of
    `align_words`.
    """
    spans: list[_Span | None] = []
    voiced = _voiced_bytes(said.text)
    time_of: dict[int, tuple[LabelSpan, _Span]] = {}
    for label in labels:
        letters = [place for place in range(label.first, label.after) if place in voiced]
        step = (label.end_ms - label.start_ms) / max(1, len(letters))
        for order, place in enumerate(letters):
            start = label.start_ms + order * step
            time_of[place] = (label, _Span(start, start + step))

    for first, after in _byte_spans(said.text):
        times = [time_of[place] for place in range(first, after) if place in time_of]
        if not times:
            spans.append(None)
            continue
        (_, opening), (label, closing) = times[0], times[-1]
        begun = max(opening.start, label.start_ms)
        spans.append(_Span(opening.start, max(closing.end, begun + MAX_TOKEN_MS)))

    starts = [span.start for span in spans if span is not None][1:]
    following = iter([*starts, float(end_ms)])
    cut = [span and _Span(span.start, min(span.end, next(following))) for span in spans]
    filled = _filled(said.words, cut, _Span(start_ms, end_ms), lambda before, after: None)
    return _tokens(said.words, filled, start_ms, end_ms)


def _normalised(text: str) -> str:
    """What can be compared: letters and digits, in one width and case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


# --- Alignment to another text


def _timed_chars(timed: Sequence[Token], start_ms: int, end_ms: int) -> Iterator[_Char]:
    """The characters of tokens; those of one token share its time."""
    for number, token in enumerate(timed):
        start = min(max(token.start, start_ms), end_ms)
        end = min(max(token.end, start), end_ms)
        text = _normalised(token.text)
        step = (end - start) / max(1, len(text))
        for place, char in enumerate(text):
            yield _Char(char, number, start + place * step, start + (place + 1) * step)


def _word_chars(words: Sequence[Word]) -> list[_Char]:
    return [_Char(c, number) for number, word in enumerate(words) for c in _normalised(word.text)]


def _matches(chars: Sequence[_Char], heard: Sequence[_Char]) -> dict[int, int]:
    """Which of the timed characters those of the words are, if the fewest edits are made.

    Of several ways, that with the most characters in common is taken, and of these that which pairs
    the beginnings of words with each other.
    """
    if not chars or not heard:
        return {}
    # So large that no number of the smaller costs outweighs one of the larger.
    replace = max(len(chars), len(heard)) + 1
    edit = replace * replace
    codes, begins = _codes(heard)
    own_codes, own_begins = _codes(chars)
    steps = edit * np.arange(len(heard) + 1)
    costs = np.empty((len(chars) + 1, len(heard) + 1), dtype=np.int64)
    costs[0] = steps
    for row, (code, begin) in enumerate(zip(own_codes, own_begins, strict=True)):
        pairing = np.where(codes == code, begins != begin, edit + replace)
        best = costs[row] + edit
        best[1:] = np.minimum(best[1:], costs[row, :-1] + pairing)
        # Insertions run along the row: the least over k <= j of best[k] + edit * (j - k).
        costs[row + 1] = np.minimum.accumulate(best - steps) + steps

    matches: dict[int, int] = {}
    i, j = len(chars), len(heard)
    while i and j:
        same = own_codes[i - 1] == codes[j - 1]
        pair = own_begins[i - 1] != begins[j - 1] if same else edit + replace
        if costs[i, j] == costs[i - 1, j - 1] + pair:
            i, j = i - 1, j - 1
            if same:
                matches[i] = j
        elif costs[i, j] == costs[i - 1, j] + edit:
            i -= 1
        else:
            j -= 1
    return matches


def _codes(chars: Sequence[_Char]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The code point of each character, and whether it is the first of its word."""
    owners = np.array([char.owner for char in chars])
    return (
        np.array([ord(char.char) for char in chars]),
        np.append(True, owners[1:] != owners[:-1]),
    )


def _anchored(
    words: Sequence[Word],
    chars: Sequence[_Char],
    heard: Sequence[_Char],
    matches: dict[int, int],
) -> list[_Span | None]:
    """The time of each word that has something in common with the other text."""
    spans: list[_Span | None] = [None] * len(words)
    for owner, group in groupby(range(len(chars)), key=lambda place: chars[place].owner):
        places = list(group)
        common = [place for place in places if place in matches]
        if not common:
            continue
        first, last = heard[matches[common[0]]], heard[matches[common[-1]]]
        pace = (last.end - first.start) / (common[-1] - common[0] + 1)
        spans[owner] = _Span(
            first.start - pace * (common[0] - places[0]),
            last.end + pace * (places[-1] - common[-1]),
        )
    return spans


# --- Labels of the text itself


def _voiced_bytes(text: str) -> set[int]:
    """The bytes of letters and digits."""
    offsets = _offsets(text)
    return {
        place
        for number, char in enumerate(text)
        if char.isalnum()
        for place in range(offsets[number], offsets[number + 1])
    }


def _byte_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand, in bytes of UTF-8."""
    offsets = _offsets(text)
    return [(offsets[start], offsets[end]) for start, end in word_spans(text)]


def _offsets(text: str) -> list[int]:
    """Where each character, and the end, stands in bytes of UTF-8."""
    return list(accumulate((len(char.encode()) for char in text), initial=0))


# --- Both


def _filled(
    words: Sequence[Word],
    spans: Sequence[_Span | None],
    segment: _Span,
    heard_between: Callable[[int, int], _Span | None],
) -> list[_Span]:
    """`spans` with those that are missing put between their neighbours.

    `heard_between(before, after)` narrows the time that lies between two words down.
    """
    filled: list[_Span] = []
    numbered = enumerate(zip(words, spans, strict=True))
    for missing, group in groupby(numbered, key=lambda item: item[1][1] is None):
        run = list(group)
        if not missing:
            filled += [span for _, (_, span) in run if span is not None]
            continue
        before, after = run[0][0] - 1, run[-1][0] + 1
        right = spans[after] if after < len(spans) else None
        low = filled[-1].end if filled else segment.start
        high = max(low, segment.end if right is None else right.start)
        narrower = heard_between(before, after)
        if narrower is not None:
            narrower = _Span(max(low, narrower.start), min(high, narrower.end))
            if narrower.end - narrower.start >= len(run):
                low, high = narrower
        sizes = [len(_normalised(word.text)) or 1 for _, (word, _) in run]
        bounds = [low + (high - low) * done / sum(sizes) for done in accumulate(sizes, initial=0)]
        filled += [_Span(start, end) for start, end in pairwise(bounds)]
    return filled


def _tokens(
    words: Sequence[Word], spans: Sequence[_Span], start_ms: int, end_ms: int
) -> tuple[Token, ...]:
    """Tokens in order, apart and within bounds, each leaving a millisecond to each after it."""
    tokens: list[Token] = []
    floor = start_ms
    for left, word, span in zip(reversed(range(len(words))), words, spans, strict=True):
        start = max(min(max(round(span.start), floor), end_ms - left - 1), floor)
        end = max(min(max(round(span.end), start + 1), end_ms - left), start)
        tokens.append(Token(word.text, start, end, word.confidence))
        floor = end
    return tuple(tokens)
