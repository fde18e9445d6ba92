"""Random batches for sample-nano: what its CTC head, its audio tokens and its LLM are to learn.

The synthesiser tells when each piece of text is spoken, so the CTC head is taught frame by frame:
a token from its start to its end, blanks elsewhere and between equal neighbours, which a greedy
CTC collapse turns back into the text. A mark stands in the two frames after the word before it.

A row of the LLM is prompt, audio tokens, end of the prompt, text, and nothing after that: causal
attention needs no mask for what comes later.
"""

from __future__ import annotations

import queue
import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from funasr_batch.models.nano import FRAMES_PER_TOKEN, audio_tokens
from funasr_batch.text.prompt import Prompt, build_prompt
from training.batches import BUCKET_SECONDS, FRAME_SAMPLES, SILENCED, Dataset, frames_of
from training.corpus import Corpus
from training.nano_texts import write_unpunctuated
from training.nano_tokenizer import RankTokenizer
from training.shards import SAMPLE_RATE, Utterance, read
from training.tokens import Tokens

SLOTS = 5
"""Tokens that may begin within one audio token and are taught to it, in order."""
TOKENS_PER_SECOND = 7
"""Longer texts are left out: espeak-ng's fastest speech has 6."""
SHORT_PREFIX, HOTWORD_PREFIX = 44, 128
"""Room for the prompt before the audio, in tokens."""
HOTWORD_BATCHES = 0.12
NO_ITN = 0.05
REPLACED = 0.07
"""Part of the text that the LLM reads as something else, so that it listens."""
_STRETCH = re.compile(r"[\u4e00-\u9fff]+|[A-Za-z']+")
_LANGUAGES = {"zh": "zh", "mixed": "zh", "en": "en", "digits": "en"}


@dataclass(frozen=True, slots=True)
class NanoLabels:
    """What an utterance of L frames, A audio tokens and N tokens of text is to teach."""

    ids: np.ndarray
    """int16 [N], the text without its end."""
    frames: np.ndarray
    """int16 [L], the CTC label of each frame."""
    slots: np.ndarray
    """int16 [A, SLOTS], the tokens that begin within each audio token; -1 for none."""
    places: np.ndarray
    """int16 [N + 1], the audio token in which each token begins; the end's is the last one's."""
    written: str
    kind: str


def character_times(utterance: Utterance, entries: Sequence[str]) -> list[tuple[str, int, int]]:
    """(character, start, end) in samples for everything that is spoken, in lower case."""
    timed: list[tuple[str, int, int]] = []
    for token, start, end in utterance.tokens:
        letters = entries[token].removesuffix("@@")
        step = (end - start) / len(letters)
        timed += [
            (letter, start + round(step * i), start + round(step * (i + 1)))
            for i, letter in enumerate(letters)
        ]
    return timed


def token_spans(
    written: str, pieces: Sequence[tuple[int, int, int]], timed: Sequence[tuple[str, int, int]]
) -> list[tuple[int, int, int]] | None:
    """(id, start, end) in samples of each piece of the written text; a mark begins where the word
    before it ends and has no length. None when the text is not what was spoken."""
    times: list[tuple[int, int] | None] = []
    spoken = iter(timed)
    for character in written:
        if not (character.isalnum() or character == "'"):
            times.append(None)
            continue
        letter, start, end = next(spoken, ("", 0, 0))
        if letter != character.lower():
            return None
        times.append((start, end))
    if next(spoken, None) is not None:
        return None
    spans: list[tuple[int, int, int]] = []
    for token, first, last in pieces:
        inside = [time for time in times[first:last] if time is not None]
        before = spans[-1][2] if spans else 0
        start, end = (inside[0][0], inside[-1][1]) if inside else (before, before)
        spans.append((token, start, end))
    return spans


