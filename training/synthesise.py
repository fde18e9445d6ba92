"""Synthesise labelled speech of the domain: `python -m training.synthesise --help`.

Every utterance draws its sentences, voice, delivery and channel from a random state of its own
shard, so a shard depends on the seed and its number only, not on the number of processes.
Noise, level and masking are left to the training loop.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process a core; before numpy loads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from training import dsp, nano_texts, shards
from training.corpus import Corpus, Kind, Language, Sentence, Split, Unit
from training.espeak import Delivery, Espeak, Word
from training.shards import SAMPLE_RATE, Utterance
from training.tokens import Tokens

MANDARIN = "cmn-latn-pinyin"
ACCENTS = {"en-us": 6, "en": 4, "en-gb-x-rp": 3, "en-us-nyc": 1, "en-029": 1, "en-gb-scotland": 1}
"""English voices of espeak-ng with how often each is used."""

TEST_VARIANTS = ("f3", "linda", "aunty", "m5", "m7", "quincy", "boris", "victor")
"""Voice variants that training never uses."""
TRAIN_VARIANTS = (
    *("", "", "f1", "f2", "f4", "f5", "m1", "m2", "m3", "m4", "m6", "m8", "klatt", "klatt2"),
    *("klatt3", "klatt4", "klatt5", "klatt6", "Alex", "Andrea", "Andy", "Annie", "AnxiousAndy"),
    *("Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Mario", "Michael", "Mike"),
    *("Mr serious", "Nguyen", "RicishayMax", "Storm", "Tweaky", "adam", "anika", "announcer"),
    *("antonio", "belinda", "benjamin", "caleb", "croak", "david", "ed", "edward", "edward2"),
    *("fast", "grandma", "grandpa", "gustave", "iven", "iven2", "iven3", "iven4", "john"),
    *("marcelo", "max", "michel", "miguel", "pablo", "paul", "pedro", "rob", "robert", "sandro"),
    *("steph", "steph2", "steph3", "travis"),
)
"""The others but for whispers, robots with echoes and those whose spectra correlate least with the
average voice (Alicia, Demonic, Lee, Marco, UniRobot, kaukovalta, norbert, shelby, zac)."""

KINDS: dict[Kind, float] = {"zh": 0.36, "en": 0.46, "mixed": 0.18}
SENTENCE_COUNTS = {1: 0.72, 2: 0.2, 3: 0.06, 4: 0.02}
RANDOM_WORDS = 0.22
"""Part of the training sentences that are words without grammar."""
DIGIT_STRINGS = 0.07
SHARD_SECONDS = 1200
LONGEST_SECONDS = 20.0

REVERBERANT, TELEPHONE, COMPANDED, BAND_LIMITED = 0.2, 0.1, 0.06, 0.1


@dataclass(frozen=True, slots=True)
class Speaker:
    variant: str
    accent: str
    """The espeak-ng voice for English."""
    delivery: Delivery

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Speech with a span for each unit of its text: samples [start, end) of the audio."""

    samples: dsp.FloatArray
    spans: tuple[tuple[Unit, int, int], ...]


class UnalignedError(ValueError):
    """espeak-ng gave no time for the first word of a run."""


def draw_speaker(rng: random.Random, split: Split) -> Speaker:
    """A voice and how it speaks; half of them at a usual pitch range and speed."""
    variant = rng.choice(TRAIN_VARIANTS if split == "train" else TEST_VARIANTS)
    accent = rng.choices(list(ACCENTS), list(ACCENTS.values()))[0]
    delivery = Delivery(
        variant=variant,
        rate=round(rng.triangular(110, 260, 175)),
        pitch=round(rng.triangular(20, 80, 50)),
        pitch_range=round(rng.triangular(20, 80, 50)),
        word_gap=rng.choices((0, 1, 2, 4, 8), (60, 15, 12, 9, 4))[0],
        volume=rng.randint(55, 95),
    )
    return Speaker(variant, accent, delivery)


