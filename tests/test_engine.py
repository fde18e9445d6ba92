"""Many recordings at once: nothing depends on the company, and one bad file costs one file."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_files import noise, wav
from tiny_model import write_tiny_model

from funasr_batch.decoding.paraformer import ParaformerDecoding
from funasr_batch.errors import (
    AudioError,
    FileError,
    RecognitionError,
    UnstableError,
    VanishedError,
)
from funasr_batch.frontend import FrontEnd
from funasr_batch.loading import load
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import (
    FRAME_SAMPLES,
    BatchResult,
    Excerpt,
    FloatArray,
    Recognition,
    Segment,
    Span,
    TextSegment,
    Transcript,
    Word,
)
from funasr_batch.run.engine import (
    READ_AHEAD,
    Advanced,
    Event,
    Failed,
    Finished,
    Heard,
    Started,
    transcribe_jobs,
)
from funasr_batch.run.reading import Job
from funasr_batch.run.stopping import StopRequest
from funasr_batch.segments import SegmentPolicy

ENDINGS = (Finished, Failed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def recognizer(folder: Path) -> Recognizer:
    """Cuts windows of 4 s, so that recordings of seconds have several."""
    return replace(load(folder, vad="none"), policy=SegmentPolicy(max_seconds=4.0))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 0.5 to 21 seconds, 1 to 8 windows each."""
    folder = tmp_path_factory.mktemp("recordings")
    paths = []
    for number, seconds in enumerate((3.0, 21.0, 0.5, 8.3, 4.0, 1.2, 12.6)):
        paths.append(folder / f"{number}.wav")
        paths[-1].write_bytes(wav(noise(seconds, seed=number)))
    return paths


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith("reader-")] == []


def ends(events: Sequence[Event]) -> dict[Job, Finished | Failed]:
    return {event.job: event for event in events if isinstance(event, ENDINGS)}


def heard(transcript: Transcript) -> list[tuple[Any, ...]]:
    """All but the confidences, which other batch shapes may round to another fourth place."""
    return [
        (segment.id, segment.start, segment.end, segment.text, token.text, token.start, token.end)
        for segment in transcript.segments
        for token in segment.tokens
    ]


def transcripts(
    paths: Sequence[Path], recognizer: Recognizer, **options: Any
) -> dict[Path, Transcript]:
    finished = {}
    for event in transcribe_jobs([Job(path) for path in paths], recognizer, **options):
        assert not isinstance(event, Failed)
        if isinstance(event, Finished):
            assert isinstance(event.job.audio, Path)
            finished[event.job.audio] = event.transcript
    return finished


# Results


@pytest.fixture(scope="module")
def alone(recognizer: Recognizer, recordings: list[Path]) -> dict[Path, Transcript]:
    """Each recording in a run of its own."""
    return {path: recognizer.transcribe(path) for path in recordings}


@pytest.mark.parametrize("batch_seconds", [1.0, 9.0, 500.0])
@pytest.mark.parametrize("workers", [1, 5])
def test_a_transcript_depends_on_its_recording_only(
    recognizer: Recognizer,
    recordings: list[Path],
    alone: dict[Path, Transcript],
    batch_seconds: float,
    workers: int,
) -> None:
    for order in (recordings, recordings[::-1]):
        together = transcripts(order, recognizer, batch_seconds=batch_seconds, workers=workers)
        assert together.keys() == alone.keys()
        for path, transcript in together.items():
            expected = alone[path]
            assert heard(transcript) == heard(expected)
            assert transcript.source == expected.source
            assert transcript.status == expected.status
            np.testing.assert_allclose(
                [token.confidence for segment in transcript.segments for token in segment.tokens],
                [token.confidence for segment in expected.segments for token in segment.tokens],
                rtol=0,
                atol=1.01e-4,
            )
    assert sum(len(transcript.segments) for transcript in alone.values()) > 12


@dataclass(frozen=True)
class Lengths:
    """A front end that notes how long its features are."""

    frontend: FrontEnd
    seen: list[int] = field(default_factory=list)

    def features(self, samples: FloatArray) -> FloatArray:
        features = self.frontend.features(samples)
        self.seen.append(len(features))
        return features


