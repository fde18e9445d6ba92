"""Nano's CTC head: a second reading of the same encoder output, quick, and with times.

The reading drafts what the LLM will write, and the LLM's text is aligned with it. Source: FunASR
funasr/models/fun_asr_nano/model.py (`inference_llm`) and tools/utils.py (`forced_align`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from funasr_batch.decoding.ctc import collapse, forced_alignment
from funasr_batch.models.nano import FunAsrNano
from funasr_batch.records import FRAME_MS, FloatArray, Token
from funasr_batch.text.align_texts import LabelSpan, words_from_ctc
from funasr_batch.text.ctc_tokens import CtcTokens
from funasr_batch.text.nano_words import Wording

FRAMES_AT_ONCE = 1024
"""Frames whose logits are in memory together: of 60,515 labels, a quarter of a gigabyte."""


@dataclass(frozen=True, slots=True, eq=False)
class CtcReading:
    """What the CTC head makes of a piece."""

    text: str
    hidden: mx.array = field(repr=False)
    """[L, D], from which the score of any label can be had."""
    log_totals: FloatArray = field(repr=False)
    """float32 [L], the logarithm of what the scores of each frame sum to."""


@dataclass(frozen=True, slots=True)
class CtcBranch:
    """The CTC head with its vocabulary."""

    model: FunAsrNano
    tokens: CtcTokens

    def read(
        self, memory: mx.array, lengths: npt.NDArray[np.int32], limits: mx.array | None
    ) -> list[CtcReading]:
        """The readings of a padded batch: memory [B, L, D], zero past the lengths [B].

        `limits` are the lengths on the device, None when all are L.
        """
        hidden = self.model.ctc_hidden(memory, limits)
        rows = [hidden[row, :length] for row, length in enumerate(lengths.tolist())]
        labels, totals = self._best_labels(mx.concatenate(rows))
        ends = np.cumsum(lengths)[:-1]
        return [
            CtcReading(self._text(row_labels), row, row_totals)
            for row, row_labels, row_totals in zip(
                rows, np.split(labels, ends), np.split(totals, ends), strict=True
            )
        ]

    def timed(
        self, said: Wording, reading: CtcReading, start_ms: int, end_ms: int
    ) -> tuple[Token, ...] | None:
        """The words with the times at which the labels of their letters are heard.

        None when there are fewer frames than labels. Labels of punctuation alone take no time:
        a mark goes with the word that it stands by.
        """
        labels = list(self._labels(said.text))
        voiced = [label for label, _, _, letters in labels if letters]
        if not voiced:
            return None
        blank = self.model.config.ctc_vocabulary - 1
        scores = self._scores(reading, [*voiced, blank])
        spans = forced_alignment(scores[:, :-1], voiced, scores[:, -1])
        if spans is None:
            return None
        times = iter(spans)
        heard = []
        for _, first, after, letters in labels:
            if letters:
                begin, end = next(times)
                heard.append(
                    LabelSpan(first, after, start_ms + begin * FRAME_MS, start_ms + end * FRAME_MS)
                )
        return words_from_ctc(said, heard, start_ms, end_ms)

    def _best_labels(self, hidden: mx.array) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The best label of each frame, and the logarithm of the sum of all its scores."""
        labels, totals = [], []
        for first in range(0, len(hidden), FRAMES_AT_ONCE):
            logits = self.model.ctc.ctc_lo(hidden[first : first + FRAMES_AT_ONCE])
            logits = logits.astype(mx.float32)
            best, total = mx.argmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)
            mx.eval(best, total)
            labels.append(np.array(best).astype(np.int64))
            totals.append(np.array(total))
        return np.concatenate(labels), np.concatenate(totals)

    def _scores(self, reading: CtcReading, labels: Sequence[int]) -> FloatArray:
        """float32 [L, len(labels)]: log-probabilities of some labels alone."""
        layer = self.model.ctc.ctc_lo
        chosen = mx.array(list(labels))
        logits = mx.addmm(layer.bias[chosen], reading.hidden, layer.weight[chosen].T)
        return np.array(logits.astype(mx.float32)) - reading.log_totals[:, None]

    def _text(self, labels: npt.NDArray[np.int64]) -> str:
        runs = collapse(labels, self.model.config.ctc_vocabulary - 1)
        return self.tokens.decode(run.label for run in runs).replace("\ufffd", "")

    def _labels(self, text: str) -> Iterator[tuple[int, int, int, bool]]:
        """Each label of a text, the bytes of UTF-8 that it stands for, and if it holds letters."""
        place = 0
        for label in self.tokens.encode(text):
            piece = self.tokens.token_bytes(label)
            letters = any(map(str.isalnum, piece.decode("utf-8", "replace").replace("\ufffd", "x")))
            yield label, place, place + len(piece), letters
            place += len(piece)
