"""Paraformer beside the real FunASR code, stage by stage, one clip at a time and in batches.

The goldens are of FunASR's own PyTorch modules on random weights, so a single wrong mask, pad or
order of additions shows. Their README derives what to accept from another float32 implementation
that is fed the same features; from raw audio it is four times that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from funasr_batch.decoding.cif import token_counts, token_weights
from funasr_batch.decoding.paraformer import ParaformerDecoding, _rescaled, load_paraformer
from funasr_batch.frontend import FrontEnd, parse_am_mvn
from funasr_batch.models.layers import length_mask
from funasr_batch.models.paraformer import CifPredictorV3
from funasr_batch.records import FloatArray, Recognition
from funasr_batch.text.tokens import is_cjk
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint
from funasr_batch.weights.convert import convert

MODELS = ["paraformer-tiny", "bicif-tiny", "seaco-tiny"]
WITH_TIMESTAMP_HEAD = MODELS[1:]
CLIPS = ["asr_example", "llamacpp_sample", "mid", "long"]
SPECIAL_IDS = frozenset({0, 1, 2})

# Quantity, what is accepted, and in the comment the largest difference measured on the twelve
# pairs of model and clip: from golden features / from audio.
ACCEPTED = {
    "encoder_out": 5e-5,  # 7.7e-6 / 2.2e-5
    "alphas": 2e-5,  # 4.7e-6 / 7.7e-6
    "acoustic_embeds": 3e-4,  # 2.5e-5 / 1.7e-4
    "logits_stride64": 3e-3,  # 2.3e-4 / 1.8e-3
    "logits_top5": 3e-3,  # 1.7e-4 / 1.5e-3
    "logits_lse": 3e-3,  # 8.0e-5 / 5.8e-4
    "us_alphas": 1e-5,  # 8.3e-7 / 2.1e-6
    "us_peaks": 1e-4,  # 4.0e-6 / 1.0e-5
}
FROM_AUDIO = 4

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """A converted checkpoint of the oracle, loaded."""

    name: str
    checkpoint: Checkpoint
    decoding: ParaformerDecoding

    def stages(self, features: FloatArray) -> Arrays:
        """What each stage makes of one clip, under the names of the goldens."""
        network = self.decoding.model
        memory = network.encode(mx.array(features)[None], None)
        alphas = np.array(network.alphas(memory, None))
        counts = token_counts(alphas, self.decoding.tail_threshold)
        embeddings = mx.array(token_weights(alphas, counts)) @ memory
        logits = network.decode(embeddings, None, memory, None)
        stages = {
            "encoder_out": memory,
            "alphas": alphas,
            "token_num": counts,
            "acoustic_embeds": embeddings,
            "logits": logits,
            "logits_lse": mx.logsumexp(logits, axis=-1),
        }
        if isinstance(network.predictor, CifPredictorV3):
            timing = np.array(network.upsampled_alphas(memory, mx.array([len(features)])))
            rescaled = _rescaled(timing[0], int(counts[0]))
            stages |= {"us_alphas": rescaled[None], "us_peaks": funasr_peaks(rescaled)[None]}
        return {name: np.array(value) for name, value in stages.items()}

    def recognise(self, *clips: FloatArray) -> tuple[Recognition, ...]:
        return self.decoding.recognise(clips).recognitions


def funasr_peaks(alphas: FloatArray) -> np.ndarray:
    """FunASR's trace of the integration: the sum before a fire takes its threshold away."""
    peaks, total, threshold = [], np.float32(0), np.float32(1 - 1e-4)
    for alpha in alphas:
        total += alpha
        peaks.append(total)
        if total >= threshold:
            total -= threshold
    return np.array(peaks)


