"""Audio in: any recording to mono float32 blocks at 16 kHz, in memory that does not grow with it.

    file -> container (audio_format) -> decoder (audio_decode) -> limits -> finite samples
         -> one channel (downmix) -> 16 kHz (soxr) -> blocks

What came out is compared with what the file declares, so that a recording that was cut, or that
its decoder gave up on, is never taken for a complete one: see `DecodeReport`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np

from funasr_batch.audio_decode import (
    AudioInfo,
    Block,
    Decoder,
    Faults,
    Track,
    open_decoder,
)
from funasr_batch.audio_format import Container, identify
from funasr_batch.downmix import WINDOW_SECONDS, Downmixer
from funasr_batch.errors import AudioError, UsageError, VanishedError
from funasr_batch.records import SAMPLE_RATE, FloatArray

__all__ = [
    "AudioInfo",
    "AudioLimits",
    "AudioStream",
    "DecodeReport",
    "Track",
    "open_audio",
    "probe",
]

BLOCK_SAMPLES = SAMPLE_RATE
"""Length of the blocks of an `AudioStream`; only the last one may be shorter."""
LOUDEST = 1e6
"""120 dB above full scale. Some programs write float samples as large as 16-bit integers, and those
are passed on; what is beyond this is no sound and becomes 0, as NaN and infinities do."""
SHORTFALL_SECONDS = 0.5
SHORTFALL_SHARE = 0.01
"""What may be missing before it is reported: the larger of the two. Encoders pad and trim."""

MonoBlock: TypeAlias = tuple[FloatArray, int]
"""Samples [n] and their rate."""


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """What a recording may be, checked before it is decoded and while it is."""

    max_seconds: float = 24 * 3600.0
    min_sample_rate: int = 4_000
    max_sample_rate: int = 768_000
    max_channels: int = 64
    max_decoded_bytes: int = 1 << 37
    """As float32, before the downmix: 24 hours of eight channels at 48 kHz."""


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What came out of a recording that was read to its end."""

    samples: int
    """At 16 kHz."""
    seconds: float
    declared_seconds: float | None
    shortfall_seconds: float
    """Audio that is missing at the end or was lost on the way, or 0 when it is not worth a word.
    Zeros stand in for what was lost on the way, so that the times after it are right."""
    damage: str | None
    """The decoder's first complaint and its time."""
    non_finite: int
    """Values that were NaN, infinite or absurdly large, and became 0."""
    downmix: str
    """`mono`, `mean`, `channel N` or `antiphase: channel N`, with N from 1."""

    @property
    def is_partial(self) -> bool:
        return self.shortfall_seconds > 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, one sentence each."""
        found = []
        if self.is_partial:
            whole = self.declared_seconds or self.seconds
            found.append(f"{self.shortfall_seconds:.1f} s of {whole:.1f} s of audio are missing")
        if self.damage is not None:
            found.append(f"the recording is damaged: {self.damage}")
        if self.non_finite:
            found.append(f"{self.non_finite} samples were not finite numbers and became 0")
        if self.downmix.startswith("antiphase"):
            found.append(f"its channels cancel each other ({self.downmix} was used)")
        return tuple(found)


def probe(path: Path) -> AudioInfo:
    """What a recording says about itself. Limits are not applied.

    Raises:
        AudioError: it cannot be opened or is not a recording.
        VanishedError: it does not exist.
    """
    with _opened(path, None) as (decoder, _):
        return decoder.info


def open_audio(
    path: Path,
    *,
    channel: int | None = None,
    track: int | str | None = None,
    limits: AudioLimits = AudioLimits(),
) -> AudioStream:
    """Opens a recording for reading; use the result in a `with` statement.

    Args:
        channel: take this channel, counted from 1, instead of mixing them.
        track: an audio track's number, counted from 0, or its language (`en`, `eng`).

    Raises:
        AudioError: it cannot be opened, is not a recording, has no such channel or track, or is
            over a limit.
        VanishedError: it does not exist.
        UsageError: `channel` is below 1.
    """
    if channel is not None and channel < 1:
        raise UsageError(f"channel {channel} does not exist", hint="Channels count from 1.")
    return AudioStream(path, channel, track, limits)


class AudioStream:
    """Iterates once over mono float32 blocks at 16 kHz of `BLOCK_SAMPLES` each.

    Iterating raises AudioError when a limit is passed, reading fails, or no sample comes out.
    """

    def __init__(
        self, path: Path, channel: int | None, track: int | str | None, limits: AudioLimits
    ) -> None:
        self._path = path
        self._channel = channel
        self._limits = limits
        self._mixer = Downmixer(channel)
        self._non_finite = 0
        self._report: DecodeReport | None = None
        with ExitStack() as stack:
            self._decoder, container = stack.enter_context(_opened(path, track))
            self.info = self._decoder.info
            self._check_format(self.info.channels, self.info.sample_rate)
            self._check_length()
            self._resources = stack.pop_all()
        self._faults = Faults(container.damage)
        self._blocks: Generator[FloatArray, None, None] = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[FloatArray]:
        return self._blocks

    def close(self) -> None:
        self._blocks.close()
        self._resources.close()

    @property
    def report(self) -> DecodeReport:
        """
        Raises:
            UsageError: the recording was not read to its end.
        """
        if self._report is None:
            raise UsageError(f"{self._path}: the report is known when all blocks have been read")
        return self._report

    def _read(self) -> Generator[FloatArray, None, None]:
        samples = 0
        with _errors_about(self._path):
            native = self._finite(self._within_limits(self._decoder.blocks(self._faults)))
            mixed = ((self._mixer.mix(*window), window.rate) for window in _windows(native))
            for block in _regrouped(_resampled(mixed)):
                samples += len(block)
                yield block
        if samples == 0:
            damage = self._faults.description
            raise AudioError(
                f"{self._path}: holds no audio" + (f" ({damage})" if damage else ""),
                hint="It may be empty, or damaged beyond reading.",
            )
        self._report = self._summary(samples)

    def _summary(self, samples: int) -> DecodeReport:
        seconds = samples / SAMPLE_RATE
        declared = self.info.declared_seconds
        whole = max(seconds, declared or 0.0)
        missing = whole - seconds + self._faults.lost_seconds
        tolerated = max(SHORTFALL_SECONDS, SHORTFALL_SHARE * whole)
        return DecodeReport(
            samples=samples,
            seconds=seconds,
            declared_seconds=declared,
            shortfall_seconds=missing if missing > tolerated else 0.0,
            damage=self._faults.description,
            non_finite=self._non_finite,
            downmix=self._mixer.description,
        )

    def _check_format(self, channels: int, rate: int) -> None:
        limits = self._limits
        if not limits.min_sample_rate <= rate <= limits.max_sample_rate:
            raise AudioError(
                f"{self._path}: a sample rate of {rate} Hz is outside "
                f"{limits.min_sample_rate} to {limits.max_sample_rate} Hz",
                hint="Its header may be damaged.",
            )
        if not 1 <= channels <= limits.max_channels:
            raise AudioError(
                f"{self._path}: {channels} channels are outside 1 to {limits.max_channels}",
                hint="Its header may be damaged.",
            )
        if self._channel is not None and self._channel > channels:
            raise AudioError(
                f"{self._path}: has no channel {self._channel}",
                hint=f"It has {channels}." if channels > 1 else "It has one channel only.",
            )

    def _check_length(self) -> None:
        seconds = self._decoder.playable_seconds
        if seconds is not None and seconds > self._limits.max_seconds:
            raise self._too_long(f"is {seconds / 3600:.1f} hours long")

    def _too_long(self, what: str) -> AudioError:
        hours = self._limits.max_seconds / 3600
        return AudioError(
            f"{self._path}: {what}, over the limit of {hours:g} hours",
            hint="Cut it into shorter recordings.",
        )

    def _within_limits(self, blocks: Iterable[Block]) -> Iterator[Block]:
        seconds, decoded = 0.0, 0
        for block in blocks:
            self._check_format(block.samples.shape[1], block.rate)
            seconds += len(block.samples) / block.rate
            decoded += block.samples.nbytes
            if seconds > self._limits.max_seconds:
                raise self._too_long("goes on for longer than it declares")
            if decoded > self._limits.max_decoded_bytes:
                raise AudioError(
                    f"{self._path}: decodes to more than {self._limits.max_decoded_bytes} bytes",
                    hint="Cut it into shorter recordings, or mix it down.",
                )
            yield block

    def _finite(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for samples, rate in blocks:
            usable = np.abs(samples) <= LOUDEST  # False for NaN
            if not usable.all():
                self._non_finite += int(usable.size - np.count_nonzero(usable))
                samples = np.where(usable, samples, np.float32(0))
            yield Block(samples, rate)


def _windows(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks of `WINDOW_SECONDS`, except before a change of rate or channels and at the end."""
    held: list[FloatArray] = []
    count = rate = channels = 0
    for samples, new_rate in blocks:
        if count and (new_rate, samples.shape[1]) != (rate, channels):
            yield Block(np.concatenate(held), rate)
            held, count = [], 0
        rate, channels = new_rate, samples.shape[1]
        size = round(rate * WINDOW_SECONDS)
        held.append(samples)
        count += len(samples)
        if count < size:
            continue
        together = np.concatenate(held)
        whole = count - count % size
        for start in range(0, whole, size):
            yield Block(together[start : start + size], rate)
        count -= whole
        held = [together[whole:]] if count else []
    if count:
        yield Block(np.concatenate(held), rate)


