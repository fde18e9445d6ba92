"""Recordings for the tests, made on the spot: WAV headers byte by byte, the rest with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from funasr_batch.audio import AudioInfo, DecodeReport, open_audio

Array = npt.NDArray[np.float32]


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0, level: float = 0.5) -> Array:
    times = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(round(seconds * rate))).astype(np.float32)


def pcm16(samples: Array) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def read(
    path: Path, *, channel: int | None = None, track: int | str | None = None
) -> tuple[Array, DecodeReport, AudioInfo]:
    with open_audio(path, channel=channel, track=track) as stream:
        samples = np.concatenate(list(stream))
    return samples, stream.report, stream.info


# WAV


def fmt(
    *,
    tag: int = 1,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    align: int | None = None,
    order: str = "<",
    extra: bytes = b"",
) -> bytes:
    align = channels * bits // 8 % 65_536 if align is None else align
    byte_rate = rate * align % 2**32
    return struct.pack(order + "HHIIHH", tag, channels, rate, byte_rate, align, bits) + extra


def chunk(name: bytes, body: bytes, *, size: int | None = None, order: str = "<") -> bytes:
    size = len(body) if size is None else size
    return name + struct.pack(order + "I", size) + body + b"\0" * (len(body) % 2)


def riff(*chunks: bytes, form: bytes = b"RIFF", size: int | None = None, order: str = "<") -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return form + struct.pack(order + "I", len(body) if size is None else size) + body


def wav(samples: Array, **format_fields: int) -> bytes:
    """16-bit PCM; interleave the channels of more than one yourself."""
    return riff(chunk(b"fmt ", fmt(**format_fields)), chunk(b"data", pcm16(samples)))


# Containers


def encode(
    path: Path,
    container: str,
    codec: str,
    tracks: Sequence[Array],
    *,
    rate: int = 16_000,
    languages: Sequence[str] = (),
    delay: float = 0.0,
    jump: tuple[float, float] | None = None,
    video_seconds: float = 0.0,
) -> Path:
    """Writes mono tracks.

    `delay` moves all audio by so many seconds against the video, `jump` (at, by) what comes after
    `at` seconds.
    """
    with path.open("wb") as file, av.open(file, "w", format=container) as output:
        video = None
        if video_seconds:
            video = output.add_stream("mpeg4", rate=25)
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
        audio = [output.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        for stream, language in zip(audio, languages, strict=False):
            stream.metadata["language"] = language
        if video is not None:
            for number in range(round(video_seconds * 25)):
                picture = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), "yuv420p")
                picture.pts = number
                output.mux(video.encode(picture))
            output.mux(video.encode(None))
        for stream, samples in zip(audio, tracks, strict=True):
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(
                    samples[None, start : start + 1024], format="flt", layout="mono"
                )
                frame.sample_rate = rate
                frame.time_base = Fraction(1, rate)
                late = delay + (jump[1] if jump and start >= jump[0] * rate else 0.0)
                frame.pts = start + round(late * rate)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    return path
