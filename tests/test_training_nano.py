"""How sample-nano is made: texts, tokens, labels, batches, the LLM's pass, the packaged folder."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from funasr_batch.text.ctc_tokens import load_ctc_tokens
from funasr_batch.text.llm_tokenizer import load_llm_tokenizer
from funasr_batch.text.prompt import build_prompt
from training import nano_texts, shards
from training.corpus import Corpus, Kind
from training.nano_batches import (
    SHORT_PREFIX,
    SLOTS,
    NanoLabels,
    Prompts,
    build,
    character_times,
    label,
    token_frames,
    token_spans,
)
from training.nano_scoring import edits, units_of
from training.nano_tokenizer import (
    MARKS,
    PROMPTS,
    RankTokenizer,
    domain_texts,
    learn,
    nano_config,
)
from training.nano_tokenizer import write as write_tokenizer
from training.shards import Utterance
from training.tokens import Tokens

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from funasr_batch.models.nano import NanoConfig  # noqa: E402
from funasr_batch.models.qwen3 import Qwen3, Qwen3Config  # noqa: E402
from training.nano_llm import hidden_states  # noqa: E402
from training.train import FlatAdamW  # noqa: E402
from training.train_nano import Trainee, arrays_of, losses, save, spliced, transcribe  # noqa: E402

TRAINING = Path(nano_texts.__file__).parent
KINDS: tuple[Kind, ...] = ("zh", "en", "mixed")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens.read(TRAINING.parent / "funasr_batch/sample_models/sample-paraformer/tokens.json")


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, smaller than the one that ships."""
    folder = tmp_path_factory.mktemp("tokenizer")
    wide = sorted({c for text in PROMPTS for c in text if not c.isascii()})
    ranks = learn(domain_texts(corpus, 3000), (*corpus.characters, *MARKS, *wide), 500)
    write_tokenizer(folder, ranks)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> RankTokenizer:
    return RankTokenizer.read(folder)


def sentences(corpus: Corpus, count: int) -> list[tuple[str, ...]]:
    """Units of sentences and random words of every kind."""
    rng = random.Random(4)
    drawn = []
    for index in range(count):
        kind = KINDS[index % 3]
        draw = corpus.words if index % 4 == 0 else corpus.sentence
        drawn.append(tuple(unit.text for unit in draw(rng, kind, "train").units))
    return drawn


def spoken(units: tuple[str, ...], written: str, tokens: Tokens) -> Utterance:
    """An utterance with 250 ms a unit after 300 ms of silence, and no sound."""
    begins = [4800 + 4000 * index for index in range(len(units) + 1)]
    return Utterance(
        samples=np.zeros(begins[-1] + 4800, np.int16),
        tokens=tuple(
            token
            for unit, start in zip(units, begins, strict=False)
            for token in tokens.spread(unit, start, start + 4000)
        ),
        text="",
        kind="zh",
        voice="",
        written=written,
    )


# --- Texts


@pytest.mark.parametrize(
    ("units", "written"),
    [
        ("今天上海多云最高气温二十六度", "今天上海多云，最高气温二十六度。"),
        ("现在几点了", "现在几点了？"),
        ("没关系慢慢来", "没关系，慢慢来。"),
        ("what is your name please", "What is your name, please?"),
        ("i'm sorry i lost my keys", "I'm sorry, I lost my keys."),
        ("our guest is anna an actor from oslo", "Our guest is Anna, an actor from Oslo."),
        ("doctor brown likes brown new york", "Doctor Brown likes brown New York."),
        ("three four five", "Three four five."),
    ],
)
def test_a_sentence_is_written_with_marks_and_capitals(units: str, written: str) -> None:
    parts = tuple(units.split()) if units.isascii() else tuple(units)
    assert nano_texts.write_sentence(parts) == written


def test_letters_are_spelled_and_brands_cased_in_chinese() -> None:
    assert nano_texts.write_sentence(("我", "的", "g", "p", "s")) == "我的GPS。"
    assert nano_texts.write_sentence(("在", "a", "区", "用", "iphone")) == "在A区用iPhone。"


def test_sentences_follow_each_other() -> None:
    assert nano_texts.write([("good", "evening"), ("one",)]) == "Good evening. One."
    assert nano_texts.write([tuple("你好"), tuple("再见")]) == "你好。再见。"


