"""Whether a language model's text can have been said at all.

On audio that it does not understand a language model may fall into repeating itself until it runs
out of tokens, or may write a text that no one could speak in the time. People repeat themselves
too (哈哈哈, 对对对, no no no), so the bounds are above what people do. What is only suspicious is
for the caller to decode again, not to throw away.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from funasr_batch.text.nano_words import word_spans
from funasr_batch.text.tokens import is_cjk

_LEAST_COUNTS = ((1, 10), (2, 8), (3, 6), (5, 5), (9, 4), (60, 3))
"""Up to how many words or Chinese characters in the repeated unit, how many times in a row are a
loop.

Laughter and agreement repeat one or two characters (哈哈哈哈哈哈, 谢谢谢谢, `no no no no`); slogans
and refrains three to five, up to four times. A whole sentence is said twice, seldom three times in
one breath. A segment of 30 s holds no unit of more than 60 three times.
"""
_LEAST_NUMERALS = 41
"""Numerals in a row before they can be a loop: the longest numbers that are read out, bank account
numbers, have 34 places, and those repeat in any way (一二三四一二三四, 1234 1234 1234)."""
_LEAST_MARKS = 12
"""Equal punctuation marks in a row that are a loop; two ellipses have six dots each."""
_LONGEST_WORD = 30
"""Letters; a longer one is taken letter by letter (`studstudstud…`, or a script without spaces)."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Something that is said over and over."""

    start: int
    """Where in the text it begins."""
    unit: str
    """The text of the first round, with what separates it from the second."""
    count: int
    """Complete rounds."""
    cut: int
    """Where in the text the second round ends: what follows says nothing new."""


def find_loop(text: str) -> Loop | None:
    """The first loop of a text, None where there is none.

    Case, width, spaces and punctuation do not count, a word in an alphabet counts like a Chinese
    character, and the last round need not be complete. Of loops that begin at one place it is that
    of the shortest unit.
    """
    symbols = list(_symbols(text))
    names = [symbol for symbol, _, _ in symbols]
    found: tuple[int, int, int] | None = None
    longest = min(_LEAST_COUNTS[-1][0], len(names) // _LEAST_COUNTS[-1][1])
    for period in range(1, longest + 1):
        for start, length in _periodic_runs(names, period):
            if found is not None and start >= found[0]:
                break
            if _is_loop(names[start : start + period], length):
                found = start, period, length // period
                break
    if found is None:
        return _marks_loop(text)
    start, period, count = found
    begin, second = symbols[start][1], symbols[start + period][1]
    return Loop(begin, text[begin:second], count, symbols[start + 2 * period - 1][2])


def _symbols(text: str) -> Iterator[tuple[str, int, int]]:
    """Each word or Chinese character, normalised, with its place in the text."""
    for start, end in word_spans(text):
        word = unicodedata.normalize("NFKC", text[start:end]).casefold()
        letters = "".join(filter(str.isalnum, word))
        if len(letters) > _LONGEST_WORD:
            for place in range(start, end):
                if text[place].isalnum():
                    yield text[place].casefold(), place, place + 1
        elif letters:
            yield letters, start, end


def _periodic_runs(names: Sequence[str], period: int) -> Iterator[tuple[int, int]]:
    """Start and length of the stretches that repeat with a period, at least twice."""
    equal = 0
    for place in range(period, len(names) + 1):
        if place < len(names) and names[place] == names[place - period]:
            equal += 1
            continue
        if equal >= period:
            yield place - equal - period, equal + period
        equal = 0


def _is_loop(unit: Sequence[str], length: int) -> bool:
    least = next(count for size, count in _LEAST_COUNTS if len(unit) <= size)
    if length // len(unit) < least:
        return False
    return length >= _LEAST_NUMERALS or not all(map(str.isnumeric, unit))


def _marks_loop(text: str) -> Loop | None:
    found = re.search(rf"([^\w\s])(?:\s*\1){{{_LEAST_MARKS - 1},}}", text)
    if found is None:
        return None
    mark = found[1]
    second = text.index(mark, found.start() + 1)
    return Loop(found.start(), text[found.start() : second], found[0].count(mark), second + 1)


# --- Too much for the time

_CHARACTERS_PER_SECOND = 12.0
"""Chinese, kana, hangul: one syllable or more each. News is read at 4 to 6 syllables a second; the
fastest rap and disclaimers reach about 10."""
_LETTERS_PER_SECOND = 40.0
"""Everything else, digits too: 400 words of five letters a minute, an auctioneer's, make 33.
Conversation has about 13."""
_GRACE_SECONDS = 0.5
"""A VAD may cut off the beginning and the end of a word."""


def says_too_much(text: str, seconds: float) -> bool:
    """Whether the text is longer than what can be said in the time."""
    syllables = letters = 0
    for char in text:
        if not char.isalnum():
            continue
        if is_cjk(char) or "\uac00" <= char <= "\ud7a3":
            syllables += 1
        else:
            letters += 1
    needed = syllables / _CHARACTERS_PER_SECOND + letters / _LETTERS_PER_SECOND
    return needed > seconds + _GRACE_SECONDS
