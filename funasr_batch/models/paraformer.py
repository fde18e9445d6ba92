"""Paraformer: SAN-M encoder, CIF predictor, SAN-M decoder; the timestamp head of BiCif and SeACo.

Source: Gao et al. 2022, "Paraformer: Fast and Accurate Parallel Transformer for Non-autoregressive
End-to-End Speech Recognition"; FunASR funasr/models/{paraformer,bicif_paraformer,sanm}/.
Shapes: B segments, L encoder frames of 60 ms, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.errors import CheckpointError
from funasr_batch.models import cpu_kernels
from funasr_batch.models.layers import (
    PARAFORMER_EPS,
    CrossAttention,
    FsmnBlock,
    LayerNorm,
    SanmEncoderLayer,
    length_mask,
    on_gpu,
    sinusoidal_positions,
)

ARCHITECTURES = ("Paraformer", "BiCifParaformer", "SeacoParaformer")

UNUSED_PREFIXES = ("decoder.embed.", "bias_encoder.", "seaco_decoder.", "hotword_output_layer.")
"""Tensors of the checkpoints that recognition without hotwords never reads."""


@dataclass(frozen=True, slots=True)
class ParaformerConfig:
    """The numbers of a checkpoint's config.yaml that shape the network."""

    feature_width: int
    width: int
    heads: int
    encoder_units: int
    encoder_blocks: int
    encoder_kernel: int
    encoder_shift: int
    decoder_heads: int
    decoder_units: int
    decoder_blocks: int
    decoder_kernel: int
    decoder_shift: int
    vocabulary: int
    tail_threshold: float
    smooth_factor: float
    noise_threshold: float
    timestamp_head: bool
    upsample_times: int
    smooth_factor2: float
    noise_threshold2: float

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], vocabulary: int) -> ParaformerConfig:
        """Reads FunASR's config; raises CheckpointError for a network that is not built here."""
        encoder, decoder = config["encoder_conf"], config["decoder_conf"]
        predictor = config.get("predictor_conf", {})
        frontend = config["frontend_conf"]
        kind = config.get("predictor", "CifPredictorV2")
        if kind not in ("CifPredictorV2", "CifPredictorV3"):
            raise CheckpointError(f"the CIF predictor {kind!r} is not supported")
        if kind == "CifPredictorV3":
            upsampling = (predictor.get("upsample_type"), predictor.get("use_cif1_cnn", True))
            if upsampling != ("cnn_blstm", False):
                raise CheckpointError(
                    f"the timestamp head (upsample_type, use_cif1_cnn) = {upsampling} is not "
                    "supported, only ('cnn_blstm', False)"
                )
        if decoder["num_blocks"] != decoder.get("att_layer_num", 6):
            raise CheckpointError("decoder layers without cross-attention are not supported")
        if (predictor.get("l_order", 1), predictor.get("r_order", 1)) != (1, 1):
            raise CheckpointError("only CIF predictors with l_order = r_order = 1 are supported")
        return cls(
            feature_width=frontend["lfr_m"] * frontend["n_mels"],
            width=encoder["output_size"],
            heads=encoder["attention_heads"],
            encoder_units=encoder["linear_units"],
            encoder_blocks=encoder["num_blocks"],
            encoder_kernel=encoder.get("kernel_size", 11),
            encoder_shift=encoder.get("sanm_shfit", 0),
            decoder_heads=decoder["attention_heads"],
            decoder_units=decoder["linear_units"],
            decoder_blocks=decoder["num_blocks"],
            decoder_kernel=decoder.get("kernel_size", 21),
            decoder_shift=decoder.get("sanm_shfit", 0),
            vocabulary=vocabulary,
            tail_threshold=predictor.get("tail_threshold", 0.45),
            smooth_factor=predictor.get("smooth_factor", 1.0),
            noise_threshold=predictor.get("noise_threshold", 0.0),
            timestamp_head=kind == "CifPredictorV3",
            upsample_times=predictor.get("upsample_times", 3),
            smooth_factor2=predictor.get("smooth_factor2", 1.0),
            noise_threshold2=predictor.get("noise_threshold2", 0.0),
        )


