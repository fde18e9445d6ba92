"""Which language a transcript is in, told by its script."""

from __future__ import annotations

import re

from funasr_batch.text.tokens import is_cjk

UNKNOWN = "und"
"""BCP 47's tag for a language that is not known."""

_KANA = re.compile("[\u3041-\u309f\u30a1-\u30ff\uff66-\uff9f]")
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")
_LATIN_WORD = re.compile(r"[A-Za-z][A-Za-z'’]*")
_OTHER_WORD = re.compile(r"[^\W\d_A-Za-z\u00c0-\u024f\u1100-\u11ff\u2e80-\ud7af\uf900-\uffef]+")
_LEAST_KANA = 0.1
"""Share of kana in Japanese text. Chinese has none, but now and then a single の."""


def language_of(text: str) -> str:
    """`zh`, `ja`, `ko` or `en`, whichever has most words (a character of Chinese or Japanese, a
    syllable of Korean, counts as one); `und` for none, and where most is in another script.

    Languages that share the Latin script are not told apart: it counts as English.
    """
    kana = len(_KANA.findall(text))
    chinese = sum(is_cjk(char) and char.isalpha() for char in text)
    counts = {
        "ja" if kana > max(1, _LEAST_KANA * chinese) else "zh": chinese,
        "ko": len(_HANGUL.findall(text)),
        "en": len(_LATIN_WORD.findall(text)),
        UNKNOWN: len(_OTHER_WORD.findall(text)),
    }
    language, most = max(counts.items(), key=lambda item: item[1])
    return language if most else UNKNOWN
