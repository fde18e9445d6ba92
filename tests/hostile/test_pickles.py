"""A museum of `.pt` and safetensors files that were made to harm, or came to harm.

Each is refused with a `CheckpointError` that names what it asked for; none makes anything run, and
none makes memory grow with what it claims.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch_files import (
    FALSE,
    call,
    dictionary,
    integer,
    integers,
    name,
    program,
    sequence,
    storage,
    tensor,
    text,
    write_archive,
    write_pt,
)

from funasr_batch.errors import CheckpointError
from funasr_batch.weights.safetensors_file import TensorSpec, read_header, write_safetensors
from funasr_batch.weights.torch_archive import MAX_PICKLE_BYTES
from funasr_batch.weights.torch_pickle import open_pt

GOOD = tensor(storage("0", "FloatStorage", 4), (2, 2), (2, 1))
BYTES = {"0": np.arange(4, dtype=np.float32).tobytes()}
MEMORY_LIMIT = 32 << 20


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_pt(path) as file:
        return {label: file.read(label) for label in file.tensors}


def refuse(path: Path, match: str) -> None:
    """The file is refused, and no more memory is taken than an honest small one would need."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match):
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_LIMIT
    finally:
        tracemalloc.stop()


def refuse_program(folder: Path, body: bytes, match: str) -> None:
    refuse(write_archive(folder / "model.pt", program(body), BYTES), match)


# --- programs -------------------------------------------------------------------------------------


