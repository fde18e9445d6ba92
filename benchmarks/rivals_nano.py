"""Rivals of our batched decoder: Qwen3-0.6B with random weights, a fixed number of tokens.

python rivals_nano.py --rival mlx-lm --dtype bf16 --batches 1 8 32 128
python rivals_nano.py --rival transformers --dtype float32 --batches 1 8

Needs nothing but the rival: mlx-lm, or PyTorch and transformers. Each rival runs its own code with
its own defaults, on the GPU where there is one: mlx-lm's `generate_step` for one prompt and its
`BatchGenerator` for more, transformers' greedy `generate`. One line of JSON for each batch size.

Random weights never stop by themselves, and no stop token is given. Decoding is timed from the
first token to the last, so `tokens_per_second` does not contain the prompt; `prefill_seconds` ends
with the first token. A whole run, not counted, goes before the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(Path(__file__).parents[1]))

GROUP_SIZE = 64
BITS = {"8bit": 8, "4bit": 4}

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""Qwen3-0.6B, the language model of Fun-ASR-Nano."""

TINY = QWEN3 | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}
"""To see that a rival runs at all."""


@dataclass(frozen=True, slots=True)
class Task:
    batch: int
    prompt: int
    """Tokens of every prompt."""
    tokens: int
    """New tokens of every row; at least 2."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    prefill: float
    """Until every row has its first token."""
    decode: float
    """From there to the last token: `Task.tokens - 1` steps."""


@dataclass(frozen=True, slots=True)
class Rival:
    run: Callable[[Task], Timing]
    peak_memory: Callable[[], int]
    """Bytes on the device since the last call; 0 where the rival cannot tell."""
    facts: dict[str, Any]
    """For the output: versions, device and settings that differ from what one would expect."""


def mlx_lm(config: dict[str, Any], dtype: str) -> Rival:
    from funasr_batch.cpu import prepare_cpu

    blas = prepare_cpu()  # before mlx: without it the CPU is 40 times slower

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models.qwen3 import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.float32 if dtype == "float32" else mx.bfloat16)
    if dtype in BITS:  # like mlx_lm.convert: every linear layer and the embedding
        nn.quantize(model, GROUP_SIZE, BITS[dtype])
    mx.eval(model.parameters())
    gpu = mx.default_device() == mx.Device(mx.gpu)

    def single(task: Task) -> Iterator[object]:
        prompt = mx.array(_prompts(task, config)[0])
        return generate_step(prompt, model, max_tokens=task.tokens + 1)

    def several(task: Task) -> Iterator[object]:
        generator = BatchGenerator(
            model, completion_batch_size=task.batch, prefill_batch_size=task.batch
        )
        # One token more than is waited for: what it does to a finished row is not decoding.
        generator.insert(_prompts(task, config), [task.tokens + 1] * task.batch)
        while responses := generator.next_generated():
            assert len(responses) == task.batch, "the batch has fallen apart"
            yield responses

    def run(task: Task) -> Timing:
        started = time.perf_counter()
        steps = single(task) if task.batch == 1 else several(task)
        next(steps)
        first = time.perf_counter()
        for _ in range(task.tokens - 1):
            next(steps)
        last = time.perf_counter()
        del steps
        mx.synchronize()
        mx.clear_cache()
        return Timing(first - started, last - first)

    def peak_memory() -> int:
        peak = int(mx.get_peak_memory())
        mx.reset_peak_memory()
        return peak

    facts = {
        "version": version("mlx-lm"),
        "mlx": mx.__version__,
        "device": mx.device_info()["device_name"] if gpu else f"CPU, {blas.kind}",
        "tf32": gpu and os.environ.get("MLX_ENABLE_TF32") != "0",
        "weights": sum(p.nbytes for _, p in tree_flatten(model.parameters())),
    }
    return Rival(run, peak_memory, facts)


def transformers(config: dict[str, Any], dtype: str) -> Rival:
    if dtype in BITS:
        raise SystemExit("transformers quantises with bitsandbytes only: take bf16 or float32")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    given = {name: value for name, value in config.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    settings = Qwen3Config(**given, rope_parameters=rope)
    with torch.device(device):
        model = Qwen3ForCausalLM(settings)
    model = model.to(torch.float32 if dtype == "float32" else torch.bfloat16).eval()

    def generate(ids: torch.Tensor, tokens: int) -> float:
        started = time.perf_counter()
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        if gpu:
            torch.cuda.synchronize()
        assert result.shape[1] == ids.shape[1] + tokens, "it stopped early"
        return time.perf_counter() - started

    def run(task: Task) -> Timing:
        ids = torch.tensor(_prompts(task, config), device=device)
        prefill = generate(ids, 1)
        return Timing(prefill, generate(ids, task.tokens) - prefill)

    def peak_memory() -> int:
        if not gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    facts = {
        "version": version("transformers"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "tf32": gpu and torch.backends.cuda.matmul.allow_tf32,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "attention": model.config._attn_implementation,
    }
    return Rival(run, peak_memory, facts)


def measure(rival: Rival, task: Task, repeats: int) -> dict[str, Any]:
    """One line of the output; rates are of the median of the repeats."""
    rival.run(task)
    rival.peak_memory()
    timings = [rival.run(task) for _ in range(repeats)]
    steps = task.tokens - 1
    decode = statistics.median(timing.decode for timing in timings)
    return {
        "batch": task.batch,
        "prompt": task.prompt,
        "tokens": task.tokens,
        "prefill_seconds": round(statistics.median(timing.prefill for timing in timings), 4),
        "tokens_per_second": round(task.batch * steps / decode, 1),
        "steps_per_second": round(steps / decode, 2),
        "repeats": repeats,
        "median": round(decode, 4),
        "decode_seconds": [round(timing.decode, 4) for timing in timings],
        "peak_memory": rival.peak_memory(),
    }


def _prompts(task: Task, config: dict[str, Any]) -> list[list[int]]:
    """Different ids in every row, the same in every run and for every rival."""
    largest = config["vocab_size"]
    return [
        [(7919 * (row * task.prompt + place) + 13) % largest for place in range(task.prompt)]
        for row in range(task.batch)
    ]


RIVALS = {"mlx-lm": mlx_lm, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rival", choices=tuple(RIVALS), required=True)
    parser.add_argument("--dtype", choices=("bf16", "float32", *BITS), default="bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=90, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a trial")
    arguments = parser.parse_args()
    if arguments.tokens < 2:
        parser.error("--tokens: at least 2, the first belongs to the prompt")

    print(machine.describe(), file=sys.stderr)
    config = TINY if arguments.tiny else QWEN3
    rival = RIVALS[arguments.rival](config, arguments.dtype)
    for batch in arguments.batches:
        task = Task(batch, arguments.prompt, arguments.tokens)
        line = {"rival": arguments.rival, **rival.facts, "dtype": arguments.dtype}
        print(json.dumps(line | measure(rival, task, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
