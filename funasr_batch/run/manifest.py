"""What has been done to which recording: one SQLite file in each output folder.

The run that holds the folder's lock opens it with `open_manifest`; everything else looks at it with
`read_manifest`, which changes nothing. All entries are read at once when it is opened; after that
`lookup` is a dict access, so a finished archive costs one query and a stat for each output.

Trust. An entry carries a checksum, so a bit that flipped on the disk costs one recording its entry
and never makes a wrong one count. A file that SQLite itself calls damaged is moved aside, not
deleted, and a new one is begun.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
import stat
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from funasr_batch.errors import (
    BusyError,
    FileError,
    FunasrBatchError,
    StorageError,
    UsageError,
)
from funasr_batch.records import Source, Transcript
from funasr_batch.run.storage import STATE_FOLDER, file_digest, state_folder
from funasr_batch.run.transcript_json import pack, unpack

MANIFEST_NAME = "manifest.sqlite3"

RACY_NS = 2_000_000_000
"""Coarsest time stamp in use (FAT): a file changed twice within it can look unchanged."""

_ALWAYS_EXAMINED_BYTES = 256 * 2**20

Action: TypeAlias = Literal["transcribe", "render", "skip", "hash"]


@dataclass(frozen=True, slots=True)
class Output:
    """A file that was published, as it was then."""

    format: str
    path: str
    """Absolute. No `Path`, of which an archive would make hundreds of thousands at its start."""
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str
    """Name of the class in errors.py."""
    message: str
    stage: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest knows of one recording."""

    path: bytes
    """From the output folder to the recording, as the file system spells it."""
    size: int
    mtime_ns: int
    inode: int
    seen_ns: int
    """A moment before its content was read, for `decide`."""
    content_sha256: str | None
    recognition_digest: str
    rendering_digest: str
    weights_sha256: str
    model: str
    status: str
    """A `records.Status`, or `failed`."""
    failure: Failure | None
    attempts: int
    """Failures in a row; 0 once it was done."""
    audio_seconds: float
    wall_seconds: float
    updated_ns: int
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What this run would make of a recording, as digests of the settings that matter."""

    recognition: str
    """Of everything that can change the transcript, other than audio and weights."""
    rendering: str
    """Of everything that can change the outputs of a given transcript."""
    weights_sha256: str
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a recording; `reason` is for people (`--explain`)."""

    action: Action
    reason: str


def decide(
    source: Source,
    entry: Entry | None,
    want: Wanted,
    outputs_intact: bool,
    content_sha256: str | None = None,
) -> Decision:
    """Compare a recording with what is known of it. Touches no file.

    `hash` means that only its content can tell: digest the file and ask again. The content is taken
    for unchanged without that when size, time and inode are those of the entry and the file had
    not been changed shortly before it was read.
    """
    if entry is None:
        return Decision("transcribe", "not done yet")
    if entry.failure is not None:
        return Decision("transcribe", f"failed before: {entry.failure.message}")
    if entry.weights_sha256 != want.weights_sha256:
        return Decision("transcribe", "the model's weights are others")
    if entry.recognition_digest != want.recognition:
        return Decision("transcribe", "settings of the recognition changed")
    if entry.size != _int64(source.size):
        return Decision("transcribe", "the recording changed")
    if content_sha256 is None and not _is_trusted(source, entry):
        return Decision("hash", "its time or place changed, perhaps its content")
    if content_sha256 not in (None, entry.content_sha256):
        return Decision("transcribe", "the recording changed")
    if entry.rendering_digest != want.rendering:
        return Decision("render", "settings of the outputs changed")
    missing = sorted(set(want.formats) - {output.format for output in entry.outputs})
    if missing:
        return Decision("render", f"not written yet: {', '.join(missing)}")
    if not outputs_intact:
        return Decision("render", "an output is missing, elsewhere or was changed")
    return Decision("skip", f"{entry.status.replace('_', ' ')}, nothing changed")


def outputs_intact(entry: Entry, wanted: Mapping[str, Path]) -> bool:
    """Whether every wanted format stands at its path as it was written.

    A stat for each; only a file of the right size and another time is read.
    """
    known = {output.format: output for output in entry.outputs}
    return all(
        format in known and known[format].path == _normal(path) and _is_intact(known[format])
        for format, path in wanted.items()
    )


