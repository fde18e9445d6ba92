"""The outputs of one transcript under given settings: which formats, in which style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from funasr_batch.records import Transcript
from funasr_batch.settings import Settings
from funasr_batch.text.cues import STYLES, CueStyle, style_for
from funasr_batch.writers import WriterOptions, write_all
from funasr_batch.writers.html_page import link_to


def render(
    transcript: Transcript, settings: Settings, folder: Path | None = None
) -> dict[str, bytes]:
    """The content of each format that the settings ask for, to be written into `folder`.

    HTML has a relative link to the recording. When `folder` is None, the page is taken to lie
    beside the recording, or, if there is an output folder, anywhere: then the link is absolute.
    """
    options = WriterOptions(
        style=cue_style(settings, transcript.text),
        bom=settings.bom,
        recording=_link(Path(transcript.source.path), settings, folder),
    )
    return write_all(transcript, settings.format, options)


def _link(recording: Path, settings: Settings, folder: Path | None) -> str | None:
    if not recording.is_absolute():
        return None
    if folder is not None:
        return link_to(str(recording), str(folder))
    return None if settings.output_dir is None else recording.as_uri()


def cue_style(settings: Settings, text: str) -> CueStyle:
    """The named style, or the one of the text's script, with the limits that were set apart.

    `max_line_width` and `max_cps` count in the style's own unit: Chinese characters in a Chinese
    style, Latin ones in the others.
    """
    auto = settings.subtitle_style == "auto"
    style = style_for(text) if auto else STYLES[settings.subtitle_style]
    limits: dict[str, Any] = {
        "max_line_width": settings.max_line_width,
        "max_line_count": settings.max_line_count,
        "max_cps": settings.max_cps,
        "min_duration_ms": _milliseconds(settings.min_duration),
        "max_duration_ms": _milliseconds(settings.max_duration),
        "min_gap_ms": _milliseconds(settings.min_gap),
    }
    return replace(style, **{name: limit for name, limit in limits.items() if limit is not None})


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
