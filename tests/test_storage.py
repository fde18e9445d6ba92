"""Results on the disk: whole or absent, locked by one run, refused with a reason."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from funasr_batch.errors import (
    BusyError,
    FileError,
    FunasrBatchError,
    StorageError,
    UsageError,
    VanishedError,
)
from funasr_batch.run import storage
from funasr_batch.run.storage import (
    STATE_FOLDER,
    check_writable,
    file_digest,
    free_bytes,
    lock_output,
    publish,
    state_folder,
    sweep_temporaries,
    write_atomically,
)

ABANDONED = ".funasr-0123456789abcdef.tmp"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[1],
    )


class TestPublish:
    def test_files_appear_with_their_folders_and_nothing_else(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        publish({folder / "x.srt": b"1", folder / "x.json": b"", tmp_path / "y": b"z" * 10**6})
        assert names(folder) == {"x.srt", "x.json"}
        assert names(tmp_path) == {"a", "y"}
        assert (folder / "x.srt").read_bytes() == b"1"
        assert (folder / "x.json").read_bytes() == b""
        assert (tmp_path / "y").read_bytes() == b"z" * 10**6

    def test_an_old_file_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "x.srt"
        path.write_bytes(b"a much longer old text")
        write_atomically(path, b"new")
        assert path.read_bytes() == b"new"

    def test_a_link_is_replaced_and_its_target_is_left_alone(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"precious")
        (tmp_path / "x.srt").symlink_to(target)
        write_atomically(tmp_path / "x.srt", b"new")
        assert target.read_bytes() == b"precious"
        assert not (tmp_path / "x.srt").is_symlink()

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_atomically(tmp_path / "x", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize(
        "name", [b"n" * 255, b"-x\n\t", b"\xff\xfe.srt", "录音 é.srt".encode(), b"%s{0}$(id)"]
    )
    def test_any_name_that_the_file_system_takes(self, tmp_path: Path, name: bytes) -> None:
        write_atomically(tmp_path / os.fsdecode(name), b"text")
        assert os.listdir(os.fsencode(tmp_path)) == [name]

    def test_all_are_synced_before_the_first_is_renamed_and_the_folder_after_the_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        fsync, replace = os.fsync, os.replace

        def recorded_fsync(descriptor: int) -> None:
            calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
            fsync(descriptor)

        def recorded_replace(old: Path, new: Path) -> None:
            calls.append(new.name)
            replace(old, new)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)
        if sys.platform == "darwin":
            pytest.skip("syncs with F_FULLFSYNC there")
        publish({tmp_path / "x.json": b"1", tmp_path / "x.srt": b"2"})
        assert calls == ["file", "file", "x.json", "x.srt", "folder"]

    def test_no_descriptor_leaks(self, tmp_path: Path) -> None:
        folder = Path("/dev/fd")
        before = len(list(folder.iterdir()))
        for number in range(20):
            publish({tmp_path / f"{number}.srt": b"1", tmp_path / f"{number}.json": b"2"})
            with pytest.raises(FileError):
                write_atomically(tmp_path / ("n" * 300), b"")
        assert len(list(folder.iterdir())) == before


class TestRefusals:
    @pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
    @pytest.mark.parametrize(
        "code",
        [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE],
        ids=errno.errorcode.get,
    )
    def test_each_refusal_at_each_call_says_what_where_and_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
    ) -> None:
        old = tmp_path / "x.json"
        old.write_bytes(b"old")

        def refuse(*arguments: object, **options: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(storage.os, call, refuse)
        with pytest.raises(StorageError) as caught:
            publish({old: b"12345", tmp_path / "x.srt": b"1"})
        monkeypatch.undo()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert os.strerror(code) in message
        assert "5 bytes needed" in message
        assert "free" in message
        assert caught.value.hint
        assert names(tmp_path) == {"x.json"}
        assert old.read_bytes() == b"old"

    def test_a_sync_that_failed_is_not_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def refuse(descriptor: int) -> None:
            calls.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(storage, "_sync", refuse)
        with pytest.raises(StorageError, match="rror"):
            write_atomically(tmp_path / "x", b"1")
        assert len(calls) == 1

    def test_short_writes_are_completed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        write_atomically(tmp_path / "x", b"0123456789")
        assert (tmp_path / "x").read_bytes() == b"0123456789"

    @pytest.mark.parametrize(
        "make",
        [
            lambda folder: folder / ("n" * 256),
            lambda folder: folder / "taken",
            lambda folder: folder / "file" / "x.srt",
        ],
        ids=["name too long", "a folder has the name", "a file where a folder is needed"],
    )
    def test_an_impossible_name_costs_one_recording(
        self, tmp_path: Path, make: Callable[[Path], Path]
    ) -> None:
        (tmp_path / "taken" / "full").mkdir(parents=True)
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(FileError, match="cannot write") as caught:
            write_atomically(make(tmp_path), b"text")
        assert caught.value.exit_code == 1
        assert names(tmp_path) == {"taken", "file"}

    def test_the_file_size_limit_of_the_shell(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(StorageError) as caught:
                publish({tmp_path / "x.json": b"1", tmp_path / "x.srt": b"2" * 2000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "ulimit" in (caught.value.hint or "")
        assert names(tmp_path) == set()

    def test_a_disk_that_is_really_full(self, tmp_path: Path) -> None:
        code = """
