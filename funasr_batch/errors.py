"""Every error that this package raises on purpose.

    FunasrBatchError
    ├── UsageError               exit 2   the command line or an argument is wrong
    │   └── ConfigError          exit 2   a configuration file is wrong
    ├── NoInputError             exit 3   nothing to transcribe was found
    ├── ModelError               exit 4   a model or a dependency is missing
    │   └── CheckpointError      exit 4   a model's files were refused
    ├── StorageError             exit 5   the disk refuses to keep results
    ├── BusyError                exit 75  another run holds the output folder
    └── FileError                exit 1   one recording failed; the run goes on
        ├── AudioError           cannot be opened or decoded, or is over a limit
        ├── VanishedError        was there when the run began, is not any more
        ├── UnstableError        changed while it was read
        └── RecognitionError     the model failed on it

A message says what happened and to which file; `hint` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class FunasrBatchError(Exception):
    """Base of the tree. `exit_code` is the process's; `retry`: a later try may help."""

    exit_code: ClassVar[int] = 70
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FunasrBatchError):
    """The command line, or an argument of a public function, is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file has an unknown key, a wrong type or a bad value."""


class NoInputError(FunasrBatchError):
    """No recording matched the paths and filters that were given."""

    exit_code = 3


class ModelError(FunasrBatchError):
    """A model or a dependency that the run needs is missing."""

    exit_code = 4


class CheckpointError(ModelError):
    """The files of a model were refused: corrupt, unsafe, incomplete or of an unknown kind."""


class StorageError(FunasrBatchError):
    """Results cannot be kept: disk full, read-only, I/O error."""

    exit_code = 5
    retry = True


class BusyError(FunasrBatchError):
    """Another run holds this output folder."""

    exit_code = 75
    retry = True


class FileError(FunasrBatchError):
    """One recording failed. It costs that recording and exit code 1, never the run."""

    exit_code = 1


class AudioError(FileError):
    """A recording cannot be opened or decoded, or is over a limit."""


class VanishedError(FileError):
    """A recording was there when the run began and is not any more."""

    retry = True


class UnstableError(FileError):
    """A recording changed while it was read."""

    retry = True


class RecognitionError(FileError):
    """The model failed on a recording that decoded well."""

    retry = True