def describe_output(format: str, path: Path, data: bytes) -> Output:
    """The record of a file that was just published. Raises `StorageError` when it has gone."""
    with _explained(path):
        mtime_ns = _int64(path.stat().st_mtime_ns)
    return Output(format, _normal(path), len(data), mtime_ns, hashlib.sha256(data).hexdigest())


def open_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder whose lock is held; begun if there is none.

    A damaged one is moved aside as `manifest.sqlite3.damaged-<n>` and a new one begun; `warnings`
    then says so. Raises `UsageError` for one of a newer schema or a symbolic link, `StorageError`
    when the disk refuses, `BusyError` when another process keeps it locked.
    """
    path = state_folder(folder) / MANIFEST_NAME
    _refuse_link(path)
    with _explained(path):
        try:
            return _begin(path, folder, ())
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            aside = _move_aside(path)
            warning = (
                f"the manifest was damaged ({_what(error)}) and is kept as {aside.name}; "
                "a new one is begun, and recordings are done again"
            )
            return _begin(path, folder, (warning,))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an output folder for reading only; None when there is none.

    Raises as `open_manifest`, and `StorageError` for a damaged one.
    """
    path = folder / STATE_FOLDER / MANIFEST_NAME
    _refuse_link(path)
    if not path.exists():
        return None
    with _explained(path):
        connection = _connect(path)
        try:
            connection.execute("PRAGMA query_only = ON")
            if _schema_version(connection, path) == 0:
                connection.close()
                return None
            entries, damaged = _load(connection, folder)
            return Manifest(connection, path, folder, entries, _ignored(damaged))
        except BaseException:
            connection.close()
            raise


