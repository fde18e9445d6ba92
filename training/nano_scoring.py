"""Texts compared without marks and capitals; needs no package that may be missing on a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNIT = re.compile(r"[\u4e00-\u9fff]|[a-z']+|\d+")


def units_of(text: str) -> list[str]:
    """Chinese characters and English words in lower case, without marks."""
    return _UNIT.findall(text.lower())


def edits(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Units to replace, put in or leave out to get from one to the other (Levenshtein 1966)."""
    above = list(range(len(found) + 1))
    for row, unit in enumerate(wanted, 1):
        here = [row]
        for column, other in enumerate(found, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (unit != other)))
        above = here
    return above[-1]