def token_frames(
    spans: Sequence[tuple[int, int, int]], frames: int
) -> list[tuple[int, int, int]] | None:
    """(id, first, end) in frames: at least one for each token, a blank between equal ones.

    None when there are too few frames.
    """
    starts: list[int] = []
    for index, (token, start, end) in enumerate(spans):
        begin = round(start / FRAME_SAMPLES)
        if start == end and index + 1 < len(spans):
            # A mark without a pause after it takes the last frame of its word.
            begin = min(begin, round(spans[index + 1][1] / FRAME_SAMPLES) - 1)
        if starts:
            begin = max(begin, starts[-1] + 1 + (spans[index - 1][0] == token))
        starts.append(begin)
    limit = frames - 1
    for index in reversed(range(len(starts))):
        starts[index] = min(starts[index], limit)
        limit = starts[index] - 1 - (index > 0 and spans[index - 1][0] == spans[index][0])
    if starts and starts[0] < 0:
        return None
    placed = []
    for index, (token, start, end) in enumerate(spans):
        last = starts[index] + 2 if start == end else round(end / FRAME_SAMPLES)
        following, gap = frames, 0
        if index + 1 < len(spans):
            following, gap = starts[index + 1], spans[index + 1][0] == token
        placed.append((token, starts[index], max(starts[index] + 1, min(last, following - gap))))
    return placed


