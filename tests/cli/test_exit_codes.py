"""Each exit code, what brings it about, and what the user is told."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from command import (
    ALONE,
    TIMEOUT,
    Command,
    comparable,
    files,
    is_tool,
    record,
    transcript,
    without_mlx,
)

from funasr_batch.run.storage import lock_output


def complaint(err: str) -> list[str]:
    """What the command has to say, with the hint last, which must be all."""
    first, *hints = err.splitlines()
    assert first.startswith("funasr-batch: "), err
    assert all(hint.startswith("hint: ") for hint in hints), err
    return [line.partition(": ")[2] for line in (first, *hints)]


class TestSomeFailed:
    def test_a_broken_file_costs_itself_and_is_named_with_its_reason(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        record(recordings / "z.wav")
        (recordings / "empty.mp3").touch()
        (recordings / "text.wav").write_text("not a recording\n")
        (recordings / "cut.flac").write_bytes(record(recordings / "x.flac").read_bytes()[:50])
        (recordings / "x.flac").unlink()
        ended = command(recordings)
        assert (ended.code, ended.out) == (1, "")
        assert {"a.srt", "z.srt"} <= files(recordings)
        failures = [line for line in ended.err.splitlines() if line.startswith("failed: ")]
        assert [line.split(": ")[1] for line in sorted(failures)] == [
            "cut.flac",
            "empty.mp3",
            "text.wav",
        ]
        for line in failures:
            assert str(recordings) not in line, "the file is named once"
            reason, _, advice = line.split(": ", 2)[2].partition(". ")
            assert reason
            assert advice
            assert advice.endswith(".")

    def test_a_missing_path_beside_one_that_is_there(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        ended = command(recordings / "a.wav", recordings / "b.wav", recordings / "c*.wav")
        assert ended.code == 1
        assert f"failed: {recordings}/b.wav: does not exist" in ended.err
        assert f"failed: {recordings}/c*.wav: nothing matches this pattern" in ended.err
        assert "a.srt" in files(recordings)

    def test_recordings_of_several_folders_are_told_apart(
        self, command: Command, recordings: Path
    ) -> None:
        for name in ("one/x.wav", "two/x.wav"):
            (recordings / name).parent.mkdir()
            (recordings / name).write_text("broken")
        ended = command(recordings / "one", recordings / "two")
        assert ended.code == 1
        assert "failed: one/x.wav: " in ended.err
        assert "failed: two/x.wav: " in ended.err

    def test_a_recording_that_lost_its_end_is_kept_and_reported(
        self, command: Command, recordings: Path
    ) -> None:
        whole = record(recordings / "x.wav", 4.0).read_bytes()
        (recordings / "x.wav").write_bytes(whole[: len(whole) // 2])
        ended = command(recordings)
        assert ended.code == 1
        assert "partial: x.wav: " in ended.err
        assert transcript(recordings / "x.json")["status"] == "partial"

    def test_an_unreadable_file(
        self, command: Command, recordings: Path, tmp_path: Path, stranger: tuple[str, ...]
    ) -> None:
        record(recordings / "a.wav")
        record(recordings / "secret.wav").chmod(0)
        ended = command(recordings, "-o", tmp_path / "out", prefix=stranger)
        assert ended.code == 1, ended.err
        assert "failed: secret.wav: may not be read. Check the permissions" in ended.err
        assert "a.srt" in files(tmp_path / "out")


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "lines"),
        [
            (
                [],
                ["no input: name a file or a folder", "funasr-batch --help shows all options"],
            ),
            (["--modle", "x", "y"], ["unknown option '--modle'", "did you mean --model?"]),
            (
                ["x", "--max-segment", "0.5"],
                [
                    "argument --max-segment: must be a number from 1 to 60, not '0.5'",
                    "funasr-batch --help shows all options",
                ],
            ),
            (
                ["status", "here"],
                [
                    "the command 'status' is not in this version",
                    "A folder of that name is given as ./status",
                ],
            ),
            (["doctor", "--json"], ["doctor takes no arguments, not '--json'"]),
            (
                ["x", "--config", "nowhere.yaml"],
                ["cannot read configuration nowhere.yaml: No such file or directory"],
            ),
            (
                ["--from-file", "nowhere"],
                ["cannot read the list of inputs 'nowhere': No such file or directory"],
            ),
            (
                ["x", "--min-duration", "8", "--max-duration", "2"],
                ["min_duration 8 (--min-duration) is more than max_duration 2 (--max-duration)"],
            ),
        ],
        ids=lambda value: " ".join(value[:2]) or "nothing",
    )
    def test_wrong_arguments(
        self, command: Command, arguments: list[str], lines: list[str]
    ) -> None:
        ended = command(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert complaint(ended.err) == lines

    def test_an_unknown_key_in_a_configuration(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        (recordings / "funasr-batch.yaml").write_text("language: zh\nmax-segmnt: 20\n")
        ended = command(recordings)
        assert ended.code == 2
        assert complaint(ended.err) == [
            f"{recordings}/funasr-batch.yaml line 2: unknown key 'max_segmnt'",
            "did you mean max_segment?",
        ]

    def test_the_configuration_among_the_inputs_may_not_say_where_to_write(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "a.wav")
        (recordings / "funasr-batch.yaml").write_text(f"output_dir: {tmp_path}/stolen\n")
        ended = command(recordings)
        assert ended.code == 2
        assert "output_dir may not be set by funasr-batch.yaml" in ended.err
        assert not (tmp_path / "stolen").exists()

    def test_the_output_folder_is_a_file(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "a.wav")
        (tmp_path / "out").touch()
        ended = command(recordings, "-o", tmp_path / "out")
        assert ended.code == 2
        assert complaint(ended.err) == [
            f"{tmp_path}/out is not a folder",
            "Choose another folder with -o.",
        ]

    def test_the_manifest_of_a_newer_version(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "a.wav")
        (recordings / ".funasr-batch").mkdir()
        manifest = recordings / ".funasr-batch" / "manifest.sqlite3"
        with sqlite3.connect(manifest) as connection:
            connection.execute("PRAGMA user_version = 999")
        connection.close()
        ended = command(recordings)
        assert ended.code == 2
        assert "newer version" in ended.err
        assert files(recordings) == {"a.wav"}


class TestNoInput:
    def test_an_empty_folder(self, command: Command, recordings: Path) -> None:
        ended = command(recordings)
        assert ended.code == 3
        first, advice = complaint(ended.err)
        assert first == f"no recording found in {recordings}"
        assert advice

    def test_a_missing_path(self, command: Command, tmp_path: Path) -> None:
        ended = command(tmp_path / "nowhere")
        assert ended.code == 3
        assert complaint(ended.err) == [f"no recording found: {tmp_path}/nowhere: does not exist"]

    def test_a_filter_that_leaves_nothing(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        ended = command(recordings, "--include", "*.mp3")
        assert ended.code == 3
        assert "--include and --exclude leave none" in ended.err

    def test_an_empty_list(self, command: Command) -> None:
        ended = command("--from-file", "-")
        assert ended.code == 3
        assert complaint(ended.err) == ["no input: the list of paths is empty"]


class TestModel:
    def test_a_name_that_no_model_has(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        ended = command(recordings, "--model", "parafomer")
        assert ended.code == 4
        first, advice = complaint(ended.err)
        assert first == "there is no model and no folder named 'parafomer'"
        assert "paraformer" in advice

    def test_weights_that_are_not_here_and_cannot_be_fetched(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        ended = command(recordings, "--model", "paraformer", "--offline")
        assert ended.code == 4
        first, advice = complaint(ended.err)
        assert first == (
            "the model funasr/paraformer-zh is not on this machine, and no network may be used"
        )
        assert "hf download funasr/paraformer-zh" in advice
        assert "models--funasr--paraformer-zh" in advice

    def test_a_model_that_a_rule_names_is_looked_for_before_anything_is_done(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        record(recordings / "z/z.wav")
        (recordings / "funasr-batch.yaml").write_text(
            "rules:\n  - match: z/**\n    model: paraformer\n"
        )
        ended = command(recordings, "--offline")
        assert ended.code == 4
        assert not (recordings / "a.srt").exists()

    def test_damaged_weights(self, command: Command, recordings: Path, tmp_path: Path) -> None:
        record(recordings / "a.wav")
        shutil.copytree(command.model, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        ended = command(recordings, "--model", tmp_path / "model")
        assert ended.code == 4
        assert str(weights) in complaint(ended.err)[0]

    def test_a_model_of_another_kind(
        self, command: Command, recordings: Path, oracle: Path
    ) -> None:
        record(recordings / "a.wav")
        ended = command(recordings, "--model", oracle / "checkpoints" / "fsmn-vad")
        assert ended.code == 4
        assert "does not recognise speech" in ended.err


class TestStorage:
    def test_a_folder_that_may_not_be_written(
        self, command: Command, recordings: Path, tmp_path: Path, stranger: tuple[str, ...]
    ) -> None:
        record(recordings / "a.wav")
        recordings.chmod(0o755)
        ended = command(recordings, prefix=stranger, env=without_mlx(tmp_path))
        assert ended.code == 5, "refused before a model is loaded"
        first, advice = complaint(ended.err)
        assert first.startswith(f"cannot write {recordings}/")
        assert "Permission denied" in first
        assert "-o" in advice

    @pytest.mark.skipif(not is_tool("unshare"), reason="no unshare")
    def test_a_disk_that_becomes_full_and_then_larger(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        for number in range(12):
            record(recordings / f"{number:02}.wav", 12.0, start=number)
        disk = tmp_path / "disk"
        disk.mkdir()
        command_line = shlex.join(command.line(recordings, "-o", disk, *ALONE))
        script = f"""
            mount -t tmpfs -o size=128k none {disk} || exit 98
            {command_line} 2> {tmp_path}/first
            echo $? > {tmp_path}/code
            find {disk} -type f -not -path '*/.funasr-batch/*' > {tmp_path}/files
            mount -o remount,size=8m {disk}
            {command_line} 2> {tmp_path}/second
            code=$?
            cp -r {disk} {tmp_path}/copy
            exit $code
        """
        ended = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            env=command.environment(),
            capture_output=True,
            timeout=TIMEOUT,
        )
        if ended.returncode in (1, 98) and not (tmp_path / "code").exists():
            pytest.skip("no mounts for users here")
        assert (tmp_path / "code").read_text() == "5\n"
        said = (tmp_path / "first").read_text()
        assert re.search("No space left on device .* bytes needed|database or disk is full", said)
        assert "hint: " in said
        assert "Traceback" not in said
        kept = (tmp_path / "files").read_text().split()
        assert kept, "some fitted"
        assert not [name for name in kept if name.endswith(".tmp")]
        assert ended.returncode == 0, (tmp_path / "second").read_text()
        assert "skipped" in (tmp_path / "second").read_text(), "what had been kept counts"
        assert command(recordings, "-o", tmp_path / "whole", *ALONE).code == 0
        assert comparable(tmp_path / "copy") == comparable(tmp_path / "whole")

    def test_events_that_cannot_be_written(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        ended = command(recordings, "--events", recordings)
        assert ended.code == 5
        assert complaint(ended.err) == [f"cannot write events to {recordings}: Is a directory"]


class TestBusy:
    def test_another_run_holds_the_output_folder(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "a.wav")
        out = tmp_path / "out"
        with lock_output(out):
            ended = command(recordings, "-o", out)
            assert ended.code == 75
            first, advice = complaint(ended.err)
            assert first.startswith(f"another run holds {out}: process {os.getpid()} on ")
            assert advice
            assert command(recordings, "-o", tmp_path / "other").code == 0
        assert command(recordings, "-o", out).code == 0

    def test_a_lock_whose_holder_died_is_no_lock(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        (recordings / ".funasr-batch").mkdir()
        (recordings / ".funasr-batch" / "lock").write_text('{"pid": 1, "host": "x", "since": "y"}')
        assert command(recordings).code == 0


class TestInternalError:
    @pytest.mark.parametrize(
        ("broken", "code", "said"),
        [
            # A reader that fails in a way that nobody foresaw costs its recording.
            ("import funasr_batch.run.reading as m; m.open_audio = None", 1, "failed: a.wav: "),
            # So does a layout that cannot cope with one transcript.
            ("import funasr_batch.run.pipeline as m; m.render = None", 1, "Please report this."),
            # The model fails for every batch, and for every clip alone.
            (
                "import funasr_batch.recognizer as m; m.Recognizer.recognise = None",
                1,
                "failed: a.wav: the model failed",
            ),
            ("import funasr_batch.run.pipeline as m; m.publish = None", 70, "internal error"),
        ],
        ids=["reader", "layout", "model", "storage"],
    )
    def test_nothing_hangs_and_nothing_is_silent(
        self, command: Command, recordings: Path, broken: str, code: int, said: str
    ) -> None:
        for name in ("a", "b", "c"):
            record(recordings / f"{name}.wav")
        ended = command(recordings, sabotage=broken)
        assert ended.code == code
        assert said in ended.err
        assert command(recordings).code == 0, "the next run repairs it"
