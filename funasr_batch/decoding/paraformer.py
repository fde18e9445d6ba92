"""Recognises one batch of segments with Paraformer: features in, token ids and times out.

MLX is evaluated at two named points: after the CIF weights, because the token counts set the
shapes of the decoder, and after the decoder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from funasr_batch.cpu import blas_threads
from funasr_batch.decoding.cif import token_counts, token_weights
from funasr_batch.decoding.lanes import Lane, cpu_streams, padded, require_finite, rounds
from funasr_batch.errors import CheckpointError
from funasr_batch.models.layers import length_mask, peak_probability
from funasr_batch.models.paraformer import (
    UNUSED_PREFIXES,
    CifPredictorV3,
    Paraformer,
    ParaformerConfig,
)
from funasr_batch.models.seaco import Seaco, SeacoConfig
from funasr_batch.records import (
    FRAME_MS,
    BatchResult,
    FloatArray,
    Recognition,
    Segment,
    TextSegment,
    Token,
)
from funasr_batch.text.timestamps import frame_token_spans, upsampled_token_spans
from funasr_batch.text.tokens import detokenise, render_text
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors

UPSAMPLING = 3
"""Steps of the timestamp head in one encoder frame."""

EMPTY = Recognition((), (), ())

_MAIN_PREFIXES = ("encoder.", "predictor.", "decoder.")
_LIST_PREFIXES = ("decoder.embed.", "bias_encoder.")


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    lengths: npt.NDArray[np.int32]
    mask: mx.array | None
    memory: mx.array
    alphas: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    counts: npt.NDArray[np.int64]
    ids: mx.array
    """int [B, N], undefined past each count."""
    confidences: mx.array
    """float32 [B, N]: the probabilities of `ids`."""
    timing: mx.array
    """float32 [B, L] or [B, 3 L]: weights whose peaks date the tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Hotwords:
    """A list of hotwords, as the bias network of a SeacoParaformer has read it."""

    network: Seaco = field(repr=False)
    memory: mx.array
    """[K, D], evaluated; the last row stands for "none of them"."""


