"""From timed text to subtitles: where one cue ends and the next begins, and how long each is shown.

Three steps, each a function of the one before:

1. `_blocks`: the transcript becomes *units*, the smallest stretches that may stand on a line of
   their own (a Latin word, a number, a Chinese character, each with its punctuation), in blocks
   that no cue crosses.
2. `_cut`: dynamic programming over a block's units finds the cues that break least sense, fit the
   lines and can be read in time; `_wrap` breaks a cue into lines.
3. `_show`: out-times are lengthened into the silence that follows, for reading, and small gaps
   are closed.

No word is ever dropped: what cannot be fitted (a burst of fast speech) is shown faster. No in-time
is before the speech. Where a segment has no token times, only the segment's own span is known: its
text is one cue, or, if that does not fit, several that share the span by length of text.

Norms: Netflix Timed Text Style Guides (General Requirements, Timing Guidelines, English (USA),
Simplified Chinese), BBC Subtitle Guidelines sections 4 and 5.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

from funasr_batch.records import Cue, TextSegment, Token
from funasr_batch.text.tokens import is_cjk


@dataclass(frozen=True, slots=True)
class CueStyle:
    """The norms that cues keep where the speech allows it."""

    name: str
    half_width: float
    """Width of a Latin character in the unit of the limits; a Chinese one is twice as wide."""
    max_line_width: float
    max_line_count: int
    max_cps: float
    """Reading speed: width of text per second."""
    min_duration_ms: int
    max_duration_ms: int
    min_gap_ms: int
    """Between two cues. Two frames at 24 a second are 83 ms."""
    chain_gap_ms: int
    """A smaller gap is closed to `min_gap_ms`, by showing the earlier cue longer."""
    linger_ms: int
    """How long after the speech a cue may stay for the sake of reading speed."""

    def width(self, text: str) -> float:
        return _columns(text) * self.half_width


NETFLIX_ZH = CueStyle(
    name="netflix-zh",
    half_width=0.5,
    max_line_width=16,
    max_line_count=2,
    max_cps=9,
    min_duration_ms=833,
    max_duration_ms=7000,
    min_gap_ms=83,
    chain_gap_ms=500,
    linger_ms=500,
)
NETFLIX_EN = CueStyle(
    name="netflix-en",
    half_width=1,
    max_line_width=42,
    max_line_count=2,
    max_cps=20,
    min_duration_ms=833,
    max_duration_ms=7000,
    min_gap_ms=83,
    chain_gap_ms=500,
    linger_ms=500,
)
BBC = CueStyle(
    name="bbc",
    half_width=1,
    max_line_width=37,
    max_line_count=2,
    max_cps=18,  # 180 words a minute, six characters a word with its space
    min_duration_ms=833,
    max_duration_ms=7000,
    min_gap_ms=0,  # "leave 1 s or no gap"
    chain_gap_ms=1000,
    linger_ms=1500,
)
PLAIN = CueStyle(  # times exactly as they were spoken
    name="plain",
    half_width=1,
    max_line_width=42,
    max_line_count=2,
    max_cps=math.inf,
    min_duration_ms=1,
    max_duration_ms=8000,
    min_gap_ms=0,
    chain_gap_ms=0,
    linger_ms=0,
)
STYLES = {style.name: style for style in (NETFLIX_ZH, NETFLIX_EN, BBC, PLAIN)}


def style_for(text: str) -> CueStyle:
    """The style of a text's script: Chinese when it has more Chinese characters than words."""
    characters = sum(map(is_cjk, text))
    words = len(re.findall(r"[^\W\d_\u2e80-\U0003ffff]+", text))
    return NETFLIX_ZH if characters > words else NETFLIX_EN


def layout(segments: Sequence[TextSegment], style: CueStyle) -> tuple[Cue, ...]:
    """The cues of a recording whose segments are in order of time.

    Cues are in order and do not overlap, each lasts at least 1 ms, and their texts in a row are the
    segments' texts, but for white space. A line is wider than the style allows only when it is a
    single unit, a cue faster or shorter only when the speech is.
    """
    spoken = [
        Cue(units[0].start, units[-1].end, tuple(_wrap(units, style)))
        for block in _blocks(segments, style)
        for units in _cut_block(block, style)
    ]
    return tuple(_show(list(_in_order(spoken)), style))


# --- 1. Units


