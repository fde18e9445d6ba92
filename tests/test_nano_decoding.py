"""Fun-ASR-Nano from features to words: batches, budgets, repairs, times, drafts and loading.

The model has random weights (tiny_nano.py). Left alone it never ends a text, so every segment runs
into its budget; with more stop tokens than it should have (`STOPS`) it says a few words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_nano import LABELS, PIECES, write_tiny_nano

from funasr_batch.decoding import nano_loading
from funasr_batch.decoding.lanes import cpu_streams
from funasr_batch.decoding.nano import (
    LEAST_RECUT_FRAMES,
    RECUTS,
    Companion,
    DecodingTally,
    DraftSource,
    EncodedSegment,
    NanoDecoding,
    NanoRecognition,
    _Piece,
    token_budget,
)
from funasr_batch.decoding.nano_loading import NanoOptions, load_nano, load_network
from funasr_batch.decoding.speculative import Always
from funasr_batch.errors import CheckpointError, RecognitionError, UsageError
from funasr_batch.loading import load
from funasr_batch.models.layers import on_gpu
from funasr_batch.records import FRAME_MS, FloatArray, Segment, Token
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint
from funasr_batch.weights.quantize import Quantization
from funasr_batch.weights.quantized_checkpoint import save_quantized

STOPS = frozenset(range(256, len(PIECES), 6))
LENGTHS = (70, 20, 45, 1, 120, 33)
ENDLESS_LENGTHS = (52, 7, 1)
# Products of other sizes round otherwise; confidences are rounded to 4 places. Measured: 1e-4.
CONFIDENCE = 3e-4


def speech(length: int, seed: int = 0) -> FloatArray:
    """Features [length, 560] whose loudness goes up and down."""
    random = np.random.default_rng((seed, length))
    loudness = 10 + 3 * random.standard_normal((length, 1))
    return (loudness + 2 * random.standard_normal((length, 560))).astype(np.float32)


@dataclass(frozen=True)
class Loaded:
    checkpoint: Checkpoint
    decoding: NanoDecoding

    def with_drafts(self, *drafts: DraftSource, **changes: Any) -> NanoDecoding:
        return replace(
            self.decoding,
            stops=STOPS,
            drafts=frozenset(drafts),
            planner=Always("drafted"),
            **changes,
        )


def loaded(folder: Path, options: NanoOptions | None = None) -> Loaded:
    checkpoint = open_checkpoint(folder)
    network = load_network(checkpoint, mx.float32)
    decoding = load_nano(checkpoint, network, options or NanoOptions())
    return Loaded(checkpoint, replace(decoding, streams=()))


@pytest.fixture(scope="module")
def with_ctc(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(write_tiny_nano(tmp_path_factory.mktemp("with") / "nano"))


@pytest.fixture(scope="module")
def without_ctc(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(write_tiny_nano(tmp_path_factory.mktemp("without") / "nano", ctc=False))


@pytest.fixture(scope="module", params=["ctc", "no ctc", "companion"])
def nano(request: pytest.FixtureRequest, with_ctc: Loaded, without_ctc: Loaded) -> Loaded:
    match request.param:
        case "ctc":
            return with_ctc
        case "no ctc":
            return without_ctc
    return Loaded(
        without_ctc.checkpoint, replace(without_ctc.decoding, companion=echo(without_ctc))
    )


def echo(model: Loaded) -> Companion:
    """Hears the words that the model will write, in even steps; of a third of them nothing."""
    plain = replace(model.decoding, companion=None, stops=STOPS)

    def read(batch: Sequence[FloatArray]) -> list[tuple[Token, ...]]:
        heard = []
        for features in batch:
            [recognition] = plain.recognise([features]).recognitions
            step = len(features) * FRAME_MS // (len(recognition.words) + 1)
            heard.append(
                tuple(
                    Token(word.text.strip(" ，。？"), place * step, (place + 1) * step, 0.9)
                    for place, word in enumerate(recognition.words)
                    if place % 3 != 1
                )
            )
        return heard

    return Companion(read)


def recognise(decoding: NanoDecoding, batch: Sequence[FloatArray]) -> list[NanoRecognition]:
    return list(decoding.recognise(batch).recognitions)


def assert_same(one: NanoRecognition, other: NanoRecognition) -> None:
    assert one.text == other.text
    assert one.token_ids == other.token_ids
    assert one.flags == other.flags
    assert one.timing == other.timing
    assert [word.text for word in one.words] == [word.text for word in other.words]
    ours, theirs = ([(t.text, t.start, t.end) for t in each.tokens] for each in (one, other))
    assert ours == theirs
    for mine, its in zip((*one.words, *one.tokens), (*other.words, *other.tokens), strict=True):
        assert mine.confidence == pytest.approx(its.confidence, abs=CONFIDENCE)


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_batch_gives_what_single_segments_give(nano: Loaded, rows: int) -> None:
    decoding = replace(nano.decoding, rows=rows, stops=STOPS)
    batch = [speech(length) for length in LENGTHS]
    singles = [recognise(decoding, [one])[0] for one in batch]
    assert len({single.text for single in singles}) >= 5

    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        together = recognise(decoding, [batch[place] for place in order])
        for place, recognition in zip(order, together, strict=True):
            assert_same(recognition, singles[place])


@pytest.mark.parametrize("rows", [1, 16])
def test_a_batch_that_is_cut_gives_what_single_segments_give(with_ctc: Loaded, rows: int) -> None:
    decoding = replace(with_ctc.decoding, rows=rows)
    batch = [speech(length) for length in ENDLESS_LENGTHS]
    for features, recognition in zip(batch, recognise(decoding, batch), strict=True):
        assert_same(recognition, recognise(decoding, [features])[0])


def test_segments_side_by_side_give_what_padded_ones_give(with_ctc: Loaded) -> None:
    padded = replace(with_ctc.decoding, stops=STOPS)
    streams = cpu_streams()
    assert on_gpu() or streams
    batch = [speech(length) for length in LENGTHS]
    apart = recognise(replace(padded, streams=streams), batch)
    for one, other in zip(apart, recognise(padded, batch), strict=True):
        assert_same(one, other)


def test_where_the_time_went(nano: Loaded) -> None:
    result = nano.decoding.recognise([speech(9)])
    assert result.encode_seconds > 0
    assert result.decode_seconds > 0


def test_features_that_are_no_numbers_are_an_error(nano: Loaded) -> None:
    broken = speech(20)
    broken[7, 3] = np.nan
    with pytest.raises(RecognitionError, match="not finite"):
        nano.decoding.recognise([speech(9), broken])


# --- Budgets and repairs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [(0, 16), (0.06, 16), (0.6, 25), (3, 64), (30, 496), (31, 512), (60, 512)],
)
def test_a_segment_has_the_budget_of_its_duration(seconds: float, tokens: int) -> None:
    assert token_budget(round(seconds * 1000 / FRAME_MS)) == pytest.approx(tokens, abs=1)
    assert token_budget(round(seconds * 1000 / FRAME_MS)) <= 512


def parts_of(features: FloatArray, cuts: int = 0) -> list[FloatArray]:
    """Halves of halves, cut at the quietest frame of the middle third."""
    if cuts == RECUTS or len(features) < LEAST_RECUT_FRAMES:
        return [features]
    third = len(features) // 3
    loudness = features.mean(axis=1)[third : len(features) - third]
    cut = third + int(loudness.argmin())
    return [*parts_of(features[:cut], cuts + 1), *parts_of(features[cut:], cuts + 1)]


@pytest.mark.parametrize(("length", "parts"), [(49, 1), (50, 2), (70, 2), (160, 4)])
def test_a_text_without_an_end_is_cut_and_kept(with_ctc: Loaded, length: int, parts: int) -> None:
    decoding = replace(with_ctc.decoding, stops=frozenset())
    features = speech(length)
    pieces = parts_of(features)
    assert len(pieces) == parts

    [recognition] = recognise(decoding, [features])

    expected: list[int] = []
    for piece in pieces:
        [read] = decoding._read([_whole(decoding, piece)])
        assert len(read.generated.ids) == token_budget(len(piece))
        expected += read.generated.ids
    assert recognition.token_ids == tuple(expected)
    assert "truncated" in recognition.flags
    assert ("recut" in recognition.flags) == (len(pieces) > 1)
    assert set(recognition.flags) <= {"recut", "truncated", "loop", "too_much_text"}
    assert len(set(recognition.flags)) == len(recognition.flags)


def _whole(decoding: NanoDecoding, features: FloatArray) -> Any:
    return _Piece(0, 0, decoding.encode([features])[0])


def test_the_text_of_all_parts_is_there(without_ctc: Loaded) -> None:
    decoding = without_ctc.decoding
    features = speech(160)
    [recognition] = recognise(decoding, [features])
    parts = [part for part in parts_of(features) if len(part) < LEAST_RECUT_FRAMES]
    assert len(parts) >= 3  # the others would be cut again if they were alone
    place = 0
    for part in parts:
        [single] = recognise(decoding, [part])
        assert single.text
        place = recognition.text.index(single.text, place) + len(single.text)
    assert "".join(word.text for word in recognition.words) == recognition.text.replace(" ", "")


def test_a_bad_segment_leaves_the_others_alone(with_ctc: Loaded) -> None:
    """With a stop that some texts come to in time, these are as good as alone."""
    batch = [speech(52, seed) for seed in range(5)]
    endless = with_ctc.decoding
    said = [
        set(endless._read([_whole(endless, features)])[0].generated.ids[:20]) for features in batch
    ]
    counts = {id: sum(id in ids for ids in said) for id in set.union(*said)}
    [stop] = sorted(counts, key=lambda id: (abs(counts[id] - len(batch) / 2), id))[:1]
    decoding = replace(endless, stops=frozenset({stop}))

    together = recognise(decoding, batch)

    flagged = [bool(one.flags) for one in together]
    assert any(flagged)
    assert not all(flagged)
    for features, recognition in zip(batch, together, strict=True):
        assert_same(recognition, recognise(decoding, [features])[0])


def test_what_was_cut_is_counted(with_ctc: Loaded) -> None:
    decoding = replace(with_ctc.decoding, stops=frozenset(), tally=DecodingTally())
    recognise(decoding, [speech(160), speech(10)])
    assert decoding.tally.segments == 2
    assert decoding.tally.recut == 3
    budgets = [
        token_budget(len(part)) for part in (speech(160), speech(10), *parts_of(speech(160)))
    ]
    assert decoding.tally.generate.tokens > sum(budgets)  # and of both halves


# --- The encoder's output, handed out and in ------------------------------------------------------


def through_numpy(encoded: EncodedSegment) -> EncodedSegment:
    return EncodedSegment(np.array(encoded.features), mx.array(np.array(encoded.memory)))


def test_what_was_encoded_can_be_decoded_later(nano: Loaded) -> None:
    decoding = replace(nano.decoding, stops=STOPS)
    batch = [speech(length) for length in LENGTHS]
    expected = recognise(decoding, batch)

    encoded = decoding.encode(batch)
    assert [len(one) for one in encoded] == list(LENGTHS)
    assert all(one.memory.shape[0] == len(one.features) for one in encoded)
    kept = [through_numpy(one) for one in encoded]
    for again in (decoding.decode(encoded), decoding.decode(kept), decoding.decode(kept)):
        for one, other in zip(again, expected, strict=True):
            assert_same(one, other)
    [alone] = decoding.decode(kept[4:5])
    assert_same(alone, expected[4])


def test_what_was_encoded_can_be_cut_later(with_ctc: Loaded) -> None:
    batch = [speech(length) for length in ENDLESS_LENGTHS]
    kept = [through_numpy(one) for one in with_ctc.decoding.encode(batch)]
    expected = recognise(with_ctc.decoding, batch)
    assert "recut" in expected[0].flags
    for one, other in zip(with_ctc.decoding.decode(kept), expected, strict=True):
        assert_same(one, other)


def test_other_settings_decode_without_encoding(with_ctc: Loaded) -> None:
    other = load_nano(
        with_ctc.checkpoint,
        with_ctc.decoding.model,
        NanoOptions(language="en", hotwords=("俣",)),
    )
    other = replace(other, stops=STOPS, streams=())
    batch = [speech(length) for length in LENGTHS]
    encoded = with_ctc.decoding.encode(batch)
    ours, expected = other.decode(encoded), recognise(other, batch)
    for one, two in zip(ours, expected, strict=True):
        assert_same(one, two)
    plain = replace(with_ctc.decoding, stops=STOPS).decode(encoded)
    assert [one.token_ids for one in ours] != [one.token_ids for one in plain]


def test_nothing_to_decode(nano: Loaded) -> None:
    assert nano.decoding.decode(()) == ()


# --- Times ----------------------------------------------------------------------------------------


def assert_times(recognition: NanoRecognition, length: int) -> None:
    assert [token.text for token in recognition.tokens] == [w.text for w in recognition.words]
    assert [t.confidence for t in recognition.tokens] == [w.confidence for w in recognition.words]
    edges = [edge for token in recognition.tokens for edge in (token.start, token.end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= length * FRAME_MS
    assert all(token.start < token.end for token in recognition.tokens)


def spoken(decoding: NanoDecoding, length: int = 60, count: int = 12) -> list[NanoRecognition]:
    """What is said of segments, where there is something to be timed."""
    batch = [speech(length, seed) for seed in range(count)]
    recognitions = recognise(replace(decoding, stops=STOPS), batch)
    return [one for one in recognitions if 0 < len(one.words) < length / 4 and not one.flags]


def test_times_of_the_ctc_head(with_ctc: Loaded) -> None:
    recognitions = spoken(with_ctc.decoding)
    assert len(recognitions) >= 5
    for recognition in recognitions:
        assert recognition.timing == "ctc"
        assert_times(recognition, 60)
    starts = {token.start % FRAME_MS for one in recognitions for token in one.tokens}
    assert 0 in starts


def test_times_of_a_companion(without_ctc: Loaded) -> None:
    model = Loaded(without_ctc.checkpoint, without_ctc.decoding)
    decoding = replace(without_ctc.decoding, companion=echo(model))
    recognitions = spoken(decoding)
    assert len(recognitions) >= 5
    for recognition in recognitions:
        assert recognition.timing == "cif"
        assert_times(recognition, 60)
        step = 60 * FRAME_MS // (len(recognition.words) + 1)
        for place, token in enumerate(recognition.tokens):
            if place % 3 != 1:  # measured; a mark goes with the word, and takes no time
                assert token.start == pytest.approx(place * step, abs=1)


@pytest.mark.parametrize(
    "heard",
    [(), (Token("nothing", 0, 500, 1.0), Token("like", 500, 600, 1.0), Token("it", 600, 900, 1.0))],
    ids=["nothing", "something else"],
)
def test_a_companion_that_heard_something_else_is_not_believed(
    without_ctc: Loaded, heard: tuple[Token, ...]
) -> None:
    companion = Companion(lambda batch: [heard for _ in batch])
    recognitions = spoken(replace(without_ctc.decoding, companion=companion))
    assert recognitions
    for recognition in recognitions:
        assert (recognition.timing, recognition.tokens) == ("vad", ())


def test_the_ctc_head_is_believed_before_a_companion(with_ctc: Loaded) -> None:
    companion = Companion(lambda batch: [() for _ in batch])
    recognitions = spoken(replace(with_ctc.decoding, companion=companion))
    assert {one.timing for one in recognitions} == {"ctc"}


def test_words_without_times_are_no_tokens(without_ctc: Loaded) -> None:
    decoding = without_ctc.decoding
    recognitions = spoken(decoding)
    assert recognitions
    for recognition in recognitions:
        assert (recognition.timing, recognition.tokens) == ("vad", ())
        segment = decoding.text_segment(Segment(3, 16_000, 80_000), recognition)
        assert (segment.start, segment.end, segment.timing) == (1000, 5000, "vad")
        assert segment.tokens == ()
        assert segment.words == recognition.words


def test_times_are_shifted_to_the_recording(with_ctc: Loaded) -> None:
    for recognition in spoken(with_ctc.decoding):
        segment = with_ctc.decoding.text_segment(Segment(3, 16_000, 80_000), recognition)
        assert segment.id == 3
        assert segment.text == recognition.text
        assert segment.words == ()
        assert [token.start for token in segment.tokens] == [
            token.start + 1000 for token in recognition.tokens
        ]
        assert [token.text for token in segment.tokens] == [w.text for w in recognition.words]


def test_a_text_with_more_labels_than_frames_has_no_times(with_ctc: Loaded) -> None:
    decoding = replace(with_ctc.decoding, stops=frozenset())
    [recognition] = recognise(decoding, [speech(9)])
    assert len(recognition.words) > 9
    assert (recognition.timing, recognition.tokens) == ("vad", ())


def test_a_checkpoint_without_a_ctc_head_has_none_made_up(without_ctc: Loaded) -> None:
    assert without_ctc.decoding.ctc is None
    names = [name for name, _ in tree_flatten(without_ctc.decoding.model.parameters())]
    assert not [name for name in names if "ctc" in name]


def test_a_ctc_head_without_its_vocabulary_is_not_used(tmp_path: Path) -> None:
    model = loaded(write_tiny_nano(tmp_path / "nano", without=["ctc.tiktoken"]))
    assert model.decoding.ctc is None
    assert {one.timing for one in spoken(model.decoding)} == {"vad"}


# --- Drafts ---------------------------------------------------------------------------------------


SOURCES: list[tuple[DraftSource, ...]] = [
    (),
    ("ctc",),
    ("lookup",),
    ("ctc", "lookup"),
    ("companion",),
    ("model",),
    ("model", "lookup"),
]


@pytest.mark.parametrize("sources", SOURCES, ids="+".join)
def test_drafts_change_no_text(
    with_ctc: Loaded, without_ctc: Loaded, sources: tuple[DraftSource, ...]
) -> None:
    model = without_ctc if "companion" in sources else with_ctc
    companion = echo(model) if "companion" in sources else None
    batch = [speech(length) for length in LENGTHS]
    plain = recognise(model.with_drafts(companion=companion), batch)

    itself = replace(model.decoding, stops=STOPS)
    drafted = model.with_drafts(
        *sources, companion=companion, draft_model=itself, tally=DecodingTally()
    )
    for one, other in zip(recognise(drafted, batch), plain, strict=True):
        assert_same(one, other)

    tally = drafted.tally.generate
    if not sources:
        assert tally.drafted == 0
    elif "model" in sources:  # knows what will be said
        assert tally.accepted > 0.5 * tally.drafted > 0
    elif "companion" in sources:  # knows two words of three
        assert tally.accepted > 0
    elif "ctc" in sources:  # knows nothing
        assert tally.drafted > 0


# --- Loading --------------------------------------------------------------------------------------


def test_float16_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_nano(tmp_path / "nano")
    with pytest.raises(UsageError, match="float16 Nano writes garbage"):
        load(folder, dtype="float16")


@pytest.mark.parametrize("missing", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_tokenizer_without_a_token_is_refused_by_its_name(tmp_path: Path, missing: str) -> None:
    special = [name for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if name != missing]
    folder = write_tiny_nano(tmp_path / "nano", special=special)
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    assert missing in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_nano(tmp_path / "nano", without=["tokenizer.json"])
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        loaded(folder)


def test_an_unknown_language_is_refused(with_ctc: Loaded) -> None:
    with pytest.raises(UsageError, match="unknown language: tlh"):
        load_nano(with_ctc.checkpoint, with_ctc.decoding.model, NanoOptions(language="tlh"))


def test_a_config_that_lacks_something_is_refused(with_ctc: Loaded) -> None:
    config = {
        key: value
        for key, value in with_ctc.checkpoint.config.items()
        if key != "audio_adaptor_conf"
    }
    with pytest.raises(CheckpointError, match="has no 'audio_adaptor_conf'"):
        load_network(replace(with_ctc.checkpoint, config=config), mx.float32)


def test_texts_end_with_any_of_the_tokens_that_end_a_turn(with_ctc: Loaded) -> None:
    special = with_ctc.decoding.tokenizer.special
    assert with_ctc.decoding.stops == {special("<|im_end|>"), special("<|endoftext|>")}
    llm = {**with_ctc.checkpoint.config["llm_config"], "eos_token_id": [300, 301]}
    checkpoint = replace(
        with_ctc.checkpoint, config={**with_ctc.checkpoint.config, "llm_config": llm}
    )
    decoding = load_nano(checkpoint, with_ctc.decoding.model, NanoOptions())
    assert decoding.stops == {*with_ctc.decoding.stops, 300, 301}


def test_rows_fit_the_memory(with_ctc: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(memory: int) -> int:
        monkeypatch.setattr(nano_loading, "memory_of_device", lambda: memory)
        return load_nano(with_ctc.checkpoint, with_ctc.decoding.model, NanoOptions()).rows

    assert rows(1 << 40) == (64 if on_gpu() else 8)
    assert rows(1 << 10) == 1
    few = rows(4 << 20)
    assert 1 <= few <= 8


@pytest.mark.parametrize("plan", [Quantization(encoder=8), Quantization(encoder=8, llm=4)], ids=str)
def test_quantised_in_memory_is_quantised_on_disk(
    with_ctc: Loaded, tmp_path: Path, plan: Quantization
) -> None:
    folder = save_quantized(with_ctc.checkpoint, tmp_path / "quantised", plan)
    saved = open_checkpoint(folder)
    assert saved.quantization == plan
    in_memory = load_network(with_ctc.checkpoint, mx.float32, plan)
    from_disk = load_network(saved, mx.float32)
    plain = with_ctc.decoding.model

    ours, theirs, exact = (
        dict(tree_flatten(model.parameters())) for model in (in_memory, from_disk, plain)
    )
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    moved = [name for name in exact if name in ours and ours[name].shape == exact[name].shape]
    assert any(not mx.array_equal(ours[name], exact[name]) for name in moved) or on_gpu()

    batch = [speech(length) for length in LENGTHS]
    texts = [
        recognise(
            replace(load_nano(checkpoint, model, NanoOptions()), stops=STOPS, streams=()), batch
        )
        for checkpoint, model in ((with_ctc.checkpoint, in_memory), (saved, from_disk))
    ]
    for one, other in zip(*texts, strict=True):
        assert_same(one, other)


@pytest.mark.skipif(on_gpu(), reason="a GPU multiplies quantised weights as they are")
def test_on_a_cpu_quantised_weights_are_plain_again(with_ctc: Loaded) -> None:
    plan = Quantization(encoder=8, llm=8)
    model = load_network(with_ctc.checkpoint, mx.float32, plan)
    assert not any(isinstance(layer, nn.QuantizedLinear) for layer in model.modules())
    parameters = dict(tree_flatten(model.parameters()))
    exact = dict(tree_flatten(with_ctc.decoding.model.parameters()))
    assert parameters.keys() == exact.keys()
    assert all(value.dtype == mx.float32 for value in parameters.values())
    name = "llm.model.layers.0.mlp.down_proj.weight"
    error = mx.abs(parameters[name] - exact[name]).max().item()
    assert 0 < error < 0.05 * mx.abs(exact[name]).max().item()
    for name in ("llm.model.embed_tokens.weight", "ctc.ctc_lo.weight"):
        assert mx.array_equal(parameters[name], exact[name])


def test_bfloat16_is_bfloat16_throughout(with_ctc: Loaded) -> None:
    model = load_network(with_ctc.checkpoint, mx.bfloat16)
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}
    decoding = load_nano(with_ctc.checkpoint, model, NanoOptions())
    batch = [speech(length) for length in LENGTHS]
    recognitions = recognise(replace(decoding, stops=STOPS, streams=()), batch)
    assert all(0 <= word.confidence <= 1 for one in recognitions for word in one.words)
    assert any(one.words for one in recognitions)


def test_from_a_folder_to_a_transcript(tmp_path: Path) -> None:
    folder = write_tiny_nano(tmp_path / "nano")
    recognizer = load(folder, vad="none", timing_model="none", dtype="float32")
    noise = 0.1 * np.random.default_rng(0).standard_normal(40_000, np.float32)

    [segment] = recognizer.transcribe(noise).segments

    assert segment.text
    assert "truncated" in segment.flags
    assert recognizer.decoding.model.config.ctc_vocabulary == LABELS  # type: ignore[attr-defined]
