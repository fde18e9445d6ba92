"""From the pieces of a Paraformer vocabulary to words and characters with times, and to text.

The vocabulary holds Chinese characters and pieces of lower-case English words; `@@` at the end of a
piece says that the word goes on. FunASR's `sentence_postprocess` is the model for what becomes a
word. Where it loses something we do not: a word cut short by a Chinese character or by the end of
the segment stays where it was said, every word keeps its time, and a dropped `<unk>` takes its
time with it instead of shifting the times of the words after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from funasr_batch.records import Token, Word

CONTINUES = "@@"

_SPECIAL = frozenset({"<blank>", "<s>", "</s>", "<unk>", "<OOV>", "<pad>"})

_CLITICS = frozenset({"'s", "'re", "'ve", "'ll", "'d", "'m", "'t", "n't"})
"""English endings that the vocabulary holds as words of their own."""

_CJK = re.compile(
    "["
    "\u2e80-\u2fdf"  # radicals
    "\u3000-\u30ff"  # punctuation, hiragana, katakana
    "\u3100-\u312f\u31a0-\u31ff"  # bopomofo, strokes
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\uff00-\uff9f\uffe0-\uffe6"  # full- and half-width forms
    "]"
)
_FULL_WIDTH_PUNCTUATION = re.compile(
    "[\u3000-\u3003\u3008-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff65]"
)
_ATTACHED = frozenset(".,!?;:%)…")
"""Marks that follow the word before them without a space."""


def is_cjk(char: str) -> bool:
    """Whether a character is of a script written without spaces: Chinese or Japanese."""
    return _CJK.match(char) is not None


def detokenise(
    pieces: Sequence[str],
    spans_ms: Sequence[tuple[int, int]],
    confidences: Sequence[float],
    offset_ms: int,
) -> tuple[Token, ...]:
    """Join pieces into tokens: one for each word, number part or Chinese character.

    The three sequences have one entry per piece; `spans_ms` counts from the start of the segment,
    which `offset_ms` places in the recording. A joined token lasts from its first piece to its
    last. Its confidence is that of its least certain piece: a word with a wrong piece is wrong.
    """
    heard = [
        Token(piece, offset_ms + start, offset_ms + end, confidence)
        for piece, (start, end), confidence in zip(pieces, spans_ms, confidences, strict=True)
        if piece not in _SPECIAL
    ]
    return tuple(_spell_abbreviations(_attach_clitics(_join_pieces(heard))))


def render_text(tokens: Iterable[Token | Word]) -> str:
    """The text of tokens as a person would type it.

    One space between words of an alphabet, none between Chinese characters, digits and their
    punctuation, and one between an alphabet's word and Chinese (`我用 python 写 3 行`
    comes out as `我用 python 写3行`): the same rule that FunASR and `join_texts` keep where two
    texts meet, and typographic custom. Evaluation should ignore spaces next to Chinese.
    """
    text: list[str] = []
    before = ""
    for token in tokens:
        if before and _spaced(before, token.text):
            text.append(" ")
        text.append(token.text)
        before = token.text
    return "".join(text)


def join_texts(texts: Iterable[str]) -> str:
    """Texts in a row, with a space between two of them unless both neighbours are Chinese."""
    joined = ""
    parts: list[str] = []
    for text in texts:
        text = text.strip()
        if not text:
            continue
        if joined and not (is_cjk(joined[-1]) and is_cjk(text[0])):
            parts.append(" ")
        parts.append(text)
        joined = text
    return "".join(parts)


def _merge(first: Token, second: Token, text: str) -> Token:
    return Token(text, first.start, second.end, min(first.confidence, second.confidence))


def _join_pieces(pieces: Iterable[Token]) -> list[Token]:
    words: list[Token] = []
    word_goes_on = False
    for piece in pieces:
        goes_on = piece.text.endswith(CONTINUES)
        text = piece.text.removesuffix(CONTINUES)
        if not text:
            continue
        if word_goes_on and not is_cjk(text[0]):
            words[-1] = _merge(words[-1], piece, words[-1].text + text)
        else:
            words.append(Token(text, piece.start, piece.end, piece.confidence))
        word_goes_on = goes_on
    return words


def _attach_clitics(words: Iterable[Token]) -> list[Token]:
    """`it` `'s` -> `it's`."""
    attached: list[Token] = []
    for word in words:
        if attached and word.text in _CLITICS and _is_word(attached[-1].text):
            attached[-1] = _merge(attached[-1], word, attached[-1].text + word.text)
        else:
            attached.append(word)
    return attached


def _spell_abbreviations(words: Iterable[Token]) -> list[Token]:
    """`a` `p` `p` -> `APP`; a single letter alone stays as it is (FunASR's abbr_dispose)."""
    spelt: list[Token] = []
    run_of_letters = False
    for word in words:
        is_letter = len(word.text) == 1 and word.text.isascii() and word.text.isalpha()
        if is_letter and run_of_letters:
            spelt[-1] = _merge(spelt[-1], word, (spelt[-1].text + word.text).upper())
        else:
            spelt.append(word)
        run_of_letters = is_letter
    return spelt


def _is_word(text: str) -> bool:
    """Whether a token is set off by spaces: it has something besides Chinese, digits and marks."""
    return any(not (is_cjk(char) or char.isdigit() or char in _ATTACHED) for char in text)


def _spaced(left: str, right: str) -> bool:
    if right[0] in _ATTACHED:
        return False
    if _FULL_WIDTH_PUNCTUATION.match(left[-1]) or _FULL_WIDTH_PUNCTUATION.match(right[0]):
        return False
    return _is_word(left) or _is_word(right)
