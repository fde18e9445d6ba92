"""TSV and TXT, and what all formats share: lines without surprises, and their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from funasr_batch.records import Cue, TextSegment

ZERO_WIDTH_SPACE = "\u200b"
"""Put after a character that would begin markup, in formats that cannot escape it."""


def tsv(segments: Iterable[TextSegment]) -> str:
    """Integer milliseconds, as openai-whisper writes them."""
    rows = ((segment, one_line(segment.text)) for segment in segments)
    return "start\tend\ttext\n" + "".join(
        f"{segment.start}\t{segment.end}\t{text}\n" for segment, text in rows if text
    )


def txt(segments: Iterable[TextSegment]) -> str:
    lines = (one_line(segment.text) for segment in segments)
    return "".join(f"{line}\n" for line in lines if line)


_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")


def one_line(text: str) -> str:
    """Text without control characters or line breaks of any kind, and with single spaces."""
    return " ".join(without_controls(text).split())


def without_controls(text: str) -> str:
    """Text without control characters; white space stays."""
    return _CONTROLS.sub("", text)


def clean_lines(cue: Cue) -> list[str]:
    """The lines of a cue that have something to show."""
    return [line for line in map(one_line, cue.lines) if line]


_SURROGATES = re.compile("[\ud800-\udfff]")


def encode(text: str) -> bytes:
    """UTF-8. Bytes of a file name that are not text (lone surrogates in Python) become U+FFFD."""
    return _SURROGATES.sub("\ufffd", text).encode()
