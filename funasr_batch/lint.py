"""Which norms of subtitling a file does not keep: width, lines, speed, durations, gaps, numbers.

The norms are those by which our own cues are laid out (`funasr_batch.text.cues`). A cue for which
the speech left no room is a violation too: the linter says what a viewer gets, not whose fault it
is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, TypeAlias, get_args

from funasr_batch.lint_reader import ReadCue, Rule, SubtitleFile, Violation
from funasr_batch.text.cues import CueStyle

RULES: Final[tuple[Rule, ...]] = get_args(Rule)
"""In the order of the report."""

MEANINGS: Final[dict[Rule, str]] = {
    "encoding": "the file is not UTF-8",
    "bom": "the file begins with a byte order mark",
    "header": "a WebVTT file does not begin with WEBVTT",
    "stray": "text outside of a cue or after an empty line in it",
    "number": "the numbers of SRT cues do not count 1, 2, 3",
    "time": "times that cannot be read, are written otherwise, or end before they begin",
    "order": "a cue begins before the one in front of it",
    "empty": "a cue without text",
    "width": "a line that is too wide",
    "lines": "too many lines",
    "speed": "too many characters a second",
    "short": "shown too briefly",
    "long": "shown too long",
    "overlap": "shown until after the next one begins",
    "gap": "too small a gap before the next one",
    "chain": "a gap that should be closed: too long for a cut, too short for a pause",
}

StyleOf: TypeAlias = Callable[[str], CueStyle]
"""The style that holds for a cue of this text."""

_ROUNDING_MS: Final = 1
"""Times in files are rounded, so that a difference of two may be this much off."""


def check(file: SubtitleFile, style_of: StyleOf) -> list[Violation]:
    """All violations, in the order of the file's lines.

    Widths are in the style's unit. The gap to the next cue is judged by the style of the earlier.
    """
    styles = [style_of(" ".join(cue.lines)) for cue in file.cues]
    found = [
        *file.violations,
        *(_numbers(file.cues) if file.format == "srt" else ()),
    ]
    for count, (cue, style) in enumerate(zip(file.cues, styles, strict=True), start=1):
        found += [
            Violation(rule, cue.line, count, message)
            for rule, message in (*_text(cue, style), *_duration(cue, style))
        ]
    for count, (pair, style) in enumerate(zip(pairwise(file.cues), styles, strict=False), start=1):
        found += [
            Violation(rule, cue.line, number, message)
            for rule, message, cue, number in _between(*pair, style, count)
        ]
    return sorted(found, key=lambda violation: violation.line)


def count_by_rule(violations: Sequence[Violation]) -> dict[Rule, int]:
    """How many there are of each rule, for the rules that are not kept."""
    counts = Counter(violation.rule for violation in violations)
    return {rule: counts[rule] for rule in RULES if counts[rule]}


def _numbers(cues: Sequence[ReadCue]) -> Iterator[Violation]:
    expected = 1
    for count, cue in enumerate(cues, start=1):
        number = int(cue.number) if cue.number and len(cue.number) < 10 else None
        if number != expected:
            found = "no number" if cue.number is None else f"number {cue.number[:20]}"
            yield Violation("number", cue.line, count, f"{found}; {expected} is next")
        expected = (expected if number is None else number) + 1


def _text(cue: ReadCue, style: CueStyle) -> Iterator[tuple[Rule, str]]:
    if not cue.lines:
        yield "empty", "no text"
    for line in cue.lines:
        width = style.width(line)
        if width > style.max_line_width:
            yield "width", f"a line of {width:g}; at most {style.max_line_width:g} in {style.name}"
    if len(cue.lines) > style.max_line_count:
        yield "lines", f"{len(cue.lines)} lines; at most {style.max_line_count} in {style.name}"


def _duration(cue: ReadCue, style: CueStyle) -> Iterator[tuple[Rule, str]]:
    if cue.start is None or cue.end is None:
        return
    shown = cue.end - cue.start
    if shown <= 0:
        yield "time", "it ends before it begins" if shown < 0 else "it ends as it begins"
        return
    width = sum(map(style.width, cue.lines))
    if width * 1000 > style.max_cps * (shown + _ROUNDING_MS):
        speed = width * 1000 / shown
        yield "speed", f"{speed:.1f} characters a second; at most {style.max_cps:g} in {style.name}"
    if shown < style.min_duration_ms - _ROUNDING_MS:
        yield "short", f"{_seconds(shown)}; at least {_seconds(style.min_duration_ms)}"
    if shown > style.max_duration_ms + _ROUNDING_MS:
        yield "long", f"{_seconds(shown)}; at most {_seconds(style.max_duration_ms)}"


def _between(
    cue: ReadCue, following: ReadCue, style: CueStyle, count: int
) -> Iterator[tuple[Rule, str, ReadCue, int]]:
    if cue.start is None or cue.end is None or following.start is None:
        return
    if following.start < cue.start:
        early = _seconds(cue.start - following.start)
        yield "order", f"{early} before the cue in front of it", following, count + 1
        return
    gap = following.start - cue.end
    if gap < 0:
        yield "overlap", f"{_seconds(-gap)} into the next cue", cue, count
    elif gap < style.min_gap_ms - _ROUNDING_MS:
        yield "gap", f"{_seconds(gap)}; at least {_seconds(style.min_gap_ms)}", cue, count
    elif style.min_gap_ms + _ROUNDING_MS < gap <= style.chain_gap_ms and (
        following.start - style.min_gap_ms - cue.start <= style.max_duration_ms
    ):
        wanted = f"{_seconds(style.min_gap_ms)} or over {_seconds(style.chain_gap_ms)}"
        yield "chain", f"{_seconds(gap)}; {wanted}", cue, count


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.3f} s"
