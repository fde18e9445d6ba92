"""A full-size Fun-ASR-Nano with random weights, made on the device."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from rivals_nano import QWEN3

from funasr_batch.models.nano import FunAsrNano, NanoConfig
from funasr_batch.weights.quantize import Quantization, quantize_layers

CTC_VOCABULARY = 60515

CONFIG: dict[str, Any] = {
    "model": "FunASRNano",
    "audio_encoder": "SenseVoiceEncoderSmall",
    "audio_encoder_conf": {
        "output_size": 512,
        "attention_heads": 4,
        "linear_units": 2048,
        "num_blocks": 50,
        "tp_blocks": 20,
        "kernel_size": 11,
        "sanm_shfit": 0,
    },
    "audio_adaptor": "Transformer",
    "audio_adaptor_conf": {
        "downsample_rate": 1,
        "use_low_frame_rate": True,
        "ffn_dim": 2048,
        "llm_dim": 1024,
        "encoder_dim": 512,
        "n_layer": 2,
    },
    "ctc_decoder": "Transformer",
    "ctc_decoder_conf": {
        "downsample_rate": 1,
        "ffn_dim": 2048,
        "llm_dim": 512,
        "encoder_dim": 512,
        "n_layer": 5,
    },
    "frontend_conf": {"fs": 16000, "n_mels": 80, "lfr_m": 7, "lfr_n": 6, "cmvn_file": None},
    "llm_config": QWEN3,
}
"""The published configuration of Fun-ASR-Nano-2512 as far as it shapes the network."""


def random_nano(dtype: mx.Dtype, plan: Quantization, *, ctc: bool = False) -> FunAsrNano:
    """The network with MLX's own initialisation, its layers quantised as `plan` says."""
    config = NanoConfig.from_checkpoint(CONFIG, CTC_VOCABULARY if ctc else 0)
    model = FunAsrNano(config)
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    quantize_layers(model, plan)
    mx.eval(model.parameters())
    model.eval()
    return model
