"""Hotwords of a SeacoParaformer: what they change, what they cannot, and that they cost the others
nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_model import TOKENS, write_tiny_model
from tiny_seaco import NO_BIAS, write_tiny_seaco

import funasr_batch.decoding.paraformer as paraformer_decoding
from funasr_batch.decoding.paraformer import (
    EMPTY,
    ParaformerDecoding,
    load_paraformer,
    load_seaco,
    with_hotwords,
)
from funasr_batch.errors import CheckpointError
from funasr_batch.loading import Networks, load, load_recognizer
from funasr_batch.model_files import find_model
from funasr_batch.models.paraformer import ParaformerConfig
from funasr_batch.models.seaco import FILTER_SIZE, Seaco, SeacoConfig
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import FloatArray, Recognition
from funasr_batch.settings import Settings, recognition_digest
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint

SPECIAL_IDS = frozenset({0, 1, 2})
SOS = TOKENS.index("<s>")
SHORT = [(3, 4), (5,), (6, 7, 8)]
LONG = [(3 + n % 11, 3 + n // 11, 14 + n % 12) for n in range(90)]
LISTS = pytest.mark.parametrize("ids", [SHORT, LONG], ids=["short", "long"])
CLIPS = [(70, 0), (1, 1), (33, 2), (70, 3), (52, 4), (20, 5)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny_seaco(tmp_path_factory.mktemp("seaco") / "tiny", seed=2))


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> ParaformerDecoding:
    return load_paraformer(checkpoint, mx.float32, SPECIAL_IDS)


@pytest.fixture(scope="module")
def network(checkpoint: Checkpoint) -> Seaco:
    return load_seaco(checkpoint, mx.float32)


def features(length: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng((seed, length)).normal(0, 1, (length, 560)).astype(np.float32)


def clips() -> list[FloatArray]:
    return [features(length, seed) for length, seed in CLIPS]


def on_one_lane(decoding: ParaformerDecoding) -> ParaformerDecoding:
    """As on a GPU: the whole batch is padded and goes together."""
    return replace(decoding, streams=())


def assert_equal(one: Recognition, other: Recognition) -> None:
    assert one.token_ids == other.token_ids
    assert one.spans_ms == other.spans_ms
    # Rounded to four places, from products of another size.
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=0, atol=1.01e-4)


# Batches


@LISTS
def test_a_recognition_does_not_depend_on_its_batch(
    plain: ParaformerDecoding, network: Seaco, ids: list[tuple[int, ...]]
) -> None:
    """With the long list each item has a filter of its own: also of the first in the batch."""
    decoding = on_one_lane(with_hotwords(plain, network, ids, SOS))
    batch = clips()
    alone = [decoding.recognise([clip]).recognitions[0] for clip in batch]
    assert sum(a != b for a, b in zip(alone, plain.recognise(batch).recognitions, strict=True)) > 3
    for order in (range(len(batch)), reversed(range(len(batch)))):
        places = list(order)
        together = decoding.recognise([batch[place] for place in places]).recognitions
        for place, recognition in zip(places, together, strict=True):
            assert_equal(recognition, alone[place])


@LISTS
def test_lanes_side_by_side_give_the_same(
    plain: ParaformerDecoding, network: Seaco, ids: list[tuple[int, ...]]
) -> None:
    decoding = with_hotwords(plain, network, ids, SOS)
    assert decoding.streams
    pairs = zip(
        decoding.recognise(clips()).recognitions,
        on_one_lane(decoding).recognise(clips()).recognitions,
        strict=True,
    )
    for one, other in pairs:
        assert_equal(one, other)


def test_each_segment_has_a_filter_of_its_own(network: Seaco) -> None:
    """What padding holds does not count, and the first segment does not choose for the others."""
    generator = np.random.default_rng(0)
    memory = network.represent([*LONG, (SOS,)])
    hidden = generator.normal(0, 1, (3, 9, 16)).astype(np.float32)
    counts = [9, 4, 6]
    mask = mx.arange(9)[None] < mx.array(counts)[:, None]
    shared = mx.broadcast_to(memory, (3, *memory.shape))

    scores = np.array(network.seaco_decoder.attention_to(mx.array(hidden), mask, shared))

    chosen = []
    for row, count in enumerate(counts):
        single = mx.array(hidden[row : row + 1, :count])
        [alone] = np.array(network.seaco_decoder.attention_to(single, None, memory[None]))
        # Attention of all heads and tokens sums to 2 a token; float32 leaves about 1e-6 of it.
        np.testing.assert_allclose(scores[row], alone, rtol=0, atol=1e-5)
        assert scores[row].sum() == pytest.approx(2 * count, abs=1e-4)
        chosen.append(frozenset(np.argsort(-alone)[:FILTER_SIZE].tolist()))
    assert len(set(chosen)) == 3


def test_the_filter_keeps_the_best_and_the_last(network: Seaco) -> None:
    memory = network.represent([*LONG, (SOS,)])
    hidden = mx.array(np.random.default_rng(1).normal(0, 1, (1, 7, 16)).astype(np.float32))

    [kept] = np.array(network._filtered(memory[None], hidden, None))

    [scores] = np.array(network.seaco_decoder.attention_to(hidden, None, memory[None]))
    best = sorted(np.argsort(-scores)[:FILTER_SIZE].tolist())
    np.testing.assert_array_equal(kept, np.array(memory)[[*best, len(LONG)]])


def test_a_list_of_fifty_is_not_filtered(network: Seaco, monkeypatch: pytest.MonkeyPatch) -> None:
    """`<s>` counts, as in FunASR."""

    def never(*arguments: object) -> mx.array:
        raise AssertionError("filtered")

    monkeypatch.setattr(Seaco, "_filtered", never)
    x = mx.zeros((1, 4, 16))
    network.logits(network.represent([*LONG[: FILTER_SIZE - 1], (SOS,)]), x, x, None)
    with pytest.raises(AssertionError, match="filtered"):
        network.logits(network.represent([*LONG[:FILTER_SIZE], (SOS,)]), x, x, None)


# The list


def test_a_hotword_is_read_the_same_beside_longer_ones(network: Seaco) -> None:
    rows = [(3,), (4, 5, 6, 7, 8, 9), (10, 11), *LONG, *LONG, *LONG, (SOS,)]
    together = np.array(network.represent(rows))
    assert together.shape == (len(rows), 16)
    for row in (0, 1, 2, 40, 260, len(rows) - 1):
        [alone] = np.array(network.represent([rows[row]]))
        # States lie within 1; the products of a step are of another size: a few float32 roundings.
        np.testing.assert_allclose(together[row], alone, rtol=0, atol=1e-6)


def test_the_encoder_is_an_lstm(network: Seaco) -> None:
    """Beside PyTorch's equations, written out in float64."""
    ids = [3, 9, 5, 20]
    weights = {name: np.array(w, np.float64) for name, w in tree_flatten(network.parameters())}
    inputs = weights["decoder.embed.0.weight"][ids]
    for layer in (0, 1):
        hidden = cell = np.zeros(16)
        outputs = []
        for x in inputs:
            gates = (
                weights[f"bias_encoder.weight_ih_l{layer}"] @ x
                + weights[f"bias_encoder.bias_ih_l{layer}"]
                + weights[f"bias_encoder.weight_hh_l{layer}"] @ hidden
                + weights[f"bias_encoder.bias_hh_l{layer}"]
            )
            i, f, g, o = np.split(gates, 4)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            cell = f * cell + i * np.tanh(g)
            hidden = o * np.tanh(cell)
            outputs.append(hidden)
        inputs = np.array(outputs)
    [ours] = np.array(network.represent([ids]))
    np.testing.assert_allclose(ours, inputs[-1], rtol=0, atol=2e-6)  # float32 through 8 steps


