from __future__ import annotations

import os
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import pytest
import soundfile
from audio_files import chunk, encode, fmt, noise, pcm16, read, riff, tone, wav

from funasr_batch.audio import AudioLimits, open_audio, probe
from funasr_batch.errors import AudioError, UsageError, VanishedError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def lag_and_correlation(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """By how many samples `one` comes after `other`, and how alike they are then."""
    size = 1 << (len(one) + len(other)).bit_length()
    product = np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size))
    correlation = np.fft.irfft(product, size)
    lag = int(correlation.argmax())
    alike = correlation[lag] / (np.linalg.norm(one) * np.linalg.norm(other))
    return (lag if lag < size // 2 else lag - size), float(alike)


class TestRealRecordings:
    @pytest.mark.parametrize(
        ("name", "decoder", "codec"),
        [
            ("jfk.wav", "soundfile", "pcm_16"),
            ("jfk.m4a", "pyav", "aac"),
            ("jfk.mp3", "pyav", "mp3"),
            ("jfk.opus", "pyav", "opus"),
        ],
    )
    def test_the_same_speech_in_four_formats(
        self, shared_data: Path, name: str, decoder: str, codec: str
    ) -> None:
        folder = shared_data / "audio" / "containers"
        expected, _ = soundfile.read(folder / "jfk.wav", dtype="float32")
        samples, report, info = read(folder / name)
        assert (info.decoder, info.codec, info.channels) == (decoder, codec, 1)
        assert report.seconds == pytest.approx(11.0, abs=0.01)
        assert info.declared_seconds == pytest.approx(11.0, abs=0.01)
        lag, alike = lag_and_correlation(samples, expected)
        assert abs(lag) <= 2
        assert alike > 0.98
        assert report.warnings == ()
        assert not report.is_partial

    def test_six_channels_of_a_film(self, shared_data: Path) -> None:
        path = shared_data / "audio" / "containers" / "big_buck_bunny_small.mp4"
        mixed, report, info = read(path)
        assert (info.container, info.codec, info.sample_rate) == ("mp4", "aac", 48_000)
        assert (info.channels, report.downmix, report.samples) == (6, "mean", 84_992)
        parts = [read(path, channel=number)[0] for number in range(1, 7)]
        np.testing.assert_allclose(np.mean(parts, axis=0), mixed, atol=1e-5)

    def test_an_mp3_without_the_encoders_padding(self, shared_data: Path) -> None:
        folder = shared_data / "audio" / "zh"
        expected, _ = soundfile.read(folder / "asr_example.wav", dtype="float32")
        samples, _, _ = read(folder / "asr_example.mp3")
        assert len(samples) == len(expected)
        assert abs(lag_and_correlation(samples, expected)[0]) <= 1


class TestFormats:
    @pytest.mark.parametrize(
        ("container", "subtype", "decoder"),
        [
            ("WAV", "PCM_U8", "soundfile"),
            ("WAV", "PCM_16", "soundfile"),
            ("WAV", "PCM_24", "soundfile"),
            ("WAV", "PCM_32", "soundfile"),
            ("WAV", "FLOAT", "soundfile"),
            ("WAV", "DOUBLE", "soundfile"),
            ("WAV", "ULAW", "soundfile"),
            ("WAV", "ALAW", "soundfile"),
            ("WAV", "IMA_ADPCM", "pyav"),
            ("WAV", "MS_ADPCM", "pyav"),
            ("WAVEX", "PCM_24", "soundfile"),
            ("RF64", "PCM_16", "soundfile"),
            ("W64", "PCM_16", "soundfile"),
            ("AIFF", "PCM_S8", "pyav"),
            ("AIFF", "PCM_24", "pyav"),
            ("AU", "ULAW", "pyav"),
            ("CAF", "ALAC_16", "pyav"),
            ("FLAC", "PCM_16", "pyav"),
            ("FLAC", "PCM_24", "pyav"),
            ("OGG", "VORBIS", "pyav"),
            ("OGG", "OPUS", "pyav"),
            ("MP3", "MPEG_LAYER_III", "pyav"),
            ("NIST", "PCM_16", "soundfile"),
            ("VOC", "PCM_16", "soundfile"),
            ("PAF", "PCM_16", "soundfile"),
            ("IRCAM", "PCM_16", "soundfile"),
            ("SVX", "PCM_16", "soundfile"),
            ("PVF", "PCM_16", "soundfile"),
            ("HTK", "PCM_16", "soundfile"),
            ("SDS", "PCM_16", "soundfile"),
            ("MAT4", "DOUBLE", "soundfile"),
            ("MAT5", "FLOAT", "soundfile"),
            ("AVR", "PCM_16", "soundfile"),
            ("MPC2K", "PCM_16", "soundfile"),
        ],
    )
    def test_what_libsndfile_writes(
        self, tmp_path: Path, container: str, subtype: str, decoder: str
    ) -> None:
        path, expected = tmp_path / "recording", noise(1.5)
        expected = np.convolve(expected, np.ones(16, np.float32) / 4, "same")
        soundfile.write(path, expected, 16_000, format=container, subtype=subtype)
        samples, report, info = read(path)
        assert info.decoder == decoder
        assert report.seconds == pytest.approx(1.5, abs=0.07)
        assert not report.is_partial
        assert report.damage is None
        lag, alike = lag_and_correlation(samples, expected)
        assert abs(lag) <= 1
        assert alike > 0.97
        assert np.std(samples) == pytest.approx(np.std(expected), rel=0.15)

    @pytest.mark.parametrize(
        ("container", "codec"),
        [
            ("ipod", "aac"),
            ("mov", "pcm_s24le"),
            ("mp4", "mp3"),
            ("webm", "libopus"),
            ("matroska", "flac"),
            ("adts", "aac"),
            ("avi", "mp3"),
            ("mpegts", "mp2"),
            ("wv", "wavpack"),
            ("tta", "tta"),
            ("caf", "alac"),
        ],
    )
    def test_what_ffmpeg_writes(self, tmp_path: Path, container: str, codec: str) -> None:
        expected = np.convolve(noise(1.5), np.ones(16, np.float32) / 4, "same").astype(np.float32)
        path = encode(tmp_path / "recording.wav", container, codec, [expected])
        samples, report, info = read(path)
        assert info.decoder == "pyav"
        assert report.seconds == pytest.approx(1.5, abs=0.14)
        assert not report.is_partial
        assert report.damage is None
        assert lag_and_correlation(samples, expected)[1] > 0.94

    def test_sixteen_bit_audio_at_16_khz_is_left_as_it_is(self, tmp_path: Path) -> None:
        values = np.random.default_rng(1).integers(-32768, 32768, 40_001).astype(np.int16)
        for name in ("a.wav", "a.flac"):
            soundfile.write(tmp_path / name, values, 16_000)
            samples, _, _ = read(tmp_path / name)
            np.testing.assert_array_equal(samples, values.astype(np.float32) / 32768)

    @pytest.mark.parametrize("form", ["ID3", "no tag"])
    def test_content_decides_not_the_suffix(self, tmp_path: Path, form: str) -> None:
        soundfile.write(tmp_path / "x.flac", tone(1.0), 16_000)
        tag = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128) if form == "ID3" else b""
        path = write(tmp_path / "x.mp3", tag + (tmp_path / "x.flac").read_bytes())
        assert probe(path).container == "flac"
        assert read(path)[1].samples == 16_000

    @pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
    def test_recordings_joined_end_to_end_are_read_whole(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"x.{suffix}"
        soundfile.write(path, noise(2.0), 16_000)
        samples, _, _ = read(write(path, path.read_bytes() * 2))
        assert len(samples) / 16_000 == pytest.approx(4.0, abs=0.15)

    def test_an_mp3_that_begins_inside_a_frame(self, tmp_path: Path) -> None:
        path = tmp_path / "radio.mp3"
        soundfile.write(path, noise(3.0), 16_000)
        samples, _, info = read(write(path, path.read_bytes()[1000:]))
        assert (info.container, info.declared_seconds) == ("mp3", None)
        assert len(samples) > 2.5 * 16_000


class TestResampling:
    @pytest.mark.parametrize(
        "rate", [4_000, 7_350, 8_000, 11_025, 16_001, 22_050, 44_100, 48_000, 192_000, 768_000]
    )
    def test_length_and_content(self, tmp_path: Path, rate: int) -> None:
        count = rate + 1237
        path = tmp_path / "x.wav"
        soundfile.write(path, tone(count / rate, rate), rate, subtype="FLOAT")
        samples, report, info = read(path)
        assert info.sample_rate == rate
        assert abs(report.samples - count * 16_000 / rate) <= 1
        expected = tone(len(samples) / 16_000)
        np.testing.assert_allclose(samples[800:-800], expected[800 : len(samples) - 800], atol=2e-3)

    def test_the_size_of_the_blocks(self, tmp_path: Path) -> None:
        path = tmp_path / "x.wav"
        soundfile.write(path, tone(3.3, 44_100), 44_100)
        with open_audio(path) as stream:
            blocks = list(stream)
        assert [len(block) for block in blocks] == [16_000, 16_000, 16_000, 4_800]
        assert {block.dtype for block in blocks} == {np.dtype(np.float32)}

    def test_blocks_may_be_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "x.wav"
        soundfile.write(path, np.linspace(-0.9, 0.9, 64_000), 16_000, subtype="FLOAT")
        with open_audio(path) as stream:
            blocks = [(block, block.copy()) for block in stream]
        assert all(np.array_equal(block, copy) for block, copy in blocks)

    def test_a_rate_that_changes_on_the_way(self, tmp_path: Path) -> None:
        joined = b""
        for rate in (16_000, 48_000):
            soundfile.write(tmp_path / "x.flac", tone(2.0, rate), rate)
            joined += (tmp_path / "x.flac").read_bytes()
        samples, report, _ = read(write(tmp_path / "x.flac", joined))
        assert report.seconds == pytest.approx(4.0, abs=0.01)
        assert abs(np.fft.rfft(samples[40_000:56_000])).argmax() == 440


class TestChannels:
    @pytest.mark.parametrize("channels", [2, 3, 8, 64])
    def test_the_mean(self, tmp_path: Path, channels: int) -> None:
        parts = np.stack([noise(0.7, seed=seed) for seed in range(channels)], axis=1)
        path = tmp_path / "x.wav"
        soundfile.write(path, parts, 16_000, subtype="FLOAT")
        samples, report, info = read(path)
        assert (report.downmix, info.channels) == ("mean", channels)
        np.testing.assert_allclose(samples, parts.mean(axis=1), atol=1e-6)
        one, report, _ = read(path, channel=channels)
        assert report.downmix == f"channel {channels}"
        np.testing.assert_array_equal(one, parts[:, -1])

    def test_a_channel_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "x.wav"
        soundfile.write(path, np.zeros((100, 2)), 16_000)
        with pytest.raises(AudioError, match="no channel 3") as caught:
            open_audio(path, channel=3)
        assert caught.value.hint == "It has 2."
        with pytest.raises(UsageError, match="channel 0"):
            open_audio(path, channel=0)

    def test_antiphase_does_not_cancel(self, tmp_path: Path) -> None:
        voice = tone(2.0) * np.hanning(32_000).astype(np.float32)
        path = tmp_path / "x.wav"
        soundfile.write(path, np.stack([voice, -voice], axis=1), 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.downmix == "antiphase: channel 1"
        np.testing.assert_allclose(samples, voice, atol=1e-3)
        assert any("cancel" in warning for warning in report.warnings)

    def test_antiphase_under_noise_and_an_offset(self, tmp_path: Path) -> None:
        voice = tone(2.0, level=0.3)
        left = 0.2 + voice + 0.3 * noise(2.0, seed=1)
        right = 0.2 - voice + 0.3 * noise(2.0, seed=2)
        path = tmp_path / "x.wav"
        soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
        samples, _, _ = read(path)
        assert abs(lag_and_correlation(samples - samples.mean(), voice)[1]) > 0.95

    def test_antiphase_for_a_part_of_the_recording(self, tmp_path: Path) -> None:
        voice = tone(6.0, hertz=200)
        other = voice.copy()
        other[32_000:64_000] *= -1
        path = tmp_path / "x.wav"
        soundfile.write(path, np.stack([voice, other], axis=1), 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.downmix == "antiphase: channel 1"
        fades = np.r_[32_000:32_160, 64_000:64_160]
        np.testing.assert_allclose(np.delete(samples, fades), np.delete(voice, fades), atol=1e-6)

    def test_a_change_of_channels_does_not_click(self, tmp_path: Path) -> None:
        left = tone(6.0, hertz=101.3)
        right = left * np.linspace(1, -0.95, len(left), dtype=np.float32)
        path = tmp_path / "x.wav"
        soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.downmix == "antiphase: channel 1"
        np.testing.assert_array_equal(samples[-8_000:], left[-8_000:])
        assert np.abs(np.diff(samples)).max() < 0.025

    @pytest.mark.parametrize("kind", ["two speakers", "one side silent", "the same", "faint"])
    def test_other_stereo_is_not_taken_for_antiphase(self, tmp_path: Path, kind: str) -> None:
        left = tone(2.0, hertz=210)
        right = {
            "two speakers": tone(2.0, hertz=330, level=0.1),
            "one side silent": np.zeros_like(left),
            "the same": left,
            "faint": left,
        }[kind]
        if kind == "faint":
            left, right = left / 2000, -left / 2000
        path = tmp_path / "x.wav"
        soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.downmix == "mean"
        np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-6)

    def test_real_two_speaker_stereo(self, shared_data: Path) -> None:
        _, report, _ = read(shared_data / "audio" / "en" / "stereo_diarization.wav")
        assert report.downmix == "mean"


class TestTracks:
    @pytest.fixture
    def film(self, tmp_path: Path) -> Path:
        tracks = [tone(1.0), tone(2.0), tone(3.0)]
        return encode(
            tmp_path / "film.mkv", "matroska", "flac", tracks, languages=["eng", "chi", "ger"]
        )

    def test_probe_names_them(self, film: Path) -> None:
        info = probe(film)
        assert [(t.index, t.codec, t.language, t.channels) for t in info.tracks] == [
            (0, "flac", "eng", 1),
            (1, "flac", "chi", 1),
            (2, "flac", "ger", 1),
        ]

    @pytest.mark.parametrize(
        ("track", "seconds"),
        [(None, 1), (0, 1), (1, 2), ("2", 3), ("en", 1), ("zh", 2), ("zho", 2), ("de-AT", 3)],
    )
    def test_choice(self, film: Path, track: int | str | None, seconds: int) -> None:
        _, report, _ = read(film, track=track)
        assert report.seconds == pytest.approx(seconds, abs=0.02)
        assert not report.is_partial

    @pytest.mark.parametrize("track", [3, "fr", -1])
    def test_a_track_that_is_not_there(self, film: Path, track: int | str) -> None:
        with pytest.raises(AudioError, match="no audio track") as caught:
            open_audio(film, track=track)
        assert caught.value.hint == "It has: 0 (eng), 1 (chi), 2 (ger)."

    def test_a_wav_has_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.wav", wav(tone(0.5)))
        assert read(path, track=0)[1].samples == 8_000
        with pytest.raises(AudioError, match="no audio track '1'"):
            open_audio(path, track=1)

    def test_a_video_without_sound(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "x.mp4", "mp4", "aac", [], video_seconds=1.0)
        with pytest.raises(AudioError, match="no audio track"):
            open_audio(path)


class TestTimes:
    """A marker is heard where a player shows it."""

    MARKER = 1.0

    def marked(self) -> np.ndarray:
        samples = np.zeros(48_000, np.float32)
        samples[16_000:16_800] = tone(0.05, hertz=1000)
        return samples

    def heard(self, samples: np.ndarray) -> float:
        return int(np.argmax(np.abs(samples) > 0.2)) / 16_000

    @pytest.mark.parametrize(
        ("container", "codec"), [("mp4", "aac"), ("matroska", "aac"), ("matroska", "libopus")]
    )
    def test_audio_that_starts_after_the_video(
        self, tmp_path: Path, container: str, codec: str
    ) -> None:
        path = encode(
            tmp_path / "x", container, codec, [self.marked()], delay=1.5, video_seconds=4.0
        )
        samples, report, info = read(path)
        assert info.start_offset == pytest.approx(1.5, abs=0.07)
        # FFmpeg's AAC encoder adds 64 ms that Matroska has no place to tell of.
        assert self.heard(samples) == pytest.approx(2.5, abs=0.07)
        assert report.seconds == pytest.approx(4.5, abs=0.07)
        assert not report.is_partial

    def test_a_recording_of_audio_only_starts_at_its_first_sample(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "x.mkv", "matroska", "flac", [self.marked()], delay=1.5)
        samples, report, info = read(path)
        assert info.start_offset == 0
        assert self.heard(samples) == pytest.approx(1.0, abs=0.01)
        assert not report.is_partial

    @pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "libopus")])
    def test_a_hole_becomes_silence(self, tmp_path: Path, container: str, codec: str) -> None:
        path = encode(tmp_path / "x", container, codec, [self.marked()], jump=(0.5, 2.0))
        samples, report, _ = read(path)
        assert self.heard(samples) == pytest.approx(3.0, abs=0.03)
        assert report.seconds == pytest.approx(5.0, abs=0.03)
        assert not report.is_partial

    def test_an_overlap_is_left_out(self, tmp_path: Path) -> None:
        first, second, third = noise(0.5), noise(0.5, seed=1), noise(1.5, seed=2)
        path = tmp_path / "x.mkv"
        with path.open("wb") as file:
            write_packets(file, [(0, first), (8_000, second), (12_800, third)])
        samples, report, _ = read(path)
        expected = np.concatenate([first, second, third[3_200:]])
        assert report.damage is None
        np.testing.assert_allclose(samples, expected, atol=1e-4)

    def test_a_clock_that_jumps_by_hours_adds_no_hours(self, tmp_path: Path) -> None:
        class Pipe:
            """Cannot be sought, so that the muxer cannot go back to write the length."""

            def __init__(self, file: IO[bytes]) -> None:
                self.write = file.write

        path = tmp_path / "x.mkv"
        with open(path, "wb", buffering=0) as file:
            write_packets(Pipe(file), [(0, noise(0.5)), (8_000 + 16_000 * 7200, noise(0.5))])
        _, report, info = read(path)
        assert info.declared_seconds is None
        assert report.seconds == pytest.approx(1.0, abs=0.01)
        assert report.damage == "at 0.50 s: timestamps jump by 7200.0 s"


