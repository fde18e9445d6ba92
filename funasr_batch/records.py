"""The data that crosses from one stage to the next, in the order in which it flows.

Audio positions are integer samples at 16 kHz until token times exist; from there on, times are
integer milliseconds from the start of the recording. Floats of seconds appear in JSON only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000
SAMPLES_PER_MS = SAMPLE_RATE // 1000
FRAME_MS = 60
"""Length of an encoder frame: six fbank frames of 10 ms."""
FRAME_SAMPLES = FRAME_MS * SAMPLES_PER_MS

FloatArray: TypeAlias = npt.NDArray[np.float32]
"""Any float32 array; mono audio in it is at 16 kHz with full scale 1.0."""

Timing: TypeAlias = Literal["cif", "ctc", "vad"]
"""Where a segment's times were measured: CIF peaks, CTC alignment, or only the VAD's cut."""

Status: TypeAlias = Literal["done", "done_with_warnings", "no_speech", "partial"]


@dataclass(frozen=True, slots=True)
class Source:
    """One recording to transcribe and the place of its outputs."""

    path: Path
    """Absolute path of the recording."""
    root: Path
    """The folder argument it was found under; its own folder when it was named directly."""
    relative: PurePath
    """`path` relative to `root`."""
    output: Path
    """Outputs are this path with `.srt`, `.json`, … appended."""
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch that a VAD takes for speech: samples [start, end) of the recording."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch to recognise in one piece: samples [start, end) of the recording."""

    index: int
    """Position among the recording's segments, from 0, in time order."""
    start: int
    end: int
    overlap: int = 0
    """Samples at its start that the segment before it holds too (only without a VAD)."""

    @property
    def start_ms(self) -> int:
        return self.start // SAMPLES_PER_MS

    @property
    def end_ms(self) -> int:
        return self.end // SAMPLES_PER_MS


@dataclass(frozen=True, slots=True)
class Clip:
    """A segment and its audio."""

    segment: Segment
    samples: FloatArray = field(repr=False)
    """float32 [lead + segment.end - segment.start + tail]"""
    lead: int = 0
    """Samples before the segment, for the encoder alone: a multiple of `FRAME_SAMPLES`."""
    tail: int = 0
    """Samples after the segment, for the encoder alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Excerpt:
    """Features of which the frames [first, after) are to be recognised; the encoder hears all."""

    features: FloatArray = field(repr=False)
    """float32 [L, 560]"""
    first: int
    after: int

    def __len__(self) -> int:
        """Frames that the encoder is given."""
        return len(self.features)


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a model says of one segment, before it becomes text.

    The three tuples have one entry for each token that was kept (no blank, `<s>`, `</s>`).
    """

    token_ids: tuple[int, ...]
    spans_ms: tuple[tuple[int, int], ...]
    """Start and end of each token, in milliseconds from the start of the segment."""
    confidences: tuple[float, ...]
    """The model's probability of each token, 0 to 1."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a model says of each segment of a batch, and where the time went."""

    recognitions: tuple[Any, ...]
    """One for each segment: what the model's own `text_segment` takes, with its `token_ids`."""
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Token:
    """A word (Latin script) or a character (Chinese), with its time and the model's confidence."""

    text: str
    start: int
    """Milliseconds from the start of the recording."""
    end: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Word:
    """A Latin word, a number or one Chinese character, with the punctuation that belongs to it."""

    text: str
    confidence: float
    """The model's probability of the least certain token that has a part in it, 0 to 1."""


@dataclass(frozen=True, slots=True)
class TextSegment:
    """The text of one segment."""

    id: int
    start: int
    """Milliseconds from the start of the recording."""
    end: int
    text: str
    timing: Timing
    tokens: tuple[Token, ...] = ()
    flags: tuple[str, ...] = ()
    """What a reader should know: `recut`, `truncated`, `loop`, `too_much_text`."""
    words: tuple[Word, ...] = ()
    """What was said, where only the segment's own times are known; otherwise `tokens` say it."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a recording once it has been decoded."""

    path: str
    sha256: str
    duration: float
    """Seconds of audio that were decoded."""
    sample_rate: int
    channels: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    revision: str | None
    weights_sha256: str
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """Everything that is kept of one recording; writers turn it into bytes."""

    source: SourceInfo
    model: ModelInfo
    settings_digest: str
    language: str
    segments: tuple[TextSegment, ...]
    status: Status
    warnings: tuple[str, ...] = ()
    stats: dict[str, float | int | dict[str, float]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The segments' texts, joined with a space unless both neighbours are Chinese."""
        from funasr_batch.text.tokens import join_texts

        return join_texts(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle: times in milliseconds and one or more lines without line breaks."""

    start: int
    end: int
    lines: tuple[str, ...]
