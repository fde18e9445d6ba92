"""SRT and WebVTT."""

from __future__ import annotations

import re
from collections.abc import Iterable

from funasr_batch.records import Cue
from funasr_batch.writers.plain import ZERO_WIDTH_SPACE, clean_lines


def srt(cues: Iterable[Cue]) -> str:
    shown = ((cue, _srt_text(cue)) for cue in cues)
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n\n"
        for number, (cue, text) in enumerate(((cue, text) for cue, text in shown if text), start=1)
    )


def vtt(cues: Iterable[Cue]) -> str:
    shown = ((cue, _vtt_text(cue)) for cue in cues)
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n"
        for cue, text in shown
        if text
    )


_TAG_LIKE = re.compile(r"<(?=[/A-Za-z])|\{(?=\\)|-(?=->)|:\d\d(?=[.,]\d)")


def _srt_text(cue: Cue) -> str:
    """Lines that players cannot take for a time line, a tag (`<b>`, `{\\an8}`) or a cue's end.

    SRT has no escapes: a zero-width space inside what looks like a tag, an arrow or a time keeps it
    text.
    """
    text = "\n".join(clean_lines(cue))
    return _TAG_LIKE.sub(lambda begin: begin[0] + ZERO_WIDTH_SPACE, text)


def _vtt_text(cue: Cue) -> str:
    text = "\n".join(clean_lines(cue))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"
