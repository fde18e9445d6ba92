"""The small files of a model in FunASR's layout: found where its metadata says, read with limits.

What is read here comes from strangers: a name must not lead out of the folder, a text has a size, a
configuration has a number of values and holds nothing but what JSON can hold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from funasr_batch.errors import CheckpointError

INCOMPLETE = "The folder is incomplete: download or copy it again."

_MAX_TEXT_BYTES = 16 << 20
_MAX_CONFIG_VALUES = 10_000
_MAX_INTERPOLATIONS = 8
"""How many references a value may go through; a chain of two is already unusual."""


def read_metas(path: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """`file_path_metas` of a `configuration.json`, and the file itself where there is one."""
    if not path.is_file():
        return None, {}
    content = read_json(path)
    metas = content.get("file_path_metas", {}) if isinstance(content, dict) else None
    if not isinstance(metas, dict):
        raise CheckpointError(f"{path}: file_path_metas is not a dictionary")
    return path, metas


def value_at(tree: Mapping[str, Any], *keys: str) -> Any:
    """The value under nested keys; None where one of them is missing."""
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def named(source: Path, metas: Mapping[str, Any], *keys: str) -> Path | None:
    """The file that configuration.json names under these keys, if it names one."""
    path = inside(source, source / "configuration.json", metas, *keys)
    return None if path is None else required(path)


def inside(source: Path, origin: Path, tree: Mapping[str, Any], *keys: str) -> Path | None:
    """The path that the file `origin` names under these keys; whether it exists is not asked.

    Raises:
        CheckpointError: the name leads out of the folder `source`.
    """
    value = value_at(tree, *keys)
    if value is None:
        return None
    # Links are followed: the hub's cache is made of them. It is the name that must not climb out.
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[^\0\\:]{1,255}", value)
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        raise CheckpointError(
            f"{origin}: {'.'.join(keys)} names {str(value)[:80]!a}, which is not inside the folder"
        )
    return source / value


def required(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}", hint=INCOMPLETE)
    return path


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}", hint=INCOMPLETE) from error


def read_json(path: Path) -> Any:
    """A JSON file as it is; vocabularies have more values than a configuration may have."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=INCOMPLETE) from error


def read_json_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON, such as the `config.json` of a language model."""
    return _checked_config(path, read_json(path))


def read_config(path: Path) -> dict[str, Any]:
    """FunASR's config.yaml, with its references to other values (`${llm_conf.x}`) resolved."""
    text = read_text(required(path))
    try:
        content = yaml.load(text, _ConfigLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    config = _checked_config(path, content)
    return {key: _resolved(value, config) for key, value in config.items()}


def _checked_config(path: Path, content: Any) -> dict[str, Any]:
    try:
        config = _plain(content, iter(range(_MAX_CONFIG_VALUES)))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no dictionary")
    return config


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a configuration that can be read: {error}")


class _ConfigLoader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as FunASR's loader does; YAML 1.1 knows `1.0e-4` only."""


_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _plain(value: Any, budget: Iterator[int]) -> Any:
    """A copy of what JSON can hold; the budget ends YAML's aliases of aliases of aliases."""
    if next(budget, None) is None:
        raise ValueError(f"it holds more than {_MAX_CONFIG_VALUES} values")
    match value:
        case dict():
            return {str(key): _plain(item, budget) for key, item in value.items()}
        case list():
            return [_plain(item, budget) for item in value]
        case float() if not math.isfinite(value):
            raise ValueError(f"{value} is not a usable number")
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise ValueError(f"a {type(value).__name__} has no place in it")


def _resolved(value: Any, config: Mapping[str, Any]) -> Any:
    match value:
        case dict():
            return {key: _resolved(item, config) for key, item in value.items()}
        case list():
            return [_resolved(item, config) for item in value]
        case str():
            return _followed(value, config)
        case _:
            return value


def _followed(text: str, config: Mapping[str, Any]) -> Any:
    """What a reference such as `${llm_conf.init_param_path}` stands for; other text as it is.

    Only scalars are put in, so that references cannot multiply what there is.
    """
    value: Any = text
    for _ in range(_MAX_INTERPOLATIONS):
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            return value
        value = value_at(config, *reference[1].split("."))
        if value is None or isinstance(value, dict | list):
            return text
    return text
