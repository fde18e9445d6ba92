"""ASS (Advanced SubStation Alpha): styled subtitles that fill as the words are spoken.

Where the times of tokens were measured, each is a karaoke syllable (`\\k`, hundredths of a second)
of the style Karaoke; other cues have the style Default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from funasr_batch.records import Cue, TextSegment
from funasr_batch.writers.plain import ZERO_WIDTH_SPACE, clean_lines, without_controls
from funasr_batch.writers.spoken import pieces

_HEAD = """\
[Script Info]
ScriptType: v4.00+
WrapStyle: 0
ScaledBorderAndShadow: yes
YCbCr Matrix: None
PlayResX: 1920
PlayResY: 1080

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, \
Bold, Italic, Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, \
Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,64,&H00FFFFFF,&H00FFFFFF,&H00101010,&H80000000,\
0,0,0,0,100,100,0,0,1,3,1,2,96,96,64,1
Style: Karaoke,Arial,64,&H00FFFFFF,&H00B0B0B0,&H00101010,&H80000000,\
0,0,0,0,100,100,0,0,1,3,1,2,96,96,64,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def ass(cues: Iterable[Cue], segments: Iterable[TextSegment]) -> str:
    """The cues that `layout` made of the segments."""
    times = _Times(segments)
    return _HEAD + "".join(
        _event(cue, lines, times.of(cue)) for cue in cues if (lines := clean_lines(cue))
    )


# --- Which character was spoken when


class _Times:
    """Walks along the segments: the visible characters of cues in a row are the segments'."""

    def __init__(self, segments: Iterable[TextSegment]) -> None:
        self._characters = _visible(segments)

    def of(self, cue: Cue) -> list[int | None]:
        """When the token of each visible character begins, in milliseconds."""
        count = sum(len("".join(without_controls(line).split())) for line in cue.lines)
        return [next(self._characters, None) for _ in range(count)]


def _visible(segments: Iterable[TextSegment]) -> Iterator[int | None]:
    for segment in segments:
        for piece in pieces(segment):
            yield from [piece.start] * len("".join(without_controls(piece.text).split()))


# --- Lines


def _event(cue: Cue, lines: Sequence[str], starts: Sequence[int | None]) -> str:
    timed = [start for start in starts if start is not None]
    sung = len(timed) == len(starts)
    text = _sung(cue, lines, timed) if sung else _BREAK.join(map(_escaped, lines))
    start = _hundredths(cue.start)
    end = max(_hundredths(cue.end), start + 1)
    style = "Karaoke" if sung else "Default"
    return f"Dialogue: 0,{_clock(start)},{_clock(end)},{style},,0,0,0,,{text}\n"


_BREAK = r"\N"


def _sung(cue: Cue, lines: Sequence[str], starts: Sequence[int]) -> str:
    """The lines with a syllable for each token, from its start to the next one's."""
    offset = _hundredths(cue.start)
    length = max(_hundredths(cue.end) - offset, 1)
    syllables: list[tuple[int, str]] = []
    coming = iter(starts)
    for char in "\n".join(lines):
        if char in " \n" and syllables:
            start = syllables[-1][0]
        else:
            start = next(coming)
        if syllables and syllables[-1][0] == start:
            syllables[-1] = (start, syllables[-1][1] + char)
        else:
            syllables.append((start, char))
    # A time is never before the one of the syllable in front of it, nor outside of the cue.
    begins = []
    latest = 0
    for start, _ in syllables:
        latest = min(max(_hundredths(start) - offset, latest), length)
        begins.append(latest)
    silence = f"{{\\k{begins[0]}}}" if begins[0] else ""
    return silence + "".join(
        f"{{\\k{end - begin}}}{_escaped(text)}"
        for begin, end, (_, text) in zip(begins, [*begins[1:], length], syllables, strict=True)
    )


_ESCAPE_LIKE = re.compile(r"\\(?=[Nnh])")
_BRACES = str.maketrans("{}", "｛｝")


def _escaped(text: str) -> str:
    """Text that no player takes for an override or a break.

    There is no escape that all players know: braces become full-width ones, and a zero-width space
    parts a backslash from a letter that would give it a meaning.
    """
    text = _ESCAPE_LIKE.sub(lambda slash: slash[0] + ZERO_WIDTH_SPACE, text.translate(_BRACES))
    return text.replace("\n", _BREAK)


def _hundredths(milliseconds: int) -> int:
    return (milliseconds + 5) // 10


def _clock(hundredths: int) -> str:
    seconds, hundredths = divmod(hundredths, 100)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}.{hundredths:02d}"
