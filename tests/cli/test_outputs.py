"""What the command writes: which files, where, and what is in them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes, urljoin

import numpy as np
import pysubs2
import pytest
import soundfile
from audio_files import encode
from command import Command, contents, files, record, settle, speech

FORMATS = ("srt", "json", "txt", "vtt", "tsv", "ass", "lrc", "html")


def letters(*texts: str) -> str:
    """Texts without white space: between Chinese characters there is none to keep."""
    return "".join("".join(texts).split())


def outputs(*stems: str, formats: tuple[str, ...] = ("srt", "json", "txt")) -> set[str]:
    return {f"{stem}.{name}" for stem in stems for name in formats}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, dict[str, bytes]]:
    """Recordings of many formats in nested folders, transcribed in all formats; and what the
    recordings held before."""
    root = tmp_path_factory.mktemp("archive")
    for number, name in enumerate(("a.wav", "deep/er/b.flac", "deep/c.ogg", "deep/d.mp3")):
        record(root / name, 2.0, start=number)
    (root / "video").mkdir()
    encode(root / "video" / "e.m4a", "ipod", "aac", [speech(2.0, 5.0)])
    encode(
        root / "video" / "f.MKV", "matroska", "libopus", [speech(2.0, 6.0).repeat(3)], rate=48_000
    )
    before = contents(root)
    command = Command.with_home(tmp_path_factory.mktemp("user") / "home", model)
    ended = command(root, "--format", "all")
    assert (ended.code, ended.out) == (0, ""), ended.err
    return root, before


STEMS = ("a", "deep/er/b", "deep/c", "deep/d", "video/e", "video/f")


class TestArchive:
    def test_each_recording_gets_each_format_beside_it(
        self, archive: tuple[Path, dict[str, bytes]]
    ) -> None:
        root, before = archive
        assert files(root) == set(before) | outputs(*STEMS, formats=FORMATS)

    def test_recordings_are_left_as_they_were(self, archive: tuple[Path, dict[str, bytes]]) -> None:
        root, before = archive
        assert {name: contents(root)[name] for name in before} == before

    @pytest.mark.parametrize("stem", STEMS)
    def test_json_has_the_keys_that_are_promised(
        self, archive: tuple[Path, dict[str, bytes]], stem: str, model: Path
    ) -> None:
        root, before = archive
        document = json.loads((root / f"{stem}.json").read_text("utf-8"))
        [name] = [name for name in before if name.startswith(f"{stem}.")]
        assert set(document) == {
            *("schema_version", "source", "model", "settings", "language", "text", "segments"),
            *("stats", "status", "warnings", "tool"),
        }
        assert document["source"]["path"] == str(root / name)
        assert document["source"]["sha256"] == hashlib.sha256(before[name]).hexdigest()
        assert document["source"]["duration"] == pytest.approx(2.0, abs=0.1)
        assert document["source"]["sample_rate"] in (16_000, 48_000)
        assert document["source"]["channels"] == 1
        assert set(document["model"]) == {"name", "revision", "weights_sha256", "quantization"}
        assert document["model"]["name"] == str(model)
        assert document["tool"]["name"] == "funasr-batch"
        assert document["language"] in ("zh", "en")
        stats = document["stats"]
        assert stats["audio_seconds"] == pytest.approx(2.0, abs=0.1)
        assert stats["rtf"] == pytest.approx(stats["wall_seconds"] / 2.0, abs=0.01)
        assert {"decode", "vad", "features", "encode", "predict/decode", "text"} <= set(
            stats["stages"]
        )
        assert document["text"]
        for segment in document["segments"]:
            assert set(segment) == {"id", "start", "end", "text", "timing", "tokens", "flags"}
            assert 0 <= segment["start"] < segment["end"] <= 2.1
            assert segment["timing"] == "cif"
            for token in segment["tokens"]:
                assert set(token) == {"text", "start", "end", "confidence"}
                assert segment["start"] <= token["start"] <= token["end"] <= segment["end"]
                assert 0 <= token["confidence"] <= 1

    @pytest.mark.parametrize("stem", STEMS)
    def test_all_formats_say_the_same(
        self, archive: tuple[Path, dict[str, bytes]], stem: str
    ) -> None:
        root, _ = archive
        said = letters(json.loads((root / f"{stem}.json").read_text("utf-8"))["text"])
        subtitles = [pysubs2.load(str(root / f"{stem}.{name}")) for name in ("srt", "vtt", "ass")]
        for cues in subtitles:
            assert letters(*(cue.plaintext for cue in cues)) == said
            assert all(0 <= cue.start < cue.end for cue in cues)
        table = [
            line.split("\t") for line in (root / f"{stem}.tsv").read_text("utf-8").splitlines()
        ]
        assert table[0] == ["start", "end", "text"]
        assert letters(*(row[2] for row in table[1:])) == said
        assert letters((root / f"{stem}.txt").read_text("utf-8")) == said
        lines = (root / f"{stem}.lrc").read_text("utf-8").splitlines()[2:]
        assert letters(*(line.partition("]")[2] for line in lines)) == said
        page = (root / f"{stem}.html").read_text("utf-8").partition("<main>")[2]
        words = re.findall("<span[^>]*>([^<]*)</span>", page.partition("</main>")[0])
        assert html.unescape(letters(*words)) == said


class TestNames:
    def test_no_two_recordings_share_an_output(self, command: Command, recordings: Path) -> None:
        names = ("a/x.wav", "b/x.wav", "x.wav", "x.flac", "talk.v1.wav", "talk.v2.wav")
        for number, name in enumerate(names):
            record(recordings / name, 1.0, start=number)
        assert command(recordings).code == 0
        stems = ("a/x", "b/x", "x.wav", "x.flac", "talk.v1", "talk.v2")
        assert files(recordings) == {*names, *outputs(*stems)}
        for name, stem in zip(names, stems, strict=True):
            document = json.loads((recordings / f"{stem}.json").read_text("utf-8"))
            assert document["source"]["path"] == str(recordings / name)

    def test_a_folder_of_their_own_mirrors_the_tree(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        names = {"x.wav", "a/x.wav", "a/b/x.wav"}
        for name in names:
            record(recordings / name, 1.0)
        ended = command(recordings, "-o", "out", "-f", "srt", cwd=tmp_path)
        assert ended.code == 0, ended.err
        assert files(tmp_path / "out") == outputs("x", "a/x", "a/b/x", formats=("srt",))
        assert files(recordings) == names
        assert not (recordings / ".funasr-batch").exists()

    def test_outputs_are_no_inputs(self, command: Command, recordings: Path) -> None:
        record(recordings / "x.wav", 1.0)
        for _ in range(2):
            ended = command(recordings, "-o", recordings / "out", "-f", "json")
            assert ended.code == 0
        assert files(recordings) == {"x.wav", "out/x.json"}
        assert "nothing to do: 1 done before" in ended.err

    @pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
    def test_names_that_break_scripts(self, command: Command, recordings: Path) -> None:
        names = [
            b"two\nlines.wav",
            b"\xff\xfe.wav",
            b"-rf.wav",
            b"%s{0}$(id)`x`.wav",
            "\u202eright to left\t.wav".encode(),
            b"trailing .wav",
            b"n" * 251 + b".wav",
            "语音 [red]bold[/].wav".encode(),
        ]
        for name in names:
            record(recordings / os.fsdecode(name), 1.0)
        ended = command(recordings, "-f", "json,srt")
        assert (ended.code, ended.out) == (0, ""), ended.err
        written = {os.fsencode(name) for name in files(recordings)} - set(names)
        for name in names:
            stem = name[:-4]
            found = [other for other in written if other.startswith(stem[:200])]
            assert sorted(os.path.splitext(other)[1] for other in found) == [b".json", b".srt"]
            [path] = [other for other in found if other.endswith(b".json")]
            source = json.loads((recordings / os.fsdecode(path)).read_bytes())["source"]
            shown = base64.b64decode(source["path_base64"]) if b"\xff" in name else None
            assert (shown or source["path"].encode()) == os.fsencode(recordings) + b"/" + name
        # Nothing in the log can move the cursor or pretend to be another line.
        lines = ended.err.split("\n")
        assert sum(" done " in line for line in lines) == len(names)
        assert all(line.isprintable() for line in lines)
        again = command("--", "-rf.wav", cwd=recordings)
        assert again.code == 0, again.err


class TestPages:
    @pytest.mark.parametrize("flags", [(), ("-o", "out"), ("-o", "recordings/x/y")], ids=str)
    def test_a_page_finds_its_recording(
        self, command: Command, recordings: Path, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        names = ("a b/50% #1?&'\"<.wav", "\u202e语音:x.wav", "talk.flac")
        for name in names:
            record(recordings / name, 1.0)
        ended = command(recordings, *flags, "-f", "html", cwd=tmp_path)
        assert ended.code == 0, ended.err
        found = set()
        for page in tmp_path.rglob("*.html"):
            link = re.search('<audio[^>]* src="([^"]*)"', page.read_text("utf-8"))
            assert link is not None
            address = urljoin(page.as_uri(), html.unescape(link[1]))
            found.add(os.fsdecode(unquote_to_bytes(address.removeprefix("file://"))))
        assert found == {str(recordings / name) for name in names}


class TestSubtitleOptions:
    def test_byte_order_mark_only_when_asked(self, command: Command, recordings: Path) -> None:
        record(recordings / "x.wav", 2.0)
        marks = {}
        for flags in ((), ("--bom",)):
            assert command(recordings, *flags, "-f", "srt,json").code == 0
            for name in ("srt", "json"):
                head = (recordings / f"x.{name}").read_bytes()[:3]
                marks[flags, name] = head == b"\xef\xbb\xbf"
        assert marks == {((), "srt"): False, ((), "json"): False} | {
            (("--bom",), "srt"): True,
            (("--bom",), "json"): False,
        }

    def test_limits_of_the_style_are_kept(self, command: Command, recordings: Path) -> None:
        record(recordings / "x.wav", 12.0)
        flags = ("--max-line-width", "8", "--max-line-count", "1", "--subtitle-style", "netflix-zh")
        assert command(recordings, *flags).code == 0
        cues = pysubs2.load(str(recordings / "x.srt"))
        assert len(cues) > 2
        for cue in cues:
            [line] = cue.plaintext.split("\n")
            assert sum(1.0 if char >= "\u4e00" else 0.5 for char in line) <= 8

    @pytest.mark.parametrize(
        "flags",
        [
            ("--min-duration", "60", "--min-gap", "10"),
            ("--max-duration", "0.1", "--max-cps", "1", "--subtitle-style", "bbc"),
            ("--max-line-width", "4", "--max-line-count", "10", "--min-gap", "0"),
        ],
        ids=str,
    )
    def test_extreme_limits_still_give_valid_subtitles(
        self, command: Command, recordings: Path, flags: tuple[str, ...]
    ) -> None:
        record(recordings / "x.wav", 12.0)
        ended = command(recordings, *flags, "-f", "srt,vtt,json")
        assert ended.code == 0, ended.err
        said = letters(json.loads((recordings / "x.json").read_text("utf-8"))["text"])
        for name in ("srt", "vtt"):
            cues = pysubs2.load(str(recordings / f"x.{name}"))
            assert letters(*(cue.plaintext for cue in cues)) == said
            assert all(cue.start < cue.end for cue in cues)
            ends = [cue.end for cue in cues]
            assert all(end <= cue.start for end, cue in zip(ends, cues[1:], strict=False))


def test_silence_gives_valid_empty_outputs(command: Command, recordings: Path) -> None:
    soundfile.write(recordings / "quiet.wav", np.zeros(32_000, np.float32), 16_000)
    settle(recordings / "quiet.wav")
    ended = command(recordings, "--format", "all")
    assert ended.code == 0, ended.err
    assert "no speech" in ended.err
    assert json.loads((recordings / "quiet.json").read_bytes())["status"] == "no_speech"
    assert (recordings / "quiet.srt").read_bytes() == b""
    assert (recordings / "quiet.vtt").read_bytes() == b"WEBVTT\n"
    assert (recordings / "quiet.txt").read_bytes() == b""