class Manifest:
    """An open manifest. Used by one thread; closed by `close` or at the end of a `with`.

    The methods that write raise `StorageError` when the disk refuses. Each is one transaction.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        folder: Path,
        entries: dict[bytes, Entry],
        warnings: tuple[str, ...],
    ) -> None:
        self.warnings = warnings
        self._connection = connection
        self._path = path
        self._folder = folder
        self._entries = entries
        self._opened_ns = time.time_ns()
        self._prefixes: dict[Path, bytes] = {}

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def all_entries(self) -> tuple[Entry, ...]:
        """All entries, by path."""
        return tuple(self._entries[path] for path in sorted(self._entries))

    def lookup(self, source: Source) -> Entry | None:
        return self._entries.get(self._key(source))

    def transcript(self, source: Source) -> Transcript | None:
        """What was recognised; None when there is nothing, or nothing that can be read."""
        with _explained(self._path):
            row = self._connection.execute(
                "SELECT content FROM transcripts WHERE recording = "
                "(SELECT id FROM recordings WHERE path = ?)",
                (self._key(source),),
            ).fetchone()
        try:
            return unpack(row[0]) if row else None
        except ValueError:
            return None

    def record_done(
        self, source: Source, want: Wanted, transcript: Transcript, outputs: Sequence[Output]
    ) -> None:
        """To be called when the outputs are published, not before."""
        entry = Entry(
            **self._identity(source),
            content_sha256=transcript.source.sha256,
            recognition_digest=want.recognition,
            rendering_digest=want.rendering,
            weights_sha256=want.weights_sha256,
            model=_storable(transcript.model.name),
            status=transcript.status,
            failure=None,
            attempts=0,
            audio_seconds=float(transcript.source.duration),
            wall_seconds=_wall_seconds(transcript),
            updated_ns=time.time_ns(),
            outputs=tuple(outputs),
        )
        with self._transaction():
            recording = self._store(entry, json.dumps(transcript.stats))
            self._connection.execute(
                "INSERT OR REPLACE INTO transcripts VALUES (?, ?)", (recording, pack(transcript))
            )
        self._entries[entry.path] = entry

    def record_failed(
        self, source: Source, want: Wanted, model: str, error: FunasrBatchError, stage: str
    ) -> None:
        """Keep why it failed. What an earlier run recognised is forgotten: it is out of date."""
        before = self.lookup(source)
        entry = Entry(
            **self._identity(source),
            content_sha256=None,
            recognition_digest=want.recognition,
            rendering_digest=want.rendering,
            weights_sha256=want.weights_sha256,
            model=_storable(model),
            status="failed",
            failure=Failure(type(error).__name__, _storable(str(error)), stage),
            attempts=(before.attempts if before else 0) + 1,
            audio_seconds=0.0,
            wall_seconds=0.0,
            updated_ns=time.time_ns(),
        )
        with self._transaction():
            recording = self._store(entry, "{}")
            self._connection.execute("DELETE FROM transcripts WHERE recording = ?", (recording,))
        self._entries[entry.path] = entry

    def record_rendered(self, source: Source, want: Wanted, outputs: Sequence[Output]) -> None:
        """New outputs of a transcript that is kept. Raises KeyError for an unknown recording."""
        self._update(
            replace(
                self._entries[self._key(source)],
                rendering_digest=want.rendering,
                outputs=tuple(outputs),
                updated_ns=time.time_ns(),
            )
        )

    def record_same_content(self, source: Source) -> None:
        """The file was touched or moved in place but its content was found the same: no need to
        digest it next time. Raises KeyError for an unknown recording."""
        self._update(replace(self._entries[self._key(source)], **self._identity(source)))

    def begin_run(self, tool_version: str, settings: Mapping[str, Any]) -> int:
        """Enter a run; its number is for `end_run`. `settings` must be JSON types."""
        with self._transaction():
            cursor = self._connection.execute(
                "INSERT INTO runs (started_ns, tool_version, settings) VALUES (?, ?, ?)",
                (time.time_ns(), tool_version, json.dumps(settings)),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def end_run(self, run: int, totals: Mapping[str, Any], exit_code: int) -> None:
        with self._transaction():
            self._connection.execute(
                "UPDATE runs SET ended_ns = ?, totals = ?, exit_code = ? WHERE id = ?",
                (time.time_ns(), json.dumps(totals), exit_code, run),
            )

    def _key(self, source: Source) -> bytes:
        prefix = self._prefixes.get(source.root)
        if prefix is None:
            prefix = os.path.relpath(os.fsencode(source.root), os.fsencode(self._folder))
            self._prefixes[source.root] = prefix
        return os.path.normpath(os.path.join(prefix, os.fsencode(source.relative)))

    def _identity(self, source: Source) -> dict[str, Any]:
        return {
            "path": self._key(source),
            "size": _int64(source.size),
            "mtime_ns": _int64(source.mtime_ns),
            "inode": _int64(source.inode),
            "seen_ns": self._opened_ns,
        }

    def _update(self, entry: Entry) -> None:
        with self._transaction():
            self._store(entry, None)
        self._entries[entry.path] = entry

    def _store(self, entry: Entry, stats: str | None) -> int:
        """Insert or replace a recording and its outputs; `stats` None keeps those it has."""
        row = _to_row(entry)
        outputs = [_output_to_row(output, self._folder) for output in entry.outputs]
        values = (*row, _checksum(row, outputs), stats)
        self._connection.execute(_UPSERT, values)
        (recording,) = self._connection.execute(
            "SELECT id FROM recordings WHERE path = ?", (entry.path,)
        ).fetchone()
        self._connection.execute("DELETE FROM outputs WHERE recording = ?", (recording,))
        self._connection.executemany(
            "INSERT INTO outputs VALUES (?, ?, ?, ?, ?, ?)",
            [(recording, *output) for output in outputs],
        )
        return int(recording)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _explained(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise


# The schema. `user_version` counts the steps that a file has been through; a later version of the
# tool appends a step and never changes one.

_STEPS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE recordings (
            id INTEGER PRIMARY KEY,
            path BLOB NOT NULL UNIQUE,
            size INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            inode INTEGER NOT NULL,
            seen_ns INTEGER NOT NULL,
            content_sha256 TEXT,
            recognition_digest TEXT NOT NULL,
            rendering_digest TEXT NOT NULL,
            weights_sha256 TEXT NOT NULL,
            model TEXT NOT NULL,
            status TEXT NOT NULL,
            failure_kind TEXT,
            failure_message TEXT,
            failure_stage TEXT,
            attempts INTEGER NOT NULL,
            audio_seconds REAL NOT NULL,
            wall_seconds REAL NOT NULL,
            updated_ns INTEGER NOT NULL,
            checksum INTEGER NOT NULL,
            stats TEXT
        )
        """,
        """
        CREATE TABLE outputs (
            recording INTEGER NOT NULL REFERENCES recordings (id) ON DELETE CASCADE,
            format TEXT NOT NULL,
            path BLOB NOT NULL,
            size INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (recording, format)
        ) WITHOUT ROWID
        """,
        # Apart from `recordings`, so that reading all of those does not read these.
        """
        CREATE TABLE transcripts (
            recording INTEGER PRIMARY KEY REFERENCES recordings (id) ON DELETE CASCADE,
            content BLOB NOT NULL
        )
        """,
        """
        CREATE TABLE runs (
            id INTEGER PRIMARY KEY,
            started_ns INTEGER NOT NULL,
            ended_ns INTEGER,
            tool_version TEXT NOT NULL,
            settings TEXT NOT NULL,
            totals TEXT,
            exit_code INTEGER
        )
        """,
    ),
)

