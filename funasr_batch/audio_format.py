"""Which container a recording is in, told by its bytes.

The suffix is never asked, and FFmpeg is never left to guess: a text file named `talk.wav` that
lists other files is a playlist to a guessing FFmpeg, which would open them. Here it is refused.
Only the demuxers named in this module are ever used; none of them opens a second file.

libsndfile reads linear PCM in WAV and W64, and the rare formats that FFmpeg reads badly. FFmpeg
(PyAV) reads the rest, FLAC, MP3 and Ogg included: behind a damaged place libsndfile stops and
FFmpeg goes on, and of recordings that were joined end to end libsndfile reads only the first.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from funasr_batch.errors import AudioError
from funasr_batch.wav_header import read_wav_header

SNIFF_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Container:
    """What the first bytes of a file say about how to read it."""

    name: str
    demuxer: str | None
    """FFmpeg's demuxer; None when libsndfile reads the file."""
    declared_seconds: float | None = None
    """The length written in a WAV header. The other containers leave it to their decoder."""
    states_length: bool = True
    """False when FFmpeg would estimate the length from the size of the file and the bit rate."""
    counts_samples: bool = False
    """Timestamps count samples, so that a hole in them is audio that was lost."""
    last_granule: int | None = None
    """Number of samples up to the end of an Ogg stream."""
    damage: str | None = None
    """What is already seen to be wrong with a file that can still be read."""


_FLAC = Container("flac", "flac", counts_samples=True)
_OGG = Container("ogg", "ogg", counts_samples=True)
_MP4 = Container("mp4", "mov")
_MP3 = Container("mp3", "mp3", states_length=False)
_AAC = Container("aac", "aac", states_length=False)
_AC3 = Container("ac3", "ac3", states_length=False)

_MAGIC: tuple[tuple[int, bytes, Container], ...] = (
    (0, b"fLaC", _FLAC),
    (4, b"ftyp", _MP4),
    (4, b"moov", _MP4),
    (4, b"mdat", _MP4),
    (4, b"wide", _MP4),
    (4, b"free", _MP4),
    (4, b"skip", _MP4),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Container("asf", "asf")),
    (8, b"AVI ", Container("avi", "avi")),
    (0, b"FLV\x01", Container("flv", "flv")),
    (8, b"AIFF", Container("aiff", "aiff")),
    (8, b"AIFC", Container("aiff", "aiff")),
    (0, b"caff", Container("caf", "caf")),
    (0, b".snd", Container("au", "au")),
    (0, b"#!AMR", Container("amr", "amr", states_length=False)),
    (0, b"MAC ", Container("ape", "ape")),
    (0, b"wvpk", Container("wavpack", "wv")),
    (0, b"TTA1", Container("tta", "tta")),
    (0, b"MP+", Container("musepack", "mpc")),
    (0, b"MPCK", Container("musepack", "mpc8")),
    (0, b"DSD ", Container("dsf", "dsf")),
    (0, b"\x00\x00\x01\xba", Container("mpeg", "mpeg", states_length=False)),
    (0, b"riff\x2e\x91\xcf\x11", Container("w64", None)),
    (0, b"NIST_1A", Container("nist", None)),
    (0, b"Creative Voice File\x1a", Container("voc", None)),
    (0, b"\x64\xa3", Container("ircam", None)),
    (2, b"\xa3\x64", Container("ircam", None)),
    (0, b" paf", Container("paf", None)),
    (0, b"fap ", Container("paf", None)),
    (8, b"8SVX", Container("svx", None)),
    (8, b"16SV", Container("svx", None)),
    (0, b"PVF1\n", Container("pvf", None)),
    (0, b"\xf0\x7e", Container("sds", None)),
    (0, b"MATLAB 5.0", Container("mat5", None)),
    (0, b"\x00\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00", Container("mat4", None)),
    (0, b"\x00\x00\x03\xe8\x00\x00\x00\x01\x00\x00\x00\x01", Container("mat4", None)),
    (0, b"Extended Instrument: ", Container("xi", None)),
    (0, b"2BIT", Container("avr", None)),
    (0, b"\x01\x04", Container("mpc2k", None)),
    (0, b"ALawSoundFile**", Container("wve", None)),
    (8, b"\x00\x02\x00\x00", Container("htk", None)),
)
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]")