def test_in_bfloat16_the_list_is_read_in_float32(checkpoint: Checkpoint) -> None:
    network = load_seaco(checkpoint, mx.bfloat16)
    for name, value in tree_flatten(network.parameters()):
        precise = name.startswith(("decoder.embed.", "bias_encoder."))
        assert value.dtype == (mx.float32 if precise else mx.bfloat16), name
    memory = network.represent([*SHORT, (SOS,)])
    assert memory.dtype == mx.float32
    main = load_paraformer(checkpoint, mx.bfloat16, frozenset())
    decoding = on_one_lane(with_hotwords(main, network, LONG, SOS))
    for recognition, before in zip(
        decoding.recognise(clips()).recognitions, main.recognise(clips()).recognitions, strict=True
    ):
        assert recognition.spans_ms == before.spans_ms
        assert all(0 < confidence <= 1 for confidence in recognition.confidences)


# What hotwords cannot do


@LISTS
def test_hotwords_change_neither_the_number_of_tokens_nor_their_times(
    plain: ParaformerDecoding, network: Seaco, ids: list[tuple[int, ...]]
) -> None:
    decoding = replace(with_hotwords(plain, network, ids, SOS), dropped_ids=frozenset())
    before = replace(plain, dropped_ids=frozenset()).recognise(clips()).recognitions
    changed = kept = 0
    for one, other in zip(decoding.recognise(clips()).recognitions, before, strict=True):
        assert one.spans_ms == other.spans_ms
        same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
        kept, changed = kept + sum(same), changed + len(same) - sum(same)
    assert changed > 10
    assert kept > 10


