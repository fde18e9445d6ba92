"""Shards of training data: many utterances in one file of audio and one of labels.

`NAME.npy` holds int16 audio at 16 kHz, one utterance after the other; `NAME.index.npz` says where
each one lies and what is said in it, when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Utterance:
    samples: npt.NDArray[np.int16] = field(repr=False)
    """int16 [samples] at 16 kHz."""
    tokens: tuple[tuple[int, int, int], ...]
    """(id, start, end) in samples of this utterance, in time order."""
    text: str
    kind: str
    """`zh`, `en`, `mixed` or `digits`."""
    voice: str
    written: str = ""
    """The text with punctuation and capitals (`nano_texts`); empty where the maker did not know
    where sentences end."""


@dataclass(frozen=True, slots=True)
class Shard:
    audio: npt.NDArray[np.int16] = field(repr=False)
    """int16 [all samples], mapped from the file."""
    offset: npt.NDArray[np.int64] = field(repr=False)
    """int64 [utterances + 1]; utterance i is `audio[offset[i]:offset[i + 1]]`."""
    token_offset: npt.NDArray[np.int64] = field(repr=False)
    """int64 [utterances + 1]; its tokens are `token[token_offset[i]:token_offset[i + 1]]`."""
    token: npt.NDArray[np.int32] = field(repr=False)
    token_start: npt.NDArray[np.int32] = field(repr=False)
    """int32 [tokens], samples from the start of the utterance."""
    token_end: npt.NDArray[np.int32] = field(repr=False)
    text: npt.NDArray[np.str_] = field(repr=False)
    kind: npt.NDArray[np.str_] = field(repr=False)
    voice: npt.NDArray[np.str_] = field(repr=False)
    written: npt.NDArray[np.str_] | None = field(default=None, repr=False)
    """None in shards of the time before it."""

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Utterance:
        samples = slice(self.offset[index], self.offset[index + 1])
        tokens = slice(self.token_offset[index], self.token_offset[index + 1])
        columns = (self.token[tokens], self.token_start[tokens], self.token_end[tokens])
        return Utterance(
            np.asarray(self.audio[samples]),
            tuple(zip(*(column.tolist() for column in columns), strict=True)),
            str(self.text[index]),
            str(self.kind[index]),
            str(self.voice[index]),
            "" if self.written is None else str(self.written[index]),
        )


def write(folder: Path, name: str, utterances: list[Utterance]) -> None:
    """Write one shard, the audio last: an audio file without an index is never seen."""
    triples = [token for utterance in utterances for token in utterance.tokens]
    token, start, end = np.array(triples, dtype=np.int32).reshape(-1, 3).T
    np.savez(
        folder / f"{name}.index.npz",
        offset=_offsets([len(utterance.samples) for utterance in utterances]),
        token_offset=_offsets([len(utterance.tokens) for utterance in utterances]),
        token=token,
        token_start=start,
        token_end=end,
        text=np.array([utterance.text for utterance in utterances]),
        kind=np.array([utterance.kind for utterance in utterances]),
        voice=np.array([utterance.voice for utterance in utterances]),
        written=np.array([utterance.written for utterance in utterances]),
    )
    np.save(folder / f"{name}.npy", np.concatenate([u.samples for u in utterances]))


def read(path: Path) -> Shard:
    """Open the shard whose audio file is `path`, without reading the audio."""
    with np.load(path.with_suffix(".index.npz")) as index:
        return Shard(audio=np.load(path, mmap_mode="r"), **index)


def read_all(folder: Path) -> list[Shard]:
    """The shards of a folder in the order of their names."""
    return [read(path) for path in sorted(folder.glob("*.npy"))]


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