@dataclass(frozen=True)
class Sizes:
    """A model that notes how large its batches are, and is slow until enough clips were read."""

    decoding: ParaformerDecoding
    read: list[int]
    enough: int
    batches: list[int] = field(default_factory=list)

    def recognise(self, batch: Sequence[FloatArray]) -> BatchResult:
        self.batches.append(len(batch))
        deadline = time.monotonic() + 30
        while len(self.read) < self.enough and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.decoding.recognise(batch)

    def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
        return self.decoding.text_segment(segment, recognition)


def batch_sizes(jobs: Sequence[Job], recognizer: Recognizer, batch_seconds: float) -> list[int]:
    frontend = Lengths(recognizer.frontend)
    decoding = Sizes(recognizer.decoding, frontend.seen, len(jobs))
    noting = replace(recognizer, frontend=frontend, decoding=decoding)
    finished = ends(list(transcribe_jobs(jobs, noting, workers=2, batch_seconds=batch_seconds)))
    assert finished.keys() == set(jobs)
    return decoding.batches


def test_a_batch_holds_clips_of_several_recordings(recognizer: Recognizer) -> None:
    jobs = [Job(noise(2, seed=seed)) for seed in range(5)]  # one clip each; the queue holds all
    sizes = batch_sizes(jobs, recognizer, batch_seconds=500)
    assert sum(sizes) == 5
    assert max(sizes) > 1
    assert batch_sizes(jobs, recognizer, batch_seconds=1) == [1] * 5


def test_funasrs_vad_runs_in_several_threads(folder: Path, oracle: Path, tmp_path: Path) -> None:
    fsmn = str(oracle / "checkpoints/fsmn-vad")
    recognizer = load(folder, vad_model=fsmn, cache_dir=tmp_path)
    clips = [oracle / f"inputs/{name}.wav" for name in ("asr_example", "long", "mid")]
    together = transcripts(clips, recognizer, workers=3)
    for clip in clips:
        assert heard(together[clip]) == heard(recognizer.transcribe(clip))
        assert together[clip].text


def test_events_tell_the_story_of_each_recording(
    recognizer: Recognizer, recordings: list[Path]
) -> None:
    jobs = [Job(path) for path in recordings]
    events = list(transcribe_jobs(jobs, recognizer, workers=3, batch_seconds=20))
    for job in jobs:
        own = [event for event in events if event.job is job]
        assert isinstance(own[0], Started)
        assert isinstance(own[-1], Finished)
        advances = [event for event in own if isinstance(event, Advanced)]
        assert len(advances) == len(own) - 2
        duration = own[-1].transcript.source.duration
        assert sum(event.seconds for event in advances) == pytest.approx(duration)
        stats = own[-1].stats
        assert stats.audio_seconds == duration
        assert 0 < stats.real_frames <= stats.padded_frames
        spoken = sum(len(segment.tokens) for segment in own[-1].transcript.segments)
        assert stats.tokens >= spoken
        assert stats.stages.keys() >= {"decode", "vad", "features", "encode", "predict/decode"}


def test_a_recording_may_be_given_twice_and_as_samples(
    recognizer: Recognizer, recordings: list[Path], alone: dict[Path, Transcript]
) -> None:
    samples = noise(2)
    jobs = [Job(recordings[0]), Job(samples), Job(recordings[0]), Job(samples)]
    finished = ends(list(transcribe_jobs(jobs, recognizer, workers=2)))
    assert len(finished) == 4
    first, array, second, same = (finished[job].transcript for job in jobs)
    assert heard(first) == heard(second) == heard(alone[recordings[0]])
    assert heard(array) == heard(same)


def test_nothing_to_do_is_done_at_once(recognizer: Recognizer) -> None:
    assert list(transcribe_jobs([], recognizer)) == []


# Pieces in context, and texts that come early


@dataclass(frozen=True)
class Reciter:
    """A model that says how many frames it was to read and how many it was given; of silence
    nothing. It notes what it was given."""

    given: list[FloatArray | Excerpt] = field(default_factory=list)

    def recognise(self, batch: Sequence[FloatArray | Excerpt]) -> BatchResult:
        self.given.extend(batch)
        return BatchResult(tuple(map(self._say, batch)), 0.0, 0.0)

    def _say(self, item: FloatArray | Excerpt) -> Recognition:
        excerpt = item if isinstance(item, Excerpt) else Excerpt(item, 0, len(item))
        own = excerpt.features[excerpt.first : excerpt.after]
        # Digital silence is -16 in every band of the log-mel energies.
        said = (len(own), len(excerpt)) if own.max() > -10 else ()
        return Recognition(said, (), ())

    def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
        text = " ".join(map(str, recognition.token_ids))
        words = tuple(Word(word, 1.0) for word in text.split())
        start, end = segment.start_ms, segment.end_ms
        return TextSegment(segment.index, start, end, text, "vad", words=words)


