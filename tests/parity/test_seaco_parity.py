"""Hotwords of SeACo-Paraformer beside the real FunASR code, on random weights.

The oracle's own goldens have one list of three hotwords. tests/data/seaco_hotwords.json has what
FunASR makes of the same stages with lists of 1 (only `<s>`), 8, 51, 61 and 201 entries; the last
three go through its filter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from funasr_batch.decoding.paraformer import (
    ParaformerDecoding,
    load_paraformer,
    load_seaco,
    with_hotwords,
)
from funasr_batch.models.seaco import Seaco
from funasr_batch.records import FloatArray
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint
from funasr_batch.weights.convert import convert

CLIPS = ["asr_example", "llamacpp_sample", "mid", "long"]
SIZES = [1, 8, 51, 61, 201]
UNK, SOS = 8403, 1
GOLDEN_LIST = [(UNK,)] * 3
"""What FunASR makes of the oracle's hotwords: none of them is a token as a whole."""


@pytest.fixture(scope="module")
def checkpoint(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("converted") / "seaco"
    return open_checkpoint(convert(oracle / "checkpoints/seaco-tiny", folder))


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> ParaformerDecoding:
    """With no id dropped, so that every token can be compared."""
    return load_paraformer(checkpoint, mx.float32, frozenset())


@pytest.fixture(scope="module")
def network(checkpoint: Checkpoint) -> Seaco:
    return load_seaco(checkpoint, mx.float32)


@pytest.fixture(scope="module")
def features(oracle: Path) -> dict[str, FloatArray]:
    return {
        clip: np.load(oracle / f"goldens/feats_{clip}.npz")["lfr_cmvn"].reshape(-1, 560)
        for clip in CLIPS
    }


@pytest.fixture(scope="module")
def long_lists() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "data/seaco_hotwords.json"
    lists: dict[str, Any] = json.loads(path.read_text())["by_size"]
    return lists


def hotwords(size: int) -> list[tuple[int, ...]]:
    """The list that seaco_hotwords.json was made with; `<s>` is appended to it."""
    return [
        tuple(3 + (97 * n + 31 * place) % 8370 for place in range(1 + n % 5))
        for n in range(size - 1)
    ]


@pytest.mark.parametrize("clip", CLIPS)
def test_the_goldens_list_gives_funasrs_tokens(
    oracle: Path,
    plain: ParaformerDecoding,
    network: Seaco,
    features: dict[str, FloatArray],
    clip: str,
) -> None:
    texts = json.loads((oracle / "goldens/seaco-tiny.json").read_text())
    expected = texts["hotwords"][clip]["token_ids"]
    assert expected != texts["no_hotwords"][clip]["token_ids"]

    decoding = with_hotwords(plain, network, GOLDEN_LIST, SOS)
    [recognition] = decoding.recognise([features[clip]]).recognitions
    [before] = plain.recognise([features[clip]]).recognitions

    assert list(recognition.token_ids) == expected
    assert list(before.token_ids) == texts["no_hotwords"][clip]["token_ids"]
    assert recognition.spans_ms == before.spans_ms


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", SIZES)
def test_lists_of_any_length_give_funasrs_tokens(
    plain: ParaformerDecoding,
    network: Seaco,
    features: dict[str, FloatArray],
    long_lists: dict[str, Any],
    size: int,
    clip: str,
) -> None:
    golden = long_lists[str(size)][clip]

    decoding = with_hotwords(plain, network, hotwords(size), SOS)
    [recognition] = decoding.recognise([features[clip]]).recognitions

    assert list(recognition.token_ids) == golden["token_ids"]
    # A probability is off by its own size times the error of its logarithm, for which the plain
    # decoder's logits are accepted at 3e-3, and confidences are rounded to four places. Largest
    # difference of a logarithm measured: 7.8e-5, of which the file's rounding may be 5e-5.
    np.testing.assert_allclose(
        recognition.confidences, np.exp(golden["log_probabilities"]), rtol=3e-3, atol=1e-4
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_padded_batch_gives_each_clip_funasrs_single_result(
    plain: ParaformerDecoding,
    network: Seaco,
    features: dict[str, FloatArray],
    long_lists: dict[str, Any],
    size: int,
) -> None:
    """In FunASR the first clip would choose the hotwords of all four."""
    decoding = replace(with_hotwords(plain, network, hotwords(size), SOS), streams=())
    for names in (CLIPS, CLIPS[::-1]):
        recognitions = decoding.recognise([features[name] for name in names]).recognitions
        for name, recognition in zip(names, recognitions, strict=True):
            assert list(recognition.token_ids) == long_lists[str(size)][name]["token_ids"], name


@pytest.mark.parametrize("clip", CLIPS)
def test_without_the_filter_the_tokens_would_be_others(
    monkeypatch: pytest.MonkeyPatch,
    plain: ParaformerDecoding,
    network: Seaco,
    features: dict[str, FloatArray],
    long_lists: dict[str, Any],
    clip: str,
) -> None:
    """That the filter shows in these goldens at all."""
    monkeypatch.setattr("funasr_batch.models.seaco.FILTER_SIZE", 1000)
    decoding = with_hotwords(plain, network, hotwords(201), SOS)
    [recognition] = decoding.recognise([features[clip]]).recognitions
    assert list(recognition.token_ids) != long_lists["201"][clip]["token_ids"]
