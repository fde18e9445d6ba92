"""Recognises one batch of segments with Fun-ASR-Nano: features in, words and their times out.

`encode` and `decode` are apart so that what the encoder made can be kept and decoded again with
other settings. Whatever the LLM does wrong costs at most the segment: one that runs into its token
budget, goes round in circles or says more than fits its time is cut in two and read again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import mlx.core as mx
import numpy as np

from funasr_batch.cpu import blas_threads
from funasr_batch.decoding.ctc_branch import CtcBranch, CtcReading
from funasr_batch.decoding.generate import Generated, Request, StretchPlanner, Tally, generate
from funasr_batch.decoding.lanes import padded, require_finite, rounds
from funasr_batch.decoding.sampling import Sampling
from funasr_batch.decoding.speculative import Draft, FirstOf, LookupDraft, SaidText, TextDraft
from funasr_batch.frontend import MEL_BINS
from funasr_batch.models.nano import FRAMES_PER_TOKEN, FunAsrNano, audio_tokens
from funasr_batch.records import (
    FRAME_MS,
    BatchResult,
    Excerpt,
    FloatArray,
    Segment,
    TextSegment,
    Timing,
    Token,
    Word,
)
from funasr_batch.text.align_texts import align_words, coverage
from funasr_batch.text.llm_tokenizer import LlmTokenizer
from funasr_batch.text.loops import find_loop, says_too_much
from funasr_batch.text.nano_words import Wording, wording
from funasr_batch.text.prompt import Prompt
from funasr_batch.text.tokens import join_texts, render_text

DraftSource: TypeAlias = Literal["ctc", "companion", "model", "lookup"]

MAX_NEW_TOKENS = 512
"""FunASR's `max_length`; 60 s of speech have fewer."""
SPARE_TOKENS, TOKENS_PER_SECOND = 16, 16.0
"""The budget of a segment. Mandarin has 4 to 6 tokens a second, English 3 to 5; scripts that the
BPE knows as bytes have some 15."""

MOST_SAID = 20_000
"""Tokens that are kept to draft from: more than an hour of speech."""

RECUTS = 2
"""How often a segment is halved at most."""
LEAST_RECUT_FRAMES = 50
"""3 s: what is shorter is not cut any more."""

SILENCE = 13.0
"""`loudness` below which nobody speaks: recordings of speech, made so quiet that their loudest
100 ms are at -60 dBFS, lie between 13 and 19; the noise of a 16-bit converter is at 10, digital
silence at -12."""

LEAST_COVERAGE = 0.5
"""With fewer letters than this found in the other reading, its times are not believed."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSegment:
    """A segment after the encoder: what an encoder cache holds, and the features it came from."""

    features: FloatArray = field(repr=False)
    """float32 [L, 560]"""
    memory: mx.array = field(repr=False)
    """[L, D], the encoder's output."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, slots=True)
