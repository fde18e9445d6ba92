"""Decoding a batch: features in, ids, times and confidences out, whatever shares the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from tiny_model import TOKENS, write_tiny_model

from funasr_batch.decoding.cif import token_counts
from funasr_batch.decoding.paraformer import (
    EMPTY,
    FRAME_MS,
    ParaformerDecoding,
    _rescaled,
    load_paraformer,
)
from funasr_batch.errors import CheckpointError, RecognitionError
from funasr_batch.models.paraformer import ParaformerConfig
from funasr_batch.records import FloatArray, Recognition
from funasr_batch.text.timestamps import upsampled_token_spans
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from funasr_batch.weights.convert import convert
from funasr_batch.weights.safetensors_file import TensorSpec

SPECIAL_IDS = frozenset({0, 1, 2})


@pytest.fixture(scope="module", params=[False, True], ids=["cif", "timestamp-head"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(write_tiny_model(folder, seed=2, timestamp_head=request.param))


@pytest.fixture(scope="module")
def decoding(checkpoint: Checkpoint) -> ParaformerDecoding:
    return load_paraformer(checkpoint, mx.float32, SPECIAL_IDS)


def features(length: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng((seed, length)).normal(0, 1, (length, 560)).astype(np.float32)


def silence(length: int) -> FloatArray:
    """Frames that this model counts as next to nothing of a token."""
    return np.zeros((length, 560), np.float32)


def assert_equal(one: Recognition, other: Recognition) -> None:
    assert one.token_ids == other.token_ids
    assert one.spans_ms == other.spans_ms
    # Rounded to four places, from products of another size.
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=0, atol=1.01e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=5))
def test_a_recognition_does_not_depend_on_its_batch(
    decoding: ParaformerDecoding, lengths: list[int]
) -> None:
    clips = [features(length, seed) for seed, length in enumerate(lengths)]
    together = decoding.recognise(clips).recognitions
    for clip, recognition in zip(clips, together, strict=True):
        [alone] = decoding.recognise([clip]).recognitions
        assert_equal(recognition, alone)


def test_what_a_recognition_promises(decoding: ParaformerDecoding) -> None:
    clips = [features(length) for length in (150, 1, 40, 90)]
    result = decoding.recognise(clips)

    assert result.encode_seconds > 0
    assert result.decode_seconds > 0
    longest = result.recognitions[0]
    assert len(longest.token_ids) > 20
    assert len(set(longest.token_ids)) > 3
    for clip, recognition in zip(clips, result.recognitions, strict=True):
        count = len(recognition.token_ids)
        assert len(recognition.spans_ms) == len(recognition.confidences) == count
        assert not SPECIAL_IDS & set(recognition.token_ids)
        assert all(isinstance(id, int) and id < len(TOKENS) for id in recognition.token_ids)
        assert all(0 < confidence <= 1 for confidence in recognition.confidences)
        edges = [edge for span in recognition.spans_ms for edge in span]
        assert edges == sorted(edges)
        assert not edges or (edges[0] >= 0 and edges[-1] <= FRAME_MS * len(clip))


def test_confidence_is_the_probability_of_the_token(decoding: ParaformerDecoding) -> None:
    """With an output layer that only adds a bias, the probabilities are known."""
    model = decoding.model
    layer = model.decoder.output_layer
    before = layer.parameters()
    bias = np.zeros(len(TOKENS), np.float32)
    bias[[5, 7]] = 3.0, 2.0
    try:
        layer.update({"weight": mx.zeros_like(layer.weight), "bias": mx.array(bias)})
        [recognition] = decoding.recognise([features(60)]).recognitions
    finally:
        layer.update(before)
    expected = np.exp(3) / np.exp(bias).sum()
    assert set(recognition.token_ids) == {5}
    assert set(recognition.confidences) == {round(float(expected), 4)}


def test_dropped_ids_take_their_confidence_along(decoding: ParaformerDecoding) -> None:
    [everything] = replace(decoding, dropped_ids=frozenset()).recognise([features(90)]).recognitions
    frequent = max(set(everything.token_ids), key=everything.token_ids.count)
    [rest] = (
        replace(decoding, dropped_ids=frozenset({frequent})).recognise([features(90)]).recognitions
    )

    kept = [n for n, id in enumerate(everything.token_ids) if id != frequent]
    assert 0 < len(kept) < len(everything.token_ids)
    assert rest.token_ids == tuple(everything.token_ids[n] for n in kept)
    assert rest.confidences == tuple(everything.confidences[n] for n in kept)
    assert len(rest.spans_ms) == len(kept)
    nothing = replace(decoding, dropped_ids=frozenset(range(len(TOKENS))))
    assert nothing.recognise([features(90)]).recognitions == (EMPTY,)


def test_a_clip_without_tokens_is_empty_and_disturbs_nobody(decoding: ParaformerDecoding) -> None:
    clip = features(50)
    [alone] = decoding.recognise([clip]).recognitions
    assert alone != EMPTY
    first, second, third = decoding.recognise([silence(1), clip, silence(2)]).recognitions
    assert first == third == EMPTY
    assert_equal(second, alone)
    assert decoding.recognise([silence(1), silence(2)]).recognitions == (EMPTY, EMPTY)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_an_error_and_not_silence(
    decoding: ParaformerDecoding, bad: float
) -> None:
    broken = features(30)
    broken[12, 5] = bad
    for batch in ([broken], [features(40), broken]):
        with pytest.raises(RecognitionError, match="not finite"):
            decoding.recognise(batch)


def test_a_decoder_that_overflows_is_an_error_and_not_silence(
    decoding: ParaformerDecoding,
) -> None:
    layer = decoding.model.decoder.output_layer
    before = layer.parameters()
    try:
        layer.update(tree_map(lambda value: value * 1e38, before))
        with pytest.raises(RecognitionError, match="not finite"):
            decoding.recognise([features(40)])
    finally:
        layer.update(before)


def test_times_are_read_off_timestamp_weights_that_sum_to_the_count(tmp_path: Path) -> None:
    """Also where the weights as they come would happen to fire as often as there are tokens."""
    folder = write_tiny_model(tmp_path / "bicif", seed=2, timestamp_head=True)
    decoding = load_paraformer(open_checkpoint(folder), mx.float32, SPECIAL_IDS)
    differences = 0
    for length in range(20, 60):
        clip = features(length)
        memory = decoding.model.encode(mx.array(clip)[None], None)
        weights = np.array(decoding.model.upsampled_alphas(memory, mx.array([length])))[0]
        count = int(token_counts(np.array(decoding.model.alphas(memory, None)), 0.45)[0])
        [recognition] = decoding.recognise([clip]).recognitions
        kept, duration = len(recognition.token_ids), FRAME_MS * length

        expected = upsampled_token_spans(_rescaled(weights, count), kept, duration_ms=duration)
        assert recognition.spans_ms == expected
        differences += expected != upsampled_token_spans(weights, kept, duration_ms=duration)
    assert differences


def test_timestamp_weights_are_scaled_to_the_count() -> None:
    weights = np.array([0.1, 0.2, 0.1, 0.0], np.float32)
    np.testing.assert_allclose(_rescaled(weights, 3), [0.75, 1.5, 0.75, 0], rtol=1e-6)
    np.testing.assert_array_equal(_rescaled(np.zeros(3, np.float32), 2), np.zeros(3))


# bfloat16


def test_in_bfloat16_only_the_predictor_stays_in_float32(checkpoint: Checkpoint) -> None:
    model = load_paraformer(checkpoint, mx.bfloat16, SPECIAL_IDS).model
    for name, value in tree_flatten(model.parameters()):
        assert value.dtype == (mx.float32 if name.startswith("predictor.") else mx.bfloat16), name
    memory = model.encode(mx.array(features(20))[None], None)
    assert memory.dtype == mx.bfloat16
    assert model.alphas(memory, None).dtype == mx.float32


def test_bfloat16_recognises_nearly_the_same(oracle: Path, tmp_path: Path) -> None:
    """Guaranteed: valid ids and times, finite confidences, and counts off by one at most.

    Random weights have no margins: of the 123 tokens, 97 are equal here. A token count can only
    change where the sum of alphas is close to a whole number, as it is on one of these clips
    (27.0498, of which 0.45 is the tail's).
    """
    checkpoint = open_checkpoint(convert(oracle / "checkpoints/bicif-tiny", tmp_path / "bicif"))
    precise = load_paraformer(checkpoint, mx.float32, SPECIAL_IDS)
    coarse = load_paraformer(checkpoint, mx.bfloat16, SPECIAL_IDS)
    names = ["asr_example", "llamacpp_sample", "mid", "long"]
    clips = [
        np.load(oracle / f"goldens/feats_{name}.npz")["lfr_cmvn"].reshape(-1, 560) for name in names
    ]
    counts, equal = [], 0
    for clip in clips:
        [expected] = precise.recognise([clip]).recognitions
        [recognition] = coarse.recognise([clip]).recognitions
        counts.append(len(recognition.token_ids) - len(expected.token_ids))
        equal += sum(
            a == b for a, b in zip(recognition.token_ids, expected.token_ids, strict=False)
        )
        assert all(0 < confidence <= 1 for confidence in recognition.confidences)
        assert recognition.spans_ms[-1][1] <= FRAME_MS * len(clip)
    assert max(map(abs, counts)) <= 1
    assert counts.count(0) >= 3
    assert equal > 70


# Loading


def rewrite(
    checkpoint: Checkpoint, folder: Path, changes: dict[str, np.ndarray | None]
) -> Checkpoint:
    """A copy with tensors replaced, added, or (None) left out."""
    arrays = {name: np.array(value) for name, value in checkpoint.load_tensors().items()}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    write_checkpoint(
        folder,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        tokens=checkpoint.tokens,
        cmvn=checkpoint.cmvn,
        tensors={name: TensorSpec("F32", value.shape) for name, value in arrays.items()},
        read=arrays.__getitem__,
    )
    return open_checkpoint(folder)


def test_tensors_that_only_hotwords_need_may_be_there(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    extra = np.ones((2, 2), np.float32)
    names = ["decoder.embed.0.weight", "bias_encoder.weight_ih_l0", "hotword_output_layer.bias"]
    loaded = load_paraformer(
        rewrite(checkpoint, tmp_path / "model", dict.fromkeys(names, extra)),
        mx.float32,
        SPECIAL_IDS,
    )
    assert loaded.recognise([features(30)]).recognitions != (EMPTY,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder.after_norm.bias", None, r"missing:\n +encoder\.after_norm\.bias"),
        ("encoder.tail.weight", np.ones(2, np.float32), r"unexpected:\n +encoder\.tail\.weight"),
        ("predictor.cif_output.bias", np.ones(2, np.float32), r"\[2\] instead of \[1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    wrong = rewrite(checkpoint, tmp_path / "model", {name: value})
    with pytest.raises(CheckpointError, match=message):
        load_paraformer(wrong, mx.float32, SPECIAL_IDS)


def test_a_configuration_that_lacks_something_is_refused(
    checkpoint: Checkpoint,
) -> None:
    blocks = {k: v for k, v in checkpoint.config["encoder_conf"].items() if k != "num_blocks"}
    lacking = replace(checkpoint, config={**checkpoint.config, "encoder_conf": blocks})
    with pytest.raises(CheckpointError, match="has no 'num_blocks'"):
        load_paraformer(lacking, mx.float32, SPECIAL_IDS)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"predictor": "CifPredictor"}, "'CifPredictor' is not supported"),
        ("decoder_conf", {"num_blocks": 3}, "without cross-attention"),
        ("predictor_conf", {"l_order": 2}, "l_order"),
        ("predictor_conf", {"upsample_type": "cnn"}, "upsample_type"),
    ],
)
def test_networks_that_are_not_built_here_are_refused(
    tmp_path: Path, section: str | None, changes: dict[str, object], message: str
) -> None:
    folder = write_tiny_model(tmp_path / "model", timestamp_head=True)
    config = dict(open_checkpoint(folder).config)
    if section is None:
        config |= changes
    else:
        config[section] = {**config[section], **changes}
    with pytest.raises(CheckpointError, match=message):
        ParaformerConfig.from_checkpoint(config, len(TOKENS))
