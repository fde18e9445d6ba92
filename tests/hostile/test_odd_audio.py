"""A museum of recordings that lie about themselves, or came to harm, and what is made of each.

An outcome is one of: complete, partial (audio is missing, and that is said), or an AudioError.
None prints anything, opens another file, or makes time and memory grow with what it claims.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_files import chunk, encode, fmt, noise, pcm16, read, riff, tone, wav
from hypothesis import example, given, settings
from hypothesis import strategies as st

from funasr_batch.audio import AudioLimits, open_audio, probe
from funasr_batch.errors import AudioError

SECOND = tone(1.0)
PCM = pcm16(SECOND)
FMT, DATA = chunk(b"fmt ", fmt()), chunk(b"data", PCM)
UNKNOWN = 0xFFFF_FFFF
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def extensible(subformat: bytes, channels: int = 1) -> bytes:
    extra = struct.pack("<HHI", 22, 16, 0) + subformat
    return chunk(b"fmt ", fmt(tag=0xFFFE, channels=channels, extra=extra))


def ds64(data_size: int) -> bytes:
    return chunk(b"ds64", struct.pack("<QQQI", data_size + 72, data_size, data_size // 2, 0))


@pytest.fixture(autouse=True)
def _silence(capfd: pytest.CaptureFixture[str]) -> object:
    yield
    assert capfd.readouterr() == ("", "")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


COMPLETE = {
    "plain": riff(FMT, DATA),
    "streamed, data size 0": riff(FMT, chunk(b"data", PCM, size=0), size=0),
    "streamed, data size FFFFFFFF": riff(FMT, chunk(b"data", PCM, size=UNKNOWN), size=UNKNOWN),
    "streamed, FFFFFFFF less the header": riff(FMT, chunk(b"data", PCM, size=UNKNOWN - 36)),
    "streamed by SoX or eSpeak": riff(FMT, chunk(b"data", PCM, size=0x7FFF_F000)),
    "data before fmt": riff(DATA, FMT),
    "odd chunks, padded": riff(chunk(b"JUNK", b"abc"), FMT, chunk(b"LIST", b"INFOx"), DATA),
    "a chunk of nothing": riff(chunk(b"JUNK", b""), FMT, DATA),
    "RIFF size 0": riff(FMT, DATA, size=0),
    "RIFF size too large": riff(FMT, DATA, size=UNKNOWN),
    "garbage behind the data": riff(FMT, DATA) + bytes(range(256)) * 20,
    "RF64": riff(ds64(len(PCM)), FMT, chunk(b"data", PCM, size=UNKNOWN), form=b"RF64"),
    "BW64": riff(ds64(len(PCM)), FMT, chunk(b"data", PCM, size=UNKNOWN), form=b"BW64"),
    "RIFX": riff(
        chunk(b"fmt ", fmt(order=">"), order=">"),
        chunk(b"data", (SECOND * 32767).astype(">i2").tobytes(), order=">"),
        form=b"RIFX",
        order=">",
    ),
    "extensible": riff(extensible(b"\x01\x00" + GUID_TAIL), DATA),
    "12 bits": riff(chunk(b"fmt ", fmt(bits=12, align=2)), DATA),
    "fmt of 18 bytes": riff(chunk(b"fmt ", fmt(extra=b"\0\0")), DATA),
    "block align 0": riff(chunk(b"fmt ", fmt(align=0)), DATA),
    "integers of 64 bits": riff(
        chunk(b"fmt ", fmt(bits=64)), chunk(b"data", (SECOND * 2.0**63).astype("<i8").tobytes())
    ),
    "float 64": riff(
        chunk(b"fmt ", fmt(tag=3, bits=64)), chunk(b"data", SECOND.astype("<f8").tobytes())
    ),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_odd_but_whole(tmp_path: Path, name: str) -> None:
    samples, report, _ = read(write(tmp_path / "x.wav", COMPLETE[name]))
    assert not report.is_partial
    assert report.damage is None
    extra = len(samples) - len(SECOND)
    assert 0 <= extra <= 2560 if "garbage" in name else extra == 0
    np.testing.assert_allclose(samples[: len(SECOND)], SECOND, atol=1e-4)


PARTIAL = {
    "declares 4 GB, has 50 samples": (
        riff(FMT, chunk(b"data", PCM[:100], size=4_000_000_000)),
        50,
    ),
    "RF64 of 2^60 bytes": (
        riff(ds64(2**60), FMT, chunk(b"data", PCM, size=UNKNOWN), form=b"RF64"),
        16_000,
    ),
    "cut in half": (riff(FMT, chunk(b"data", PCM * 4))[:64_044], 32_000),
    "cut in the middle of a sample": (riff(FMT, chunk(b"data", PCM * 4))[:64_045], 32_000),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_less_than_declared(tmp_path: Path, name: str) -> None:
    content, expected = PARTIAL[name]
    samples, report, info = read(write(tmp_path / "x.wav", content))
    assert report.is_partial
    assert len(samples) == expected
    assert info.declared_seconds is not None
    assert report.shortfall_seconds == pytest.approx(info.declared_seconds - report.seconds)


REFUSED = {
    "no bytes": (b"", "empty"),
    "RIFF alone": (b"RIFF\0\0\0\0WAVE", "no format chunk"),
    "cut inside fmt": (riff(FMT, DATA)[:30], "inside the format chunk"),
    "fmt of 14 bytes": (riff(chunk(b"fmt ", fmt()[:14]), DATA), "14 bytes"),
    "header only": (riff(FMT, chunk(b"data", b"")), "holds no audio"),
    "no data chunk": (riff(FMT), "holds no audio"),
    "no samples, but a comment": (
        riff(FMT, chunk(b"data", b""), chunk(b"LIST", b"INFO" + b"x" * 400)),
        "holds no audio",
    ),
    "half a sample": (riff(FMT, chunk(b"data", b"\x01")), "holds no audio"),
    "0 channels": (wav(SECOND, channels=0), "0 channels"),
    "65535 channels": (wav(SECOND, channels=65_535), "cannot be decoded|channels"),
    "0 bits": (wav(SECOND, bits=0), "0 bits"),
    "65535 bits": (wav(SECOND, bits=65_535), "65535 bits"),
    "0 Hz": (wav(SECOND, rate=0), "0 Hz"),
    "1 Hz": (wav(SECOND, rate=1), "1 Hz is outside 4000"),
    "2^32-1 Hz": (wav(SECOND, rate=2**32 - 1), "cannot be decoded|Hz is outside"),
    "unknown codec": (wav(SECOND, tag=0x1234), "no decoder"),
    "unknown GUID": (riff(extensible(b"\x01\x00" + b"?" * 14), DATA), "format is unknown"),
    "extensible without its extension": (wav(SECOND, tag=0xFFFE), "format is unknown"),
    "24 bits in cells of 32": (wav(SECOND, bits=24, align=4), "do not fill its frames"),
    "no fmt": (riff(DATA), "no format chunk"),
    "10,000 chunks": (riff(*[chunk(b"JUNK", b"")] * 10_000, FMT, DATA), "no format chunk"),
    "ffconcat": (b"ffconcat version 1.0\nfile secret.wav\n", "playlist"),
    "m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.wav\n", "playlist"),
    "m3u8 with a byte order mark": (b"\xef\xbb\xbf#EXTM3U\nsecret.wav\n", "playlist"),
    "an SDP": (b"v=0\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n", "no known audio format"),
    "a DASH manifest": (b'<?xml version="1.0"?><MPD></MPD>', "no known audio format"),
    "an image sequence": (b"P6 1 1 255\n\0\0\0", "no known audio format"),
    "an AVI that is none": (b"RIFF\x10\0\0\0AVI LIST", "cannot be decoded"),
    "ftyp and no more": (b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42isom", "cannot be decoded|no audio"),
    "EBML and no more": (b"\x1a\x45\xdf\xa3\x80", "cannot be decoded|no audio"),
    "Ogg and no more": (b"OggS" + bytes(60), "cannot be decoded|no audio"),
    "fLaC and no more": (b"fLaC\0\0\0\x22" + bytes(34), "cannot be decoded|no audio|Hz"),
    "an ID3 tag and no more": (
        b"ID3\x04\0\0\0\0\x0f\x7f" + bytes(4000),
        "cannot|no audio|no known",
    ),
}


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str, suffix: str) -> None:
    soundfile.write(tmp_path / "secret.wav", SECOND, 16_000)
    content, message = REFUSED[name]
    path = write(tmp_path / f"x.{suffix}", content)
    with pytest.raises(AudioError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint is not None


def test_only_the_first_data_chunk_is_read_and_that_is_said(tmp_path: Path) -> None:
    samples, report, _ = read(write(tmp_path / "x.wav", riff(FMT, DATA, DATA)))
    assert len(samples) == 16_000
    assert report.damage == "only the first of its data chunks is read"


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_a_handful_of_samples(tmp_path: Path, count: int, rate: int) -> None:
    _, report, _ = read(write(tmp_path / "x.wav", wav(SECOND[1 : count + 1], rate=rate)))
    assert report.samples == count * 16_000 // rate
    assert not report.is_partial


@pytest.mark.parametrize(
    "signal",
    [np.zeros(16_000), np.ones(16_000), np.sign(SECOND), 1e-30 * noise(1.0)],
    ids=["silence", "constant", "clipped", "denormal"],
)
def test_dull_signals(tmp_path: Path, signal: np.ndarray) -> None:
    soundfile.write(tmp_path / "x.wav", signal, 16_000, subtype="FLOAT")
    samples, report, _ = read(tmp_path / "x.wav")
    np.testing.assert_array_equal(samples, signal.astype(np.float32))
    assert report.warnings == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_recording_of_one_such_value_is_silence_and_counted(tmp_path: Path, value: float) -> None:
    soundfile.write(tmp_path / "x.wav", np.full((8_000, 2), value), 8_000, subtype="FLOAT")
    samples, report, _ = read(tmp_path / "x.wav")
    assert report.non_finite == 16_000
    assert not samples.any()


# Damage


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("encoded")
    speech = noise(4.0)
    for suffix in ("flac", "ogg", "mp3", "aiff"):
        soundfile.write(folder / f"x.{suffix}", speech, 16_000)
    soundfile.write(folder / "x.opus", speech, 16_000, format="OGG", subtype="OPUS")
    encode(folder / "x.m4a", "ipod", "aac", [speech])
    encode(folder / "x.webm", "webm", "libopus", [speech])
    encode(folder / "x.mkv", "matroska", "aac", [speech], video_seconds=4.0)
    encode(folder / "x.ts", "mpegts", "mp2", [speech])
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


SUFFIXES = ("flac", "ogg", "mp3", "aiff", "opus", "m4a", "webm", "mkv", "ts")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(tmp_path: Path, encoded: dict[str, bytes], suffix: str, seed: int) -> None:
    content = bytearray(encoded[suffix])
    generator = random.Random(seed)
    for _ in range(20):
        position = generator.randrange(len(content) // 4, len(content))
        content[position] ^= 1 << generator.randrange(8)
    path = write(tmp_path / f"x.{suffix}", bytes(content))
    try:
        samples, report, _ = read(path)
    except AudioError:
        return
    assert np.isfinite(samples).all()
    assert len(samples) < 20 * 16_000
    assert report.is_partial or report.damage or report.seconds > 3.5


@pytest.mark.parametrize("suffix", ["flac", "ogg", "opus"])
def test_lost_pages_and_frames_are_never_silent_success(
    tmp_path: Path, encoded: dict[str, bytes], suffix: str
) -> None:
    content = bytearray(encoded[suffix])
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    _, report, _ = read(write(tmp_path / f"x.{suffix}", bytes(content)))
    assert report.is_partial or report.damage


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", [1, 2, 3])
def test_cut(tmp_path: Path, encoded: dict[str, bytes], suffix: str, part: int) -> None:
    content = encoded[suffix]
    path = write(tmp_path / f"x.{suffix}", content[: len(content) * part // 4])
    try:
        _, report, _ = read(path)
    except AudioError:
        return
    if suffix != "ts":  # a broadcast says nowhere how long it is
        assert report.is_partial or report.damage


def test_an_mp3_with_junk_before_and_inside(tmp_path: Path, encoded: dict[str, bytes]) -> None:
    content, junk = encoded["mp3"], random.Random(0).randbytes(3_000)
    middle = len(content) // 2
    path = write(tmp_path / "x.mp3", junk + content[:middle] + junk + content[middle:])
    _, report, info = read(path)
    assert info.container == "mp3"
    assert report.seconds > 3.8


# Amplifiers: little on disk, much when decoded


def test_a_day_in_a_few_bytes_is_refused_unread(tmp_path: Path) -> None:
    frame = chunk(b"data", b"", size=0x7FFF_0000)
    path = write(tmp_path / "x.wav", riff(chunk(b"fmt ", fmt(rate=8_000)), frame))
    os.truncate(path, 0x7FFF_0000)
    with pytest.raises(AudioError, match="hours long"):
        open_audio(path)
    assert probe(path).declared_seconds == pytest.approx(0x7FFF_0000 / 16_000)


@pytest.mark.parametrize("size", [-2, 2**55, 2**63 - 1])
def test_a_chunk_that_ends_beyond_any_file(tmp_path: Path, size: int) -> None:
    """FFmpeg seeks there; PyAV prints what the file object raises, unless it raises nothing."""
    path = encode(tmp_path / "x.caf", "caf", "alac", [noise(1.0)])
    content = path.read_bytes()
    place = content.index(b"chan") + 4
    content = content[:place] + struct.pack(">q", size) + content[place + 8 :]
    with contextlib.suppress(AudioError):
        read(write(path, content))


def test_a_flac_that_declares_days(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.flac", SECOND, 16_000)
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] |= 0x0F  # the upper bits of the number of samples
    with pytest.raises(AudioError, match="hours long"):
        open_audio(write(tmp_path / "x.flac", bytes(content)))


def test_decoders_print_nothing(tmp_path: Path, encoded: dict[str, bytes]) -> None:
    """In a process of its own, as libraries may write to the terminal behind Python's back."""
    paths = []
    for suffix, content in encoded.items():
        damaged = bytearray(content)
        for position in range(len(content) // 3, len(content), 97):
            damaged[position] ^= 0x55
        paths.append(write(tmp_path / f"x.{suffix}", bytes(damaged)))
    paths.append(write(tmp_path / "y.mp3", b"\xff\xfb\x90\x00" + bytes(90_000)))
    script = (
        "import sys; from pathlib import Path\n"
        "from funasr_batch.audio import open_audio\n"
        "from funasr_batch.errors import AudioError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        with open_audio(Path(name)) as stream:\n"
        "            for _ in stream: pass\n"
        "    except AudioError: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, check=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


# Properties

HEADERS = (
    riff(FMT, DATA),
    riff(ds64(len(PCM)), FMT, chunk(b"data", PCM, size=UNKNOWN), form=b"RF64"),
    riff(extensible(b"\x01\x00" + GUID_TAIL, channels=2), chunk(b"LIST", b"INFO"), DATA),
)


@settings(max_examples=300, deadline=None)
@given(
    content=st.sampled_from(HEADERS),
    changes=st.lists(
        st.tuples(
            st.integers(0, 99),
            st.sampled_from((0, 1, 2, 127, 128, 255)) | st.integers(0, 255),
        ),
        max_size=8,
    ),
    length=st.integers(0, 110) | st.integers(0, 32_200),
)
@example(HEADERS[0], [], 44)
@example(HEADERS[0], [(40, 0), (41, 0)], 32_044)
def test_no_header_is_too_wrong(
    content: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    changed = bytearray(content)
    for position, value in changes:
        changed[position] = value
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.wav", bytes(changed[:length]))
        limits = AudioLimits(max_seconds=60)
        try:
            with open_audio(path, limits=limits) as stream:
                blocks = list(stream)
        except AudioError:
            return
    assert stream.report.samples == sum(map(len, blocks)) > 0
    most = 60 * 16_000  # of a compressed codec; PCM has at least one byte a sample
    if stream.info.decoder == "soundfile":
        most = length * 16_000 // stream.info.sample_rate + 1
    assert stream.report.samples <= most
    assert all(np.isfinite(block).all() for block in blocks)
    declared = stream.info.declared_seconds
    if declared is not None and declared - stream.report.seconds > 0.51 + 0.01 * declared:
        assert stream.report.is_partial


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_other_file_is_too_wrong(data: st.DataObject, encoded: dict[str, bytes]) -> None:
    content = bytearray(encoded[data.draw(st.sampled_from(SUFFIXES))])
    zone = data.draw(st.sampled_from((32, 512, len(content))))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, zone - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x", bytes(content))
        try:
            with open_audio(path, limits=AudioLimits(max_seconds=60)) as stream:
                blocks = list(stream)
        except AudioError:
            return
    assert all(np.isfinite(block).all() for block in blocks)
    assert stream.report.samples == sum(map(len, blocks))
