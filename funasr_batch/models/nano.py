"""Fun-ASR-Nano: a SenseVoice encoder and an adaptor that turn speech into tokens of an LLM.

Source: FunASR funasr/models/fun_asr_nano/model.py and funasr/models/llm_asr/adaptor.py
(Transformer). Shapes: B segments, L encoder frames of 60 ms, A = ceil(L / 8) audio tokens, D the
encoder's width, H the LLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from funasr_batch.errors import CheckpointError
from funasr_batch.models.layers import (
    PARAFORMER_EPS,
    FeedForward,
    LayerNorm,
    attend,
    length_mask,
)
from funasr_batch.models.qwen3 import Qwen3, Qwen3Config
from funasr_batch.models.sense_voice import SenseVoiceConfig, SenseVoiceEncoder

ARCHITECTURES = ("FunASRNano",)

FRAMES_PER_TOKEN = 8
"""Encoder frames to one audio token: 480 ms."""


def audio_tokens(frames: int) -> int:
    """How many audio tokens the LLM is given for a segment of so many frames.

    Equal to FunASR's three rounds of halving (fun_asr_nano/model.py, data_load_speech).
    """
    return -(-frames // FRAMES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class AdaptorConfig:
    """The numbers that shape an adaptor, or the CTC decoder, which is of the same class."""

    in_width: int
    width: int
    units: int
    blocks: int
    heads: int
    stack: int
    """Frames that are joined into one row before the first layer."""

    @classmethod
    def from_checkpoint(cls, conf: Mapping[str, Any]) -> AdaptorConfig:
        """Reads `audio_adaptor_conf` or `ctc_decoder_conf`. Raises KeyError for what is missing."""
        return cls(
            in_width=conf["encoder_dim"],
            width=conf["llm_dim"],
            units=conf.get("ffn_dim", 2048),
            blocks=conf.get("n_layer", 5),
            heads=conf.get("attention_heads", 8),
            stack=conf.get("downsample_rate", 2),
        )


@dataclass(frozen=True, slots=True)
class NanoConfig:
    """Everything that shapes the network."""

    encoder: SenseVoiceConfig
    adaptor: AdaptorConfig
    llm: Qwen3Config
    ctc_decoder: AdaptorConfig | None
    ctc_vocabulary: int
    """Labels of the CTC head with the blank, which is the last; 0 without a head."""

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], ctc_vocabulary: int = 0) -> NanoConfig:
        """Reads FunASR's config with the LLM's under `llm_config`.

        `ctc_vocabulary` is the number of rows of the checkpoint's `ctc.ctc_lo.weight`, 0 where it
        has none. Raises KeyError for what is missing and CheckpointError for a network that is not
        built here.
        """
        kinds = (config.get("audio_encoder"), config.get("audio_adaptor"))
        if kinds != ("SenseVoiceEncoderSmall", "Transformer"):
            raise CheckpointError(f"the audio encoder and adaptor {kinds} are not supported")
        conf = config["audio_adaptor_conf"]
        adaptor = AdaptorConfig.from_checkpoint(conf)
        low_frame_rate = conf.get("use_low_frame_rate", False)
        if not low_frame_rate or adaptor.stack not in (1, FRAMES_PER_TOKEN):
            raise CheckpointError(
                "the adaptor does not give one audio token for each 8 frames: use_low_frame_rate "
                f"is {low_frame_rate}, downsample_rate {adaptor.stack}"
            )
        llm = Qwen3Config.from_checkpoint(config["llm_config"])
        if llm.width != adaptor.width:
            raise CheckpointError(
                f"the adaptor makes tokens of {adaptor.width}, the LLM takes {llm.width}"
            )
        ctc_decoder = None
        if ctc_vocabulary:
            ctc_decoder = AdaptorConfig.from_checkpoint(config["ctc_decoder_conf"])
            if ctc_decoder.stack != 1:
                raise CheckpointError("a CTC decoder that joins frames is not supported")
        return cls(
            encoder=SenseVoiceConfig.from_checkpoint(config),
            adaptor=adaptor,
            llm=llm,
            ctc_decoder=ctc_decoder,
            ctc_vocabulary=ctc_vocabulary,
        )


class SelfAttention(nn.Module):
    """Source: FunASR funasr/models/transformer/attention.py, MultiHeadedAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self._heads = heads

    def __call__(self, x: mx.array, mask: mx.array | None, rows: int) -> mx.array:
        """x [B, L, H] -> [B, rows, H]: what the first `rows` positions gather from all."""
        queries = self.linear_q(x[:, :rows])
        attended = attend(queries, self.linear_k(x), self.linear_v(x), self._heads, mask)
        return self.linear_out(attended)


