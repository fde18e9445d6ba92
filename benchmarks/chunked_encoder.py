"""What encoding in pieces costs: distance from encoding a recording whole, and error rates.

    python benchmarks/chunked_encoder.py --model sample-nano sample_audio/*.wav \\
        --references sample_audio/reference
    python benchmarks/chunked_encoder.py --model sample-nano --shards DIR --limit 400

Every recording is encoded whole and, as `--stream-encoder` does it, in pieces with audio around
them, on both sides as much as `--contexts` says; frame by frame the two are compared. Where there
are references (NAME.txt in the folder, or those of shards of training/), the texts that the LLM
writes are counted as well: a Chinese character or a word is a unit, marks and spaces do not count.
Utterances of shards, which are short, are put together to recordings of about `--seconds`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import machine
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from funasr_batch.audio import open_audio
from funasr_batch.loading import load
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import FRAME_MS, SAMPLE_RATE, Excerpt, FloatArray
from funasr_batch.segments import ContextCutter, SegmentPolicy
from funasr_batch.text.tokens import join_texts

sys.path.insert(0, str(Path(__file__).parents[1]))  # training/ is not installed
from training.nano_scoring import edits, units_of
from training.shards import read_all

Items = Sequence[FloatArray | Excerpt]

BOUNDS = (0.0, 0.12, 0.5, 1.0, 2.0, 1e9)
"""Seconds from the nearest cut, by which distances are shown."""
PAUSE = 0.4
"""Seconds of a quiet room between two utterances of a shard."""


@dataclass(frozen=True, slots=True)
class Recording:
    name: str
    samples: FloatArray
    reference: str | None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to encode recordings in pieces."""

    left: float
    right: float
    piece: float

    def __str__(self) -> str:
        return f"{self.left:g} + {self.right:g} s"

    def items(self, recognizer: Recognizer, samples: FloatArray) -> list[FloatArray | Excerpt]:
        policy = SegmentPolicy(
            max_seconds=60.0,
            piece_seconds=self.piece,
            left_context_seconds=self.left,
            right_context_seconds=self.right,
        )
        cutter = ContextCutter(policy)
        return [recognizer.features(clip) for clip in (*cutter.accept(samples), *cutter.finish())]


@dataclass(slots=True)
class Rate:
    errors: int = 0
    units: int = 0

    def add(self, reference: str, text: str) -> None:
        wanted = units_of(reference)
        self.errors += edits(wanted, units_of(text))
        self.units += len(wanted)

    def __str__(self) -> str:
        return f"{self.errors / self.units:7.2%}" if self.units else "      -"


def main() -> int:
    options = _options()
    recognizer = load(
        options.model, stream_encoder=True, max_segment=60.0, offline=True, dtype=options.dtype
    )
    recordings = [
        recording
        for recording in _recordings(options)
        if _is_short_enough(recording, options.longest)
    ]
    if not recordings:
        print("no recording to encode: give audio files or --shards", file=sys.stderr)
        return 2
    print(machine.describe())
    seconds = sum(len(recording.samples) for recording in recordings) / SAMPLE_RATE
    print(
        f"{recognizer.info.name}, {recognizer.dtype}: {len(recordings)} recordings of "
        f"{seconds:.0f} s, pieces of up to {options.piece:g} s\n"
    )
    chosen = SegmentPolicy()
    ways = [Way(context, context, options.piece) for context in options.contexts]
    ways.append(Way(chosen.left_context_seconds, chosen.right_context_seconds, options.piece))

    whole_rate = Rate()
    wholes = []
    for recording in recordings:
        features = recognizer.frontend.features(recording.samples)
        wholes.append(_memory(recognizer, [features]))
        if recording.reference is not None:
            whole_rate.add(recording.reference, _text(recognizer, [features]))

    bounds = [f"{b:g}-{e:g} s" if e < 1e9 else f"{b:g} s on" for b, e in pairwise(BOUNDS)]
    print(f"{'':>42}relative L2 by distance from a cut" + " " * 17 + "frames")
    print(
        f"{'context':>11}  {'L2 mean':>8}{'95 %':>8}{'cosine':>9}  "
        + "".join(f"{bound:>11}" for bound in bounds)
        + f"{'encoded':>10}{'errors':>9}"
    )
    for way in ways:
        _measure(way, recognizer, recordings, wholes)
    print(f"{'whole':>11}{'':>92}{1:>7.2f}×  {whole_rate}")
    return 0


