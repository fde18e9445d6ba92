"""Qwen3, the decoder-only transformer that writes Fun-ASR-Nano's text.

Source: "Qwen3 Technical Report" (Qwen Team 2025); transformers
src/transformers/models/qwen3/modeling_qwen3.py. Shapes: B rows, N new positions, T positions that
attention sees, D model width.

Products that share an input are one here (`qkv_proj`, `gate_up_proj`): at small batches a step
costs what its kernel launches cost. `fuse` makes them of a checkpoint's tensors, `unfuse` goes
back.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from funasr_batch.models import cpu_kernels, qwen3_steps
from funasr_batch.models.layers import on_gpu

FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Each fused projection and the checkpoint's projections that are its rows, in order."""


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """The numbers of the LLM's config.json that shape the network."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    units: int
    eps: float
    rope_theta: float

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Reads a Hugging Face config.json. Raises KeyError for what is missing."""
        return cls(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_width=config.get("head_dim")
            or config["hidden_size"] // config["num_attention_heads"],
            units=config["intermediate_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=config.get("rope_theta", 1e6),
        )


class LayerCache(Protocol):
    """Where one layer keeps the keys and values of earlier positions (decoding/kv_cache.py)."""

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keeps those of N new positions, [B, H, N, d] each, and returns all that are attended
        to, [B, H, T, d] each."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What attention must know of the positions that are new in a pass."""

    rows: int
    """B: what comes in is [B * N, D], so that a product sees one matrix, whatever the rows."""
    offset: int | mx.array
    """Position of each row's first new token: one number for all rows, or int [B]."""
    mask: mx.array | str | None
    """[B, 1, N, T], added to the scores; "causal"; or None when every query sees everything."""


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


_swiglu_compiled = mx.compile(_swiglu, shapeless=True)
"""For a GPU; on a CPU `mx.compile` needs a C++ compiler on the user's machine."""


class Attention(nn.Module):
    """Grouped-query attention with normed heads and rotary positions."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        heads = config.heads + 2 * config.kv_heads
        self.qkv_proj = nn.Linear(config.width, heads * config.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=config.eps)
        self.k_norm = nn.RMSNorm(config.head_width, eps=config.eps)
        self.config = config
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._head_width, self._theta = config.head_width, config.rope_theta
        self._eps = config.eps

    def __call__(self, x: mx.array, context: Context, cache: LayerCache | None) -> mx.array:
        """x [B * N, D] -> [B * N, D]."""
        rows, length = context.rows, x.shape[0] // context.rows
        turned = self._heads + self._kv_heads
        heads = self.qkv_proj(x).reshape(rows, length, -1, self._head_width)
        # One norm and one rotation for queries and keys together; the values' norm is not used.
        normed = mx.fast.rms_norm(heads, None, self._eps)[:, :, :turned] * self._scales()
        q, k = mx.split(self._rotate(normed.transpose(0, 2, 1, 3), context), [self._heads], axis=1)
        v = heads[:, :, turned:].transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.extend(k, v)
        if length == 1 and isinstance(context.mask, mx.array):
            # Heads that share a key become queries of one head: with a single query and a mask,
            # CUDA has no fused attention, with two it has.
            q = q.reshape(rows, self._kv_heads, -1, self._head_width)
        attended = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self._head_width**-0.5, mask=context.mask
        )
        attended = attended.reshape(rows, self._heads, length, self._head_width)
        attended = attended.transpose(0, 2, 1, 3).reshape(rows * length, -1)
        return self.o_proj(attended)

    def _scales(self) -> mx.array:
        """The norms' weights, [heads + kv_heads, d]: each head has a row."""
        return mx.concatenate(
            [
                mx.broadcast_to(norm.weight, (heads, self._head_width))
                for norm, heads in ((self.q_norm, self._heads), (self.k_norm, self._kv_heads))
            ]
        )

    def _rotate(self, x: mx.array, context: Context) -> mx.array:
        return mx.fast.rope(
            x,
            self._head_width,
            traditional=False,
            base=self._theta,
            scale=1.0,
            offset=context.offset,
        )


class Mlp(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.width, 2 * config.units, bias=False)
        self.down_proj = nn.Linear(config.units, config.width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj((_swiglu_compiled if on_gpu() else _swiglu)(gate, up))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.eps)

    def __call__(self, x: mx.array, context: Context, cache: LayerCache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Body(nn.Module):
    """Embedding, layers and the last norm: what the checkpoint calls `model`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = [DecoderLayer(config) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.width, eps=config.eps)


class Qwen3(nn.Module):
    """The LLM: embeddings in, hidden states out; its output matrix is the embedding."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.model = Qwen3Body(config)
        self.config = config

    @property
    def dtype(self) -> mx.Dtype:
        """Of its computation; quantised weights have scales of this type."""
        return self.model.norm.weight.dtype

    def embed(self, ids: mx.array) -> mx.array:
        """ids int [B, N] -> [B, N, D]."""
        return self.model.embed_tokens(ids)

    def __call__(
        self,
        embeddings: mx.array,
        context: Context | None = None,
        caches: list[LayerCache] | None = None,
    ) -> mx.array:
        """embeddings [B, N, D] -> hidden states [B, N, D], ready for `logits`.

        Without a context the rows begin at position 0 and each position sees those before it.
        """
        context = context or Context(len(embeddings), 0, "causal")
        positions = embeddings.shape[0] * embeddings.shape[1]
        if caches and context.mask != "causal" and self._steps_in_numpy(positions):
            return qwen3_steps.step(self, embeddings, context, caches)
        x = embeddings.reshape(-1, embeddings.shape[-1])
        for number, layer in enumerate(self.model.layers):
            x = layer(x, context, caches[number] if caches is not None else None)
        return self.model.norm(x).reshape(embeddings.shape)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [..., D] -> [..., V]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self._steps_in_numpy(len(rows)):
            weight = np.array(self.model.embed_tokens.weight, copy=False)
            logits = mx.array(cpu_kernels.few_rows(np.array(rows), weight))
        else:
            logits = self.model.embed_tokens.as_linear(rows)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _steps_in_numpy(self, positions: int) -> bool:
        few = positions <= qwen3_steps.MOST_POSITIONS and self.dtype == mx.float32
        return few and not self.training and not on_gpu()


def fuse(tensors: MutableMapping[str, mx.array]) -> None:
    """Brings a checkpoint's tensors, quantised ones too, under this module's names, in place.

    Rows of a quantised matrix are quantised each by itself, so stacking is exact. The parts are
    given up one layer after the other, so that memory holds no second copy.
    """
    for name in list(tensors):
        for whole, parts in FUSED.items():
            head, found, suffix = name.partition(f".{parts[0]}.")
            if found:
                pieces = [tensors.pop(f"{head}.{part}.{suffix}") for part in parts]
                stacked = mx.concatenate(pieces, axis=0)
                mx.eval(stacked)
                tensors[f"{head}.{whole}.{suffix}"] = stacked


def unfuse(tensors: Mapping[str, mx.array], config: Qwen3Config) -> dict[str, mx.array]:
    """This module's tensors under the names of a checkpoint."""
    split = dict(tensors)
    for name in tensors:
        for whole, parts in FUSED.items():
            head, found, suffix = name.partition(f".{whole}.")
            if found:
                ends = np.cumsum(_rows_of_parts(whole, config))[:-1].tolist()
                pieces = mx.split(split.pop(name), ends, axis=0)
                for part, piece in zip(parts, pieces, strict=True):
                    split[f"{head}.{part}.{suffix}"] = piece
    return split


def unfused_shapes(parameters: Any, config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a checkpoint has for a module's parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tree_flatten(parameters):
        for whole, parts in FUSED.items():
            head, found, suffix = name.partition(f".{whole}.")
            if found:
                rows = _rows_of_parts(whole, config)
                for part, count in zip(parts, rows, strict=True):
                    shapes[f"{head}.{part}.{suffix}"] = (count, *value.shape[1:])
                break
        else:
            shapes[name] = value.shape
    return shapes


def _rows_of_parts(whole: str, config: Qwen3Config) -> tuple[int, ...]:
    if whole == "mlp.gate_up_proj":
        return (config.units, config.units)
    keys = config.kv_heads * config.head_width
    return (config.heads * config.head_width, keys, keys)
