"""A converted model: the folder that this project writes once and loads from then on.

    model.safetensors   the tensors, with the source checkpoint's names, shapes and dtypes; and the
                        front end's float32 `cmvn.shift`, `cmvn.scale` where the model has them
    model.json          architecture, configuration, digests: what `Checkpoint` holds
    tokens.json         the vocabulary: a list of strings (only where the model has one)
    tokenizer.json      the language model's tokenizer, and
    ctc.tiktoken        the vocabulary of its CTC head (only where the model has them)
    seg_dict            how words are spelled in tokens, for hotwords (only where the model has it)

A folder appears whole or not at all. MLX is imported only when tensors are loaded.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from funasr_batch import __version__
from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights.quantize import Quantization
from funasr_batch.weights.safetensors_file import (
    Header,
    TensorSpec,
    read_header,
    write_safetensors,
)

if TYPE_CHECKING:
    import mlx.core as mx

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
TOKENS_FILE = "tokens.json"
TOKENIZER_FILE = "tokenizer.json"
CTC_VOCABULARY_FILE = "ctc.tiktoken"
SEG_DICT_FILE = "seg_dict"
CMVN_SHIFT = "cmvn.shift"
CMVN_SCALE = "cmvn.scale"

Cmvn: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Shift and scale, float32 [lfr_m * n_mels] each: features become (x + shift) * scale."""

_MAX_JSON_BYTES = 64 << 20
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_CONVERT_AGAIN = "Delete this folder and convert the model again."


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A converted model, opened and checked; its tensors are still on the disk."""

    folder: Path
    architecture: str
    """FunASR's class name: `Paraformer`, `BiCifParaformer`, `SeacoParaformer`, …"""
    config: Mapping[str, Any]
    """FunASR's config.yaml as far as recognition needs it: `encoder_conf`, `predictor_conf`, …"""
    tokens: tuple[str, ...] | None = field(repr=False)
    """The vocabulary; a token's index is its id."""
    cmvn: Cmvn | None = field(repr=False)
    weights_sha256: str
    source: Mapping[str, Any] = field(repr=False)
    """Where it was converted from: `revision` of the hub, `sha256` of each file."""
    specs: Mapping[str, TensorSpec] = field(repr=False)
    """The model's tensors, without CMVN."""
    quantization: Quantization | None = None
    """How the tensors were quantised before they were written, if they were."""

    @property
    def revision(self) -> str | None:
        """The hub's commit it was converted from, where that is known."""
        revision = self.source.get("revision")
        return revision if isinstance(revision, str) else None

    @property
    def tokenizer(self) -> Path | None:
        """The language model's `tokenizer.json`, where the model has one."""
        return _if_there(self.folder / TOKENIZER_FILE)

    @property
    def ctc_vocabulary(self) -> Path | None:
        """The vocabulary of the CTC head in tiktoken's format, where the model has one."""
        return _if_there(self.folder / CTC_VOCABULARY_FILE)

    @property
    def seg_dict(self) -> Path | None:
        """The pieces of whole words, which hotwords are spelled with, where the model has them."""
        return _if_there(self.folder / SEG_DICT_FILE)

    def load_tensors(self) -> dict[str, mx.array]:
        """The model's tensors, without CMVN; MLX reads each from the disk when it is first used."""
        import mlx.core as mx

        path = self.folder / WEIGHTS_FILE
        try:
            tensors: Any = mx.load(str(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be loaded: {error}", hint=_CONVERT_AGAIN
            ) from error
        return {name: tensors[name] for name in self.specs}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a converted folder.

    The header of the weights is checked against the file's size here, so that neither this process
    nor MLX believes a lie about where bytes are.

    Raises:
        CheckpointError: something is missing, damaged, or of another version of this format.
    """
    description = _read_description(folder / DESCRIPTION_FILE)
    header = read_header(folder / WEIGHTS_FILE)
    tokens = folder / TOKENS_FILE
    return Checkpoint(
        folder=folder,
        architecture=description["architecture"],
        config=description["config"],
        tokens=read_tokens(tokens) if tokens.exists() else None,
        cmvn=_read_cmvn(header),
        weights_sha256=description["weights_sha256"],
        source=description["source"],
        specs={n: s for n, s in header.specs.items() if n not in (CMVN_SHIFT, CMVN_SCALE)},
        quantization=_read_quantization(folder / DESCRIPTION_FILE, description),
    )


def is_converted(folder: Path) -> bool:
    """Whether a folder claims to be a converted model; `open_checkpoint` finds out if it is."""
    return (folder / DESCRIPTION_FILE).is_file()


def write_checkpoint(
    destination: Path,
    *,
    architecture: str,
    config: Mapping[str, Any],
    tokens: Sequence[str] | None,
    cmvn: Cmvn | None,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str], npt.NDArray[Any]],
    source: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Writes a converted folder whole: in a temporary folder beside it, synced, then renamed.

    `read(name)` gives the values of one tensor of `tensors`; it is called once for each, so that
    memory holds one tensor at a time. `source` says where the model came from; `files` are written
    beside the weights, as they are; `quantization` says how `tensors` were quantised.

    Raises:
        StorageError: the disk refuses.
        CheckpointError: there is a folder with files already, perhaps another process's.
    """
    specs, read_any = _with_cmvn(tensors, read, cmvn)
    needed = sum(spec.nbytes for spec in specs.values())
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(destination.parent, needed)
        partial = destination.parent / f"{partial_prefix(destination)}{secrets.token_hex(8)}"
        partial.mkdir()
        try:
            digest = write_safetensors(partial / WEIGHTS_FILE, specs, read_any)
            if tokens is not None:
                _write_json(partial / TOKENS_FILE, list(tokens))
            for name, content in (files or {}).items():
                _write_file(partial / name, content)
            description = {
                "format_version": FORMAT_VERSION,
                "tool": {"name": "funasr-batch", "version": __version__},
                "architecture": architecture,
                "dtype": _common_dtype(tensors.values()),
                "config": dict(config),
                "source": dict(source or {}),
                "weights_sha256": digest,
            }
            if quantization is not None:
                description["quantization"] = quantization.description()
            _write_json(partial / DESCRIPTION_FILE, description)
            _sync_folder(partial)
            _rename(partial, destination)
            _sync_folder(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"the converted model cannot be written to {destination}: {error.strerror or error}",
            hint="Free some space there, or choose another cache folder with XDG_CACHE_HOME.",
        ) from error


def partial_prefix(destination: Path) -> str:
    """How the names of unfinished folders beside `destination` begin."""
    return f".{destination.name}.partial-"


def check_tensors(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, tuple[int, ...]],
    *,
    path: Path,
    unused: tuple[str, ...] = (),
) -> None:
    """Compares the tensors of a checkpoint with those of the model that is to be filled.

    Args:
        found: `Checkpoint.specs`.
        expected: name and shape of every parameter of the model.
        path: what the message blames.
        unused: prefixes of names that may be there and that the model does not need.

    Raises:
        CheckpointError: one message lists what is missing, unexpected, of another shape or not
            of a floating-point type, which the codes of a quantised layer need not be.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [n for n in found if n not in expected and not n.startswith(unused)]
    shared = [name for name in expected if name in found]
    reshaped = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name])}"
        for name in shared
        if found[name].shape != expected[name]
    ]
    retyped = [
        f"{name} {found[name].dtype}"
        for name in shared
        if found[name].dtype not in _FLOATING and not _is_packed(name, found[name], expected)
    ]
    problems = [
        _listing(title, names)
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
            ("not floating-point", retyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not hold the tensors that its configuration describes\n"
            + "\n".join(problems),
            hint="The files may be of different models, or of a variant that is not supported.",
        )


def _is_packed(name: str, spec: TensorSpec, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are the codes of a layer that the model expects to be quantised."""
    return spec.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in expected