def _measure(
    way: Way,
    recognizer: Recognizer,
    recordings: Sequence[Recording],
    wholes: Sequence[FloatArray],
) -> None:
    rate = Rate()
    distances, cosines, from_cut = [], [], []
    encoded = frames = 0
    for recording, whole in zip(recordings, wholes, strict=True):
        items = way.items(recognizer, recording.samples)
        pieces = _memory(recognizer, items)
        assert pieces.shape == whole.shape
        distances.append(_norm(pieces - whole) / _norm(whole))
        cosines.append((pieces * whole).sum(axis=1) / (_norm(pieces) * _norm(whole)))
        from_cut.append(_seconds_from_cut(items))
        encoded += sum(map(len, items))
        frames += len(whole)
        if recording.reference is not None:
            rate.add(recording.reference, _text(recognizer, items))
    distance, cosine = np.concatenate(distances), np.concatenate(cosines)
    place = np.concatenate(from_cut)
    parts = []
    for first, after in pairwise(BOUNDS):
        chosen = distance[(place >= first) & (place < after)]
        parts.append(f"{chosen.mean():11.4f}" if len(chosen) else f"{'-':>11}")
    print(
        f"{way!s:>11}  {distance.mean():8.4f}{np.percentile(distance, 95):8.4f}"
        f"{cosine.mean():9.5f}  {''.join(parts)}{encoded / frames:9.2f}×  {rate}"
    )


def _memory(recognizer: Recognizer, items: Items) -> FloatArray:
    """float32 [L, D] of a recording, its pieces one after the other."""
    encoded = recognizer.decoding.encode(items)
    return np.concatenate([np.array(one.memory.astype(mx.float32)) for one in encoded])


def _text(recognizer: Recognizer, items: Items) -> str:
    return join_texts(one.text for one in recognizer.recognise(items).recognitions)


def _norm(rows: FloatArray) -> FloatArray:
    return np.sqrt(np.square(rows.astype(np.float64)).sum(axis=1))


def _seconds_from_cut(items: Items) -> npt.NDArray[np.float64]:
    """How far each frame lies from the nearest cut inside its recording; infinite without one."""
    lengths = [
        item.after - item.first if isinstance(item, Excerpt) else len(item) for item in items
    ]
    cuts = np.cumsum(lengths)[:-1]
    centres = np.arange(sum(lengths)) + 0.5
    if not len(cuts):
        return np.full(len(centres), 1e8)
    return np.abs(centres[:, None] - cuts).min(axis=1) * FRAME_MS / 1000


def _is_short_enough(recording: Recording, longest: float) -> bool:
    seconds = len(recording.samples) / SAMPLE_RATE
    if seconds > longest:
        print(f"left out: {recording.name} has {seconds:.0f} s (--longest {longest:g})")
    return 0 < seconds <= longest


def _recordings(options: argparse.Namespace) -> Iterator[Recording]:
    for path in options.audio:
        with open_audio(path) as stream:
            samples = np.concatenate(list(stream))
        reference = None
        if options.references is not None:
            reference = (options.references / f"{path.stem}.txt").read_text("utf-8")
        yield Recording(path.name, samples, reference)
    for folder in options.shards:
        yield from _joined(folder, options.limit, options.seconds)


def _joined(folder: Path, limit: int, seconds: float) -> Iterator[Recording]:
    """Utterances of shards, one after the other with pauses, in recordings of so many seconds."""
    random = np.random.default_rng(0)
    utterances = [shard[i] for shard in read_all(folder) for i in range(len(shard))][:limit]
    audio: list[FloatArray] = []
    texts: list[str] = []
    number = 0
    for utterance in utterances:
        samples = utterance.samples.astype(np.float32) / 32_768
        pause = 1e-3 * random.standard_normal(int(PAUSE * SAMPLE_RATE)).astype(np.float32)
        if audio and sum(map(len, audio)) + len(samples) > seconds * SAMPLE_RATE:
            yield Recording(f"{folder.name} {number}", np.concatenate(audio), " ".join(texts))
            audio, texts, number = [], [], number + 1
        audio += [samples, pause]
        texts.append(utterance.text)
    if audio:
        yield Recording(f"{folder.name} {number}", np.concatenate(audio), " ".join(texts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("audio", nargs="*", type=Path, help="recordings")
    parser.add_argument("--model", default="sample-nano", help="a Nano: a name or a folder")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--references", type=Path, help="folder with NAME.txt for each recording")
    parser.add_argument("--shards", type=Path, nargs="*", default=[], help="folders of shards")
    parser.add_argument("--limit", type=int, default=400, help="utterances from each folder")
    parser.add_argument("--seconds", type=float, default=28.0, help="of recordings made of them")
    parser.add_argument("--piece", type=float, default=SegmentPolicy().piece_seconds)
    parser.add_argument("--contexts", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--longest", type=float, default=60.0, help="seconds; more is left out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
