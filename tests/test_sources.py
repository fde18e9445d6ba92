"""What is found, what is left out and why, and where outputs go."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import NoInputError, UsageError
from funasr_batch.output_names import MAX_NAME_BYTES, output_paths
from funasr_batch.settings import FORMATS, Settings
from funasr_batch.sources import SourceList, expand_pattern, find_sources, read_list


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    folder = tmp_path / "tree"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@contextmanager
def unprivileged(folder: str) -> Iterator[None]:
    """Makes `folder` belong to a user who may not read everything, and acts as that user."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def make(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))


def find(*paths: str, from_file: str | None = None, **settings: Any) -> SourceList:
    return find_sources(paths, Settings(**settings), from_file=from_file)


def names(found: SourceList) -> list[str]:
    """The paths of the sources below the current folder."""
    return [os.path.relpath(source.path) for source in found.sources]


def outputs(found: SourceList, base: str = ".") -> dict[str, str]:
    return {
        os.path.relpath(source.path): os.path.relpath(source.output, base)
        for source in found.sources
    }


def reasons(omissions: tuple[Any, ...]) -> dict[str, str]:
    return {os.path.relpath(omission.path): omission.reason for omission in omissions}


# --- What is found


def test_a_folder_is_walked_in_order(tree: Path) -> None:
    make("b.wav", "a/z.MP3", "a/b/c.Opus", "a.flac", "notes.md", "a/cover.jpg")
    assert names(find(".")) == ["a/b/c.Opus", "a/z.MP3", "a.flac", "b.wav"]


def test_a_source_knows_its_place(tree: Path) -> None:
    make("rec/a/x.wav")
    (source,) = find("rec").sources
    info = os.stat("rec/a/x.wav")
    assert source.path == tree / "rec/a/x.wav"
    assert source.root == tree / "rec"
    assert source.relative == PurePath("a/x.wav")
    assert source.output == tree / "rec/a/x"
    assert (source.size, source.mtime_ns, source.inode) == (
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
    )
    (named,) = find("rec/a/x.wav").sources
    assert (named.root, named.relative) == (tree / "rec/a", PurePath("x.wav"))


def test_hidden_names_state_and_own_outputs_are_no_inputs(tree: Path) -> None:
    make("x.wav", ".y.wav", "._x.wav", ".hidden/z.wav", ".funasr-batch/q.wav")
    make(*(f"x.{suffix}" for suffix in FORMATS), "x.wav.json", ".funasr-0123456789abcdef.tmp")
    assert names(find(".")) == ["x.wav"]
    assert find(".").skipped == ()


def test_a_named_file_is_taken_whatever_its_suffix_but_not_a_transcript(tree: Path) -> None:
    make("x.wav", "call.2024", "raw", "x.srt", "x.json", "._x.wav", "funasr-batch.yaml")
    found = find(*sorted(os.listdir(".")))
    assert names(found) == ["call.2024", "raw", "x.wav"]
    assert outputs(found) == {"call.2024": "call.2024", "raw": "raw", "x.wav": "x"}
    assert reasons(found.skipped) == {
        "._x.wav": "a hidden file",
        "funasr-batch.yaml": "a configuration file",
        "x.json": "a transcript, not a recording",
        "x.srt": "a transcript, not a recording",
    }


def test_without_recursion_only_the_folder_itself_counts(tree: Path) -> None:
    make("a/x.wav", "y.wav")
    assert names(find(".", recursive=False)) == ["y.wav"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*.wav", (), ["a/x.wav", "b/x.wav", "b/y.wav"]),
        ("a", (), ["a/x.mp3", "a/x.wav"]),
        (["a/*", "y.*"], (), ["a/x.mp3", "a/x.wav", "b/y.wav"]),
        ((), "b", ["a/x.mp3", "a/x.wav"]),
        ((), ["a/*.mp3", "y.wav"], ["a/x.wav", "b/x.wav"]),
        ("x.*", "/b", ["a/x.mp3", "a/x.wav"]),
        ((), "tree", ["a/x.mp3", "a/x.wav", "b/x.wav", "b/y.wav"]),
    ],
)
def test_filters(tree: Path, include: Any, exclude: Any, expected: list[str]) -> None:
    make("a/x.wav", "a/x.mp3", "b/x.wav", "b/y.wav")
    assert names(find(".", include=include, exclude=exclude)) == expected


