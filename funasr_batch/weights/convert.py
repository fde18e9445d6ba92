"""Turns a model in FunASR's layout into a converted folder (checkpoint.py), once.

Read: `configuration.json`, whose `file_path_metas` say where the other files are; else
`config.yaml`, `model.pt`, `am.mvn` and `tokens.json` or `tokens.txt`
(FunASR funasr/download/download_model_from_hub.py). Tensors keep their names, shapes and dtypes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    Cmvn,
    is_converted,
    open_checkpoint,
    partial_prefix,
    read_tokens,
    write_checkpoint,
)
from funasr_batch.weights.safetensors_file import TensorSpec
from funasr_batch.weights.torch_pickle import TensorFile, open_pt

ARCHITECTURES = ("Paraformer", "BiCifParaformer", "SeacoParaformer", "FsmnVADStreaming")
_WITHOUT_TOKENS = frozenset({"FsmnVADStreaming"})

_CONFIG_KEYS = (
    "model_conf",
    "encoder",
    "encoder_conf",
    "decoder",
    "decoder_conf",
    "predictor",
    "predictor_conf",
    "seaco_decoder",
    "seaco_decoder_conf",
    "frontend",
    "frontend_conf",
    "tokenizer",
    "tokenizer_conf",
)
_MAX_TEXT_BYTES = 16 << 20
_MAX_CONFIG_VALUES = 10_000
_INCOMPLETE = "The folder is incomplete: download or copy it again."


@dataclass(frozen=True, slots=True)
class FunasrFolder:
    """The files of a model in FunASR's layout, and what its configuration says."""

    path: Path
    architecture: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    """Every file that the conversion depends on."""
    weights: Path
    cmvn: Path | None
    tokens: Path | None


def convert(source: Path, destination: Path, *, revision: str | None = None) -> Path:
    """Converts a model in FunASR's layout and returns `destination`, a converted folder.

    Memory holds one tensor at a time. Where `destination` is a conversion of the same files
    already, nothing is done; of two processes that convert at once, one wins and both return.

    Raises:
        CheckpointError: the model is incomplete, damaged, unsafe or of an unknown architecture;
            or something else is at `destination`.
        StorageError: the disk refuses.
    """
    folder = read_layout(source)
    digests = {str(file.relative_to(source)): _sha256(file) for file in folder.files}
    if not _holds(destination, digests):
        try:
            _write(folder, destination, {"revision": revision, "sha256": digests})
        except CheckpointError:
            if not _holds(destination, digests):  # else another process was faster
                raise
    return destination


def ensure_converted(source: Path, cache_dir: Path, *, revision: str | None = None) -> Path:
    """Returns a converted folder for a model, from the cache when it was converted before.

    A folder that is converted already is returned as it is. The cache knows a source by the path,
    size, time and inode of its files: a changed source is converted again.

    Raises:
        CheckpointError, StorageError: as `convert`.
    """
    if is_converted(source):
        return open_checkpoint(source).folder
    folder = read_layout(source)
    key = _fingerprint(folder)
    destination = cache_dir / "models" / f"{folder.architecture.lower()}-{key[:20]}"
    if _opened(destination):
        return destination
    with _lock(destination):
        if not _opened(destination):
            _remove_remains(destination)
            convert(source, destination, revision=revision)
    return destination


def read_layout(source: Path) -> FunasrFolder:
    """Finds the files of a model in FunASR's layout and reads its configuration.

    Raises:
        CheckpointError: a file is missing, leads out of the folder, or the model is of a kind that
            this version does not know.
    """
    metadata, metas = _read_metas(source / "configuration.json")
    config_file = _named(source, metas, "config") or source / "config.yaml"
    config = _read_config(config_file)
    architecture = config.get("model")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{config_file}: the model {str(architecture)[:80]!a} is of a kind that this version "
            "cannot run",
            hint=f"It runs {', '.join(ARCHITECTURES)}.",
        )
    weights = _named(source, metas, "init_param") or _required(source / "model.pt")
    tokens = None
    if architecture not in _WITHOUT_TOKENS:
        tokens = _named(source, metas, "tokenizer_conf", "token_list") or _default_tokens(source)
    cmvn = None
    if _wants_cmvn(config):
        cmvn = _named(source, metas, "frontend_conf", "cmvn_file") or _required(source / "am.mvn")
    return FunasrFolder(
        path=source,
        architecture=architecture,
        config={key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None},
        files=tuple(f for f in (metadata, config_file, weights, cmvn, tokens) if f is not None),
        weights=weights,
        cmvn=cmvn,
        tokens=tokens,
    )


def _write(folder: FunasrFolder, destination: Path, source: Mapping[str, Any]) -> None:
    with open_pt(folder.weights) as weights:
        write_checkpoint(
            destination,
            architecture=folder.architecture,
            config=folder.config,
            tokens=_read_tokens(folder.tokens),
            cmvn=_read_cmvn(folder),
            tensors={n: TensorSpec(t.dtype, t.shape) for n, t in weights.tensors.items()},
            read=lambda name: _read_finite(weights, name),
            source=source,
        )


