"""The recordings that a run is about: paths, folders, globs and lists to `Source`s.

The walk is finite and never opens a recording: links to folders are not followed, pipes and devices
are left alone, and every file is taken once, under the first name that it is met by. A suffix
decides in folders; a file that is named is taken whatever its suffix.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

from funasr_batch.config import ROOT_FILE
from funasr_batch.errors import NoInputError, UsageError
from funasr_batch.globs import compile_globs, has_magic, matches_any, name_regex
from funasr_batch.output_names import MEDIA_SUFFIXES, OUTPUT_SUFFIXES, output_paths
from funasr_batch.records import Source
from funasr_batch.settings import Settings


@dataclass(frozen=True, slots=True)
class Omission:
    """A path that gave no source, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class SourceList:
    """What was found."""

    sources: tuple[Source, ...]
    """In the order in which they are to be transcribed."""
    skipped: tuple[Omission, ...] = ()
    """Left out on purpose: links to folders, pipes, second names of a file. No failure."""
    failed: tuple[Omission, ...] = ()
    """Asked for and out of reach: missing, a dangling link, not permitted. The run exits with 1."""


def find_sources(
    paths: Iterable[str | os.PathLike[str]], settings: Settings, *, from_file: str | None = None
) -> SourceList:
    """Finds the recordings in `paths` and in the list `from_file`, and names their outputs.

    Uses the settings of the groups `inputs` and `output`, but for `max_files`: how many are enough
    can be told only once it is known which are done. With an output folder, the tree below the
    input folder is repeated in it; with several input folders, the tree below the folder that they
    have in common, so that where a transcript goes does not depend on what else is found.

    Raises NoInputError when no recording is found, UsageError when the list cannot be read.
    """
    search = _Search(settings)
    for path in paths:
        search.add(os.fspath(path))
    for path in read_list(from_file) if from_file else ():
        search.add_literally(path)
    if not search.found:
        raise search.nothing_found()
    return SourceList(
        tuple(_as_sources(search, settings)), tuple(search.skipped), tuple(search.failed)
    )


def read_list(name: str) -> tuple[str, ...]:
    """The paths in a list file, or in standard input for `-`: one a line, or ended by NUL.

    Raises UsageError when it cannot be read.
    """
    try:
        data = _standard_input() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot read the list of inputs {name!r}: {reason}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\0") if b"\0" in data else [x.rstrip(b"\r") for x in data.split(b"\n")]
    return tuple(os.fsdecode(line) for line in lines if line)


class _Found(NamedTuple):
    root: str
    relative: str
    path: str
    size: int
    mtime_ns: int
    inode: int


class _Search:
    """Collects recordings while paths are added one after another."""

    def __init__(self, settings: Settings) -> None:
        self.found: list[_Found] = []
        self.skipped: list[Omission] = []
        self.failed: list[Omission] = []
        self.roots: dict[str, None] = {}
        self._arguments = 0
        self._filtered = False
        self._seen: dict[tuple[int, int] | str, str] = {}
        self._recursive = settings.recursive
        self._include = compile_globs(settings.include)
        self._exclude = compile_globs(settings.exclude)
        self._output = _identity(settings.output_dir) if settings.output_dir else None

    def add(self, argument: str) -> None:
        """Adds a file, a folder, or what a pattern stands for that the shell did not expand."""
        if has_magic(argument) and not os.path.lexists(argument):
            matches = expand_pattern(argument)
            for match in matches:
                self.add_literally(match)
            if not matches:
                self._arguments += 1
                self._fail(_absolute(argument), "nothing matches this pattern")
        else:
            self.add_literally(argument)

    def add_literally(self, argument: str) -> None:
        self._arguments += 1
        if not argument:
            self.failed.append(Omission(Path(), "an empty path"))
            return
        path = _absolute(argument)
        try:
            info = os.stat(path)
        except (OSError, ValueError) as error:
            self._fail(path, _why(path, error))
            return
        if stat.S_ISDIR(info.st_mode):
            self._walk(path)
        else:
            self._add_named_file(path, info)

    def nothing_found(self) -> NoInputError:
        """The error that says why there is nothing to transcribe."""
        omitted = self.failed or self.skipped
        if not self._arguments:
            return NoInputError("no input: the list of paths is empty")
        if omitted:
            more = f" (and {len(omitted) - 1} more)" if len(omitted) > 1 else ""
            message = (
                f"no recording found: {_shown(str(omitted[0].path))}: {omitted[0].reason}{more}"
            )
            return NoInputError(message)
        if self._filtered:
            return NoInputError(
                "no recording found: --include and --exclude leave none",
                hint="they are compared with the path below the input folder, and case counts",
            )
        folders = ", ".join(_shown(root) for root in list(self.roots)[:3])
        return NoInputError(
            f"no recording found in {folders}",
            hint="in folders, files are known by their suffix; name a file to read it in any case",
        )

    def _walk(self, root: str) -> None:
        self.roots[root] = None
        folders = [""]
        while folders:
            inner = self._scan(root, folders.pop())
            if self._recursive:
                folders.extend(reversed(inner))

    def _scan(self, root: str, folder: str) -> list[str]:
        """Adds the recordings of one folder; returns the folders in it, all relative to `root`."""
        path = os.path.join(root, folder)
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self._fail(path, _why(path, error))
            return []
        inner = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if self._is_output(entry):
                    self._skip(entry.path, "the output folder")
                elif matches_any(self._exclude, relative):
                    self._filtered = True
                else:
                    inner.append(relative)
            elif os.path.splitext(entry.name)[1].lower() in MEDIA_SUFFIXES:
                self._add_entry(root, relative, entry)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                self._skip(entry.path, "a link to a folder")
        return inner

    def _add_entry(self, root: str, relative: str, entry: os.DirEntry[str]) -> None:
        if not self._is_wanted(relative):
            return
        try:
            info = entry.stat()
        except OSError as error:
            self._fail(entry.path, _why(entry.path, error))
            return
        if stat.S_ISDIR(info.st_mode):
            self._skip(entry.path, "a link to a folder")
        else:
            self._add_file(root, relative, entry.path, info)

    def _add_named_file(self, path: str, info: os.stat_result) -> None:
        folder, name = os.path.split(path)
        self.roots[folder] = None
        if name.startswith("."):
            self._skip(path, "a hidden file")
        elif os.path.splitext(name)[1].lower() in OUTPUT_SUFFIXES:
            self._skip(path, "a transcript, not a recording")
        elif name == ROOT_FILE:
            self._skip(path, "a configuration file")
        elif self._is_wanted(name):
            self._add_file(folder, name, path, info)

    def _add_file(self, root: str, relative: str, path: str, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            self._skip(path, _NOT_FILES.get(stat.S_IFMT(info.st_mode), "not a file"))
            return
        identity = (info.st_dev, info.st_ino) if info.st_ino else path
        first = self._seen.get(identity)
        if first is None:
            self._seen[identity] = path
            self.found.append(
                _Found(root, relative, path, info.st_size, info.st_mtime_ns, info.st_ino)
            )
        elif first != path:
            self._skip(path, f"the same file as {_shown(first)}")

    def _is_wanted(self, relative: str) -> bool:
        included = not self._include or matches_any(self._include, relative)
        wanted = included and not matches_any(self._exclude, relative)
        self._filtered |= not wanted
        return wanted

    def _is_output(self, entry: os.DirEntry[str]) -> bool:
        if self._output is None or entry.inode() != self._output[1]:
            return False
        return _identity(entry.path) == self._output

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Omission(Path(path), reason))

    def _fail(self, path: str, reason: str) -> None:
        self.roots.setdefault(path)
        self.failed.append(Omission(Path(path), reason))


