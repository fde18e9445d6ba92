"""Runs that are killed at every step of keeping a result, and then run again.

The same small run is repeated: it publishes the outputs of two recordings and enters them in the
manifest. A child process does it and kills itself (SIGKILL) just before, or in the middle of, its
n-th call that changes the disk, for every n until it comes to its end. After each kill the outputs
are looked at, and the run is repeated without a kill.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

RUN = '''
import os, re, signal, sys, time
from pathlib import Path, PurePath

from funasr_batch.records import ModelInfo, Source, SourceInfo, Transcript
from funasr_batch.run.manifest import (
    Wanted, decide, describe_output, open_manifest, outputs_intact, read_manifest,
)
from funasr_batch.run.storage import file_digest, lock_output, publish, sweep_temporaries

NAMES = ("a/one.wav", "b/two.wav")
WANT = Wanted("r", "s", "w", ("json", "srt", "txt"))
TEMPORARY = re.compile(r"\\.funasr-[0-9a-f]{16}\\.tmp")


def content(name, format):
    return f"{format} of {name} ".encode() * 500


def source_of(root, folder, name):
    path = root / name
    status = path.stat()
    return Source(path, root, PurePath(name), folder / name,
                  status.st_size, status.st_mtime_ns, status.st_ino)


def paths_of(source):
    return {format: Path(f"{source.output}.{format}") for format in WANT.formats}


def run(root, folder):
    """One run over the two recordings; how many it had to do."""
    done = 0
    with lock_output(folder), open_manifest(folder) as manifest:
        assert manifest.warnings == (), manifest.warnings
        sweep_temporaries(folder)
        number = manifest.begin_run("0", {})
        for name in NAMES:
            source = source_of(root, folder, name)
            entry = manifest.lookup(source)
            intact = entry is not None and outputs_intact(entry, paths_of(source))
            if decide(source, entry, WANT, intact).action == "skip":
                continue
            done += 1
            files = {path: content(name, format) for format, path in paths_of(source).items()}
            publish(files)
            outputs = [describe_output(f, p, files[p]) for f, p in paths_of(source).items()]
            digest = file_digest(source.path)
            transcript = Transcript(SourceInfo(name, digest, 1.0, 16000, 1),
                                    ModelInfo("m", None, "w"), "r", "zh", (), "done")
            manifest.record_done(source, WANT, transcript, outputs)
        manifest.end_run(number, {}, 0)
    return done


def make_recordings(root):
    for name in NAMES:
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(name.encode())
        os.utime(root / name, (1e9, 1e9))


def check_after_kill(root, folder):
    """Outputs are whole or absent, and what the manifest calls done is there."""
    for path in folder.rglob("*"):
        if path.is_file() and ".funasr-batch" not in path.parts:
            if not TEMPORARY.fullmatch(path.name):
                name, format = str(path.relative_to(folder)).rsplit(".", 1)
                assert path.read_bytes() == content(name, format), path
    manifest = read_manifest(folder)
    if manifest is not None:
        with manifest:
            for name in NAMES:
                source = source_of(root, folder, name)
                entry = manifest.lookup(source)
                assert entry is None or outputs_intact(entry, paths_of(source)), name


def check_after_restart(root, folder):
    run(root, folder)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*")
                   if p.is_file() and ".funasr-batch" not in p.parts)
    assert found == sorted(f"{n}.{f}" for n in NAMES for f in WANT.formats), found
    check_after_kill(root, folder)
    assert run(root, folder) == 0, "a finished recording was done again"
    assert sorted(os.listdir(folder / ".funasr-batch")) == ["lock", "manifest.sqlite3"]
'''

KILL_AT_EACH_CALL = (
    RUN
    + '''

def kill_at(n):
    """Make the n-th call that changes the disk the last one of this process."""
    count = 0

    def guard(name):
        real = getattr(os, name)

        def guarded(*arguments, **options):
            nonlocal count
            count += 1
            if count == n:
                if name == "write":  # a part of it had reached the disk
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, guarded)

    for name in ("open", "mkdir", "write", "fsync", "replace", "unlink", "ftruncate"):
        guard(name)


def main(base):
    root = base / "recordings"
    make_recordings(root)
    for n in range(1, 1000):
        folder = base / str(n)
        child = os.fork()
        if child == 0:
            try:
                kill_at(n)
                run(root, folder)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check_after_kill(root, folder)
        check_after_restart(root, folder)
        if status == 0:
            print("kills", n - 1)
            return
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


main(Path(sys.argv[1]))
'''
)

KILL_AT_EACH_SYSTEM_CALL = (
    RUN
    + """

HARMLESS = {
    "rename": lambda: os.rename("/nowhere/a", "/nowhere/b"),
    "unlink": lambda: os.unlink("/nowhere/a"),
    "write": lambda: os.write(-1, b""),
    "fsync": lambda: os.fsync(10**6),
    "fdatasync": lambda: os.fdatasync(10**6),
    "pwrite64": lambda: os.pwrite(-1, b"", 0),
}


def in_child(work, *arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def run_after(harmless, count, root, folder):
    for _ in range(count):
        try:
            harmless()
        except OSError:
            pass
    run(root, folder)


def main(base, call, fatal):
    root = base / "recordings"
    make_recordings(root)
    for n in range(1, fatal):
        folder = base / str(n)
        status = in_child(run_after, HARMLESS[call], fatal - n, root, folder)
        assert in_child(check_after_kill, root, folder) == 0
        assert in_child(check_after_restart, root, folder) == 0
        if status == 0:
            print("kills", n - 1)
            return
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""
)


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where a sync costs nothing: what a killed process wrote is kept there too."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def kills(command: list[str]) -> int:
    """Run one of the scripts above; how often it was killed before it came to its end."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=PROJECT
    )
    if "strace:" in done.stderr:
        pytest.skip(f"strace cannot do this here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[1])


def test_killed_before_or_within_every_call(memory_disk: Path) -> None:
    # Two recordings of three files: each is opened, written, synced and renamed at the least.
    assert kills([sys.executable, "-c", KILL_AT_EACH_CALL, str(memory_disk)]) >= 2 * 3 * 4


@pytest.mark.parametrize(
    ("call", "least"),
    [
        ("rename", 6),
        ("unlink", 4),
        ("write", 7),
        ("fsync", 9),
        ("fdatasync", 9),
        pytest.param("pwrite64", 30, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_system_call(memory_disk: Path, call: str, least: int) -> None:
    """The same from outside, by strace: so that SQLite is killed within its own writes too.

    strace kills every child at the same count of calls; to die at its n-th, a child first makes as
    many calls without effect as are missing.
    """
    if shutil.which("strace") is None:
        pytest.skip("no strace")
    fatal = 200
    strace = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}"]
    inject = ["-e", f"inject={call}:signal=KILL:when={fatal}"]
    script = [sys.executable, "-c", KILL_AT_EACH_SYSTEM_CALL, str(memory_disk), call, str(fatal)]
    assert kills([*strace, *inject, *script]) >= least