def _resampled(blocks: Iterable[MonoBlock]) -> Iterator[FloatArray]:
    """At 16 kHz with soxr's HQ setting; a stretch that is at 16 kHz already is left as it is.

    n samples become n * 16000 / rate, rounded, for each stretch of one rate.
    """
    resampler: Any = None
    current = SAMPLE_RATE
    for samples, rate in blocks:
        if rate != current:
            if resampler is not None:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            resampler, current = _resampler(rate), rate
        yield samples if resampler is None else resampler.resample_chunk(samples)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _resampler(rate: int) -> Any:
    if rate == SAMPLE_RATE:
        return None
    import soxr

    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def _regrouped(blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
    """Blocks of `BLOCK_SAMPLES`, which share no memory with any other; the last may be shorter."""
    block, filled = np.empty(BLOCK_SAMPLES, np.float32), 0
    for samples in blocks:
        start = 0
        while start < len(samples):
            count = min(BLOCK_SAMPLES - filled, len(samples) - start)
            block[filled : filled + count] = samples[start : start + count]
            filled, start = filled + count, start + count
            if filled == BLOCK_SAMPLES:
                yield block
                block, filled = np.empty(BLOCK_SAMPLES, np.float32), 0
    if filled:
        yield block[:filled]


# Opening, and what can go wrong with it


@contextmanager
def _opened(path: Path, track: int | str | None) -> Iterator[tuple[Decoder, Container]]:
    with _errors_about(path), _open(path) as file:
        container = identify(file, path)
        with closing(open_decoder(file, container, path, track)) as decoder:
            yield decoder, container


def _open(path: Path) -> BinaryIO:
    """Unbuffered, because the decoders share the file's position; without waiting for a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AudioError(f"{path}: is not a regular file", hint="Name a recording.")
    return open(descriptor, "rb", buffering=0)


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Turns the system's errors into ours. The decoders' are turned where they are called."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VanishedError(f"{path}: is not there any more") from error
    except PermissionError as error:
        raise AudioError(
            f"{path}: may not be read", hint="Check the permissions of the file and its folder."
        ) from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from error
