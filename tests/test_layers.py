"""The blocks of the networks beside plain numpy, and what masks promise: zeros, and no leaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from funasr_batch.models.layers import (
    FsmnBlock,
    SanmAttention,
    SanmEncoderLayer,
    attend,
    length_mask,
    sinusoidal_positions,
)
from funasr_batch.models.paraformer import BidirectionalLstm, Conv1d, UpsamplingConv

RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 1, shape).astype(np.float32)


def randomise(module) -> None:
    module.apply(lambda value: mx.array(0.3 * normal(*value.shape)))


def assert_close(ours: mx.array, expected: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=atol)


# Positions and masks


@pytest.mark.parametrize("depth", [560, 64])
def test_positions_are_funasrs(oracle: Path, depth: int) -> None:
    golden = np.load(oracle / "goldens/posenc.npz")[f"d{depth}"]
    # Measured: 1.9e-6. The angle of position 40 is rounded to float32 before its sine is taken.
    assert_close(sinusoidal_positions(len(golden), depth), golden, atol=5e-6)


def test_positions_begin_at_one_with_a_sine_half_and_a_cosine_half() -> None:
    first = np.array(sinusoidal_positions(3, 560))[0]
    np.testing.assert_allclose(first[:3], [0.84147, 0.82348, 0.80526], atol=1e-5)
    np.testing.assert_allclose(first[280:282], [0.54030, 0.56734], atol=1e-5)


def test_longer_clips_begin_with_the_positions_of_shorter_ones() -> None:
    longer = np.array(sinusoidal_positions(500, 64))
    np.testing.assert_array_equal(longer[:7], np.array(sinusoidal_positions(7, 64)))


def test_a_length_mask_is_true_inside() -> None:
    mask = length_mask(mx.array([2, 0, 3]), 3)
    assert mask.dtype == mx.bool_
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]


# FSMN memory


def fsmn(x: np.ndarray, weight: np.ndarray, left: int) -> np.ndarray:
    """Each output is the input plus a weighted sum of `kernel` inputs from `left` before it."""
    length, kernel = len(x), weight.shape[-1]
    out = x.copy()
    for t in range(length):
        for tap in range(kernel):
            if 0 <= t - left + tap < length:
                out[t] += weight[:, 0, tap] * x[t - left + tap]
    return out


@pytest.fixture(params=["multiply-adds", "convolution"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The GPU's convolution runs on the CPU too; only the choice is made by device."""
    if request.param == "convolution":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    return


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("kernel", "shift", "left"), [(11, 0, 5), (11, 5, 10), (11, 2, 7), (21, 0, 10), (3, 0, 1)]
)
def test_fsmn_looks_back_further_with_a_shift(kernel: int, shift: int, left: int) -> None:
    block = FsmnBlock(4, kernel, shift)
    randomise(block)
    x = normal(2, 9, 4)
    expected = np.stack([fsmn(item, np.array(block.weight), left) for item in x])
    assert_close(block(mx.array(x), None), expected)


@pytest.mark.usefixtures("both_ways")
def test_fsmn_neither_reads_nor_writes_what_is_masked() -> None:
    block = FsmnBlock(4, 11)
    randomise(block)
    x = normal(3, 12, 4)
    lengths = [12, 5, 1]
    mask = length_mask(mx.array(lengths), 12)

    out = np.array(block(mx.array(x), mask))

    for row, length in enumerate(lengths):
        alone = np.array(block(mx.array(x[row : row + 1, :length]), None))[0]
        np.testing.assert_allclose(out[row, :length], alone, rtol=0, atol=1e-6)
        assert not out[row, length:].any()


# Attention


def test_attention_is_softmax_of_scaled_products() -> None:
    q, k, v = normal(1, 3, 8), normal(1, 5, 8), normal(1, 5, 8)
    expected = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = np.exp(q[0, :, head] @ k[0, :, head].T / 2)
        expected.append(scores / scores.sum(axis=1, keepdims=True) @ v[0, :, head])
    out = attend(mx.array(q), mx.array(k), mx.array(v), 2, None)
    assert_close(out[0], np.concatenate(expected, axis=1))