def test_where_the_bias_network_has_nothing_to_say_all_is_as_before(
    plain: ParaformerDecoding, checkpoint: Checkpoint
) -> None:
    network = load_seaco(checkpoint, mx.float32)
    layer = network.hotword_output_layer
    layer.update({"bias": mx.where(mx.arange(len(TOKENS)) == NO_BIAS, 1e4, layer.bias)})
    decoding = with_hotwords(plain, network, SHORT, SOS)
    assert decoding.recognise(clips()).recognitions == plain.recognise(clips()).recognitions


def test_what_the_bias_network_says_has_its_own_confidence(
    plain: ParaformerDecoding, checkpoint: Checkpoint
) -> None:
    """With an output layer that only adds a bias, the probabilities are known."""
    network = load_seaco(checkpoint, mx.float32)
    layer = network.hotword_output_layer
    bias = np.zeros(len(TOKENS), np.float32)
    bias[[5, 7]] = 3.0, 2.0
    layer.update({"weight": mx.zeros_like(layer.weight), "bias": mx.array(bias)})
    decoding = with_hotwords(plain, network, SHORT, SOS)
    [recognition] = decoding.recognise([features(60)]).recognitions
    assert set(recognition.token_ids) == {5}
    expected = np.exp(3) / np.exp(bias).sum()
    assert set(recognition.confidences) == {round(float(expected), 4)}


def test_no_hotword_where_the_recogniser_hears_no_text(
    plain: ParaformerDecoding, checkpoint: Checkpoint
) -> None:
    """A bias network that always shouts a hotword: it is written over text, not over silence."""
    network = load_seaco(checkpoint, mx.float32)
    shouting = mx.where(mx.arange(len(TOKENS)) == 5, 1e4, network.hotword_output_layer.bias)
    network.hotword_output_layer.update({"bias": shouting})
    decoding = with_hotwords(plain, network, SHORT, SOS)
    silence = np.zeros((1, 560), np.float32)
    for lanes in (decoding, on_one_lane(decoding)):
        result = lanes.recognise([silence, features(60), silence]).recognitions
        assert result[0] == result[2] == EMPTY
        assert set(result[1].token_ids) == {5}

    # The CIF counts tokens, but all that the decoder hears there is the end of the sentence.
    output = plain.model.decoder.output_layer
    before = output.bias
    try:
        output.update({"bias": mx.where(mx.arange(len(TOKENS)) == 2, 1e4, before)})
        assert decoding.recognise([features(60)]).recognitions == (EMPTY,)
    finally:
        output.update({"bias": before})


# Loading


def test_a_network_that_is_not_whole_is_refused_by_name(checkpoint: Checkpoint) -> None:
    specs = {name: spec for name, spec in checkpoint.specs.items() if "l1" not in name}
    with pytest.raises(CheckpointError, match=r"missing:\n +bias_encoder\.weight_ih_l1"):
        load_seaco(replace(checkpoint, specs=specs), mx.float32)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model_conf", {"bias_encoder_bid": True}, "bias_encoder_bid"),
        ("model_conf", {"bias_encoder_type": "mean"}, "'mean', False"),
        ("model_conf", {"NO_BIAS": len(TOKENS)}, "NO_BIAS"),
        ("seaco_decoder_conf", {"att_layer_num": 5}, "5 layers"),
        ("seaco_decoder_conf", {"num_blocks": 7}, "7 blocks"),
    ],
)
def test_networks_that_are_not_built_here_are_refused(
    checkpoint: Checkpoint, section: str, changes: dict[str, object], message: str
) -> None:
    config = {**checkpoint.config, section: {**checkpoint.config[section], **changes}}
    with pytest.raises(CheckpointError, match=message):
        SeacoConfig.from_checkpoint(config, ParaformerConfig.from_checkpoint(config, len(TOKENS)))