class _Unit(NamedTuple):
    """Text that is never broken, with its time in milliseconds."""

    text: str
    start: int
    end: int
    spaced: bool
    """Whether a space sets it off from the unit before."""
    width: float
    ends_segment: bool


@dataclass(frozen=True, slots=True)
class _Block:
    """Units that may share cues."""

    units: list[_Unit]
    timed: bool
    """Whether the times of its units were measured."""


_PAUSE_MS = 1000
"""No cue goes on across a longer silence."""

_OPENING = frozenset("([{（［｛《〈「『【〔“‘")


def _blocks(segments: Iterable[TextSegment], style: CueStyle) -> Iterator[_Block]:
    units: list[_Unit] = []
    for segment in segments:
        text = " ".join(segment.text.split())
        if not text:
            continue
        cuts = _token_cuts(text, segment.tokens)
        if cuts is None:
            if units:
                yield _Block(units, timed=True)
            units = []
            yield _Block(_shared_out(text, segment, style), timed=False)
            continue
        for unit in _timed_units(text, cuts, segment.tokens, style):
            if units and unit.start - units[-1].end >= _PAUSE_MS:
                yield _Block(units, timed=True)
                units = []
            if units and units[-1].ends_segment:
                unit = unit._replace(spaced=not _both_cjk(units[-1].text, unit.text))
            units.append(unit)
    if units:
        yield _Block(units, timed=True)


def _token_cuts(text: str, tokens: Sequence[Token]) -> list[int] | None:
    """Where each token begins in the text; None when the text is not that of the tokens.

    The text may have been punctuated and capitalised since. Opening marks go with the next token.
    """
    if not tokens:
        return None
    fold = str.lower if len(text.lower()) == len(text) else str
    haystack = fold(text)
    cuts: list[int] = []
    position = 0
    for token in tokens:
        needle = fold(" ".join(token.text.split()))
        found = haystack.find(needle, position)
        if not needle or found < 0 or _has_words(text[position:found]):
            return None
        cut = found
        while cut > position and text[cut - 1] in _OPENING:
            cut -= 1
        cuts.append(cut)
        position = found + len(needle)
    if _has_words(text[position:]):
        return None
    cuts[0] = 0
    return cuts


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def _timed_units(
    text: str, cuts: list[int], tokens: Sequence[Token], style: CueStyle
) -> Iterator[_Unit]:
    """One unit for each token, or for several that no line break may part (`1` `9`, `un` `do`)."""
    firsts = [number for number, cut in enumerate(cuts) if number == 0 or _may_break(text, cut)]
    for first, after in pairwise([*firsts, len(tokens)]):
        begin = cuts[first]
        end = cuts[after] if after < len(tokens) else len(text)
        slice_ = text[begin:end].strip()
        yield _Unit(
            text=slice_,
            start=tokens[first].start,
            end=max(tokens[after - 1].end, tokens[first].start),
            spaced=begin > 0 and text[begin - 1] == " ",
            width=style.width(slice_),
            ends_segment=after == len(tokens),
        )


def _may_break(text: str, position: int) -> bool:
    """At a space, and on either side of a Chinese character."""
    before, after = text[position - 1], text[position]
    return before == " " or is_cjk(before) or is_cjk(after)


def _shared_out(text: str, segment: TextSegment, style: CueStyle) -> list[_Unit]:
    """Units that share the segment's span by width."""
    cuts = [0]
    for position in range(1, len(text)):
        before, after = text[position - 1], text[position]
        if after == " " or before in _OPENING or not _may_break(text, position):
            continue
        if after.isalnum() or after in _OPENING or before == " ":
            cuts.append(position)
    slices = [(begin, text[begin:end].strip()) for begin, end in pairwise([*cuts, len(text)])]
    widths = [style.width(slice_) for _, slice_ in slices]
    total = sum(widths) or 1.0
    span = max(0, segment.end - segment.start)
    ends = [segment.start + round(span * done / total) for done in accumulate(widths)]
    return [
        _Unit(
            text=slice_,
            start=start,
            end=end,
            spaced=begin > 0 and text[begin - 1] == " ",
            width=width,
            ends_segment=begin == cuts[-1],
        )
        for (begin, slice_), width, (start, end) in zip(
            slices, widths, pairwise([segment.start, *ends]), strict=True
        )
    ]


def _both_cjk(left: str, right: str) -> bool:
    return is_cjk(left[-1]) and is_cjk(right[0])


