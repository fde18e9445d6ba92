"""The two decoders: an open file to blocks of float32 at the rate and channels it was made with.

`SoundfileDecoder` (libsndfile) and `PyavDecoder` (FFmpeg) have the same surface, `Decoder`. Their
blocks follow each other without gaps in the recording's own time: a track that starts late, or has
a hole in its timestamps, is filled up with zeros. What was wrong goes into `Faults`.

Both are given an open file, never a name, so that no name can mean anything to them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
import soundfile

from funasr_batch.audio_format import Container
from funasr_batch.errors import AudioError
from funasr_batch.records import FloatArray

GAP_SECONDS = 0.02
"""Timestamps may be off by this much before zeros are put in or samples left out."""
LONGEST_GAP_SECONDS = 600.0
"""A longer hole is a clock that jumped, unless the declared length has room for it."""
LONGEST_OVERLAP_SECONDS = 1.0
"""A longer step back is a clock that was set anew (recordings joined end to end)."""
MAX_BLOCK_VALUES = 1 << 20
"""Samples times channels of a block: at most 4 MiB."""
MAX_FAULTS_IN_A_ROW = 10_000
"""Packets that fail one after the other before the rest is given up."""


@dataclass(frozen=True, slots=True)
class Track:
    """One audio track of a recording."""

    index: int
    """Position among the audio tracks, from 0."""
    codec: str
    language: str | None
    """As the file has it, usually three letters of ISO 639-2."""
    channels: int
    title: str | None


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a recording says about the track that is read, before it is decoded."""

    decoder: Literal["soundfile", "pyav"]
    container: str
    codec: str
    sample_rate: int
    channels: int
    declared_seconds: float | None
    """The length written in the file, `start_offset` included; None when it has none."""
    start_offset: float
    """Seconds by which the track starts after the recording does."""
    tracks: tuple[Track, ...]


class Block(NamedTuple):
    samples: FloatArray
    """float32 [n, channels], full scale 1.0"""
    rate: int


class Faults:
    """What a decoder complained about, and how much audio it lost on the way."""

    def __init__(self, known: str | None) -> None:
        self._known = known
        self._first: str | None = None
        self._count = 0
        self.lost_seconds = 0.0

    def note(self, seconds: float, complaint: str) -> None:
        if self._first is None:
            self._first = f"at {seconds:.2f} s: {complaint}"
        self._count += 1

    @property
    def description(self) -> str | None:
        more = f" (and {self._count - 1} more)" if self._count > 1 else ""
        parts = [self._known, self._first and self._first + more]
        return "; ".join(part for part in parts if part) or None


class Decoder(Protocol):
    info: AudioInfo
    playable_seconds: float | None
    """At most this much can come out, as far as the header tells."""

    def blocks(self, faults: Faults) -> Iterator[Block]: ...

    def close(self) -> None: ...


def open_decoder(
    file: BinaryIO, container: Container, path: Path, track: int | str | None
) -> Decoder:
    """
    Raises:
        AudioError: the file is not what its first bytes promise, or has no such track.
    """
    file.seek(0)
    if container.demuxer is None:
        return SoundfileDecoder(file, container, path, track)
    return PyavDecoder(file, container, path, track)


