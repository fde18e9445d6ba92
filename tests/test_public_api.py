"""What `import funasr_batch` offers, and that it costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model

import funasr_batch
from funasr_batch import errors, loading, recognizer, records

PUBLIC = [
    "AudioError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "FileError",
    "FunasrBatchError",
    "ModelError",
    "ModelInfo",
    "NoInputError",
    "RecognitionError",
    "Recognizer",
    "SourceInfo",
    "StorageError",
    "TextSegment",
    "Token",
    "Transcript",
    "UnstableError",
    "UsageError",
    "VanishedError",
    "__version__",
    "load",
]


def test_the_public_names_are_these() -> None:
    assert funasr_batch.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(funasr_batch))


def test_every_public_name_is_what_its_module_holds() -> None:
    homes = {**vars(errors), **vars(records), **vars(recognizer), **vars(loading)}
    for name in PUBLIC:
        if name != "__version__":
            assert getattr(funasr_batch, name) is homes[name]


def test_every_error_is_public() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert defined <= set(PUBLIC)


def test_a_name_that_is_not_there_is_refused_as_usual() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'transcribe'"):
        _ = funasr_batch.transcribe  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from funasr_batch import Clip")  # internal: it never leaves the package


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from funasr_batch import *", names)
    assert set(PUBLIC) <= set(names)


def test_the_import_loads_neither_numpy_nor_mlx() -> None:
    code = (
        "import sys, funasr_batch; "
        "print(sorted({'numpy', 'mlx', 'mlx.core', 'yaml', 'av'} & set(sys.modules))); "
        "funasr_batch.AudioError; print('numpy' in sys.modules); "
        "funasr_batch.Transcript; print('numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "False", "True"]


def test_two_lines_transcribe(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    samples = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)

    transcript = funasr_batch.load(folder, vad="none").transcribe(samples)

    assert isinstance(transcript, funasr_batch.Transcript)
    assert transcript.text
    assert transcript.source.duration == 2.0
