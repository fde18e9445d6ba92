"""Which language a transcript is in, told by its script."""

from __future__ import annotations

from funasr_batch.text.tokens import is_cjk

UNKNOWN = "und"
"""BCP 47's tag for a language that is not known."""


def language_of(text: str) -> str:
    """`zh` or `en`, whichever has more words (a Chinese character counts as one); `und` for none.

    Only the languages of Paraformer's vocabulary are told apart.
    """
    chinese = sum(is_cjk(char) and char.isalpha() for char in text)
    latin = sum(any(char.isascii() and char.isalpha() for char in word) for word in text.split())
    if chinese == latin == 0:
        return UNKNOWN
    return "zh" if chinese >= latin else "en"
