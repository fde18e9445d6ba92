"""SeACo: the part of a SeacoParaformer that listens for hotwords, beside the main decoder.

Source: Shi et al. 2023, "SeACo-Paraformer: A Non-Autoregressive ASR System with Flexible and
Effective Hotword Customization Ability"; FunASR funasr/models/seaco_paraformer/model.py.
Shapes: B segments, N tokens, K hotwords of which the last stands for "none of them", D model
width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.errors import CheckpointError
from funasr_batch.models.layers import PARAFORMER_EPS, LayerNorm
from funasr_batch.models.paraformer import (
    DecoderLayer,
    DecoderOutputLayer,
    ParaformerConfig,
    advance_lstm,
)

FILTER_SIZE = 50
"""Of a longer list each segment gets as many hotwords as this: those it attends to most."""

_FILTER_LAYER = 5
"""The layer whose attention says which hotwords matter."""

_LSTM_LAYERS = 2

_ROWS = 256
"""Hotwords that go through the LSTM together."""


@dataclass(frozen=True, slots=True)
class SeacoConfig:
    """The numbers of a SeacoParaformer's config.yaml that shape the bias network."""

    decoder: ParaformerConfig
    """The main network's numbers, with those of `decoder_…` replaced by the bias decoder's."""
    no_bias: int
    """The token id with which the bias network says that it has nothing to say."""

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], main: ParaformerConfig) -> SeacoConfig:
        """Reads FunASR's config; raises CheckpointError for a network that is not built here."""
        options, decoder = config["model_conf"], config["seaco_decoder_conf"]
        kind = (options.get("bias_encoder_type", "lstm"), options.get("bias_encoder_bid", False))
        if kind != ("lstm", False):
            raise CheckpointError(
                f"the hotword encoder (bias_encoder_type, bias_encoder_bid) = {kind} is not "
                "supported, only ('lstm', False)"
            )
        layers = decoder.get("att_layer_num", 6)
        if layers <= _FILTER_LAYER or decoder.get("num_blocks", layers) > layers:
            raise CheckpointError(
                f"a hotword decoder of {layers} layers, {decoder.get('num_blocks')} blocks is not "
                "supported"
            )
        no_bias = options.get("NO_BIAS", 8377)
        if not 0 <= no_bias < main.vocabulary:
            raise CheckpointError(
                f"NO_BIAS {no_bias} is not in the vocabulary of {main.vocabulary} tokens"
            )
        shaped = replace(
            main,
            decoder_heads=decoder["attention_heads"],
            decoder_units=decoder["linear_units"],
            decoder_blocks=layers,
            decoder_kernel=decoder.get("kernel_size", 21),
            decoder_shift=decoder.get("sanm_shfit", 0),
        )
        return cls(shaped, no_bias)