class NanoRecognition:
    """What Nano says of one segment. Times count from the start of the segment."""

    text: str
    words: tuple[Word, ...]
    """All words with their confidence."""
    tokens: tuple[Token, ...]
    """The words with their times; empty where these were not measured."""
    timing: Timing
    flags: tuple[str, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Companion:
    """Another recogniser that reads the same segments: for the times of words, and for drafts."""

    read: Callable[[Sequence[FloatArray]], list[tuple[Token, ...]]]
    """From Nano's features of a batch to tokens whose times count from the segment's start."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A segment, or a part of one that was cut."""

    segment: int
    """Which one of the batch."""
    first_frame: int
    encoded: EncodedSegment
    cuts: int = 0
    """How often it was halved."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A piece with what was read in it."""

    piece: _Piece
    generated: Generated
    wording: Wording
    faults: tuple[str, ...]
    ctc: CtcReading | None
    companion: tuple[Token, ...] | None


@dataclass(slots=True)
class DecodingTally:
    """What decoding has cost since the start, for benchmarks and reports."""

    generate: Tally = field(default_factory=Tally)
    segments: int = 0
    recut: int = 0
    said: SaidText = field(default_factory=SaidText)
    """The texts of late, to draft from."""


@dataclass(frozen=True, slots=True)
class NanoDecoding:
    """What decoding needs besides the batch."""

    model: FunAsrNano
    tokenizer: LlmTokenizer
    prompt: Prompt
    stops: frozenset[int]
    sampling: Sampling
    rows: int
    """Segments whose texts are written at the same time."""
    drafts: frozenset[DraftSource]
    planner: StretchPlanner
    """Decides whether drafts are worth their time."""
    guard_silence: bool = False
    """Whether segments may be silent: the LLM, which would invent a text, does not see those."""
    plain_features: bool = True
    """Whether features are log energies as they are: with CMVN nobody knows how loud they were."""
    ctc: CtcBranch | None = None
    companion: Companion | None = None
    draft_model: NanoDecoding | None = None
    streams: tuple[mx.ThreadLocalStream, ...] = ()
    """Where segments are encoded side by side. With none, a batch is padded and goes as one."""
    tally: DecodingTally = field(default_factory=DecodingTally)

    def recognise(self, batch: Sequence[FloatArray | Excerpt]) -> BatchResult:
        """Recognises features, each float32 [L_i, 560]; any order, any lengths of at least 1.

        Of an excerpt only its own frames are read; those around them are for the encoder.

        Raises RecognitionError when the network's numbers are not finite.
        """
        started = time.perf_counter()
        encoded = self.encode(batch)
        middle = time.perf_counter()
        recognitions = self.decode(encoded)
        return BatchResult(recognitions, middle - started, time.perf_counter() - middle)

    def text_segment(self, segment: Segment, recognition: NanoRecognition) -> TextSegment:
        """The words and their times in the recording."""
        shift, last = segment.start_ms, segment.end_ms  # the last frame may reach beyond the end
        tokens = (
            replace(token, start=min(token.start + shift, last), end=min(token.end + shift, last))
            for token in recognition.tokens
        )
        return TextSegment(
            id=segment.index,
            start=segment.start_ms,
            end=segment.end_ms,
            text=recognition.text,
            timing=recognition.timing,
            tokens=tuple(tokens),
            words=() if recognition.tokens else recognition.words,
            flags=recognition.flags,
        )

    # --- The encoder

    def encode(self, batch: Sequence[FloatArray | Excerpt]) -> tuple[EncodedSegment, ...]:
        """Runs the encoder; what it gives can be kept and handed to `decode` at any time.

        An excerpt gives a segment of its own frames alone.
        """
        excerpts = [item if isinstance(item, Excerpt) else _whole(item) for item in batch]
        encoded: list[EncodedSegment | None] = [None] * len(excerpts)
        for lanes in rounds(excerpts, self.streams):
            with blas_threads(1) if len(lanes) > 1 else nullcontext():
                memories = []
                for lane in lanes:
                    features, lengths = padded([excerpts[n].features for n in lane.places])
                    with mx.stream(lane.stream):
                        uneven = lengths.min() < lengths.max()
                        limits = mx.array(lengths) if uneven else None
                        memories.append(self.model.encode(mx.array(features), limits))
                mx.eval(memories)
                for lane, memory in zip(lanes, memories, strict=True):
                    for row, place in enumerate(lane.places):
                        own = slice(excerpts[place].first, excerpts[place].after)
                        encoded[place] = EncodedSegment(
                            excerpts[place].features[own], memory[row, own]
                        )
        return tuple(one for one in encoded if one is not None)

    # --- The LLM

    def decode(self, encoded: Sequence[EncodedSegment]) -> tuple[NanoRecognition, ...]:
        """Reads segments that are encoded; one result for each, in their order."""
        finished: list[_Read] = []
        pieces = [_Piece(number, 0, one) for number, one in enumerate(encoded)]
        self.tally.segments += len(pieces)
        while pieces:
            again: list[_Piece] = []
            for read in self._read(pieces):
                halves = self._halves(read.piece) if read.faults else None
                if halves is None:
                    finished.append(read)
                else:
                    again += halves
            self.tally.recut += len(again) // 2
            pieces = self._encoded_again(again)
        finished.sort(key=lambda read: (read.piece.segment, read.piece.first_frame))
        of_segment: list[list[_Read]] = [[] for _ in encoded]
        for read in finished:
            of_segment[read.piece.segment].append(read)
        return tuple(map(self._recognition, of_segment))

    def _encoded_again(self, pieces: Sequence[_Piece]) -> list[_Piece]:
        encoded = self.encode([piece.encoded.features for piece in pieces]) if pieces else ()
        return [replace(p, encoded=one) for p, one in zip(pieces, encoded, strict=True)]

    def _read(self, pieces: Sequence[_Piece]) -> list[_Read]:
        ctc, audio = self._audio_and_ctc(pieces)
        spoken: Sequence[tuple[Token, ...] | None] = [None] * len(pieces)
        if self.companion is not None:
            spoken = self.companion.read([piece.encoded.features for piece in pieces])
        guesses = [
            self._reading(reading, tokens) for reading, tokens in zip(ctc, spoken, strict=True)
        ]
        if "model" in self.drafts and self.draft_model is not None:
            batch = [piece.encoded.features for piece in pieces]
            guesses = [r.text for r in self.draft_model.recognise(batch).recognitions]
        prefix, suffix = (
            self.model.llm.embed(mx.array(ids)) for ids in (self.prompt.prefix, self.prompt.suffix)
        )
        requests = [
            Request(
                mx.concatenate([prefix, rows.astype(prefix.dtype), suffix]),
                token_budget(len(piece.encoded)),
                self._draft(guess),
            )
            for piece, rows, guess in zip(pieces, audio, guesses, strict=True)
        ]
        drafted = any(request.draft is not None for request in requests)
        silent = [self._is_silent(*parts) for parts in zip(pieces, ctc, strict=True)]
        answers, tally = generate(
            self.model.llm,
            [request for request, skipped in zip(requests, silent, strict=True) if not skipped],
            stops=self.stops,
            rows=self.rows,
            sampling=self.sampling,
            planner=self.planner if drafted else None,
        )
        _add(self.tally.generate, tally)
        if "lookup" in self.drafts:
            self._remember(answers)
        answered = iter(answers)
        texts = [_NOTHING if skipped else next(answered) for skipped in silent]
        return [self._judged(*parts) for parts in zip(pieces, texts, ctc, spoken, strict=True)]

    def _remember(self, answers: Sequence[Generated]) -> None:
        if len(self.tally.said) > MOST_SAID:
            self.tally.said = SaidText()
        for answer in answers:
            self.tally.said.add(answer.ids)

    def _audio_and_ctc(
        self, pieces: Sequence[_Piece]
    ) -> tuple[list[CtcReading | None], list[mx.array]]:
        """Each piece's CTC reading, where there is a CTC head, and its audio tokens [A, H]."""
        ctc: list[CtcReading | None] = [None] * len(pieces)
        audio: list[mx.array] = [mx.zeros(0)] * len(pieces)
        memories = [piece.encoded.memory for piece in pieces]
        for lanes in rounds(memories, self.streams):
            for lane in lanes:
                lengths = np.array([len(memories[place]) for place in lane.places], np.int32)
                memory = _stacked([memories[place] for place in lane.places])
                uneven = lengths.min() < lengths.max()
                limits = mx.array(lengths) if uneven else None
                adapted = self.model.adapt(memory, limits)
                mx.eval(adapted)
                require_finite(np.array(adapted[:, 0].astype(mx.float32)))
                for row, place in enumerate(lane.places):
                    audio[place] = adapted[row, : audio_tokens(int(lengths[row]))]
                if self.ctc is not None:
                    readings = self.ctc.read(memory, lengths, limits)
                    for place, reading in zip(lane.places, readings, strict=True):
                        ctc[place] = reading
        return ctc, audio

    def _is_silent(self, piece: _Piece, ctc: CtcReading | None) -> bool:
        """Whether nobody speaks in a piece, so that the LLM had nothing but inventions to write."""
        if not self.guard_silence:
            return False
        if ctc is not None and not any(map(str.isalnum, ctc.text)):
            return True
        return self.plain_features and loudness(piece.encoded.features) < SILENCE

    def _reading(self, ctc: CtcReading | None, companion: tuple[Token, ...] | None) -> str | None:
        """Another reading of a piece to draft from."""
        if "ctc" in self.drafts and ctc is not None:
            return ctc.text
        if "companion" in self.drafts and companion is not None:
            return render_text(companion)
        return None

    def _draft(self, reading: str | None) -> Draft | None:
        sources: list[Draft] = []
        if reading is not None:
            sources.append(TextDraft(reading, self.tokenizer))
        if "lookup" in self.drafts:
            sources.append(LookupDraft(self.tally.said))
        return FirstOf(tuple(sources)) if sources else None

    def _judged(
        self,
        piece: _Piece,
        generated: Generated,
        ctc: CtcReading | None,
        companion: tuple[Token, ...] | None,
    ) -> _Read:
        said = wording(
            [self.tokenizer.token_bytes(id) for id in generated.ids],
            [round(float(np.exp(log_prob)), 4) for log_prob in generated.log_probs],
        )
        faults = []
        if not generated.ended:
            faults.append("truncated")
        if find_loop(said.text) is not None:
            faults.append("loop")
        if says_too_much(said.text, len(piece.encoded) * FRAME_MS / 1000):
            faults.append("too_much_text")
        return _Read(piece, generated, said, tuple(faults), ctc, companion)

    # --- Repair

    def _halves(self, piece: _Piece) -> tuple[_Piece, _Piece] | None:
        """The piece cut at its quietest frame near the middle; None when it is too short."""
        features = piece.encoded.features
        length = len(features)
        if piece.cuts >= RECUTS or length < LEAST_RECUT_FRAMES:
            return None
        third = length // 3
        loudness = features.mean(axis=1)
        cut = third + int(np.argmin(loudness[third : length - third]))
        return tuple(  # type: ignore[return-value]
            _Piece(
                piece.segment,
                piece.first_frame + first,
                EncodedSegment(features[first:after], piece.encoded.memory[first:after]),
                piece.cuts + 1,
            )
            for first, after in ((0, cut), (cut, length))
        )

    # --- Words and times

    def _recognition(self, reads: Sequence[_Read]) -> NanoRecognition:
        parts = [self._timed(read) for read in reads]
        flags = dict.fromkeys(flag for part in parts for flag in part.flags)
        if len(parts) > 1:
            flags = {"recut": None, **flags}
        timings = {part.timing for part in parts if part.words}
        measured = timings <= {"ctc"} or timings <= {"cif"}
        return NanoRecognition(
            text=join_texts([part.text for part in parts]),
            words=tuple(word for part in parts for word in part.words),
            tokens=tuple(t for part in parts for t in part.tokens) if measured else (),
            timing=timings.pop() if measured and timings else "vad",
            flags=tuple(flags),
            token_ids=tuple(id for part in parts for id in part.token_ids),
        )

    def _timed(self, read: _Read) -> NanoRecognition:
        said = _without_loop(read.wording) if "loop" in read.faults else read.wording
        start = read.piece.first_frame * FRAME_MS
        end = start + len(read.piece.encoded) * FRAME_MS
        tokens: tuple[Token, ...] | None = None
        timing: Timing = "vad"
        if self.ctc is not None and read.ctc is not None:
            timing = "ctc"
            tokens = self.ctc.timed(said, read.ctc, start, end)
        elif read.companion is not None:
            timing = "cif"
            heard = [
                replace(token, start=token.start + start, end=token.end + start)
                for token in read.companion
            ]
            if coverage(said.words, heard) >= LEAST_COVERAGE:
                tokens = align_words(said.words, heard, start, end)
        return NanoRecognition(
            text=said.text,
            words=said.words,
            tokens=tokens or (),
            timing=timing if tokens else "vad",
            flags=read.faults,
            token_ids=read.generated.ids,
        )


def _whole(features: FloatArray) -> Excerpt:
    return Excerpt(features, 0, len(features))


_NOTHING = Generated(ids=(), log_probs=(), ended=True)
"""What the LLM writes of a silent segment, which it is not asked about."""


def loudness(features: FloatArray) -> float:
    """How loud the loudest frame of float32 [L, 560] is: the logarithm of its mel energies' sum.

    A frame is 85 ms of audio at int16 scale, whose filter bank is taken after pre-emphasis.
    """
    energies = np.exp(features).reshape(len(features), -1, MEL_BINS)
    return float(np.log(energies.sum(axis=2).mean(axis=1).max()))


def token_budget(frames: int) -> int:
    """How many tokens a segment of so many frames may have."""
    seconds = frames * FRAME_MS / 1000
    return min(MAX_NEW_TOKENS, SPARE_TOKENS + int(TOKENS_PER_SECOND * seconds))


def longest_prompt(prompt: Prompt, frames: int) -> int:
    """Positions of the LLM that a segment of so many frames may take."""
    around = len(prompt.prefix) + len(prompt.suffix)
    return around + -(-frames // FRAMES_PER_TOKEN) + token_budget(frames)


def _without_loop(said: Wording) -> Wording:
    """The words up to the end of the loop's second round; the rest was never said."""
    loop = find_loop(said.text)
    if loop is None:
        return said
    kept: list[Word] = []
    place = 0
    for word in said.words:
        place = said.text.index(word.text, place) + len(word.text)
        if place > loop.cut:
            break
        kept.append(word)
    return Wording(said.text[: loop.cut].rstrip(), tuple(kept))


def _stacked(memories: Sequence[mx.array]) -> mx.array:
    """Memories [L_i, D], zero past their lengths: [B, L, D]."""
    longest = max(map(len, memories))
    return mx.stack([mx.pad(one, [(0, longest - len(one)), (0, 0)]) for one in memories])


def _add(total: Tally, more: Tally) -> None:
    total.prefill_seconds += more.prefill_seconds
    total.generate_seconds += more.generate_seconds
    total.passes += more.passes
    total.row_passes += more.row_passes
    total.tokens += more.tokens
    total.drafted += more.drafted
    total.accepted += more.accepted
