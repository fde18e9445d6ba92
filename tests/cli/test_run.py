"""The command in the surroundings that users give it: pipes, cron, terminals, lists, rules."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command import PROJECT, TIMEOUT, Command, files, record, transcript
from tiny_model import write_tiny_model


class TestWhatItSays:
    def test_a_line_a_file_and_a_table_when_nobody_watches(
        self, command: Command, recordings: Path
    ) -> None:
        for name in ("a", "b"):
            record(recordings / f"{name}.wav", 2.0)
        ended = command(recordings)
        assert (ended.code, ended.out) == (0, "")
        lines = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
        assert re.fullmatch(r"\[1/2\] [ab]\.wav  done  2\.0s in \d+\.\ds \([\d.]+×\)", lines[0])
        assert re.fullmatch(r"\[2/2\] [ab]\.wav  done  2\.0s in \d+\.\ds \([\d.]+×\)", lines[1])
        table = dict(line.split("  ", 1) for line in lines[2:5])
        assert table["files"].strip() == "2 done"
        assert table["audio"].strip() == "4.0s"
        assert "\x1b" not in ended.err

    def test_quiet_says_nothing_when_all_is_well(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        for _ in range(2):
            ended = command(recordings, "--quiet")
            assert (ended.code, ended.out, ended.err) == (0, "", "")

    def test_quiet_names_what_failed(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        (recordings / "b.wav").write_text("broken")
        ended = command(recordings, "-q")
        assert ended.code == 1
        [line] = ended.err.splitlines()
        assert line.startswith("failed: b.wav: ")

    def test_verbose_says_what_was_left_out(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        os.mkfifo(recordings / "pipe.wav")
        (recordings / "loop").symlink_to(recordings)
        ended = command(recordings, "--verbose")
        assert ended.code == 0
        assert f"warning: left out: {recordings}/pipe.wav: a pipe" in ended.err
        assert f"warning: left out: {recordings}/loop: a link to a folder" in ended.err

    def test_help_and_version_need_nothing_but_python(self, tmp_path: Path) -> None:
        for flag in ("--help", "--version"):
            # Neither site-packages nor a home.
            ended = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _START.format(str(PROJECT)), flag],
                env={},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            assert ended.returncode == 0, ended.stderr
            assert "funasr-batch" in ended.stdout
            assert ended.stderr == ""


_START = "import sys; sys.path.insert(0, {!r}); from funasr_batch.__main__ import main; main()"


class TestSurroundings:
    def test_stdin_stdout_and_stderr_are_closed(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        (recordings / "broken.wav").write_text("broken")
        ended = subprocess.run(
            ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command.line(recordings)],
            env=command.environment(),
            timeout=TIMEOUT,
        )
        assert ended.returncode == 1
        assert {"a.srt", "a.json", "a.txt"} <= files(recordings)
        assert "\n00:00:" in (recordings / "a.srt").read_text("utf-8")

    def test_almost_no_environment(self, command: Command, recordings: Path) -> None:
        record(recordings / "语音.wav")
        ended = subprocess.run(
            command.line(recordings, "--model", command.model, "--vad", "silero"),
            env={"PYTHONPATH": str(PROJECT), "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
        assert ended.returncode == 0, ended.stderr
        assert transcript(recordings / "语音.json")["source"]["path"].endswith("/语音.wav")

    def test_a_user_without_a_home(
        self, command: Command, recordings: Path, stranger: tuple[str, ...]
    ) -> None:
        """As in a container that was given a number for its user."""
        recordings.chmod(0o777)
        record(recordings / "a.wav")
        environment = command.environment()
        del environment["HOME"]
        codes = {}
        for arguments in (["doctor"], [recordings, "--model", "paraformer", "--offline"]):
            ended = subprocess.run(
                [*stranger, *command.line(*arguments)],
                env=environment,
                cwd="/",
                capture_output=True,
                timeout=TIMEOUT,
            )
            said = ended.stdout.decode() + ended.stderr.decode()
            assert "this user has no home folder for converted models" in said
            assert "--cache-dir" in said
            codes[arguments[0]] = ended.returncode
        assert codes == {"doctor": 0, recordings: 5}

    @pytest.mark.parametrize("arguments", [["--help"], ["--print-config"], ["doctor"]], ids=str)
    def test_a_reader_that_goes_away(self, command: Command, arguments: list[str]) -> None:
        process = command.start(*arguments)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT) == 0

    def test_a_log_that_goes_away(self, command: Command, recordings: Path) -> None:
        for number in range(3):
            record(recordings / f"{number}.wav")
        process = command.start(recordings)
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(TIMEOUT) == 0
        assert len(list(recordings.glob("*.srt"))) == 3

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk_under_stdout(self, command: Command) -> None:
        with Path("/dev/full").open("wb") as full:
            process = command.start("--print-config", stdout=full)
            _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 5
        assert err == b"funasr-batch: cannot write to standard output: No space left on device\n"


class TestInputs:
    def test_a_list_on_stdin(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        record(recordings / "b\nc.wav")
        lines = f"{recordings}/a.wav\r\n\n{recordings}/a.wav\n".encode()
        assert command("--from-file", "-", stdin=lines).code == 0
        assert "a.srt" in files(recordings)
        zeros = f"{recordings}/a.wav\0{recordings}/b\nc.wav\0".encode()
        assert command("--from-file", "-", stdin=zeros).code == 0
        assert "b\nc.srt" in files(recordings)

    def test_a_list_that_names_a_file_that_is_gone(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        (recordings / "list").write_text("a.wav\ngone.wav\n")
        ended = command("--from-file", "list", cwd=recordings)
        assert ended.code == 1
        assert f"failed: {recordings}/gone.wav: does not exist" in ended.err

    def test_a_pattern_that_the_shell_did_not_expand(
        self, command: Command, recordings: Path
    ) -> None:
        for name in ("a/x.wav", "b/c/x.wav", "b/c/y.flac"):
            record(recordings / name)
        assert command("**/*.wav", cwd=recordings).code == 0
        assert {name for name in files(recordings) if name.endswith(".srt")} == {
            "a/x.srt",
            "b/c/x.srt",
        }

    def test_only_this_folder_without_what_is_excluded(
        self, command: Command, recordings: Path
    ) -> None:
        for name in ("a.wav", "b.wav", "deep/c.wav"):
            record(recordings / name)
        assert command(recordings, "--no-recursive", "--exclude", "b.*").code == 0
        assert {name for name in files(recordings) if name.endswith(".srt")} == {"a.srt"}

    def test_a_recording_that_vanishes(self, command: Command, recordings: Path) -> None:
        record(recordings / "a.wav")
        record(recordings / "b.wav")
        sabotage = f"""