def test_filters_hold_for_named_files_too(tree: Path) -> None:
    make("a.wav", "draft-b.wav")
    assert names(find("a.wav", "draft-b.wav", exclude="draft-*")) == ["a.wav"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("name", ["a.wav", "b.wav", "c.wav"]),
        ("newest", ["c.wav", "a.wav", "b.wav"]),
        ("oldest", ["a.wav", "b.wav", "c.wav"]),
        ("shortest", ["b.wav", "a.wav", "c.wav"]),
    ],
)
def test_order(tree: Path, order: str, expected: list[str]) -> None:
    for name, size, time in (("c.wav", 9, 30), ("b.wav", 1, 20), ("a.wav", 5, 20)):
        Path(name).write_bytes(bytes(size))
        os.utime(name, (time, time))
    assert names(find("c.wav", ".", order=order)) == expected


def test_every_file_counts_once(tree: Path) -> None:
    make("a.wav", "b/c.wav")
    os.link("a.wav", "hard.wav")
    os.symlink("b/c.wav", "soft.wav")
    found = find("b", "a.wav", ".", "./a.wav", "b/../a.wav", str(tree))
    assert names(found) == ["a.wav", "b/c.wav"]
    assert reasons(found.skipped) == {
        "hard.wav": f"the same file as {tree}/a.wav",
        "soft.wav": f"the same file as {tree}/b/c.wav",
    }
    assert found.failed == ()


def test_links_to_files_are_followed_and_links_to_folders_are_not(
    tree: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.bin").write_bytes(b"x")
    os.symlink(outside / "x.bin", "linked.wav")
    os.symlink(outside, "folder")
    os.symlink(tree, "loop")
    os.symlink(tree, "loop.wav")
    make("inner/y.wav")
    os.symlink("..", "inner/up")
    found = find(".")
    assert names(found) == ["inner/y.wav", "linked.wav"]
    assert found.sources[1].output == tree / "linked"
    assert set(reasons(found.skipped)) == {"folder", "loop", "loop.wav", "inner/up"}
    assert names(find("loop/inner")) == ["loop/inner/y.wav"]


def test_what_is_no_file_is_skipped_without_opening_it(tree: Path) -> None:
    make("dir.wav/x.wav")
    os.mkfifo("pipe.wav")
    os.symlink("/dev/zero", "zero.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.wav")
        found = find(".", "pipe.wav")
    assert names(found) == ["dir.wav/x.wav"]
    assert [(str(o.path.name), o.reason) for o in found.skipped] == [
        ("pipe.wav", "a pipe"),
        ("s.wav", "a socket"),
        ("zero.wav", "a device"),
        ("pipe.wav", "a pipe"),
    ]


def test_what_is_out_of_reach_fails_and_the_rest_goes_on(tree: Path) -> None:
    make("x.wav", "x.srt")
    os.symlink("nowhere", "dangling.wav")
    os.symlink("nowhere", "dangling.md")
    os.symlink("self.wav", "self.wav")
    found = find(".", "missing.wav", "dangling.md", "x.wav/y", "none/*.wav", "", "n\0ul", "a" * 300)
    assert names(found) == ["x.wav"]
    assert reasons(found.failed) == {
        "dangling.wav": "a link that leads nowhere",
        "self.wav": "too many levels of symbolic links",
        "missing.wav": "does not exist",
        "dangling.md": "a link that leads nowhere",
        "x.wav/y": "does not exist",
        "none/*.wav": "nothing matches this pattern",
        ".": "an empty path",
        "n\0ul": "not the path of a file",
        "a" * 300: "file name too long",
    }


def test_a_folder_that_cannot_be_read_fails_and_the_rest_goes_on() -> None:
    with tempfile.TemporaryDirectory() as name, unprivileged(name):
        folder = Path(name)
        make(f"{folder}/ok/x.wav", f"{folder}/closed/y.wav")
        (folder / "closed").chmod(0)
        found = find(name)
        (folder / "closed").chmod(0o700)
    assert [source.relative for source in found.sources] == [PurePath("ok/x.wav")]
    assert [(o.path, o.reason) for o in found.failed] == [(folder / "closed", "permission denied")]


def test_a_path_too_deep_for_the_system_fails_and_the_rest_goes_on(tree: Path) -> None:
    make("x.wav")
    here = os.open(".", os.O_RDONLY)
    inner = here
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=inner)
        inner, outer = os.open("d" * 200, os.O_RDONLY, dir_fd=inner), inner
        if outer != here:
            os.close(outer)
    os.close(inner)
    found = find(".")
    assert names(found) == ["x.wav"]
    assert [omission.reason for omission in found.failed] == ["file name too long"]
    subprocess.run(["rm", "-rf", "d" * 200], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "new\nline.wav",
        "tab\t.wav",
        "raw\udcff\udcfe.wav",
        "-rf.wav",
        "%s{0}$(id).wav",
        "right\u202eleft.wav",
        "space .wav",
        "dot..wav",
        "concat:a|b.wav",
        "n" * 251 + ".wav",
        "字" * 83 + ".wav",
        "[x].wav",
        "*.wav",
    ],
)
def test_any_name_works(tree: Path, name: str) -> None:
    make(name)
    for found in (find("."), find(name), find(str(tree / name))):
        (source,) = found.sources
        assert source.path == tree / name
        assert source.path.read_bytes() == os.fsencode(name)
        source.output.with_name(source.output.name + ".json").write_text("{}")
        assert source.output.parent == tree


