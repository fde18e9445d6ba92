"""Loading a model, and what one recording becomes: a transcript or an error that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_files import noise, wav
from tiny_model import TOKENS, write_tiny_model

from funasr_batch.errors import (
    AudioError,
    CheckpointError,
    ModelError,
    UsageError,
    VanishedError,
)
from funasr_batch.loading import load
from funasr_batch.model_files import find_model
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import Recognition, Segment, Transcript
from funasr_batch.settings import Settings, recognition_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def recognizer(folder: Path) -> Recognizer:
    """Without a VAD, which would take noise for what it is."""
    return load(folder, vad="none")


@pytest.fixture(scope="module")
def with_vad(folder: Path) -> Recognizer:
    return load(folder, vad="silero")


@pytest.fixture
def speech(oracle: Path) -> np.ndarray:
    samples, rate = soundfile.read(oracle / "inputs/asr_example.wav", dtype="float32")
    assert rate == 16_000
    return samples


def recording(path: Path, samples: np.ndarray) -> Path:
    path.write_bytes(wav(samples))
    return path


def tokens_of(transcript: Transcript) -> list[tuple[str, int, int]]:
    return [
        (token.text, token.start, token.end)
        for segment in transcript.segments
        for token in segment.tokens
    ]


# Transcripts


def test_a_transcript_says_what_was_heard_when_by_what(
    recognizer: Recognizer, folder: Path, tmp_path: Path
) -> None:
    path = recording(tmp_path / "talk.wav", noise(5))
    transcript = recognizer.transcribe(path)

    assert transcript.status == "done"
    assert transcript.source.path == str(path)
    assert transcript.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert transcript.source.duration == 5.0
    assert (transcript.source.sample_rate, transcript.source.channels) == (16_000, 1)
    assert transcript.model == recognizer.info
    weights = (folder / "model.safetensors").read_bytes()
    assert transcript.model.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert transcript.settings_digest == recognition_digest(recognizer.settings)
    assert transcript.language in ("zh", "en")
    [segment] = transcript.segments
    assert (segment.id, segment.start, segment.end, segment.timing) == (0, 0, 5000, "cif")
    assert segment.text == transcript.text
    words = tokens_of(transcript)
    assert len(words) > 3
    edges = [edge for _, *span in words for edge in span]
    assert edges == sorted(edges)
    assert 0 <= edges[0] <= edges[-1] <= 5000
    assert all("@" not in word and "<" not in word for word, *_ in words)
    json.dumps(asdict(transcript), allow_nan=False)
    assert transcript.stats["audio_seconds"] == 5.0
    assert set(transcript.stats["stages"]) >= {"decode", "features", "encode", "predict/decode"}


@pytest.mark.parametrize("kind", [Path, str])
def test_a_file_and_its_samples_give_the_same(
    recognizer: Recognizer, tmp_path: Path, kind: Callable[[Path], str | Path]
) -> None:
    path = recording(tmp_path / "talk.wav", noise(23))
    samples, _ = soundfile.read(path, dtype="float32")

    from_file = recognizer.transcribe(kind(path))
    from_array = recognizer.transcribe(samples)

    assert from_file.segments == from_array.segments
    assert len(from_file.segments) == 2
    assert from_array.source.path == ""
    assert from_array.source.sha256 == hashlib.sha256(samples.tobytes()).hexdigest()


def test_samples_may_be_of_any_float_type_and_layout(recognizer: Recognizer) -> None:
    samples = noise(3)
    expected = recognizer.transcribe(samples)
    before = samples.copy()
    strided = np.stack([samples, np.zeros_like(samples)], axis=1)[:, 0]
    for same in (samples.astype(np.float64), strided):
        assert recognizer.transcribe(same).segments == expected.segments
    np.testing.assert_array_equal(samples, before)


def test_with_a_vad_only_speech_is_recognised(with_vad: Recognizer, speech: np.ndarray) -> None:
    padding = np.zeros(5 * 16_000, np.float32)
    transcript = with_vad.transcribe(np.concatenate([padding, speech, padding]))

    assert transcript.status == "done"
    assert transcript.text
    assert all(segment.start >= 4000 for segment in transcript.segments)
    assert all(segment.end <= 5000 + len(speech) // 16 + 1000 for segment in transcript.segments)
    for segment in transcript.segments:
        assert all(segment.start <= token.start <= token.end for token in segment.tokens)
        assert segment.tokens[-1].end <= segment.end


@pytest.mark.parametrize("samples", [np.zeros(48_000, np.float32), np.zeros(0, np.float32)])
def test_silence_is_no_speech(with_vad: Recognizer, samples: np.ndarray) -> None:
    transcript = with_vad.transcribe(samples)
    assert (transcript.status, transcript.text, transcript.segments) == ("no_speech", "", ())
    assert transcript.language == "und"
    assert transcript.source.duration == len(samples) / 16_000


@pytest.mark.parametrize("length", [1, 2, 10, 300, 399, 401])
def test_a_recording_shorter_than_a_window_is_no_fault(recognizer: Recognizer, length: int) -> None:
    transcript = recognizer.transcribe(noise(1)[:length])
    assert transcript.status in ("done", "no_speech")
    assert all(end <= 60 for _, _, end in tokens_of(transcript))


def test_overlapping_windows_are_joined_without_doubles(recognizer: Recognizer) -> None:
    samples = noise(61)
    transcript = recognizer.transcribe(samples)

    assert len(transcript.segments) == 4
    for left, right in pairwise(transcript.segments):
        assert left.end > right.start  # the windows overlap, their tokens do not
        assert left.tokens[-1].end <= right.tokens[0].start
    heard_once = len(tokens_of(transcript))
    alone = [
        len(tokens_of(recognizer.transcribe(samples[16 * segment.start : 16 * segment.end])))
        for segment in transcript.segments
    ]
    assert heard_once < sum(alone)


def test_the_language_may_be_given(folder: Path) -> None:
    assert load(folder, vad="none", language="en").transcribe(noise(2)).language == "en"


def test_pieces_become_words_at_their_place_in_the_recording(recognizer: Recognizer) -> None:
    ids = tuple(TOKENS.index(piece) for piece in ("今", "hello", "wor@@", "ld", "<unk>"))
    spans = tuple((100 * n, 100 * n + 90) for n in range(5))
    recognition = Recognition(ids, spans, (0.9, 0.8, 0.7, 0.6, 0.5))

    segment = recognizer.text_segment(Segment(3, 32_000, 64_000), recognition)

    assert (segment.id, segment.start, segment.end) == (3, 2000, 4000)
    assert segment.text == "今 hello world"
    assert [(t.text, t.start, t.end, t.confidence) for t in segment.tokens] == [
        ("今", 2000, 2090, 0.9),
        ("hello", 2100, 2190, 0.8),
        ("world", 2200, 2390, 0.6),
    ]


def test_any_thread_may_transcribe(recognizer: Recognizer) -> None:
    samples = noise(4)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(recognizer.transcribe, samples).result()
    assert elsewhere.segments == recognizer.transcribe(samples).segments


# Errors


def test_a_failing_recording_is_raised_and_named(recognizer: Recognizer, tmp_path: Path) -> None:
    missing = tmp_path / "missing.wav"
    with pytest.raises(VanishedError, match=r"missing\.wav"):
        recognizer.transcribe(missing)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"this is not a recording" * 50)
    with pytest.raises(AudioError, match=r"broken\.wav"):
        recognizer.transcribe(str(broken))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 16_000), np.float32), r"shape \(2, 16000\)"),
        (np.zeros(16_000, np.int16), "int16"),
        (np.full(16_000, np.nan, np.float32), "NaN"),
        (np.array([0.0, np.inf] * 8000, np.float32), "infinite"),
    ],
)
def test_an_array_that_is_no_audio_is_refused(
    recognizer: Recognizer, samples: np.ndarray, message: str
) -> None:
    with pytest.raises(AudioError, match=message):
        recognizer.transcribe(samples)


def test_each_path_is_yielded_once_with_its_result(recognizer: Recognizer, tmp_path: Path) -> None:
    good = recording(tmp_path / "good.wav", noise(2))
    paths = [good, tmp_path / "missing.wav", good]
    results = list(recognizer.transcribe_files(iter(map(str, paths))))
    assert sorted(path for path, _ in results) == sorted(paths)
    outcomes = dict(results)
    assert isinstance(outcomes[good], Transcript)
    assert isinstance(outcomes[tmp_path / "missing.wav"], VanishedError)


# Loading


def test_a_recognizer_describes_itself_in_a_line(recognizer: Recognizer, folder: Path) -> None:
    assert recognizer.device in ("cpu", "gpu")
    assert recognizer.dtype == ("float32" if recognizer.device == "cpu" else "bfloat16")
    assert recognizer.info.name == str(folder)
    assert {TOKENS[id] for id in recognizer.decoding.dropped_ids} == {"<blank>", "<s>", "</s>"}
    assert len(repr(recognizer)) < 300 + len(str(folder))


def test_the_timestamp_head_and_bfloat16_are_used_when_asked_for(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bicif", timestamp_head=True)
    coarse = load(folder, vad="none", dtype="bfloat16")
    assert coarse.dtype == "bfloat16"
    assert coarse.transcribe(noise(3)).segments
    plain = load(write_tiny_model(tmp_path / "plain"), vad="none").transcribe(noise(3))
    timed = load(folder, vad="none").transcribe(noise(3))
    assert timed.text == plain.text  # the same weights but for the head
    assert tokens_of(timed) != tokens_of(plain)


def test_funasrs_vad_is_used_from_its_folder(
    folder: Path, oracle: Path, tmp_path: Path, speech: np.ndarray
) -> None:
    fsmn = str(oracle / "checkpoints/fsmn-vad")
    files = find_model(Settings(model=str(folder), vad_model=fsmn), tmp_path)
    silero = find_model(Settings(model=str(folder), vad="silero"), tmp_path)
    none = find_model(Settings(model=str(folder), vad="none"), tmp_path)
    assert files.vad is not None
    assert silero.vad is none.vad is None
    assert len({files.digest, silero.digest, none.digest}) == 3
    assert files.info == none.info

    recognizer = load(folder, vad_model=fsmn, cache_dir=tmp_path)
    silence = np.zeros(3 * 16_000, np.float32)
    transcript = recognizer.transcribe(np.concatenate([silence, speech, silence]))
    assert transcript.segments
    assert all(2500 <= s.start < s.end <= 9500 for s in transcript.segments)
    assert recognizer.transcribe(silence).status == "no_speech"


def test_models_that_cannot_be_used_are_refused_with_the_reason(
    folder: Path, oracle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no model and no folder named 'nowhere'"):
        load("nowhere", cache_dir=tmp_path)
    fsmn = oracle / "checkpoints/fsmn-vad"
    with pytest.raises(CheckpointError, match="FsmnVADStreaming: it does not recognise speech"):
        load(fsmn, vad="none", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="not a VAD"):
        load(folder, vad_model=str(folder), cache_dir=tmp_path)
    with pytest.raises(UsageError, match="vad must be"):
        load(folder, vad="loud", cache_dir=tmp_path)


@pytest.mark.parametrize("gone", ["tokens.json", "lfr_n"])
def test_a_model_that_lacks_something_is_refused(folder: Path, tmp_path: Path, gone: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if gone == "tokens.json":
        (tmp_path / gone).unlink()
    else:
        description = json.loads((tmp_path / "model.json").read_text())
        del description["config"]["frontend_conf"][gone]
        (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=gone):
        load(tmp_path, vad="none")