def write_packets(file: Any, rows: list[tuple[int, np.ndarray]]) -> None:
    """Matroska with packets of PCM at these times, as no encoder would write them."""
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for pts, samples in rows:
            packet = av.Packet(pcm16(samples))
            packet.stream = stream
            packet.pts = packet.dts = pts
            packet.time_base = Fraction(1, 16_000)
            output.mux(packet)


class TestCompleteness:
    def test_an_empty_packet_does_not_end_it(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "x.m4a", "ipod", "aac", [noise(4.0)])
        content = bytearray(path.read_bytes())
        sizes = content.index(b"stsz") + 16
        tenth, eleventh = struct.unpack_from(">2I", content, sizes + 40)
        struct.pack_into(">2I", content, sizes + 40, 0, tenth + eleventh)
        samples, report, _ = read(write(path, bytes(content)))
        assert report.seconds == pytest.approx(4.0, abs=0.1)
        assert np.std(samples[-16_000:]) > 0.05

    @pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff", "au"])
    def test_half_a_recording_is_partial(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"x.{suffix}"
        soundfile.write(path, noise(4.0), 16_000)
        whole = path.read_bytes()
        _, report, _ = read(write(path, whole[: len(whole) // 2]))
        assert report.is_partial
        assert report.shortfall_seconds == pytest.approx(2.0, abs=0.3)
        assert report.warnings[0].endswith("s of 4.0 s of audio are missing")

    def test_half_an_ogg_is_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "x.ogg"
        soundfile.write(path, noise(4.0), 16_000)
        whole = path.read_bytes()
        assert read(path)[1].damage is None
        _, report, _ = read(write(path, whole[: len(whole) // 2]))
        assert report.damage == "the file was cut short: its last page is incomplete"

    def test_what_is_missing_below_the_tolerance_is_not_reported(self, tmp_path: Path) -> None:
        content = riff(chunk(b"fmt ", fmt()), chunk(b"data", pcm16(noise(3.0)), size=32_000 * 3))
        _, report, _ = read(write(tmp_path / "x.wav", content[: -int(32_000 * 0.4)]))
        assert report.shortfall_seconds == 0
        _, report, _ = read(write(tmp_path / "x.wav", content[: -int(32_000 * 0.6)]))
        assert report.shortfall_seconds == pytest.approx(0.6)

    def test_a_damaged_place_costs_that_place(self, tmp_path: Path) -> None:
        path = tmp_path / "x.flac"
        soundfile.write(path, np.concatenate([noise(4.0), tone(4.0)]), 16_000)
        content = bytearray(path.read_bytes())
        content[len(content) // 4] ^= 0x10
        samples, report, _ = read(write(path, bytes(content)))
        assert report.seconds == pytest.approx(8.0)
        assert report.damage is not None
        assert 1.0 < float(report.damage.split()[1]) < 3.0
        np.testing.assert_allclose(samples[80_000:], tone(4.0)[16_000:], atol=1e-3)

    def test_losses_on_the_way_add_up(self, tmp_path: Path) -> None:
        path = tmp_path / "x.flac"
        soundfile.write(path, noise(12.0), 16_000)
        content = bytearray(path.read_bytes())
        for part in (3, 5, 7):
            content[len(content) * part // 10] ^= 0x10
        _, report, _ = read(write(path, bytes(content)))
        assert report.seconds == pytest.approx(12.0)
        assert report.shortfall_seconds == pytest.approx(3 * 4096 / 16_000, abs=0.01)

    def test_a_packet_that_does_not_decode_is_skipped(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "x.m4a", "ipod", "aac", [noise(6.0)])
        content = bytearray(path.read_bytes())
        start = content.index(b"mdat") + 4 + (content.index(b"moov") - content.index(b"mdat")) // 2
        content[start : start + 400] = bytes(400)
        samples, report, _ = read(write(path, bytes(content)))
        assert report.seconds == pytest.approx(6.0, abs=0.1)
        assert report.damage is not None
        assert 2.0 < float(report.damage.split()[1]) < 4.0
        assert np.std(samples[-16_000:]) > 0.05

    def test_the_report_needs_the_end(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.wav", wav(tone(3.0)))
        with open_audio(path) as stream:
            next(iter(stream))
            with pytest.raises(UsageError, match="all blocks"):
                _ = stream.report
            assert len(list(stream)) == 2
            assert stream.report.samples == 48_000


class TestValues:
    def test_what_is_not_finite_becomes_zero(self, tmp_path: Path) -> None:
        samples = tone(2.0, 48_000)
        samples[[10, 20_000, 40_000, 60_000]] = [np.nan, np.inf, -np.inf, 1e30]
        path = tmp_path / "x.wav"
        soundfile.write(path, samples, 48_000, subtype="FLOAT")
        out, report, _ = read(path)
        assert report.non_finite == 4
        assert np.abs(out).max() < 0.6
        assert "4 samples were not finite numbers and became 0" in report.warnings

    def test_it_does_not_spread_to_other_channels(self, tmp_path: Path) -> None:
        both = np.stack([tone(1.0), tone(1.0)], axis=1)
        both[5_000, 1] = np.nan
        path = tmp_path / "x.wav"
        soundfile.write(path, both, 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.non_finite == 1
        assert samples[5_000] == pytest.approx(both[5_000, 0] / 2)

    def test_samples_beyond_full_scale_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "x.wav"
        soundfile.write(path, tone(1.0) * 30_000, 16_000, subtype="FLOAT")
        samples, report, _ = read(path)
        assert report.non_finite == 0
        np.testing.assert_array_equal(samples, tone(1.0) * 30_000)


class TestLimits:
    def test_length_is_checked_before_decoding(self, tmp_path: Path) -> None:
        path = tmp_path / "x.wav"
        path.write_bytes(riff(chunk(b"fmt ", fmt()), chunk(b"data", b"", size=25 * 3600 * 32_000)))
        os.truncate(path, 44 + 25 * 3600 * 32_000)
        with pytest.raises(AudioError, match=r"25\.0 hours long, over the limit of 24 hours"):
            open_audio(path)

    @pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("ipod", "aac")])
    def test_length_of_other_containers(self, tmp_path: Path, container: str, codec: str) -> None:
        path = encode(tmp_path / "x", container, codec, [tone(3.0)])
        with pytest.raises(AudioError, match="over the limit"):
            open_audio(path, limits=AudioLimits(max_seconds=2))

    def test_length_is_checked_while_decoding(self, tmp_path: Path) -> None:
        content = riff(chunk(b"fmt ", fmt()), chunk(b"data", pcm16(noise(5.0)), size=0), size=0)
        path = write(tmp_path / "x.wav", content)
        limits = AudioLimits(max_seconds=3)
        with (
            open_audio(path, limits=limits) as stream,
            pytest.raises(AudioError, match="goes on for longer than it declares"),
        ):
            list(stream)

    def test_decoded_bytes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.wav", wav(noise(3.0)))
        limits = AudioLimits(max_decoded_bytes=100_000)
        with (
            open_audio(path, limits=limits) as stream,
            pytest.raises(AudioError, match="more than 100000 bytes"),
        ):
            list(stream)

    def test_rate_and_channels(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.wav", wav(tone(1.0), rate=3_999))
        with pytest.raises(AudioError, match="3999 Hz is outside 4000 to 768000 Hz"):
            open_audio(path)
        path = write(tmp_path / "x.wav", wav(tone(1.0), channels=65))
        with pytest.raises(AudioError, match="65 channels are outside 1 to 64"):
            open_audio(path)

    def test_memory_does_not_grow_with_the_recording(self, tmp_path: Path) -> None:
        def peak(seconds: int) -> int:
            path = tmp_path / "sparse.wav"
            size = seconds * 16_000 * 2
            path.write_bytes(riff(chunk(b"fmt ", fmt()), chunk(b"data", b"", size=size)))
            os.truncate(path, 44 + size)
            tracemalloc.start()
            with open_audio(path) as stream:
                assert sum(len(block) for block in stream) == seconds * 16_000
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return used

        assert peak(3600) < peak(10) + 200_000


class TestNames:
    NAMES = (
        b"concat:a|b.wav",
        b"file:x.wav",
        b"-y.wav",
        b"two\nlines.wav",
        b"\xff\xfe.wav",
        b"%s{0}$(id).wav",
        "录音 é.wav".encode(),
        b"x" * 255,
        b"http:",
        b"pipe:0",
    )

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("container", ["wav", "ipod"])
    def test_no_name_has_a_meaning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, container: str
    ) -> None:
        source = encode(
            tmp_path / "source", container, "aac" if container == "ipod" else "pcm_s16le", [tone(1)]
        )
        path = Path(os.fsdecode(name))
        try:
            os.rename(source, tmp_path / path)
        except OSError:
            pytest.skip("this file system has no such names")
        monkeypatch.chdir(tmp_path)
        assert read(path)[1].seconds == pytest.approx(1.0, abs=0.1)
        assert read(tmp_path / path)[1].seconds == pytest.approx(1.0, abs=0.1)


class TestRefusals:
    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(VanishedError, match="not there any more"):
            open_audio(tmp_path / "gone.wav")
        with pytest.raises(VanishedError):
            probe(tmp_path / "gone.wav")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.wav", wav(tone(1.0)))
        path.chmod(0)
        with pytest.raises(AudioError, match="may not be read") as caught:
            open_audio(path)
        assert caught.value.hint is not None

    def test_what_is_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo.wav")
        for path in (tmp_path, tmp_path / "fifo.wav", Path("/dev/zero")):
            with pytest.raises(AudioError, match="not a regular file"):
                open_audio(path)

    @pytest.mark.parametrize(
        "content",
        [
            b"hello, world\n" * 100,
            b"\xff\xfeh\x00i\x00" * 50,
            bytes(5000),
            b"%PDF-1.7\n",
            b"\x89PNG",
        ],
    )
    def test_what_is_no_recording(self, tmp_path: Path, content: bytes) -> None:
        path = write(tmp_path / "x.mp3", content)
        with pytest.raises(AudioError, match="no known audio format") as caught:
            open_audio(path)
        assert str(path) in str(caught.value)

    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        good = write(tmp_path / "x.wav", wav(tone(2.0)))
        film = encode(tmp_path / "x.mkv", "matroska", "flac", [tone(2.0)])
        bad = write(tmp_path / "bad.wav", wav(tone(1.0), bits=0))
        before = len(os.listdir("/dev/fd"))
        for path in (good, film):
            read(path)
            probe(path)
            with open_audio(path) as stream:
                next(iter(stream))
            for options in ({"channel": 2}, {"track": 7}, {"limits": AudioLimits(max_seconds=1)}):
                with pytest.raises(AudioError):
                    open_audio(path, **options)
        with pytest.raises(AudioError):
            open_audio(bad)
        assert len(os.listdir("/dev/fd")) == before