class SoundfileDecoder:
    def __init__(
        self, file: BinaryIO, container: Container, path: Path, track: int | str | None
    ) -> None:
        try:
            sound = soundfile.SoundFile(file.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            raise _undecodable(path, error) from error
        self._sound = sound
        codec = sound.subtype.lower()
        tracks = (Track(0, codec, None, sound.channels, None),)
        choose_track(tracks, track, path)
        self.playable_seconds = sound.frames / max(1, sound.samplerate)
        declared = container.declared_seconds
        self.info = AudioInfo(
            decoder="soundfile",
            container=sound.format.lower(),
            codec=codec,
            sample_rate=sound.samplerate,
            channels=sound.channels,
            declared_seconds=declared if container.name == "wav" else self.playable_seconds,
            start_offset=0.0,
            tracks=tracks,
        )

    def blocks(self, faults: Faults) -> Iterator[Block]:
        rate = self._sound.samplerate
        count = max(1, min(rate, MAX_BLOCK_VALUES // self._sound.channels))
        done = 0
        while True:
            try:
                samples = self._sound.read(count, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                faults.note(done / rate, _complaint(error))
                return
            if not len(samples):
                return
            done += len(samples)
            yield Block(samples, rate)

    def close(self) -> None:
        self._sound.close()


class PyavDecoder:
    def __init__(
        self, file: BinaryIO, container: Container, path: Path, track: int | str | None
    ) -> None:
        import av

        try:
            self._input: Any = av.open(
                _Seekable(file),
                format=container.demuxer,
                metadata_errors="replace",
                buffer_size=1 << 16,
            )
        except av.FFmpegError as error:
            raise _undecodable(path, error) from error
        try:
            self._stream = self._choose(path, track)
            self.info = self._describe(container)
        except BaseException:
            self._input.close()
            raise
        self._counts_samples = container.counts_samples
        self._position = 0.0
        self._origin: float | None = None
        self._lost = False

    def close(self) -> None:
        self._input.close()

    def _choose(self, path: Path, track: int | str | None) -> Any:
        streams = self._input.streams.audio
        self._tracks = tuple(_track(index, stream) for index, stream in enumerate(streams))
        stream = streams[choose_track(self._tracks, track, path)]
        if stream.codec_context is None:
            raise AudioError(
                f"{path}: FFmpeg has no decoder for its audio",
                hint="Convert it to WAV or FLAC with the program that made it.",
            )
        for other in self._input.streams:
            if other.index != stream.index and hasattr(other, "discard"):  # PyAV 18
                other.discard = type(other.discard).all
        if stream.codec_context.name == "flac":
            # Without this a damaged frame comes out as noise.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        return stream

    def _describe(self, container: Container) -> AudioInfo:
        stream, context = self._stream, self._stream.codec_context
        offset = 0.0
        if stream.start_time is not None and self._input.start_time is not None:
            offset = float(stream.start_time * stream.time_base) - self._input.start_time / 1e6
        offset = offset if offset > GAP_SECONDS else 0.0
        declared = container.declared_seconds
        if container.states_length:
            declared = self._declared_seconds(offset)
        self.playable_seconds = declared
        if container.last_granule is not None:
            clock = 48_000 if stream.codec.canonical_name == "opus" else max(1, context.sample_rate)
            start = float((stream.start_time or 0) * stream.time_base)
            declared = max(declared or 0.0, container.last_granule / clock - start)
        return AudioInfo(
            decoder="pyav",
            container=container.name,
            codec=stream.codec.canonical_name,
            sample_rate=context.sample_rate,
            channels=context.channels,
            declared_seconds=declared,
            start_offset=offset,
            tracks=self._tracks,
        )

    def _declared_seconds(self, offset: float) -> float | None:
        """Of this track: the container's length is that of its longest, which may be a video."""
        stream = self._stream
        if stream.duration is not None:
            return offset + float(stream.duration * stream.time_base)
        # Matroska and FLV count from 0, not from the first timestamp.
        start = max(0, self._input.start_time or 0) / 1e6
        end = _clock_seconds(stream.metadata.get("DURATION", ""))
        if end is None and len(self._input.streams) == 1 and self._input.duration is not None:
            end = self._input.duration / 1e6
        return end - start if end is not None and end > start else None

    def blocks(self, faults: Faults) -> Iterator[Block]:
        for frame in self._frames(faults):
            samples = _samples(frame)
            for block in self._place(frame, samples, faults):
                self._position += len(block.samples) / block.rate
                yield block

    def _frames(self, faults: Faults) -> Iterator[Any]:
        import av

        failures = 0
        for packet in self._packets(faults):
            try:
                frames = self._stream.decode(packet)
            except av.FFmpegError as error:
                if packet is None:
                    return
                self._lost = True
                faults.note(self._seconds(packet), _complaint(error))
                failures += 1
                if failures >= MAX_FAULTS_IN_A_ROW:
                    return
                continue
            if frames:
                failures = 0
            yield from frames

    def _packets(self, faults: Faults) -> Iterator[Any]:
        """The track's packets, and None, which makes a decoder give out what it still holds."""
        import av

        failures = 0
        packets = self._input.demux(self._stream)
        while failures < MAX_FAULTS_IN_A_ROW:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._lost = True
                faults.note(self._position, _complaint(error))
                failures += 1
                packets = self._input.demux(self._stream)
                continue
            except IndexError:  # PyAV at the end, when FFmpeg found more streams on the way
                break
            if packet is None:
                break
            failures = 0
            if packet.size > 0:  # PyAV's mark of the end is empty, and so are some damaged ones
                yield packet
        yield None

    def _seconds(self, packet: Any) -> float:
        if packet.pts is None:
            return self._position
        return float(packet.pts * packet.time_base) - (self._origin or 0.0)

    def _place(self, frame: Any, samples: FloatArray, faults: Faults) -> Iterator[Block]:
        """The frame at its time: after zeros when it is late, shortened when it overlaps."""
        rate = frame.sample_rate
        drift = 0.0
        # A count of samples is no time any more once their rate has changed.
        timeless = self._counts_samples and rate != self.info.sample_rate
        if frame.pts is not None and not timeless:
            drift = self._drift(float(frame.pts * frame.time_base), faults)
        if drift > 0:
            is_hole = self._counts_samples and self._position > 0
            if is_hole and not self._lost:
                faults.note(self._position, f"{drift:.2f} s of audio are missing")
            if is_hole or self._lost:
                faults.lost_seconds += drift
            yield from _silence(round(drift * rate), samples.shape[1], rate)
        elif drift < 0:
            samples = samples[round(-drift * rate) :]
        self._lost = False
        if len(samples):
            yield Block(samples, rate)

    def _drift(self, time: float, faults: Faults) -> float:
        """How late a timestamp is against the samples before it; 0 within the tolerance."""
        if self._origin is None:
            start = self._input.start_time
            self._origin = time if start is None else start / 1e6
            if time <= self._origin + GAP_SECONDS:
                self._origin = time
        drift = time - self._origin - self._position
        if abs(drift) <= GAP_SECONDS:
            return 0.0
        room = LONGEST_GAP_SECONDS
        if self.info.declared_seconds is not None:
            room = max(room, self.info.declared_seconds - self._position)
        if -LONGEST_OVERLAP_SECONDS <= drift <= room:
            return drift
        if self._position > 0 and drift > 0:
            faults.note(self._position, f"timestamps jump by {drift:.1f} s")
        self._origin = time - self._position
        return 0.0


class _Seekable:
    """A file for FFmpeg, to which a damaged header may give offsets that no file has: they are
    refused as FFmpeg expects it, where PyAV would print a traceback for each."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.tell = file.tell
        self._seek = file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, OverflowError):
            return -errno.EINVAL


def _silence(count: int, channels: int, rate: int) -> Iterator[Block]:
    step = max(1, min(rate, MAX_BLOCK_VALUES // channels))
    for start in range(0, count, step):
        yield Block(np.zeros((min(step, count - start), channels), np.float32), rate)


def _samples(frame: Any) -> FloatArray:
    """A PyAV frame -> float32 [n, channels]."""
    if frame.format.name.startswith("s64"):  # the one that PyAV does not convert
        count = frame.samples * (1 if frame.format.is_planar else frame.layout.nb_channels)
        raw = np.stack([np.frombuffer(plane, np.int64, count) for plane in frame.planes])
    else:
        raw = frame.to_ndarray()
    if frame.format.is_planar:
        raw = raw.T
    else:
        raw = raw.reshape(-1, frame.layout.nb_channels)
    samples: FloatArray = raw.astype(np.float32)
    if raw.dtype == np.uint8:
        samples /= 128
        samples -= 1
    elif raw.dtype.kind == "i":
        samples *= np.float32(2.0 ** (1 - 8 * raw.dtype.itemsize))
    return samples


def _clock_seconds(text: str) -> float | None:
    """`00:00:12.564000000` -> 12.564"""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _track(index: int, stream: Any) -> Track:
    context = stream.codec_context
    return Track(
        index=index,
        codec="unknown" if context is None else stream.codec.canonical_name,
        language=stream.metadata.get("language"),
        channels=0 if context is None else context.channels,
        title=stream.metadata.get("title"),
    )


def _undecodable(path: Path, error: Exception) -> AudioError:
    return AudioError(
        f"{path}: cannot be decoded: {_complaint(error)}",
        hint="It is damaged, or it is not a recording.",
    )


def _complaint(error: Exception) -> str:
    """What a decoder says, without file name and numbers."""
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).rstrip(".")
    return str(getattr(error, "strerror", None) or error).rstrip(".")


# The choice of a track


_LANGUAGES = (
    "ar:ara bg:bul ca:cat cs:ces:cze da:dan de:deu:ger el:ell:gre en:eng es:spa et:est fa:fas:per "
    "fi:fin fr:fra:fre he:heb hi:hin hr:hrv hu:hun id:ind it:ita ja:jpn ko:kor lt:lit lv:lav "
    "ms:msa:may nb:nob nl:nld:dut no:nor pl:pol pt:por ro:ron:rum ru:rus sk:slk:slo sl:slv sr:srp "
    "sv:swe ta:tam th:tha tl:tgl tr:tur uk:ukr ur:urd vi:vie yue:zh-yue zh:zho:chi:cmn"
)
"""ISO 639-1 codes, each with its ISO 639-2 codes."""
_SHORT_CODE = {
    code: group.split(":")[0] for group in _LANGUAGES.split() for code in group.split(":")
}


def choose_track(tracks: tuple[Track, ...], wanted: int | str | None, path: Path) -> int:
    """The index of the wanted track: a number from 0, or a language (`en`, `eng`, `en-GB`).

    Without a wish it is the first that can be decoded.
    """
    if not tracks:
        raise AudioError(f"{path}: has no audio track", hint="It may be a video without sound.")
    if wanted is None:
        return next((track.index for track in tracks if track.codec != "unknown"), 0)
    text = str(wanted)
    for track in tracks:
        if text == str(track.index) or _same_language(text, track.language):
            return track.index
    there = ", ".join(f"{track.index} ({track.language or 'no language'})" for track in tracks)
    raise AudioError(f"{path}: has no audio track {text!r}", hint=f"It has: {there}.")


def _same_language(left: str, right: str | None) -> bool:
    return right is not None and _short_language(left) == _short_language(right)


def _short_language(code: str) -> str:
    primary = code.lower().replace("_", "-").split("-")[0]
    return _SHORT_CODE.get(primary, primary)