_COLUMNS = (
    "path",
    "size",
    "mtime_ns",
    "inode",
    "seen_ns",
    "content_sha256",
    "recognition_digest",
    "rendering_digest",
    "weights_sha256",
    "model",
    "status",
    "failure_kind",
    "failure_message",
    "failure_stage",
    "attempts",
    "audio_seconds",
    "wall_seconds",
    "updated_ns",
)
"""The columns of `recordings` that make an `Entry`, in the order of its fields, and are under its
checksum."""

_FAILURE = slice(_COLUMNS.index("failure_kind"), _COLUMNS.index("failure_stage") + 1)

_UPSERT = f"""
    INSERT INTO recordings ({", ".join(_COLUMNS)}, checksum, stats)
    VALUES ({", ".join("?" for _ in _COLUMNS)}, ?, ?)
    ON CONFLICT (path) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)},
    checksum = excluded.checksum, stats = coalesce(excluded.stats, stats)
"""


def _begin(path: Path, folder: Path, warnings: tuple[str, ...]) -> Manifest:
    connection = _connect(path)
    try:
        _migrate(connection, path)
        _examine(connection, path)
        entries, damaged = _load(connection, folder)
        connection.executemany("DELETE FROM recordings WHERE id = ?", [(id,) for id in damaged])
        return Manifest(connection, path, folder, entries, warnings + _ignored(damaged))
    except BaseException:
        connection.close()
        raise


def _connect(path: Path) -> sqlite3.Connection:
    # isolation_level None: transactions begin and end where this module says so.
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if sys.platform == "darwin":
        connection.execute("PRAGMA fullfsync = ON")
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for step in _STEPS[_schema_version(connection, path) :]:
        for statement in step:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(_STEPS)}")
    connection.execute("COMMIT")


def _schema_version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_STEPS):
        raise UsageError(
            f"{path} was written by a newer version of the tool: its schema is {version}, "
            f"this version knows up to {len(_STEPS)}",
            hint="Upgrade funasr-batch, or choose another output folder with -o.",
        )
    return int(version)


def _examine(connection: sqlite3.Connection, path: Path) -> None:
    """Let SQLite look at every page. It reads about 1 GB/s, so a very large manifest is examined
    only when the run before broke off or met a storage fault, as one that finds damage does."""
    last = connection.execute("SELECT exit_code FROM runs ORDER BY id DESC LIMIT 1").fetchone()
    ended_well = last is None or last[0] not in (None, StorageError.exit_code)
    if ended_well and path.stat().st_size > _ALWAYS_EXAMINED_BYTES:
        return
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(str(verdict).splitlines()[-1])


def _load(connection: sqlite3.Connection, folder: Path) -> tuple[dict[bytes, Entry], list[int]]:
    """All entries by path, and the ids of those that are ignored: their checksum is wrong."""
    outputs: dict[int, list[tuple[Any, ...]]] = {}
    for output in connection.execute("SELECT * FROM outputs"):
        outputs.setdefault(output[0], []).append(output[1:])
    entries: dict[bytes, Entry] = {}
    damaged: list[int] = []
    select = f"SELECT id, checksum, {', '.join(_COLUMNS)} FROM recordings"
    absolute = _normal(folder)
    for recording, checksum, *values in connection.execute(select):
        row, written = tuple(values), outputs.get(recording, [])
        if _checksum(row, written) == checksum:
            entry = _from_row(row, written, absolute)
            entries[entry.path] = entry
        else:
            damaged.append(recording)
    return entries, damaged


def _ignored(damaged: list[int]) -> tuple[str, ...]:
    if not damaged:
        return ()
    return (f"damaged entries in the manifest: {len(damaged)}; those are done again",)


