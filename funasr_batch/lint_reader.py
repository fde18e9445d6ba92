"""SRT and WebVTT files as they are, faults and all, for the linter.

The parser is our own: a library repairs or drops what is wrong with a file, and the linter has to
see it, with the number of its line. It is tolerant: whatever looks like a cue is one.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

SubtitleFormat: TypeAlias = Literal["srt", "vtt"]

Rule: TypeAlias = Literal[
    "encoding",
    "bom",
    "header",
    "stray",
    "number",
    "time",
    "order",
    "empty",
    "width",
    "lines",
    "speed",
    "short",
    "long",
    "overlap",
    "gap",
    "chain",
]


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a file does not keep."""

    rule: Rule
    line: int
    """In the file, from 1."""
    cue: int | None
    """The how-manieth cue, from 1; None for the file as a whole."""
    message: str
    """What was found and, after `;`, what it should be."""


@dataclass(frozen=True, slots=True)
class ReadCue:
    """A cue as it stands in a file."""

    line: int
    """Of its times, from 1."""
    number: str | None
    """What stands on the line before, without white space; None if nothing does."""
    start: int | None
    """Milliseconds; None when the times cannot be read."""
    end: int | None
    lines: tuple[str, ...]
    """What is seen: without tags, escapes and characters of no width; none of them is blank."""


@dataclass(frozen=True, slots=True)
class SubtitleFile:
    format: SubtitleFormat
    cues: tuple[ReadCue, ...]
    violations: tuple[Violation, ...]
    """Of the file's form; rules about what cues say and how long are in `lint.py`."""


def read_subtitles(content: bytes, format: SubtitleFormat) -> SubtitleFile:
    """All cues of a file, however it is damaged; never raises."""
    text, violations = _decode(content)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if format == "vtt" and not re.match(r"WEBVTT(?:[ \t]|$)", lines[0]):
        violations.append(Violation("header", 1, None, "no WEBVTT on the first line"))
    places = _places(lines, format)
    violations += _before_first(lines[: places[0].begin if places else len(lines)], format)
    cues = []
    for count, place in enumerate(places, start=1):
        after = places[count].begin if count < len(places) else len(lines)
        start, end, fault = _times(lines[place.times], format)
        if fault:
            violations.append(Violation("time", place.times + 1, count, fault))
        body = lines[place.times + 1 : after]
        spoken, stray = _body(body, format)
        if stray is not None:
            message = "text after an empty line; players may drop it or show it elsewhere"
            violations.append(Violation("stray", place.times + 2 + stray, count, message))
        cues.append(ReadCue(place.times + 1, place.number, start, end, spoken))
    return SubtitleFile(format, tuple(cues), tuple(violations))


# --- Characters


def _decode(content: bytes) -> tuple[str, list[Violation]]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        fault = Violation("encoding", 1, None, "UTF-16; it should be UTF-8")
        return content.decode("utf-16", "replace"), [fault]
    faults = []
    if content.startswith(b"\xef\xbb\xbf"):
        faults.append(Violation("bom", 1, None, "begins with a byte order mark"))
        content = content[3:]
    try:
        return content.decode(), faults
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    for encoding in ("gb18030", "cp1252", "latin-1"):  # latin-1 takes all bytes
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        message = f"not UTF-8, read as {encoding}; it should be UTF-8"
        return text, [*faults, Violation("encoding", line, None, message)]
    raise AssertionError


_TAG: Final = {
    "srt": re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^{}]*\}"),
    "vtt": re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>"),
}


def _seen(line: str, format: SubtitleFormat) -> str:
    text = _TAG[format].sub("", line)
    if format == "vtt":
        text = html.unescape(text)
    if not text.isascii():
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return " ".join(text.split())


# --- Cues


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a cue is: indices of lines."""

    begin: int
    """Its number or identifier, or else its times."""
    times: int
    number: str | None


_ARROW: Final = re.compile(r"\s*[\d:.,;]*\d\s*-->\s*[\d:.,;]*\d(?:\s.*)?")


def _places(lines: Sequence[str], format: SubtitleFormat) -> list[_Place]:
    places: list[_Place] = []
    for at, line in enumerate(lines):
        if "-->" not in line:
            continue
        above = lines[at - 1].strip() if at else ""
        apart = at < 2 or not lines[at - 2].strip()
        after_cue = bool(places) and places[-1].times == at - 1
        named = bool(above) and not after_cue and (apart if format == "vtt" else above.isdecimal())
        if at == 1 and format == "vtt":
            named = False  # what stands above is the header
        if _ARROW.fullmatch(line) or (named and apart and above.isdecimal()):
            places.append(_Place(at - 1, at, above) if named else _Place(at, at, None))
    return places


_BLOCKS: Final = ("NOTE", "STYLE", "REGION")


def _before_first(lines: Sequence[str], format: SubtitleFormat) -> Iterator[Violation]:
    """Text before the first cue: a header in WebVTT, nothing that belongs there in SRT."""
    if format == "srt":
        for at, line in enumerate(lines, start=1):
            if line.strip():
                yield Violation("stray", at, None, "text that is not part of a cue")
                return


def _body(lines: Sequence[str], format: SubtitleFormat) -> tuple[tuple[str, ...], int | None]:
    """A cue's lines, and the index of the first one that stands after an empty line."""
    seen: list[str] = []
    stray: int | None = None
    after_empty = skipping = False
    for at, line in enumerate(lines):
        if not line.strip():
            after_empty, skipping = True, False
            continue
        if after_empty and format == "vtt" and line.split()[0] in _BLOCKS:
            skipping = True
        if skipping:
            continue
        if after_empty and stray is None:
            stray = at
        if text := _seen(line, format):
            seen.append(text)
    return tuple(seen), stray


# --- Times

_CLOCK: Final = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2})[.,;](\d{1,3})")
_AS_IT_SHOULD_BE: Final = {
    "srt": re.compile(r"\d{2,}:[0-5]\d:[0-5]\d,\d{3} --> \d{2,}:[0-5]\d:[0-5]\d,\d{3}"),
    "vtt": re.compile(
        r"(?:\d{2,}:)?[0-5]\d:[0-5]\d\.\d{3}[ \t]+-->[ \t]+(?:\d{2,}:)?[0-5]\d:[0-5]\d\.\d{3}"
        r"(?:[ \t].*)?"
    ),
}


def _times(line: str, format: SubtitleFormat) -> tuple[int | None, int | None, str | None]:
    """In-time and out-time in milliseconds, and what is wrong with how they are written."""
    left, _, right = line.partition("-->")
    start, end = _milliseconds(left.strip()), _milliseconds((right.split() or [""])[0])
    if start is None or end is None:
        return None, None, "the times cannot be read"
    if not _AS_IT_SHOULD_BE[format].fullmatch(line.rstrip()):
        form = "HH:MM:SS,mmm" if format == "srt" else "HH:MM:SS.mmm"
        return start, end, f"not written as {form} --> {form}"
    return start, end, None


def _milliseconds(clock: str) -> int | None:
    parts = _CLOCK.fullmatch(clock)
    if parts is None:
        return None
    hours, minutes, seconds, fraction = parts.groups()
    return ((int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(
        fraction.ljust(3, "0")
    )
