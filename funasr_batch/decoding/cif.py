"""Continuous integrate-and-fire: from frame weights to token counts and token embeddings.

Source: Dong and Xu 2020, "CIF: Continuous Integrate-and-Fire for End-to-End Speech Recognition";
FunASR funasr/models/paraformer/cif_predictor.py, cif_v1. In numpy, because the counts set the
shapes of everything after and the running sum wants float64, which GPUs lack.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from funasr_batch.records import FloatArray


def running_sum(alphas: FloatArray) -> npt.NDArray[np.float64]:
    """Running sum over the last axis, rounded to float32 as FunASR does before it takes floors."""
    return np.cumsum(alphas, axis=-1, dtype=np.float64).astype(np.float32).astype(np.float64)


def token_counts(alphas: FloatArray, tail: float) -> npt.NDArray[np.int64]:
    """alphas [B, L], zero past each item's length -> number of tokens [B].

    `tail` is the weight of the frame that FunASR appends so that a nearly complete last token
    still fires.
    """
    total = alphas.sum(axis=-1, dtype=np.float64) + tail
    return np.floor(total.astype(np.float32)).astype(np.int64)


def token_weights(alphas: FloatArray, counts: npt.NDArray[np.int64]) -> FloatArray:
    """Share of each frame in each token: alphas [B, L], counts [B] -> float32 [B, max(counts), L].

    Token n owns the part of the running sum between n and n + 1, so its embedding is one row of
    this matrix times the hidden states: no loop, and no difference of long prefix sums. The
    appended tail frame has no column because its hidden state is zero.
    """
    after = running_sum(alphas)[:, None, :]
    before = np.concatenate([np.zeros_like(after[..., :1]), after[..., :-1]], axis=-1)
    token = np.arange(int(counts.max(initial=0)), dtype=np.float64)[None, :, None]
    shares = np.minimum(after, token + 1) - np.maximum(before, token)
    shares[token[:, :, 0] >= counts[:, None]] = 0
    return np.maximum(shares, 0).astype(np.float32)
