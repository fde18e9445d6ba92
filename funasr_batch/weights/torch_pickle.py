"""Reads the tensors of a file written by `torch.save`, without PyTorch and without running it.

Such a file is an archive (torch_archive.py) of the bytes of the tensors and a pickle that describes
them. A pickle is a program for a small stack machine, and Python's own machine imports and calls
whatever the program names. The machine in this module can build dicts, lists, tuples and scalars
and can describe tensors, and nothing else: any other opcode or global is refused by name.

Nothing that a file claims is believed before it is checked. Every size is compared with the bytes
that are really there before memory is taken for it.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from funasr_batch.errors import CheckpointError
from funasr_batch.weights.torch_archive import DAMAGED, UNTRUSTED, TorchArchive, open_archive

Array: TypeAlias = npt.NDArray[Any]

MAX_DIMENSIONS = 8
MAX_SHARING = 8
"""Tied weights repeat a storage; all tensors together may not exceed this many times the bytes."""


@dataclass(frozen=True, slots=True)
class _Dtype:
    label: str
    """Name in safetensors files."""
    numpy: np.dtype[Any]
    """What `TensorFile.read` returns; numpy has no bfloat16, so its raw 16 bits are given."""


_STORAGE_DTYPES: Mapping[str, _Dtype] = {
    "torch.DoubleStorage": _Dtype("F64", np.dtype("<f8")),
    "torch.FloatStorage": _Dtype("F32", np.dtype("<f4")),
    "torch.HalfStorage": _Dtype("F16", np.dtype("<f2")),
    "torch.BFloat16Storage": _Dtype("BF16", np.dtype("<u2")),
    "torch.LongStorage": _Dtype("I64", np.dtype("<i8")),
    "torch.IntStorage": _Dtype("I32", np.dtype("<i4")),
    "torch.ShortStorage": _Dtype("I16", np.dtype("<i2")),
    "torch.CharStorage": _Dtype("I8", np.dtype("i1")),
    "torch.ByteStorage": _Dtype("U8", np.dtype("u1")),
    "torch.BoolStorage": _Dtype("BOOL", np.dtype("u1")),
}
_FUNCTIONS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    }
)
_OPCODE_NAMES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: _Dtype
    length: int
    """Elements."""

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.numpy.itemsize


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: a strided window of a storage; all numbers count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last, both included."""
        if self.size == 0:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a file says of one tensor."""

    name: str
    dtype: str
    """Label as in safetensors: `F32`, `BF16`, `I64`, …"""
    shape: tuple[int, ...]
    nbytes: int
    _view: _View = field(repr=False)


class TensorFile:
    """An open `.pt` file: what tensors it holds, and their values one at a time."""

    def __init__(self, archive: TorchArchive) -> None:
        self.path = archive.path
        self._archive = archive
        views = _named_tensors(_PickleMachine(self.path, archive.description()).run(), self.path)
        for view in views.values():
            archive.check_storage(view.storage.key, view.storage.nbytes)
        _refuse_repetition(self.path, views)
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(
            {name: _entry(name, view) for name, view in views.items()}
        )

    def read(self, name: str) -> Array:
        """The values of one tensor, C-contiguous, in a new array.

        bfloat16 comes as its raw bits in uint16. The storage is read to its end whatever part of
        it the tensor takes, so that its checksum is verified each time.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the bytes are not those that were written.
        """
        view = self.tensors[name]._view
        dtype = view.storage.dtype
        buffer = np.empty(view.span * dtype.numpy.itemsize, np.uint8)
        if view.span:
            first = view.offset * dtype.numpy.itemsize
            self._archive.read_storage(view.storage.key, first, buffer)
        flat: Array = buffer != 0 if dtype.label == "BOOL" else buffer.view(dtype.numpy)
        if view.size == 0:
            return flat.reshape(view.shape)
        strides = [step * flat.itemsize for step in view.strides]
        tensor: Array = np.lib.stride_tricks.as_strided(flat, view.shape, strides)
        return tensor if tensor.flags.c_contiguous else tensor.copy()


@contextmanager
def open_pt(path: Path) -> Iterator[TensorFile]:
    """Opens a checkpoint written by `torch.save`; no part of it is ever executed.

    Names are those of the state dict: wrappers `state_dict`, `model_state_dict` and `model` are
    unwrapped and one leading `module.` is dropped, as in FunASR
    funasr/train_utils/load_pretrained_model.py. Entries that are no tensors are left out.

    Raises:
        CheckpointError: the file is not of this kind, is damaged, or asks for anything that a
            file of tensors does not need.
    """
    with open_archive(path) as archive:
        yield TensorFile(archive)


class _PickleMachine:
    """Runs the opcodes that `torch.save` writes for a state dict (pickle protocol 2)."""

    def __init__(self, path: Path, program: bytes) -> None:
        self._path = path
        self._program = program
        self._position = 0
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the program describes: dicts, lists, tuples, scalars and `_View`s."""
        try:
            return self._run()
        except (LookupError, ValueError, TypeError, struct.error) as error:
            raise CheckpointError(
                f"{self._path}: the description of its tensors is malformed near byte "
                f"{self._position}",
                hint=DAMAGED,
            ) from error

    def _run(self) -> Any:
        while (opcode := self._opcode()) != "STOP":
            self._step(opcode)
        result = self._stack.pop()
        if self._stack or self._below_marks or self._position != len(self._program):
            raise ValueError("left-overs after the end")
        return result

    def _step(self, opcode: str) -> None:
        stack = self._stack
        match opcode:
            case "PROTO":
                self._unpack("<B")
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "BININT":
                stack.append(self._unpack("<i"))
            case "BININT1":
                stack.append(self._unpack("<B"))
            case "BININT2":
                stack.append(self._unpack("<H"))
            case "LONG1":
                digits = self._take(self._unpack("<B"))
                stack.append(int.from_bytes(digits, "little", signed=True))
            case "BINFLOAT":
                stack.append(self._unpack(">d"))
            case "BINUNICODE":
                stack.append(self._take(self._unpack("<I")).decode())
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self._below_marks.append(stack)
                self._stack = []
            case "TUPLE":
                items = self._pop_to_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode[-1])
                items = [stack.pop() for _ in range(length)]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                self._append([stack.pop()])
            case "APPENDS":
                self._append(self._pop_to_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT":
                self._memo[self._unpack("<B")] = stack[-1]
            case "LONG_BINPUT":
                self._memo[self._unpack("<I")] = stack[-1]
            case "BINGET":
                stack.append(self._memo[self._unpack("<B")])
            case "LONG_BINGET":
                stack.append(self._memo[self._unpack("<I")])
            case "GLOBAL":
                stack.append(self._global())
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                self._drop_attributes(stack.pop())
            case _:
                raise self._refusal(f"uses the pickle opcode {opcode}")

    def _opcode(self) -> str:
        code = self._take(1)
        return _OPCODE_NAMES.get(code, f"0x{code.hex()}")

    def _take(self, length: int) -> bytes:
        start, end = self._position, self._position + length
        if end > len(self._program):
            raise ValueError("the program ends early")
        self._position = end
        return self._program[start:end]

    def _unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._program.index(b"\n", self._position)
        line = self._take(end - self._position).decode()
        self._take(1)
        return line

    def _pop_to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below_marks.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("items can be appended to lists only")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("items can be set in dicts only")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple of tuples of the same tuple takes time that doubles with each level.
            if not isinstance(key, (str, int)):
                raise TypeError("keys are strings or integers")
            target[key] = value

    def _drop_attributes(self, _state: Any) -> None:
        # `state_dict()` carries the versions of the modules as an attribute of its OrderedDict.
        if not isinstance(self._stack[-1], dict):
            raise TypeError("only dicts can have attributes")

    def _global(self) -> _Global:
        name = f"{self._line()}.{self._line()}"
        if name not in _FUNCTIONS and name not in _STORAGE_DTYPES:
            raise self._refusal(f"asks for the global {name[:80]!a}")
        return _Global(name)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("only a global can be called")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch._utils._rebuild_parameter", (_View() as view, bool(), dict()):
                return view
            case "torch._utils._rebuild_tensor_v2", (
                _Storage() as storage,
                offset,
                tuple() as shape,
                tuple() as strides,
                bool(),
                dict(),
                *metadata,
            ):
                if any(metadata):
                    raise self._refusal("holds a tensor with a pending conjugate or sign")
                return self._view(storage, offset, shape, strides)
            case _:
                raise self._refusal(f"calls {function.name} with unexpected arguments")

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Global(name=kind), str() as key, str(), length) if (
                kind in _STORAGE_DTYPES
            ):
                if not re.fullmatch(r"[0-9A-Za-z_]{1,32}", key):
                    raise self._refusal(f"names a storage {key[:40]!a}")
                return _Storage(key, _STORAGE_DTYPES[kind], _natural(length))
            case _:
                raise self._refusal("holds a persistent object that is no tensor storage")

    def _view(
        self, storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]
    ) -> _View:
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise self._refusal(f"holds a tensor of {len(shape)} dimensions")
        view = _View(
            storage,
            _natural(offset),
            tuple(_natural(n) for n in shape),
            tuple(_natural(step) for step in strides),
        )
        if view.offset + view.span > storage.length or view.size > storage.length:
            raise self._refusal(
                f"holds a tensor of shape {_brief(view.shape)} that does not fit into its storage "
                f"of {_brief(storage.length)} elements"
            )
        return view

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} {what}, which a file of tensors does not need. Nothing was executed.",
            hint=UNTRUSTED,
        )


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("sizes, strides and offsets are integers from 0 on")
    return value