import os, funasr_batch.run.pipeline as m
load = m.load_recognizer
def load_late(*arguments):
    os.remove({str(recordings / "a.wav")!r})
    return load(*arguments)
m.load_recognizer = load_late
"""
        ended = command(recordings, sabotage=sabotage)
        assert ended.code == 1
        assert "failed: a.wav: is not there any more" in ended.err
        assert "b.srt" in files(recordings)


class TestSettings:
    def test_rules_choose_the_model_by_folder(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        other = write_tiny_model(tmp_path / "other", seed=7)
        for name in ("x.wav", "interviews/deep/x.wav"):
            record(recordings / name, 2.0)
        rule = {"match": "interviews/**", "model": str(other), "format": ["json"]}
        configuration = {"format": ["json", "txt"], "rules": [rule]}
        (recordings / "funasr-batch.yaml").write_text(yaml.safe_dump(configuration))
        ended = command(recordings)
        assert ended.code == 0, ended.err
        plain = transcript(recordings / "x.json")
        special = transcript(recordings / "interviews/deep/x.json")
        assert plain["model"]["name"] == str(command.model)
        assert special["model"]["name"] == str(other)
        assert plain["source"]["sha256"] == special["source"]["sha256"]
        assert plain["text"] != special["text"]
        assert files(recordings) - {"x.wav", "interviews/deep/x.wav", "funasr-batch.yaml"} == {
            "x.json",
            "x.txt",
            "interviews/deep/x.json",
        }
        assert "nothing to do: 2 done before" in command(recordings).err

    def test_the_merged_settings_and_where_each_comes_from(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        (recordings / "funasr-batch.yaml").write_text("max-segment: 20\n")
        (tmp_path / "night.yaml").write_text("order: newest\n")
        ended = command(
            recordings, "--config", tmp_path / "night.yaml", "-f", "srt", "--print-config"
        )
        assert (ended.code, ended.err) == (0, "")
        origins = {line.split(":")[0]: line.split("  # ")[1] for line in ended.out.splitlines()}
        assert origins["language"] == "built-in"
        assert origins["model"] == f"{command.home}/.config/funasr-batch/config.yaml line 1"
        assert origins["order"] == f"{tmp_path}/night.yaml line 1"
        assert origins["max_segment"] == f"{recordings}/funasr-batch.yaml line 1"
        assert origins["format"] == "--format"
        assert yaml.safe_load(ended.out)["max_segment"] == 20
        assert not (recordings / ".funasr-batch").exists()

    def test_the_user_s_own_configuration_folder(
        self, command: Command, recordings: Path, tmp_path: Path
    ) -> None:
        record(recordings / "a.wav")
        folder = tmp_path / "xdg" / "funasr-batch"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"format: tsv\nmodel: {command.model}\n")
        assert command(recordings, env={"XDG_CONFIG_HOME": str(folder.parent)}).code == 0
        assert files(recordings) == {"a.wav", "a.tsv"}

    def test_converted_models_are_kept_where_the_user_says(
        self, command: Command, recordings: Path, tmp_path: Path, oracle: Path
    ) -> None:
        record(recordings / "a.wav")
        model = oracle / "checkpoints" / "paraformer-tiny"
        ended = command(recordings, "--model", model, "--cache-dir", tmp_path / "cache")
        assert ended.code == 0, ended.err
        assert list((tmp_path / "cache" / "models").glob("*/model.safetensors"))
        assert not (command.home / ".cache" / "funasr-batch").exists()


class TestTerminal:
    """A run whose stderr is a terminal."""

    def watch(
        self, command: Command, *arguments: str | Path, sabotage: str = "", **env: str
    ) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        env = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | env
        process = command.start(*arguments, sabotage=sabotage, stderr=theirs, env=env)
        os.close(theirs)
        seen = bytearray()
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(ours, 65_536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not data:
                break
            seen += data
        os.close(ours)
        return process.wait(TIMEOUT), seen.decode()

    def test_a_live_display_that_cleans_up_after_itself(
        self, command: Command, recordings: Path
    ) -> None:
        for number in range(8):
            record(recordings / f"{number}.wav", 12.0, start=number)
        (recordings / "broken.wav").write_text("broken")
        code, seen = self.watch(command, recordings)
        assert code == 1
        assert "/9 files" in seen
        assert "× real time" in seen
        assert "failed: broken.wav" in seen
        assert "8 done, 1 failed" in seen
        assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l"), "the cursor is shown again"

    def test_an_error_that_ends_the_run_leaves_the_terminal_in_order(
        self, command: Command, recordings: Path
    ) -> None:
        record(recordings / "a.wav")
        code, seen = self.watch(command, recordings, sabotage=_DISK_FULL)
        assert code == 5
        assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
        assert "funasr-batch: it is full" in seen

    def test_no_colour(self, command: Command, recordings: Path) -> None:
        (recordings / "broken.wav").write_text("broken")
        coloured, plain = (
            self.watch(command, recordings, **env)[1] for env in ({}, {"NO_COLOR": "1"})
        )
        assert "\x1b[31m" in coloured
        assert "\x1b[31m" not in plain

    @pytest.mark.parametrize("flags", [("--no-progress",), ("--quiet",), ()], ids=str)
    def test_plain_lines_where_they_are_wanted(
        self, command: Command, recordings: Path, flags: tuple[str, ...]
    ) -> None:
        record(recordings / "a.wav")
        env = {} if flags else {"TERM": "dumb"}
        code, seen = self.watch(command, recordings, *flags, **env)
        assert code == 0
        assert "\x1b" not in seen
        assert ("[1/1] a.wav  done" in seen) == ("--quiet" not in flags)


_DISK_FULL = """
import funasr_batch.run.pipeline as m
from funasr_batch.errors import StorageError
def publish(files): raise StorageError("it is full")
m.publish = publish
"""
