"""A Paraformer with random weights that is small enough to run in any test.

Its texts are nonsense, but they depend on the audio and on nothing else: a few tokens a second,
Chinese and English, with all that a real checkpoint has (CMVN, special tokens, word pieces).
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from funasr_batch.models.paraformer import Paraformer, ParaformerConfig
from funasr_batch.weights.checkpoint import write_checkpoint
from funasr_batch.weights.safetensors_file import TensorSpec

TOKENS = (
    "<blank>", "<s>", "</s>",
    *"今天气很好我们去公园吧语音识别",
    "hello", "wor@@", "ld", "test@@", "ing", "to", "day", "mod@@", "el", "a", "ok", "yes",
    "<unk>",
)  # fmt: skip

WIDTH = 16


def write_tiny_model(folder: Path, *, seed: int = 0, timestamp_head: bool = False) -> Path:
    """Writes a converted checkpoint to `folder`, which must not exist, and returns it.

    The same seed gives the same bytes. `timestamp_head` makes it a BiCifParaformer.
    """
    config = _config(timestamp_head)
    parameters = tree_flatten(
        Paraformer(ParaformerConfig.from_checkpoint(config, len(TOKENS))).parameters()
    )
    arrays = {name: _random(name, value, seed) for name, value in parameters}
    # Log-mel energies of speech at int16 scale lie around 10; digital silence is at -16.
    cmvn = np.full(560, -10.0, np.float32), np.full(560, 0.3, np.float32)
    write_checkpoint(
        folder,
        architecture="BiCifParaformer" if timestamp_head else "Paraformer",
        config=config,
        tokens=TOKENS,
        cmvn=cmvn,
        tensors={name: TensorSpec("F32", array.shape) for name, array in arrays.items()},
        read=arrays.__getitem__,
    )
    return folder


def _config(timestamp_head: bool) -> dict[str, Any]:
    block = {"attention_heads": 2, "linear_units": 2 * WIDTH, "num_blocks": 2, "kernel_size": 11}
    predictor: dict[str, Any] = {"tail_threshold": 0.45}
    if timestamp_head:
        predictor |= {
            "upsample_type": "cnn_blstm",
            "use_cif1_cnn": False,
            "upsample_times": 3,
            "smooth_factor2": 0.25,
            "noise_threshold2": 0.01,
        }
    return {
        "encoder_conf": {**block, "output_size": WIDTH},
        "decoder_conf": {**block, "att_layer_num": 2},
        "predictor": "CifPredictorV3" if timestamp_head else "CifPredictorV2",
        "predictor_conf": predictor,
        "frontend_conf": {"fs": 16000, "n_mels": 80, "lfr_m": 7, "lfr_n": 6},
    }


def _random(name: str, parameter: mx.array, seed: int) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = generator.standard_normal(parameter.shape)
    if "norm" in name:
        values = 0.1 * values + name.endswith("weight")
    elif name.endswith("bias") or values.ndim == 1:
        values = 0.1 * values
    else:
        values /= math.sqrt(values[0].size)
    if name == "decoder.output_layer.weight":
        values *= 3
    elif name == "predictor.cif_output.weight":
        values *= 2
    elif name == "predictor.cif_output.bias":
        values -= 1.5  # sigmoid(-1.5) = 0.18 of a token in 60 ms: about four tokens a second
    return values.astype(np.float32)
