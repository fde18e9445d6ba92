"""From the tokens of Fun-ASR-Nano's language model to text, and to words with confidences.

The model writes text as a person would, with punctuation; its tokens are stretches of UTF-8 that
may begin and end within a character. So the text is put together byte by byte, each character
remembering how certain the model was of the tokens that it came from, cleaned, and cut into words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from funasr_batch.records import Word
from funasr_batch.text.tokens import is_cjk


@dataclass(frozen=True, slots=True)
class Wording:
    """What the model wrote of one segment.

    The texts of the words stand in `text` one after the other, with nothing but spaces between.
    """

    text: str
    words: tuple[Word, ...]


class _Char(NamedTuple):
    char: str
    confidence: float


def wording(pieces: Sequence[bytes], confidences: Sequence[float]) -> Wording:
    """The text and the words of generated tokens.

    `pieces` has the bytes of each token (`LlmTokenizer.token_bytes`; none for a special token),
    `confidences` its probability.
    """
    chars = _clean(_decode(pieces, confidences))
    text = "".join(char.char for char in chars)
    return Wording(
        text=text,
        words=tuple(
            Word(text[start:end], min(char.confidence for char in chars[start:end]))
            for start, end in word_spans(text)
        ),
    )


def clean_text(text: str) -> str:
    """Text as `wording` would have it, for text that is there already."""
    return "".join(char.char for char in _clean([_Char(char, 1.0) for char in text]))


def _decode(pieces: Sequence[bytes], confidences: Sequence[float]) -> list[_Char]:
    """Characters, each with the least confidence of its bytes; bytes that are none are dropped."""
    of_byte = [
        confidence for piece, confidence in zip(pieces, confidences, strict=True) for _ in piece
    ]
    chars: list[_Char] = []
    start = 0
    # Each byte that is not UTF-8 becomes one lone surrogate, so the bytes of all are known.
    for char in b"".join(pieces).decode("utf-8", "surrogateescape"):
        surrogate = "\ud800" <= char <= "\udfff"
        end = start + (1 if surrogate else len(char.encode("utf-8")))
        if not surrogate:
            chars.append(_Char(char, min(of_byte[start:end])))
        start = end
    return chars


# --- Cleaning

_SILENCE = re.compile(r"/sil(?![A-Za-z])")
"""FunASR puts a space in its place."""

_JUNK = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?[A-Za-z_][\w.:/-]{0,40}>"  # tags
    r"|(?P<run>>[^>\s]{1,8})(?P=run){3,}"  # runs such as >ab>ab>ab>ab
    r"|\[breath\]|\[noise\]|endofbreak"
    r"|(?<![0-9A-Za-z])FFFF(?![0-9A-Za-z])"
    r"|[|｜]"
    r"|(?<![\uff10-\uff5a])Ｏ(?![\uff10-\uff5a])"  # a full-width O that is not in `ＯＫ`
    r"|(?<![0-9A-Za-z])(?<![0-9A-Za-z] )[&＆]|[&＆](?! ?[0-9A-Za-z])"  # not in `R&D`, `Q & A`
)
"""What the model was seen to emit that nobody said (FunASR's `inference_vllm_pipeline.py`).

FunASR's own cleaner removes everything in brackets; this list takes only what is known for junk.
"""


def _clean(chars: Sequence[_Char]) -> list[_Char]:
    kept = [char for char in chars if char.char != "\ufffd" and not _is_control(char.char)]
    kept = _replaced(_SILENCE, " ", kept)
    kept = _replaced(_JUNK, "", kept)
    while kept and kept[0].char == ">":  # the rest of a run
        del kept[0]
    kept = _replaced(re.compile(r"\s+"), " ", kept)
    first = 1 if kept and kept[0].char == " " else 0
    last = len(kept) - 1 if len(kept) > first and kept[-1].char == " " else len(kept)
    return kept[first:last]


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and not char.isspace()


def _replaced(pattern: re.Pattern[str], by: str, chars: list[_Char]) -> list[_Char]:
    text = "".join(char.char for char in chars)
    result: list[_Char] = []
    done = 0
    for match in pattern.finditer(text):
        result += chars[done : match.start()]
        least = min(char.confidence for char in chars[match.start() : match.end()])
        result += [_Char(char, least) for char in by]
        done = match.end()
    return result + chars[done:]


# --- Words

# Characters by what they do where words are cut:
_SPACE = " "
_SINGLE = "c"  # of a script without spaces: a word of its own
_LETTER = "a"  # goes on with its neighbours: letters, digits
_COMBINING = "m"  # belongs to the character before
_OPENING = "o"  # belongs to what follows; within a Latin word it may be anything: `f(x)`
_WIDE_OPENING = "O"  # the same, but always ends the word before
_MARK = "p"  # belongs to what stands before; may be within a Latin word: `don't`, `3.5`
_WIDE_MARK = "f"  # the same, but always ends a word

_CORE = re.compile("cm*|am*(?:[amop]*a)?m*")
"""What makes a word; everything else is punctuation that joins one."""

_OPENING_CHARS = frozenset("([{‘")
_WIDE_OPENING_CHARS = frozenset("（［｛《〈「『【〔“")
_ENDING_CHARS = frozenset("”…—–")
"""Of no wide form, but never inside a word."""


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text stand: half-open ranges that cover all but spaces, in order.

    A mark belongs to the word before it, an opening bracket or quote, or what stands right before
    a word after a space, to the word after it. A text of marks alone is one word.
    """
    roles = _roles(text)
    cores = [match.span() for match in _CORE.finditer(roles)]
    cuts = [0] if text.strip() else []
    cuts += [start - _leading(roles[end:start]) for (_, end), (start, _) in pairwise(cores)]
    spans = []
    for cut, after in pairwise([*cuts, len(text)]):
        stretch = text[cut:after]
        start = cut + len(stretch) - len(stretch.lstrip())
        spans.append((start, start + len(stretch.strip())))
    return spans


def _leading(gap: str) -> int:
    """How many characters of the punctuation between two words belong to the second."""
    after_space = gap.rfind(_SPACE) + 1
    if after_space:
        return len(gap) - after_space
    return len(gap) - len(gap.rstrip(_OPENING + _WIDE_OPENING))


def _roles(text: str) -> str:
    roles: list[str] = []
    quotes = 0
    for place, char in enumerate(text):
        before, after = text[place - 1 : place], text[place + 1 : place + 2]
        if char == '"':
            roles.append(_straight_quote(before, after, opened=quotes % 2 == 1))
            quotes += 1
        else:
            roles.append(_role(char, before, after))
    return "".join(roles)


def _straight_quote(before: str, after: str, *, opened: bool) -> str:
    if not before.strip():
        return _OPENING
    if not after.strip():
        return _MARK
    return _MARK if opened else _OPENING


def _role(char: str, before: str, after: str) -> str:
    if char.isspace():
        return _SPACE
    if char in _WIDE_OPENING_CHARS:
        return _WIDE_OPENING
    if char in _OPENING_CHARS:
        return _OPENING
    if char in _ENDING_CHARS:
        return _WIDE_MARK
    category = unicodedata.category(char)
    if category[0] == "M" or char in "\u200c\u200d":
        return _COMBINING
    if char.isalnum():
        return _SINGLE if is_cjk(char) else _LETTER
    if is_cjk(char):
        return _WIDE_OPENING if category == "Sc" and after.isdigit() else _WIDE_MARK
    if (category == "Sc" and after.isdigit()) or (char == "'" and not before.strip()):
        return _OPENING
    return _MARK
