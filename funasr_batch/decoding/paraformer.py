"""Recognises one batch of segments with Paraformer: features in, token ids and times out.

MLX is evaluated at two named points: after the CIF weights, because the token counts set the
shapes of the decoder, and after the decoder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from funasr_batch.decoding.cif import token_counts, token_weights
from funasr_batch.errors import RecognitionError
from funasr_batch.models.layers import length_mask
from funasr_batch.models.paraformer import (
    UNUSED_PREFIXES,
    CifPredictorV3,
    Paraformer,
    ParaformerConfig,
)
from funasr_batch.records import FloatArray, Recognition
from funasr_batch.text.timestamps import frame_token_spans, upsampled_token_spans
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors

FRAME_MS = 60
"""Length of an encoder frame: six fbank frames of 10 ms."""

UPSAMPLING = 3
"""Steps of the timestamp head in one encoder frame."""

EMPTY = Recognition((), (), ())


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One Recognition for each segment of the batch, and where the time went."""

    recognitions: tuple[Recognition, ...]
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class ParaformerDecoding:
    """What decoding needs besides the batch."""

    model: Paraformer
    tail_threshold: float
    dropped_ids: frozenset[int]
    """Ids that never become text: `<blank>`, `<s>`, `</s>`."""

    def recognise(self, batch: Sequence[FloatArray]) -> BatchResult:
        """Recognises features, each float32 [L_i, 560]; any order, any lengths of at least 1.

        Raises RecognitionError when the network's numbers are not finite: a NaN would otherwise
        pass for silence.
        """
        started = time.perf_counter()
        features, lengths = _pad(batch)
        frames = mx.array(lengths)
        mask = None if lengths.min() == lengths.max() else length_mask(frames, features.shape[1])
        memory = self.model.encode(mx.array(features), mask)
        alphas = self.model.alphas(memory, mask)
        timing = self._timing_weights(memory, frames, alphas)
        mx.eval(memory, alphas, timing)
        encoded = time.perf_counter()

        weights = np.array(alphas)
        _require_finite(weights)
        counts = token_counts(weights, self.tail_threshold)
        if counts.max() < 1:
            recognitions = tuple(EMPTY for _ in batch)
        else:
            ids, confidences = self._decode(memory, mask, weights, counts)
            _require_finite(confidences)
            recognitions = tuple(
                self._recognition(*item)
                for item in zip(ids, confidences, counts, np.array(timing), lengths, strict=True)
            )
        return BatchResult(recognitions, encoded - started, time.perf_counter() - encoded)

    def _timing_weights(self, memory: mx.array, lengths: mx.array, alphas: mx.array) -> mx.array:
        """Weights whose peaks date the tokens: the timestamp head's, or the CIF's own."""
        if isinstance(self.model.predictor, CifPredictorV3):
            return self.model.upsampled_alphas(memory, lengths)
        return alphas

    def _decode(
        self,
        memory: mx.array,
        memory_mask: mx.array | None,
        alphas: FloatArray,
        counts: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int32], FloatArray]:
        """Ids int32 [B, N] and their probabilities float32 [B, N], undefined past each count."""
        weights = mx.array(token_weights(alphas, counts))
        embeddings = (weights @ memory.astype(mx.float32)).astype(memory.dtype)
        mask = None
        if counts.min() < counts.max():
            mask = length_mask(mx.array(counts), embeddings.shape[1])
        logits = self.model.decode(embeddings, mask, memory, memory_mask).astype(mx.float32)
        ids = mx.argmax(logits, axis=-1)
        confidences = mx.exp(mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1))
        mx.eval(ids, confidences)
        return np.array(ids).astype(np.int32), np.array(confidences)

    def _recognition(
        self,
        ids: npt.NDArray[np.int32],
        confidences: FloatArray,
        count: int,
        timing: FloatArray,
        length: int,
    ) -> Recognition:
        kept = [n for n in range(count) if int(ids[n]) not in self.dropped_ids]
        if not kept:
            return EMPTY
        duration_ms = length * FRAME_MS
        if isinstance(self.model.predictor, CifPredictorV3):
            weights = _rescaled(timing[: UPSAMPLING * length], count)
            spans = upsampled_token_spans(weights, len(kept), duration_ms=duration_ms)
        else:
            spans = frame_token_spans(timing[:length], len(kept), duration_ms=duration_ms)
        return Recognition(
            token_ids=tuple(int(ids[n]) for n in kept),
            spans_ms=spans,
            confidences=tuple(round(float(confidences[n]), 4) for n in kept),
        )


def load_paraformer(
    checkpoint: Checkpoint, dtype: mx.Dtype, dropped_ids: frozenset[int]
) -> ParaformerDecoding:
    """Builds the network of a checkpoint and fills it. The CIF predictor stays in float32.

    Raises CheckpointError when a tensor is missing, unexpected or of another shape.
    """
    assert checkpoint.tokens is not None
    config = ParaformerConfig.from_checkpoint(checkpoint.config, len(checkpoint.tokens))
    model = Paraformer(config)
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    check_tensors(checkpoint.specs, expected, path=checkpoint.folder, unused=UNUSED_PREFIXES)
    tensors = checkpoint.load_tensors()
    weights = [
        (name, tensors[name].astype(mx.float32 if name.startswith("predictor.") else dtype))
        for name in expected
    ]
    model.load_weights(weights, strict=True)
    mx.eval(model.parameters())
    return ParaformerDecoding(model, config.tail_threshold, dropped_ids)


def _require_finite(values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise RecognitionError("the network's output is not finite")


def _rescaled(weights: FloatArray, count: int) -> FloatArray:
    """Timestamp weights scaled so that they fire once for each of the predictor's tokens."""
    total = float(weights.sum(dtype=np.float64))
    return weights if total == 0 else (weights * (count / total)).astype(np.float32)


def _pad(batch: Sequence[FloatArray]) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    lengths = np.array([len(item) for item in batch], dtype=np.int32)
    features = np.zeros((len(batch), int(lengths.max()), batch[0].shape[1]), dtype=np.float32)
    for row, item in zip(features, batch, strict=True):
        row[: len(item)] = item
    return features, lengths
