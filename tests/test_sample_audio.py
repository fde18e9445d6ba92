"""The README's first command, on the recordings and with the model that come with the project."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pysubs2
import pytest
from rapidfuzz.distance import Levenshtein

SAMPLES = Path(__file__).parents[1] / "sample_audio"
NAMES = ("english", "long_with_pauses", "mandarin", "mixed", "phone_8khz", "podcast")
MOST_ERRORS = 0.11
"""Of units (a Chinese character or an English word) over all recordings. The model card states
9.9 %; another MLX or BLAS may round a handful of units to the other side."""


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transcripts")
    command = [sys.executable, "-m", "funasr_batch", str(SAMPLES), "-o", str(folder), "-f", "all"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    return folder


def units(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[a-z']+", text.lower())


def test_every_recording_has_every_format(transcripts: Path) -> None:
    found = {path.name for path in transcripts.iterdir() if not path.name.startswith(".")}
    assert found == {
        f"{n}.{f}"
        for n in NAMES
        for f in ("srt", "json", "txt", "vtt", "tsv", "ass", "lrc", "html")
    }


def test_texts_are_the_references(transcripts: Path) -> None:
    errors = total = 0
    for name in NAMES:
        reference = units((SAMPLES / "reference" / f"{name}.txt").read_text(encoding="utf-8"))
        found = units((transcripts / f"{name}.txt").read_text(encoding="utf-8"))
        errors += Levenshtein.distance(reference, found)
        total += len(reference)
    assert errors / total <= MOST_ERRORS


@pytest.mark.parametrize("name", NAMES)
def test_subtitles_parse_and_lie_inside_the_recording(transcripts: Path, name: str) -> None:
    transcript = json.loads((transcripts / f"{name}.json").read_text(encoding="utf-8"))
    end = transcript["source"]["duration"] * 1000 + 1500
    for suffix in ("srt", "vtt"):
        cues = pysubs2.load(str(transcripts / f"{name}.{suffix}"))
        assert len(cues) > 0
        assert all(cue.start < cue.end <= end for cue in cues)
        assert all(one.end <= other.start for one, other in itertools.pairwise(cues))
        spoken = units(" ".join(cue.plaintext for cue in cues))
        assert spoken == units(transcript["text"])


@pytest.mark.parametrize("name", NAMES)
def test_words_are_dated_near_the_synthesiser(transcripts: Path, name: str) -> None:
    """Half of the recognised words and characters start within 100 ms of the truth."""
    transcript = json.loads((transcripts / f"{name}.json").read_text(encoding="utf-8"))
    found = [token for segment in transcript["segments"] for token in segment["tokens"]]
    reference = json.loads((SAMPLES / "reference" / f"{name}.json").read_text(encoding="utf-8"))
    wanted = [
        (text.lower(), start)
        for sentence in reference["sentences"]
        for text, start, _ in sentence["tokens"]
    ]
    steps = Levenshtein.opcodes([w for w, _ in wanted], [t["text"].lower() for t in found])
    distances = sorted(
        abs(wanted[step.src_start + i][1] - found[step.dest_start + i]["start"])
        for step in steps
        if step.tag == "equal"
        for i in range(step.src_end - step.src_start)
    )
    assert distances[len(distances) // 2] <= 0.1