def read_tokens(path: Path) -> tuple[str, ...]:
    """Reads a vocabulary: a JSON list of strings."""
    tokens = _read_json(path)
    if not isinstance(tokens, list) or not all(_is_text(token) for token in tokens):
        raise CheckpointError(f"{path} is not a list of strings")
    return tuple(tokens)


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _is_text(value: Any) -> bool:
    """JSON can spell half of a surrogate pair, which no file in UTF-8 can hold."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _listing(title: str, names: list[str]) -> str:
    shown = [f"    {name}" for name in names[:10]]
    if len(names) > len(shown):
        shown.append(f"    … and {len(names) - len(shown)} more")
    return "\n".join([f"  {len(names)} {title}:", *shown])


def _with_cmvn(
    tensors: Mapping[str, TensorSpec], read: Callable[[str], npt.NDArray[Any]], cmvn: Cmvn | None
) -> tuple[dict[str, TensorSpec], Callable[[str], npt.NDArray[Any]]]:
    if cmvn is None:
        return dict(tensors), read
    extra = {
        name: np.ascontiguousarray(vector, "<f4")
        for name, vector in zip((CMVN_SHIFT, CMVN_SCALE), cmvn, strict=True)
    }
    specs = {name: TensorSpec("F32", vector.shape) for name, vector in extra.items()}
    return {**tensors, **specs}, lambda name: extra[name] if name in extra else read(name)


def _read_cmvn(header: Header) -> Cmvn | None:
    shapes = [header.specs[n].shape for n in (CMVN_SHIFT, CMVN_SCALE) if n in header.specs]
    if not shapes:
        return None
    if len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 1:
        raise CheckpointError(
            f"{header.path}: {CMVN_SHIFT} and {CMVN_SCALE} do not match", hint=_CONVERT_AGAIN
        )
    return header.read_float32(CMVN_SHIFT), header.read_float32(CMVN_SCALE)


def _read_description(path: Path) -> dict[str, Any]:
    match _read_json(path):
        case {"format_version": int() as version} if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer funasr-batch (format {version})",
                hint="Update funasr-batch, or convert the model again with this version.",
            )
        case {
            "format_version": 1,
            "architecture": str(),
            "config": dict(),
            "source": dict(),
            "weights_sha256": str() as digest,
        } as description if re.fullmatch(r"[0-9a-f]{64}", digest):
            return dict(description)
        case _:
            raise CheckpointError(
                f"{path} does not describe a converted model", hint=_CONVERT_AGAIN
            )


def _read_quantization(path: Path, description: Mapping[str, Any]) -> Quantization | None:
    value = description.get("quantization")
    if value is None:
        return None
    try:
        return Quantization.from_description(value)
    except ValueError as error:
        raise CheckpointError(
            f"{path} tells of a quantisation that this version does not know",
            hint=_CONVERT_AGAIN,
        ) from error


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    _write_file(path, f"{text}\n".encode())


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _common_dtype(specs: Iterable[TensorSpec]) -> str:
    dtypes = {spec.dtype for spec in specs} & _FLOATING
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"converting needs {needed / 1e6:.0f} MB in {folder}, which has {free / 1e6:.0f} MB",
            hint="Free some space there, or choose another cache folder with XDG_CACHE_HOME.",
        )


def _rename(partial: Path, destination: Path) -> None:
    try:
        partial.rename(destination)
    except OSError as error:
        if destination.is_dir() and any(destination.iterdir()):
            raise CheckpointError(
                f"{destination} is there already and holds something else",
                hint="Choose another folder, or remove that one.",
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
