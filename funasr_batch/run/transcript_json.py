"""Transcripts as the manifest keeps them: JSON without loss, compressed.

This is not the JSON that users get (see writers/): times stay integer milliseconds and tokens are
short rows, so that other formats can be written years later without recognising again.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript, Word

FORMAT_VERSION = 1


def pack(transcript: Transcript) -> bytes:
    """Compressed JSON; it carries a checksum, which `unpack` verifies."""
    text = json.dumps(to_dict(transcript), separators=(",", ":"))
    return zlib.compress(text.encode("ascii"))


def unpack(data: bytes) -> Transcript:
    """Raises ValueError when the bytes are damaged or of an unknown version."""
    try:
        return from_dict(json.loads(zlib.decompress(data)))
    except (zlib.error, LookupError, TypeError) as error:
        raise ValueError(f"not a stored transcript: {error}") from error


def to_dict(transcript: Transcript) -> dict[str, Any]:
    """A dict of JSON types only; `from_dict` gives back an equal transcript."""
    return {
        "version": FORMAT_VERSION,
        "source": dataclasses.asdict(transcript.source),
        "model": dataclasses.asdict(transcript.model),
        "settings_digest": transcript.settings_digest,
        "language": transcript.language,
        "segments": [_segment_to_dict(segment) for segment in transcript.segments],
        "status": transcript.status,
        "warnings": list(transcript.warnings),
        "stats": transcript.stats,
    }


def from_dict(data: dict[str, Any]) -> Transcript:
    """Raises ValueError for an unknown version, KeyError or TypeError for a wrong shape."""
    if data["version"] != FORMAT_VERSION:
        raise ValueError(f"stored transcript of version {data['version']}, not {FORMAT_VERSION}")
    return Transcript(
        source=SourceInfo(**data["source"]),
        model=ModelInfo(**data["model"]),
        settings_digest=data["settings_digest"],
        language=data["language"],
        segments=tuple(_segment_from_dict(segment) for segment in data["segments"]),
        status=data["status"],
        warnings=tuple(data["warnings"]),
        stats=data["stats"],
    )


def _segment_to_dict(segment: TextSegment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "timing": segment.timing,
        "tokens": [[t.text, t.start, t.end, t.confidence] for t in segment.tokens],
        "flags": list(segment.flags),
        "words": [[word.text, word.confidence] for word in segment.words],
    }


def _segment_from_dict(data: dict[str, Any]) -> TextSegment:
    return TextSegment(
        id=data["id"],
        start=data["start"],
        end=data["end"],
        text=data["text"],
        timing=data["timing"],
        tokens=tuple(Token(*row) for row in data["tokens"]),
        flags=tuple(data["flags"]),
        words=tuple(Word(*row) for row in data.get("words", ())),  # 0.1.0 had none
    )
