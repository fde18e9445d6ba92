"""LRC, which music players and language learners' players scroll: a time and a line of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

from funasr_batch.records import Cue
from funasr_batch.text.tokens import join_texts
from funasr_batch.writers.plain import ZERO_WIDTH_SPACE, clean_lines

_CLEARED_MS = 1000
"""A line of LRC stays until the next: in a longer pause, an empty one takes it away."""


def lrc(cues: Sequence[Cue], duration: float) -> str:
    """One line for each cue; `duration` of the recording in seconds."""
    shown = [(cue, text) for cue in cues if (text := _text(cue))]
    lines = [f"[length:{_clock(round(duration * 100))[:-3]}]", "[re:funasr-batch]"]
    for (cue, text), following in zip_longest(shown, shown[1:]):
        lines.append(f"[{_clock(_hundredths(cue.start))}]{text}")
        if following is None or following[0].start - cue.end >= _CLEARED_MS:
            lines.append(f"[{_clock(_hundredths(cue.end))}]")
    return "\n".join(lines) + "\n"


_TIME_LIKE = re.compile(r"[\[<](?=\s*\d)|^\[")


def _text(cue: Cue) -> str:
    """A line in which players cannot find another time (`[00:01]`, `<00:01>`) or a tag."""
    text = join_texts(clean_lines(cue))
    return _TIME_LIKE.sub(lambda bracket: bracket[0] + ZERO_WIDTH_SPACE, text)


def _hundredths(milliseconds: int) -> int:
    return (milliseconds + 5) // 10


def _clock(hundredths: int) -> str:
    """`mm:ss.xx`: LRC has no hours; minutes go on."""
    seconds, hundredths = divmod(hundredths, 100)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes:02d}:{seconds:02d}.{hundredths:02d}"