def test_no_bias_is_the_models_or_funasrs_default(checkpoint: Checkpoint) -> None:
    main = ParaformerConfig.from_checkpoint(checkpoint.config, 8404)
    assert SeacoConfig.from_checkpoint(checkpoint.config, main).no_bias == NO_BIAS
    silent = {**checkpoint.config, "model_conf": {}}
    assert SeacoConfig.from_checkpoint(silent, main).no_bias == 8377


def test_a_configuration_without_a_hotword_decoder_is_refused(checkpoint: Checkpoint) -> None:
    config = {k: v for k, v in checkpoint.config.items() if k != "seaco_decoder_conf"}
    with pytest.raises(CheckpointError, match="has no 'seaco_decoder_conf'"):
        load_seaco(replace(checkpoint, config=config), mx.float32)


# Wiring


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the loading functions that were called."""
    called: list[str] = []
    for name in ("load_paraformer", "load_seaco"):
        original = getattr(paraformer_decoding, name)

        def counted(*arguments: object, name: str = name, original: object = original) -> object:
            called.append(name)
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(paraformer_decoding, name, counted)
    return called


def recognizer(folder: Path, networks: Networks, tmp_path: Path, *hotwords: str) -> Recognizer:
    settings = Settings(model=str(folder), vad="none", hotwords=hotwords)
    return load_recognizer(find_model(settings, tmp_path), settings, networks)


def test_networks_are_loaded_once_whatever_the_lists(
    checkpoint: Checkpoint, tmp_path: Path, loads: list[str]
) -> None:
    networks = Networks()
    lists = [("今天",), (), ("语音", "识别"), ("今天",), ()]
    loaded = [recognizer(checkpoint.folder, networks, tmp_path, *words) for words in lists]

    assert loads == ["load_paraformer", "load_seaco"]
    results = [one.recognise(clips()).recognitions for one in loaded]
    assert results[0] == results[3] != results[1] == results[4]
    assert results[2] not in (results[0], results[1])
    assert {one.warnings for one in loaded} == {()}


def test_without_hotwords_nothing_of_them_is_loaded(
    checkpoint: Checkpoint, tmp_path: Path, loads: list[str]
) -> None:
    plain = recognizer(checkpoint.folder, Networks(), tmp_path)
    unknown = recognizer(checkpoint.folder, Networks(), tmp_path, "Kubernetes")
    assert set(loads) == {"load_paraformer"}
    assert plain.recognise(clips()).recognitions == unknown.recognise(clips()).recognitions


def test_hotwords_that_cannot_be_spelled_are_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    words = ("今天", *(f"unknown{n}" for n in range(12)))
    [warning] = recognizer(checkpoint.folder, Networks(), tmp_path, *words).warnings
    assert "'unknown0'" in warning
    assert "'unknown9' and 2 more" in warning
    assert "今天" not in warning


def test_a_model_without_a_hotword_decoder_says_so(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bicif", timestamp_head=True)
    plain = recognizer(folder, Networks(), tmp_path)
    biased = recognizer(folder, Networks(), tmp_path, "今天")
    assert plain.warnings == ()
    [warning] = biased.warnings
    assert "BiCifParaformer" in warning
    assert "hotwords are ignored" in warning
    assert plain.recognise(clips()).recognitions == biased.recognise(clips()).recognitions


def test_the_dictionary_of_the_model_is_used(tmp_path: Path) -> None:
    folder = write_tiny_seaco(tmp_path / "model", seg_dict="world wor@@ ld\n")
    assert load(folder, vad="none", hotwords=("World",)).warnings == ()
    [warning] = load(folder, vad="none", hotwords=("Modal",)).warnings
    assert "'Modal'" in warning


def test_other_hotwords_are_other_transcripts() -> None:
    digests = {
        recognition_digest(Settings(model="x", hotwords=words))
        for words in ((), ("今天",), ("语音",))
    }
    assert len(digests) == 3