def speak(espeak: Espeak, sentence: Sentence, speaker: Speaker, rng: random.Random) -> Clip:
    """One sentence at 16 kHz. A mixture is spoken run by run by both languages' voices."""
    parts: list[dsp.FloatArray] = []
    spans: list[tuple[Unit, int, int]] = []
    position = 0
    for language, group in groupby(sentence.units, key=lambda unit: unit.language):
        units = tuple(group)
        samples, found = _speak_run(espeak, language, units, speaker)
        gap = np.zeros(round(rng.uniform(0.01, 0.08) * espeak.sample_rate), dtype=np.float32)
        spans.extend((unit, start + position, end + position) for unit, start, end in found)
        parts += (samples, gap)
        position += len(samples) + len(gap)
    audio = dsp.resample(np.concatenate(parts[:-1]), 320, 441)
    scale = SAMPLE_RATE / espeak.sample_rate
    return Clip(
        audio, tuple((unit, round(start * scale), round(end * scale)) for unit, start, end in spans)
    )


def _speak_run(
    espeak: Espeak, language: Language, units: tuple[Unit, ...], speaker: Speaker
) -> tuple[dsp.FloatArray, list[tuple[Unit, int, int]]]:
    """A run of one language at espeak-ng's rate, cut after its last word, with its spans."""
    voice = MANDARIN if language == "zh" else speaker.accent
    text = " ".join(unit.spoken for unit in units)
    speech = espeak.speak(voice, text, speaker.delivery)
    samples = speech.samples[: speech.words[-1].end].astype(np.float32)
    samples /= 32768
    fade = min(len(samples), espeak.sample_rate // 200)
    samples[len(samples) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return samples, _align(units, speech.words)


def _align(units: tuple[Unit, ...], words: tuple[Word, ...]) -> list[tuple[Unit, int, int]]:
    """The time of each unit. espeak-ng announces some neighbours as one word ("of the"), which
    share its time by their letters, and some words in two parts ("o'clock")."""
    spans: list[tuple[int, int, list[Unit]]] = []
    ahead = list(words)
    position = 0
    for unit in units:
        position += len(unit.spoken) + 1
        own = []
        while ahead and ahead[0].position < position:
            own.append(ahead.pop(0))
        if own:
            spans.append((own[0].start, own[-1].end, [unit]))
        elif spans:
            spans[-1][2].append(unit)
        else:
            raise UnalignedError(f"espeak-ng announced no word for {unit.spoken!r}")
    return [span for start, end, group in spans for span in _share(group, start, end)]


def _share(units: list[Unit], start: int, end: int) -> Iterator[tuple[Unit, int, int]]:
    total = sum(len(unit.spoken) for unit in units)
    done = 0
    for unit in units:
        first = start + (end - start) * done // total
        done += len(unit.spoken)
        yield unit, first, start + (end - start) * done // total


def draw_utterance(
    corpus: Corpus, espeak: Espeak, tokens: Tokens, rng: random.Random, split: Split
) -> Utterance:
    """One to four sentences of one speaker with silence around them, through one channel."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    speaker = draw_speaker(rng, split)
    count = rng.choices(list(SENTENCE_COUNTS), list(SENTENCE_COUNTS.values()))[0]
    parts = [_silence(rng.uniform(0, 0.6))]
    spans: list[tuple[Unit, int, int]] = []
    sentences: list[Sentence] = []
    position = len(parts[0])
    for index in range(count):
        sentence = _draw_sentence(corpus, rng, kind, split)
        clip = speak(espeak, sentence, speaker, rng)
        pause = _silence(rng.uniform(0.2, 1.0))
        longest = LONGEST_SECONDS * SAMPLE_RATE
        if index and position + len(pause) + len(clip.samples) > longest:
            break
        if index:
            parts.append(pause)
            position += len(pause)
        sentences.append(sentence)
        spans.extend((unit, start + position, end + position) for unit, start, end in clip.spans)
        parts.append(clip.samples)
        position += len(clip.samples)
    parts.append(_silence(rng.uniform(0, 0.6)))
    audio = _through_channel(np.concatenate(parts), rng)
    written = nano_texts.write([unit.text for unit in s.units] for s in sentences)
    return _label(audio, spans, written, tokens, speaker, rng)


def _draw_sentence(corpus: Corpus, rng: random.Random, kind: Kind, split: Split) -> Sentence:
    if kind != "mixed" and rng.random() < DIGIT_STRINGS:
        return corpus.digits(rng, kind, split)
    if split == "train" and rng.random() < RANDOM_WORDS:
        return corpus.words(rng, kind, split)
    return corpus.sentence(rng, kind, split)


def _label(
    audio: dsp.FloatArray,
    spans: list[tuple[Unit, int, int]],
    written: str,
    tokens: Tokens,
    speaker: Speaker,
    rng: random.Random,
) -> Utterance:
    peak = rng.uniform(0.3, 0.95) / max(float(np.max(np.abs(audio))), 1e-3)
    sentence = Sentence(tuple(unit for unit, _, _ in spans))
    return Utterance(
        samples=np.round(audio * (peak * 32767)).astype(np.int16),
        tokens=tuple(
            token for unit, start, end in spans for token in tokens.spread(unit.text, start, end)
        ),
        text=sentence.text,
        kind=sentence.kind,
        voice=speaker.name,
        written=written,
    )


def _through_channel(audio: dsp.FloatArray, rng: random.Random) -> dsp.FloatArray:
    """A room, a telephone, a narrow microphone or companding, for some of the utterances."""
    if rng.random() < REVERBERANT:
        noise = np.random.default_rng(rng.getrandbits(32))
        decay, wet = rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.7)
        audio = dsp.reverberate(audio, SAMPLE_RATE, decay, wet, noise)
    draw = rng.random()
    if draw < TELEPHONE:
        audio = dsp.band_limit(audio, SAMPLE_RATE, rng.uniform(200, 350), rng.uniform(3200, 3800))
    elif draw < TELEPHONE + BAND_LIMITED:
        audio = dsp.band_limit(audio, SAMPLE_RATE, rng.uniform(40, 200), rng.uniform(3800, 7000))
    if rng.random() < COMPANDED:
        audio = dsp.mu_law(audio / max(float(np.max(np.abs(audio))), 1e-3) * rng.uniform(0.1, 0.9))
    return audio


def _silence(seconds: float) -> dsp.FloatArray:
    return np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to make."""

    number: int
    seconds: float
    seed: int
    split: Split
    folder: Path
    tokens: Path
    library: str | None
    data: str | None


def make_shard(job: Job) -> float:
    """Synthesise and write one shard; returns its seconds of audio."""
    espeak = Espeak(job.library, job.data)
    corpus, tokens = Corpus(), Tokens.read(job.tokens)
    rng = random.Random(f"{job.seed} {job.split} {job.number}")
    utterances: list[Utterance] = []
    seconds = 0.0
    while seconds < job.seconds:
        try:
            utterances.append(draw_utterance(corpus, espeak, tokens, rng, job.split))
        except UnalignedError:  # about one sentence in a million words
            continue
        seconds += len(utterances[-1].samples) / SAMPLE_RATE
    shards.write(job.folder, f"{job.split}-{job.number:04d}", utterances)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--library", help="libespeak-ng.so.1, when not the system's")
    parser.add_argument("--data", help="folder that holds espeak-ng-data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = Job(
        number=0,
        seconds=SHARD_SECONDS,
        seed=arguments.seed,
        split=arguments.split,
        folder=arguments.out,
        tokens=arguments.tokens,
        library=arguments.library,
        data=arguments.data,
    )
    total = arguments.hours * 3600
    count = max(1, round(total / SHARD_SECONDS))
    jobs = [replace(first, number=number, seconds=total / count) for number in range(count)]
    begun = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        made = sum(pool.imap_unordered(make_shard, jobs))
    spent = time.perf_counter() - begun
    print(f"{made / 3600:.2f} h of speech in {count} shards, {spent:.0f} s, {made / spent:.0f}x")


if __name__ == "__main__":
    main()
