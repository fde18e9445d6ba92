"""Fun-ASR-Nano at full size with random weights: how fast it encodes and writes, in what memory.

python nano_speed.py decode --dtype bf16 --batches 1 8 32 128 --rival mlx-lm
python nano_speed.py drafts --dtype bf16 --batches 1 8 32 --acceptance 0.5 0.7 0.9
python nano_speed.py encode --dtype bf16 --batches 1 8 32 128
python nano_speed.py latency --dtype bf16
python nano_speed.py memory --dtype bf16

Random weights never end a text, so every row gets a fixed number of tokens. Prompts are of 60 to
120 positions, as those of segments of a few seconds to half a minute are, so rows are at different
places. A whole run, not counted, goes before the measured ones; a rival runs in a process of its
own right after ours. With simulated acceptance, a draft's tokens are taken for right with the given
probability each, whatever the random network says: what is measured is what such drafts would save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import machine
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from funasr_batch.cpu import prepare_cpu

prepare_cpu()

import mlx.core as mx
from nano_model import random_nano
from rivals_nano import QWEN3

from funasr_batch.decoding import generate as generating
from funasr_batch.decoding.generate import Request, Tally, generate
from funasr_batch.decoding.speculative import Always, Gate
from funasr_batch.frontend import FrontEnd
from funasr_batch.models.nano import FunAsrNano, audio_tokens
from funasr_batch.weights.quantize import NONE, Quantization

PLANS = {"bf16": NONE, "float32": NONE, "8bit": Quantization(8, 8), "4bit": Quantization(8, 4)}
RIVAL_DTYPES = ("bf16", "float32", "8bit", "4bit")


def model_of(dtype: str, *, ctc: bool = False) -> FunAsrNano:
    mx.clear_cache()
    kind = mx.float32 if dtype == "float32" else mx.bfloat16
    return random_nano(kind, PLANS[dtype], ctc=ctc)


def prompts(count: int, dtype: mx.Dtype, *, even: bool) -> list[mx.array]:
    rng = np.random.default_rng(1)
    lengths = [90] * count if even else rng.integers(60, 121, count).tolist()
    rows = [mx.random.normal((length, QWEN3["hidden_size"])).astype(dtype) for length in lengths]
    mx.eval(rows)
    return rows


class Guesses:
    """A draft that always has as many tokens as it may."""

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        return [0] * limit


def simulate_acceptance(probability: float) -> None:
    rng = np.random.default_rng(7)

    def accepted(draft: Sequence[int], choices: Sequence[int]) -> int:
        wrong = np.flatnonzero(rng.random(len(draft)) >= probability)
        return int(wrong[0]) if len(wrong) else len(draft)

    generating.accepted = accepted


def decode(model: FunAsrNano, batch: int, tokens: int, repeats: int, **options: object) -> dict:
    """Median seconds and tokens a second of `repeats` runs."""
    even = bool(options.pop("even", False))
    draft = options.pop("draft", None)
    rows = prompts(batch, model.llm.dtype, even=even)
    requests = [Request(row, tokens, draft) for row in rows]
    tallies: list[Tally] = []
    for _ in range(repeats + 1):
        mx.reset_peak_memory()
        texts, tally = generate(model.llm, requests, stops=frozenset(), rows=batch, **options)
        assert all(len(text.ids) == tokens for text in texts)
        tallies.append(tally)
    measured = tallies[1:]
    seconds = statistics.median(tally.generate_seconds for tally in measured)
    return {
        "batch": batch,
        "prefill_seconds": round(statistics.median(t.prefill_seconds for t in measured), 4),
        "tokens_per_second": round(batch * (tokens - 1) / seconds, 1),
        "steps_per_second": round(measured[-1].passes / seconds, 1),
        "passes": measured[-1].passes,
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
    }


def decode_table(args: argparse.Namespace) -> Iterator[dict]:
    for dtype in args.dtype:
        model = model_of(dtype)
        for batch in args.batches:
            for even in (False, True) if batch > 1 and args.even else (False,):
                row = decode(model, batch, args.tokens, args.repeats, even=even)
                yield {"what": "decode", "dtype": dtype, "even": even, **row}
        del model
        for rival in args.rival:
            yield from rival_rows(rival, dtype, args)


def rival_rows(rival: str, dtype: str, args: argparse.Namespace) -> Iterator[dict]:
    command = [
        *(args.rival_python or sys.executable, str(Path(__file__).with_name("rivals_nano.py"))),
        *("--rival", rival, "--dtype", dtype, "--tokens", str(args.tokens)),
        *("--repeats", str(args.repeats), "--batches", *map(str, args.batches)),
    ]
    mx.clear_cache()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield {"what": "rival", **json.loads(line)}


def draft_table(args: argparse.Namespace) -> Iterator[dict]:
    for dtype in args.dtype:
        model = model_of(dtype)
        for batch in args.batches:
            plain = decode(model, batch, args.tokens, args.repeats)
            yield {"what": "plain", "dtype": dtype, **plain}
            for acceptance in args.acceptance:
                simulate_acceptance(acceptance)
                for name, planner in (("always", Always("drafted")), ("gate", Gate())):
                    row = decode(
                        model, batch, args.tokens, args.repeats, draft=Guesses(), planner=planner
                    )
                    gain = row["tokens_per_second"] / plain["tokens_per_second"]
                    yield {
                        "what": f"drafts, {name}",
                        "dtype": dtype,
                        "acceptance": acceptance,
                        **row,
                        "gain": round(gain, 2),
                    }


def encode_table(args: argparse.Namespace) -> Iterator[dict]:
    for dtype in args.dtype:
        model = model_of(dtype)
        for batch in args.batches:
            features = mx.random.normal((batch, 167, 560)) * 3 + 10
            lengths = mx.array(np.linspace(120, 167, batch).astype(np.int32)) if batch > 1 else None

            seconds = median_of(partial(encode_once, model, features, lengths), args.repeats)
            yield {
                "what": "encode + adaptor, 10 s clips",
                "dtype": dtype,
                "batch": batch,
                "seconds": round(seconds, 4),
                "times_real_time": round(10 * batch / seconds),
            }


def encode_once(model: FunAsrNano, features: mx.array, lengths: mx.array | None) -> None:
    mx.eval(model.adapt(model.encode(features, lengths), lengths))


def latency_table(args: argparse.Namespace) -> Iterator[dict]:
    """One second of audio, warm, stage by stage; the text has 6 tokens."""
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
    frontend = FrontEnd(7, 6, None)
    for dtype in args.dtype:
        model = model_of(dtype)
        features = frontend.features(samples)
        batch = mx.array(features[None])
        memory = model.encode(batch, None)
        audio = model.adapt(memory, None)[0, : audio_tokens(len(features))]
        around = mx.random.normal((23, QWEN3["hidden_size"])).astype(model.llm.dtype)
        prompt = mx.concatenate([around, audio.astype(around.dtype)])
        mx.eval(prompt)
        tallies: list[Tally] = []

        def write(
            model: FunAsrNano = model, prompt: mx.array = prompt, tallies: list[Tally] = tallies
        ) -> None:
            request = Request(prompt, 6)
            tallies.append(generate(model.llm, [request], stops=frozenset(), rows=1)[1])

        stages = {
            "features": median_of(lambda: frontend.features(samples), args.repeats),
            "encode + adaptor": median_of(partial(encode_once, model, batch, None), args.repeats),
            "prefill + 6 tokens": median_of(write, args.repeats),
        }
        stages["of which prefill"] = statistics.median(t.prefill_seconds for t in tallies[1:])
        total = sum(seconds for name, seconds in stages.items() if not name.startswith("of"))
        milliseconds = {name: round(1000 * seconds, 2) for name, seconds in stages.items()}
        yield {
            "what": "latency of 1 s, ms",
            "dtype": dtype,
            **milliseconds,
            "total": round(1000 * total, 2),
        }


def memory_table(args: argparse.Namespace) -> Iterator[dict]:
    """Bytes of the weights, and the peak while 30 s are encoded and 150 tokens written."""
    for name, dtype, plan in (
        ("float32", mx.float32, NONE),
        ("bf16", mx.bfloat16, NONE),
        ("encoder=8", mx.bfloat16, Quantization(8, None)),
        ("encoder=8,llm=8", mx.bfloat16, Quantization(8, 8)),
        ("encoder=8,llm=4", mx.bfloat16, Quantization(8, 4)),
    ):
        mx.clear_cache()
        model = random_nano(dtype, plan)
        parts = {
            part: sum(value.nbytes for value in flat(model[part].parameters()))
            for part in ("audio_encoder", "audio_adaptor", "llm")
        }
        mx.reset_peak_memory()
        memory = model.encode(mx.random.normal((1, 500, 560)) + 10, None)
        audio = model.adapt(memory, None)[0].astype(model.llm.dtype)
        around = mx.random.normal((23, QWEN3["hidden_size"])).astype(model.llm.dtype)
        prompt = mx.concatenate([around, audio])
        generate(model.llm, [Request(prompt, 150)], stops=frozenset(), rows=1)
        yield {
            "what": "memory",
            "plan": name,
            **{f"{part} MB": round(size / 1e6, 1) for part, size in parts.items()},
            "weights GB": round(sum(parts.values()) / 1e9, 3),
            "peak GB": round(mx.get_peak_memory() / 1e9, 3),
        }
        del model, memory, audio, prompt


def flat(parameters: dict) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(parameters)]


def median_of(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(max(3, repeats)):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


TABLES = {
    "decode": decode_table,
    "drafts": draft_table,
    "encode": encode_table,
    "latency": latency_table,
    "memory": memory_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=tuple(TABLES))
    parser.add_argument("--dtype", choices=tuple(PLANS), nargs="+", default=["bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--even", action="store_true", help="also with prompts of equal length")
    parser.add_argument("--rival", choices=("mlx-lm", "transformers"), nargs="*", default=[])
    parser.add_argument("--rival-python", help="the Python that has the rival")
    args = parser.parse_args()
    about = mx.device_info()
    print(f"# {machine.describe()}, {about.get('device_name') or about.get('architecture')}")
    for row in TABLES[args.table](args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
