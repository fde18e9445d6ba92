"""Writes a `FunASRNano` in FunASR's layout: every file that one has, and few numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch_files import write_pt

WIDTH = 64
BLOCKS = 2
"""Of the CTC head."""

VOCABULARY = {"h": 0, "i": 1, "hi": 2, "Ġ": 3, "Ċ": 4, "å": 5, "¥": 6, "½": 7, "å¥": 8, "å¥½": 9}
MERGES = "#version: 0.2\nh i\nå ¥\nå¥ ½\n"
ADDED = {10: "<|endoftext|>", 11: "<|im_start|>", 12: "<|im_end|>", 13: "<think>"}
LLM_CONFIG: Mapping[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "vocab_size": 16,
    "hidden_size": WIDTH,
}
CONFIG: Mapping[str, Any] = {
    "model": "FunASRNano",
    "audio_encoder": "SenseVoiceEncoderSmall",
    "audio_encoder_conf": {"output_size": WIDTH},
    "audio_adaptor": "Transformer",
    "audio_adaptor_conf": {"llm_dim": WIDTH},
    "llm": "Qwen3-0.6b",
    "llm_conf": {"init_param_path": "Qwen3-0.6B", "llm_dtype": "bf16"},
    "ctc_decoder": "Transformer",
    "ctc_decoder_conf": {"n_layer": BLOCKS, "ffn_dim": 8},
    "dataset_conf": {"ctc_tokenizer": "SenseVoiceTokenizer", "do_think": True},
    "frontend_conf": {"n_mels": 80, "lfr_m": 7, "lfr_n": 6, "cmvn_file": None},
    "tokenizer": "HuggingfaceTokenizer",
    "tokenizer_conf": {"init_param_path": "${llm_conf.init_param_path}"},
    "optim_conf": {"lr": 0.1},
}


def write_nano_folder(folder: Path, *, arrays: Mapping[str, np.ndarray] | None = None) -> Path:
    """A complete model with a CTC head; `arrays` are tensors of one's own instead of all."""
    llm = folder / "Qwen3-0.6B"
    llm.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(CONFIG)), "utf-8")
    (folder / "multilingual.tiktoken").write_bytes(b"aA== 0\naQ== 1\n")
    (llm / "config.json").write_text(json.dumps(LLM_CONFIG), "utf-8")
    (llm / "vocab.json").write_text(json.dumps(VOCABULARY, ensure_ascii=False), "utf-8")
    (llm / "merges.txt").write_text(MERGES, "utf-8")
    added = {str(i): {"content": text, "special": i < 13} for i, text in ADDED.items()}
    (llm / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    write_pt(folder / "model.pt", nano_arrays() if arrays is None else arrays)
    return folder


def nano_arrays(*, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of every namespace; those of the language model in bfloat16, as uint16."""
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    def bfloat16(*shape: int) -> np.ndarray:
        return (values(*shape).view(np.uint32) >> 16).astype(np.uint16)

    embedding = bfloat16(16, WIDTH)
    arrays = {
        "audio_encoder.encoders0.0.self_attn.linear_q_k_v.weight": values(12, 560),
        "audio_encoder.encoders.0.feed_forward.w_1.weight": values(6, WIDTH),
        "audio_encoder.encoders.0.feed_forward.w_1.bias": values(6),
        "audio_encoder.encoders.0.self_attn.fsmn_block.weight": values(WIDTH, 1, 11),
        "audio_encoder.encoders.0.norm1.weight": values(WIDTH),
        "audio_adaptor.linear1.weight": values(4, 96),
        "llm.model.embed_tokens.weight": embedding,
        "llm.model.layers.0.mlp.up_proj.weight": bfloat16(128, WIDTH),
        "llm.model.layers.0.self_attn.q_norm.weight": bfloat16(32),
        "llm.model.norm.weight": bfloat16(WIDTH),
        "llm.lm_head.weight": embedding,
    }
    layers = ["ctc_decoder.linear1", "ctc_decoder.linear2", "ctc.ctc_lo"]
    for block in range(BLOCKS):
        for part in ("norm1", "norm2", "feed_forward.w_1", "feed_forward.w_2"):
            layers.append(f"ctc_decoder.blocks.{block}.{part}")
        for letter in ("q", "k", "v", "out"):
            layers.append(f"ctc_decoder.blocks.{block}.self_attn.linear_{letter}")
    for layer in layers:
        arrays[f"{layer}.weight"] = values(4, WIDTH)
        arrays[f"{layer}.bias"] = values(4)
    return arrays
