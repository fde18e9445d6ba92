"""What MLX's CPU backend does slowly, done another way; benchmarks/RESULTS.md has the numbers.

On the CPU, MLX's matrix products run on a BLAS and all cores. Its other kernels run on one thread,
and only plain arithmetic is vectorised: exponentials, reductions along rows and convolutions are
not. On a GPU none of this is wanted. `mx.compile` would help too, but needs a C++ compiler on the
user's machine.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

from funasr_batch.records import FloatArray

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


def exp2(x: mx.array) -> mx.array:
    """2^x for float32 x of at most 126, within 3e-7 of its value; 2^-126 for everything below."""
    return cast(mx.array, _exp2(x))


@mx.custom_function
def _exp2(x: mx.array) -> mx.array:
    x = mx.maximum(x, _LOWEST_EXPONENT)
    shifted = x + _ROUNDING
    remainder = x - (shifted - _ROUNDING)
    power = mx.array(_HIGHEST)
    for coefficient in _COEFFICIENTS:
        power = power * remainder + coefficient
    # The integer part goes straight into the exponent's bits.
    exponent = shifted.view(mx.int32) << _MANTISSA_BITS
    return (power.view(mx.int32) + exponent).view(mx.float32)


@_exp2.vjp
def _exp2_vjp(x: mx.array, cotangent: mx.array, power: mx.array) -> mx.array:
    return cotangent * power * _LOG_2


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, key_mask: mx.array | None
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` computes; the softmax is always in float32.

    q [B, H, N, D], k and v [B, H, L, D] -> [B, H, N, D]. `key_mask` is bool [B, L]; every item
    has at least one true key.
    """
    # Keys down the columns: a maximum over rows is vectorised, one along a row is not.
    scores = (k @ (q * (scale * _LOG2_E)).swapaxes(-1, -2)).astype(mx.float32)
    mask = None if key_mask is None else key_mask[:, None, :, None]
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    weights = exp2(scores - mx.max(scores, axis=-2, keepdims=True))
    if mask is not None:
        weights = mx.where(mask, weights, 0)  # 2^-126 is not zero
    # A column of ones beside the values has the product sum the weights as well.
    values = mx.concatenate([v, mx.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
    context = weights.swapaxes(-1, -2) @ values
    return (context[..., :-1] / context[..., -1:]).astype(v.dtype)


def peak_probability(logits: mx.array) -> mx.array:
    """The softmax of the largest logit: float32 [..., V] -> [...]."""
    differences = logits - mx.max(logits, axis=-1, keepdims=True)
    total = exp2(_LOG2_E * differences) @ mx.ones((logits.shape[-1], 1))
    return 1 / total[..., 0]


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """x [..., D] -> [..., D], computed in float32; the means are matrix products."""
    mean = mx.full((x.shape[-1], 1), 1 / x.shape[-1])
    centred = x.astype(mx.float32)
    centred = centred - centred @ mean
    variance = centred.square() @ mean
    return (centred * mx.rsqrt(variance + eps) * weight + bias).astype(x.dtype)


def few_rows(x: FloatArray, weight: FloatArray) -> FloatArray:
    """x float32 [M, K] times the transpose of weight [N, K] -> [M, N], for small M.

    As products of the weights with vectors, or with a narrow matrix: asked for x times the weights
    a BLAS would pack all of these.
    """
    if len(x) <= 2:
        return np.stack([weight @ row for row in x])
    return np.ascontiguousarray((weight @ x.T).T)


def depthwise_convolution(x: mx.array, weight: mx.array) -> mx.array:
    """x [B, L, D], weight [D, 1, K] -> [B, L - K + 1, D], as K shifted multiply-adds."""
    taps = weight[:, 0, :].T
    length = x.shape[1] - len(taps) + 1
    total = x[:, :length] * taps[0]
    for tap in range(1, len(taps)):
        total = total + x[:, tap : tap + length] * taps[tap]
    return total


def lstm(inputs: FloatArray, recurrent: FloatArray) -> FloatArray:
    """The recurrence of an LSTM: hidden states float32 [T, D], from zero states on.

    `inputs` [T, 4 D] is what each step's gates receive from outside, biases included; `recurrent`
    [4 D, D] is `weight_hh`. Both in PyTorch's order of gates: input, forget, cell, output.

    In numpy: a step is too small for a dozen of MLX's kernels, and a BLAS that is asked for a
    product of matrices packs all weights to multiply them by a single vector.
    """
    width = recurrent.shape[1]
    # sigmoid(x) = tanh(x / 2) / 2 + 1/2, so that one tanh serves all four gates.
    scale = np.full(4 * width, 0.5, np.float32)
    offset = np.full(4 * width, 0.5, np.float32)
    scale[2 * width : 3 * width] = 1
    offset[2 * width : 3 * width] = 0

    gates = np.empty(4 * width, np.float32)
    taken, kept, new, shown = np.split(gates, 4)
    cell = np.zeros(width, np.float32)
    hidden = np.zeros(width, np.float32)
    states = np.empty((len(inputs), width), np.float32)
    for state, received in zip(states, inputs, strict=True):
        np.matmul(recurrent, hidden, out=gates)
        gates += received
        gates *= scale
        np.tanh(gates, out=gates)
        gates *= scale
        gates += offset
        cell *= kept
        new *= taken
        cell += new
        np.tanh(cell, out=state)
        state *= shown
        hidden = state
    return states
