"""The converted folder: written whole, opened strictly, compared with what a model needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights import checkpoint as module
from funasr_batch.weights.checkpoint import (
    check_tensors,
    open_checkpoint,
    write_checkpoint,
)
from funasr_batch.weights.safetensors_file import (
    ITEM_BYTES,
    TensorSpec,
    read_header,
    write_safetensors,
)

ARRAYS: dict[str, np.ndarray] = {
    "encoder.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "encoder.steps": np.array(7, np.int64),
    "encoder.half": np.array([0x3F80, 0xC000, 0x0000], np.uint16),
    "encoder.mask": np.array([True, False]),
}
SPECS = {
    "encoder.weight": TensorSpec("F32", (3, 4)),
    "encoder.steps": TensorSpec("I64", ()),
    "encoder.half": TensorSpec("BF16", (3,)),
    "encoder.mask": TensorSpec("BOOL", (2,)),
}
CMVN = (np.array([1.5, -2.0], np.float32), np.array([0.25, 3.0], np.float32))
TOKENS = ("<blank>", "<s>", "</s>", "好", "\u2028")


def write(destination: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "architecture": "Paraformer",
        "config": {"encoder_conf": {"output_size": 4}, "predictor": "CifPredictorV2"},
        "tokens": TOKENS,
        "cmvn": CMVN,
        "tensors": SPECS,
        "read": ARRAYS.__getitem__,
        "source": {"revision": "abc", "sha256": {"model.pt": "00"}},
    }
    write_checkpoint(destination, **{**arguments, **changes})
    return destination


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def test_files_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"model": {}}', "ctc.tiktoken": b"aA== 0\n"}
    checkpoint = open_checkpoint(write(tmp_path / "nano", files=files))
    assert checkpoint.tokenizer == tmp_path / "nano" / "tokenizer.json"
    assert checkpoint.ctc_vocabulary == tmp_path / "nano" / "ctc.tiktoken"
    for name, content in files.items():
        assert (tmp_path / "nano" / name).read_bytes() == content
    without = open_checkpoint(folder)
    assert without.tokenizer is None
    assert without.ctc_vocabulary is None


def test_codes_are_no_mistake_where_a_quantised_layer_is_expected(tmp_path: Path) -> None:
    found = {"x.weight": TensorSpec("U32", (4, 8)), "x.scales": TensorSpec("BF16", (4, 1))}
    check_tensors(found, {"x.weight": (4, 8), "x.scales": (4, 1)}, path=tmp_path)
    with pytest.raises(CheckpointError, match=r"not floating-point:\n    x\.weight U32"):
        check_tensors(found, {"x.weight": (4, 8)}, path=tmp_path, unused=("x.scales",))


def test_the_raw_bytes_of_a_tensor(folder: Path) -> None:
    header = read_header(folder / "model.safetensors")
    for name, array in ARRAYS.items():
        assert header.read_raw(name).tobytes() == array.tobytes()


def test_what_is_written_is_what_is_opened(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.folder == folder
    assert checkpoint.architecture == "Paraformer"
    assert checkpoint.config["encoder_conf"] == {"output_size": 4}
    assert checkpoint.tokens == TOKENS
    assert checkpoint.revision == "abc"
    assert checkpoint.specs == SPECS
    assert checkpoint.cmvn is not None
    for found, expected in zip(checkpoint.cmvn, CMVN, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.weights_sha256 == digest


def test_the_reference_reader_agrees(tmp_path: Path) -> None:
    readable = {name: ARRAYS[name] for name in SPECS if SPECS[name].dtype != "BF16"}
    path = write(tmp_path / "model", tensors={n: SPECS[n] for n in readable}) / "model.safetensors"
    found = load_file(path)
    assert found.keys() == {*readable, "cmvn.shift", "cmvn.scale"}
    for name, array in readable.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    np.testing.assert_array_equal(found["cmvn.shift"], CMVN[0], strict=True)


def test_mlx_loads_the_same_values(folder: Path) -> None:
    import mlx.core as mx

    tensors = open_checkpoint(folder).load_tensors()
    assert tensors.keys() == SPECS.keys()
    assert tensors["encoder.half"].dtype == mx.bfloat16
    assert tensors["encoder.half"].tolist() == [1.0, -2.0, 0.0]
    np.testing.assert_array_equal(np.array(tensors["encoder.weight"]), ARRAYS["encoder.weight"])
    assert tensors["encoder.steps"].item() == 7
    assert tensors["encoder.mask"].tolist() == [True, False]


def test_a_model_without_vocabulary_and_cmvn(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "vad", tokens=None, cmvn=None, source=None))
    assert checkpoint.tokens is None
    assert checkpoint.cmvn is None
    assert checkpoint.revision is None


def test_opening_does_not_import_mlx(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from funasr_batch.weights.checkpoint import open_checkpoint;"
        "open_checkpoint(Path(sys.argv[1])); sys.exit('mlx' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_the_dtype_of_a_model(tmp_path: Path) -> None:
    def dtype(name: str, *labels: str) -> str:
        specs = {label: TensorSpec(label, (0,)) for label in labels}
        target = write(tmp_path / name, tensors=specs, read=lambda _: np.empty(0))
        return json.loads((target / "model.json").read_bytes())["dtype"]

    assert dtype("a", "F32", "I64") == "F32"
    assert dtype("b", "BF16") == "BF16"
    assert dtype("c", "BF16", "F32") == "mixed"


@settings(deadline=None, max_examples=50)
@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.builds(
            TensorSpec,
            st.sampled_from(sorted(ITEM_BYTES)),
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
        ),
        max_size=6,
    )
)
def test_any_header_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TensorSpec]
) -> None:
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    write_safetensors(path, specs, lambda name: np.zeros(specs[name].nbytes, np.uint8))
    header = read_header(path)
    assert header.specs == specs
    for name, spec in specs.items():
        assert header.positions[name] % ITEM_BYTES[spec.dtype] == 0


def test_values_of_another_size_than_announced_are_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder"):
        write(tmp_path / "model", read=lambda _: np.zeros(1, np.float32))
    assert list(tmp_path.iterdir()) == []


# --- whole or not at all --------------------------------------------------------------------------


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def read(name: str) -> np.ndarray:
        if name == "encoder.half":
            raise CheckpointError("the source is damaged")
        return ARRAYS[name]

    with pytest.raises(CheckpointError, match="source is damaged"):
        write(tmp_path / "model", read=read)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="holds something else"):
        write(folder, architecture="Other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert open_checkpoint(write(tmp_path / "model")).architecture == "Paraformer"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        write(tmp_path / "file" / "model")
    assert caught.value.hint


def test_no_room_is_noticed_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match="converting needs"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- damaged folders ------------------------------------------------------------------------------


def edit_description(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_bytes())
    description.update(changes)
    path.write_text(json.dumps(description), "utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda f: (f / "model.json").unlink(), "No such file"),
    "no JSON": (lambda f: (f / "model.json").write_text("{"), "is not JSON"),
    "deep JSON": (lambda f: (f / "model.json").write_text("[" * 100_000), "is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "No such file"),
    "newer": (lambda f: edit_description(f, format_version=2), "newer funasr-batch"),
    "older": (lambda f: edit_description(f, format_version=0), "does not describe"),
    "architecture": (lambda f: edit_description(f, architecture=None), "does not describe"),
    "config": (lambda f: edit_description(f, config=[]), "does not describe"),
    "digest": (lambda f: edit_description(f, weights_sha256="0" * 63), "does not describe"),
    "tokens": (lambda f: (f / "tokens.json").write_text('["a", 1]'), "not a list of strings"),
    "surrogate": (lambda f: (f / "tokens.json").write_text('["\\ud800"]'), "not a list of strings"),
    "no text": (lambda f: (f / "tokens.json").write_bytes(b'["\xff"]'), "is not JSON"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_weights_that_were_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "cmvn",
    [
        {"cmvn.shift": TensorSpec("F32", (2,))},
        {"cmvn.shift": TensorSpec("F32", (2,)), "cmvn.scale": TensorSpec("F32", (3,))},
        {"cmvn.shift": TensorSpec("F32", (2, 1)), "cmvn.scale": TensorSpec("F32", (2, 1))},
        {"cmvn.shift": TensorSpec("F16", (2,)), "cmvn.scale": TensorSpec("F16", (2,))},
    ],
)
def test_cmvn_that_cannot_be(tmp_path: Path, cmvn: dict[str, TensorSpec]) -> None:
    folder = write(
        tmp_path / "model",
        cmvn=None,
        tensors=cmvn,
        read=lambda name: np.zeros(cmvn[name].nbytes, np.uint8),
    )
    with pytest.raises(CheckpointError, match="cmvn"):
        open_checkpoint(folder)


# --- strictness -----------------------------------------------------------------------------------

EXPECTED: dict[str, tuple[int, ...]] = {"a.weight": (2, 3), "a.bias": (2,)}
FOUND = {name: TensorSpec("F32", shape) for name, shape in EXPECTED.items()}


def test_a_checkpoint_that_fits() -> None:
    check_tensors(FOUND, EXPECTED, path=Path("model"))


def test_one_message_lists_everything_that_does_not_fit() -> None:
    found = {
        "a.weight": TensorSpec("F32", (3, 2)),
        "a.steps": TensorSpec("I64", ()),
        "c": TensorSpec("F32", (1,)),
    }
    expected = {**EXPECTED, "a.steps": ()}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, expected, path=Path("/models/x"))
    assert str(caught.value).splitlines() == [
        "/models/x does not hold the tensors that its configuration describes",
        "  1 missing:",
        "    a.bias",
        "  1 unexpected:",
        "    c",
        "  1 of another shape:",
        "    a.weight [3, 2] instead of [2, 3]",
        "  1 not floating-point:",
        "    a.steps I64",
    ]


def test_long_lists_are_cut_and_counted() -> None:
    expected: dict[str, tuple[int, ...]] = {f"layer.{i}": (1,) for i in range(25)}
    with pytest.raises(CheckpointError, match="25 missing") as caught:
        check_tensors({}, expected, path=Path("model"))
    assert str(caught.value).count("layer.") == 10
    assert str(caught.value).endswith("… and 15 more")


def test_tensors_that_a_model_does_not_need_are_named_by_prefix() -> None:
    found = {**FOUND, "embed.weight": TensorSpec("F32", (9,))}
    with pytest.raises(CheckpointError, match="1 unexpected"):
        check_tensors(found, EXPECTED, path=Path("model"))
    check_tensors(found, EXPECTED, path=Path("model"), unused=("embed.",))