def expand_pattern(pattern: str) -> list[str]:
    """What a shell with `**` puts in place of a pattern, sorted; links to folders are not followed
    by `**`, so that it always ends."""
    places = ["/" if pattern.startswith("/") else ""]
    for name in filter(None, pattern.split("/")):
        places = [match for place in places for match in _matches(place, name)]
    return sorted(dict.fromkeys(places))


def _matches(place: str, name: str) -> Iterator[str]:
    if name == "**":
        yield place or "."
        for entry in _entries(place):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _matches(os.path.join(place, entry.name), name)
    elif not has_magic(name):
        path = os.path.join(place, name)
        if os.path.lexists(path):
            yield path
    else:
        regex = name_regex(name)
        for entry in _entries(place):
            is_hidden = entry.name.startswith(".") and not name.startswith(".")
            if not is_hidden and regex.fullmatch(entry.name):
                yield os.path.join(place, entry.name)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder or ".") as listing:
            return list(listing)
    except (OSError, ValueError):  # as in a shell, what cannot be listed matches nothing
        return []


def _as_sources(search: _Search, settings: Settings) -> Iterator[Source]:
    found = sorted(search.found, key=_ORDERS[settings.order])
    roots = {root: Path(root) for root in search.roots}
    folders = [os.path.dirname(item.path) for item in found]
    if settings.output_dir is not None:
        base = os.path.commonpath(search.roots)
        mirrored = {path: _mirror(path, base, settings.output_dir) for path in set(folders)}
        folders = [mirrored[path] for path in folders]
    names = [os.path.basename(item.path) for item in found]
    outputs = output_paths(list(zip(folders, names, strict=True)))
    for item, output in zip(found, outputs, strict=True):
        yield Source(
            path=Path(item.path),
            root=roots[item.root],
            relative=PurePath(item.relative),
            output=Path(output),
            size=item.size,
            mtime_ns=item.mtime_ns,
            inode=item.inode,
        )


def _mirror(folder: str, base: str, output_dir: Path) -> str:
    relative = os.path.relpath(folder, base)
    return os.fspath(output_dir if relative == "." else output_dir / relative)


def _by_name(found: _Found) -> list[str]:
    return found.path.split("/")


_ORDERS: Final[dict[str, Callable[[_Found], Any]]] = {
    "name": _by_name,
    "newest": lambda found: (-found.mtime_ns, _by_name(found)),
    "oldest": lambda found: (found.mtime_ns, _by_name(found)),
    "shortest": lambda found: (found.size, _by_name(found)),
}

_NOT_FILES: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _why(path: str, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "a link that leads nowhere" if os.path.islink(path) else "does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "not the path of a file"


def _standard_input() -> bytes:
    if sys.stdin is None:  # as in a job that closes it
        raise OSError("standard input is closed")
    return sys.stdin.buffer.read()


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _absolute(path: str) -> str:
    """`path` from the root. Links are kept, but not before `..`, which leaves a link's target."""
    names = path.split("/")
    if ".." not in names:
        return os.path.abspath(path)
    end = len(names) - names[::-1].index("..")
    return os.path.join(os.path.realpath("/".join(names[:end])), *filter(None, names[end:]))


def _shown(path: str) -> str:
    return path if path.isprintable() else repr(path)
