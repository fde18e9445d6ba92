"""A step of Qwen3 on a CPU: a few positions through all layers, in numpy.

A step multiplies every weight by a row or a few. MLX hands such products to the BLAS as products
of matrices, which packs all of the weights first, and hands two dozen more small kernels a layer
to its thread; numpy multiplies by vectors and just calls (benchmarks/RESULTS.md). Prompts, which
have many positions, stay with MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.models.cpu_kernels import few_rows
from funasr_batch.records import FloatArray

if TYPE_CHECKING:
    from funasr_batch.models.qwen3 import Context, DecoderLayer, LayerCache, Qwen3

MOST_POSITIONS = 32
"""Of all rows together; with more, packing the weights is worth its time."""


def step(
    llm: Qwen3, embeddings: mx.array, context: Context, caches: Sequence[LayerCache]
) -> mx.array:
    """What `Qwen3.__call__` computes, float32 [B, N, D] -> [B, N, D], evaluated."""
    x = np.array(embeddings.reshape(-1, embeddings.shape[-1]))
    length = embeddings.shape[1]
    turn = _turn(llm, context, length)
    mask = None if context.mask is None else np.array(context.mask)
    for layer, cache in zip(llm.model.layers, caches, strict=True):
        x += _attention(layer, _normed(x, layer.input_layernorm), turn, mask, cache)
        x += _feed_forward(layer, _normed(x, layer.post_attention_layernorm))
    return mx.array(_normed(x, llm.model.norm)).reshape(embeddings.shape)


def _turn(llm: Qwen3, context: Context, length: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of the rotary positions, float32 [B, N, 1, d / 2]."""
    half = llm.config.head_width // 2
    frequencies = llm.config.rope_theta ** (-np.arange(half) / half)
    offsets = np.broadcast_to(np.array(context.offset), (context.rows,))
    positions = offsets[:, None] + np.arange(length)
    angles = (positions[..., None] * frequencies)[:, :, None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _attention(
    layer: DecoderLayer,
    x: FloatArray,
    turn: tuple[FloatArray, FloatArray],
    mask: FloatArray | None,
    cache: LayerCache,
) -> FloatArray:
    config = layer.self_attn.config
    rows, length = turn[0].shape[:2]
    width, shared = config.head_width, config.heads // config.kv_heads
    heads = few_rows(x, _values(layer.self_attn.qkv_proj)).reshape(rows, length, -1, width)
    q, k, v = np.split(heads, [config.heads, config.heads + config.kv_heads], axis=2)
    q = _rotated(_normed(q, layer.self_attn.q_norm), turn)
    k = _rotated(_normed(k, layer.self_attn.k_norm), turn)
    keys, values = cache.extend(*(mx.array(one.transpose(0, 2, 1, 3)) for one in (k, v)))
    mx.eval(keys, values)
    # [B, kv, shared * N, d]: the queries that share a key, side by side
    q = q.reshape(rows, length, config.kv_heads, shared, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, config.kv_heads, shared * length, width) * np.float32(width**-0.5)
    scores = q @ np.array(keys, copy=False).swapaxes(-1, -2)
    if mask is not None:
        scores += np.tile(mask, (1, 1, shared, 1))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    context = scores @ np.array(values, copy=False)
    context = context.reshape(rows, config.kv_heads, shared, length, width)
    context = context.transpose(0, 3, 1, 2, 4).reshape(rows * length, -1)
    return few_rows(context, _values(layer.self_attn.o_proj))


def _feed_forward(layer: DecoderLayer, x: FloatArray) -> FloatArray:
    gate, up = np.split(few_rows(x, _values(layer.mlp.gate_up_proj)), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp of a large number: the gate is closed
        gate = gate / (1 + np.exp(-gate))
    return few_rows(gate * up, _values(layer.mlp.down_proj))


def _rotated(x: FloatArray, turn: tuple[FloatArray, FloatArray]) -> FloatArray:
    """x [B, N, H, d], its halves as the parts of complex numbers that are turned."""
    cosine, sine = turn
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)


def _normed(x: FloatArray, norm: nn.RMSNorm) -> FloatArray:
    mean = np.square(x).mean(axis=-1, keepdims=True)
    return np.asarray(x * (1 / np.sqrt(mean + np.float32(norm.eps))) * np.array(norm.weight))


def _values(layer: nn.Linear) -> FloatArray:
    return np.array(layer.weight, copy=False)
