"""funasr-batch: transcribe whole folders of recordings with FunASR's models on Apple MLX.

    recognizer = funasr_batch.load("sample-paraformer")
    print(recognizer.transcribe("talk.wav").text)

Names are imported when they are first used: `import funasr_batch` is fast and loads neither numpy
nor MLX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funasr_batch.errors import (
        AudioError,
        BusyError,
        CheckpointError,
        ConfigError,
        FileError,
        FunasrBatchError,
        ModelError,
        NoInputError,
        RecognitionError,
        StorageError,
        UnstableError,
        UsageError,
        VanishedError,
    )
    from funasr_batch.loading import load
    from funasr_batch.recognizer import Recognizer
    from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript

__version__ = "0.1.0"

__all__ = [
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

_HOMES = {
    "Recognizer": "recognizer",
    "load": "loading",
    **dict.fromkeys(("ModelInfo", "SourceInfo", "TextSegment", "Token", "Transcript"), "records"),
}


if not TYPE_CHECKING:  # else a type checker would believe in any name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
        value = getattr(module, name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