def test_writing_changes_nothing_that_is_said(corpus: Corpus) -> None:
    for units in sentences(corpus, 3000):
        written = nano_texts.write_sentence(units)
        assert re.sub(r"[^\w']", "", written).lower() == "".join(units)
        assert written[-1] in "。？.?"


def test_scoring_ignores_marks_and_capitals() -> None:
    assert units_of("今天，GPS好。") == ["今", "天", "gps", "好"]
    assert edits(units_of("Don't go."), units_of("don't go")) == 0
    assert edits(list("kitten"), list("sitting")) == 3


# --- Tokens


def test_both_files_of_the_tokenizer_encode_alike(
    corpus: Corpus, folder: Path, tokenizer: RankTokenizer
) -> None:
    language_model = load_llm_tokenizer(folder / "tokenizer.json")
    ctc = load_ctc_tokens(folder / "ctc.tiktoken")
    for units in sentences(corpus, 600):
        text = nano_texts.write_sentence(units)
        ids = tokenizer.encode(text)
        assert ids == language_model.encode(text) == ctc.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.size == language_model.vocab_size
    assert tokenizer.base == len(ctc.pieces)


def test_prompts_do_not_depend_on_who_encodes_them(folder: Path, tokenizer: RankTokenizer) -> None:
    language_model = load_llm_tokenizer(folder / "tokenizer.json")
    for language in (None, "zh", "en"):
        for hotwords in ((), ("上海", "iPhone", "Taylor")):
            ours, theirs = (
                build_prompt(one, language=language, itn=False, hotwords=hotwords)  # type: ignore[arg-type]
                for one in (tokenizer, language_model)
            )
            assert ours == theirs
            assert len(ours.prefix) <= (110 if hotwords else SHORT_PREFIX)


def test_a_chinese_character_is_a_token_wherever_it_stands(
    corpus: Corpus, tokenizer: RankTokenizer
) -> None:
    text = "".join(corpus.characters) + MARKS
    pieces = list(tokenizer.pieces(text))
    assert [(start, end) for _, start, end in pieces] == [(i, i + 1) for i in range(len(text))]


# --- Labels


def collapsed(labels: np.ndarray, blank: int) -> list[int]:
    runs = labels[np.flatnonzero(np.diff(labels, prepend=-1))]
    return [int(run) for run in runs if run != blank]


def test_collapsing_the_labels_of_frames_gives_the_text(
    corpus: Corpus, tokens: Tokens, tokenizer: RankTokenizer
) -> None:
    for units in sentences(corpus, 300):
        written = nano_texts.write_sentence(units)
        labels = label(spoken(units, written, tokens), tokenizer, tokens.entries)
        assert labels is not None
        assert labels.ids.tolist() == list(tokenizer.encode(written))
        assert collapsed(labels.frames, tokenizer.base) == labels.ids.tolist()
        for place, row in enumerate(labels.slots):
            begun = labels.ids[labels.places[:-1] == place].tolist()
            assert [int(token) for token in row if token >= 0] == begun[:SLOTS]
        assert len(labels.places) == len(labels.ids) + 1
        assert np.all(np.diff(labels.places) >= 0)


def test_a_token_is_labelled_while_it_is_spoken(tokens: Tokens, tokenizer: RankTokenizer) -> None:
    labels = label(spoken(("你", "好"), "你好。", tokens), tokenizer, tokens.entries)
    assert labels is not None
    first, second, mark = tokenizer.encode("你好。")
    blank = tokenizer.base
    # 300 ms of silence are 5 frames of 60 ms, 250 ms of speech 4 and 5.
    expected = [blank] * 5 + [first] * 4 + [second] * 4 + [mark] * 2
    assert labels.frames[: len(expected)].tolist() == expected
    assert labels.places.tolist() == [0, 1, 1, 1]


def test_equal_neighbours_have_a_blank_between() -> None:
    placed = token_frames([(7, 0, 960), (7, 960, 1920), (8, 1920, 2880)], 6)
    assert placed == [(7, 0, 1), (7, 2, 3), (8, 3, 4)]
    assert token_frames([(7, 0, 960)] * 3, 4) is None