@lru_cache(maxsize=65536)
def _columns(text: str) -> int:
    """Display width in half-width columns."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "FW" else 1
        for char in text
    )


# --- 2. Cues and lines

# What a cue costs. One that ends with a sentence costs _CUE and nothing else.
_CUE = 1.0
_BROKEN_PHRASE = 3.0
"""Ending a cue in mid-phrase; at a weaker boundary, a part of it."""
_BRIDGED = 1.6
"""Going on across the end of a sentence or a long pause, within a cue."""
_SLACK = 0.5
"""For an empty cue, less the fuller it is: evens out cues that have no better place to break."""
_SHORT = 2.0
"""A cue that cannot be shown for the minimum duration."""
_FAST = 2.0
"""A cue that must be read at twice the permitted speed."""

_SENTENCE_END = frozenset("。！？!?….")
_CLAUSE_END = frozenset("，、；：,;:")
_CLOSING = ")]}）］｝》〉」』】〕”’\"'"

_LEANS_ON_NEXT = re.compile(
    "a|an|the|and|or|but|of|to|in|on|at|by|for|from|with|as|into|about|than|that|if|because|so|"
    "my|your|his|her|its|our|their|this|these|those|i|you|he|she|we|they|it|is|are|was|were|be|"
    "not|no|very|will|would|can|could|should|have|has|had|do|does|did",
    re.IGNORECASE,
)
"""English words after which a line should not end."""
_LEANS_ON_LAST = frozenset("的了吗呢吧啊呀嘛们着过得地")
"""Chinese particles that should not begin a line."""


def _cut_block(block: _Block, style: CueStyle) -> Iterator[list[_Unit]]:
    units = block.units
    if not block.timed and _fits(units, style):
        yield units
        return
    for first, after in pairwise(_cut(units, style)):
        yield units[first:after]


def _fits(units: Sequence[_Unit], style: CueStyle) -> bool:
    duration = units[-1].end - units[0].start
    return (
        len(_fill_lines(units, style)) <= style.max_line_count and duration <= style.max_duration_ms
    )


def _strength(unit: _Unit, following: _Unit) -> float:
    """How good a place for a break: 1 the end of a sentence, 0 mid-phrase, less between words
    that belong together."""
    boundary = max(_mark(unit.text), _pause(unit, following), 0.3 * unit.ends_segment)
    return boundary or _leaning(unit.text, following.text)


def _mark(text: str) -> float:
    last = text.rstrip(_CLOSING)[-1:]
    if last in _SENTENCE_END:
        return 1.0
    return 0.5 if last in _CLAUSE_END else 0.0


def _pause(unit: _Unit, following: _Unit) -> float:
    return min(1.0, max(0.0, (following.start - unit.end - 100) / 600))


def _leaning(text: str, following: str) -> float:
    parts_close_words = (
        following[0] in _LEANS_ON_LAST
        or _LEANS_ON_NEXT.fullmatch(text) is not None
        or (text[-1].isdigit() and is_cjk(following[0]))
    )
    return -0.5 if parts_close_words else 0.0


def _cut(units: Sequence[_Unit], style: CueStyle) -> list[int]:
    """Where cues begin, and the number of units: the cheapest way through the block.

    `best[n]` is the least cost of cutting the first n units, `came_from[n]` where the last of their
    cues begins. A cue holds only so many units, so the time is linear in the number of units.
    """
    strengths = [*(_strength(*pair) for pair in pairwise(units)), 1.0]
    bridged = [0.0, *accumulate(_BRIDGED * max(0.0, strength) for strength in strengths)]
    spaces = [style.half_width * unit.spaced for unit in units]
    rows = [
        (space, unit.width, unit.end, deadline, bridge + _CUE + _BROKEN_PHRASE * (1.0 - strength))
        for unit, space, deadline, bridge, strength in zip(
            units, spaces, _deadlines(units, style), bridged, strengths, strict=False
        )
    ]
    capacity = style.max_line_width * style.max_line_count
    slack_cost = _SLACK / capacity**2
    speed = style.max_cps / 1000

    best = [0.0] + [math.inf] * len(units)
    came_from = [0] * (len(units) + 1)
    for first, opening in enumerate(units):
        base = best[first] - bridged[first]
        latest = opening.start + style.max_duration_ms
        lines = 1
        total = line = -spaces[first]
        for last in range(first, len(units)):
            space, width, end, deadline, toll = rows[last]
            line += space + width
            total += space + width
            if last > first:
                if line > style.max_line_width:
                    lines += 1
                    line = width
                if lines > style.max_line_count or end > latest:
                    break
            cost = base + toll
            if cost >= best[last + 1]:
                continue
            shown = max(1, deadline - opening.start)
            cost += slack_cost * (capacity - total) ** 2
            if shown < style.min_duration_ms:
                cost += _SHORT * (1.0 - shown / style.min_duration_ms)
            if total > speed * shown:
                cost += _FAST * min(1.0, total / (speed * shown) - 1.0)
            if cost < best[last + 1]:
                best[last + 1] = cost
                came_from[last + 1] = first

    cuts = [len(units)]
    while cuts[-1]:
        cuts.append(came_from[cuts[-1]])
    return cuts[::-1]


def _deadlines(units: Sequence[_Unit], style: CueStyle) -> list[int]:
    """Until when a cue that ends with each unit could be shown."""
    lingering = [unit.end + style.linger_ms for unit in units]
    before_next = [unit.start - style.min_gap_ms for unit in units[1:]]
    return [*map(min, lingering, before_next), lingering[-1]]


def _fill_lines(units: Sequence[_Unit], style: CueStyle) -> list[list[_Unit]]:
    """Units in as few lines as they need."""
    lines: list[list[_Unit]] = []
    line_width = math.inf
    for unit in units:
        space = style.half_width if unit.spaced else 0.0
        if line_width + space + unit.width > style.max_line_width:
            lines.append([])
            line_width, space = 0.0, 0.0
        lines[-1].append(unit)
        line_width += space + unit.width
    return lines


def _wrap(units: Sequence[_Unit], style: CueStyle) -> Iterator[str]:
    """A cue's lines: as few as it needs, of like width, broken where it hurts the sense least."""
    while len(lines := _fill_lines(units, style)) > 1:
        split = _best_split(units, len(lines[0]), len(lines), style)
        yield _text(units[:split])
        units = units[split:]
    yield _text(units)


