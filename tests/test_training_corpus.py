"""The data of the sample models: grammar, tokens, alignment and shards."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from training import digits, dsp, make_samples, shards, synthesise
from training.corpus import (
    GRAMMAR,
    Corpus,
    Kind,
    Sentence,
    Split,
    Unit,
    chinese_cardinal,
    english_cardinal,
    join,
    tone_sandhi,
    year_words,
)
from training.espeak import Delivery, Espeak
from training.tokens import Tokens, learn, learn_pieces

KINDS: tuple[Kind, ...] = ("zh", "en", "mixed")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def tokens(corpus: Corpus) -> Tokens:
    return learn(corpus, merges=150, sentences=1000)


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    try:
        return Espeak()
    except OSError:
        pytest.skip("espeak-ng is not on this machine")


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_sentences_are_disjoint(corpus: Corpus, kind: Kind) -> None:
    rng = random.Random(1)
    training = {corpus.sentence(rng, kind, "train").text for _ in range(3000)}
    testing = {corpus.sentence(rng, kind, "test").text for _ in range(1000)}
    samples = {sentence.text for _, sentence in corpus.samples()}
    assert len(training) > 1500
    assert len(testing) > 400
    assert not training & testing
    assert not training & samples


def test_the_same_seed_gives_the_same_sentences(corpus: Corpus) -> None:
    first, second = random.Random(5), random.Random(5)
    for kind in KINDS:
        assert corpus.sentence(first, kind, "train") == corpus.sentence(second, kind, "train")
        assert corpus.words(first, kind, "train") == corpus.words(second, kind, "train")


def test_training_meets_everything_that_is_tested(corpus: Corpus) -> None:
    rng = random.Random(2)
    met: Counter[str] = Counter()
    tested = {unit.text for _, sentence in corpus.samples() for unit in sentence.units}
    for kind in KINDS:
        for _ in range(4000):
            met.update(unit.text for unit in corpus.sentence(rng, kind, "train").units)
            met.update(unit.text for unit in corpus.words(rng, kind, "train").units)
        for _ in range(500):
            tested.update(unit.text for unit in corpus.sentence(rng, kind, "test").units)
    assert [text for text in tested if met[text] < 5] == []
    assert [c for c in (*corpus.characters, *corpus.english_words) if not met[c]] == []


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_characters_and_lower_case_words(corpus: Corpus, kind: Kind) -> None:
    rng = random.Random(3)
    for _ in range(300):
        for unit in corpus.sentence(rng, kind, "train").units:
            if unit.language == "zh":
                assert len(unit.text) == 1
                assert unit.text in corpus.characters
                assert unit.spoken[-1] in "12345"
                assert unit.spoken[:-1].isalpha()
            else:
                assert unit.text.replace("'", "").isalpha()
                assert unit.text == unit.text.lower()


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (("今", "天"), "今天"),
        (("don't", "go"), "don't go"),
        (("用", "python", "写"), "用python写"),
        (("u", "s", "b", "坏"), "USB坏"),
        (("a", "cat"), "a cat"),
        (("用", "p", "p", "t"), "用PPT"),
    ],
)
def test_units_are_joined_as_paraformer_joins_them(units: tuple[str, ...], text: str) -> None:
    assert join(units) == text


@pytest.mark.parametrize(
    ("number", "chinese", "english"),
    [
        (0, "零", "zero"),
        (10, "十", "ten"),
        (35, "三十五", "thirty five"),
        (105, "一百零五", "one hundred and five"),
        (110, "一百一十", "one hundred and ten"),
        (220, "两百二十", "two hundred and twenty"),
        (2002, "两千零二", "two thousand and two"),
        (9999, "九千九百九十九", "nine thousand nine hundred and ninety nine"),
    ],
)
def test_numbers_are_read_as_people_read_them(number: int, chinese: str, english: str) -> None:
    assert chinese_cardinal(number) == chinese
    assert english_cardinal(number) == english


def test_years_are_read_in_pairs() -> None:
    years = (1995, 2000, 2004, 2021)
    assert [year_words(year, "en") for year in years] == [
        "nineteen ninety five",
        "two thousand",
        "two thousand and four",
        "twenty twenty one",
    ]
    assert year_words(2004, "zh") == "二零零四"


@pytest.mark.parametrize(
    ("text", "written", "spoken"),
    [
        ("你好", "ni3 hao3", "ni2 hao3"),
        ("我很好", "wo3 hen3 hao3", "wo2 hen2 hao3"),
        ("不是", "bu4 shi4", "bu2 shi4"),
        ("不来", "bu4 lai2", "bu4 lai2"),
        ("一天", "yi1 tian1", "yi4 tian1"),
        ("一次", "yi1 ci4", "yi2 ci4"),
        ("一个", "yi1 ge5", "yi2 ge5"),
        ("一月", "yi1 yue4", "yi1 yue4"),
        ("第一课", "di4 yi1 ke4", "di4 yi1 ke4"),
    ],
)
def test_tones_change_as_they_do_in_speech(text: str, written: str, spoken: str) -> None:
    units = [Unit(*pair, "zh") for pair in zip(text, written.split(), strict=True)]
    assert " ".join(unit.spoken for unit in tone_sandhi(units)) == spoken


def test_the_token_list_has_paraformers_layout(tokens: Tokens, corpus: Corpus) -> None:
    assert tokens.entries[:3] == ("<blank>", "<s>", "</s>")
    assert tokens.entries[-1] == "<unk>"
    assert len(set(tokens.entries)) == len(tokens.entries)
    unknown = len(tokens.entries) - 1
    for unit in (*corpus.characters, *corpus.english_words, "zyxw'q"):
        assert unknown not in tokens.encode_unit(unit)


def test_what_is_encoded_decodes(tokens: Tokens, corpus: Corpus) -> None:
    rng = random.Random(4)
    for kind in KINDS:
        for _ in range(200):
            sentence = corpus.sentence(rng, kind, "train")
            ids = tokens.encode(sentence.text)
            assert len(ids) == len(sentence.units)
            words = tokens.decode(token for unit in ids for token in unit)
            assert words == [unit.text for unit in sentence.units]


def test_tokens_survive_a_file(tokens: Tokens, tmp_path: Path) -> None:
    tokens.write(tmp_path / "tokens.json")
    assert Tokens.read(tmp_path / "tokens.json") == tokens


def test_byte_pairs_join_the_most_frequent_first() -> None:
    pieces = learn_pieces({"lower": 5, "low": 7, "newest": 6}, merges=3)
    assert "low" in pieces
    assert {"lo@@", "we@@"} <= set(pieces)
    assert "newest" not in pieces
    assert {"z", "z@@", "'", "'@@"} <= set(pieces)


def test_a_words_time_is_shared_by_its_pieces(tokens: Tokens) -> None:
    word = "xylophones"
    shared = tokens.spread(word, 1000, 3000)
    assert len(shared) > 1
    assert shared[0][1] == 1000
    assert shared[-1][2] == 3000
    assert all(before[2] == after[1] for before, after in pairwise(shared))
    assert tokens.decode(token for token, _, _ in shared) == [word]


@pytest.mark.parametrize(("up", "down"), [(320, 441), (2, 1), (1, 2), (200, 93), (441, 160)])
def test_resampling_keeps_a_tone(up: int, down: int) -> None:
    rate = 16_000
    tone = np.sin(2 * np.pi * 900 * np.arange(rate) / rate).astype(np.float32)
    changed = dsp.resample(tone, up, down)
    expected = np.sin(2 * np.pi * 900 * np.arange(len(changed)) * down / up / rate)
    assert len(changed) == -(-rate * up // down)
    assert np.abs(changed - expected)[100:-100].max() < 1e-3


def test_resampling_removes_what_would_alias() -> None:
    tone = np.sin(2 * np.pi * 9500 * np.arange(22_050) / 22_050).astype(np.float32)
    assert np.std(dsp.resample(tone, 320, 441)[100:-100]) < 1e-3


@pytest.mark.parametrize("factor", [0.88, 1.0, 1.12])
def test_stretching_keeps_pitch_and_level(factor: float) -> None:
    rate = 16_000
    tone = np.sin(2 * np.pi * 200 * np.arange(rate) / rate).astype(np.float32)
    longer = dsp.stretch(tone, factor, rate)
    assert len(longer) == round(rate * factor)
    inside = longer[1000:-2000]
    crossings = np.count_nonzero(np.diff(np.signbit(inside)))
    assert crossings / len(inside) * rate / 2 == pytest.approx(200, rel=0.02)
    assert np.std(inside) == pytest.approx(np.std(tone), rel=0.05)


def test_a_band_is_kept_and_the_rest_removed() -> None:
    rate, time = 16_000, np.arange(16_000) / 16_000
    for frequency, kept in ((60, False), (1000, True), (6000, False)):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        level = np.std(dsp.band_limit(tone, rate, 300, 3400)[2000:-2000]) / np.std(tone)
        assert (level > 0.95) if kept else (level < 0.05)


def test_shards_give_back_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = [
        shards.Utterance(
            samples=rng.integers(-9, 9, 1000 * (index + 1)).astype(np.int16),
            tokens=tuple((index + k, 10 * k, 10 * k + 9) for k in range(index)),
            text=f"第{index}",
            kind="zh",
            voice="en+f3",
        )
        for index in range(4)
    ]
    shards.write(tmp_path, "train-0000", written)
    (shard,) = shards.read_all(tmp_path)
    assert len(shard) == len(written)
    for index, expected in enumerate(written):
        found = shard[index]
        assert np.array_equal(found.samples, expected.samples)
        assert (found.tokens, found.text, found.kind) == (expected.tokens, expected.text, "zh")


def test_test_voices_are_not_trained_on() -> None:
    assert not set(synthesise.TEST_VARIANTS) & set(synthesise.TRAIN_VARIANTS)


def test_every_voice_exists(espeak: Espeak) -> None:
    variants = {*synthesise.TEST_VARIANTS, *synthesise.TRAIN_VARIANTS} - {""}
    assert variants <= espeak.variants
    for accent in (*synthesise.ACCENTS, synthesise.MANDARIN):
        assert len(espeak.speak(accent, "ma1", Delivery()).samples)
    with pytest.raises(ValueError, match="en-us\\+nobody"):
        espeak.speak("en-us", "one", Delivery("nobody"))


def test_every_syllable_is_spoken_as_one(espeak: Espeak) -> None:
    """A syllable that espeak-ng does not know would be spelled: several boundaries, no tone."""
    syllables = {
        syllable
        for line in (GRAMMAR / "pinyin.tsv").read_text(encoding="utf-8").splitlines()
        for syllable in line.split("\t")[1].split()
    }
    assert len(syllables) > 500
    for syllable in syllables:
        phonemes = espeak.phonemes(synthesise.MANDARIN, syllable)
        assert phonemes.count("_|") == 1
        assert re.search(r"\d\d", phonemes)


def test_words_come_at_their_times(espeak: Espeak) -> None:
    delivery = Delivery(rate=150, word_gap=20)
    speech = espeak.speak("en-us", "seven monkeys sing", delivery)
    assert [word.position for word in speech.words] == [0, 6, 14]
    audio = np.abs(speech.samples.astype(np.float32))
    for word in speech.words:
        assert audio[word.start : word.end].max() > 2000
    for before, after in pairwise(speech.words):
        assert after.start - before.end > 0.1 * espeak.sample_rate
        margin = espeak.sample_rate // 50
        assert audio[before.end + margin : after.start].max() < 400


@pytest.mark.parametrize("split", ["train", "test"])
def test_utterances_are_labelled(
    corpus: Corpus, tokens: Tokens, espeak: Espeak, split: Split
) -> None:
    rng = random.Random(6)
    for _ in range(30):
        utterance = synthesise.draw_utterance(corpus, espeak, tokens, rng, split)
        assert utterance.samples.dtype == np.int16
        assert 0.3 < len(utterance.samples) / 16_000 < 25
        assert 8000 < np.abs(utterance.samples.astype(int)).max() <= 32767
        words = tokens.decode(token for token, _, _ in utterance.tokens)
        assert join(words) == utterance.text
        bounds = [time for _, start, end in utterance.tokens for time in (start, end)]
        assert bounds == sorted(bounds)
        assert bounds[0] >= 0
        assert bounds[-1] <= len(utterance.samples)


def test_neighbours_spoken_as_one_word_share_its_time(espeak: Espeak) -> None:
    units = tuple(Unit(word, word, "en") for word in ("the", "end", "of", "the", "day", "o'clock"))
    speaker = synthesise.Speaker("", "en-us", Delivery())
    sentence = Sentence(units)
    clip = synthesise.speak(espeak, sentence, speaker, random.Random(0))
    assert [unit for unit, _, _ in clip.spans] == list(units)
    assert all(end - start > 400 for _, start, end in clip.spans)


def test_real_digits_are_joined(shared_data: Path, tmp_path: Path, tokens: Tokens) -> None:
    folder = tmp_path / "fsdd"
    folder.mkdir()
    for digit in range(10):
        for speaker in ("george", "jackson"):
            name = f"{digit}_{speaker}_0.wav"
            (folder / name).symlink_to(shared_data / "fsdd" / name)
    packed = tmp_path / "fsdd.npz"
    assert digits.pack(folder, packed) == 20
    recordings = digits.Digits.read(packed)
    for split, speaker, least in (("train", "george", 1), ("test", "jackson", 3)):
        rng = random.Random(7)
        for _ in range(10):
            utterance = digits.draw_string(recordings, speaker, tokens, rng, split)
            words = tokens.decode(token for token, _, _ in utterance.tokens)
            assert " ".join(words) == utterance.text
            assert least <= len(words) <= 8
            audio = np.abs(utterance.samples.astype(int))
            for _, start, end in utterance.tokens:
                assert 0 <= start < end <= len(audio)
            quiet = np.ones(len(audio), dtype=bool)
            for _, start, end in utterance.tokens:
                quiet[start:end] = False
            assert audio[quiet].max() == 0


def test_samples_are_recorded_with_their_times(
    corpus: Corpus, espeak: Espeak, tmp_path: Path
) -> None:
    recipe = make_samples.RECIPES[2]
    sentences = [sentence for name, sentence in corpus.samples() if name == "mixed"]
    recording = make_samples.record(espeak, sentences, recipe, random.Random(0))
    make_samples.write_reference(tmp_path, recipe.file, recording)
    lines = (tmp_path / "mixed.txt").read_text(encoding="utf-8").splitlines()
    times = json.loads((tmp_path / "mixed.json").read_text(encoding="utf-8"))
    assert lines == [sentence.text for sentence in sentences]
    ends = [end for line in times["sentences"] for _, _, end in line["tokens"]]
    assert ends == sorted(ends)
    assert ends[-1] < times["duration"]
