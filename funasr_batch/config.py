"""Layers of settings, rules by path, and where each value came from.

Of two layers the later one wins:

 1. built-in defaults
 2. the user's `$XDG_CONFIG_HOME/funasr-batch/config.yaml`
 3. the file given with `--config`
 4. `funasr-batch.yaml` in the input folder, which may set no path of the run
 5. the command line

A file may also hold `rules:`, each with a path pattern and settings for the recordings that match.
Within one file a rule wins over the plain keys and a later rule over an earlier one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Final

from funasr_batch.errors import ConfigError
from funasr_batch.globs import Glob, matches_any
from funasr_batch.settings import ALL_GROUPS, DEFAULTS, KEYS, PER_RECORDING, Settings, flag_of
from funasr_batch.value_kinds import Value

ROOT_FILE: Final = "funasr-batch.yaml"


@dataclass(frozen=True, slots=True)
class Placed:
    """A checked value and the place that it was read from."""

    value: Value
    origin: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings for the recordings whose path below the input folder matches."""

    match: tuple[Glob, ...]
    values: Mapping[str, Placed]
    origin: str

    def applies_to(self, relative: PurePath) -> bool:
        return matches_any(self.match, relative.as_posix())


@dataclass(frozen=True, slots=True)
class Layer:
    """What one configuration file, or the command line, sets."""

    values: Mapping[str, Placed]
    rules: tuple[Rule, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Layers:
    """All layers that hold for one input folder, merged on demand."""

    files: tuple[Layer, ...]
    flags: Layer
    _by_rules: dict[tuple[int, ...], Settings] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def settings(self) -> Settings:
        """The settings of a recording that no rule names. Raises ConfigError, as `for_source`."""
        return self._with_rules(())

    def for_source(self, relative: PurePath) -> Settings:
        """The settings of the recording at `relative`, its path below the input folder.

        Recordings to which the same rules apply share one object. Raises ConfigError when values
        that are fine one by one contradict each other.
        """
        applying = (i for i, rule in enumerate(self.rules) if rule.applies_to(relative))
        return self._with_rules(tuple(applying))

    def at_root(self, root: Path) -> Layers:
        """These layers and the `funasr-batch.yaml` of an input folder, if it has one.

        Raises ConfigError, also when that file, which came with the recordings, sets more than
        recognition, formats and subtitles.
        """
        file = root / ROOT_FILE
        if not os.path.isfile(file) or any(_is_same(file, layer.file) for layer in self.files):
            return self
        return Layers((*self.files, _read(file, foreign=True)), self.flags)

    @cached_property
    def values(self) -> Mapping[str, Placed]:
        """Every setting, without the rules."""
        merged = {name: Placed(value, "built-in") for name, value in DEFAULTS.items()}
        for layer in (*self.files, self.flags):
            merged |= layer.values
        return merged

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that have an effect, the one that wins last.

        What a later layer sets plainly is taken out of the rules of the layers before it.
        """
        effective: list[Rule] = []
        overridden = set(self.flags.values)
        for layer in reversed(self.files):
            for rule in reversed(layer.rules):
                values = {name: v for name, v in rule.values.items() if name not in overridden}
                if values:
                    effective.append(replace(rule, values=values))
            overridden |= layer.values.keys()
        return tuple(reversed(effective))

    def describe(self) -> str:
        """The merged settings as YAML, each with its origin; what `--print-config` prints.

        Read as a configuration file, the text gives the same settings.
        """
        lines = [_line(name, placed) for name, placed in self.values.items()]
        if self.rules:
            lines.append("rules:")
        for rule in self.rules:
            patterns = tuple(glob.pattern for glob in rule.match)
            lines.append(_commented(f"- match: {_yaml(patterns)}", rule.origin))
            lines += [_line(name, placed, "  ") for name, placed in rule.values.items()]
        return "\n".join(lines) + "\n"

    def _with_rules(self, indices: tuple[int, ...]) -> Settings:
        # Few combinations of rules occur, over very many recordings.
        if indices not in self._by_rules:
            merged = dict(self.values)
            for index in indices:
                merged |= self.rules[index].values
            _refuse_contradictions(merged)
            values: dict[str, Any] = {name: placed.value for name, placed in merged.items()}
            self._by_rules[indices] = Settings(**values)
        return self._by_rules[indices]


def load_layers(
    config: Path | None = None,
    flags: Mapping[str, Value] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Layers:
    """The layers that hold for all inputs: the user's file, `--config` and the command line.

    `flags` are settings by name, as `parse_flags` gives them. Raises ConfigError.
    """
    user = _user_file(environ)
    files = []
    if user is not None and os.path.isfile(user):
        files.append(_read(user, foreign=False))
    if config is not None:
        files.append(_read(config.expanduser(), foreign=False))
    given = {name: Placed(value, flag_of(name)) for name, value in (flags or {}).items()}
    return Layers(tuple(files), Layer(given))


def _read(file: Path, *, foreign: bool) -> Layer:
    from funasr_batch.config_file import read_config  # loads YAML, which most runs do not need

    return read_config(file, PER_RECORDING if foreign else ALL_GROUPS)


def _user_file(environ: Mapping[str, str]) -> Path | None:
    base = Path(environ.get("XDG_CONFIG_HOME", ""))
    if not base.is_absolute():  # the XDG specification: a relative path is to be ignored
        home = environ.get("HOME")
        if not home:
            return None
        base = Path(home, ".config")
    return base / "funasr-batch" / "config.yaml"


def _is_same(file: Path, other: Path | None) -> bool:
    try:
        return other is not None and file.samefile(other)
    except OSError:
        return False


def _refuse_contradictions(values: Mapping[str, Placed]) -> None:
    low, high = values["min_duration"], values["max_duration"]
    if isinstance(low.value, float) and isinstance(high.value, float) and low.value > high.value:
        raise ConfigError(
            f"min_duration {low.value:g} ({low.origin}) is more than "
            f"max_duration {high.value:g} ({high.origin})"
        )


# --- Writing YAML


def _line(name: str, placed: Placed, indent: str = "") -> str:
    value = placed.value
    text = str(KEYS[name].unset) if value is None else _yaml(value)
    return _commented(f"{indent}{name}: {text}", placed.origin)


def _commented(line: str, comment: str) -> str:
    return f"{line:<32}  # {comment}"


def _yaml(value: Value) -> str:
    match value:
        case bool() | int() | float():
            return json.dumps(value)
        case tuple():
            return f"[{', '.join(map(_yaml, value))}]"
    text = str(value)
    if re.fullmatch(r"/?[A-Za-z][\w./-]*", text, re.ASCII) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


_YAML_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
