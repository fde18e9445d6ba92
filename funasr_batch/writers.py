"""A transcript as the bytes of a file, in each of the formats. Nothing here opens a file."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from funasr_batch import __version__
from funasr_batch.errors import UsageError
from funasr_batch.records import Cue, SourceInfo, TextSegment, Token, Transcript, Word
from funasr_batch.text.cues import CueStyle, layout, style_for

Format: TypeAlias = Literal["srt", "vtt", "tsv", "txt", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

SCHEMA_VERSION = 1
"""Of the JSON. Raised when a key changes its meaning or goes; a new key does not raise it."""


@dataclass(frozen=True, slots=True)
class WriterOptions:
    style: CueStyle | None = None
    """Of SRT and VTT cues; chosen by the script of the text when there is none."""
    bom: bool = False
    """Begin text formats with a byte order mark, for old Windows players. Never JSON."""


DEFAULT_OPTIONS = WriterOptions()


def write(transcript: Transcript, format: str, options: WriterOptions = DEFAULT_OPTIONS) -> bytes:
    """The whole content of an output file, UTF-8 with LF line ends.

    SRT and VTT hold cues (`funasr_batch.text.cues`), TSV and TXT a line for each segment that has
    text, JSON everything. A transcript without speech gives a valid file without entries.

    Raises UsageError for a format that is not in `FORMATS`.
    """
    match format:
        case "srt":
            text = _srt(_cues(transcript, options))
        case "vtt":
            text = _vtt(_cues(transcript, options))
        case "tsv":
            text = _tsv(transcript.segments)
        case "txt":
            text = _txt(transcript.segments)
        case "json":
            return _encode(_json(transcript))
        case _:
            raise UsageError(
                f"There is no output format {format!r}.", hint=f"Choose from {', '.join(FORMATS)}."
            )
    return _encode(("\ufeff" if options.bom else "") + text)


# --- Subtitles


def _cues(transcript: Transcript, options: WriterOptions) -> tuple[Cue, ...]:
    return layout(transcript.segments, options.style or style_for(transcript.text))


def _srt(cues: Iterable[Cue]) -> str:
    shown = ((cue, _srt_text(cue)) for cue in cues)
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n\n"
        for number, (cue, text) in enumerate(((cue, text) for cue, text in shown if text), start=1)
    )


def _vtt(cues: Iterable[Cue]) -> str:
    shown = ((cue, _vtt_text(cue)) for cue in cues)
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n"
        for cue, text in shown
        if text
    )


_ARROW = re.compile("--+>")
_TAG_LIKE = re.compile(r"<(?=[/A-Za-z])|\{(?=\\)")
_ZERO_WIDTH_SPACE = "\u200b"


def _srt_text(cue: Cue) -> str:
    """Lines that players cannot take for a time line, a tag (`<b>`, `{\\an8}`) or a cue's end.

    SRT has no escapes: a zero-width space after the bracket keeps what looks like a tag visible.
    """
    text = _ARROW.sub("->", "\n".join(_clean_lines(cue)))
    return _TAG_LIKE.sub(lambda bracket: bracket[0] + _ZERO_WIDTH_SPACE, text)


def _vtt_text(cue: Cue) -> str:
    text = "\n".join(_clean_lines(cue))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clean_lines(cue: Cue) -> list[str]:
    return [line for line in map(_one_line, cue.lines) if line]


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"


# --- Lines


def _tsv(segments: Iterable[TextSegment]) -> str:
    """Integer milliseconds, as openai-whisper writes them."""
    rows = ((segment, _one_line(segment.text)) for segment in segments)
    return "start\tend\ttext\n" + "".join(
        f"{segment.start}\t{segment.end}\t{text}\n" for segment, text in rows if text
    )


def _txt(segments: Iterable[TextSegment]) -> str:
    lines = (_one_line(segment.text) for segment in segments)
    return "".join(f"{line}\n" for line in lines if line)


_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")


def _one_line(text: str) -> str:
    """Text without control characters or line breaks of any kind, and with single spaces."""
    return " ".join(_CONTROLS.sub("", text).split())


# --- JSON


def _json(transcript: Transcript) -> str:
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": _source(transcript.source),
        "model": {
            "name": transcript.model.name,
            "revision": transcript.model.revision,
            "weights_sha256": transcript.model.weights_sha256,
            "quantization": transcript.model.quantization,
        },
        "settings": transcript.settings_digest,
        "language": transcript.language,
        "text": transcript.text,
        "segments": [_segment(segment) for segment in transcript.segments],
        "stats": _without_infinities(transcript.stats),
        "status": transcript.status,
        "warnings": list(transcript.warnings),
        "tool": {"name": "funasr-batch", "version": __version__},
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _source(source: SourceInfo) -> dict[str, Any]:
    """`path_base64` has the exact bytes of a name that is not UTF-8."""
    fields: dict[str, Any] = {"path": source.path}
    if _UNDECODED_BYTES.search(source.path):
        name = source.path.encode("utf-8", "surrogateescape")
        fields["path_base64"] = base64.b64encode(name).decode("ascii")
    return fields | {
        "sha256": source.sha256,
        "duration": round(source.duration, 3),
        "sample_rate": source.sample_rate,
        "channels": source.channels,
    }


def _segment(segment: TextSegment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "start": segment.start / 1000,
        "end": segment.end / 1000,
        "text": segment.text,
        "timing": segment.timing,
        "tokens": [_token(token) for token in segment.tokens]
        or [_untimed(word) for word in segment.words],
        "flags": list(segment.flags),
    }


def _token(token: Token) -> dict[str, Any]:
    return {
        "text": token.text,
        "start": token.start / 1000,
        "end": token.end / 1000,
        "confidence": _without_infinities(round(token.confidence, 4)),
    }


def _untimed(word: Word) -> dict[str, Any]:
    """A word of which only the segment's time is known: null, never a guess."""
    confidence = _without_infinities(round(word.confidence, 4))
    return {"text": word.text, "start": None, "end": None, "confidence": confidence}


def _without_infinities(value: Any) -> Any:
    """NaN and infinity, which JSON does not have (the speed of an instant), as null."""
    match value:
        case dict():
            return {key: _without_infinities(item) for key, item in value.items()}
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


# --- Bytes

_SURROGATES = re.compile("[\ud800-\udfff]")
_UNDECODED_BYTES = re.compile("[\udc80-\udcff]")


def _encode(text: str) -> bytes:
    """UTF-8. Bytes of a file name that are not text (lone surrogates in Python) become U+FFFD."""
    return _SURROGATES.sub("\ufffd", text).encode()
