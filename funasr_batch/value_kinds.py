"""What the value of a setting may be.

Each kind has `check(value, folder)`, which returns the value in its final type or raises
ValueError (`folder` is where relative paths start); `allowed`, which completes "it must be …"; and
`names`, the words among the allowed values. A checked value passes its own check again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

from funasr_batch.weights.quantize import parse_quantization

Value: TypeAlias = str | int | float | bool | Path | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Switch:
    allowed = "true or false"
    names = ()

    def check(self, value: object, folder: Path) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class OneOf:
    names: tuple[str, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)
    because: str = ""
    """Why a value that users may expect is not among them."""

    @property
    def allowed(self) -> str:
        reason = f" ({self.because})" if self.because else ""
        return f"{', '.join(self.names[:-1])} or {self.names[-1]}{reason}"

    def check(self, value: object, folder: Path) -> str:
        if not isinstance(value, str):
            raise ValueError
        name = value.strip().casefold()
        name = self.synonyms.get(name, name)
        if name not in self.names:
            raise ValueError
        return name


@dataclass(frozen=True, slots=True)
class SomeOf:
    """A list of names, or one string with commas; `all` is all of them. Kept in `names`' order."""

    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"all, or some of {','.join(self.names)}"

    def check(self, value: object, folder: Path) -> tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else _strings(value)
        chosen = {item.strip().casefold() for item in items} - {""}
        if chosen == {"all"}:
            return self.names
        if not chosen or not chosen <= set(self.names):
            raise ValueError
        return tuple(name for name in self.names if name in chosen)


@dataclass(frozen=True, slots=True)
class Number:
    low: float
    high: float
    names = ()

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def check(self, value: object, folder: Path) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not self.low <= value <= self.high:  # NaN fails this too
            raise ValueError
        return float(value)


@dataclass(frozen=True, slots=True)
class Whole:
    low: int
    high: int
    names = ()

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def check(self, value: object, folder: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if not self.low <= value <= self.high:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Track:
    """An audio track: its number, counted from 1, or the language that its container states."""

    allowed = "a track's number from 1, or a language code such as en or zho"
    names = ()

    def check(self, value: object, folder: Path) -> int | str:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000:
            return value
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*", value):
            return value.lower()
        raise ValueError


@dataclass(frozen=True, slots=True)
class Globs:
    allowed = "a path pattern or a list of them"
    names = ()

    def check(self, value: object, folder: Path) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else _strings(value)
        if not all(item.strip("/") and "\0" not in item for item in items):
            raise ValueError
        return items


@dataclass(frozen=True, slots=True)
class Words:
    """Terms, with commas between them, or a list of such."""

    allowed = "words with commas between them, or a list of words"
    names = ()

    def check(self, value: object, folder: Path) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else _strings(value)
        items = (item.strip() for text in texts for item in re.split("[,，、]", text))
        return tuple(dict.fromkeys(item for item in items if item))


@dataclass(frozen=True, slots=True)
class PathOf:
    """A path; it becomes absolute. `-`, standard output, stays `-`."""

    what: Literal["file", "folder"]
    names = ()

    @property
    def allowed(self) -> str:
        return f"the path of a {self.what}"

    def check(self, value: object, folder: Path) -> Path:
        text = os.fspath(value) if isinstance(value, PurePath) else value
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValueError
        if text == "-" and self.what == "file":
            return Path(text)
        return _absolute(text, folder)


@dataclass(frozen=True, slots=True)
class Model:
    """A model's name, `hf:ORG/NAME`, or the path of its folder, which has a slash or begins with
    `.` or `~` and becomes absolute."""

    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"{', '.join(self.names)}, hf:ORG/NAME or the path of a folder"

    def check(self, value: object, folder: Path) -> str:
        text = os.fspath(value) if isinstance(value, PurePath) else value
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            raise ValueError
        if text.startswith(("hf:", "ms:")):
            if not re.fullmatch(r"..:[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
                raise ValueError
            return text
        is_folder = "/" in text or text.startswith((".", "~"))
        return os.fspath(_absolute(text, folder)) if is_folder else text


@dataclass(frozen=True, slots=True)
class Quantized:
    """Bits of a model's layers: a preset's name or `encoder=8,llm=4`, which it becomes."""

    names = ("int8", "int8-all", "int4")
    allowed = "int8, int8-all, int4 or bits such as encoder=8,llm=4 (each 4 or 8)"

    def check(self, value: object, folder: Path) -> str | None:
        if not isinstance(value, str):
            raise ValueError
        plan = parse_quantization(value)
        return str(plan) if plan else None


Kind: TypeAlias = (
    Switch | OneOf | SomeOf | Number | Whole | Track | Globs | Words | PathOf | Model | Quantized
)


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ValueError
    return tuple(value)


def _absolute(text: str, folder: Path) -> Path:
    path = (folder / os.path.expanduser(text)).absolute()
    return Path(os.path.realpath(path)) if ".." in path.parts else path
