"""HTML: one page that plays the recording and shows what is being said.

It holds all that it needs but the recording, to which it has a link, so it works from a folder or a
memory stick without a network. A click on a word plays from there; the search hides what does not
match; words of which the model was not sure are marked.
"""

from __future__ import annotations

import os
from html import escape
from typing import Final
from urllib.parse import quote

from funasr_batch.records import TextSegment, Transcript
from funasr_batch.writers.html_assets import POLICY, SCRIPT, STYLE
from funasr_batch.writers.plain import one_line, without_controls
from funasr_batch.writers.spoken import Piece, pieces

LOW_CONFIDENCE: Final = 0.6
"""A word that the model gave less is marked."""


def html_page(transcript: Transcript, recording: str | None) -> str:
    """The page of a transcript; `recording` is the URL of its audio as the page is to link to it,
    or None when page and recording lie in one folder."""
    name = os.path.basename(transcript.source.path)
    title = escape(one_line(name))
    link = escape(recording if recording is not None else quoted_path(name))
    spoken = "\n".join(map(_section, transcript.segments)) or "<p>No speech was found.</p>"
    return f"""\
<!doctype html>
<html lang="{escape(transcript.language)}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY, quote=False)}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1><bdi>{title}</bdi></h1>
<p class="about">{_about(transcript)}</p>
<audio id="player" controls preload="metadata" src="{link}"></audio>
<p class="note" id="trouble" hidden>The browser cannot play <a href="{link}">{title}</a>.</p>
{_notes(transcript)}<div class="find">
<input id="search" type="search" placeholder="Search" aria-label="Search the transcript">
<output id="found" for="search"></output>
</div>
</header>
<main>
{spoken}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def link_to(recording: str, folder: str) -> str:
    """The relative URL of a recording for a page in `folder`; both are absolute paths."""
    return quoted_path(os.path.relpath(recording, folder))


def quoted_path(path: str) -> str:
    """A relative path as a URL, byte for byte, also where its bytes are not text."""
    return quote(os.fsencode(path))


def _about(transcript: Transcript) -> str:
    model = transcript.model.name
    facts = (
        _clock(round(transcript.source.duration * 1000)),
        transcript.language,
        os.path.basename(model) or model,
        *((transcript.status.replace("_", " "),) if transcript.status != "done" else ()),
    )
    return escape(" · ".join(map(one_line, facts)))


def _notes(transcript: Transcript) -> str:
    warnings = (f'<p class="note">{escape(one_line(text))}</p>\n' for text in transcript.warnings)
    return "".join(warnings)


def _section(segment: TextSegment) -> str:
    words = "".join(map(_word, pieces(segment)))
    return (
        f'<section data-t="{segment.start}">'
        f'<a class="time" href="#t={segment.start / 1000}">{_clock(segment.start)}</a>'
        f'<p dir="auto">{words}</p></section>'
    )


def _word(piece: Piece) -> str:
    times = "" if piece.start is None else f' data-t="{piece.start}" data-e="{piece.end}"'
    sure = piece.confidence is None or piece.confidence >= LOW_CONFIDENCE
    doubt = "" if sure else f' class="low" title="{_percent(piece.confidence)}"'
    text = escape(without_controls(piece.text), quote=False)
    word = text.rstrip()
    return f"<span{times}{doubt}>{word}</span>{text[len(word) :]}"


def _percent(confidence: float | None) -> str:
    return "" if confidence is None or confidence != confidence else f"{confidence:.0%} sure"


def _clock(milliseconds: int) -> str:
    minutes, seconds = divmod(milliseconds // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