class HotwordEmbedding(nn.Module):
    """The embedding that the checkpoint keeps in the main decoder, which does not use it."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.embed = [nn.Embedding(config.vocabulary, config.width)]

    def __call__(self, ids: mx.array) -> mx.array:
        """int [K, T] -> [K, T, D]."""
        [embedding] = self.embed
        return embedding(ids)


class BiasEncoder(nn.Module):
    """LSTM layers one above the other, with PyTorch's parameter names and gate order.

    On the CPU too it is advanced by MLX, a step of all hotwords at a time: they are many and short,
    and the kernel of `cpu_kernels` takes one long sequence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        for layer in range(_LSTM_LAYERS):
            self[f"weight_ih_l{layer}"] = mx.zeros((4 * width, width))
            self[f"weight_hh_l{layer}"] = mx.zeros((4 * width, width))
            self[f"bias_ih_l{layer}"] = mx.zeros((4 * width,))
            self[f"bias_hh_l{layer}"] = mx.zeros((4 * width,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [K, T, D] -> [K, T, D]; what stands after a row's end does not change it."""
        for layer in range(_LSTM_LAYERS):
            bias = self[f"bias_ih_l{layer}"] + self[f"bias_hh_l{layer}"]
            gates = mx.addmm(bias, x, self[f"weight_ih_l{layer}"].T)
            [x] = advance_lstm(gates[None], self[f"weight_hh_l{layer}"][None])
        return x


class BiasDecoder(nn.Module):
    """The main decoder's layers over hotwords instead of encoder frames; no output layer."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.decoders = [DecoderLayer(config) for _ in range(config.decoder_blocks)]
        self.decoders3 = [DecoderOutputLayer(config)]
        self.after_norm = LayerNorm(config.width, eps=PARAFORMER_EPS)
        self._heads = config.decoder_heads

    def __call__(self, x: mx.array, mask: mx.array | None, hotwords: mx.array) -> mx.array:
        """x [B, N, D], mask bool [B, N] or None, hotwords [B, K, D] -> [B, N, D]."""
        for layer in self.decoders:
            x = layer(x, mask, hotwords, None)
        for last in self.decoders3:
            x = last(x)
        return self.after_norm(x)

    def attention_to(self, x: mx.array, mask: mx.array | None, hotwords: mx.array) -> mx.array:
        """x [B, N, D], hotwords [B, K, D] -> float32 [B, K]: attention of each segment's tokens.

        Source: FunASR funasr/models/paraformer/decoder.py, forward_asf6.
        """
        for layer in self.decoders[:_FILTER_LAYER]:
            x = layer(x, mask, hotwords, None)
        layer = self.decoders[_FILTER_LAYER]
        x = layer.norm3(layer.before_attention(x, mask))
        keys = mx.split(layer.src_attn.linear_k_v(hotwords), 2, axis=-1)[0]
        q, k = (self._split(y) for y in (layer.src_attn.linear_q(x), keys))
        scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
        weights = mx.softmax(scores.astype(mx.float32), axis=-1).sum(axis=1)
        if mask is not None:
            weights = mx.where(mask[..., None], weights, 0)
        return weights.sum(axis=1)

    def _split(self, x: mx.array) -> mx.array:
        batch, length, width = x.shape
        heads = self._heads
        return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


class Seaco(nn.Module):
    """The network. Its parameter tree has the names and shapes of FunASR's state dict."""

    def __init__(self, config: SeacoConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.decoder = HotwordEmbedding(config.decoder)
        self.bias_encoder = BiasEncoder(width)
        self.seaco_decoder = BiasDecoder(config.decoder)
        self.hotword_output_layer = nn.Linear(width, config.decoder.vocabulary)
        self.no_bias = config.no_bias

    def represent(self, hotwords: Sequence[Sequence[int]]) -> mx.array:
        """Token ids of each hotword, at least one -> [K, D] in the dtype of the LSTM.

        The last has to be `<s>` alone: what a segment attends to that has no hotword in it.
        """
        groups = [hotwords[first : first + _ROWS] for first in range(0, len(hotwords), _ROWS)]
        return mx.concatenate([self._represent(group) for group in groups])

    def _represent(self, hotwords: Sequence[Sequence[int]]) -> mx.array:
        lengths = [len(ids) for ids in hotwords]
        padded = np.zeros((len(hotwords), max(lengths)), np.int32)
        for row, ids in zip(padded, hotwords, strict=True):
            row[: len(ids)] = ids
        states = self.bias_encoder(self.decoder(mx.array(padded)))
        return states[mx.arange(len(hotwords)), mx.array(lengths) - 1]

    def logits(
        self, hotwords: mx.array, embeddings: mx.array, hidden: mx.array, mask: mx.array | None
    ) -> mx.array:
        """What the bias network would write at each token -> [B, N, V]; where that is the token
        `no_bias`, what the main decoder writes stands.

        hotwords [K, D] of `represent`; embeddings [B, N, D], the main decoder's input, and hidden
        [B, N, D], what its output layer gets; mask bool [B, N], or None when nothing is padded.
        """
        batch, size = len(hidden), len(hotwords)
        memory = mx.broadcast_to(hotwords.astype(hidden.dtype), (batch, *hotwords.shape))
        if size > FILTER_SIZE:
            memory = self._filtered(memory, hidden, mask)
        merged = self.seaco_decoder(embeddings, mask, memory)
        merged = merged + self.seaco_decoder(hidden, mask, memory)
        return self.hotword_output_layer(merged)

    def _filtered(self, memory: mx.array, hidden: mx.array, mask: mx.array | None) -> mx.array:
        """memory [B, K, D] -> [B, FILTER_SIZE + 1, D]: the best of each segment, and the last.

        The last is there twice when it is one of the best: so it is in FunASR, which scores the
        first segment of a batch and filters all of them by it.
        """
        scores = self.seaco_decoder.attention_to(hidden, mask, memory)
        best = mx.argpartition(-scores, kth=FILTER_SIZE - 1, axis=-1)[:, :FILTER_SIZE]
        last = mx.full((len(scores), 1), memory.shape[1] - 1, best.dtype)
        kept = mx.concatenate([mx.sort(best, axis=-1), last], axis=-1)
        return mx.take_along_axis(memory, kept[..., None], axis=1)
