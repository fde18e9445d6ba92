"""A second run does what is new or changed, and no more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import soundfile
from command import Command, contents, files, record, settle, speech, transcript, without_mlx
from tiny_model import write_tiny_model


@pytest.fixture
def done(command: Command, recordings: Path) -> dict[str, bytes]:
    """Two recordings that are transcribed, with all that is in the folder."""
    record(recordings / "one.wav", 2.0)
    record(recordings / "two/x.flac", 2.0, start=3.0)
    assert command(recordings).code == 0
    return contents(recordings)


class TestWithoutRecognition:
    """MLX is out of reach in these runs, so nothing can have been recognised."""

    @pytest.fixture
    def no_mlx(self, tmp_path: Path) -> dict[str, str]:
        return without_mlx(tmp_path)

    def test_the_trap_works(
        self, command: Command, recordings: Path, no_mlx: dict[str, str]
    ) -> None:
        record(recordings / "one.wav")
        assert command(recordings, env=no_mlx).code == 99

    def test_nothing_to_do(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        ended = command(recordings, env=no_mlx)
        assert (ended.code, ended.out) == (0, "")
        assert ended.err == "nothing to do: 2 done before\n"
        assert contents(recordings) == done

    def test_lost_and_edited_outputs_are_written_again(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        (recordings / "one.srt").unlink()
        (recordings / "one.json").write_bytes(done["one.json"][:100])
        # The same size, and a time that a careless tool would trust.
        text = recordings / "two/x.txt"
        text.write_bytes(done["two/x.txt"].swapcase()[::-1])
        ended = command(recordings, env=no_mlx)
        assert ended.code == 0, ended.err
        assert "2 rendered" in ended.err
        assert contents(recordings) == done

    def test_other_subtitles(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        ended = command(recordings, "--subtitle-style", "plain", "--bom", env=no_mlx)
        assert ended.code == 0, ended.err
        assert "2 rendered" in ended.err
        after = contents(recordings)
        assert after["one.json"] == done["one.json"]
        assert after["one.srt"] != done["one.srt"]
        assert command(recordings, env=no_mlx).code == 0
        assert contents(recordings) == done

    def test_another_format(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        ended = command(recordings, "-f", "srt,json,txt,vtt", env=no_mlx)
        assert ended.code == 0, ended.err
        assert files(recordings) == set(done) | {"one.vtt", "two/x.vtt"}

    def test_fewer_formats_remove_nothing(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        assert command(recordings, "-f", "srt", env=no_mlx).code == 0
        assert contents(recordings) == done

    def test_a_touched_recording(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        os.utime(recordings / "one.wav", (1e9, 1e9))
        ended = command(recordings, env=no_mlx)
        assert (ended.code, ended.err) == (0, "nothing to do: 2 done before\n")

    def test_a_recording_put_back_from_a_copy(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        shutil.copyfile(recordings / "one.wav", recordings / "copy")
        os.replace(recordings / "copy", recordings / "one.wav")
        assert command(recordings, env=no_mlx).code == 0
        assert contents(recordings) == done

    def test_a_recording_younger_than_the_clock_can_tell(
        self, command: Command, recordings: Path, no_mlx: dict[str, str]
    ) -> None:
        os.utime(record(recordings / "one.wav"))
        assert command(recordings).code == 0
        assert command(recordings, env=no_mlx).err == "nothing to do: 1 done before\n"

    def test_settings_that_change_no_output(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
    ) -> None:
        flags = ("--workers", "1", "--batch-seconds", "5", "--order", "newest", "--no-progress")
        assert command(recordings, *flags, env=no_mlx).code == 0

    def test_the_archive_was_moved(
        self,
        command: Command,
        recordings: Path,
        done: dict[str, bytes],
        no_mlx: dict[str, str],
        tmp_path: Path,
    ) -> None:
        recordings.rename(tmp_path / "elsewhere")
        ended = command(tmp_path / "elsewhere", env=no_mlx)
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
