"""What quantisation costs, what drafts bring, and that neither they nor batches change a text.

python nano_quality.py --data SHARDS [SHARDS …] --limit 600 --tables quantisation drafts batches

Shards are those of `training.synthesise` and `training.digits` (split test). Every utterance is
given whole, without a VAD. Errors are counted as `training.evaluate` does: Chinese characters and
English words, without marks and capitals. Intervals are of a bootstrap over utterances, paired:
both models are scored on the same draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from funasr_batch.decoding.speculative import Always
from funasr_batch.loading import load
from funasr_batch.models_command import run_models
from funasr_batch.records import FloatArray
from training.evaluate import SHARD_TOKENS, labelled
from training.nano_scoring import edits, units_of
from training.shards import Utterance, read_all

PLANS = ("none", "encoder=8", "encoder=4", "llm=8", "llm=4", "int8-all", "int4")
BATCH = 64


def utterances(folders: Sequence[Path], limit: int) -> list[Utterance]:
    return [
        shard[index]
        for folder in folders
        for shard in read_all(folder)
        for index in range(len(shard))
    ][:limit]


class Task:
    """The utterances with their features and what is said in them."""

    def __init__(self, folders: Sequence[Path], limit: int) -> None:
        tokens = json.loads(SHARD_TOKENS.read_text(encoding="utf-8"))
        self.kinds: list[str] = []
        self.wanted: list[list[str]] = []
        self.features: list[FloatArray] = []
        frontend = load("sample-nano", vad="none", offline=True).frontend
        for folder in folders:
            chosen = utterances([folder], limit)
            for utterance in chosen:
                said = " ".join(token.text for token in labelled(utterance, tokens))
                self.kinds.append(utterance.kind)
                self.wanted.append(units_of(said))
                self.features.append(frontend.features(utterance.samples / np.float32(32768)))

    def read(self, decoding: Any, batch: int = BATCH) -> list[Any]:
        order = sorted(range(len(self.features)), key=lambda n: len(self.features[n]))
        found: list[Any] = [None] * len(order)
        for first in range(0, len(order), batch):
            places = order[first : first + batch]
            result = decoding.recognise([self.features[place] for place in places])
            for place, recognition in zip(places, result.recognitions, strict=True):
                found[place] = recognition
        return found

    def errors(self, found: Sequence[Any]) -> np.ndarray:
        return np.array(
            [
                edits(wanted, units_of(one.text))
                for wanted, one in zip(self.wanted, found, strict=True)
            ]
        )

    def rates(self, errors: np.ndarray) -> dict[str, float]:
        """Error rates in per cent, by kind of utterance and of all."""
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for kind, wanted, wrong in zip(self.kinds, self.wanted, errors.tolist(), strict=True):
            for name in (kind, "all"):
                totals[name][0] += wrong
                totals[name][1] += len(wanted)
        return {name: round(100 * wrong / n, 2) for name, (wrong, n) in sorted(totals.items())}


def quantisation(task: Task, model: str) -> Iterator[dict[str, Any]]:
    sizes = np.array([len(wanted) for wanted in task.wanted])
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(sizes), (1000, len(sizes)))
    plain: list[Any] = []
    base = np.zeros(0)
    for plan in PLANS:
        quantize = None if plan == "none" else plan
        recognizer = load(model, vad="none", offline=True, quantize=quantize, draft="none")
        found = task.read(recognizer.decoding)
        errors = task.errors(found)
        if plan == "none":
            plain, base = found, errors
        change = 100 * (errors.sum() - base.sum()) / base.sum()
        spread = 100 * (errors[draws].sum(1) - base[draws].sum(1)) / base[draws].sum(1)
        same = sum(
            one.token_ids == other.token_ids for one, other in zip(found, plain, strict=True)
        )
        low, high = np.percentile(spread, [2.5, 97.5])
        yield {
            "plan": plan,
            **task.rates(errors),
            "relative change %": round(float(change), 2),
            "95 % interval": [round(float(low), 2), round(float(high), 2)],
            "same ids": f"{same}/{len(found)}",
        }


def drafts(task: Task, model: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        small = str(Path(folder, "int4"))
        list(run_models(["convert", model, "--quantize", "int4", "-o", small, "--offline"]))
        plain: list[Any] = []
        for name in ("none", "ctc", "lookup", "paraformer", small):
            timing = "sample-paraformer" if name == "paraformer" else None
            recognizer = load(model, vad="none", offline=True, draft=name, timing_model=timing)
            decoding: Any = replace(recognizer.decoding, planner=Always("drafted"))
            started = time.perf_counter()
            found = task.read(decoding)
            seconds = time.perf_counter() - started
            plain = plain or found
            tally = decoding.tally.generate
            same = [a.token_ids == b.token_ids for a, b in zip(found, plain, strict=True)]
            yield {
                "draft": "its own 4-bit copy" if name == small else name,
                "same ids": f"{sum(same)}/{len(same)}",
                "accepted %": round(100 * tally.accepted / max(1, tally.drafted), 1),
                "tokens a row's pass": round(tally.tokens / tally.row_passes, 2),
                "passes saved %": round(100 * (1 - tally.row_passes / tally.tokens), 1),
                "seconds": round(seconds, 1),
            }


def batches(task: Task, model: str) -> Iterator[dict[str, Any]]:
    plain: list[Any] = []
    for rows, batch in ((1, 1), (2, 7), (8, 64), (32, 64)):
        recognizer = load(model, vad="none", offline=True, draft="none")
        decoding: Any = replace(recognizer.decoding, rows=rows)
        found = task.read(decoding, batch)
        plain = plain or found
        pairs = list(zip(found, plain, strict=True))
        yield {
            "rows": rows,
            "segments of a batch": batch,
            "same ids": f"{sum(a.token_ids == b.token_ids for a, b in pairs)}/{len(pairs)}",
            "same tokens with times": sum(
                [(t.text, t.start, t.end) for t in a.tokens]
                == [(t.text, t.start, t.end) for t in b.tokens]
                for a, b in pairs
            ),
        }


TABLES = {"quantisation": quantisation, "drafts": drafts, "batches": batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of shards")
    parser.add_argument("--model", default="sample-nano")
    parser.add_argument("--limit", type=int, default=600, help="utterances of each folder")
    parser.add_argument("--tables", choices=tuple(TABLES), nargs="+", default=list(TABLES))
    args = parser.parse_args()
    print(f"# {machine.describe()}")
    task = Task(args.data, args.limit)
    print(f"# {len(task.features)} utterances, {sum(map(len, task.wanted))} units")
    for name in args.tables:
        print(f"## {name}")
        for row in TABLES[name](task, args.model):
            print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
