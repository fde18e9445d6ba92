"""Attention for MLX's CPU backend, whose exponential is scalar code on one thread.

For 40 s of audio, half of `mx.fast.scaled_dot_product_attention` is that exponential. A polynomial
in elementwise operations, which the compiler did vectorise, takes a quarter of its time
(benchmarks/RESULTS.md). `mx.compile` would be faster still, but needs a C++ compiler at run time.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

_LOG2_E = 1.4426950408889634
_LOG_2 = 0.6931471805599453
_LOWEST_EXPONENT = -126.0

_ROUNDING = 1.5 * 2**23
"""Added to a float32 of at most 2^22, it leaves the nearest integer in the low bits."""

_MANTISSA_BITS = 23


def _chebyshev_fit(degree: int) -> tuple[float, ...]:
    """Coefficients of 2^r on [-1/2, 1/2], the highest power first."""
    nodes = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2
    fit = np.polynomial.Chebyshev.fit(nodes, 2.0**nodes, degree, domain=[-0.5, 0.5])
    return tuple(fit.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist())


_HIGHEST, *_COEFFICIENTS = _chebyshev_fit(5)


@mx.custom_function
def exp2(x: mx.array) -> mx.array:
    """2^x for float32 x of at most 126, within 3e-7 of its value; 2^-126 for everything below."""
    x = mx.maximum(x, _LOWEST_EXPONENT)
    shifted = x + _ROUNDING
    remainder = x - (shifted - _ROUNDING)
    power = mx.array(_HIGHEST)
    for coefficient in _COEFFICIENTS:
        power = power * remainder + coefficient
    # The integer part goes straight into the exponent's bits.
    exponent = shifted.view(mx.int32) << _MANTISSA_BITS
    return (power.view(mx.int32) + exponent).view(mx.float32)


@exp2.vjp
def _exp2_vjp(x: mx.array, cotangent: mx.array, power: mx.array) -> mx.array:
    return cotangent * power * _LOG_2


def cpu_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, key_mask: mx.array | None
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` computes; the softmax is always in float32.

    q [B, H, N, D], k and v [B, H, L, D] -> [B, H, N, D]. `key_mask` is bool [B, 1, 1, L]; every
    item has at least one true key.
    """
    scores = ((q * (scale * _LOG2_E)) @ k.swapaxes(-1, -2)).astype(mx.float32)
    if key_mask is not None:
        scores = mx.where(key_mask, scores, -mx.inf)
    weights = cast(mx.array, exp2(scores - mx.max(scores, axis=-1, keepdims=True)))
    if key_mask is not None:
        weights = mx.where(key_mask, weights, 0)  # 2^-126 is not zero
    # A product with ones is a sum on all cores.
    total = weights @ mx.ones((weights.shape[-1], 1))
    return ((weights @ v) / total).astype(v.dtype)
