"""FSMN-VAD: for each 10 ms frame, the probability of silence.

A feed-forward network with memory: four blocks, each of which adds to a projection a weighted
sum of its last 20 values (Zhang et al., "Deep-FSMN", arXiv:1803.05030). It looks at the past
only, so a recording can be scored in pieces. Follows FunASR
`funasr/models/fsmn_vad_streaming/encoder.py`; parameter names and shapes are its checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.errors import CheckpointError
from funasr_batch.records import FloatArray

Cache: TypeAlias = tuple[mx.array, ...]
"""For each block, the last `lorder - 1` projections: [lorder - 1, proj_dim]."""


@dataclass(frozen=True, slots=True)
class FsmnVadConfig:
    """Sizes of the network; names and defaults are those of `encoder_conf` in config.yaml."""

    input_dim: int = 400
    input_affine_dim: int = 140
    fsmn_layers: int = 4
    linear_dim: int = 250
    proj_dim: int = 128
    lorder: int = 20
    rorder: int = 0
    lstride: int = 1
    rstride: int = 0
    output_affine_dim: int = 140
    output_dim: int = 248

    def __post_init__(self) -> None:
        if self.rorder or self.lstride != 1:
            raise CheckpointError(
                f"FSMN-VAD with rorder {self.rorder} and lstride {self.lstride} is not supported",
                hint="The published models have rorder 0 and lstride 1.",
            )

    @classmethod
    def from_encoder_conf(cls, conf: Mapping[str, Any]) -> FsmnVadConfig:
        """Raises CheckpointError for keys that this network does not know."""
        unknown = conf.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CheckpointError(
                f"FSMN-VAD: unknown encoder_conf keys {', '.join(sorted(unknown))}"
            )
        return cls(**conf)


class Affine(nn.Module):
    """A linear layer one level down, where the checkpoint keeps it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class CausalDepthwiseConv(nn.Module):
    """One filter over time for each channel, with the weight shaped as PyTorch's Conv2d's."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, 1, taps, 1))

    def __call__(self, x: mx.array) -> mx.array:
        """[taps - 1 + T, channels] to [T, channels].

        A sum of shifted products: MLX's grouped convolution is several times slower on a CPU.
        """
        filters = self.weight[:, 0, :, 0].T
        taps = filters.shape[0]
        length = x.shape[0] - taps + 1
        y = x[:length] * filters[0]
        for tap in range(1, taps):
            y = y + x[tap : tap + length] * filters[tap]
        return y


class FsmnMemory(nn.Module):
    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.conv_left = CausalDepthwiseConv(channels, taps)

    def __call__(self, x: mx.array, past: mx.array) -> tuple[mx.array, mx.array]:
        extended = mx.concatenate([past, x])
        return x + self.conv_left(extended), extended[extended.shape[0] - past.shape[0] :]


class FsmnBlock(nn.Module):
    def __init__(self, config: FsmnVadConfig) -> None:
        super().__init__()
        self.linear = Affine(config.linear_dim, config.proj_dim, bias=False)
        self.fsmn_block = FsmnMemory(config.proj_dim, config.lorder)
        self.affine = Affine(config.proj_dim, config.linear_dim)

    def __call__(self, x: mx.array, past: mx.array) -> tuple[mx.array, mx.array]:
        memory, past = self.fsmn_block(self.linear(x), past)
        return nn.relu(self.affine(memory)), past


class Encoder(nn.Module):
    def __init__(self, config: FsmnVadConfig) -> None:
        super().__init__()
        self.in_linear1 = Affine(config.input_dim, config.input_affine_dim)
        self.in_linear2 = Affine(config.input_affine_dim, config.linear_dim)
        self.fsmn = [FsmnBlock(config) for _ in range(config.fsmn_layers)]
        self.out_linear1 = Affine(config.linear_dim, config.output_affine_dim)
        self.out_linear2 = Affine(config.output_affine_dim, config.output_dim)

    def __call__(self, features: mx.array, cache: Cache) -> tuple[mx.array, Cache]:
        """float32 [T, input_dim] to posteriors [T, output_dim]."""
        x = nn.relu(self.in_linear2(self.in_linear1(features)))
        pasts = []
        for block, past in zip(self.fsmn, cache, strict=True):
            x, past = block(x, past)
            pasts.append(past)
        return mx.softmax(self.out_linear2(self.out_linear1(x)), axis=-1), tuple(pasts)


class FsmnVad(nn.Module):
    """Scores frames; what is speech is decided by `funasr_batch.vad.FsmnVadStream`."""

    def __init__(self, config: FsmnVadConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    def scores(self, features: FloatArray, cache: Cache | None) -> tuple[FloatArray, Cache]:
        """Probability of silence for each frame of the next piece of a recording.

        float32 [T, input_dim] to float32 [T], evaluated. `cache` is what the call for the piece
        before returned, None for the first. Pieces give what the whole recording would give.
        """
        # Reader threads call this while another thread keeps the GPU busy: so small a network is
        # fast enough on the CPU, where threads do not share a command queue.
        with mx.stream(mx.cpu):
            posteriors, cache = self.encoder(mx.array(features), cache or self._empty_cache())
            silence = posteriors[:, 0]
            mx.eval(silence, cache)
        return np.array(silence), cache

    def _empty_cache(self) -> Cache:
        shape = (self.config.lorder - 1, self.config.proj_dim)
        return tuple(mx.zeros(shape) for _ in range(self.config.fsmn_layers))
