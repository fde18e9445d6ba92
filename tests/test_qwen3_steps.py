"""The steps that a CPU takes in numpy, beside the network that they stand for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from funasr_batch.decoding.kv_cache import KvCache
from funasr_batch.models import qwen3_steps
from funasr_batch.models.layers import on_gpu
from funasr_batch.models.qwen3 import Qwen3, Qwen3Config

pytestmark = pytest.mark.skipif(on_gpu(), reason="a GPU takes no steps in numpy")

CONFIG = Qwen3Config(
    vocabulary=97,
    width=48,
    layers=3,
    heads=6,
    kv_heads=2,
    head_width=16,
    units=80,
    eps=1e-6,
    rope_theta=1e6,
)
CLOSE = 2e-5
"""Hidden states are about 1; float32 sums over 80 products in another order differ by 1e-6 each."""


@pytest.fixture(scope="module")
def llm() -> Qwen3:
    mx.random.seed(3)
    llm = Qwen3(CONFIG)
    for layer in llm.model.layers:  # so that a norm that is left out is seen
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.input_layernorm):
            norm.weight = mx.random.uniform(0.5, 1.5, norm.weight.shape)
    mx.eval(llm.parameters())
    return llm


def passes(llm: Qwen3, lengths: list[int], counts: list[int]) -> list[np.ndarray]:
    """Hidden states of passes of so many positions after prompts of these lengths, and logits."""
    rng = np.random.default_rng(5)
    cache = KvCache(CONFIG, len(lengths), capacity=64, block=8, dtype=mx.float32)
    context, layers = cache.admit(range(len(lengths)), lengths)
    prompt = rng.standard_normal((len(lengths), max(lengths), CONFIG.width)).astype(np.float32)
    mx.eval(llm(mx.array(prompt), context, layers), cache.arrays)
    seen = []
    for count in counts:
        x = rng.standard_normal((len(lengths), count, CONFIG.width)).astype(np.float32)
        hidden = llm(mx.array(x), *cache.extend(count))
        seen += [np.array(hidden), np.array(llm.logits(hidden[:, -1]))]
    return seen


@pytest.mark.parametrize("lengths", [[7], [7, 7], [3, 9, 5]], ids=["one", "in step", "apart"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 1, 8]], ids=["steps", "blocks"])
def test_steps_equal_the_network(
    llm: Qwen3, lengths: list[int], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.train()  # in training nothing leaves MLX
    expected = passes(llm, lengths, counts)
    llm.eval()
    taken = []
    step = qwen3_steps.step
    monkeypatch.setattr(qwen3_steps, "step", lambda *args: taken.append(1) or step(*args))
    found = passes(llm, lengths, counts)
    assert len(taken) == len(counts)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=CLOSE)


def test_many_positions_stay_with_the_network(llm: Qwen3, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.eval()
    monkeypatch.setattr(qwen3_steps, "MOST_POSITIONS", 7)
    monkeypatch.setattr(qwen3_steps, "step", lambda *args: pytest.fail("a step of 8 positions"))
    passes(llm, [5], [8])


def test_a_gate_that_is_far_closed_gives_nothing(llm: Qwen3) -> None:
    """exp of what a gate is closed by overflows; that is no warning and no NaN."""
    layer = llm.model.layers[0]
    weight = layer.mlp.gate_up_proj.weight
    layer.mlp.gate_up_proj.weight = mx.concatenate(
        [mx.full((CONFIG.units, CONFIG.width), -1e4), weight[CONFIG.units :]]
    )
    try:
        x = np.ones((1, CONFIG.width), np.float32)
        assert not qwen3_steps._feed_forward(layer, x).any()
    finally:
        layer.mlp.gate_up_proj.weight = weight
