"""sample-nano on the recordings that come with the project, through the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

SAMPLES = Path(__file__).parents[1] / "sample_audio"
NAMES = sorted(path.stem for path in (SAMPLES / "reference").glob("*.txt"))
MOST_ERRORS = 0.10
"""Of units (a Chinese character or an English word) over all recordings. Measured: 7.7 %;
another MLX or BLAS may round a handful of units to the other side."""


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transcripts")
    command = [sys.executable, "-m", "funasr_batch", str(SAMPLES), "-o", str(folder)]
    command += ["--model", "sample-nano", "-f", "json,srt,txt"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    return folder


def units(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[a-z']+", text.lower())


def test_texts_are_the_references(transcripts: Path) -> None:
    errors = total = 0
    for name in NAMES:
        reference = units((SAMPLES / "reference" / f"{name}.txt").read_text(encoding="utf-8"))
        found = units((transcripts / f"{name}.txt").read_text(encoding="utf-8"))
        errors += Levenshtein.distance(reference, found)
        total += len(reference)
    assert total > 400
    assert errors / total <= MOST_ERRORS


def test_sentences_end_with_marks_and_words_have_times_of_the_ctc_head(transcripts: Path) -> None:
    segments = [
        segment
        for name in NAMES
        for segment in json.loads((transcripts / f"{name}.json").read_text("utf-8"))["segments"]
    ]
    ended = sum(segment["text"][-1] in "。？.?！!" for segment in segments)
    assert ended >= 0.9 * len(segments)
    for segment in segments:
        assert segment["timing"] == "ctc"
        starts = [token["start"] for token in segment["tokens"]]
        assert starts == sorted(starts)
        assert all(
            segment["start"] <= t["start"] <= t["end"] <= segment["end"] for t in segment["tokens"]
        )
        assert "".join(t["text"] for t in segment["tokens"]) == segment["text"].replace(" ", "")