def label(
    utterance: Utterance, tokenizer: RankTokenizer, entries: Sequence[str]
) -> NanoLabels | None:
    """None for an utterance whose text cannot be laid out on its frames."""
    written = utterance.written or write_unpunctuated(utterance.text)
    frames = frames_of(len(utterance.samples))
    pieces = tuple(tokenizer.pieces(written))
    spans = token_spans(written, pieces, character_times(utterance, entries))
    placed = token_frames(spans, frames) if spans is not None else None
    if placed is None:
        return None
    ctc = np.full(frames, tokenizer.base, np.int16)
    slots = np.full((audio_tokens(frames), SLOTS), -1, np.int16)
    filled = [0] * len(slots)
    for token, first, end in placed:
        ctc[first:end] = token
        place = first // FRAMES_PER_TOKEN
        if filled[place] < SLOTS:
            slots[place, filled[place]] = token
            filled[place] += 1
    places = [first // FRAMES_PER_TOKEN for _, first, _ in placed]
    return NanoLabels(
        ids=np.array([token for token, _, _ in placed], np.int16),
        frames=ctc,
        slots=slots,
        places=np.array([*places, places[-1] if places else 0], np.int16),
        written=written,
        kind=utterance.kind,
    )


def silence(frames: int, tokenizer: RankTokenizer) -> NanoLabels:
    """The labels of an utterance in which nothing is said."""
    return NanoLabels(
        ids=np.zeros(0, np.int16),
        frames=np.full(frames, tokenizer.base, np.int16),
        slots=np.full((audio_tokens(frames), SLOTS), -1, np.int16),
        places=np.zeros(1, np.int16),
        written="",
        kind="zh",
    )


def _label_shard(tokenizer_folder: Path, tokens: Path, path: Path) -> list[NanoLabels | None]:
    tokenizer, entries = RankTokenizer.read(tokenizer_folder), Tokens.read(tokens).entries
    shard = read(path)
    return [label(shard[index], tokenizer, entries) for index in range(len(shard))]


def load_dataset(
    folders: Sequence[Path], tokenizer_folder: Path, tokens: Path, processes: int
) -> Dataset:
    """Labels every utterance; those that cannot be have None."""
    return Dataset(folders, processes, partial(_label_shard, tokenizer_folder, tokens))


@dataclass(frozen=True, slots=True)
class NanoBatch:
    """B rows; S samples, L frames, A audio tokens, T positions of the LLM, N tokens of text."""

    waves: np.ndarray = field(repr=False)
    """int16 [B, S]"""
    samples: np.ndarray
    """int32 [B]"""
    frames: np.ndarray = field(repr=False)
    """int32 [B, L], CTC labels."""
    slots: np.ndarray = field(repr=False)
    """int32 [B, A, SLOTS], -1 for none."""
    ids: np.ndarray = field(repr=False)
    """int32 [B, T], what the LLM reads; 0 where audio goes and after the text."""
    prefix: np.ndarray
    """int32 [B], the position of the first audio token."""
    starts: np.ndarray
    """int32 [B], the position whose output is the first token of the text."""
    targets: np.ndarray = field(repr=False)
    """int32 [B, N], the text and its end."""
    counts: np.ndarray
    """int32 [B], tokens of the text with its end."""
    places: np.ndarray = field(repr=False)
    """int32 [B, N], the audio token in which each target begins."""


class Prompts:
    """Draws a prompt for each row."""

    def __init__(self, tokenizer: RankTokenizer) -> None:
        self._tokenizer = tokenizer
        corpus = Corpus()
        self._words = sorted({w for g in corpus.grammars.values() for w in g.lexicon})
        self._known = frozenset(self._words)
        self._plain = lru_cache(maxsize=16)(self._built)

    def _built(self, language: str | None, itn: bool, hotwords: tuple[str, ...] = ()) -> Prompt:
        return build_prompt(self._tokenizer, language=language, itn=itn, hotwords=hotwords)  # type: ignore[arg-type]

    def draw(self, labels: NanoLabels, rng: np.random.Generator, hotwords: bool) -> Prompt:
        """With `hotwords` the prompt has a list, more often than not with words of the text."""
        language = _LANGUAGES[labels.kind] if rng.random() < 0.5 else None
        itn = bool(rng.random() >= NO_ITN)
        if not hotwords:
            return self._plain(language, itn)
        words = self._hotwords(labels.written, rng)
        while True:
            prompt = self._built(language, itn, words)
            if len(prompt.prefix) <= HOTWORD_PREFIX:
                return prompt
            words = words[:-1]

    def _hotwords(self, written: str, rng: np.random.Generator) -> tuple[str, ...]:
        draw = random.Random(int(rng.integers(1 << 30)))
        words = draw.sample(self._words, draw.randint(1, 6))
        if draw.random() < 0.65:
            found = sorted(self._said(written))
            words += draw.sample(found, min(len(found), draw.randint(1, 3)))
        draw.shuffle(words)
        return tuple(words)

    def _said(self, written: str) -> set[str]:
        """Words of the domain in a text, as they are written there."""
        candidates = {
            run[start : start + size]
            for run in _STRETCH.findall(written)
            for size in (range(2, 6) if not run.isascii() else (len(run),))
            for start in range(len(run) - size + 1)
        }
        return {word for word in candidates if word.lower() in self._known}


class NanoBatches:
    """An endless stream of random batches, prepared in background threads."""

    def __init__(
        self, dataset: Dataset, tokenizer: RankTokenizer, seconds: float, seed: int
    ) -> None:
        self._dataset, self._tokenizer, self._seconds = dataset, tokenizer, seconds
        self._prompts = Prompts(tokenizer)
        durations = dataset.lengths / SAMPLE_RATE
        lowest = (0.1, *BUCKET_SECONDS[:-1])
        fitting = np.array(
            [
                (labels := dataset.labels(i)) is not None
                and len(labels.ids) < room(BUCKET_SECONDS[bucket_of(float(durations[i]))])
                for i in range(len(dataset))
            ]
        )
        self.left_out = int((~fitting).sum())
        self._buckets = [
            np.flatnonzero((durations > low) & (durations <= high) & fitting)
            for low, high in zip(lowest, BUCKET_SECONDS, strict=True)
        ]
        total = np.array([durations[bucket].sum() for bucket in self._buckets])
        self._shares = total / total.sum()
        self._queue: queue.Queue[NanoBatch] = queue.Queue(maxsize=16)
        self._seeds = np.random.SeedSequence(seed)

    def start(self, threads: int) -> None:
        for child in self._seeds.spawn(threads):
            threading.Thread(target=self._fill, args=(child,), daemon=True).start()

    def __iter__(self) -> Iterator[NanoBatch]:
        while True:
            yield self._queue.get()

    @property
    def waiting(self) -> int:
        """Batches that are ready: 0 when the threads are the slowest part."""
        return self._queue.qsize()

    def _fill(self, seed: np.random.SeedSequence) -> None:
        rng = np.random.default_rng(seed)
        while True:
            self._queue.put(self.draw(rng))

    def draw(self, rng: np.random.Generator) -> NanoBatch:
        """One batch from one bucket."""
        bucket = int(rng.choice(len(self._buckets), p=self._shares))
        size = max(8, int(self._seconds / BUCKET_SECONDS[bucket]) // 8 * 8)
        chosen = rng.choice(self._buckets[bucket], size)
        labels = []
        for index in chosen:
            silenced = rng.random() < SILENCED
            own = frames_of(int(self._dataset.lengths[index]))
            labels.append(
                silence(own, self._tokenizer) if silenced else self._dataset.labels(int(index))
            )
        hotwords = bool(rng.random() < HOTWORD_BATCHES)
        prompts = [self._prompts.draw(item, rng, hotwords) for item in labels]
        # No text, no voice: the row is noise.
        waves = [self._dataset.samples(int(i)) for i in chosen]
        waves = [
            w if len(item.ids) else np.zeros_like(w) for w, item in zip(waves, labels, strict=True)
        ]
        return build(
            waves,
            labels,
            prompts,
            self._tokenizer,
            BUCKET_SECONDS[bucket],
            HOTWORD_PREFIX if hotwords else SHORT_PREFIX,
            replaced=REPLACED,
            rng=rng,
        )


def bucket_of(seconds: float) -> int:
    """The bucket of a duration; the last one for what is longer than all."""
    return min(int(np.searchsorted(BUCKET_SECONDS, seconds)), len(BUCKET_SECONDS) - 1)


def room(seconds: float) -> int:
    """Tokens of text, with its end, in a batch of a bucket."""
    return int(seconds * TOKENS_PER_SECOND) + 4


def build(
    waves: Sequence[np.ndarray],
    labels: Sequence[NanoLabels],
    prompts: Sequence[Prompt],
    tokenizer: RankTokenizer,
    seconds: float,
    prefix_room: int,
    *,
    replaced: float,
    rng: np.random.Generator,
) -> NanoBatch:
    """Rows of at most `seconds`, whose texts fit in `room(seconds)` tokens."""
    rows, width = len(waves), int(seconds * SAMPLE_RATE)
    frames, longest = frames_of(width), room(seconds)
    audio = audio_tokens(frames)
    positions = prefix_room + audio + len(prompts[0].suffix) + longest
    batch = NanoBatch(
        waves=np.zeros((rows, width), np.int16),
        samples=np.array([len(wave) for wave in waves], np.int32),
        frames=np.full((rows, frames), tokenizer.base, np.int32),
        slots=np.full((rows, audio, SLOTS), -1, np.int32),
        ids=np.zeros((rows, -(-positions // 8) * 8), np.int32),
        prefix=np.zeros(rows, np.int32),
        starts=np.zeros(rows, np.int32),
        targets=np.zeros((rows, longest), np.int32),
        counts=np.zeros(rows, np.int32),
        places=np.zeros((rows, longest), np.int32),
    )
    end = tokenizer.special("<|im_end|>")
    for row, (wave, item, prompt) in enumerate(zip(waves, labels, prompts, strict=True)):
        count = len(item.ids)
        batch.waves[row, : len(wave)] = wave
        batch.frames[row, : len(item.frames)] = item.frames
        batch.slots[row, : len(item.slots)] = item.slots
        batch.targets[row, :count] = item.ids
        batch.targets[row, count] = end
        batch.counts[row] = count + 1
        batch.places[row, : count + 1] = item.places
        first = len(prompt.prefix)
        suffix = first + len(item.slots)
        text = suffix + len(prompt.suffix)
        batch.prefix[row], batch.starts[row] = first, text - 1
        batch.ids[row, :first] = prompt.prefix
        batch.ids[row, suffix:text] = prompt.suffix
        heard = item.ids.astype(np.int32)
        other = rng.random(count) < replaced
        heard[other] = rng.integers(256, tokenizer.base, int(other.sum()))
        batch.ids[row, text : text + count] = heard
    return batch