class AdaptorBlock(nn.Module):
    """Pre-norm transformer block without positions; its feed-forward is a quarter as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width, width // 4)
        self.norm1 = LayerNorm(width, eps=PARAFORMER_EPS)
        self.norm2 = LayerNorm(width, eps=PARAFORMER_EPS)

    def __call__(self, x: mx.array, mask: mx.array | None, rows: int) -> mx.array:
        x = x[:, :rows] + self.self_attn(self.norm1(x), mask, rows)
        return x + self.feed_forward(self.norm2(x))


class Adaptor(nn.Module):
    """Two linear layers and transformer blocks from the encoder's width to another one."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.in_width * config.stack, config.units)
        self.linear2 = nn.Linear(config.units, config.width)
        self.blocks = [AdaptorBlock(config.width, config.heads) for _ in range(config.blocks)]
        self._stack = config.stack

    def __call__(self, memory: mx.array, mask: mx.array | None, rows: int) -> mx.array:
        """memory [B, L, D], zero past each item's length -> [B, rows, H].

        `mask` is bool [B, ceil(L / stack)]. Only the first `rows` positions leave the last block,
        and only they are computed there; every position is looked at.
        """
        x = self.linear2(nn.relu(self.linear1(self._stacked(memory))))
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, mask, x.shape[1])
        return last(x, mask, rows)

    def _stacked(self, memory: mx.array) -> mx.array:
        if self._stack == 1:
            return memory
        batch, length, width = memory.shape
        rows = -(-length // self._stack)
        padded = mx.pad(memory, [(0, 0), (0, rows * self._stack - length), (0, 0)])
        return padded.reshape(batch, rows, width * self._stack)


class Ctc(nn.Module):
    """The output layer of the CTC branch."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(width, vocabulary)


class FunAsrNano(nn.Module):
    """The whole network; the CTC branch is there when the checkpoint has its weights."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.audio_encoder = SenseVoiceEncoder(config.encoder)
        self.audio_adaptor = Adaptor(config.adaptor)
        self.llm = Qwen3(config.llm)
        if config.ctc_decoder is not None:
            self.ctc_decoder = Adaptor(config.ctc_decoder)
            self.ctc = Ctc(config.ctc_decoder.width, config.ctc_vocabulary)
        self.config = config

    def encode(self, features: mx.array, lengths: mx.array | None) -> mx.array:
        """features float32 [B, L, 560], lengths int [B] or None when all are L -> [B, L, D].

        Zero past each item's length.
        """
        if lengths is None:
            return self.audio_encoder(features, None)
        mask = length_mask(lengths, features.shape[1])
        return mx.where(mask[..., None], self.audio_encoder(features, mask), 0)

    def adapt(self, memory: mx.array, lengths: mx.array | None) -> mx.array:
        """What `encode` gave -> audio tokens [B, ceil(L / 8), H], undefined past each item's."""
        stack = self.config.adaptor.stack
        rows = -(-memory.shape[1] // stack)
        mask = None if lengths is None else length_mask((lengths + stack - 1) // stack, rows)
        return self.audio_adaptor(memory, mask, audio_tokens(memory.shape[1]))

    def ctc_hidden(self, memory: mx.array, lengths: mx.array | None) -> mx.array:
        """What `encode` gave -> [B, L, D'], what the CTC head's output layer takes."""
        mask = None if lengths is None else length_mask(lengths, memory.shape[1])
        return self.ctc_decoder(memory, mask, memory.shape[1])

    def ctc_logits(self, memory: mx.array, lengths: mx.array | None) -> mx.array:
        """What `encode` gave -> CTC logits [B, L, V], the blank last."""
        return self.ctc.ctc_lo(self.ctc_hidden(memory, lengths))
