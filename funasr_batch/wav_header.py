"""The header of a WAV file (RIFF, RIFX, RF64, BW64), read without trusting it.

libsndfile and FFmpeg make noise, or nothing, of some headers that lie: FFmpeg reads a format chunk
of 14 bytes as 8-bit samples, libsndfile reads 24-bit samples in 32-bit cells as if they were
packed, and both shorten a declared length to what is there without a word.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from funasr_batch.errors import AudioError


@dataclass(frozen=True, slots=True)
class WavHeader:
    is_regular: bool
    """PCM, float, A-law or µ-law in the one layout that libsndfile reads without surprises."""
    declared_seconds: float | None
    """None when the header was written before the length was known."""
    data_chunks: int


class _Chunk(NamedTuple):
    name: bytes
    size: int
    body: int
    """Offset of its first byte after name and size."""


_PCM, _FLOAT, _ALAW, _ULAW, _EXTENSIBLE = 0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE
_LINEAR_TAGS = (_PCM, _FLOAT, _ALAW, _ULAW)
_SUBFORMAT_TAILS = (
    bytes.fromhex("0000 0000 1000 8000 00aa00389b71"),  # KSDATAFORMAT_SUBTYPE_*
    bytes.fromhex("0000 2107 d311 8644 c8c1ca000000"),  # the same in ambisonic B-format
)
_MAX_CHUNKS = 1000


def read_wav_header(file: BinaryIO, path: Path) -> WavHeader:
    """
    Raises:
        AudioError: the header contradicts itself, or the file holds no samples.
    """
    size = os.fstat(file.fileno()).st_size
    form, riff_size = struct.unpack("<4sI", _read_at(file, 0, 8))
    order = ">" if form == b"RIFX" else "<"
    chunks = [c for c in _chunks(file, order, size) if c.name in (b"fmt ", b"data")]
    fmt = next((chunk for chunk in chunks if chunk.name == b"fmt "), None)
    data = next((chunk for chunk in chunks if chunk.name == b"data"), None)
    if fmt is None:
        raise _wrong(path, "it has no format chunk")
    if fmt.size < 16:
        raise _wrong(path, f"its format chunk has {fmt.size} bytes, fewer than 16")
    is_linear, bytes_per_second = _check_format(_read_at(file, fmt.body, 40), order, path)

    # A size of 0 in a header that was never completed means "to the end"; else it means 0.
    if data is None or (data.size == 0 and (data.body >= size or abs(riff_size + 8 - size) <= 1)):
        raise AudioError(
            f"{path}: holds no audio", hint="The recorder stopped before the first sample."
        )
    layout = [chunk.name for chunk in chunks]
    # libsndfile takes a data size of 0 at its word, and does not know BW64.
    has_regular_layout = layout == [b"fmt ", b"data"] and data.size > 0 and form != b"BW64"
    return WavHeader(
        is_regular=is_linear and has_regular_layout,
        declared_seconds=None if _is_placeholder(data.size) else data.size / bytes_per_second,
        data_chunks=layout.count(b"data"),
    )


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _chunks(file: BinaryIO, order: str, size: int) -> Iterator[_Chunk]:
    offset, long_size = 12, None
    for _ in range(_MAX_CHUNKS):
        header = _read_at(file, offset, 8)
        if len(header) < 8:
            return
        name, length = struct.unpack(order + "4sI", header)
        if name == b"ds64":
            sizes = _read_at(file, offset + 8, 16)
            long_size = struct.unpack("<Q", sizes[8:])[0] if len(sizes) == 16 else None
        if name == b"data" and length == 0xFFFF_FFFF and long_size is not None:
            length = long_size
        yield _Chunk(name, length, offset + 8)
        offset += 8 + length + length % 2
        if offset >= size or (name == b"data" and _is_placeholder(length)):
            return


def _is_placeholder(data_size: int) -> bool:
    """Whether programs that write to a pipe, and cannot come back for the true size, put this:
    0, the largest number (less the header), or 2 GiB less something (SoX, eSpeak)."""
    return data_size in (0, 0x7FFF_F000, 0x7FFF_FFFF) or 0xFFFF_FF00 <= data_size <= 0xFFFF_FFFF


def _check_format(fmt: bytes, order: str, path: Path) -> tuple[bool, float]:
    """Whether each sample stands for itself (PCM, float, A-law, µ-law), and the bytes a second."""
    if len(fmt) < 16:
        raise _wrong(path, "it ends inside the format chunk")
    tag, channels, rate, byte_rate, align, bits = struct.unpack(order + "HHIIHH", fmt[:16])
    if tag == _EXTENSIBLE:
        if len(fmt) < 40 or fmt[26:40] not in _SUBFORMAT_TAILS:
            raise _wrong(path, "its sample format is unknown")
        tag = struct.unpack(order + "H", fmt[24:26])[0]
    if channels == 0 or rate == 0:
        raise _wrong(path, f"it declares {channels} channels at {rate} Hz")
    if tag not in _LINEAR_TAGS:
        if byte_rate == 0:
            raise _wrong(path, "it declares 0 bytes a second")
        return False, float(byte_rate)
    if not 1 <= bits <= 64:
        raise _wrong(path, f"it declares {bits} bits a sample")
    width = channels * -(-bits // 8)
    if align > width:
        raise _wrong(path, f"{channels} × {bits} bits do not fill its frames of {align} bytes")
    # libsndfile has no integers of more than 32 bits.
    return tag != _PCM or bits <= 32, float(width * rate)


def _wrong(path: Path, reason: str) -> AudioError:
    return AudioError(
        f"{path}: the WAV header is wrong: {reason}", hint="Export the recording again."
    )