# --- Patterns and lists


def test_a_pattern_that_the_shell_did_not_expand(tree: Path) -> None:
    make("a/1.wav", "a/2.wav", "a/.3.wav", "b/1.wav", "b/c/1.wav", "b/note.bin", ".h/1.wav")
    os.symlink("..", "b/loop")
    assert names(find("a/*.wav")) == ["a/1.wav", "a/2.wav"]
    assert names(find("*/1.wav")) == ["a/1.wav", "b/1.wav"]
    assert names(find("**/1.wav")) == ["a/1.wav", "b/1.wav", "b/c/1.wav"]
    assert names(find("b/**/1.wav")) == ["b/1.wav", "b/c/1.wav"]
    assert names(find(f"{tree}/[ab]/[!2].wav")) == ["a/1.wav", "b/1.wav"]
    assert names(find("[b]")) == ["b/1.wav", "b/c/1.wav"]
    assert names(find("b/n*")) == ["b/note.bin"]
    assert expand_pattern(".?/*") == [".h/1.wav"]
    assert expand_pattern("nothing/*") == []


def test_a_name_with_brackets_is_no_pattern(tree: Path) -> None:
    make("talk[1].wav", "talk1.wav")
    assert names(find("talk[1].wav")) == ["talk[1].wav"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a.wav\nb.wav\n", ("a.wav", "b.wav")),
        (b"a.wav\r\n\r\n b.wav", ("a.wav", " b.wav")),
        (b"\xef\xbb\xbfa.wav", ("a.wav",)),
        (b"a\n.wav\0b.wav\r\0", ("a\n.wav", "b.wav\r")),
        (b"\xff.wav\n#x", ("\udcff.wav", "#x")),
        (b"", ()),
    ],
)
def test_a_list_is_lines_or_ended_by_nul(
    tree: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, expected: tuple[str, ...]
) -> None:
    Path("list").write_bytes(data)
    assert read_list("list") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_list("-") == expected


def test_a_list_adds_to_the_paths_and_is_taken_literally(tree: Path) -> None:
    make("a/*.wav", "a/x.wav", "b/y.wav", "c.wav")
    Path("list").write_bytes(b"a/*.wav\nb\nmissing/*.wav\n")
    found = find("c.wav", from_file="list")
    assert names(found) == ["a/*.wav", "b/y.wav", "c.wav"]
    assert reasons(found.failed) == {"missing/*.wav": "does not exist"}


def test_a_list_that_cannot_be_read_is_an_error_of_usage(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="'nothing': No such file"):
        find("x", from_file="nothing")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        find(from_file="-")


# --- Nothing found


def test_nothing_found_says_why(tree: Path) -> None:
    make("a/x.wav", "b/x.md", "x.srt", "empty")
    Path("empty").write_bytes(b"")
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        (("b",), {}, f"no recording found in {tree}/b"),
        (("nope.wav", "neither"), {}, rf"{tree}/nope.wav: does not exist \(and 1 more\)"),
        (("x.srt",), {}, "x.srt: a transcript"),
        (("*.mp3",), {}, "nothing matches this pattern"),
        (("a",), {"exclude": "*.wav"}, "--include and --exclude leave none"),
        (("a", "b"), {"exclude": "x.*"}, "--include and --exclude leave none"),
        ((), {"from_file": "empty"}, "the list of paths is empty"),
    ]
    for paths, options, message in cases:
        with pytest.raises(NoInputError, match=message):
            find(*paths, **options)


# --- Where outputs go


def test_the_tree_is_mirrored_below_the_output_folder(tree: Path) -> None:
    make("rec/a/x.wav", "rec/y.wav")
    found = find("rec", output_dir="out")
    assert outputs(found, "out") == {"rec/a/x.wav": "a/x", "rec/y.wav": "y"}
    assert outputs(find("rec/a/x.wav", output_dir="out"), "out") == {"rec/a/x.wav": "x"}


def test_several_roots_are_mirrored_below_what_they_have_in_common(tree: Path) -> None:
    make("2023/calls/x.wav", "2024/calls/x.wav", "2024/calls/in/y.wav")
    expected = {
        "2023/calls/x.wav": "2023/calls/x",
        "2024/calls/in/y.wav": "2024/calls/in/y",
        "2024/calls/x.wav": "2024/calls/x",
    }
    assert outputs(find("2023/calls", "2024/calls", output_dir="out"), "out") == expected
    assert outputs(find("2024/calls", "2023/calls", output_dir="out"), "out") == expected
    named = find("2023/calls/x.wav", "2024/calls", "2024/calls/in", output_dir="out")
    assert outputs(named, "out") == expected


