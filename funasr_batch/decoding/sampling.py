"""From logits to the next token: penalties as `transformers` computes them, then greedy or sampled.

Everything stays on the device. A history is the ids that a row has generated, int [..., M], its
newest last and filled on the left with `NOTHING`; the prompt is not part of it (FunASR feeds
embeddings, so the reference never sees prompt ids either).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from funasr_batch.models.layers import peak_probability

NOTHING = -1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. The default is greedy, with nothing changed."""

    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this are sampled from."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were generated before become less likely (Keskar et al. 2019, CTRL)."""
    no_repeat_ngram: int = 0
    """No n-gram of this length is generated twice; 0 allows all."""
    seed: int = 0

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram > 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def penalise(logits: mx.array, history: mx.array | None, sampling: Sampling) -> mx.array:
    """logits [..., V] after the repetition penalty and the ban of repeated n-grams.

    Sources: transformers src/transformers/generation/logits_process.py,
    RepetitionPenaltyLogitsProcessor and NoRepeatNGramLogitsProcessor.
    """
    if history is None or history.shape[-1] == 0:
        return logits
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        said = _marked(history, history != NOTHING, logits.shape[-1])
        weaker = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(said, weaker, logits)
    if 0 < sampling.no_repeat_ngram <= history.shape[-1]:
        banned = _ngram_ends(history, sampling.no_repeat_ngram)
        logits = mx.where(_marked(history, banned, logits.shape[-1]), -mx.inf, logits)
    return logits


def _ngram_ends(history: mx.array, length: int) -> mx.array:
    """bool [..., M]: the tokens that followed an earlier occurrence of the last length - 1 ones."""
    size = history.shape[-1]
    ends = history[..., length - 1 :] != NOTHING
    for back in range(1, length):
        latest = history[..., size - back : size - back + 1]
        earlier = history[..., length - 1 - back : size - back]
        ends = ends & (earlier == latest) & (latest != NOTHING)
    padding = [(0, 0)] * (history.ndim - 1) + [(length - 1, 0)]
    return mx.pad(ends, padding)


def _marked(ids: mx.array, chosen: mx.array, vocabulary: int) -> mx.array:
    """bool [..., V], true at each of the ids [..., M] that is chosen."""
    marks = mx.zeros((*ids.shape[:-1], vocabulary + 1), mx.bool_)
    places = mx.where(chosen, ids, vocabulary)  # the column that is cut off
    return mx.put_along_axis(marks, places, mx.array(True), axis=-1)[..., :vocabulary]


def choose(logits: mx.array, sampling: Sampling, key: mx.array | None) -> tuple[mx.array, mx.array]:
    """The next ids, int [...], and their log-probabilities, float32 [...], of logits [..., V].

    The log-probability is the model's own at temperature 1, so that it can serve as confidence.
    """
    logits = logits.astype(mx.float32)
    if sampling.is_greedy:
        return mx.argmax(logits, axis=-1), mx.log(peak_probability(logits))
    scaled = logits / sampling.temperature
    if sampling.top_p < 1.0:
        scaled = _nucleus(scaled, sampling.top_p)
    ids = mx.random.categorical(scaled, axis=-1, key=key)
    chosen = mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return ids, chosen - mx.logsumexp(logits, axis=-1)


def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    """-inf for all but the most probable tokens that reach `top_p` together; at least one stays.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    probabilities = mx.softmax(ranked, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    ranked = mx.where((before < top_p) | (before == 0), ranked, -mx.inf)
    return mx.put_along_axis(mx.full(logits.shape, -mx.inf), order, ranked, axis=-1)


def with_newest(history: mx.array, ids: mx.array) -> mx.array:
    """history [B, M] after one more token each, ids int [B]."""
    return mx.concatenate([history[:, 1:], ids[:, None].astype(history.dtype)], axis=1)


def histories_of_block(history: mx.array, ids: mx.array) -> mx.array:
    """The history before each position of a block: history [B, M], ids int [B, N] -> [B, N, M].

    `ids` are the block's inputs; the first of them is the history's newest token already.
    """
    size = history.shape[1]
    whole = mx.concatenate([history, ids[:, 1:].astype(history.dtype)], axis=1)
    return mx.stack([whole[:, n : n + size] for n in range(ids.shape[1])], axis=1)