@pytest.fixture(scope="module")
def model(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    folder = tmp_path_factory.mktemp("converted")

    @cache
    def load(name: str) -> Model:
        checkpoint = open_checkpoint(convert(oracle / "checkpoints" / name, folder / name))
        return Model(name, checkpoint, load_paraformer(checkpoint, mx.float32, SPECIAL_IDS))

    return load


@pytest.fixture(scope="module")
def golden_features(oracle: Path) -> dict[str, FloatArray]:
    return {
        clip: np.load(oracle / f"goldens/feats_{clip}.npz")["lfr_cmvn"].reshape(-1, 560)
        for clip in CLIPS
    }


@pytest.fixture(scope="module")
def own_features(oracle: Path) -> dict[str, FloatArray]:
    frontend = FrontEnd(7, 6, parse_am_mvn((oracle / "inputs/asr_am.mvn").read_text()))
    return {
        clip: frontend.features(
            soundfile.read(oracle / f"inputs/{clip}.wav", dtype="float32")[0],
        )
        for clip in CLIPS
    }


def arrays(oracle: Path, name: str, clip: str) -> Arrays:
    with np.load(oracle / f"goldens/{name}_{clip}.npz") as stored:
        return dict(stored)


def texts(oracle: Path, name: str, call: str, clip: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((oracle / f"goldens/{name}.json").read_text())
    result: dict[str, Any] = stored[call][clip]
    return result


def without_hotwords(name: str) -> str:
    return "no_hotwords" if name == "seaco-tiny" else "default"


def assert_stages_equal(ours: Arrays, golden: Arrays, *, times: int) -> None:
    assert ours["token_num"].tolist() == golden["token_num"].astype(int).tolist()
    logits = ours["logits"]
    ours = {
        **ours,
        "logits_stride64": logits[..., ::64],
        "logits_top5": np.take_along_axis(logits, golden["logits_top5_ids"], axis=-1),
    }
    compared = {**golden, "alphas": golden["alphas"][:, :-1]}  # the tail: see test_cif.py
    for quantity in ACCEPTED.keys() & compared.keys():
        np.testing.assert_allclose(
            ours[quantity],
            compared[quantity],
            rtol=0,
            atol=times * ACCEPTED[quantity],
            err_msg=quantity,
        )
    assert_same_ranking(logits, golden, margin=2 * times * ACCEPTED["logits_top5"])


def assert_same_ranking(logits: np.ndarray, golden: Arrays, *, margin: float) -> None:
    """The best ids in order, but for those closer to a neighbour than the tolerance."""
    best = np.argsort(-logits, axis=-1)[..., :4]  # what follows the fifth is not known
    below = -np.diff(golden["logits_top5"], axis=-1) > margin
    above = np.concatenate([np.ones_like(below[..., :1]), below[..., :-1]], axis=-1)
    certain = above & below
    assert certain.mean() > 0.8
    np.testing.assert_array_equal(best[certain], golden["logits_top5_ids"][..., :4][certain])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", MODELS)
def test_each_stage_is_funasrs(
    oracle: Path,
    model: Callable[[str], Model],
    golden_features: dict[str, FloatArray],
    name: str,
    clip: str,
) -> None:
    golden = arrays(oracle, name, clip)
    assert ("us_alphas" in golden) == (name in WITH_TIMESTAMP_HEAD)

    ours = model(name).stages(golden_features[clip])

    assert_stages_equal(ours, golden, times=1)
    expected_ids = texts(oracle, name, without_hotwords(name), clip)["token_ids"]
    assert ours["logits"].argmax(-1)[0].tolist() == expected_ids


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", MODELS)
def test_from_audio_to_tokens_is_funasrs(
    oracle: Path,
    model: Callable[[str], Model],
    own_features: dict[str, FloatArray],
    name: str,
    clip: str,
) -> None:
    ours = model(name).stages(own_features[clip])

    assert_stages_equal(ours, arrays(oracle, name, clip), times=FROM_AUDIO)
    expected_ids = texts(oracle, name, without_hotwords(name), clip)["token_ids"]
    assert ours["logits"].argmax(-1)[0].tolist() == expected_ids


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", WITH_TIMESTAMP_HEAD)
def test_recognitions_have_funasrs_ids_and_times(
    oracle: Path,
    model: Callable[[str], Model],
    own_features: dict[str, FloatArray],
    name: str,
    clip: str,
) -> None:
    """Times of Chinese characters, from audio.

    Left out are characters right after a `@@` piece: FunASR gives them the piece's time, as
    test_text_parity.py shows. Its times are truncated (1839 for 1840), ours are rounded.
    """
    golden = texts(oracle, name, without_hotwords(name), clip)
    [recognition] = model(name).recognise(own_features[clip])

    expected_ids = [id for id in golden["token_ids"] if id not in SPECIAL_IDS]
    assert list(recognition.token_ids) == expected_ids
    assert all(0 < confidence <= 1 for confidence in recognition.confidences)

    tokens = model(name).checkpoint.tokens
    assert tokens is not None
    pieces = [tokens[id] for id in recognition.token_ids]
    ours = [
        (piece, span, before.endswith("@@"))
        for before, piece, span in zip(["", *pieces], pieces, recognition.spans_ms, strict=False)
        if is_cjk(piece[0])
    ]
    words = zip(golden["text"].split(), golden["timestamp"], strict=True)
    theirs = [(word, span) for word, span in words if is_cjk(word[0])]
    assert [piece for piece, *_ in ours] == [word for word, _ in theirs]
    compared = [
        (span, expected)
        for (_, span, displaced), (_, expected) in zip(ours, theirs, strict=True)
        if not displaced
    ]
    assert len(compared) >= len(theirs) - 3
    np.testing.assert_allclose(*map(np.array, zip(*compared, strict=True)), rtol=0, atol=1)


def batches(features: dict[str, FloatArray]) -> list[list[FloatArray]]:
    """The clips as they are, in other orders, and among very short ones."""
    clips = [features[name] for name in CLIPS]
    one_frame, silent = features["mid"][40:41], features["asr_example"][:1]
    return [
        clips,
        clips[::-1],
        [clips[2], one_frame, clips[3], clips[0]],
        [silent, *clips, one_frame],
        [silent, clips[1]],
        [silent, one_frame],
    ]


@pytest.mark.parametrize("name", MODELS[:2])
def test_a_padded_batch_gives_what_single_clips_give(
    model: Callable[[str], Model], golden_features: dict[str, FloatArray], name: str
) -> None:
    loaded = model(name)
    alone: dict[bytes, Recognition] = {}
    for batch in batches(golden_features):
        for clip in batch:
            key = clip.tobytes()
            if key not in alone:
                [alone[key]] = loaded.recognise(clip)

    for batch in batches(golden_features):
        together = loaded.recognise(*batch)
        for clip, recognition in zip(batch, together, strict=True):
            single = alone[clip.tobytes()]
            assert recognition.token_ids == single.token_ids
            assert recognition.spans_ms == single.spans_ms
            np.testing.assert_allclose(recognition.confidences, single.confidences, atol=2e-4)
    counts = {len(recognition.token_ids) for recognition in alone.values()}
    assert {0, 25, 27, 29, 42} <= counts


@pytest.mark.parametrize("name", MODELS[:2])
def test_a_padded_batch_encodes_as_single_clips_do(
    model: Callable[[str], Model], golden_features: dict[str, FloatArray], name: str
) -> None:
    network = model(name).decoding.model
    clips = [*golden_features.values(), golden_features["mid"][:1]]
    lengths = mx.array([len(clip) for clip in clips])
    padded, mask = padded_batch(clips)

    memory = network.encode(padded, mask)
    alphas = np.array(network.alphas(memory, mask))

    for row, clip in enumerate(clips):
        single = network.encode(mx.array(clip)[None], None)
        own = np.array(memory)[row]
        # Measured: 1.3e-6, alphas 2.7e-7, timing 6e-8: other sizes of the same products.
        np.testing.assert_allclose(own[: len(clip)], np.array(single)[0], rtol=0, atol=1e-5)
        expected = np.array(network.alphas(single, None))[0]
        np.testing.assert_allclose(alphas[row, : len(clip)], expected, rtol=0, atol=5e-6)
        assert not own[len(clip) :].any()
        assert not alphas[row, len(clip) :].any()
    if name in WITH_TIMESTAMP_HEAD:
        timing = np.array(network.upsampled_alphas(memory, lengths))
        for row, clip in enumerate(clips):
            single = network.encode(mx.array(clip)[None], None)
            expected = np.array(network.upsampled_alphas(single, lengths[row : row + 1]))[0]
            size = 3 * len(clip)
            np.testing.assert_allclose(timing[row, :size], expected, rtol=0, atol=1e-6)
            assert not timing[row, size:].any()


def padded_batch(clips: list[FloatArray]) -> tuple[mx.array, mx.array]:
    """Padding is filled with noise: nothing of it may be read."""
    size = max(map(len, clips))
    padded = np.random.default_rng(0).normal(0, 50, (len(clips), size, 560)).astype(np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return mx.array(padded), length_mask(mx.array([len(clip) for clip in clips]), size)


@pytest.mark.parametrize("name", MODELS)
def test_funasrs_own_batches_leak_and_ours_do_not(
    oracle: Path,
    model: Callable[[str], Model],
    golden_features: dict[str, FloatArray],
    name: str,
) -> None:
    """Its CIF convolution reads the first padded frame: the last alpha of each shorter clip."""
    golden = arrays(oracle, name, "batch")
    clips = [golden_features[clip] for clip in CLIPS]
    lengths = golden["encoder_len"]
    assert lengths.tolist() == [len(clip) for clip in clips]
    network = model(name).decoding.model
    padded, mask = padded_batch(clips)

    ours = np.array(network.alphas(network.encode(padded, mask), mask))

    theirs = golden["alphas"][:, :-1].copy()
    tail = np.float32(0.45)
    for row, length in enumerate(lengths):
        if length < theirs.shape[1]:
            assert theirs[row, length] == tail  # FunASR puts the tail into the first padded frame
            theirs[row, length] = 0
    leaked = np.argwhere(np.abs(ours - theirs) > ACCEPTED["alphas"])
    shorter = [row for row, length in enumerate(lengths) if length < max(lengths)]
    assert leaked.tolist() == [[row, lengths[row] - 1] for row in shorter]

    counts = token_counts(ours, float(tail))
    alone = [texts(oracle, name, without_hotwords(name), clip)["token_num"] for clip in CLIPS]
    assert counts.tolist() == alone
    assert counts.tolist() != golden["token_num"].astype(int).tolist()
