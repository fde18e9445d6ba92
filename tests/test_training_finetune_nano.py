"""How sample-nano is trained further: rows cut from two utterances, and the same loss as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import funasr_batch
from training import nano_batches
from training.nano_batches import SHORT_PREFIX, NanoLabels, audio_tokens, build
from training.nano_tokenizer import RankTokenizer, nano_config

mx = pytest.importorskip("mlx.core")

from funasr_batch.models.nano import NanoConfig  # noqa: E402
from training import finetune_nano, train_nano  # noqa: E402
from training.finetune_nano import (  # noqa: E402
    Encoded,
    Rows,
    begins_word,
    join,
    shifted,
    token_starts,
)

FOLDER = Path(funasr_batch.__file__).parent / "sample_models/sample-nano"
TRAINING = Path(train_nano.__file__).parent
WIDTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> RankTokenizer:
    return RankTokenizer.read(FOLDER)


def labels_of(text: str, tokenizer: RankTokenizer) -> tuple[NanoLabels, list[int]]:
    """A text of which each token is spoken for 4 of 5 frames, after 9 frames of silence; and the
    first frame of each token."""
    ids = tokenizer.encode(text)
    starts = [9 + 5 * index for index in range(len(ids))]
    frames = np.full(9 + 5 * len(ids) + 3, tokenizer.base, np.int16)
    for token, start in zip(ids, starts, strict=True):
        frames[start : start + 4] = token
    places = [start // 8 for start in starts]
    slots = np.full((audio_tokens(len(frames)), nano_batches.SLOTS), -1, np.int16)
    labels = NanoLabels(
        np.array(ids, np.int16), frames, slots, np.array([*places, places[-1]]), text, "en"
    )
    return labels, starts


def encoded(text: str, tokenizer: RankTokenizer, first: int) -> Encoded:
    """An utterance whose memory says in its first column which frame it is, from `first` on."""
    labels, _ = labels_of(text, tokenizer)
    memory = np.zeros((len(labels.frames), WIDTH), np.float16)
    memory[:, 0] = first + np.arange(len(memory))
    return Encoded(memory, labels.ids, token_starts(labels.frames, tokenizer.base), labels)


def test_tokens_begin_where_their_labels_do(tokenizer: RankTokenizer) -> None:
    labels, starts = labels_of("The the the weather is 多多云.", tokenizer)
    found = token_starts(labels.frames, tokenizer.base)
    assert found.tolist() == starts
    assert labels.frames[found].tolist() == labels.ids.tolist()


def test_a_text_is_cut_before_words_and_characters(tokenizer: RankTokenizer) -> None:
    ids = np.array(tokenizer.encode("Green tea, 今天 fine."))
    pieces = [tokenizer.decode([int(token)]) for token in ids]
    allowed = begins_word(tokenizer, ids)
    assert {p for p, ok in zip(pieces, allowed, strict=True) if ok} >= {"今", "天"}
    assert all(p[0] in " 今天" for p, ok in zip(pieces, allowed, strict=True) if ok)
    assert not allowed[0]
    assert not allowed[pieces.index(",")]


def test_joined_utterances_keep_each_token_on_its_sound(tokenizer: RankTokenizer) -> None:
    first = encoded("Green tea is too popular.", tokenizer, 0)
    second = encoded("The weather was dry on Monday.", tokenizer, 1000)
    cut = int(np.flatnonzero(begins_word(tokenizer, first.ids))[1])
    resumed = int(np.flatnonzero(begins_word(tokenizer, second.ids))[2])
    found = join([(first, 0, cut), (second, resumed - 1, resumed), (first, cut, len(first.ids))])
    sounds = [first.memory[s, 0] for s in first.starts[:cut]]
    sounds.append(second.memory[second.starts[resumed - 1], 0])
    sounds += [first.memory[s, 0] for s in first.starts[cut:]]
    assert found.memory[found.starts, 0].tolist() == sounds
    assert found.memory[-1, 0] == first.memory[-1, 0]
    assert found.ids.tolist() == [
        *first.ids[:cut],
        second.ids[resumed - 1],
        *first.ids[cut:],
    ]
    moved = shifted(found, 5)
    assert moved.memory[moved.starts, 0].tolist() == sounds
    assert len(moved.memory) == len(found.memory) - 5


def test_rows_of_pieces_have_the_sound_of_each_token(
    tokenizer: RankTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        encoded(text, tokenizer, 0)
        for text in ("Green tea is too popular.", "The weather was dry on Monday.", "It is late.")
    ]
    for item in items:
        item.memory[item.starts, 1] = item.ids
    monkeypatch.setattr(finetune_nano, "JOINED", 1.0)
    rows, rng = Rows(items, tokenizer), np.random.default_rng(4)
    for _ in range(30):
        found = rows._item(0, np.arange(3), rng)
        assert found.memory[found.starts, 1].tolist() == found.ids.astype(np.float16).tolist()
        assert found.ids[0] == items[0].ids[0]


def test_the_loss_is_the_one_of_the_first_training(
    tokenizer: RankTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = nano_config(
        TRAINING / "sample_nano.yaml", TRAINING / "sample_nano_llm.json", tokenizer
    )
    config["audio_encoder_conf"].update(
        output_size=WIDTH, linear_units=64, num_blocks=2, tp_blocks=1
    )
    config["audio_adaptor_conf"] |= {"encoder_dim": WIDTH, "ffn_dim": 64, "llm_dim": 64}
    config["ctc_decoder_conf"] |= {"encoder_dim": WIDTH, "ffn_dim": 64, "llm_dim": WIDTH}
    config["llm_config"].update(hidden_size=64, head_dim=16, intermediate_size=128)
    config["llm_config"]["num_hidden_layers"] = 3
    mx.random.seed(5)
    trainee = train_nano.Trainee(NanoConfig.from_checkpoint(config, tokenizer.base + 1))
    rng = np.random.default_rng(2)
    items = []
    for text in ("Green tea is too popular.", "今天上海多云，明天有雨。", "The weather was dry."):
        item = encoded(text, tokenizer, 0)
        item.memory[:] = rng.normal(size=item.memory.shape)
        items.append(item)
    monkeypatch.setattr(finetune_nano, "REPLACED", 0.0)
    prompts = [Rows(items, tokenizer)._prompts._plain(None, True)] * len(items)
    monkeypatch.setattr(nano_batches.Prompts, "draw", lambda *_: prompts[0])
    ours, ours_log = finetune_nano.losses(
        trainee, Rows(items, tokenizer)._laid_out(items, False, rng), 0.3
    )

    seconds = 7.0
    waves = [np.zeros(400 + 160 * 6 * (len(item.memory) - 1), np.int16) for item in items]
    batch = train_nano.arrays_of(
        build(
            waves,
            [item.labels for item in items],
            prompts,
            tokenizer,
            seconds,
            SHORT_PREFIX,
            replaced=0,
            rng=rng,
        )
    )
    memory = np.zeros((len(items), batch["frames"].shape[1], WIDTH), np.float32)
    for row, item in zip(memory, items, strict=True):
        row[: len(item.memory)] = item.memory
    monkeypatch.setattr(trainee.model, "encode", lambda *_: mx.array(memory))
    lengths = mx.array([len(item.memory) for item in items])
    _, log = train_nano.losses(trainee, mx.array(memory), lengths, batch, 0.3)
    text, guided, right = (float(log[i]) for i in (0, 3, 4))
    # The same products of float32 in other groupings, since the rows are padded further.
    assert ours_log.tolist() == pytest.approx([text, guided, right], rel=1e-4)
    assert float(ours) == pytest.approx(text + 0.3 * guided, rel=1e-4)
