"""Error rates and time errors of a model on labelled shards, with the project's own recogniser.

    python -m training.evaluate --model DIR --data DIR [DIR …] [--limit N] [--show N]

A Chinese character and an English word count as one unit each, so the rate is a CER for Mandarin
and a WER for English. Capitals and punctuation do not count. Every utterance is given whole,
without a VAD: what is measured is the model. Works for sample-paraformer and sample-nano.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from funasr_batch.loading import load
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import Segment, Token
from funasr_batch.text.tokens import detokenise, render_text
from training.nano_scoring import units_of
from training.shards import SAMPLE_RATE, Utterance, read_all

SHARD_TOKENS = (
    Path(__file__).parents[1] / "funasr_batch/sample_models/sample-paraformer/tokens.json"
)
_MARKS = re.compile(r"[^\w\s']|_")
_BATCH = 32


@dataclass(slots=True)
class Score:
    units: int = 0
    errors: int = 0
    start_errors: list[int] = field(default_factory=list)
    """Milliseconds between the starts of units that were recognised and those of the labels."""
    end_errors: list[int] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.errors / max(1, self.units)


def labelled(utterance: Utterance, tokens: Sequence[str]) -> tuple[Token, ...]:
    """The words and characters of an utterance with their true times.

    `tokens` are those that the shards were made with."""
    pieces = [tokens[token] for token, _, _ in utterance.tokens]
    spans = [
        (start * 1000 // SAMPLE_RATE, end * 1000 // SAMPLE_RATE)
        for _, start, end in utterance.tokens
    ]
    return detokenise(pieces, spans, [1.0] * len(pieces), 0)


def recognised(
    recognizer: Recognizer, utterances: Sequence[Utterance]
) -> Iterator[tuple[Token, ...]]:
    features = [
        recognizer.frontend.features(utterance.samples.astype(np.float32) / 32768.0)
        for utterance in utterances
    ]
    for index, found in enumerate(recognizer.recognise(features).recognitions):
        segment = Segment(index, 0, len(utterances[index].samples))
        yield recognizer.text_segment(segment, found).tokens


def bare(word: str) -> str:
    """A word without the marks and capitals that one model writes and the other does not."""
    return _MARKS.sub("", word).lower()


def add(score: Score, wanted: Sequence[Token], found: Sequence[Token]) -> None:
    reference, hypothesis = units_of(render_text(wanted)), units_of(render_text(found))
    errors = Levenshtein.distance(reference, hypothesis)
    score.units += len(reference)
    score.errors += errors
    if errors:
        score.examples.append((render_text(wanted), render_text(found)))
    same = Levenshtein.opcodes([bare(t.text) for t in wanted], [bare(t.text) for t in found])
    for step in same:
        if step.tag == "equal":
            for offset in range(step.src_end - step.src_start):
                true = wanted[step.src_start + offset]
                ours = found[step.dest_start + offset]
                score.start_errors.append(ours.start - true.start)
                score.end_errors.append(ours.end - true.end)


def evaluate(
    recognizer: Recognizer, utterances: Iterable[Utterance], tokens: Sequence[str]
) -> dict[str, Score]:
    """Scores by kind of utterance; `tokens` are those of the shards."""
    scores: dict[str, Score] = defaultdict(Score)
    ordered = sorted(utterances, key=lambda utterance: len(utterance.samples))
    for first in range(0, len(ordered), _BATCH):
        batch = ordered[first : first + _BATCH]
        for utterance, found in zip(batch, recognised(recognizer, batch), strict=True):
            add(scores[utterance.kind], labelled(utterance, tokens), found)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a model folder, or sample-nano")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of shards")
    parser.add_argument(
        "--tokens",
        type=Path,
        default=SHARD_TOKENS,
        help="tokens.json that the shards were made with",
    )
    parser.add_argument("--limit", type=int, default=1000, help="utterances from each folder")
    parser.add_argument(
        "--show", type=int, default=0, help="wrong utterances to print of each kind"
    )
    arguments = parser.parse_args()
    recognizer = load(arguments.model, vad="none", offline=True)
    tokens = json.loads(arguments.tokens.read_text(encoding="utf-8"))
    for folder in arguments.data:
        utterances = [shard[i] for shard in read_all(folder) for i in range(len(shard))]
        chosen = utterances[: arguments.limit]
        print(f"{folder.name}: {len(chosen)} utterances")
        for kind, score in sorted(evaluate(recognizer, chosen, tokens).items()):
            starts = np.array(score.start_errors or [0])
            ends = np.array(score.end_errors or [0])
            print(
                f"  {kind:8s} errors {score.rate:7.2%} of {score.units} units;  start: median"
                f" {np.median(np.abs(starts)):.0f} ms off (bias {np.median(starts):+.0f}),"
                f" 90 % within {np.percentile(np.abs(starts), 90):.0f};"
                f"  end: median {np.median(np.abs(ends)):.0f} ms"
            )
            for wanted, found in score.examples[: arguments.show]:
                print(f"    - {wanted}\n    + {found}")


if __name__ == "__main__":
    main()
