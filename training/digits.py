"""Strings of real spoken digits from the Free Spoken Digit Dataset (FSDD, CC BY-SA 4.0).

`--pack FSDD_DIR OUT.npz` puts the recordings into one file; without it, labelled strings are made
from such a file. A string has the voice of one speaker. The speaker that is held out speaks the
test set only, unchanged but for the pauses between the digits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process a core; before numpy loads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import random
import re
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training import dsp, nano_texts, shards
from training.corpus import Split
from training.shards import SAMPLE_RATE, Utterance
from training.tokens import Tokens

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = "jackson"
STRINGS_PER_SHARD = 1000

_RATE = 8000
_FILE = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
_FRAME = _RATE // 100
_SILENCE = 10 ** (-34 / 20)
"""Frames this far under the loudest one are silence at either end of a recording."""
_LOW_SILENCE = 10 ** (-26 / 20)
_MARGIN = 3 * _FRAME
"""Kept on either side of what is louder than silence: soft fricatives and releases."""
_LONGEST_PAUSE = 0.5


@dataclass(frozen=True, slots=True)
class Digits:
    """Every recording, in the order of the arrays."""

    audio: npt.NDArray[np.int16] = field(repr=False)
    """int16 [all samples] at 8 kHz."""
    offset: npt.NDArray[np.int64] = field(repr=False)
    """int64 [recordings + 1]; recording i is `audio[offset[i]:offset[i + 1]]`."""
    digit: npt.NDArray[np.int64] = field(repr=False)
    speaker: npt.NDArray[np.str_] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Digits:
        with np.load(path) as packed:
            return cls(**packed)

    def clip(self, index: int) -> dsp.FloatArray:
        """A recording, float32 [samples] at 8 kHz with a peak of 1, without the silence around."""
        audio = self.audio[self.offset[index] : self.offset[index + 1]].astype(np.float32)
        audio -= audio.mean()
        start, end = voiced(audio)
        audio = audio[start:end]
        return audio / max(float(np.max(np.abs(audio))), 1.0)


def pack(folder: Path, target: Path) -> int:
    """Write the recordings of an FSDD folder into one .npz; returns their number.

    Raises ValueError for a file that is not mono 16-bit audio at 8 kHz."""
    found = sorted((path.name, path) for path in folder.rglob("*.wav") if _FILE.match(path.name))
    audio, digits, speakers = [], [], []
    for name, path in found:
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, _RATE):
                raise ValueError(f"{path} is not mono 16-bit audio at 8 kHz")
            audio.append(np.frombuffer(file.readframes(file.getnframes()), dtype="<i2"))
        digit, speaker, _ = _FILE.fullmatch(name).groups()  # type: ignore[union-attr]
        digits.append(int(digit))
        speakers.append(speaker)
    offset = np.concatenate([[0], np.cumsum([len(samples) for samples in audio])])
    np.savez_compressed(
        target, audio=np.concatenate(audio), offset=offset, digit=digits, speaker=speakers
    )
    return len(found)


def voiced(audio: dsp.FloatArray) -> tuple[int, int]:
    """Samples [start, end) of a digit at 8 kHz in its recording, by the energy of 10 ms frames."""
    frames = audio[: len(audio) // _FRAME * _FRAME].reshape(-1, _FRAME)
    if not len(frames):
        return 0, len(audio)
    level = np.sqrt(np.mean(frames**2, axis=1))
    # Steady background noise must not count as speech.
    floor = min(2 * float(np.percentile(level, 5)), _LOW_SILENCE * float(level.max()))
    loud = np.flatnonzero(level > max(_SILENCE * float(level.max()), floor))
    if not len(loud):
        return 0, len(audio)
    start = int(loud[0]) * _FRAME - _MARGIN
    end = (int(loud[-1]) + 1) * _FRAME + _MARGIN
    return max(0, start), min(len(audio), end)


def draw_string(
    digits: Digits, speaker: str, tokens: Tokens, rng: random.Random, split: Split
) -> Utterance:
    """One to eight digits (three to eight for testing) of one speaker, with pauses of 50 to 500 ms.

    For training, speed and pitch change together by up to 12 % for the string, tempo alone by up to
    12 % for some of its digits, and the level by up to 6 dB from digit to digit."""
    training = split == "train"
    own = np.flatnonzero(digits.speaker == speaker).tolist()
    chosen = rng.choices(own, k=rng.randint(1 if training else 3, 8))
    speed = round(100 * rng.uniform(0.88, 1.12)) if training else 100
    pauses = rng.uniform(0.05, _LONGEST_PAUSE)
    parts = [_pause(rng.uniform(0.02, 0.6))]
    labels: list[tuple[int, int, int]] = []
    position = len(parts[0])
    for index in chosen:
        clip = dsp.resample(_edged(digits.clip(index)), 200, speed)
        if training:
            if rng.random() < 0.5:
                clip = dsp.stretch(clip, rng.uniform(0.88, 1.12), SAMPLE_RATE)
            clip *= 10 ** (rng.uniform(-6, 0) / 20)
        name = NAMES[digits.digit[index]]
        labels += tokens.spread(name, position, position + len(clip))
        pause = _pause(min(_LONGEST_PAUSE, max(0.05, pauses * rng.uniform(0.6, 1.4))))
        parts += (clip, pause)
        position += len(clip) + len(pause)
    parts[-1] = _pause(rng.uniform(0.02, 0.6))
    audio = np.concatenate(parts)
    audio *= rng.uniform(0.3, 0.95) / float(np.max(np.abs(audio)))
    return Utterance(
        samples=np.round(audio * 32767).astype(np.int16),
        tokens=tuple(labels),
        text=" ".join(NAMES[digits.digit[index]] for index in chosen),
        kind="digits",
        voice=speaker,
        written=nano_texts.write([[NAMES[digits.digit[index]] for index in chosen]]),
    )


def _edged(clip: dsp.FloatArray) -> dsp.FloatArray:
    """Fade 5 ms in and out, so that a cut does not click."""
    ramp = np.linspace(0, 1, min(_RATE // 200, len(clip)), dtype=np.float32)
    clip = clip.copy()
    clip[: len(ramp)] *= ramp
    clip[len(clip) - len(ramp) :] *= ramp[::-1]
    return clip


def _pause(seconds: float) -> dsp.FloatArray:
    return np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    packed: Path
    folder: Path
    tokens: Path
    count: int
    seed: int
    split: Split
    held_out: str

    def speakers(self, digits: Digits) -> tuple[str, ...]:
        everybody = {str(speaker) for speaker in digits.speaker}
        if self.held_out not in everybody:
            raise ValueError(
                f"no speaker {self.held_out}, there are {', '.join(sorted(everybody))}"
            )
        known = sorted(everybody - {self.held_out})
        return tuple(known) if self.split == "train" else (self.held_out,)


def make_shard(plan: Plan, number: int) -> float:
    """Make and write the strings of one shard; returns its seconds of audio."""
    digits, tokens = Digits.read(plan.packed), Tokens.read(plan.tokens)
    speakers = plan.speakers(digits)
    rng = random.Random(f"{plan.seed} digits {plan.split} {number}")
    count = min(STRINGS_PER_SHARD, plan.count - number * STRINGS_PER_SHARD)
    utterances = [
        draw_string(digits, rng.choice(speakers), tokens, rng, plan.split) for _ in range(count)
    ]
    shards.write(plan.folder, f"digits-{plan.split}-{number:04d}", utterances)
    return sum(len(utterance.samples) for utterance in utterances) / SAMPLE_RATE


def make(plan: Plan, processes: int) -> Iterator[float]:
    """Make all shards; yields the seconds of audio in each."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    numbers = range(-(-plan.count // STRINGS_PER_SHARD))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(partial(make_shard, plan), numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pack", type=Path, nargs=2, metavar=("FSDD_DIR", "OUT.npz"))
    parser.add_argument("--packed", type=Path, help="the .npz that --pack wrote")
    parser.add_argument("--out", type=Path, help="folder of the shards")
    parser.add_argument("--tokens", type=Path, help="tokens.json")
    parser.add_argument("--count", type=int, default=20_000, help="number of strings")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--held-out", default=HELD_OUT, help="the speaker of the test set")
    arguments = parser.parse_args()
    if arguments.pack:
        print(f"{pack(*arguments.pack)} recordings")
        return
    if not (arguments.packed and arguments.out and arguments.tokens):
        parser.error("--packed, --out and --tokens are needed")
    plan = Plan(
        packed=arguments.packed,
        folder=arguments.out,
        tokens=arguments.tokens,
        count=arguments.count,
        seed=arguments.seed,
        split=arguments.split,
        held_out=arguments.held_out,
    )
    seconds = sum(make(plan, arguments.processes))
    print(f"{seconds / 3600:.2f} h in {plan.count} strings")


if __name__ == "__main__":
    main()
