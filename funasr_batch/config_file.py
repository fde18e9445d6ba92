"""One configuration file: YAML text to a layer of checked settings.

A mistake is one line that names file, line and key and says what is allowed. Anchors and tags are
refused and nesting and length are limited, so that no small file can grow large in memory.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import yaml

from funasr_batch.config import ROOT_FILE, Layer, Placed, Rule
from funasr_batch.errors import ConfigError
from funasr_batch.globs import compile_globs
from funasr_batch.settings import (
    KEYS,
    PER_RECORDING,
    Group,
    flag_of,
    nearest,
    quoted,
    refusal,
)
from funasr_batch.value_kinds import Globs

MAX_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 8
MAX_SCALAR: Final = 10_000


def read_config(file: Path, groups: frozenset[Group]) -> Layer:
    """The settings in `file`, which may hold only those of `groups`. Raises ConfigError."""
    root = _compose(file, _read_text(file))
    if root is None or _plain(root) is None:
        return Layer({}, file=file)
    return _Reader(file, groups).layer(root)


class _Pair(NamedTuple):
    """A key and its value, as YAML nodes: they know their lines."""

    key: yaml.Node
    value: yaml.Node


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the nodes of one file."""

    file: Path
    groups: frozenset[Group]

    def layer(self, root: yaml.Node) -> Layer:
        pairs = self._pairs(root, "a configuration")
        rules = pairs.pop("rules", None)
        return Layer(self._values(pairs, self.groups), self._rules(rules), self.file)

    def _rules(self, pair: _Pair | None) -> tuple[Rule, ...]:
        if pair is None or _plain(pair.value) is None:
            return ()
        if not isinstance(pair.value, yaml.SequenceNode):
            raise self._error(pair.key, "rules must be a list, each with a match and settings")
        return tuple(self._rule(node) for node in pair.value.value)

    def _rule(self, node: yaml.Node) -> Rule:
        pairs = self._pairs(node, "a rule")
        if "match" not in pairs:
            raise self._error(node, "a rule needs a match, the pattern of the paths it is for")
        patterns = self._patterns(pairs.pop("match"))
        values = self._values(pairs, PER_RECORDING)
        return Rule(compile_globs(patterns), values, self._place(node))

    def _patterns(self, pair: _Pair) -> tuple[str, ...]:
        try:
            patterns = Globs().check(_plain(pair.value), Path())
        except ValueError:
            patterns = ()
        if not patterns:
            raise self._error(pair.key, f"match must be {Globs.allowed}")
        return patterns

    def _values(self, pairs: Mapping[str, _Pair], groups: frozenset[Group]) -> dict[str, Placed]:
        return {name: self._value(name, pair, groups) for name, pair in pairs.items()}

    def _value(self, name: str, pair: _Pair, groups: frozenset[Group]) -> Placed:
        key = KEYS.get(name)
        if key is None:
            hint = nearest(name, (*KEYS, "rules")) or "--print-config shows all keys"
            raise self._error(pair.key, f"unknown key {quoted(name)}", hint)
        if key.group not in groups:
            where = "a rule" if self.groups != PER_RECORDING else f"{ROOT_FILE} among the inputs"
            raise self._error(
                pair.key,
                f"{name} may not be set by {where}: only recognition, formats and subtitles may",
                f"give {flag_of(name)}, or set it at the top of a file named with --config",
            )
        value = _plain(pair.value)
        try:
            final = key.check(value, self.file.absolute().parent)
        except ValueError:
            raise self._error(pair.key, *refusal(name, value)) from None
        return Placed(final, self._place(pair.key))

    def _pairs(self, node: yaml.Node, what: str) -> dict[str, _Pair]:
        """The keys and values of a mapping by key; hyphens in keys become underscores."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} must be lines such as `language: zh`")
        pairs: dict[str, _Pair] = {}
        for key, value in node.value:
            name = _plain(key)
            if not isinstance(name, str):
                raise self._error(key, f"unknown key {quoted(name)}")
            name = name.replace("-", "_")
            if name in pairs:
                raise self._error(key, f"{quoted(name)} is set twice")
            pairs[name] = _Pair(key, value)
        return pairs

    def _place(self, node: yaml.Node) -> str:
        return f"{_shown(self.file)} line {node.start_mark.line + 1}"

    def _error(self, node: yaml.Node, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{self._place(node)}: {message}", hint=hint)


def _read_text(file: Path) -> str:
    try:
        if stat.S_ISDIR(file.stat().st_mode):
            raise ConfigError(f"{_shown(file)} is a folder, not a configuration file")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot read configuration {_shown(file)}: {reason}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{_shown(file)} is larger than a configuration may be, 1 MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{_shown(file)} line {line}: not UTF-8 text") from error


def _compose(file: Path, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{_shown(file)} line {line}: {problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{_shown(file)} line {line}: not YAML text") from error


class _Loader(yaml.SafeLoader):
    """Composes nodes only as far as a configuration goes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "anchors, aliases and tags are not supported"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if self.depth == MAX_DEPTH or len(getattr(event, "value", "")) > MAX_SCALAR:
            problem = "nested too deeply, or too long for a value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _plain(node: yaml.Node) -> object:
    """A node's value as YAML understands it; a mapping, which no setting is, becomes `{}`."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {}
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, OverflowError, yaml.YAMLError):  # such as a date in month 13
        return node.value


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)