class SanmEncoder(nn.Module):
    """Source: FunASR funasr/models/sanm/encoder.py, SANMEncoder."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()

        def layer(in_width: int) -> SanmEncoderLayer:
            return SanmEncoderLayer(
                in_width,
                config.width,
                config.heads,
                config.encoder_units,
                config.encoder_kernel,
                config.encoder_shift,
                PARAFORMER_EPS,
            )

        self.encoders0 = [layer(config.feature_width)]
        self.encoders = [layer(config.width) for _ in range(config.encoder_blocks - 1)]
        self.after_norm = LayerNorm(config.width, eps=PARAFORMER_EPS)
        self._scale = config.width**0.5

    def __call__(self, features: mx.array, mask: mx.array | None) -> mx.array:
        """features float32 [B, L, 560], mask bool [B, L] or None -> [B, L, D]."""
        positions = sinusoidal_positions(features.shape[1], features.shape[2])
        x = (features * self._scale + positions).astype(self.after_norm.weight.dtype)
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, mask)
        return self.after_norm(x)


class Conv1d(nn.Module):
    """A convolution over time with PyTorch's weight layout [out, in, kernel], same padding."""

    def __init__(self, in_width: int, width: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((width, in_width, kernel_size))
        self.bias = mx.zeros((width,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, in] -> [B, L, out], as one matrix product over stacked shifts."""
        kernel = self.weight.shape[2]
        length = x.shape[1]
        padded = mx.pad(x, [(0, 0), (kernel // 2, kernel // 2), (0, 0)])
        stacked = mx.concatenate([padded[:, k : k + length] for k in range(kernel)], axis=-1)
        weight = self.weight.transpose(2, 1, 0).reshape(-1, self.weight.shape[0])
        return mx.addmm(self.bias, stacked, weight)


class UpsamplingConv(nn.Module):
    """A transposed convolution whose stride equals its kernel: one matrix product."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.weight = mx.zeros((width, width, times))
        self.bias = mx.zeros((width,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, D] -> [B, times * L, D]."""
        batch, length, width = x.shape
        times = self.weight.shape[2]
        weight = self.weight.transpose(0, 2, 1).reshape(width, times * width)
        return (x @ weight).reshape(batch, times * length, width) + self.bias


class BidirectionalLstm(nn.Module):
    """One bidirectional LSTM layer with PyTorch's parameter names and gate order (i, f, g, o).

    The backward direction starts at each item's last valid frame, so a batch gives what single
    items give. FunASR lets it start in the padding.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        for suffix in ("", "_reverse"):
            self[f"weight_ih_l0{suffix}"] = mx.zeros((4 * width, in_width))
            self[f"weight_hh_l0{suffix}"] = mx.zeros((4 * width, width))
            self[f"bias_ih_l0{suffix}"] = mx.zeros((4 * width,))
            self[f"bias_hh_l0{suffix}"] = mx.zeros((4 * width,))

    def __call__(self, x: mx.array, lengths: mx.array) -> mx.array:
        """x [B, T, in], lengths int [B] -> [B, T, 2 * width]; past an item's length undefined.

        On the CPU it is evaluated here, and nothing flows back through it.
        """
        steps = mx.arange(x.shape[1])[None, :]
        reverse = mx.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)[..., None]
        flipped = mx.take_along_axis(x, reverse, axis=1)
        gates = mx.stack([self._project(x, ""), self._project(flipped, "_reverse")])
        weights = mx.stack([self.weight_hh_l0, self.weight_hh_l0_reverse])
        run = advance_lstm if on_gpu() else _advance_on_cpu
        forward, backward = run(gates, weights)
        return mx.concatenate([forward, mx.take_along_axis(backward, reverse, axis=1)], axis=-1)

    def _project(self, x: mx.array, suffix: str) -> mx.array:
        bias = self[f"bias_ih_l0{suffix}"] + self[f"bias_hh_l0{suffix}"]
        return mx.addmm(bias, x, self[f"weight_ih_l0{suffix}"].T)


def advance_lstm(gates: mx.array, weights: mx.array) -> mx.array:
    """The recurrence of S LSTMs together, one batched product a step, from zero states on.

    gates [S, B, T, 4 * width], weights [S, 4 * width, width] -> hidden states [S, B, T, width].
    """
    recurrent = weights.swapaxes(1, 2)
    hidden = cell = mx.zeros((*gates.shape[:2], weights.shape[2]), dtype=gates.dtype)
    outputs = []
    for step in range(gates.shape[2]):
        i, f, g, o = mx.split(gates[:, :, step] + hidden @ recurrent, 4, axis=-1)
        cell = mx.sigmoid(f) * cell + mx.sigmoid(i) * mx.tanh(g)
        hidden = mx.sigmoid(o) * mx.tanh(cell)
        outputs.append(hidden)
    return mx.stack(outputs, axis=2)


def _advance_on_cpu(gates: mx.array, weights: mx.array) -> mx.array:
    """`advance_lstm`, one sequence after the other."""
    states = [
        [cpu_kernels.lstm(inputs, recurrent) for inputs in direction]
        for direction, recurrent in zip(np.array(gates), np.array(weights), strict=True)
    ]
    return mx.array(np.array(states))


class CifPredictor(nn.Module):
    """Frame weights alpha whose running sum counts tokens (CifPredictorV2).

    Source: FunASR funasr/models/paraformer/cif_predictor.py. Computed in float32 whatever the
    dtype of the encoder: a token count hangs on the sum.
    """

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.cif_conv1d = Conv1d(config.width, config.width, 3)
        self.cif_output = nn.Linear(config.width, 1)
        self._smooth, self._noise = config.smooth_factor, config.noise_threshold

    def __call__(self, memory: mx.array, mask: mx.array | None) -> mx.array:
        """memory float32 [B, L, D], zero past each item's length -> alphas float32 [B, L]."""
        hidden = nn.relu(self.cif_conv1d(memory))
        return _frame_weights(self.cif_output(hidden), self._smooth, self._noise, mask)


class CifPredictorV3(CifPredictor):
    """CifPredictor with a second branch at a third of the frame length, for timestamps.

    Source: FunASR funasr/models/bicif_paraformer/cif_predictor.py.
    """

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__(config)
        self.upsample_cnn = UpsamplingConv(config.width, config.upsample_times)
        self.blstm = BidirectionalLstm(config.width, config.width)
        self.cif_output2 = nn.Linear(2 * config.width, 1)
        self._times = config.upsample_times
        self._smooth2, self._noise2 = config.smooth_factor2, config.noise_threshold2

    def upsampled(self, memory: mx.array, lengths: mx.array) -> mx.array:
        """memory float32 [B, L, D], lengths int [B] -> alphas float32 [B, 3 L], not rescaled."""
        frames = self.upsample_cnn(memory)
        hidden = self.blstm(frames, lengths * self._times)
        mask = length_mask(lengths * self._times, frames.shape[1])
        return _frame_weights(self.cif_output2(hidden), self._smooth2, self._noise2, mask)


def _frame_weights(
    logits: mx.array, smooth: float, noise: float, mask: mx.array | None
) -> mx.array:
    alphas = nn.relu(mx.sigmoid(logits[..., 0]) * smooth - noise)
    return alphas if mask is None else mx.where(mask, alphas, 0)


class DecoderFeedForward(nn.Module):
    """Feed-forward with a LayerNorm over its hidden units and no second bias."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, units)
        self.w_2 = nn.Linear(units, width, bias=False)
        self.norm = LayerNorm(units, eps=PARAFORMER_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w_2(self.norm(nn.relu(self.w_1(x))))


class DecoderSelfMemory(nn.Module):
    """The decoder's "self-attention": an FSMN memory alone."""

    def __init__(self, width: int, kernel_size: int, shift: int) -> None:
        super().__init__()
        self.fsmn_block = FsmnBlock(width, kernel_size, shift)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        return self.fsmn_block(x, mask)


class DecoderLayer(nn.Module):
    """Feed-forward, FSMN memory, cross-attention; the first residual starts at the input.

    Source: FunASR funasr/models/paraformer/decoder.py, DecoderLayerSANM.
    """

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = DecoderSelfMemory(width, config.decoder_kernel, config.decoder_shift)
        self.src_attn = CrossAttention(width, config.decoder_heads, width)
        self.feed_forward = DecoderFeedForward(width, config.decoder_units)
        self.norm1 = LayerNorm(width, eps=PARAFORMER_EPS)
        self.norm2 = LayerNorm(width, eps=PARAFORMER_EPS)
        self.norm3 = LayerNorm(width, eps=PARAFORMER_EPS)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None,
        memory: mx.array,
        memory_mask: mx.array | None,
    ) -> mx.array:
        x = self.before_attention(x, mask)
        return x + self.src_attn(self.norm3(x), memory, memory_mask)

    def before_attention(self, x: mx.array, mask: mx.array | None) -> mx.array:
        """Feed-forward and FSMN memory: what the norm before the cross-attention gets."""
        hidden = self.feed_forward(self.norm1(x))
        return x + self.self_attn(self.norm2(hidden), mask)


class DecoderOutputLayer(nn.Module):
    """The last block (`decoders3`): a bare feed-forward without a residual."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.feed_forward = DecoderFeedForward(config.width, config.decoder_units)
        self.norm1 = LayerNorm(config.width, eps=PARAFORMER_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        return self.feed_forward(self.norm1(x))


class ParaformerDecoder(nn.Module):
    """Source: FunASR funasr/models/paraformer/decoder.py, ParaformerSANMDecoder."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.decoders = [DecoderLayer(config) for _ in range(config.decoder_blocks)]
        self.decoders3 = [DecoderOutputLayer(config)]
        self.after_norm = LayerNorm(config.width, eps=PARAFORMER_EPS)
        self.output_layer = nn.Linear(config.width, config.vocabulary)

    def __call__(
        self,
        embeddings: mx.array,
        mask: mx.array | None,
        memory: mx.array,
        memory_mask: mx.array | None,
    ) -> mx.array:
        """embeddings [B, N, D], memory [B, L, D] -> logits [B, N, V]."""
        return self.output_layer(self.hidden(embeddings, mask, memory, memory_mask))

    def hidden(
        self,
        embeddings: mx.array,
        mask: mx.array | None,
        memory: mx.array,
        memory_mask: mx.array | None,
    ) -> mx.array:
        """embeddings [B, N, D], memory [B, L, D] -> what the output layer gets, [B, N, D]."""
        x = embeddings
        for layer in self.decoders:
            x = layer(x, mask, memory, memory_mask)
        for last in self.decoders3:
            x = last(x)
        return self.after_norm(x)


class Paraformer(nn.Module):
    """The network. Its parameter tree has the names and shapes of FunASR's state dict."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.encoder = SanmEncoder(config)
        self.predictor = CifPredictorV3(config) if config.timestamp_head else CifPredictor(config)
        self.decoder = ParaformerDecoder(config)

    def encode(self, features: mx.array, mask: mx.array | None) -> mx.array:
        """features float32 [B, L, 560], mask bool [B, L] -> memory [B, L, D], zero past lengths.

        The zeros keep the CIF convolution from reading the padding, which in FunASR's own batches
        changes the last alpha of every shorter item.
        """
        memory = self.encoder(features, mask)
        return memory if mask is None else mx.where(mask[..., None], memory, 0)

    def alphas(self, memory: mx.array, mask: mx.array | None) -> mx.array:
        """memory [B, L, D] -> CIF weights float32 [B, L], without the tail."""
        return self.predictor(memory.astype(mx.float32), mask)

    def upsampled_alphas(self, memory: mx.array, lengths: mx.array) -> mx.array:
        """memory [B, L, D], lengths int [B] -> timestamp weights float32 [B, 3 L]."""
        return self.predictor.upsampled(memory.astype(mx.float32), lengths)

    def decode(
        self,
        embeddings: mx.array,
        mask: mx.array | None,
        memory: mx.array,
        memory_mask: mx.array | None,
    ) -> mx.array:
        """embeddings [B, N, D], memory [B, L, D] -> logits [B, N, V]."""
        return self.decoder(embeddings, mask, memory, memory_mask)
