"""Turns a model in FunASR's layout into a converted folder (checkpoint.py), once.

Read: `configuration.json`, whose `file_path_metas` say where the other files are; else
`config.yaml`, `model.pt`, `am.mvn` and `tokens.json` or `tokens.txt`
(FunASR funasr/download/download_model_from_hub.py), and `seg_dict` for hotwords. Tensors keep their
names, shapes and dtypes. What only Fun-ASR-Nano has is in nano_files.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights.checkpoint import (
    CTC_VOCABULARY_FILE,
    FORMAT_VERSION,
    SEG_DICT_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    Cmvn,
    is_converted,
    open_checkpoint,
    partial_prefix,
    read_tokens,
    write_checkpoint,
)
from funasr_batch.weights.nano_files import (
    NanoFiles,
    find_nano_files,
    has_ctc,
    kept_tensors,
    read_llm_config,
    read_tokenizer,
)
from funasr_batch.weights.safetensors_file import TensorSpec
from funasr_batch.weights.source_files import (
    INCOMPLETE,
    named,
    read_config,
    read_metas,
    read_text,
    required,
)
from funasr_batch.weights.torch_pickle import TensorFile, open_pt

NANO = "FunASRNano"
ARCHITECTURES = ("Paraformer", "BiCifParaformer", "SeacoParaformer", "FsmnVADStreaming", NANO)
_WITHOUT_TOKENS = frozenset({"FsmnVADStreaming", NANO})

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
_NANO_CTC_KEYS = ("ctc_decoder", "ctc_decoder_conf", "ctc_conf", "ctc_vocab_size")
_NANO_CONFIG_KEYS = (
    "model_conf",
    "input_size",
    "audio_encoder",
    "audio_encoder_conf",
    "audio_adaptor",
    "audio_adaptor_conf",
    "llm",
    "llm_conf",
    *_NANO_CTC_KEYS,
    "ctc_tokenizer",
    "ctc_tokenizer_conf",
    "detach_ctc_decoder",
    "dataset_conf",
    "frontend",
    "frontend_conf",
    "tokenizer",
    "tokenizer_conf",
)


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
    seg_dict: Path | None
    nano: NanoFiles | None


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a converted folder will hold, beside the values of the tensors."""

    config: Mapping[str, Any]
    tensors: tuple[str, ...]
    files: Mapping[str, bytes]


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
    metadata, metas = read_metas(source / "configuration.json")
    config_file = named(source, metas, "config") or source / "config.yaml"
    config = read_config(config_file)
    architecture = config.get("model")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{config_file}: the model {str(architecture)[:80]!a} is of a kind that this version "
            "cannot run",
            hint=f"It runs {', '.join(ARCHITECTURES)}.",
        )
    weights = named(source, metas, "init_param") or required(source / "model.pt")
    tokens = None
    if architecture not in _WITHOUT_TOKENS:
        tokens = named(source, metas, "tokenizer_conf", "token_list") or _default_tokens(source)
    cmvn = None
    if _wants_cmvn(config):
        cmvn = named(source, metas, "frontend_conf", "cmvn_file") or required(source / "am.mvn")
    nano = find_nano_files(source, metas, config_file, config) if architecture == NANO else None
    seg_dict = _seg_dict(architecture, cmvn)
    files = (metadata, config_file, weights, cmvn, tokens, seg_dict, *(nano.all() if nano else ()))
    keys = _NANO_CONFIG_KEYS if architecture == NANO else _CONFIG_KEYS
    return FunasrFolder(
        path=source,
        architecture=architecture,
        config={key: config[key] for key in keys if config.get(key) is not None},
        files=tuple(dict.fromkeys(file for file in files if file is not None)),
        weights=weights,
        cmvn=cmvn,
        tokens=tokens,
        seg_dict=seg_dict,
        nano=nano,
    )


def _write(folder: FunasrFolder, destination: Path, source: Mapping[str, Any]) -> None:
    with open_pt(folder.weights) as weights:
        contents = _contents(folder, weights)
        entries = [weights.tensors[name] for name in contents.tensors]
        write_checkpoint(
            destination,
            architecture=folder.architecture,
            config=contents.config,
            tokens=_read_tokens(folder.tokens),
            cmvn=_read_cmvn(folder),
            tensors={entry.name: TensorSpec(entry.dtype, entry.shape) for entry in entries},
            read=lambda name: _read_finite(weights, name),
            source=source,
            files=contents.files,
        )


def _contents(folder: FunasrFolder, weights: TensorFile) -> _Contents:
    if folder.nano is None:
        kept = {}
        if folder.seg_dict is not None:
            kept[SEG_DICT_FILE] = read_text(folder.seg_dict).encode()
        return _Contents(folder.config, tuple(weights.tensors), kept)
    config = {**folder.config, "llm_config": read_llm_config(folder.nano.llm_config)}
    files = {TOKENIZER_FILE: read_tokenizer(folder.nano.tokenizer)}
    tensors = kept_tensors(weights, config)
    if not has_ctc(tensors):
        config = {key: value for key, value in config.items() if key not in _NANO_CTC_KEYS}
    elif folder.nano.ctc_vocabulary is not None:
        files[CTC_VOCABULARY_FILE] = read_text(folder.nano.ctc_vocabulary).encode()
    return _Contents(config, tensors, files)


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
    return (
        checkpoint is not None
        and checkpoint.quantization is None
        and checkpoint.source.get("sha256") == digests
    )


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


def _default_tokens(source: Path) -> Path:
    older = source / "tokens.txt"
    return older if older.is_file() else required(source / "tokens.json")


def _seg_dict(architecture: str, cmvn: Path | None) -> Path | None:
    """Beside am.mvn, where FunASR looks for it; only hotwords of a SeacoParaformer need it."""
    if architecture != "SeacoParaformer" or cmvn is None:
        return None
    beside = cmvn.parent / "seg_dict"
    return beside if beside.is_file() else None


def _wants_cmvn(config: Mapping[str, Any]) -> bool:
    """Only an explicit `cmvn_file: null` says that a model works on plain features."""
    frontend = config.get("frontend_conf")
    return not isinstance(frontend, dict) or frontend.get("cmvn_file", "am.mvn") is not None


def _read_tokens(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    if path.suffix == ".json":
        return read_tokens(path)
    return tuple(line.rstrip("\r") for line in read_text(path).removesuffix("\n").split("\n"))


def _read_cmvn(folder: FunasrFolder) -> Cmvn | None:
    if folder.cmvn is None:
        return None
    from funasr_batch.frontend import parse_am_mvn

    cmvn = parse_am_mvn(read_text(folder.cmvn))
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
                hint=INCOMPLETE,
            )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
