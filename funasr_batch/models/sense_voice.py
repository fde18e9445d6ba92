"""The SenseVoice encoder of Fun-ASR-Nano: two stacks of SAN-M blocks, each with a final norm.

Source: FunASR funasr/models/sense_voice/model.py, SenseVoiceEncoderSmall. It differs from
Paraformer's encoder in its second stack and in the epsilon of its norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from funasr_batch.models.layers import LayerNorm, SanmEncoderLayer, sinusoidal_positions

SENSE_VOICE_EPS = 1e-5
"""LayerNorm epsilon of this encoder; Paraformer's is 1e-12."""


@dataclass(frozen=True, slots=True)
class SenseVoiceConfig:
    """The numbers of a checkpoint's config.yaml that shape the encoder."""

    feature_width: int
    width: int
    heads: int
    units: int
    blocks: int
    tp_blocks: int
    kernel: int
    shift: int

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> SenseVoiceConfig:
        """Reads `audio_encoder_conf` and `frontend_conf`. Raises KeyError for what is missing."""
        encoder, frontend = config["audio_encoder_conf"], config["frontend_conf"]
        return cls(
            feature_width=frontend["lfr_m"] * frontend["n_mels"],
            width=encoder["output_size"],
            heads=encoder["attention_heads"],
            units=encoder["linear_units"],
            blocks=encoder["num_blocks"],
            tp_blocks=encoder.get("tp_blocks", 0),
            kernel=encoder.get("kernel_size", 11),
            shift=encoder.get("sanm_shfit", 0),
        )


class SenseVoiceEncoder(nn.Module):
    """Features to hidden states, one for each 60 ms frame."""

    def __init__(self, config: SenseVoiceConfig) -> None:
        super().__init__()

        def layer(in_width: int) -> SanmEncoderLayer:
            return SanmEncoderLayer(
                in_width,
                config.width,
                config.heads,
                config.units,
                config.kernel,
                config.shift,
                SENSE_VOICE_EPS,
            )

        self.encoders0 = [layer(config.feature_width)]
        self.encoders = [layer(config.width) for _ in range(config.blocks - 1)]
        self.tp_encoders = [layer(config.width) for _ in range(config.tp_blocks)]
        self.after_norm = LayerNorm(config.width, eps=SENSE_VOICE_EPS)
        self.tp_norm = LayerNorm(config.width, eps=SENSE_VOICE_EPS)
        self._scale = config.width**0.5

    def __call__(self, features: mx.array, mask: mx.array | None) -> mx.array:
        """features float32 [B, L, 560], mask bool [B, L] or None -> [B, L, D].

        Rows past an item's length are undefined.
        """
        positions = sinusoidal_positions(features.shape[1], features.shape[2])
        x = (features * self._scale + positions).astype(self.after_norm.weight.dtype)
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, mask)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = layer(x, mask)
        return self.tp_norm(x)
