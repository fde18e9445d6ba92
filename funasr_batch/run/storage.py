"""Puts results on the disk, whole or not at all; the only module that writes final files.

A result is written to a temporary file in its own folder, synced, renamed over its final name, and
the folder is synced. So a reader, a crash or a power cut finds under a final name the old file, the
new file or nothing, and never a part of one.

Limits. Several files cannot be renamed in one step: a crash between two renames leaves the first
new and the second old or absent, each of them whole; the manifest, written afterwards, says whether
the set is complete. A disk that reports a sync before it has one (some USB bridges and network
mounts) can still lose what it reported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from funasr_batch.errors import (
    BusyError,
    FileError,
    FunasrBatchError,
    StorageError,
    UsageError,
    VanishedError,
)

STATE_FOLDER = ".funasr-batch"
"""Folder inside an output folder that holds the lock and the manifest."""

_TEMPORARY_NAME = re.compile(r"\.funasr-[0-9a-f]{16}\.tmp")

_HINTS = {
    errno.ENOSPC: "Free some space, or choose another folder with -o, and run the same command "
    "again: what is finished is kept.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, or choose another folder with -o.",
    errno.EFBIG: "The file system or `ulimit -f` does not allow a file of this size.",
    errno.EROFS: "The file system is read-only. Choose another folder with -o.",
    errno.EACCES: "Give this user the right to write there, or choose another folder with -o.",
    errno.EPERM: "Give this user the right to write there, or choose another folder with -o.",
    errno.EIO: "The disk or network mount reports a fault. Check it before you run again.",
    errno.EMFILE: "Too many files are open. Raise the limit with `ulimit -n`.",
    errno.ENFILE: "Too many files are open on this machine.",
}

_NAME_FAULTS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
"""Errors about one name, not about the disk: they cost one recording, not the run."""

_NOT_OFFERED = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY}
"""What file systems answer to a kind of sync that they do not know."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write one file, whole or not at all. Errors: those of `publish`."""
    publish({path: data})


def publish(files: Mapping[Path, bytes]) -> None:
    """Make several files of one recording appear together, as far as POSIX allows.

    All are written and synced under temporary names before the first is renamed, in the order of
    the mapping. Missing folders are created. New files get the permissions that the umask allows.

    Raises `StorageError` when the disk refuses (full, read-only, no permission, I/O error) and
    `FileError` when only this name is impossible (too long, or a folder bears it). No temporary
    file stays behind.
    """
    with contextlib.ExitStack() as stack:
        temporaries = {
            path: stack.enter_context(_temporary(path, data)) for path, data in files.items()
        }
        for path, temporary in temporaries.items():
            with _explained(path, len(files[path])):
                os.replace(temporary, path)
        for folder in dict.fromkeys(path.parent for path in files):
            with _explained(folder):
                _sync_folder(folder)


def check_writable(folder: Path) -> None:
    """Create `folder` if need be and prove that a file can be kept in it.

    Raises `UsageError` when a file is in its place, else as `publish`.
    """
    _require_folder(folder)
    with _temporary(folder / "probe", b"\n"):
        pass


def sweep_temporaries(folder: Path) -> int:
    """Remove the temporary files that a killed run left in `folder` and below; return how many.

    Only names that this module makes are touched, and not those which a living run (of another
    output folder that overlaps this one) is still writing. To be called under `lock_output`.
    """
    removed = 0
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY_NAME.fullmatch, names):
            removed += _remove_abandoned(Path(parent, name))
    return removed


@contextlib.contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Hold the output folder for one run.

    The kernel releases the lock when the process ends, however it ends. The lock file is never
    removed: a second run could then lock a new file while the first still holds the old one. What
    the file says is only there to name the holder.

    Raises `BusyError` when another run holds it, `UsageError` when the lock file or the state
    folder is a link or not a regular file, `StorageError` when the disk refuses.
    """
    path = state_folder(folder) / "lock"
    descriptor = _open_lock(path)
    try:
        _acquire(descriptor, folder)
        with _explained(path):
            _name_holder(descriptor)
        yield
    finally:
        os.close(descriptor)


def state_folder(output: Path) -> Path:
    """The folder of `output` that holds lock and manifest; created if need be.

    Raises `UsageError` when it is a symbolic link, which could lead writes anywhere.
    """
    _require_folder(output)
    folder = output / STATE_FOLDER
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a symbolic link", hint="Remove it; the state of a run is kept in place."
        )
    _require_folder(folder)
    with _explained(folder):
        _make_folder(folder)
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; memory does not grow with the file.

    Raises `VanishedError` when it does not exist, `FileError` when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise VanishedError(f"{path}: is not there any more") from error
    except PermissionError as error:
        raise FileError(
            f"{path}: may not be read", hint="Check the permissions of the file and its folder."
        ) from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write where `path` is or would be; None if unknown."""
    try:
        disk = os.statvfs(_nearest_existing(path))
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` beside `path`; gone at the end unless it was renamed.

    Its name is short because `path` may have a name of the longest length already. A lock on it
    tells `sweep_temporaries` of other runs that somebody is at work.
    """
    temporary = path.with_name(f".funasr-{os.urandom(8).hex()}.tmp")
    with contextlib.ExitStack() as stack:
        with _explained(path, len(data)):
            _make_folder(path.parent)
            stack.callback(_unlink_if_there, temporary)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o666)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # some network mounts know no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, data)
            _sync(descriptor)
        yield temporary


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync(descriptor: int) -> None:
    """Force a file onto the medium. A failed sync is never tried again: the kernel may have dropped
    the dirty pages, and a second call would then report success."""
    if sys.platform == "darwin":
        # fsync there only hands the data to the drive, which may keep it in its cache.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _require_folder(folder: Path) -> None:
    existing = _nearest_existing(folder)
    if not existing.is_dir():
        raise UsageError(f"{existing} is not a folder", hint="Choose another folder with -o.")


def _nearest_existing(path: Path) -> Path:
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _unlink_if_there(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_abandoned(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # BlockingIOError: its writer lives
        return 0
    finally:
        os.close(descriptor)
    return 1


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_a_lock(path) from error
        raise _explain(error, path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_lock(path)
    return descriptor


def _not_a_lock(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a link or a special file", hint="Remove it; it should be a plain file."
    )


def _acquire(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            f"another run holds {folder}: {_holder(descriptor)}",
            hint="Wait for it to end, or choose another output folder with -o.",
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot lock {folder}: {error.strerror}",
            hint="This file system knows no locks. Choose an output folder on a local disk.",
        ) from error


def _name_holder(descriptor: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    _write_all(descriptor, json.dumps(holder).encode() + b"\n")


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as the file tells: its holder may not have written it yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just started"


@contextlib.contextmanager
def _explained(path: Path, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explain(error, path, needed) from error


def _explain(error: OSError, path: Path, needed: int | None = None) -> FunasrBatchError:
    message = f"cannot write {path}: {error.strerror}"
    if error.errno in _NAME_FAULTS:
        return FileError(message, hint="Rename the recording, or choose another folder with -o.")
    free = free_bytes(path)
    if needed is not None and free is not None:
        message += f" ({needed:,} bytes needed, {free:,} free)"
    return StorageError(message, hint=_HINTS.get(error.errno or 0))
