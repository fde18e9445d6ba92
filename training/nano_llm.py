"""The LLM's whole causal pass in plain operations, whose gradients every device has.

It computes what `funasr_batch.models.qwen3.Qwen3` computes with its parameters, and shows the
attention weights of one layer; `tests/test_training_nano.py` holds the two together.
"""

from __future__ import annotations

import mlx.core as mx

from funasr_batch.models.qwen3 import Attention, Mlp, Qwen3, Qwen3Config


def hidden_states(llm: Qwen3, embeddings: mx.array, shown: int) -> tuple[mx.array, mx.array]:
    """embeddings [B, T, D] -> hidden states [B, T, D], ready for `logits`, and the attention
    weights [B, T, T] of the first head of layer `shown`."""
    x, weights = embeddings, mx.zeros(())
    for number, layer in enumerate(llm.model.layers):
        attended, seen = _attend(layer.self_attn, layer.input_layernorm(x), llm.config)
        x = x + attended
        x = x + _feed_forward(layer.mlp, layer.post_attention_layernorm(x))
        if number == shown:
            weights = seen
    return llm.model.norm(x), weights


def _attend(module: Attention, x: mx.array, config: Qwen3Config) -> tuple[mx.array, mx.array]:
    batch, length, _ = x.shape
    heads, keys, width = config.heads, config.kv_heads, config.head_width
    projected = module.qkv_proj(x).reshape(batch, length, heads + 2 * keys, width)
    q, k, v = mx.split(projected, [heads, heads + keys], axis=2)
    q = _rotated(module.q_norm(q).transpose(0, 2, 1, 3), config)
    k = _rotated(module.k_norm(k).transpose(0, 2, 1, 3), config)
    k = mx.repeat(k, heads // keys, axis=1)
    v = mx.repeat(v.transpose(0, 2, 1, 3), heads // keys, axis=1)
    scores = (q * width**-0.5) @ k.swapaxes(-1, -2)
    past = mx.arange(length)[:, None] >= mx.arange(length)[None, :]
    weights = mx.softmax(mx.where(past, scores, -1e9), axis=-1)
    context = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return module.o_proj(context), weights[:, 0]


def _rotated(x: mx.array, config: Qwen3Config) -> mx.array:
    """Rotary positions: the halves of a head's width are the two parts of its complex numbers."""
    half = config.head_width // 2
    speeds = config.rope_theta ** (-mx.arange(half) / half)
    angles = mx.arange(x.shape[-2])[:, None] * speeds[None, :]
    cosine, sine = mx.cos(angles), mx.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return mx.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)


def _feed_forward(module: Mlp, x: mx.array) -> mx.array:
    gate, up = mx.split(module.gate_up_proj(x), 2, axis=-1)
    return module.down_proj(gate * mx.sigmoid(gate) * up)