def test_a_text_that_was_not_spoken_gives_no_labels(tokens: Tokens) -> None:
    utterance = spoken(("你", "好"), "", tokens)
    timed = character_times(utterance, tokens.entries)
    assert token_spans("你好。", [(1, 0, 1), (2, 1, 2), (3, 2, 3)], timed) is not None
    assert token_spans("你早。", [(1, 0, 1), (2, 1, 2), (3, 2, 3)], timed) is None
    assert token_spans("你", [(1, 0, 1)], timed) is None


def test_shards_from_before_punctuation_are_read(tmp_path: Path, tokens: Tokens) -> None:
    utterance = spoken(("你", "好"), "你好。", tokens)
    shards.write(tmp_path, "old", [utterance])
    index = tmp_path / "old.index.npz"
    with np.load(index) as columns:
        np.savez(index, **{name: columns[name] for name in columns if name != "written"})
    (shard,) = shards.read_all(tmp_path)
    assert shard[0].tokens == utterance.tokens
    assert shard[0].written == ""
    assert nano_texts.write_unpunctuated("我用GPS好吗") == "我用GPS好吗？"


# --- Batches and the network


def tiny_config(tokenizer: RankTokenizer) -> dict:
    config = nano_config(
        TRAINING / "sample_nano.yaml", TRAINING / "sample_nano_llm.json", tokenizer
    )
    config["audio_encoder_conf"].update(output_size=32, linear_units=64, num_blocks=2, tp_blocks=1)
    config["audio_adaptor_conf"] |= {"encoder_dim": 32, "ffn_dim": 64, "llm_dim": 64}
    config["ctc_decoder_conf"] |= {"encoder_dim": 32, "ffn_dim": 64, "llm_dim": 32}
    config["llm_config"].update(hidden_size=64, head_dim=16, intermediate_size=128)
    config["llm_config"]["num_hidden_layers"] = 3
    return config