def identify(file: BinaryIO, path: Path) -> Container:
    """
    Raises:
        AudioError: the file is empty, a playlist, no recording that is known here, or a WAV whose
            header cannot be trusted.
    """
    size = os.fstat(file.fileno()).st_size
    head = _read_at(file, 0, SNIFF_BYTES)
    if not head:
        raise AudioError(f"{path}: the file is empty", hint="Copy or export it again.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLISTS):
        raise AudioError(
            f"{path}: this is a playlist, not a recording",
            hint="Give the recordings that it lists.",
        )
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _identify_wav(file, path)
    if head.startswith(b"OggS") and len(head) >= _PAGE_HEADER.size:
        return _identify_ogg(file, head, size)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _identify_matroska(head)
    for offset, magic, container in _MAGIC:
        if head.startswith(magic, offset):
            return container
    if head[0] == 0x47 and head[188:189] == head[376:377] == b"\x47":
        return Container("mpegts", "mpegts")
    if head.startswith(b"\x0b\x77"):
        extended = len(head) > 5 and head[5] >> 3 > 10
        return replace(_AC3, name="eac3", demuxer="eac3") if extended else _AC3
    elementary = _identify_elementary(file, head, size)
    if elementary is None:
        raise AudioError(
            f"{path}: its content is of no known audio format",
            hint="If it is a recording, convert it to WAV, FLAC, MP3 or M4A.",
        )
    return elementary


def _identify_matroska(head: bytes) -> Container:
    """A recording that was streamed has no Duration element before its first cluster."""
    before_clusters = head.split(b"\x1f\x43\xb6\x75")[0]
    return Container("matroska", "matroska", states_length=b"\x44\x89" in before_clusters)


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


# MPEG audio and AAC without a container, with or without an ID3 tag before them.


class _Frame(NamedTuple):
    kind: Container
    length: int
    signature: int
    """Header bits that are the same in every frame of a stream."""


def _identify_elementary(file: BinaryIO, head: bytes, size: int) -> Container | None:
    start = 0
    if head.startswith(b"ID3") and len(head) >= 10:
        start = 10 + sum((byte & 0x7F) << (21 - 7 * i) for i, byte in enumerate(head[6:10]))
        head = _read_at(file, start, SNIFF_BYTES)
        if head.startswith(b"fLaC"):
            return _FLAC
    found = _first_frame(head, at_end=start + len(head) >= size)
    if found is None:
        return _MP3 if start else None
    offset, frame = found
    if frame.kind is _MP3:
        tag = head[offset : offset + 200]
        counted = any(name in tag for name in (b"Xing", b"Info", b"VBRI"))
        return replace(_MP3, states_length=counted)
    return frame.kind


def _first_frame(head: bytes, *, at_end: bool) -> tuple[int, _Frame] | None:
    """The first frame that another of the same stream follows, or the end of the file.

    A stream that was recorded off the air starts in the middle of a frame, so all of `head` is
    searched; a lone sync word proves nothing, as UTF-16 text starts with one.
    """
    offset = head.find(b"\xff")
    while offset >= 0:
        frame = _parse_frame(head[offset : offset + 7])
        if frame is not None:
            following = offset + frame.length
            after = _parse_frame(head[following : following + 7])
            if after is not None and after.signature == frame.signature:
                return offset, frame
            if at_end and following == len(head):
                return offset, frame
        offset = head.find(b"\xff", offset + 1)
    return None


# kbit/s by bit rate index (ISO/IEC 11172-3 and 13818-3).
_KBITS_LAYER_2 = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_KBITS_LAYER_3 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_MPEG_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_MPEG_1_RATES = (44_100, 48_000, 32_000)
_RATE_SHIFTS = {3: 0, 2: 1, 0: 2}
"""By version bits: MPEG-1, MPEG-2, MPEG-2.5."""


def _parse_frame(header: bytes) -> _Frame | None:
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    if layer == 4:
        return _parse_adts(header)
    bits_index, rate_index, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    # Nobody writes layer I, but `\xff\xfe`, its sync word, begins UTF-16 text.
    if layer == 1 or version == 1 or rate_index == 3 or bits_index in (0, 15):
        return None
    is_mpeg_1 = version == 3
    table = _KBITS_MPEG_2 if not is_mpeg_1 else _KBITS_LAYER_3 if layer == 3 else _KBITS_LAYER_2
    bits = table[bits_index - 1] * 1000
    rate = _MPEG_1_RATES[rate_index] >> _RATE_SHIFTS[version]
    samples = 1152 if is_mpeg_1 or layer == 2 else 576
    length = samples // 8 * bits // rate + padding
    return _Frame(_MP3, length, (header[1] & 0xFE) << 8 | header[2] & 0x0C)


def _parse_adts(header: bytes) -> _Frame | None:
    if header[1] & 0xF0 != 0xF0:
        return None
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return _Frame(_AAC, length, header[1] << 8 | header[2]) if length > 7 else None


# Ogg


_PAGE_HEADER = struct.Struct("<4sBBqIIIB")
_LONGEST_PAGE = _PAGE_HEADER.size + 255 + 255 * 255


def _identify_ogg(file: BinaryIO, head: bytes, size: int) -> Container:
    """Ogg tells its length in its last page only: the granule position, a count of samples.

    FFmpeg takes it from the last page whose checksum is right, so where the end is damaged what
    was lost would not be missed. It is read here without the checksum.
    """
    tail = _read_at(file, max(0, size - _LONGEST_PAGE), _LONGEST_PAGE)
    page = tail.rfind(b"OggS")
    if page < 0 or len(tail) - page < _PAGE_HEADER.size:
        return replace(_OGG, damage=_CUT_SHORT)
    granule, serial, segments = _ogg_page(tail[page:])
    lengths = tail[page + _PAGE_HEADER.size :][:segments]
    if len(lengths) < segments or page + _PAGE_HEADER.size + segments + sum(lengths) > len(tail):
        return replace(_OGG, damage=_CUT_SHORT)
    is_audio = any(name in head[:64] for name in (b"\x01vorbis", b"OpusHead", b"\x7fFLAC"))
    if is_audio and granule > 0 and serial == _ogg_page(head)[1]:
        return replace(_OGG, last_granule=granule)
    return _OGG


_CUT_SHORT = "the file was cut short: its last page is incomplete"


def _ogg_page(page: bytes) -> tuple[int, int, int]:
    """Granule position, serial number of the stream, number of segments."""
    _, _, _, granule, serial, _, _, segments = _PAGE_HEADER.unpack_from(page)
    return granule, serial, segments


# WAV


def _identify_wav(file: BinaryIO, path: Path) -> Container:
    header = read_wav_header(file, path)
    return Container(
        "wav",
        None if header.is_regular else "wav",
        declared_seconds=header.declared_seconds,
        states_length=False,
        damage="only the first of its data chunks is read" if header.data_chunks > 1 else None,
    )