class Payload:
    """Runs a command in any reader that executes pickles."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_payload_never_runs(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    data = pickle.dumps({"x": Payload(trace)}, protocol)
    path = write_archive(tmp_path / "model.pt", data, BYTES)
    refuse(path, "malformed|global|opcode")
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists(), "the payload was a dud"


@pytest.mark.parametrize(
    "qualified",
    [
        "posix.system",
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.hub.load",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_qtensor",
        "torch.UntypedStorage",
        "torch.ComplexFloatStorage",
        "torch.Size",
        "collections.defaultdict",
        "numpy.core.multiarray._reconstruct",
        "collections.OrderedDict.__init__",
        "torch.FloatStorage ",
    ],
)
def test_a_global_that_is_not_known(tmp_path: Path, qualified: str) -> None:
    body = dictionary({"x": GOOD, "y": name(qualified)})
    refuse_program(tmp_path, body, f"asks for the global '{qualified}'".replace(".", r"\."))


def test_the_name_of_a_global_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    refuse_program(tmp_path, b"c\x1b[2J\n" + "\u202eexe".encode() + b"\n", r"\\x1b\[2J.\\u202eexe")


ALLOWED = {
    "PROTO", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "MARK", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE", "BUILD", "STOP",
}  # fmt: skip
OTHERS = [opcode for opcode in pickletools.opcodes if opcode.name not in ALLOWED]


@pytest.mark.parametrize("opcode", OTHERS, ids=lambda opcode: opcode.name)
def test_every_other_opcode_is_refused_by_name(
    tmp_path: Path, opcode: pickletools.OpcodeInfo
) -> None:
    body = GOOD + opcode.code.encode("latin-1") + b"0\n0\n"
    refuse_program(tmp_path, body, f"uses the pickle opcode {opcode.name},")


def test_a_byte_that_is_no_opcode(tmp_path: Path) -> None:
    refuse_program(tmp_path, b"\xff", "uses the pickle opcode 0xff,")


HOOKS = call("collections.OrderedDict")
SHAPE = integers((2,)), integers((1,))
STORAGE = storage("0", "FloatStorage", 4)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (call("collections.OrderedDict", b"]"), "unexpected arguments"),
        (call("torch.FloatStorage", integer(4)), "unexpected arguments"),
        (call("torch._utils._rebuild_parameter", text("x"), FALSE, HOOKS), "unexpected arguments"),
        (call("torch._utils._rebuild_tensor_v2", STORAGE, integer(0)), "unexpected arguments"),
        (
            call(
                "torch._utils._rebuild_tensor_v2",
                *(STORAGE, integer(0), *SHAPE, FALSE, HOOKS),
                dictionary({"neg": b"\x88"}),
            ),
            "conjugate or sign",
        ),
        (sequence(text("module"), text("x")) + b"Q", "persistent object"),
        (text("0") + b"Q", "persistent object"),
        (sequence(text("storage"), text("F"), text("0"), text("cpu"), b"K\x04") + b"Q", "persist"),
        (storage("../../version", "FloatStorage", 1), "names a storage '../../version'"),
        (storage("", "FloatStorage", 1), "names a storage"),
        (storage("0", "FloatStorage", -1), "malformed"),
        (text("f") + b")R", "malformed"),
        (dictionary({"x": GOOD}) + b")R", "malformed"),
        (b"](" + text("k") + text("v") + b"u", "malformed"),
        (b"}(" + text("k") + b"u", "malformed"),
        (b"})" + text("v") + b"s", "malformed"),
        (b"}a", "malformed"),
        (b"]}b", "malformed"),
        (b"t", "malformed"),
        (b"(", "malformed"),
        (b"\x87", "malformed"),
        (b"h\x00", "malformed"),
        (b"X\xff\xff\xff\xff", "malformed"),
        (b"\x8a\xff", "malformed"),
        (b"X\x02\x00\x00\x00\xff\xfe", "malformed"),
        (b"cos", "malformed"),
        (b"NN", "malformed"),
        (b"", "malformed"),
    ],
)
def test_programs_that_make_no_sense(tmp_path: Path, body: bytes, match: str) -> None:
    refuse_program(tmp_path, body, match)


def test_bytes_after_the_end_of_the_program(tmp_path: Path) -> None:
    refuse_program(tmp_path, dictionary({"x": GOOD}) + b".N", "malformed")


def test_keys_whose_hash_takes_for_ever(tmp_path: Path) -> None:
    """A tuple of the same tuple twice, sixty times over: 2^60 steps to hash."""
    nested = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    refuse_program(tmp_path, b"}" + nested + b"Ns", "malformed")


def test_a_description_that_is_too_long(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model.pt", b"N" * (MAX_PICKLE_BYTES + 1), BYTES)
    refuse(path, "description of its tensors takes")


# --- tensors that claim more than is there ----------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((1 << 62,), (1,), 0),
        ((1 << 40, 1 << 40), (1 << 40, 1), 0),
        ((1 << 2000,), (0,), 0),
        ((100_000, 100_000), (0, 0), 0),
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((2,), (1,), 3),
        ((1,), (1,), 1 << 63),
        ((1,), (1,), 4),
        ((0,), (1,), 5),
        ((1,) * 9, (1,) * 9, 0),
        ((2, 2), (1,), 0),
    ],
)
def test_tensors_outside_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    body = dictionary({"x": tensor(STORAGE, shape, strides, offset)})
    refuse_program(tmp_path, body, "does not fit into its storage|dimensions")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"), [((-1,), (1,), 0), ((2,), (-1,), 1), ((1,), (1,), -1)]
)
def test_negative_numbers(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    refuse_program(
        tmp_path, dictionary({"x": tensor(STORAGE, shape, strides, offset)}), "malformed"
    )


def test_a_truth_value_is_no_number(tmp_path: Path) -> None:
    body = call(
        "torch._utils._rebuild_tensor_v2",
        *(STORAGE, b"\x88", *SHAPE, FALSE, HOOKS),
    )
    refuse_program(tmp_path, body, "malformed")


@pytest.mark.parametrize("length", [3, 5, 1 << 31, 1 << 62, 1 << 2000])
def test_a_storage_of_another_size_than_it_says(tmp_path: Path, length: int) -> None:
    body = dictionary({"x": tensor(storage("0", "FloatStorage", length), (2,), (1,))})
    refuse_program(tmp_path, body, "storage 0 takes 16 bytes, which is not what")


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    body = dictionary({"x": tensor(storage("7", "FloatStorage", 4), (4,), (1,))})
    refuse_program(tmp_path, body, "lacks the storage 7")


def test_one_storage_shown_a_thousand_times(tmp_path: Path) -> None:
    body = dictionary({f"x{i}": GOOD for i in range(1000)})
    refuse_program(tmp_path, body, "1000 tensors of 16000 bytes in all share 16 bytes")


@pytest.mark.parametrize("label", ["", "a b", "__metadata__", "a\nb", "é", "x" * 300])
def test_unusable_names(tmp_path: Path, label: str) -> None:
    refuse_program(tmp_path, dictionary({label: GOOD}), "is not usable")


def test_two_names_that_become_one(tmp_path: Path) -> None:
    refuse_program(tmp_path, dictionary({"x": GOOD, "module.x": GOOD}), "there twice")


# --- archives -------------------------------------------------------------------------------------


def test_a_zip_bomb(tmp_path: Path) -> None:
    size = 1 << 28
    path = tmp_path / "model.pt"
    body = dictionary({"x": tensor(storage("0", "ByteStorage", size), (size,), (1,))})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program(body))
        with archive.open(_deflated("model/data/0"), "w") as stream:
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    refuse(path, "'model/data/0' compressed or encrypted")


def _deflated(member: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(member)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_description(tmp_path: Path, method: int) -> None:
    description = program(dictionary({"x": GOOD}))
    path = write_archive(tmp_path / "model.pt", description, BYTES, compression=method)
    refuse(path, "compressed or encrypted")


def test_an_encrypted_member(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"x": np.ones(2, np.float32)})
    data = bytearray(path.read_bytes())
    data[central_entries(data)[-1] + 8] |= 1
    path.write_bytes(data)
    refuse(path, "compressed or encrypted")


@pytest.mark.parametrize(
    "member",
    ["../../etc/passwd", "/etc/passwd", "model/../../x", "model\\..\\x", "model//x", "model/./x"],
)
def test_names_that_lead_out_of_the_archive(tmp_path: Path, member: str) -> None:
    path = write_pt(tmp_path / "model.pt", {"x": np.ones(2, np.float32)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, b"x")
    refuse(path, "unsafe name")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", ["model/data.pkl", "model/data/0"])
def test_a_member_that_is_there_twice(tmp_path: Path, member: str) -> None:
    path = write_pt(tmp_path / "model.pt", {"x": np.ones(2, np.float32)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, b"x")
    refuse(path, "2 times")


def test_two_descriptions(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"x": np.ones(2, np.float32)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", program(dictionary({"x": GOOD})))
    refuse(path, "not one written by torch.save")


def test_big_endian(tmp_path: Path) -> None:
    description = program(dictionary({"x": GOOD}))
    path = write_archive(tmp_path / "model.pt", description, BYTES, byteorder=b"big")
    refuse(path, "byte order 'big'")


def central_entries(data: bytes) -> list[int]:
    """Where the entries of the zip directory begin."""
    places, start = [], data.find(b"PK\x01\x02")
    while start >= 0:
        places.append(start)
        start = data.find(b"PK\x01\x02", start + 4)
    return places


@pytest.mark.parametrize("claimed", [1 << 20, 0xFFFFFFF0])
@pytest.mark.parametrize("fields", ["size", "both"])
def test_sizes_that_the_zip_directory_makes_up(tmp_path: Path, claimed: int, fields: str) -> None:
    path = write_pt(tmp_path / "model.pt", {"x": np.ones(2, np.float32)})
    data = bytearray(path.read_bytes())
    for entry in central_entries(data):
        struct.pack_into("<I", data, entry + 24, claimed)
        if fields == "both":
            struct.pack_into("<I", data, entry + 20, claimed)
    path.write_bytes(data)
    refuse(path, "lies about the size|overlap|damaged")


def test_members_that_lie_on_top_of_each_other(tmp_path: Path) -> None:
    """Two storages in the bytes of one."""
    size = 1 << 20
    path = tmp_path / "model.pt"
    tensors = {f"x{i}": tensor(storage(str(i), "ByteStorage", size), (size,), (1,)) for i in (0, 1)}
    write_archive(path, program(dictionary(tensors)), {"0": bytes(size), "1": bytes(size)})
    data = bytearray(path.read_bytes())
    first, second = (
        entry for entry in central_entries(data) if b"/data/" in data[entry + 46 : entry + 58]
    )
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    refuse(path, "overlap")


def test_a_flipped_bit_in_a_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    path = write_pt(tmp_path / "model.pt", {"x": values})
    data = bytearray(path.read_bytes())
    data[data.index(values.tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    refuse(path, "storage '0' is damaged")


def test_a_file_cut_at_any_place(tmp_path: Path) -> None:
    whole = write_pt(tmp_path / "model.pt", {"x": np.arange(50, dtype=np.float32)}).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        refuse(cut, "cut.pt")


@settings(deadline=None, max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_random_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    path = write_pt(folder / "model.pt", {"x": np.arange(6, dtype=np.float32)})
    data = bytearray(path.read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        assert all(array.nbytes <= len(data) for array in read_all(path).values())
    shutil.rmtree(folder)


HONEST = program(dictionary({"x": GOOD, "y": dictionary({"z": GOOD}), "n": integer(70_000)}))


@settings(deadline=None, max_examples=500)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(HONEST) - 1), st.integers(0, 255)), min_size=1, max_size=3
    )
)
def test_random_changes_of_a_program_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("programs")
    changed = bytearray(HONEST)
    for place, value in edits:
        changed[place] = value
    path = write_archive(folder / "model.pt", bytes(changed), BYTES)
    with contextlib.suppress(CheckpointError):
        assert all(array.nbytes <= 16 for array in read_all(path).values())
    shutil.rmtree(folder)


@settings(deadline=None, max_examples=300)
@given(body=st.binary(max_size=60))
@example(body=b"")
@example(body=b"\x80")
@example(body=b"(((((((ttttttt")
def test_random_programs_are_refused(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    folder = tmp_path_factory.mktemp("programs")
    path = write_archive(folder / "model.pt", body, BYTES)
    with pytest.raises(CheckpointError), open_pt(path):
        pass
    shutil.rmtree(folder)


# --- safetensors ----------------------------------------------------------------------------------


def write_lie(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + encoded + data)
    return path


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


F4 = entry("F32", [1], 0, 4)
LIES: dict[str, object] = {
    "no JSON": b"{",
    "no dictionary": [1],
    "nested for ever": b"[" * 100_000,
    "unknown dtype": {"x": entry("F8_E4M3", [4], 0, 4)},
    "dtype no string": {"x": entry(["F32"], [1], 0, 4)},
    "shape and bytes disagree": {"x": entry("F32", [2], 0, 4)},
    "negative shape": {"x": entry("F32", [-1, -1], 0, 4)},
    "fractional shape": {"x": entry("F32", [1.0], 0, 4)},
    "true as shape": {"x": entry("F32", [True], 0, 4)},
    "shape no list": {"x": entry("F32", "1", 0, 4)},
    "too many dimensions": {"x": entry("F32", [1] * 9, 0, 4)},
    "huge": {"x": entry("F32", [1 << 61], 0, 1 << 63)},
    "overflowing product": {"x": entry("F32", [1 << 32, 1 << 32], 0, 0)},
    "offsets backwards": {"x": entry("F32", [1], 4, 0)},
    "negative offsets": {"x": entry("F32", [1], -4, 0)},
    "three offsets": {"x": entry("F32", [1], 0, 4, 8)},
    "beyond the end": {"x": entry("F32", [2], 0, 8)},
    "bytes left over": {"x": entry("U8", [3], 0, 3)},
    "a hole": {"x": entry("U8", [1], 0, 1), "y": entry("U8", [2], 2, 4)},
    "overlap": {"x": F4, "y": F4},
    "partial overlap": {"x": entry("U8", [3], 0, 3), "y": entry("U8", [2], 2, 4)},
    "same name twice": b'{"x":%s,"x":%s}' % ((json.dumps(F4).encode(),) * 2),
    "more keys": {"x": {**F4, "more": 1}},
    "no offsets": {"x": {"dtype": "F32", "shape": [1]}},
    "number of 5000 digits": b'{"x":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}'
    % (b"9" * 5000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lying_safetensors_headers(tmp_path: Path, lie: object) -> None:
    path = write_lie(tmp_path / "model.safetensors", lie, bytes(4))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


@pytest.mark.parametrize("length", [1, 1 << 24, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_lying_header_lengths(tmp_path: Path, length: int) -> None:
    path = write_lie(tmp_path / "model.safetensors", {"x": F4}, bytes(4), length=length)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


def test_a_safetensors_file_cut_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": TensorSpec("F32", (3,))}, lambda _: np.ones(3, np.float32))
    whole = path.read_bytes()
    assert read_header(path).specs == {"x": TensorSpec("F32", (3,))}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)