def test_a_root_that_is_missing_tonight_moves_no_transcript(tree: Path) -> None:
    make("disk/a/x.wav", "disk/b/y.wav")
    both = outputs(find("disk/a", "disk/b", output_dir="out"), "out")
    os.rename("disk/b", "gone")
    one = outputs(find("disk/a", "disk/b", output_dir="out"), "out")
    assert one == {"disk/a/x.wav": both["disk/a/x.wav"]}


def test_an_output_folder_among_the_inputs_is_not_read(tree: Path) -> None:
    make("rec/x.wav", "rec/out/x.wav", "rec/more/out/x.wav")
    found = find("rec", output_dir="rec/out")
    assert names(found) == ["rec/more/out/x.wav", "rec/x.wav"]
    assert reasons(found.skipped) == {"rec/out": "the output folder"}
    assert len(find("rec", output_dir="rec").sources) == 3
    os.symlink("rec/out", "link")
    assert len(find("rec", output_dir="link").sources) == 2


def test_six_names_that_collide_in_other_tools(tree: Path) -> None:
    make("a/x.wav", "b/x.wav", "x.wav", "x.flac", "talk.v1.wav", "talk.v2.wav")
    expected = {
        "a/x.wav": "a/x",
        "b/x.wav": "b/x",
        "x.wav": "x.wav",
        "x.flac": "x.flac",
        "talk.v1.wav": "talk.v1",
        "talk.v2.wav": "talk.v2",
    }
    assert outputs(find(".")) == expected
    assert outputs(find(".", output_dir="../out"), "../out") == expected
    assert outputs(find("x.flac")) == {"x.flac": "x"}


def test_a_full_name_gives_way_to_no_stem(tree: Path) -> None:
    make("x.wav", "x.flac", "x.wav.flac")
    assert outputs(find(".")) == {name: name for name in ("x.wav", "x.flac", "x.wav.flac")}


def test_twins_by_case_and_by_normalisation_differ_everywhere(tree: Path) -> None:
    twins = ["Talk.wav", "talk.wav", unicodedata.normalize("NFD", "café.wav"), "café.wav"]
    found = {Path(path).name for path in output_paths([("/r", name) for name in twins])}
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found}) == 4
    make(*twins)
    if len(os.listdir(".")) == 4:  # not on a Mac
        written = {source.output.name for source in find(".").sources}
        assert len({unicodedata.normalize("NFC", name).casefold() for name in written}) == 4


def test_two_paths_to_one_folder_share_its_names(tree: Path) -> None:
    make("real/x.wav", "real/x.flac")
    os.symlink("real", "link")
    assert outputs(find("real/x.wav", "link/x.flac")) == {
        "link/x.flac": "link/x.flac",
        "real/x.wav": "real/x.wav",
    }


FILE_NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(
            ["x", "X", "é", "e\u0301", "x.wav", "\udcff", "y" * 249, "Y" * 249, "ß", "ss"]
        ),
        st.sampled_from([".wav", ".WAV", ".flac", ".wav.flac", "", ".bin"]),
    ),
)
FOLDERS = st.sampled_from(["/nowhere/a", "/nowhere/A", "/nowhere/b"])


@given(st.lists(st.tuples(FOLDERS, FILE_NAMES), unique=True), st.randoms())
def test_no_two_recordings_share_an_output(recordings: list[tuple[str, str]], random: Any) -> None:
    paths = output_paths(recordings)
    folded = {unicodedata.normalize("NFC", path.casefold()) for path in paths}
    assert len(folded) == len(recordings)
    for (folder, _), path in zip(recordings, paths, strict=True):
        assert os.path.dirname(path) == folder
        assert len(os.fsencode(os.path.basename(path))) <= MAX_NAME_BYTES
    shuffled = random.sample(range(len(recordings)), len(recordings))
    again = output_paths([recordings[i] for i in shuffled])
    assert again == [paths[i] for i in shuffled]


def test_a_walk_asks_the_file_system_once_for_each_recording(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must stay fast with 100,000 recordings: no system call for each beside one stat."""
    make(*(f"{folder}/{i}.wav" for folder in "ab" for i in range(20)))
    calls: list[str] = []
    for name in ("stat", "lstat", "scandir"):
        real = getattr(os, name)

        def counted(*arguments: Any, name: str = name, real: Any = real, **more: Any) -> Any:
            calls.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, counted)
    assert len(find(".").sources) == 40
    assert calls.count("scandir") == 3
    assert len(calls) < 40
