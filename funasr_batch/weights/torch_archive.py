"""The zip archive that `torch.save` writes, all of whose claims are checked before they are used.

    NAME/data.pkl       the pickle that describes the tensors
    NAME/data/KEY       the bytes of one storage
    NAME/byteorder      of those bytes (since PyTorch 2.1)

PyTorch stores every member uncompressed, once, one after the other. Anything else is refused, and
so is a size that the file itself disproves: bombs, members that overlap, members that go on after
the end. A member's checksum is verified whenever it is read.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import CheckpointError

MAX_PICKLE_BYTES = 4 << 20
"""About twelve times the description of the largest FunASR model (1,347 tensors)."""

UNTRUSTED = (
    "Get a plain state dict from its publisher. Only load this file in PyTorch if you trust it."
)
DAMAGED = "The file is damaged or incomplete: download or copy it again."

_CHUNK = 1 << 20
_LOCAL_HEADER_BYTES = 30


class TorchArchive:
    """An open archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._members = _checked_members(path, archive)
        self._prefix = _archive_prefix(path, self._members)
        self._refuse_big_endian()

    def description(self) -> bytes:
        """The pickle."""
        member = self._members[f"{self._prefix}/data.pkl"]
        if member.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{self.path}: the description of its tensors takes {member.file_size} bytes; "
                f"{MAX_PICKLE_BYTES} are allowed",
                hint="Save the state dict alone, without optimiser state.",
            )
        with _reading(self.path, "the description of its tensors"):
            return self._archive.read(member)

    def check_storage(self, key: str, nbytes: int) -> None:
        """Refuses a storage that is not there or is not of this size."""
        member = self._members.get(f"{self._prefix}/data/{key}")
        if member is None:
            raise CheckpointError(f"{self.path} lacks the storage {key}", hint=DAMAGED)
        if member.file_size != nbytes:
            raise CheckpointError(
                f"{self.path}: storage {key} takes {member.file_size} bytes, which is not what its "
                "description says",
                hint=DAMAGED,
            )

    def read_storage(self, key: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fills `buffer` with the bytes of a storage from `first` on.

        The storage is read from beginning to end, because only then is its checksum known.
        """
        position = 0
        with (
            _reading(self.path, f"storage {key!a}"),
            self._archive.open(self._members[f"{self._prefix}/data/{key}"]) as stream,
        ):
            while chunk := stream.read(_CHUNK):
                start = max(first - position, 0)
                stop = min(first + len(buffer) - position, len(chunk))
                if start < stop:
                    target = position + start - first
                    part = np.frombuffer(chunk, np.uint8)[start:stop]
                    buffer[target : target + len(part)] = part
                position += len(chunk)

    def _refuse_big_endian(self) -> None:
        member = self._members.get(f"{self._prefix}/byteorder")
        if member is None:
            return
        with _reading(self.path, "its byte order"), self._archive.open(member) as stream:
            order = stream.read(16)
        if order != b"little":
            raise CheckpointError(
                f"{self.path} was written with byte order {order.decode('latin-1')!a}; only little "
                "is read",
                hint="Load and save it again with PyTorch on a little-endian machine.",
            )


@contextmanager
def open_archive(path: Path) -> Iterator[TorchArchive]:
    """Opens a file written by `torch.save`.

    Raises:
        CheckpointError: it is of another kind, is damaged, or is no archive that PyTorch writes.
    """
    _refuse_other_kinds(path)
    with _reading(path, "the zip directory"):
        archive = zipfile.ZipFile(path)
    with archive:
        yield TorchArchive(path, archive)


@contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Turns what zipfile and the file system raise into one refusal."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path}: {part} is damaged: {error}", hint=DAMAGED) from error


def _refuse_other_kinds(path: Path) -> None:
    with _reading(path, "its beginning"), path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself",
            hint="Run `git lfs pull` in that folder, or download the file from the hub.",
        )
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is in the format of PyTorch before 1.6, a bare pickle, which is not read",
            hint="Save it again with torch.save of any PyTorch since 1.6 (the zip format).",
        )
    raise CheckpointError(f"{path} is not a file written by torch.save", hint=DAMAGED)


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = archive.infolist()
    for name, count in Counter(member.filename for member in members).items():
        if count > 1:
            raise _refusal(path, f"holds {name[:80]!a} {count} times")
        if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise _refusal(path, f"holds a member with the unsafe name {name[:80]!a}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _refusal(path, f"holds {member.filename[:80]!a} compressed or encrypted")
    _refuse_impossible_places(path, members)
    return {member.filename: member for member in members}


def _refuse_impossible_places(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses sizes that cannot be true: of members that overlap, or that end after the file."""
    end_of_file = path.stat().st_size
    in_order = sorted(members, key=lambda member: member.header_offset)
    starts = [member.header_offset for member in in_order] + [end_of_file]
    for member, following in zip(in_order, starts[1:], strict=True):
        header = _LOCAL_HEADER_BYTES + len(member.filename)
        if member.header_offset + header + member.compress_size > following:
            raise _refusal(path, "holds members that overlap or reach beyond its end")
        if member.file_size != member.compress_size:
            raise _refusal(path, f"lies about the size of {member.filename[:80]!a}")


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}, which torch.save never does", hint=UNTRUSTED)


def _archive_prefix(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    found = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    top = [prefix for prefix in found if "/" not in prefix]
    if len(top) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not one written by torch.save")
    return top[0]