def _brief(value: object) -> str:
    """Numbers of a hostile file can be hundreds of digits long."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entry(name: str, view: _View) -> TensorEntry:
    dtype = view.storage.dtype
    return TensorEntry(name, dtype.label, view.shape, view.size * dtype.numpy.itemsize, view)


def _named_tensors(root: Any, path: Path) -> dict[str, _View]:
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(root, dict) and isinstance(root.get(wrapper), dict):
            root = root[wrapper]
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    views: dict[str, _View] = {}
    for key, value in root.items():
        if not isinstance(value, _View):
            continue
        name = str(key).removeprefix("module.")
        if not re.fullmatch(r"[!-~]{1,256}", name) or name == "__metadata__" or name in views:
            raise CheckpointError(
                f"{path}: the tensor name {name[:80]!a} is not usable or is there twice",
                hint=UNTRUSTED,
            )
        views[name] = value
    if not views:
        raise CheckpointError(
            f"{path} holds no tensors under `state_dict`, `model_state_dict`, `model` or at its top"
        )
    return views


def _refuse_repetition(path: Path, views: Mapping[str, _View]) -> None:
    held = sum({view.storage.key: view.storage.nbytes for view in views.values()}.values())
    shown = sum(view.size * view.storage.dtype.numpy.itemsize for view in views.values())
    if shown > MAX_SHARING * held:
        raise CheckpointError(
            f"{path}: {len(views)} tensors of {shown} bytes in all share {held} bytes",
            hint=UNTRUSTED,
        )
