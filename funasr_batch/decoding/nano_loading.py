"""From a converted Fun-ASR-Nano to what decodes with it: weights, tokenizer, prompt, batch size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from funasr_batch.decoding.ctc_branch import CtcBranch
from funasr_batch.decoding.generate import CAPACITY_STEP, LONGEST_BLOCK, StretchPlanner
from funasr_batch.decoding.kv_cache import bytes_per_row
from funasr_batch.decoding.lanes import cpu_streams
from funasr_batch.decoding.nano import Companion, DraftSource, NanoDecoding, longest_prompt
from funasr_batch.decoding.sampling import Sampling
from funasr_batch.decoding.speculative import Gate
from funasr_batch.errors import CheckpointError
from funasr_batch.models.layers import on_gpu
from funasr_batch.models.nano import FunAsrNano, NanoConfig
from funasr_batch.models.qwen3 import fuse, unfused_shapes
from funasr_batch.records import FRAME_MS
from funasr_batch.text.ctc_tokens import load_ctc_tokens
from funasr_batch.text.llm_tokenizer import LlmTokenizer, load_llm_tokenizer
from funasr_batch.text.prompt import build_prompt
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors
from funasr_batch.weights.quantize import (
    NONE,
    Quantization,
    dequantize_tensors,
    quantize_layers,
)
from funasr_batch.weights.quantized_checkpoint import load_tensors, plain_specs

MOST_ROWS_GPU, MOST_ROWS_CPU = 64, 8
"""Texts that are written together at most; benchmarks/RESULTS.md says what more would bring."""
CACHE_SHARE = 4
"""The cache of keys and values may take one part in so many of the memory."""


@dataclass(frozen=True, slots=True)
class NanoOptions:
    """How a loaded model is to be used."""

    language: str | None = None
    """As `text.prompt` names languages; None leaves it to the model."""
    itn: bool = True
    hotwords: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    drafts: frozenset[DraftSource] = frozenset()
    longest_segment: float = 30.0
    """Seconds: sets the size of a row of the cache."""
    guard_silence: bool = False
    """Whether segments may be silent, because no VAD chose them."""
    rows: int | None = None
    """Texts that are written together; chosen by the device and its memory otherwise."""
    planner: Callable[[], StretchPlanner] = Gate


def load_nano(
    checkpoint: Checkpoint,
    model: FunAsrNano,
    options: NanoOptions,
    companion: Companion | None = None,
    draft_model: NanoDecoding | None = None,
) -> NanoDecoding:
    """Makes a network (`load_network`) ready to decode.

    Raises CheckpointError when the tokenizer lacks a token of the prompt, and UsageError for a
    language that no Nano knows.
    """
    if checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer.json", hint="Convert the model again."
        )
    tokenizer = load_llm_tokenizer(checkpoint.tokenizer)
    ctc = None
    if model.config.ctc_vocabulary and checkpoint.ctc_vocabulary is not None:
        ctc = CtcBranch(model, load_ctc_tokens(checkpoint.ctc_vocabulary))
    prompt = build_prompt(
        tokenizer,
        language=options.language,
        itn=options.itn,
        hotwords=options.hotwords,
        think=bool(checkpoint.config.get("dataset_conf", {}).get("do_think", True)),
    )
    positions = longest_prompt(prompt, int(options.longest_segment * 1000 / FRAME_MS) + 1)
    return NanoDecoding(
        model=model,
        tokenizer=tokenizer,
        prompt=prompt,
        stops=_stops(checkpoint, tokenizer),
        sampling=options.sampling,
        rows=options.rows or _rows(model, positions + LONGEST_BLOCK + CAPACITY_STEP),
        drafts=options.drafts,
        planner=options.planner(),
        ctc=ctc,
        guard_silence=options.guard_silence,
        plain_features=checkpoint.cmvn is None,
        companion=companion,
        draft_model=draft_model,
        streams=cpu_streams(),
    )


def load_network(
    checkpoint: Checkpoint, dtype: mx.Dtype, quantization: Quantization = NONE
) -> FunAsrNano:
    """Builds the network of a checkpoint and fills it, holding no second copy of the weights.

    On a CPU, where products with quantised weights are slow, these are turned back into plain ones:
    the texts are those of the quantised model.

    Raises CheckpointError when the configuration lacks something that shapes the network, or a
    tensor is missing, unexpected or of another shape.
    """
    try:
        config = NanoConfig.from_checkpoint(checkpoint.config, _ctc_vocabulary(checkpoint))
    except KeyError as error:
        raise CheckpointError(f"the configuration of {checkpoint.folder} has no {error}") from error
    model = FunAsrNano(config)
    expected = unfused_shapes(model.parameters(), config.llm)
    check_tensors(plain_specs(checkpoint), expected, path=checkpoint.folder)
    tensors, plan = load_tensors(checkpoint, quantization, dtype)
    if on_gpu():
        quantize_layers(model, plan)
    elif plan:
        tensors = dequantize_tensors(tensors, plan, dtype)
    fuse(tensors)
    model.load_weights(list(tensors.items()), strict=True)
    tensors.clear()
    mx.eval(model.parameters())
    model.eval()
    return model


def _ctc_vocabulary(checkpoint: Checkpoint) -> int:
    head = checkpoint.specs.get("ctc.ctc_lo.weight")
    return head.shape[0] if head is not None else 0


def _stops(checkpoint: Checkpoint, tokenizer: LlmTokenizer) -> frozenset[int]:
    """The LLM's own end, and both tokens that end a turn."""
    own = checkpoint.config["llm_config"].get("eos_token_id")
    ends: Sequence[int] = own if isinstance(own, list) else () if own is None else (own,)
    return frozenset((*ends, tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>")))


def _rows(model: FunAsrNano, capacity: int) -> int:
    room = memory_of_device() // CACHE_SHARE
    fitting = room // bytes_per_row(model.config.llm, capacity, model.llm.dtype)
    return max(1, min(fitting, MOST_ROWS_GPU if on_gpu() else MOST_ROWS_CPU))


def memory_of_device() -> int:
    """Bytes that the default device may use."""
    if on_gpu():
        about = mx.device_info()
        for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if isinstance(about.get(name), int):
                return int(about[name])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