import pathlib, subprocess, sys
from funasr_batch.errors import StorageError
from funasr_batch.run.storage import publish
folder = pathlib.Path(sys.argv[1])
small, large = b"1" * 1000, b"2" * 2_000_000
try:
    publish({folder / "x.json": small, folder / "x.srt": large})
except StorageError as error:
    print(error)
print(sorted(p.name for p in folder.iterdir()))
subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
publish({folder / "x.json": small, folder / "x.srt": large})
print(sorted(p.name for p in folder.iterdir()))
"""
        (tmp_path / "disk").mkdir()
        mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh"]
        try:
            done = subprocess.run(
                [*command, str(tmp_path / "disk"), sys.executable, code],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                cwd=Path(__file__).parents[1],
            )
        except FileNotFoundError:
            pytest.skip("no unshare")
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip("not allowed to mount here")
        message, before, after = done.stdout.splitlines()
        assert os.strerror(errno.ENOSPC) in message
        assert "2,000,000 bytes needed" in message
        assert before == "[]"
        assert after == "['x.json', 'x.srt']"


class TestCheckWritable:
    def test_it_makes_the_folder_and_leaves_nothing_in_it(self, tmp_path: Path) -> None:
        check_writable(tmp_path / "new" / "deep")
        assert names(tmp_path / "new" / "deep") == set()

    @pytest.mark.parametrize("place", ["file", "file/below"])
    def test_a_file_in_its_place_is_a_usage_error(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UsageError, match="file is not a folder"):
            check_writable(tmp_path / place)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_without_permission_for_this_user(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        with pytest.raises(StorageError, match="ermission"):
            check_writable(tmp_path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_a_folder_without_permission_for_another_user(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        for parent in tmp_path.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o555)
        code = """
import os, pathlib, sys
from funasr_batch.errors import StorageError
from funasr_batch.run.storage import check_writable
os.setresuid(65534, 65534, 65534)
try:
    check_writable(pathlib.Path(sys.argv[1]))
except StorageError as error:
    print(error.exit_code, error, error.hint)
"""
        printed = run_python(code, tmp_path).stdout
        assert printed.startswith("5 cannot write")
        assert os.strerror(errno.EACCES) in printed


class TestSweep:
    def test_only_our_own_leftovers_go(self, tmp_path: Path) -> None:
        deep = tmp_path / "a" / "b"
        deep.mkdir(parents=True)
        ours = [tmp_path / ABANDONED, deep / ABANDONED]
        others = [
            tmp_path / "x.tmp",
            tmp_path / ".funasr-notes.tmp",
            tmp_path / ".funasr-0123456789abcdef.tmp.bak",
            tmp_path / ".funasr-0123456789ABCDEF.tmp",
            deep / "talk.srt",
        ]
        for path in ours + others:
            path.write_bytes(b"1")
        assert sweep_temporaries(tmp_path) == 2
        assert not any(path.exists() for path in ours)
        assert all(path.exists() for path in others)

    def test_special_files_and_links_of_that_name_stay(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_bytes(b"1")
        for name, make in {
            "link": lambda path: path.symlink_to(outside),
            "fifo": os.mkfifo,
            "folder": os.mkdir,
        }.items():
            (tmp_path / name).mkdir()
            make(tmp_path / name / ABANDONED)
        assert sweep_temporaries(tmp_path) == 0
        assert outside.exists()

    def test_what_a_living_run_is_writing_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        swept = []
        replace = os.replace

        def sweep_first(old: Path, new: Path) -> None:
            swept.append(sweep_temporaries(tmp_path))
            replace(old, new)

        monkeypatch.setattr(os, "replace", sweep_first)
        publish({tmp_path / "x.json": b"1", tmp_path / "x.srt": b"2"})
        assert swept == [0, 0]
        assert names(tmp_path) == {"x.json", "x.srt"}


class TestLock:
    HOLD = """