@dataclass(frozen=True, slots=True)
class ParaformerDecoding:
    """What decoding needs besides the batch."""

    model: Paraformer
    tail_threshold: float
    dropped_ids: frozenset[int]
    """Ids that never become text: `<blank>`, `<s>`, `</s>`."""
    streams: tuple[mx.ThreadLocalStream, ...] = ()
    """Where segments are recognised side by side. With none, a batch is padded and goes as one."""
    tokens: tuple[str, ...] = field(default=(), repr=False)
    """The vocabulary."""
    hotwords: Hotwords | None = None

    def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
        """Words, characters and their times in the recording."""
        tokens = self.tokens_of(recognition, segment.start_ms)
        return TextSegment(
            id=segment.index,
            start=segment.start_ms,
            end=segment.end_ms,
            text=render_text(tokens),
            timing="cif",
            tokens=tokens,
        )

    def tokens_of(self, recognition: Recognition, offset_ms: int) -> tuple[Token, ...]:
        """Words and characters with their times, in a segment that begins at `offset_ms`."""
        return detokenise(
            [self.tokens[id] for id in recognition.token_ids],
            recognition.spans_ms,
            recognition.confidences,
            offset_ms,
        )

    def recognise(self, batch: Sequence[FloatArray]) -> BatchResult:
        """Recognises features, each float32 [L_i, 560]; any order, any lengths of at least 1.

        Raises RecognitionError when the network's numbers are not finite: a NaN would otherwise
        pass for silence.
        """
        recognitions = [EMPTY] * len(batch)
        encode_seconds = decode_seconds = 0.0
        for lanes in rounds(batch, self.streams):
            # Lanes side by side share the cores; each product is faster on one than on several.
            with blas_threads(1) if len(lanes) > 1 else nullcontext():
                started = time.perf_counter()
                encoded = self._encode_lanes(lanes, batch)
                middle = time.perf_counter()
                decoded = self._decode_lanes(lanes, encoded)
                for lane, hidden, scored in zip(lanes, encoded, decoded, strict=True):
                    items = self._recognitions(hidden, scored)
                    for place, recognition in zip(lane.places, items, strict=True):
                        recognitions[place] = recognition
                encode_seconds += middle - started
                decode_seconds += time.perf_counter() - middle
        return BatchResult(tuple(recognitions), encode_seconds, decode_seconds)

    def _encode_lanes(self, lanes: Sequence[Lane], batch: Sequence[FloatArray]) -> list[_Encoded]:
        encoded = []
        for lane in lanes:
            with mx.stream(lane.stream):
                encoded.append(self._encode([batch[place] for place in lane.places]))
        mx.eval([(one.memory, one.alphas) for one in encoded])
        return encoded

    def _decode_lanes(
        self, lanes: Sequence[Lane], encoded: Sequence[_Encoded]
    ) -> list[_Decoded | None]:
        decoded = []
        for lane, hidden in zip(lanes, encoded, strict=True):
            with mx.stream(lane.stream):
                decoded.append(self._decode(hidden))
        mx.eval([(one.ids, one.confidences, one.timing) for one in decoded if one])
        return decoded

    def _encode(self, batch: Sequence[FloatArray]) -> _Encoded:
        features, lengths = padded(batch)
        mask = None
        if lengths.min() < lengths.max():
            mask = length_mask(mx.array(lengths), features.shape[1])
        memory = self.model.encode(mx.array(features), mask)
        return _Encoded(lengths, mask, memory, self.model.alphas(memory, mask))

    def _decode(self, encoded: _Encoded) -> _Decoded | None:
        """None when there is no token in any item."""
        alphas = np.array(encoded.alphas)
        require_finite(alphas)
        counts = token_counts(alphas, self.tail_threshold)
        if counts.max() < 1:
            return None
        memory = encoded.memory
        weights = mx.array(token_weights(alphas, counts))
        embeddings = (weights @ memory.astype(mx.float32)).astype(memory.dtype)
        mask = None
        if counts.min() < counts.max():
            mask = length_mask(mx.array(counts), embeddings.shape[1])
        decoder = self.model.decoder
        hidden = decoder.hidden(embeddings, mask, memory, encoded.mask)
        logits = decoder.output_layer(hidden).astype(mx.float32)
        ids, confidences = mx.argmax(logits, axis=-1), peak_probability(logits)
        if self.hotwords is not None:
            network = self.hotwords.network
            bias = network.logits(self.hotwords.memory, embeddings, hidden, mask)
            bias = bias.astype(mx.float32)
            said = mx.argmax(bias, axis=-1)
            kept = (said == network.no_bias) | self._is_dropped(ids)
            ids = mx.where(kept, ids, said)
            confidences = mx.where(kept, confidences, peak_probability(bias))
        return _Decoded(counts, ids, confidences, timing=self._timing_weights(encoded))

    def _is_dropped(self, ids: mx.array) -> mx.array:
        """bool [B, N]: where the main decoder says that there is no text.

        No hotword is written there. Together with the counts, which come from the CIF alone, this
        keeps hotwords out of what is not speech: a list may change what a token says, even to
        nothing, but it never adds one, and a segment that is empty without hotwords stays empty.
        FunASR writes hotwords over `</s>` too.
        """
        dropped = mx.array(sorted(self.dropped_ids) or [-1])
        return mx.any(ids[..., None] == dropped, axis=-1)

    def _timing_weights(self, encoded: _Encoded) -> mx.array:
        """Weights whose peaks date the tokens: the timestamp head's, or the CIF's own."""
        if isinstance(self.model.predictor, CifPredictorV3):
            return self.model.upsampled_alphas(encoded.memory, mx.array(encoded.lengths))
        return encoded.alphas

    def _recognitions(self, encoded: _Encoded, decoded: _Decoded | None) -> list[Recognition]:
        if decoded is None:
            return [EMPTY for _ in encoded.lengths]
        confidences = np.array(decoded.confidences)
        require_finite(confidences)
        columns = (np.array(decoded.ids), confidences, np.array(decoded.timing))
        return [
            self._recognition(*item)
            for item in zip(*columns, decoded.counts, encoded.lengths, strict=True)
        ]

    def _recognition(
        self,
        ids: npt.NDArray[np.int32],
        confidences: FloatArray,
        timing: FloatArray,
        count: int,
        length: int,
    ) -> Recognition:
        kept = [n for n in range(count) if int(ids[n]) not in self.dropped_ids]
        if not kept:
            return EMPTY
        duration_ms = int(length) * FRAME_MS
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

    Raises CheckpointError when the configuration lacks something that shapes the network, or a
    tensor is missing, unexpected or of another shape.
    """
    assert checkpoint.tokens is not None
    try:
        config = ParaformerConfig.from_checkpoint(checkpoint.config, len(checkpoint.tokens))
    except KeyError as error:
        raise CheckpointError(f"the configuration of {checkpoint.folder} has no {error}") from error
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
    return ParaformerDecoding(
        model, config.tail_threshold, dropped_ids, cpu_streams(), checkpoint.tokens
    )


def load_seaco(checkpoint: Checkpoint, dtype: mx.Dtype) -> Seaco:
    """Builds the bias network of a SeacoParaformer and fills it.

    What reads the list, the embedding and its LSTM, stays in float32: it runs once for each list,
    and all that is said about a hotword hangs on one row.

    Raises CheckpointError when the configuration lacks something that shapes the network, or a
    tensor is missing or of another shape.
    """
    assert checkpoint.tokens is not None
    try:
        main = ParaformerConfig.from_checkpoint(checkpoint.config, len(checkpoint.tokens))
        config = SeacoConfig.from_checkpoint(checkpoint.config, main)
    except KeyError as error:
        raise CheckpointError(f"the configuration of {checkpoint.folder} has no {error}") from error
    network = Seaco(config)
    expected = {name: value.shape for name, value in tree_flatten(network.parameters())}
    check_tensors(checkpoint.specs, expected, path=checkpoint.folder, unused=_MAIN_PREFIXES)
    tensors = checkpoint.load_tensors()
    weights = [
        (name, tensors[name].astype(mx.float32 if name.startswith(_LIST_PREFIXES) else dtype))
        for name in expected
    ]
    network.load_weights(weights, strict=True)
    mx.eval(network.parameters())
    return network


def with_hotwords(
    decoding: ParaformerDecoding, network: Seaco, ids: Sequence[Sequence[int]], none_id: int
) -> ParaformerDecoding:
    """The same decoding with a list of hotwords, which is read here, once.

    `ids` are the tokens of each hotword; `none_id`, that of `<s>`, stands for "none of them".
    """
    memory = network.represent([*ids, (none_id,)])
    mx.eval(memory)
    return replace(decoding, hotwords=Hotwords(network, memory))


def _rescaled(weights: FloatArray, count: int) -> FloatArray:
    """Timestamp weights scaled so that they fire once for each of the predictor's tokens."""
    total = float(weights.sum(dtype=np.float64))
    return weights if total == 0 else (weights * (count / total)).astype(np.float32)