@pytest.fixture
def streaming(recognizer: Recognizer) -> Recognizer:
    return replace(
        recognizer,
        decoding=Reciter(),
        frontend=FrontEnd(7, 6, None),
        policy=SegmentPolicy(),
        settings=replace(recognizer.settings, stream_encoder=True),
    )


def test_pieces_are_encoded_in_context_and_read_once(streaming: Recognizer) -> None:
    samples = noise(60.5)
    transcript = streaming.transcribe(samples)

    frames = len(streaming.frontend.features(samples))
    own, heard = zip(*(map(int, s.text.split()) for s in transcript.segments), strict=True)
    assert sum(own) == frames
    left, right = 3_000 // 60, -(-2_000 // 60)
    assert all(a < b <= a + left + right for a, b in zip(own, heard, strict=True))
    edges = [(s.start, s.end) for s in transcript.segments]
    assert [start for start, _ in edges] == [0, *(end for _, end in edges[:-1])]
    assert edges[-1][1] == 60_500
    assert all(isinstance(item, Excerpt) for item in streaming.decoding.given)


def test_a_recording_of_one_piece_needs_no_context(streaming: Recognizer) -> None:
    assert streaming.transcribe(noise(3)).text == "50 50"
    assert streaming.transcribe(noise(1)[:1]).status == "no_speech"


@pytest.mark.parametrize("batch_seconds", [1.0, 500.0])
def test_texts_come_in_order_and_are_those_of_the_transcript(
    streaming: Recognizer, batch_seconds: float
) -> None:
    samples = noise(80)
    samples[25 * 16_000 : 50 * 16_000] = 0
    jobs = [Job(samples), Job(noise(30))]
    events = list(transcribe_jobs(jobs, streaming, batch_seconds=batch_seconds))
    for job in jobs:
        own = [event for event in events if event.job is job]
        early = [event.segment for event in own if isinstance(event, Heard)]
        assert isinstance(own[-1], Finished)
        assert tuple(early) == own[-1].transcript.segments
        assert [segment.id for segment in early] == sorted({s.id for s in early})
    silent = [event for event in events if isinstance(event, Heard) and not event.segment.text]
    assert silent == []


@dataclass(frozen=True)
class Patient:
    """A front end that does not go on to the third clip before a text was heard."""

    frontend: FrontEnd
    text_heard: threading.Event
    waited: list[bool] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def features(self, samples: FloatArray) -> FloatArray:
        if len(self.seen) == 2:
            self.waited.append(self.text_heard.wait(30))
        self.seen.append(len(samples))
        return self.frontend.features(samples)


def test_the_first_text_is_there_before_the_recording_is_read(streaming: Recognizer) -> None:
    """The reader stands still in the third of some twenty clips until the first text came."""
    text_heard = threading.Event()
    patient = Patient(streaming.frontend, text_heard)
    for event in transcribe_jobs([Job(noise(180))], replace(streaming, frontend=patient)):
        if isinstance(event, Heard) and not text_heard.is_set():
            assert event.segment.start == 0
            assert len(patient.seen) <= 2
            text_heard.set()
    assert patient.waited == [True]
    assert len(patient.seen) > 15


def test_texts_do_not_come_early_otherwise(recognizer: Recognizer) -> None:
    events = transcribe_jobs([Job(noise(9))], recognizer)
    assert not any(isinstance(event, Heard) for event in events)


