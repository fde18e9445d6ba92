"""The command as a user runs it: in a process of its own, with a home folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

PROJECT = Path(__file__).parents[1]
TIMEOUT = 60
"""Seconds after which a command counts as hanging."""

ALONE = ("--batch-seconds", "1")
"""Each clip is a batch of its own. Otherwise what is in a batch depends on how fast files are read,
and the last digit of a confidence on what is in its batch."""

_NOT_INHERITED = ("XDG_", "HF_", "NO_COLOR", "TERM", "COLUMNS", "LINES", "PYTHON")


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Command:
    """Runs `python -m funasr_batch`."""

    home: Path
    model: Path
    """The model that the user's configuration names."""

    @classmethod
    def with_home(cls, home: Path, model: Path) -> Command:
        """Makes a home folder whose user always wants this model."""
        configuration = home / ".config" / "funasr-batch" / "config.yaml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(f"model: {json.dumps(str(model))}\n")
        return cls(home, model)

    def __call__(
        self,
        *arguments: str | Path,
        stdin: bytes = b"",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Iterable[str] = (),
        sabotage: str = "",
    ) -> Ended:
        """Runs it to its end; `prefix` is a program that starts it, such as `setpriv`."""
        ended = subprocess.run(
            [*prefix, *self.line(*arguments, sabotage=sabotage)],
            input=stdin,
            capture_output=True,
            cwd=cwd or self.home,
            env=self.environment(env),
            timeout=TIMEOUT,
        )
        return Ended(ended.returncode, _text(ended.stdout), _text(ended.stderr))

    def start(
        self, *arguments: str | Path, sabotage: str = "", **options: Any
    ) -> subprocess.Popen[bytes]:
        """Starts it with stdout and stderr as pipes, if `options` of Popen say nothing else."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = self.environment(options.pop("env", None))
        line = self.line(*arguments, sabotage=sabotage)
        fixed = {"cwd": self.home, "env": env, "preexec_fn": _default_signals}
        return subprocess.Popen(line, **fixed | pipes | options)

    def line(self, *arguments: str | Path, sabotage: str = "") -> list[str]:
        """The words of the command line; `sabotage` is Python that first breaks a part of it."""
        program = ["-m", "funasr_batch"]
        if sabotage:
            program = ["-c", f"{sabotage}\nfrom funasr_batch.__main__ import main; main()"]
        return [sys.executable, *program, *map(os.fspath, arguments)]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        fixed = {"HOME": str(self.home), "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # starts faster
        return inherited | fixed | one_thread | dict(more or {})


def without_mlx(folder: Path) -> dict[str, str]:
    """An environment in which the import of MLX ends the process with code 99."""
    package = folder / "poisoned" / "mlx"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("import os\nos._exit(99)\n")
    return {"PYTHONPATH": f"{package.parent}{os.pathsep}{PROJECT}"}


def _default_signals() -> None:
    """Tests may run in the background of a shell that ignores INT for its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# Recordings


@cache
def _speech() -> npt.NDArray[np.float32]:
    samples, rate = soundfile.read(PROJECT / "sample_audio" / "mandarin.wav", dtype="float32")
    assert rate == 16_000
    return samples  # type: ignore[no-any-return]


def speech(seconds: float, start: float = 0.0) -> npt.NDArray[np.float32]:
    """Mandarin at 16 kHz, from some point of a recording that is repeated."""
    first = round(start * 16_000)
    return np.take(_speech(), range(first, first + round(seconds * 16_000)), mode="wrap")


def record(path: Path, seconds: float = 1.5, start: float = 0.0) -> Path:
    """Writes speech in the format of the path's suffix, in folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that libsndfile cannot take is given afterwards.
    plain = path.with_name(f"recording{path.suffix}")
    soundfile.write(plain, speech(seconds, start), 16_000)
    os.rename(plain, path)
    settle(path)
    return path


def settle(*paths: Path) -> None:
    """Makes recordings look an hour old: of newer ones the run would read the content again."""
    for path in paths:
        status = path.stat()
        hour = 3600 * 10**9
        os.utime(path, ns=(status.st_atime_ns - hour, status.st_mtime_ns - hour))


def files(folder: Path) -> set[str]:
    """All files below a folder but the run's own state, relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if ".funasr-batch" not in path.parts}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def transcript(path: Path) -> dict[str, Any]:
    """A JSON output without what may differ between two runs: how long they took."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    del document["stats"]
    return document


def comparable(folder: Path) -> dict[str, object]:
    """All files, in a form that is the same for runs that came to the same result."""
    return {
        name: transcript(folder / name) if name.endswith(".json") else (folder / name).read_bytes()
        for name in files(folder)
    }


def is_tool(name: str) -> bool:
    return shutil.which(name) is not None
