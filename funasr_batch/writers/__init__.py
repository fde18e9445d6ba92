"""A transcript as the bytes of a file, in each of the formats. Nothing here opens a file.

One module a format. SRT, VTT, ASS and LRC show cues (`funasr_batch.text.cues`), TSV and TXT a line
for each segment, HTML and JSON everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from funasr_batch.errors import UsageError
from funasr_batch.records import Cue, Transcript
from funasr_batch.text.cues import CueStyle, layout, style_for
from funasr_batch.writers.ass import ass
from funasr_batch.writers.html_page import html_page
from funasr_batch.writers.json_document import SCHEMA_VERSION, json_document
from funasr_batch.writers.lrc import lrc
from funasr_batch.writers.plain import encode, tsv, txt
from funasr_batch.writers.subtitles import srt, vtt

__all__ = [
    "DEFAULT_OPTIONS",
    "FORMATS",
    "SCHEMA_VERSION",
    "Format",
    "WriterOptions",
    "write",
    "write_all",
]

Format: TypeAlias = Literal["srt", "vtt", "ass", "lrc", "tsv", "txt", "html", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class WriterOptions:
    style: CueStyle | None = None
    """Of cues; chosen by the script of the text when there is none."""
    bom: bool = False
    """Begin text formats with a byte order mark, for old Windows players. Never JSON."""
    recording: str | None = None
    """The URL by which an HTML page finds the recording; None when it lies beside the page."""


DEFAULT_OPTIONS = WriterOptions()


def write(transcript: Transcript, format: str, options: WriterOptions = DEFAULT_OPTIONS) -> bytes:
    """The whole content of an output file, UTF-8 with LF line ends.

    A transcript without speech gives a valid file without entries.

    Raises UsageError for a format that is not in `FORMATS`.
    """
    return write_all(transcript, (format,), options)[format]


def write_all(
    transcript: Transcript, formats: Iterable[str], options: WriterOptions = DEFAULT_OPTIONS
) -> dict[str, bytes]:
    """The content of several formats, for which cues are laid out once. Raises UsageError."""
    told = _Told(transcript, options)
    mark = "\ufeff" if options.bom else ""
    return {name: encode(("" if name == "json" else mark) + _text(told, name)) for name in formats}


class _Told:
    """A transcript and its cues, laid out when a format first asks for them."""

    def __init__(self, transcript: Transcript, options: WriterOptions) -> None:
        self.transcript = transcript
        self.options = options

    @cached_property
    def cues(self) -> tuple[Cue, ...]:
        segments = self.transcript.segments
        return layout(segments, self.options.style or style_for(self.transcript.text))


def _text(told: _Told, format: str) -> str:
    transcript = told.transcript
    match format:
        case "srt":
            return srt(told.cues)
        case "vtt":
            return vtt(told.cues)
        case "ass":
            return ass(told.cues, transcript.segments)
        case "lrc":
            return lrc(told.cues, transcript.source.duration)
        case "tsv":
            return tsv(transcript.segments)
        case "txt":
            return txt(transcript.segments)
        case "html":
            return html_page(transcript, told.options.recording)
        case "json":
            return json_document(transcript)
        case _:
            raise UsageError(
                f"There is no output format {format!r}.", hint=f"Choose from {', '.join(FORMATS)}."
            )