def test_windows_whose_words_have_no_times_keep_their_text(recognizer: Recognizer) -> None:
    """As Nano without a CTC head or a Paraformer gives them."""

    class Counter(Reciter):
        """Reads one word in every eight frames: their number in the recording."""

        def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
            step = 8 * FRAME_SAMPLES
            numbers = range(-(-segment.start // step), segment.end // step)
            words = tuple(Word(f"n{number}", 1.0) for number in numbers)
            text = " ".join(word.text for word in words)
            start, end = segment.start_ms, segment.end_ms
            return TextSegment(segment.index, start, end, text, "vad", words=words)

    policy = SegmentPolicy(window_seconds=12.0)
    transcript = replace(recognizer, decoding=Counter(), policy=policy).transcribe(noise(60))
    assert len(transcript.segments) > 4
    assert transcript.text == " ".join(f"n{number}" for number in range(125))
    for segment in transcript.segments:
        assert (segment.tokens, segment.timing) == ((), "vad")
        assert segment.text == " ".join(word.text for word in segment.words)


# Faults


def test_broken_and_missing_files_cost_themselves(
    recognizer: Recognizer,
    recordings: list[Path],
    alone: dict[Path, Transcript],
    tmp_path: Path,
) -> None:
    broken, empty, missing, short = (tmp_path / name for name in ("b.wav", "e.wav", "m", "s.wav"))
    broken.write_bytes(b"RIFF, or so it says" * 100)
    empty.touch()
    short.write_bytes(wav(noise(1)[:10]))
    paths = [broken, recordings[0], missing, recordings[1], empty, tmp_path, short, recordings[2]]

    results = dict(recognizer.transcribe_files(paths))

    assert results.keys() == set(paths)
    for path in recordings[:3]:
        assert heard(results[path]) == heard(alone[path])
    kinds = {broken: AudioError, empty: AudioError, missing: VanishedError, tmp_path: FileError}
    for path, kind in kinds.items():
        assert isinstance(results[path], kind)
        assert str(path) in str(results[path])
    assert isinstance(results[short], Transcript)
    assert results[short].source.duration == 10 / 16_000


@dataclass(frozen=True)
class FailsOn:
    """A model with a bug that one length of input meets."""

    decoding: ParaformerDecoding
    length: int

    def recognise(self, batch: Sequence[FloatArray]) -> BatchResult:
        if any(len(item) == self.length for item in batch):
            raise MemoryError("too much for this model")
        return self.decoding.recognise(batch)

    def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
        return self.decoding.text_segment(segment, recognition)


@pytest.mark.parametrize("batch_seconds", [1.0, 500.0])
def test_a_model_that_fails_costs_the_guilty_recording_only(
    recognizer: Recognizer,
    recordings: list[Path],
    alone: dict[Path, Transcript],
    tmp_path: Path,
    batch_seconds: float,
) -> None:
    guilty = tmp_path / "guilty.wav"
    guilty.write_bytes(wav(noise(4 + 3 + 0.55)))
    lengths = Lengths(recognizer.frontend)
    replace(recognizer, frontend=lengths).transcribe(guilty)
    others = Lengths(recognizer.frontend)
    for path in recordings:
        replace(recognizer, frontend=others).transcribe(path)
    [bad, *_] = set(lengths.seen) - set(others.seen)
    failing = replace(recognizer, decoding=FailsOn(recognizer.decoding, bad))

    jobs = [Job(path) for path in (*recordings[:3], guilty, *recordings[3:])]
    events = list(transcribe_jobs(jobs, failing, workers=2, batch_seconds=batch_seconds))

    endings = ends(events)
    assert Counter(type(ending) for ending in endings.values()) == {Finished: 7, Failed: 1}
    failure = endings[jobs[3]]
    assert isinstance(failure, Failed)
    assert isinstance(failure.error, RecognitionError)
    assert failure.stage == "encode"
    assert "too much for this model" in str(failure.error)
    assert [event for event in events if event.job is jobs[3]][-1] is failure
    for job, path in zip([*jobs[:3], *jobs[4:]], recordings, strict=True):
        assert heard(endings[job].transcript) == heard(alone[path])


class BuggyFrontEnd:
    def features(self, samples: FloatArray) -> FloatArray:
        raise ZeroDivisionError("division by zero")


def test_a_bug_in_a_reader_is_reported_and_not_swallowed(
    recognizer: Recognizer, recordings: list[Path]
) -> None:
    buggy = replace(recognizer, frontend=BuggyFrontEnd())
    [job] = jobs = [Job(recordings[0])]
    failure = ends(list(transcribe_jobs(jobs, buggy)))[job]
    assert isinstance(failure, Failed)
    assert "ZeroDivisionError: division by zero" in str(failure.error)
    assert str(recordings[0]) in str(failure.error)


class Detector:
    """A voice activity detector that takes everything for silence; `on_block` may be replaced."""

    def __init__(self) -> None:
        self.blocks = 0
        self.pending = 0

    def accept(self, block: FloatArray) -> list[Span]:
        self.blocks += 1
        self.pending += len(block)
        self.on_block()
        return []

    def finish(self) -> list[Span]:
        return []

    def on_block(self) -> None:
        pass


def test_a_file_that_changes_while_it_is_read_is_reported(
    recognizer: Recognizer, tmp_path: Path
) -> None:
    path = tmp_path / "growing.wav"
    path.write_bytes(wav(noise(2)))
    detector = Detector()
    detector.on_block = lambda: os.utime(path, ns=(1, 1))
    growing = replace(recognizer, new_vad=lambda: detector)
    [(_, result)] = growing.transcribe_files([path])
    assert isinstance(result, UnstableError)
    assert result.retry
    assert "growing.wav" in str(result)


def test_what_the_jobs_raise_is_raised(recognizer: Recognizer, recordings: list[Path]) -> None:
    def jobs() -> Iterator[Job]:
        yield Job(recordings[0])
        raise LookupError("the list is gone")

    with pytest.raises(LookupError, match="the list is gone"):
        list(transcribe_jobs(jobs(), recognizer, workers=2))


# Ending early


def test_a_stop_request_ends_the_run_and_keeps_what_is_finished(
    recognizer: Recognizer, recordings: list[Path]
) -> None:
    stop = StopRequest()
    jobs = [Job(path) for path in recordings * 5]
    events = []
    for event in transcribe_jobs(jobs, recognizer, stop=stop, batch_seconds=1):
        events.append(event)
        if isinstance(event, Finished):
            stop.set(15)
    finished = [event for event in events if isinstance(event, Finished)]
    assert 1 <= len(finished) < 5
    assert not any(isinstance(event, Failed) for event in events)


def test_a_stop_request_before_the_beginning_reads_nothing(
    recognizer: Recognizer, recordings: list[Path]
) -> None:
    stop = StopRequest()
    stop.set()
    jobs = [Job(path) for path in recordings]
    assert list(transcribe_jobs(jobs, recognizer, stop=stop)) == []


def test_a_stop_request_ends_the_reading_of_a_silent_recording(recognizer: Recognizer) -> None:
    """Hours of silence emit nothing by which a reader would notice."""
    stop = StopRequest()
    detector = Detector()
    detector.on_block = lambda: stop.set() if detector.blocks == 3 else None
    listening = replace(recognizer, new_vad=lambda: detector)
    jobs = [Job(np.zeros(60 * 16_000, np.float32))]
    events = list(transcribe_jobs(jobs, listening, stop=stop))
    assert all(isinstance(event, Started) for event in events)
    assert detector.blocks == 3


def test_an_iterator_that_is_closed_stops_reading(recognizer: Recognizer) -> None:
    detector = Detector()
    detector.on_block = lambda: time.sleep(0.01)
    listening = replace(recognizer, new_vad=lambda: detector)
    events = transcribe_jobs([Job(np.zeros(600 * 16_000, np.float32))], listening)
    assert isinstance(next(events), Started)
    events.close()
    assert detector.blocks < 600


# Memory


def test_readers_do_not_run_ahead_of_a_slow_consumer(recognizer: Recognizer) -> None:
    workers = 2
    counter = Lengths(recognizer.frontend)
    counting = replace(
        recognizer, frontend=counter, policy=SegmentPolicy(max_seconds=1.0, overlap_seconds=0.2)
    )
    samples = noise(40)
    jobs = [Job(samples), Job(samples)]
    events = transcribe_jobs(jobs, counting, workers=workers, batch_seconds=1)
    assert isinstance(next(events), Started)

    wait_until_steady(counter.seen)

    # The queue also holds that the second one was opened, and each reader has one clip in hand.
    assert READ_AHEAD - 1 <= len(counter.seen) <= READ_AHEAD + workers
    finished = ends(list(events))
    assert len(finished) == 2
    assert len(counter.seen) > 4 * READ_AHEAD


def wait_until_steady(growing: list[int]) -> None:
    """Until nothing has come for a while; too short a while can only make the test weaker."""
    size = -1
    while size != len(growing):
        size = len(growing)
        time.sleep(0.3)