@pytest.fixture(scope="module")
def labelled(
    corpus: Corpus, tokens: Tokens, tokenizer: RankTokenizer
) -> list[tuple[np.ndarray, NanoLabels]]:
    """Utterances in which each token sounds as a chord of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for units in sentences(corpus, 60):
        if len(units) > 10 or len(rows) == 4:
            continue
        utterance = spoken(units, nano_texts.write_sentence(units), tokens)
        samples = rng.normal(0, 20, len(utterance.samples))
        for token, start, end in utterance.tokens:
            pitches = np.random.default_rng(token).uniform(200, 4000, 4)
            time = np.arange(end - start) / shards.SAMPLE_RATE
            samples[start:end] += 1500 * np.sin(2 * np.pi * pitches[:, None] * time).sum(axis=0)
        labels = label(utterance, tokenizer, tokens.entries)
        assert labels is not None
        rows.append((samples.astype(np.int16), labels))
    return rows


def test_rows_are_prompt_audio_and_text(
    tokenizer: RankTokenizer, labelled: list[tuple[np.ndarray, NanoLabels]]
) -> None:
    prompts, rng = Prompts(tokenizer), np.random.default_rng(1)
    drawn = [prompts.draw(labels, rng, hotwords=False) for _, labels in labelled]
    waves, labels = zip(*labelled, strict=True)
    batch = build(waves, labels, drawn, tokenizer, 4.0, SHORT_PREFIX, replaced=0, rng=rng)
    trainee = Trainee(NanoConfig.from_checkpoint(tiny_config(tokenizer), tokenizer.base + 1))
    # Audio tokens that say who they are: row and number.
    audio = np.zeros((len(waves), batch.slots.shape[1], 64), np.float32)
    audio[..., 0] = 1000 + np.arange(len(waves))[:, None]
    audio[..., 1] = np.arange(batch.slots.shape[1])
    found = np.array(spliced(trainee, mx.array(audio), mx.array(batch.ids), mx.array(batch.prefix)))
    table = np.array(trainee.model.llm.model.embed_tokens.weight)
    for row, (item, prompt) in enumerate(zip(labels, drawn, strict=True)):
        ids = [*prompt.prefix, *prompt.suffix, *item.ids]
        count = len(item.slots)
        parts = np.split(found[row], np.cumsum([len(prompt.prefix), count]))
        np.testing.assert_array_equal(parts[1][:, 0], np.full(count, 1000 + row))
        np.testing.assert_array_equal(parts[1][:, 1], np.arange(count))
        text = np.concatenate([parts[0], parts[2]])[: len(ids)]
        np.testing.assert_array_equal(text, table[ids])
        start = batch.starts[row]
        targets = batch.targets[row, : batch.counts[row]]
        assert batch.ids[row, start] == prompt.suffix[-1]
        assert batch.ids[row, start + 1 : start + len(targets)].tolist() == targets[:-1].tolist()
        assert targets[-1] == tokenizer.special("<|im_end|>")


def test_hotwords_come_from_the_text(tokenizer: RankTokenizer) -> None:
    said = Prompts(tokenizer)._said("今天上海多云，带iPhone。")
    assert {"今天", "上海", "多云", "iPhone"} <= said


def test_the_plain_pass_is_the_models(tokenizer: RankTokenizer) -> None:
    config = Qwen3Config(50, 32, 3, 4, 2, 16, 48, 1e-6, 1e6)
    llm = Qwen3(config)
    x = mx.random.normal((3, 40, 32), key=mx.random.key(0))
    found, weights = hidden_states(llm, x, 1)
    # float32 sums in another order
    np.testing.assert_allclose(np.array(found), np.array(llm(x)), atol=1e-5)
    np.testing.assert_allclose(np.array(weights.sum(axis=-1)), 1, atol=1e-5)
    assert np.abs(np.triu(np.array(weights)[0], 1)).max() == 0


def test_the_model_that_ships_fits_into_its_limit(tokenizer: RankTokenizer) -> None:
    config = nano_config(
        TRAINING / "sample_nano.yaml", TRAINING / "sample_nano_llm.json", tokenizer
    )
    config["llm_config"]["vocab_size"] = 3464 + 5
    trainee = Trainee(NanoConfig.from_checkpoint(config, 3464 + 1))
    assert sum(v.size for _, v in tree_flatten(trainee.model.parameters())) < 12.3e6


@pytest.mark.slow
def test_a_tiny_model_learns_four_utterances_by_heart(
    tokenizer: RankTokenizer,
    labelled: list[tuple[np.ndarray, NanoLabels]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Labels, places and positions agree, or this could not be learned; and the packaged folder
    says what the trained model said."""
    from funasr_batch.decoding.nano_loading import load_network
    from funasr_batch.weights.checkpoint import open_checkpoint
    from training import package_nano
    from training.features import log_mel, stack_frames

    mx.random.seed(3)
    raw = tiny_config(tokenizer)
    config = NanoConfig.from_checkpoint(raw, tokenizer.base + 1)
    trainee = Trainee(config)
    optimizer = FlatAdamW(trainee.trainable_parameters())
    gradient = nn.value_and_grad(trainee, losses)
    prompts, rng = Prompts(tokenizer), np.random.default_rng(1)
    waves, labels = zip(*labelled, strict=True)
    for step in range(120):
        drawn = [prompts.draw(item, rng, hotwords=False) for item in labels]
        batch = arrays_of(
            build(waves, labels, drawn, tokenizer, 4.0, SHORT_PREFIX, replaced=0.02, rng=rng)
        )
        sound = batch["waves"].astype(mx.float32) / 32768.0
        counts = 1 + (batch["samples"] - 400) // 160
        inputs = stack_frames(log_mel(sound), counts)
        (_, log), gradients = gradient(trainee, inputs, (counts + 5) // 6, batch, 0.3)
        trainee.update(optimizer.update(gradients, min(1, (step + 1) / 20) * 4e-3, 0.9))
        mx.eval(trainee.parameters(), optimizer.state, log)
    found = list(transcribe(trainee, tokenizer, waves, 4.0))
    assert [text for text, _ in found] == [item.written for item in labels]
    assert [text for _, text in found] == [item.written for item in labels]

    save({"model": trainee.model.parameters()}, config, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))  # JSON is YAML
    (tmp_path / "llm.json").write_text(json.dumps(raw["llm_config"]))
    arguments = {
        "run": tmp_path,
        "config": tmp_path / "config.json",
        "llm-config": tmp_path / "llm.json",
        "tokenizer": folder,
        "out": tmp_path / "packaged",
    }
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    monkeypatch.setattr("sys.argv", ["package_nano", *flags])
    package_nano.main()
    checkpoint = open_checkpoint(tmp_path / "packaged")
    assert (checkpoint.architecture, checkpoint.cmvn) == ("FunASRNano", None)
    trainee.model = load_network(checkpoint, mx.float32)
    assert list(transcribe(trainee, tokenizer, waves, 4.0)) == found
