"""Nano without a VAD: pieces encoded in context, early texts, silence that stays silent."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from audio_files import noise
from command import Command
from tiny_model import write_tiny_model

from funasr_batch.decoding.ctc_branch import CtcReading
from funasr_batch.decoding.nano import SILENCE, DecodingTally, NanoDecoding, loudness
from funasr_batch.errors import ModelError, UsageError
from funasr_batch.frontend import FrontEnd
from funasr_batch.loading import load
from funasr_batch.model_files import find_model
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import Excerpt, FloatArray, TextSegment, Token
from funasr_batch.run.progress import EventLog
from funasr_batch.settings import Settings
from funasr_batch.text.nano_words import Wording

PLAIN = FrontEnd(7, 6, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def nano(oracle: Path) -> str:
    return str(oracle / "checkpoints/nano-tiny")


@pytest.fixture(scope="module")
def recognizer(nano: str, cache: Path) -> Recognizer:
    """Streams; so that it comes to an end, many tokens are one."""
    loaded = load(nano, stream_encoder=True, draft="none", timing_model="none", cache_dir=cache)
    return replace(loaded, decoding=_brief(loaded.decoding))


@pytest.fixture
def decoding(recognizer: Recognizer) -> NanoDecoding:
    return replace(recognizer.decoding, tally=DecodingTally())


@pytest.fixture(scope="module")
def speech(oracle: Path) -> FloatArray:
    """70 s of speech."""
    samples, rate = soundfile.read(oracle / "inputs/vad_example.wav", dtype="float32")
    assert rate == 16_000
    return samples


def _brief(decoding: NanoDecoding, every: int = 7) -> NanoDecoding:
    return replace(decoding, stops=frozenset((*decoding.stops, *range(0, 2048, every))))


# The encoder


def test_an_excerpt_is_its_own_frames_of_the_whole(
    decoding: NanoDecoding, speech: FloatArray
) -> None:
    features = PLAIN.features(speech[: 9 * 16_000])
    shorter = PLAIN.features(speech[: 4 * 16_000])
    whole, _ = decoding.encode([features, shorter])
    mixed = [shorter, Excerpt(features, 20, 70), Excerpt(features, 0, 5), features]
    _, middle, beginning, again = decoding.encode(mixed)

    # Lanes and paddings may differ between the batches: float32 rounding alone.
    for one, first, after in ((middle, 20, 70), (beginning, 0, 5), (again, 0, len(features))):
        assert len(one) == after - first
        np.testing.assert_array_equal(one.features, features[first:after])
        np.testing.assert_allclose(
            np.array(one.memory), np.array(whole.memory[first:after]), rtol=0, atol=5e-5
        )


def test_an_excerpt_is_read_as_what_the_encoder_made_of_its_frames(
    decoding: NanoDecoding, speech: FloatArray
) -> None:
    features = PLAIN.features(speech[: 9 * 16_000])
    [encoded] = decoding.encode([features])
    own = replace(encoded, features=features[20:70], memory=encoded.memory[20:70])
    [expected] = decoding.decode([own])
    [found] = decoding.recognise([Excerpt(features, 20, 70)]).recognitions
    [alone] = decoding.recognise([features[20:70]]).recognitions
    assert found.token_ids == expected.token_ids != ()
    assert alone.token_ids != found.token_ids, "the context made no difference to the encoder"


def test_the_pieces_of_a_recording_have_its_frames_once(
    recognizer: Recognizer, speech: FloatArray
) -> None:
    cutter = recognizer.cutter()
    clips = [*cutter.accept(speech), *cutter.finish()]
    items = [recognizer.features(clip) for clip in clips]
    assert all(isinstance(item, Excerpt) for item in items)
    own = [item.features[item.first : item.after] for item in items]
    # The same samples in other rows of a matrix product: float32 rounding of log-energies.
    np.testing.assert_allclose(np.concatenate(own), PLAIN.features(speech), rtol=0, atol=1e-3)


# Silence


@pytest.fixture(scope="module")
def quiet() -> dict[str, FloatArray]:
    noise_of_a_converter = np.round(np.random.default_rng(0).normal(0, 0.5, 48_000)) / 32_768
    return {
        "digital silence": np.zeros(48_000, np.float32),
        "a converter's noise": noise_of_a_converter.astype(np.float32),
        "noise at -85 dBFS": (noise(3) / 0.1 * 10 ** (-85 / 20)).astype(np.float32),
    }


def test_the_llm_does_not_see_silence(
    decoding: NanoDecoding, quiet: dict[str, FloatArray], speech: FloatArray
) -> None:
    spoken = PLAIN.features(speech[16_000 : 4 * 16_000])
    silent = [PLAIN.features(samples) for samples in quiet.values()]
    batch = [silent[0], spoken, *silent[1:], spoken[:30]]
    found = [r.token_ids for r in decoding.recognise(batch).recognitions]
    generated = decoding.tally.generate.tokens
    alone = [r.token_ids for r in decoding.recognise([spoken, spoken[:30]]).recognitions]
    assert found == [(), alone[0], (), (), alone[1]]
    assert all(alone)
    assert decoding.tally.generate.tokens == 2 * generated, "silence cost tokens"

    unguarded = replace(decoding, guard_silence=False)
    assert any(r.text for r in unguarded.recognise(silent).recognitions)


def test_a_batch_of_silence_alone(decoding: NanoDecoding, quiet: dict[str, FloatArray]) -> None:
    silent = [PLAIN.features(samples) for samples in quiet.values()]
    for recognition in decoding.recognise(silent).recognitions:
        assert (recognition.text, recognition.words, recognition.flags) == ("", (), ())
    assert decoding.tally.generate.passes == 0


def test_quiet_speech_is_no_silence(shared_data: Path) -> None:
    """At -60 dBFS in its loudest 100 ms: nobody could follow it at that level."""
    for name in ("zh/asr_example.wav", "zh/ali_example_1.wav", "en/librispeech_1995-1837-0001.wav"):
        samples, _ = soundfile.read(shared_data / "audio" / name, dtype="float32")
        power = np.convolve(samples.astype(np.float64) ** 2, np.full(1_600, 1 / 1_600), "valid")
        faint = (samples * 10 ** (-60 / 20) / np.sqrt(power.max())).astype(np.float32)
        assert loudness(PLAIN.features(faint)) > SILENCE, name


def test_with_cmvn_nobody_knows_how_loud_it_was(decoding: NanoDecoding) -> None:
    features = np.zeros((50, 560), np.float32)  # an average frame
    normalised = replace(decoding, plain_features=False)
    assert [r.text for r in decoding.recognise([features]).recognitions] == [""]
    assert [r.text for r in normalised.recognise([features]).recognitions] != [""]


@dataclass(frozen=True)
class ScriptedCtc:
    """A CTC head that reads given texts, in the order of the lengths of the segments."""

    texts: tuple[str, ...]

    def read(
        self, memory: mx.array, lengths: npt.NDArray[np.int32], limits: mx.array | None
    ) -> list[CtcReading]:
        totals = np.zeros(1, np.float32)
        return [CtcReading(self.texts[length // 10 - 3], memory, totals) for length in lengths]

    def timed(
        self, said: Wording, reading: CtcReading, start_ms: int, end_ms: int
    ) -> tuple[Token, ...] | None:
        return tuple(Token(word.text, start_ms, end_ms, word.confidence) for word in said.words)


def test_where_the_ctc_head_reads_nothing_nothing_is_written(
    decoding: NanoDecoding, speech: FloatArray
) -> None:
    features = PLAIN.features(speech[16_000 : 5 * 16_000])
    batch = [features[:30], features[:40], features[:50]]
    listening = replace(decoding, ctc=ScriptedCtc(("", "你好", " 。")))
    nothing, text, mark = listening.recognise(batch).recognitions
    assert (nothing.text, mark.text) == ("", "")
    assert text.token_ids == decoding.recognise(batch).recognitions[1].token_ids != ()
    assert text.timing == "ctc"


@pytest.mark.parametrize(
    ("settings", "guarded"),
    [({"vad": "silero"}, False), ({"vad": "none"}, True), ({"stream_encoder": True}, True)],
)
def test_silence_is_guarded_where_no_vad_does(
    nano: str, cache: Path, settings: dict[str, object], guarded: bool
) -> None:
    loaded = load(nano, draft="none", timing_model="none", cache_dir=cache, **settings)
    assert loaded.decoding.guard_silence == guarded
    assert (loaded.new_vad is None) == guarded
    assert loaded.windows_overlap == (settings == {"vad": "none"})


def test_a_silent_recording_has_no_text(recognizer: Recognizer) -> None:
    transcript = recognizer.transcribe(np.zeros(40 * 16_000, np.float32))
    assert (transcript.status, transcript.segments) == ("no_speech", ())


# The setting


def test_paraformer_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    settings = Settings(model=str(folder), stream_encoder=True)
    with pytest.raises(UsageError, match="stream_encoder") as caught:
        find_model(settings, tmp_path)
    assert "--model nano" in (caught.value.hint or "")


def test_no_vad_is_looked_for(nano: str, cache: Path) -> None:
    """One that was asked for and is not there would be an error otherwise."""
    asked = Settings(
        model=nano, vad="fsmn", vad_model="/nowhere", offline=True, timing_model="none"
    )
    with pytest.raises(ModelError):
        find_model(asked, cache)
    files = find_model(replace(asked, stream_encoder=True), cache)
    assert (files.vad, files.vad_digest) == (None, "none")


# Without times


def test_overlapping_windows_keep_their_text(nano: str, cache: Path, speech: FloatArray) -> None:
    loaded = load(nano, vad="none", draft="none", timing_model="none", cache_dir=cache)
    windows = replace(loaded, decoding=_brief(loaded.decoding, every=40))
    transcript = windows.transcribe(speech[: 50 * 16_000])
    assert [segment.timing for segment in transcript.segments] == ["vad"] * 3
    for segment in transcript.segments:
        assert segment.words
        assert "".join(word.text for word in segment.words) == segment.text.replace(" ", "")


# Events


def test_an_event_has_what_the_json_output_has(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.file_heard(Path("a/b.wav"), TextSegment(3, 8_640, 17_880, "你好。", "ctc"))
    event = json.loads((tmp_path / "events.jsonl").read_text("utf-8"))
    log.close()
    assert event.pop("time")
    assert event == {
        "event": "segment",
        "path": "a/b.wav",
        "id": 3,
        "start": 8.64,
        "end": 17.88,
        "text": "你好。",
        "timing": "ctc",
    }
    assert "`segment`" in (EventLog.__doc__ or "")


def test_the_command_tells_each_text_before_it_is_done(
    command: Command, recordings: Path, nano: str, speech: FloatArray
) -> None:
    soundfile.write(recordings / "talk.wav", speech[: 5 * 16_000], 16_000)
    arguments = ("--model", nano, "--stream-encoder", "--max-segment", "2", "--events", "-")
    ended = command(recordings, *arguments, "--timing-model", "none", "--offline")
    assert ended.code == 0, ended.err
    events = [json.loads(line) for line in ended.out.splitlines()]
    names = [event["event"] for event in events]
    texts = [event for event in events if event["event"] == "segment"]
    assert len(texts) >= 3
    assert [name for name in names if name != "warning"] == [
        *("run_started", "file_started"),
        *(["segment"] * len(texts)),
        *("file_finished", "run_finished"),
    ]
    output = json.loads((recordings / "talk.json").read_text("utf-8"))
    keys = ("id", "start", "end", "text", "timing")
    assert [{key: event[key] for key in keys} for event in texts] == [
        {key: segment[key] for key in keys} for segment in output["segments"]
    ]


@pytest.fixture
def command(tmp_path: Path, nano: str) -> Command:
    return Command.with_home(tmp_path / "home", Path(nano))


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    return folder
