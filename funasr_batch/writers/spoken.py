"""The text of a segment in pieces that each have their own time and confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from funasr_batch.records import TextSegment, Token, Word


class Piece(NamedTuple):
    """A word or a Chinese character with the punctuation and white space that follow it."""

    text: str
    start: int | None
    """Milliseconds from the start of the recording; None where it was not measured."""
    end: int | None
    confidence: float | None


def pieces(segment: TextSegment) -> list[Piece]:
    """Pieces whose texts in a row are the segment's text.

    The text may have been punctuated and capitalised since its tokens were recognised. Where it is
    not theirs at all, it is one piece without time.
    """
    spoken: Sequence[Token | Word] = segment.tokens or segment.words
    cuts = _cuts(segment.text, spoken)
    if cuts is None:
        return [Piece(segment.text, None, None, None)] if segment.text else []
    return list(_slices(segment.text, cuts, spoken))


def _cuts(text: str, spoken: Sequence[Token | Word]) -> list[int] | None:
    """Where each token begins in the text, and the text's length; None when they do not fit."""
    if not spoken:
        return None
    lowered = text.lower()
    fold = str.lower if len(lowered) == len(text) else str
    haystack = fold(text)
    cuts = []
    position = 0
    for token in spoken:
        needle = fold(token.text)
        found = haystack.find(needle, position) if needle else -1
        if found < 0 or any(map(str.isalnum, text[position:found])):
            return None
        cuts.append(found)
        position = found + len(needle)
    if any(map(str.isalnum, text[position:])):
        return None
    return [0, *cuts[1:], len(text)]


def _slices(text: str, cuts: Sequence[int], spoken: Sequence[Token | Word]) -> Iterator[Piece]:
    for token, (begin, end) in zip(spoken, pairwise(cuts), strict=True):
        match token:
            case Token():
                yield Piece(text[begin:end], token.start, token.end, token.confidence)
            case Word():
                yield Piece(text[begin:end], None, None, token.confidence)
