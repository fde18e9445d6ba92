"""Where in a segment each token was said, read off the weights (alphas) of a CIF predictor.

CIF (Dong & Xu 2020, "CIF: Continuous Integrate-and-Fire") adds up one alpha per step and fires a
token whenever the sum passes a whole number. Training counts one token more than the text has
(`</s>`), and FunASR lets token *i* last from fire *i* to fire *i* + 1. Two predictors exist:

* the timestamp head of BiCif- and SeACo-Paraformer (CifPredictorV3), with steps of 20 ms, made for
  the purpose: `upsampled_token_spans`, equal to FunASR's `ts_prediction_lfr6_standard`;
* the only predictor of a plain Paraformer (CifPredictorV2), with steps of 60 ms, which finds the
  number of tokens: `frame_token_spans`. FunASR exchanges alphas and peaks there (its issue 3723)
  and applies limits meant for 20 ms steps to steps of 60 ms, so its times are not reproduced.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import RecognitionError
from funasr_batch.records import FloatArray

UPSAMPLED_STEP_MS = 20.0
FRAME_STEP_MS = 60.0

MAX_TOKEN_MS = 240.0
"""What is left of a longer token counts as silence."""
EDGE_MS = 100.0
"""A silence shorter than this at the end of the segment belongs to the last token."""
FIRE_THRESHOLD = 1.0 - 1e-4
"""A little under 1, so that rounding never loses the last fire."""

UPSAMPLED_SHIFT_MS = -1.5 * UPSAMPLED_STEP_MS
"""FunASR's correction from the number of the firing step to the time of the token's start."""

FRAME_SHIFT_MS = -40.0
"""The same correction for positions inside 60 ms frames.

Frame t is centred on 60 t + 12.5 ms (seven 25 ms windows, 10 ms apart, three of them before it), so
a position p in frames is the time 60 p - 17.5 ms; the rest is what `UPSAMPLED_SHIFT_MS` leads the
centre of its 20 ms step by, 22.5 ms.
"""

_Times = npt.NDArray[np.float64]


def upsampled_token_spans(
    alphas: FloatArray, kept: int, *, duration_ms: int
) -> tuple[tuple[int, int], ...]:
    """Start and end of `kept` tokens, in milliseconds from the start of the segment.

    `alphas`: float32 [3 L], the timestamp head's weights for the valid part of one segment.
    When they do not fire exactly `kept` + 1 times, a copy rescaled to do so is used.
    Spans are in order, do not overlap, lie in [0, duration_ms] and are at least 1 ms long
    (as long as there is a millisecond for each token).

    Raises RecognitionError when an alpha is not finite.

    Source: FunASR funasr/utils/timestamp_tools.py (ts_prediction_lfr6_standard).
    """
    mass = _running_sum(alphas)
    fires = kept + 1
    if int(mass[-1] / FIRE_THRESHOLD) != fires:
        mass *= fires / mass[-1]
    steps = np.searchsorted(mass, FIRE_THRESHOLD * np.arange(1, fires + 1))
    times = steps.astype(np.float64) * UPSAMPLED_STEP_MS + UPSAMPLED_SHIFT_MS
    return _spans(times, end=len(mass) * UPSAMPLED_STEP_MS, duration_ms=duration_ms)


def frame_token_spans(
    alphas: FloatArray, kept: int, *, duration_ms: int, shift_ms: float = FRAME_SHIFT_MS
) -> tuple[tuple[int, int], ...]:
    """As `upsampled_token_spans`, from a plain Paraformer's `alphas`: float32 [L], without tail.

    A token's place is where the running sum is half way through its unit, interpolated inside the
    frame. Trained alphas are spikes of almost exactly 1; where the sum passes the whole number, a
    deficit of 1e-5 would move a fire to the next spike, many frames later. It also needs no
    rescaling in the normal case: the predictor counts floor(sum + 0.45) tokens, so the middle of
    the last one is always inside the sum.

    `shift_ms` is added to each place; a model trained otherwise than FunASR's may need its own.
    """
    mass = _running_sum(alphas)
    fires = kept + 1
    if int(mass[-1] + 0.45) != fires:
        mass *= fires / mass[-1]
    positions = np.interp(
        np.arange(fires) + 0.5, np.concatenate(([0.0], mass)), np.arange(len(mass) + 1)
    )
    times = positions * FRAME_STEP_MS + shift_ms
    return _spans(times, end=len(mass) * FRAME_STEP_MS, duration_ms=duration_ms)


def _running_sum(alphas: FloatArray) -> _Times:
    """Cumulative sum in float64; an all-zero curve, which places nothing, counts as a level one."""
    if not np.isfinite(alphas).all():
        raise RecognitionError("The model's token weights (CIF alphas) are not finite numbers.")
    if not alphas.any():
        alphas = np.ones(max(1, len(alphas)), dtype=np.float32)
    return np.cumsum(alphas, dtype=np.float64)


def _spans(fires: _Times, *, end: float, duration_ms: int) -> tuple[tuple[int, int], ...]:
    """Token i lasts from fire i to fire i + 1, but not longer than `MAX_TOKEN_MS`.

    The last token, unless it was cut, also takes a short rest of the segment, or half of a longer
    one. Unlike FunASR we bound that half too: without a VAD the rest can be seconds of silence.
    """
    if len(fires) == 1:
        return ()
    starts = fires[:-1]
    ends = np.minimum(fires[1:], starts + MAX_TOKEN_MS)
    rest = end - fires[-1]
    if fires[-1] <= ends[-1]:
        ends[-1] += rest if rest <= EDGE_MS else min(rest / 2, MAX_TOKEN_MS)
    return _fit(
        np.rint(starts).astype(int).tolist(), np.rint(ends).astype(int).tolist(), duration_ms
    )


def _fit(starts: list[int], ends: list[int], duration_ms: int) -> tuple[tuple[int, int], ...]:
    """Push spans into [0, duration_ms], in order and apart, each with room for those after it."""
    spans: list[tuple[int, int]] = []
    floor = 0
    for after, start, end in zip(reversed(range(len(starts))), starts, ends, strict=True):
        start = max(min(max(start, floor), duration_ms - after - 1), 0)
        end = max(min(max(end, start + 1), duration_ms - after), start)
        spans.append((start, end))
        floor = end
    return tuple(spans)
