"""A loaded model with all that leads from audio to text: cutting, features, decoding, wording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from funasr_batch.errors import FileError
from funasr_batch.frontend import FrontEnd
from funasr_batch.records import (
    FRAME_SAMPLES,
    BatchResult,
    Clip,
    Excerpt,
    FloatArray,
    ModelInfo,
    Segment,
    TextSegment,
    Transcript,
)
from funasr_batch.segments import ContextCutter, Segmenter, SegmentPolicy, WindowCutter
from funasr_batch.settings import Settings

if TYPE_CHECKING:
    from funasr_batch.vad import VoiceActivityStream


class Cutter(Protocol):
    """Cuts one recording's blocks into clips; see `segments`."""

    def accept(self, block: FloatArray) -> list[Clip]: ...
    def finish(self) -> list[Clip]: ...


class Decoding(Protocol):
    """A loaded network with its way of reading a batch; see `decoding`."""

    def recognise(self, batch: Sequence[Any]) -> BatchResult:
        """Features of each segment: float32 [L, 560], or, for Nano alone, an `Excerpt`."""

    def text_segment(self, segment: Segment, recognition: Any) -> TextSegment: ...


@dataclass(frozen=True, slots=True)
class Recognizer:
    """What turns audio into segments of text. Safe to share between threads except `recognise`."""

    info: ModelInfo
    device: str
    dtype: str
    frontend: FrontEnd = field(repr=False)
    policy: SegmentPolicy = field(repr=False)
    new_vad: Callable[[], VoiceActivityStream] | None = field(repr=False)
    """Makes the VAD of one recording; None where it is cut without one."""
    decoding: Decoding = field(repr=False)
    settings: Settings = field(repr=False)
    decode_stage: Literal["predict/decode", "prefill/generate"] = "predict/decode"
    """What the second half of the model's time is called in statistics."""
    warnings: tuple[str, ...] = ()
    """What the user should know about how the model runs here."""

    def cutter(self) -> Cutter:
        """A fresh cutter for one recording."""
        if self.settings.stream_encoder:
            return ContextCutter(self.policy)
        if self.new_vad is None:
            return WindowCutter(self.policy)
        return Segmenter(self.policy, self.new_vad())

    @property
    def windows_overlap(self) -> bool:
        """Whether what neighbouring segments share is recognised twice."""
        return self.new_vad is None and not self.settings.stream_encoder

    def features(self, clip: Clip) -> FloatArray | Excerpt:
        """float32 [L, 560] of a clip; an excerpt of them where the clip has audio around it."""
        features = self.frontend.features(clip.samples)
        if not (clip.lead or clip.tail):
            return features
        first = clip.lead // FRAME_SAMPLES
        frames = -(-(clip.segment.end - clip.segment.start) // FRAME_SAMPLES)
        return Excerpt(features, first, min(first + frames, len(features)))

    def recognise(self, batch: Sequence[FloatArray | Excerpt]) -> BatchResult:
        """Recognises the features of a batch of clips; to be called from one thread only."""
        return self.decoding.recognise(batch)

    def text_segment(self, segment: Segment, recognition: Any) -> TextSegment:
        """Words, characters and their times in the recording."""
        return self.decoding.text_segment(segment, recognition)

    def transcribe(self, audio: str | Path | FloatArray) -> Transcript:
        """Transcribes one recording: a path, or mono float32 samples at 16 kHz in [-1, 1].

        Raises FileError (AudioError, VanishedError, …) when the recording is at fault.
        """
        from funasr_batch.run.engine import transcribe_array, transcribe_paths

        if isinstance(audio, np.ndarray):
            return transcribe_array(audio, self)
        [(_, result)] = transcribe_paths([Path(audio)], self)
        if isinstance(result, FileError):
            raise result
        return result

    def transcribe_files(
        self, paths: Iterable[str | Path]
    ) -> Iterator[tuple[Path, Transcript | FileError]]:
        """Transcribes recordings in batches across files; yields each as it is finished.

        A recording that fails is yielded with its error instead of a transcript.
        """
        from funasr_batch.run.engine import transcribe_paths

        return transcribe_paths([Path(path) for path in paths], self)