import pathlib, sys
from funasr_batch.run.storage import lock_output
with lock_output(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

    def test_the_second_run_is_told_who_holds_it_and_a_killed_holder_holds_nothing(
        self, tmp_path: Path
    ) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", self.HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert holder.stdout is not None
        assert holder.stdin is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(BusyError) as caught, lock_output(tmp_path):
                pytest.fail("two runs hold one folder")
            assert caught.value.exit_code == 75
            assert f"process {holder.pid} on {os.uname().nodename}, since 20" in str(caught.value)
        finally:
            holder.kill()
            holder.wait()
            holder.stdin.close()
            holder.stdout.close()
        with lock_output(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / STATE_FOLDER / "lock").read_text()

    def test_the_lock_file_is_never_removed(self, tmp_path: Path) -> None:
        with lock_output(tmp_path):
            first = (tmp_path / STATE_FOLDER / "lock").stat().st_ino
        with lock_output(tmp_path):
            assert (tmp_path / STATE_FOLDER / "lock").stat().st_ino == first

    def test_two_folders_do_not_hinder_each_other(self, tmp_path: Path) -> None:
        with lock_output(tmp_path / "a"), lock_output(tmp_path / "b"):
            pass

    def test_it_is_released_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), lock_output(tmp_path):
            raise KeyError
        with lock_output(tmp_path):
            pass

    @pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"pid": 1}'])
    def test_what_a_stale_or_damaged_file_says_does_not_matter(
        self, tmp_path: Path, content: bytes
    ) -> None:
        lock = state_folder(tmp_path) / "lock"
        lock.write_bytes(content)
        descriptor = os.open(lock, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="just started"), lock_output(tmp_path):
            pass
        os.close(descriptor)
        with lock_output(tmp_path):
            pass

    def test_a_link_in_place_of_the_lock_is_refused_and_not_followed(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"precious")
        (state_folder(tmp_path) / "lock").symlink_to(target)
        with pytest.raises(UsageError, match="lock"), lock_output(tmp_path):
            pass
        assert target.read_bytes() == b"precious"

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_a_special_file_in_place_of_the_lock_is_refused(
        self, tmp_path: Path, make: Callable[[Path], None]
    ) -> None:
        make(state_folder(tmp_path) / "lock")
        with pytest.raises(UsageError, match="lock"), lock_output(tmp_path):
            pass

    def test_a_link_in_place_of_the_state_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / STATE_FOLDER).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="symbolic link"), lock_output(tmp_path / "out"):
            pass
        assert names(tmp_path / "elsewhere") == set()

    def test_a_child_that_outlives_the_run_does_not_keep_the_lock(self, tmp_path: Path) -> None:
        child = None
        try:
            with lock_output(tmp_path):
                child = subprocess.Popen(["sleep", "60"], close_fds=False)
            with lock_output(tmp_path):
                pass
        finally:
            if child is not None:
                child.kill()
                child.wait()


class TestReading:
    def test_digest(self, tmp_path: Path) -> None:
        data = os.urandom(300_000)
        (tmp_path / "x").write_bytes(data)
        assert file_digest(tmp_path / "x") == hashlib.sha256(data).hexdigest()

    def test_digest_of_what_is_not_there_or_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(VanishedError, match="any more"):
            file_digest(tmp_path / "x")
        with pytest.raises(FunasrBatchError, match="cannot be read"):
            file_digest(tmp_path)

    def test_free_bytes_of_a_place_that_does_not_exist_yet(self, tmp_path: Path) -> None:
        free = free_bytes(tmp_path / "a" / "b")
        assert free is not None
        assert free > 0