def _read_finite(weights: TensorFile, name: str) -> npt.NDArray[Any]:
    values = weights.read(name)
    if not _all_finite(values, weights.tensors[name].dtype):
        raise CheckpointError(
            f"{weights.path}: {name} holds NaN or infinite values",
            hint="The model was damaged while it was trained or copied: get it again.",
        )
    return values


def _all_finite(values: npt.NDArray[Any], dtype: str) -> bool:
    flat = values.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        block = flat[start : start + (1 << 20)]
        if dtype == "BF16":
            finite = (block & 0x7F80) != 0x7F80  # an exponent of ones is infinity or NaN
        else:
            finite = np.isfinite(block)
        if not finite.all():
            return False
    return True


def _holds(destination: Path, digests: Mapping[str, str]) -> bool:
    """Whether a good conversion of these very files is there."""
    checkpoint = _opened(destination)
    return checkpoint is not None and checkpoint.source.get("sha256") == digests


def _opened(destination: Path) -> Checkpoint | None:
    if not is_converted(destination):
        return None
    try:
        return open_checkpoint(destination)
    except CheckpointError:
        return None


def _fingerprint(folder: FunasrFolder) -> str:
    stats = [file.stat() for file in folder.files]
    identity = [
        [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        for file, stat in zip(folder.files, stats, strict=True)
    ]
    text = json.dumps([FORMAT_VERSION, str(folder.path.resolve()), identity])
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _lock(destination: Path) -> Iterator[None]:
    """Holds off other processes that convert the same model."""
    path = destination.with_name(f".{destination.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"the cache folder {path.parent} cannot be written: {error.strerror}",
            hint="Make it writable, or choose another cache folder with XDG_CACHE_HOME.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_remains(destination: Path) -> None:
    """Removes what a killed process, or a disk that lost data, left; called under the lock."""
    shutil.rmtree(destination, ignore_errors=True)
    for partial in destination.parent.glob(f"{partial_prefix(destination)}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _read_metas(path: Path) -> tuple[Path | None, Mapping[str, Any]]:
    if not path.is_file():
        return None, {}
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=_INCOMPLETE) from error
    metas = content.get("file_path_metas", {}) if isinstance(content, dict) else None
    if not isinstance(metas, dict):
        raise CheckpointError(f"{path}: file_path_metas is not a dictionary")
    return path, metas


def _named(source: Path, metas: Mapping[str, Any], *keys: str) -> Path | None:
    """The file that configuration.json names under these keys, if it names one."""
    value: Any = metas
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    where = f"{source / 'configuration.json'}: {'.'.join(keys)}"
    # Links are followed: the hub's cache is made of them. It is the name that must not climb out.
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[^\0\\:]{1,255}", value)
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        raise CheckpointError(f"{where} names {str(value)[:80]!a}, which is not inside the folder")
    return _required(source / value)


def _required(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}", hint=_INCOMPLETE)
    return path


def _default_tokens(source: Path) -> Path:
    older = source / "tokens.txt"
    return older if older.is_file() else _required(source / "tokens.json")


def _wants_cmvn(config: Mapping[str, Any]) -> bool:
    """Only an explicit `cmvn_file: null` says that a model works on plain features."""
    frontend = config.get("frontend_conf")
    return not isinstance(frontend, dict) or frontend.get("cmvn_file", "am.mvn") is not None


def _read_tokens(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    if path.suffix == ".json":
        return read_tokens(path)
    return tuple(line.rstrip("\r") for line in _read_text(path).removesuffix("\n").split("\n"))


def _read_cmvn(folder: FunasrFolder) -> Cmvn | None:
    if folder.cmvn is None:
        return None
    from funasr_batch.frontend import parse_am_mvn

    cmvn = parse_am_mvn(_read_text(folder.cmvn))
    width = _feature_width(folder)
    if cmvn.shift.shape != (width,) or cmvn.scale.shape != (width,):
        raise CheckpointError(
            f"{folder.cmvn} holds {cmvn.shift.size} and {cmvn.scale.size} values; the front end "
            f"makes features of {width}"
        )
    return cmvn.shift, cmvn.scale


def _feature_width(folder: FunasrFolder) -> int:
    match folder.config.get("frontend_conf", {}):
        case {"n_mels": int() as mels, "lfr_m": int() as frames}:
            return mels * frames
        case _:
            raise CheckpointError(
                f"{folder.path}: the configuration has no n_mels and lfr_m in frontend_conf",
                hint=_INCOMPLETE,
            )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_TEXT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}", hint=_INCOMPLETE) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_config(path: Path) -> dict[str, Any]:
    text = _read_text(_required(path))
    try:
        config = _plain(yaml.load(text, _ConfigLoader), iter(range(_MAX_CONFIG_VALUES)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a configuration that can be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no dictionary")
    return config


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