def _best_split(units: Sequence[_Unit], longest: int, lines: int, style: CueStyle) -> int:
    """How many units, at most `longest`, to put on the first of so many lines."""
    ideal = _width(units, style) / lines
    best, least = longest, math.inf
    for split in range(longest, 0, -1):
        if len(_fill_lines(units[split:], style)) >= lines:
            break
        unevenness = abs(_width(units[:split], style) / ideal - 1.0)
        cost = 2.0 * unevenness**2 - _strength(units[split - 1], units[split])
        if cost < least:
            best, least = split, cost
    return best


def _width(units: Sequence[_Unit], style: CueStyle) -> float:
    spaces = sum(unit.spaced for unit in units[1:])
    return sum(unit.width for unit in units) + spaces * style.half_width


def _text(units: Sequence[_Unit]) -> str:
    following = (" " + unit.text if unit.spaced else unit.text for unit in units[1:])
    return units[0].text + "".join(following)


# --- 3. Times


def _in_order(cues: Iterable[Cue]) -> Iterator[Cue]:
    """Cues that each begin at least 1 ms after the one before."""
    earliest = 0
    for cue in cues:
        start = max(cue.start, earliest)
        yield Cue(start, max(cue.end, start), cue.lines)
        earliest = start + 1


def _show(cues: Sequence[Cue], style: CueStyle) -> Iterator[Cue]:
    """Cues with the times of the speech, as they are shown."""
    for cue, following in zip_longest(cues, cues[1:]):
        width = sum(map(style.width, cue.lines))
        readable = cue.start + math.ceil(1000 * width / style.max_cps)
        end = max(
            cue.end, cue.start + style.min_duration_ms, min(readable, cue.end + style.linger_ms)
        )
        if following is not None:
            end = _leave_gap(cue.start, end, following.start, style)
        yield Cue(cue.start, min(end, cue.start + max(1, style.max_duration_ms)), cue.lines)


def _leave_gap(start: int, end: int, next_start: int, style: CueStyle) -> int:
    """The out-time before another cue; the gap never takes more than half of the time there is."""
    if next_start - end > max(style.chain_gap_ms, style.min_gap_ms):
        return end
    return max(next_start - style.min_gap_ms, (start + next_start + 1) // 2)
