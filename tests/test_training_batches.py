"""The data set that training reads: shards and their labels under one index."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training import shards
from training.batches import Dataset
from training.shards import Utterance


def _write(folder: Path, name: str, lengths: list[int]) -> None:
    shards.write(
        folder,
        name,
        [Utterance(np.full(n, n, np.int16), ((3, 0, n),), "一", "zh", "voice") for n in lengths],
    )


def _lengths_of(path: Path) -> list[int]:
    """Labels that name their utterance; meanwhile a maker of data finishes its next shard."""
    found = [len(shards.read(path)[i].samples) for i in range(len(shards.read(path)))]
    _write(path.parent, f"{path.stem}-late", [5000, 6000])
    return found


def test_a_shard_that_appears_while_the_others_are_labelled_is_left_out(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    _write(first, "shard-0000", [1000, 2000])
    _write(second, "shard-0000", [3000])

    dataset = Dataset([first, second], 1, _lengths_of)

    assert len(list(first.glob("*.npy"))) == 2  # the late shard is there
    assert dataset.lengths.tolist() == [1000, 2000, 3000]
    assert [dataset.labels(i) for i in range(len(dataset))] == [1000, 2000, 3000]
    assert [int(dataset.samples(i)[0]) for i in range(len(dataset))] == [1000, 2000, 3000]
