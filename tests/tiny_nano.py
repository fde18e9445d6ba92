"""A Fun-ASR-Nano with random weights that is small enough to run in any test.

Its texts are nonsense that depends on the audio and never ends of itself. Its tokenizer and the
vocabulary of its CTC head are byte-level and have a few hundred characters and words besides, which
it prefers, so that there is something to read.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from funasr_batch.models.nano import FunAsrNano, NanoConfig
from funasr_batch.models.qwen3 import unfused_shapes
from funasr_batch.text.byte_level import from_bytes
from funasr_batch.weights.checkpoint import (
    CTC_VOCABULARY_FILE,
    TOKENIZER_FILE,
    write_checkpoint,
)
from funasr_batch.weights.safetensors_file import TensorSpec

WIDTH = 32
CHARACTERS = [chr(0x4E00 + 7 * number) for number in range(200)]
WORDS = [f" {a}{b}{c}" for a in "bdkmt" for b in "aeiou" for c in ("ling", "ton", "rem", "sy")]
MARKS = ["，", "。", "？"]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

PIECES = [bytes([byte]) for byte in range(256)] + [
    piece.encode() for piece in (*CHARACTERS, *WORDS, *MARKS)
]
"""The text of each token below the special ones."""
VOCABULARY = len(PIECES) + len(SPECIAL)
BEGINNINGS = {piece[:size] for piece in PIECES[256:] for size in range(2, len(piece))}
LABEL_PIECES = [*PIECES[:256], *sorted(BEGINNINGS, key=lambda piece: (len(piece), piece))]
LABEL_PIECES += PIECES[256:]
"""The text of each label of the CTC head. It joins two pieces at a time, so there is a piece for
every beginning of a piece."""
LABELS = len(LABEL_PIECES) + 1
"""With the blank."""


def write_tiny_nano(
    folder: Path,
    *,
    seed: int = 0,
    ctc: bool = True,
    special: Sequence[str] = SPECIAL,
    without: Sequence[str] = (),
) -> Path:
    """Writes a converted checkpoint to `folder`, which must not exist, and returns it.

    `special` are the tokens that are not text; `without` are files that are left out.
    """
    config = _config()
    network = NanoConfig.from_checkpoint(config, LABELS if ctc else 0)
    shapes = unfused_shapes(FunAsrNano(network).parameters(), network.llm)
    arrays = {name: _random(name, shape, seed) for name, shape in shapes.items()}
    files = {TOKENIZER_FILE: _tokenizer(special), CTC_VOCABULARY_FILE: _ctc_vocabulary()}
    write_checkpoint(
        folder,
        architecture="FunASRNano",
        config=config,
        tokens=None,
        cmvn=None,
        tensors={name: TensorSpec("F32", array.shape) for name, array in arrays.items()},
        read=arrays.__getitem__,
        files={name: content for name, content in files.items() if name not in without},
    )
    return folder


def _config() -> dict[str, Any]:
    adaptor = {"downsample_rate": 1, "encoder_dim": WIDTH, "llm_dim": WIDTH, "ffn_dim": 2 * WIDTH}
    return {
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_encoder_conf": {
            "output_size": WIDTH,
            "attention_heads": 2,
            "linear_units": 2 * WIDTH,
            "num_blocks": 2,
            "tp_blocks": 1,
            "kernel_size": 11,
        },
        "audio_adaptor": "Transformer",
        "audio_adaptor_conf": {**adaptor, "n_layer": 2, "use_low_frame_rate": True},
        "ctc_decoder_conf": {**adaptor, "n_layer": 1},
        "llm_config": {
            "vocab_size": VOCABULARY + 3,  # as in Qwen3, more rows than tokens
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 2 * WIDTH,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "eos_token_id": len(PIECES) + 2,
        },
        "frontend_conf": {"fs": 16000, "n_mels": 80, "lfr_m": 7, "lfr_n": 6},
    }


def _random(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = generator.standard_normal(shape)
    if "norm" in name:
        values = 0.1 * values + name.endswith("weight")
    elif name.endswith("bias") or values.ndim == 1:
        values = 0.1 * values
    elif "embed_tokens" in name:
        rows = np.full((len(values), 1), 0.05)  # what is not to be said
        rows[256 : len(PIECES)] = 0.6
        values *= rows
    else:
        values /= math.sqrt(values[0].size)
    if "llm.model.layers" in name and "norm" not in name:
        values *= 3  # beside the embedding; otherwise the newest token is said again and again
    elif name.startswith("ctc.ctc_lo"):
        values *= 3
        values[: 256 + len(BEGINNINGS)] *= 0.05
        values[-1] *= 2
    return values.astype(np.float32)


def _tokenizer(special: Sequence[str]) -> bytes:
    vocab = {from_bytes(piece): id for id, piece in enumerate(PIECES)}
    added = [
        {
            "id": len(PIECES) + number,
            "content": name,
            "special": "think" not in name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, name in enumerate(special)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": r" ?[A-Za-z]+|\p{Han}|[^A-Za-z\p{Han}]"},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "decoder": {"type": "ByteLevel"},
        # Words are taken whole where they are in the vocabulary, else byte by byte.
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True},
    }
    return json.dumps(spec).encode()


def _ctc_vocabulary() -> bytes:
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(LABEL_PIECES)]
    return b"".join(lines)
