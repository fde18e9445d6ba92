"""The blocks that FunASR's models share: SAN-M attention, FSMN memory, positions, masks.

Shapes: B segments, L frames, D model width, H heads. Parameter names and shapes are those of the
checkpoints, so that a state dict loads without renaming or transposing.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.models import cpu_kernels

PARAFORMER_EPS = 1e-12
"""LayerNorm epsilon of Paraformer (FunASR funasr/models/transformer/layer_norm.py)."""


def on_gpu() -> bool:
    """Whether the default device is a GPU; otherwise `cpu_kernels` are used."""
    return mx.default_device().type == mx.gpu


def length_mask(lengths: mx.array, size: int) -> mx.array:
    """bool [B, size]: true where a position lies inside its item's length."""
    return mx.arange(size)[None, :] < lengths[:, None]


@cache
def _timescales(depth: int) -> np.ndarray:
    half = depth // 2
    return np.exp(np.arange(half) * (-math.log(10_000.0) / (half - 1))).astype(np.float32)


def sinusoidal_positions(length: int, depth: int) -> mx.array:
    """float32 [length, depth]: sine half, then cosine half, of positions 1 to `length`.

    Source: FunASR funasr/models/transformer/embedding.py, SinusoidalPositionEncoder.
    """
    angles = np.arange(1, length + 1, dtype=np.float32)[:, None] * _timescales(depth)
    return mx.array(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


class FsmnBlock(nn.Module):
    """FSMN memory: a depthwise convolution over time plus its own input.

    Source: FunASR funasr/models/sanm/attention.py, forward_fsmn.
    """

    def __init__(self, width: int, kernel_size: int, shift: int = 0) -> None:
        super().__init__()
        self.weight = mx.zeros((width, 1, kernel_size))
        self._left = (kernel_size - 1) // 2 + max(shift, 0)
        self._right = kernel_size - 1 - self._left

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        """x [B, L, D], mask bool [B, L] or None when nothing is padded -> [B, L, D]."""
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        memory = self._convolve(x) + x
        return memory if mask is None else mx.where(mask[..., None], memory, 0)

    def _convolve(self, x: mx.array) -> mx.array:
        padded = mx.pad(x, [(0, 0), (self._left, self._right), (0, 0)])
        if on_gpu():
            return mx.conv1d(padded, self.weight.swapaxes(1, 2), groups=x.shape[-1])
        return cpu_kernels.depthwise_convolution(padded, self.weight)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    def __call__(self, x: mx.array) -> mx.array:
        if on_gpu():
            return super().__call__(x)
        return cpu_kernels.layer_norm(x, self.weight, self.bias, self.eps)


def _split_heads(x: mx.array, heads: int) -> mx.array:
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _merge_heads(x: mx.array) -> mx.array:
    batch, heads, length, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)


def attend(
    q: mx.array, k: mx.array, v: mx.array, heads: int, key_mask: mx.array | None
) -> mx.array:
    """Scaled dot-product attention: q [B, N, D], k and v [B, L, D] -> [B, N, D].

    `key_mask` is bool [B, L]; a masked key gets a weight of exactly zero.
    """
    scale = (q.shape[-1] // heads) ** -0.5
    q, k, v = (_split_heads(x, heads) for x in (q, k, v))
    if on_gpu():
        mask = None if key_mask is None else key_mask[:, None, None, :]
        context = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    else:
        context = cpu_kernels.attention(q, k, v, scale, key_mask)
    return _merge_heads(context)


def peak_probability(logits: mx.array) -> mx.array:
    """The softmax of the largest logit: float32 [..., V] -> [...]."""
    if on_gpu():
        return mx.exp(mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1))
    return cpu_kernels.peak_probability(logits)


class SanmAttention(nn.Module):
    """Self-attention with an FSMN memory on the values, added after the output projection.

    Source: Gao et al. 2020, "SAN-M: Memory Equipped Self-Attention"; FunASR
    funasr/models/sanm/attention.py, MultiHeadedAttentionSANM.
    """

    def __init__(self, in_width: int, width: int, heads: int, kernel_size: int, shift: int) -> None:
        super().__init__()
        self.linear_q_k_v = nn.Linear(in_width, 3 * width)
        self.linear_out = nn.Linear(width, width)
        self.fsmn_block = FsmnBlock(width, kernel_size, shift)
        self._heads = heads

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        q, k, v = mx.split(self.linear_q_k_v(x), 3, axis=-1)
        return self.linear_out(attend(q, k, v, self._heads, mask)) + self.fsmn_block(v, mask)


class CrossAttention(nn.Module):
    """Attention of token embeddings over the encoder's output.

    Source: FunASR funasr/models/sanm/attention.py, MultiHeadedAttentionCrossAtt.
    """

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(width, width)
        self.linear_k_v = nn.Linear(memory_width, 2 * width)
        self.linear_out = nn.Linear(width, width)
        self._heads = heads

    def __call__(self, x: mx.array, memory: mx.array, memory_mask: mx.array | None) -> mx.array:
        k, v = mx.split(self.linear_k_v(memory), 2, axis=-1)
        return self.linear_out(attend(self.linear_q(x), k, v, self._heads, memory_mask))


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, units)
        self.w_2 = nn.Linear(units, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w_2(nn.relu(self.w_1(x)))


class SanmEncoderLayer(nn.Module):
    """Pre-norm SAN-M block; no residual around attention where the width changes."""

    def __init__(
        self,
        in_width: int,
        width: int,
        heads: int,
        units: int,
        kernel_size: int,
        shift: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.self_attn = SanmAttention(in_width, width, heads, kernel_size, shift)
        self.feed_forward = FeedForward(width, units)
        self.norm1 = LayerNorm(in_width, eps=eps)
        self.norm2 = LayerNorm(width, eps=eps)
        self._residual = in_width == width

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        attended = self.self_attn(self.norm1(x), mask)
        x = x + attended if self._residual else attended
        return x + self.feed_forward(self.norm2(x))
