"""A second run does what is new or changed, and no more."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from command import Command, Ended, contents, files, record, settle, speech, transcript, without_mlx
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def transcribed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Two recordings with their outputs and manifest."""
    folder = tmp_path_factory.mktemp("transcribed")
    record(folder / "one.wav", 2.0)
    record(folder / "two/x.flac", 2.0, start=3.0)
    command = Command.with_home(tmp_path_factory.mktemp("user") / "home", model)
    assert command(folder).code == 0
    return folder


@pytest.fixture
def done(transcribed: Path, recordings: Path) -> dict[str, bytes]:
    """Fills `recordings` with what is transcribed, and says what that is."""
    shutil.copytree(transcribed, recordings, dirs_exist_ok=True)
    return contents(recordings)


class TestWithoutRecognition:
    """MLX is out of reach in these runs, so nothing can have been recognised."""

    @pytest.fixture
    def again(self, command: Command, tmp_path: Path) -> Callable[..., Ended]:
        return functools.partial(command, env=without_mlx(tmp_path))

    def test_the_trap_works(self, again: Callable[..., Ended], recordings: Path) -> None:
        record(recordings / "one.wav")
        assert again(recordings).code == 99

    def test_nothing_to_do(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        # As copies, whose content must be compared; and once that has been done.
        for _ in range(2):
            ended = again(recordings)
            assert (ended.code, ended.out) == (0, "")
            assert ended.err == "nothing to do: 2 done before\n"
            assert contents(recordings) == done

    def test_lost_and_edited_outputs_are_written_again(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        (recordings / "one.srt").unlink()
        (recordings / "one.json").write_bytes(done["one.json"][:100])
        same_size = done["two/x.txt"][::-1]
        (recordings / "two/x.txt").write_bytes(same_size)
        ended = again(recordings)
        assert ended.code == 0, ended.err
        assert "2 rendered" in ended.err
        assert contents(recordings) == done

    def test_other_subtitles(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        ended = again(recordings, "--subtitle-style", "plain", "--bom")
        assert ended.code == 0, ended.err
        assert "2 rendered" in ended.err
        after = contents(recordings)
        assert after["one.json"] == done["one.json"]
        assert after["one.srt"] != done["one.srt"]
        assert again(recordings).code == 0
        assert contents(recordings) == done

    def test_another_format(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        ended = again(recordings, "-f", "srt,json,txt,vtt")
        assert ended.code == 0, ended.err
        assert files(recordings) == set(done) | {"one.vtt", "two/x.vtt"}

    def test_fewer_formats_remove_nothing(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        assert again(recordings, "-f", "srt").code == 0
        assert contents(recordings) == done

    def test_a_touched_recording(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        os.utime(recordings / "one.wav", (1e9, 1e9))
        ended = again(recordings)
        assert (ended.code, ended.err) == (0, "nothing to do: 2 done before\n")

    def test_a_recording_younger_than_the_clock_can_tell(
        self, command: Command, again: Callable[..., Ended], recordings: Path
    ) -> None:
        os.utime(record(recordings / "one.wav"))
        assert command(recordings).code == 0
        assert again(recordings).err == "nothing to do: 1 done before\n"

    def test_settings_that_change_no_output(
        self, again: Callable[..., Ended], recordings: Path, done: dict[str, bytes]
    ) -> None:
        flags = ("--workers", "1", "--batch-seconds", "5", "--order", "newest", "--no-progress")
        assert again(recordings, *flags).err == "nothing to do: 2 done before\n"

    def test_the_archive_was_moved(
        self,
        again: Callable[..., Ended],
        recordings: Path,
        done: dict[str, bytes],
        tmp_path: Path,
    ) -> None:
        recordings.rename(tmp_path / "elsewhere")
        ended = again(tmp_path / "elsewhere")
        assert (ended.code, ended.err) == (0, "nothing to do: 2 done before\n")


class TestDoneAgain:
    def test_other_content(
        self, command: Command, recordings: Path, done: dict[str, bytes]
    ) -> None:
        record(recordings / "one.wav", 2.0, start=6.0)
        ended = command(recordings)
        assert ended.code == 0, ended.err
        assert "1 done, 1 skipped" in ended.err
        after = contents(recordings)
        changed = {name for name in done if after[name] != done[name]}
        assert changed == {"one.wav", "one.srt", "one.json", "one.txt"}

    def test_other_settings_of_the_recognition(
        self, command: Command, recordings: Path, done: dict[str, bytes]
    ) -> None:
        ended = command(recordings, "--max-segment", "1")
        assert ended.code == 0, ended.err
        assert "2 done" in ended.err
        assert transcript(recordings / "one.json")["settings"].encode() not in done["one.json"]

    def test_other_weights_under_the_same_name(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "one.wav", 2.0)
        model = write_tiny_model(tmp_path / "model", seed=1)
        assert command(recordings, "--model", model).code == 0
        before = transcript(recordings / "one.json")
        shutil.rmtree(model)
        write_tiny_model(model, seed=2)
        ended = command(recordings, "--model", model)
        assert "1 done" in ended.err
        after = transcript(recordings / "one.json")
        assert after["model"]["weights_sha256"] != before["model"]["weights_sha256"]
        assert after["text"] != before["text"]

    def test_a_renamed_recording(
        self, command: Command, recordings: Path, done: dict[str, bytes]
    ) -> None:
        (recordings / "one.wav").rename(recordings / "uno.wav")
        ended = command(recordings)
        assert ended.code == 0, ended.err
        assert {"uno.srt", "uno.json", "uno.txt"} <= files(recordings)
        old, new = (transcript(recordings / f"{name}.json") for name in ("one", "uno"))
        assert old["segments"] == new["segments"]
        assert new["source"]["path"] == str(recordings / "uno.wav")

    def test_when_asked(self, command: Command, recordings: Path, done: dict[str, bytes]) -> None:
        ended = command(recordings, "--overwrite")
        assert ended.code == 0, ended.err
        assert "2 done" in ended.err

    def test_a_recording_that_failed_and_was_repaired(
        self, command: Command, recordings: Path
    ) -> None:
        (recordings / "one.wav").write_bytes(b"not yet")
        assert command(recordings).code == 1
        assert command(recordings).code == 1
        soundfile.write(recordings / "one.wav", speech(1.5), 16_000)
        settle(recordings / "one.wav")
        ended = command(recordings)
        assert ended.code == 0, ended.err
        assert files(recordings) == {"one.wav", "one.srt", "one.json", "one.txt"}

    def test_the_manifest_was_lost_or_damaged(
        self, command: Command, recordings: Path, done: dict[str, bytes]
    ) -> None:
        manifest = recordings / ".funasr-batch" / "manifest.sqlite3"
        manifest.write_bytes(b"\0" * 100)
        ended = command(recordings)
        assert ended.code == 0
        assert "warning: the manifest was damaged" in ended.err
        manifest.unlink()
        ended = command(recordings)
        assert ended.code == 0
        assert "2 done" in ended.err


class TestParts:
    def test_at_most_so_many_files(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        for number in range(5):
            record(recordings / f"{number}.wav", 1.0, start=number)
        for expected in (2, 4, 5):
            ended = command(recordings, "--max-files", "2", "-f", "txt")
            assert ended.code == 0
            assert len(list(recordings.glob("*.txt"))) == expected
            left = 5 - expected
            assert (f"{left} for the next run" in ended.err) == bool(left)

    def test_stop_at_the_first_failure(self, command: Command, recordings: Path) -> None:
        (recordings / "0.wav").write_bytes(b"broken")
        for number in range(1, 40):
            record(recordings / f"{number:02}.wav", 1.0)
        ended = command(recordings, "--fail-fast", "--workers", "1")
        assert ended.code == 1
        assert "failed: 0.wav: " in ended.err
        assert "for the next run" in ended.err
        assert len(list(recordings.glob("*.srt"))) < 39
        missing = command(recordings, recordings / "missing.wav", "--fail-fast")
        assert missing.code == 1
        assert "40 for the next run" in missing.err
