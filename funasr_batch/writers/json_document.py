"""The JSON that users get: openai-whisper's keys, and everything else that is known."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

from funasr_batch import __version__
from funasr_batch.records import SourceInfo, TextSegment, Token, Transcript, Word

SCHEMA_VERSION = 1
"""Raised when a key changes its meaning or goes; a new key does not raise it."""


def json_document(transcript: Transcript) -> str:
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


_UNDECODED_BYTES = re.compile("[\udc80-\udcff]")
