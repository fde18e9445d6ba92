"""`funasr-batch lint`: subtitles of ours and of others against the norms."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from command import PROJECT, Command, without_mlx

GOOD = "1\n00:00:01,000 --> 00:00:03,000\nHello there.\n\n"
WIDE = GOOD.replace("Hello there.", "x" * 43)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Subtitles beside other files."""
    (tmp_path / "subtitles" / "deep").mkdir(parents=True)
    (tmp_path / "subtitles" / ".hidden").mkdir()
    for name, content in {
        "good.srt": GOOD,
        "deep/wide.SRT": WIDE,
        "deep/good.vtt": "WEBVTT\n\n" + GOOD.replace(",", "."),
        "deep/notes.txt": "no subtitles",
        ".hidden/wide.srt": WIDE,
        "._good.srt": "junk",
    }.items():
        (tmp_path / "subtitles" / name).write_text(content, encoding="utf-8")
    return tmp_path / "subtitles"


def test_a_table_of_files_and_rules(command: Command, folder: Path) -> None:
    ended = command("lint", "good.srt", "deep", cwd=folder)
    assert (ended.code, ended.err) == (0, "")
    assert [line.split() for line in ended.out.splitlines()] == [
        ["file", "cues", "width", "speed", "all"],
        ["good.srt", "1", "0", "0", "0"],
        ["deep/good.vtt", "1", "0", "0", "0"],
        ["deep/wide.SRT", "1", "1", "1", "2"],
        ["3", "files", "3", "1", "1", "2"],
        ["per", "100", "cues", "33.3", "33.3", "66.7"],
        ["-v", "lists", "each", "violation"],
    ]


def test_each_violation_with_its_place(command: Command, folder: Path) -> None:
    ended = command("lint", "-v", "deep/wide.SRT", cwd=folder)
    assert ended.out.splitlines()[:2] == [
        "deep/wide.SRT:2: width: cue 1: a line of 43; at most 42 in netflix-en",
        "deep/wide.SRT:2: speed: cue 1: 21.5 characters a second; at most 20 in netflix-en",
    ]


def test_strict_is_for_scripts(command: Command, folder: Path) -> None:
    assert command("lint", "--strict", folder / "good.srt").code == 0
    assert command("lint", "--strict", folder).code == 1
    assert command("lint", folder).code == 0


def test_the_norms_can_be_chosen(command: Command, folder: Path) -> None:
    wide = folder / "deep" / "wide.SRT"
    assert command("lint", "--strict", wide, "--max-line-width", "43", "--max-cps", "22").code == 0
    assert command("lint", "--strict", wide, "--style", "netflix-en").code == 1
    assert command("lint", "--strict", folder / "good.srt", "--style", "bbc").code == 0
    assert command("lint", "--strict", folder / "good.srt", "--min-duration", "3").code == 1


def test_json(command: Command, folder: Path) -> None:
    ended = command("lint", "--json", folder)
    document = json.loads(ended.out)
    assert document["total"] == {"files": 3, "cues": 3, "counts": {"width": 1, "speed": 1}}
    [wide] = [file for file in document["files"] if file["counts"]]
    assert wide["path"] == str(folder / "deep" / "wide.SRT")
    assert wide["violations"][0] == {
        "rule": "width",
        "line": 2,
        "cue": 1,
        "message": "a line of 43; at most 42 in netflix-en",
    }
    assert document["failed"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "required: FILE"),
        (("--style", "mine", "x.srt"), 2, "--style"),
        (("--max-cps", "0", "x.srt"), 2, "max_cps must be a number from 1 to 1000"),
        (("notes.doc",), 2, "notes.doc: not a folder, nor a .srt or .vtt file"),
        ((".",), 3, "no .srt or .vtt file"),
        (("gone.srt",), 1, ""),
    ],
)
def test_what_is_wrong_is_said(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended = command("lint", *arguments, cwd=tmp_path)
    assert ended.code == code
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_checked(
    command: Command, folder: Path
) -> None:
    ended = command("lint", folder / "good.srt", folder / "gone.srt")
    assert ended.code == 1
    assert f"cannot be read: {folder / 'gone.srt'}: No such file" in ended.out
    assert f"{folder / 'good.srt'}" in ended.out


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_names_that_are_not_text(command: Command, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\x1b[31m\n.srt")
    (tmp_path / name).write_text(WIDE)
    for flags in ((), ("-v",), ("--json",)):
        ended = command("lint", *flags, tmp_path)
        assert ended.code == 0, ended.err
        assert "\x1b" not in ended.out
    assert json.loads(ended.out)["total"]["files"] == 1


def test_it_does_not_load_mlx(command: Command, folder: Path, tmp_path: Path) -> None:
    assert command("lint", folder, env=without_mlx(tmp_path)).code == 0


def test_a_folder_of_that_name_can_be_given(command: Command, tmp_path: Path) -> None:
    (tmp_path / "lint").mkdir()
    assert command("./lint", cwd=tmp_path).code == 3  # no recording in it


def test_our_own_subtitles_keep_the_norms(command: Command, tmp_path: Path) -> None:
    """All of sample_audio, in the style of each recording's script.

    Only a width may be off: the linter judges each cue by its own script, and a Chinese cue of a
    recording that was laid out as English may have more than 16 characters a line.
    """
    flags = ("--model", "sample-paraformer", "-f", "srt,vtt", "-o", tmp_path)
    assert command(PROJECT / "sample_audio", *flags).code == 0
    document = json.loads(command("lint", "--json", tmp_path).out)
    assert document["total"]["files"] == 12
    assert document["total"]["cues"] > 60
    excused = ("phone_8khz.srt", "phone_8khz.vtt")
    for file in document["files"]:
        allowed = {"width"} if Path(file["path"]).name in excused else set()
        assert set(file["counts"]) <= allowed, file["violations"]