def _to_row(entry: Entry) -> tuple[Any, ...]:
    """The values of `_COLUMNS`, in their order."""
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    failure = astuple(entry.failure) if entry.failure else (None, None, None)
    values |= zip(_COLUMNS[_FAILURE], failure, strict=True)
    return tuple(values[name] for name in _COLUMNS)


def _from_row(row: tuple[Any, ...], outputs: list[tuple[Any, ...]], folder: str) -> Entry:
    kind, message, stage = row[_FAILURE]
    failure = None if kind is None else Failure(kind, message, stage)
    written = tuple(_output_from_row(output, folder) for output in outputs)
    return Entry(*(*row[: _FAILURE.start], failure, *row[_FAILURE.stop :], written))


def _output_to_row(output: Output, folder: Path) -> tuple[Any, ...]:
    path = os.path.relpath(os.fsencode(output.path), os.fsencode(folder))
    return (output.format, path, output.size, output.mtime_ns, output.sha256)


def _output_from_row(row: tuple[Any, ...], folder: str) -> Output:
    format, relative, size, mtime_ns, sha256 = row
    path = f"{folder}/{os.fsdecode(relative)}"
    if relative.startswith(b".."):
        path = os.path.normpath(path)
    return Output(format, path, size, mtime_ns, sha256)


def _checksum(row: tuple[Any, ...], outputs: list[tuple[Any, ...]]) -> int:
    return zlib.crc32(repr((row, sorted(outputs, key=repr))).encode("utf-8", "backslashreplace"))


def _is_trusted(source: Source, entry: Entry) -> bool:
    known = (entry.mtime_ns, entry.inode)
    unchanged = known == (_int64(source.mtime_ns), _int64(source.inode))
    return unchanged and entry.mtime_ns + RACY_NS < entry.seen_ns


def _normal(path: Path) -> str:
    return os.path.abspath(path)


def _is_intact(output: Output) -> bool:
    try:
        status = os.lstat(output.path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != output.size:
            return False
        if _int64(status.st_mtime_ns) == output.mtime_ns:
            return True
        return file_digest(Path(output.path)) == output.sha256
    except (OSError, FileError):
        return False


def _int64(value: int) -> int:
    """Some file systems have inodes and times beyond SQLite's signed 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _storable(text: str) -> str:
    """Names that are not UTF-8 appear in messages; SQLite's text cannot hold them as they are."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _wall_seconds(transcript: Transcript) -> float:
    seconds = transcript.stats.get("wall_seconds", 0.0)
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _refuse_link(path: Path) -> None:
    for part in (path.parent, path):
        if part.is_symlink():
            raise UsageError(f"{part} is a symbolic link", hint="Remove it.")


def _move_aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    # The journal goes first: were it left beside a new manifest, SQLite would apply it there.
    with contextlib.suppress(FileNotFoundError):
        os.replace(f"{path}-journal", f"{aside}-journal")
    os.replace(path, aside)
    return aside


_REFUSALS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
_OTHERS_AT_WORK = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _code(error: sqlite3.DatabaseError | UnicodeDecodeError) -> int:
    """SQLite's primary code. Its messages quote the file, so damage can even make them unreadable,
    and Python then raises UnicodeDecodeError in place of the error."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


def _what(error: sqlite3.DatabaseError | UnicodeDecodeError) -> str:
    return "unreadable text" if isinstance(error, UnicodeDecodeError) else str(error)


def _is_damage(error: sqlite3.DatabaseError | UnicodeDecodeError) -> bool:
    """Anything but a refusal, when a manifest is opened: a flipped bit can look like any error."""
    return _code(error) not in _REFUSALS | _OTHERS_AT_WORK


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:  # a fault of the caller, not of the file
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise _explain(error, path) from error
    except OSError as error:
        raise StorageError(f"cannot use {path}: {error.strerror}") from error


def _explain(
    error: sqlite3.DatabaseError | UnicodeDecodeError, path: Path
) -> StorageError | BusyError:
    code = _code(error)
    if code in _OTHERS_AT_WORK:
        return BusyError(f"another process keeps {path} locked")
    if code in _REFUSALS:
        return StorageError(
            f"cannot use {path}: {error}",
            hint="Make sure that the disk has space and this user may write there.",
        )
    return StorageError(
        f"{path} is damaged: {_what(error)}",
        hint="Run the same command again: the damaged file is then moved aside.",
    )