def test_a_masked_key_has_no_weight_at_all() -> None:
    q, k, v = normal(2, 3, 8), normal(2, 6, 8), normal(2, 6, 8)
    mask = length_mask(mx.array([4, 6]), 6)
    huge_v = v.copy()
    huge_v[0, 4:] = 1e30

    masked = np.array(attend(mx.array(q), mx.array(k), mx.array(v), 2, mask))
    poisoned = np.array(attend(mx.array(q), mx.array(k), mx.array(huge_v), 2, mask))

    np.testing.assert_array_equal(poisoned, masked)
    alone = attend(mx.array(q[:1]), mx.array(k[:1, :4]), mx.array(v[:1, :4]), 2, None)
    assert_close(alone[0], masked[0], atol=1e-6)


def test_the_memory_is_added_after_the_output_projection() -> None:
    attention = SanmAttention(6, 4, 2, 3, 0)
    randomise(attention)
    attention.linear_out.weight = mx.zeros_like(attention.linear_out.weight)
    x = normal(1, 5, 6)
    values = np.array(attention.linear_q_k_v(mx.array(x)))[0, :, 8:]
    expected = fsmn(values, np.array(attention.fsmn_block.weight), 1)
    assert_close(attention(mx.array(x), None)[0], expected + np.array(attention.linear_out.bias))


@pytest.mark.parametrize("in_width", [4, 6])
def test_attention_has_a_residual_only_where_the_width_stays(in_width: int) -> None:
    layer = SanmEncoderLayer(in_width, 4, 2, 8, 3, 0, 1e-12)
    randomise(layer)
    for silent in (layer.self_attn, layer.feed_forward.w_2):
        silent.apply(mx.zeros_like)
    x = normal(1, 5, in_width)
    expected = x if in_width == 4 else np.zeros((1, 5, 4), np.float32)
    assert_close(layer(mx.array(x), None), expected)


# Convolutions of the predictor


def test_the_predictors_convolution_is_a_full_one() -> None:
    conv = Conv1d(3, 4, 3)
    randomise(conv)
    x = normal(1, 6, 3)
    weight, padded = np.array(conv.weight), np.pad(x[0], [(1, 1), (0, 0)])
    expected = [np.einsum("oik,ki->o", weight, padded[t : t + 3]) for t in range(6)]
    assert_close(conv(mx.array(x))[0], np.array(expected) + np.array(conv.bias))


def test_upsampling_gives_each_frame_as_many_steps() -> None:
    conv = UpsamplingConv(4, 3)
    randomise(conv)
    x = normal(2, 5, 4)
    expected = np.einsum("bti,iok->btko", x, np.array(conv.weight)).reshape(2, 15, 4)
    assert_close(conv(mx.array(x)), expected + np.array(conv.bias))


# LSTM


def lstm(x: np.ndarray, module: BidirectionalLstm, suffix: str) -> np.ndarray:
    """x [T, in] -> [T, width], one direction, gates in the order i, f, g, o."""

    def sigmoid(values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-values))

    w_ih, w_hh, b_ih, b_hh = (
        np.array(module[f"{name}_l0{suffix}"], np.float64)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = np.zeros(w_hh.shape[1])
    outputs = []
    for frame in x:
        i, f, g, o = np.split(w_ih @ frame + b_ih + w_hh @ hidden + b_hh, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    return np.array(outputs)


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4], [1, 9], [6, 2]])
def test_both_directions_of_the_lstm_stay_inside_each_item(lengths: list[int]) -> None:
    module = BidirectionalLstm(5, 3)
    randomise(module)
    x = normal(2, 9, 5)

    out = np.array(module(mx.array(x), mx.array(lengths)))

    assert out.shape == (2, 9, 6)
    for row, length in enumerate(lengths):
        inside = x[row, :length]
        forward = lstm(inside, module, "")
        backward = lstm(inside[::-1], module, "_reverse")[::-1]
        np.testing.assert_allclose(
            out[row, :length], np.concatenate([forward, backward], axis=1), rtol=0, atol=1e-6
        )
