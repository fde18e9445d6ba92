"""Make `sample_audio/`: `python -m training.make_samples --out sample_audio`.

The sentences are those of `grammar/samples.txt`, the voices those that training never uses. Beside
the recordings, `reference/NAME.txt` holds what is said, a line a sentence, and
`reference/NAME.json` when: seconds from the start of the recording, as the synthesiser told them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile

from training import dsp
from training.corpus import Corpus, Sentence, Unit
from training.espeak import Delivery, Espeak
from training.shards import SAMPLE_RATE
from training.synthesise import TEST_VARIANTS, Speaker, speak

_PHONE_RATE = 8000
_PODCAST_RATE = 44_100
_PEAK = 0.35


@dataclass(frozen=True, slots=True)
class Spoken:
    sentence: Sentence
    voice: str
    spans: tuple[tuple[Unit, int, int], ...]
    """Samples [start, end) of the recording at 16 kHz."""


@dataclass(frozen=True, slots=True)
class Recording:
    samples: dsp.FloatArray
    """float32 [samples] at 16 kHz."""
    spoken: tuple[Spoken, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    file: str
    pauses: tuple[float, float]
    """Shortest and longest pause between sentences, in seconds."""
    speakers: tuple[Speaker, ...]
    """They take turns."""
    write: Callable[[Path, dsp.FloatArray], None]


def _speaker(variant: str, accent: str, rate: int, pitch: int = 50) -> Speaker:
    if variant not in TEST_VARIANTS:
        raise ValueError(f"{variant} is a voice that training uses")
    return Speaker(variant, accent, Delivery(variant, rate=rate, pitch=pitch, volume=75))


def record(
    espeak: Espeak, sentences: list[Sentence], recipe: Recipe, rng: random.Random
) -> Recording:
    """Speak the sentences one after the other, with half a second of silence at either end."""
    parts = [_silence(0.5)]
    spoken: list[Spoken] = []
    position = len(parts[0])
    for index, sentence in enumerate(sentences):
        speaker = recipe.speakers[index % len(recipe.speakers)]
        clip = speak(espeak, sentence, speaker, rng)
        last = index + 1 == len(sentences)
        pause = _silence(0.5 if last else rng.uniform(*recipe.pauses))
        spans = tuple((unit, start + position, end + position) for unit, start, end in clip.spans)
        spoken.append(Spoken(sentence, speaker.name, spans))
        parts += (clip.samples * (_PEAK / float(np.max(np.abs(clip.samples)))), pause)
        position += len(clip.samples) + len(pause)
    return Recording(np.concatenate(parts), tuple(spoken))


def write_reference(folder: Path, file: str, recording: Recording) -> None:
    """Write the text and the times of a recording."""
    name = file.partition(".")[0]
    lines = [spoken.sentence.text for spoken in recording.spoken]
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    times = {
        "file": file,
        "duration": round(len(recording.samples) / SAMPLE_RATE, 3),
        "sentences": [
            {
                "text": spoken.sentence.text,
                "voice": spoken.voice,
                "tokens": [
                    [unit.text, round(start / SAMPLE_RATE, 3), round(end / SAMPLE_RATE, 3)]
                    for unit, start, end in spoken.spans
                ],
            }
            for spoken in recording.spoken
        ],
    }
    text = json.dumps(times, ensure_ascii=False, separators=(",", ":"))
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def write_pcm(path: Path, samples: dsp.FloatArray) -> None:
    """16 bits at 16 kHz, in the format of the file's suffix."""
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")


def write_phone(path: Path, samples: dsp.FloatArray) -> None:
    """What a telephone line leaves: 300 to 3400 Hz, mu-law, 8 kHz."""
    narrow = dsp.band_limit(samples, SAMPLE_RATE, 300, 3400)
    narrow = dsp.mu_law(dsp.resample(narrow, 1, 2))
    soundfile.write(path, narrow, _PHONE_RATE, subtype="PCM_16")


def write_podcast(path: Path, samples: dsp.FloatArray) -> None:
    """AAC at 64 kbit/s and 44.1 kHz."""
    audio = dsp.resample(samples, _PODCAST_RATE // 100, SAMPLE_RATE // 100)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=_PODCAST_RATE, layout="mono")
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(audio[None, :], format="fltp", layout="mono")
        frame.sample_rate = _PODCAST_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def _silence(seconds: float) -> dsp.FloatArray:
    return np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)


RECIPES = (
    Recipe("mandarin.wav", (0.4, 0.8), (_speaker("f3", "en-us", 165),), write_pcm),
    Recipe("english.flac", (0.4, 0.8), (_speaker("m7", "en-us", 165),), write_pcm),
    Recipe("mixed.wav", (0.4, 0.8), (_speaker("linda", "en-us", 160),), write_pcm),
    Recipe(
        "long_with_pauses.flac",
        (2.0, 6.0),
        (
            _speaker("m5", "en", 170),
            _speaker("f3", "en-us", 160, pitch=55),
            _speaker("quincy", "en-us", 180, pitch=45),
            _speaker("linda", "en-gb-x-rp", 155),
        ),
        write_pcm,
    ),
    Recipe("phone_8khz.wav", (0.5, 0.9), (_speaker("boris", "en-us", 160),), write_phone),
    Recipe(
        "podcast.m4a",
        (0.4, 1.2),
        (_speaker("m7", "en-us", 170), _speaker("aunty", "en", 165)),
        write_podcast,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--library", help="libespeak-ng.so.1, when not the system's")
    parser.add_argument("--data", help="folder that holds espeak-ng-data")
    arguments = parser.parse_args()
    reference = arguments.out / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    espeak, samples = Espeak(arguments.library, arguments.data), list(Corpus().samples())
    for recipe in RECIPES:
        name = recipe.file.partition(".")[0]
        sentences = [sentence for recording, sentence in samples if recording == name]
        recording = record(espeak, sentences, recipe, random.Random(name))
        recipe.write(arguments.out / recipe.file, recording.samples)
        write_reference(reference, recipe.file, recording)
        print(f"{recipe.file}: {len(recording.samples) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    main()
