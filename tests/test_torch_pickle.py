"""The reader of `.pt` files: real checkpoints, every dtype, every way to lay out a tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch_files import (
    FALSE,
    KINDS,
    array_tensor,
    call,
    dictionary,
    integer,
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
from funasr_batch.weights.torch_pickle import open_pt

LABELS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_pt(path) as file:
        return {entry: file.read(entry) for entry in file.tensors}


def test_published_vad_weights_equal_their_safetensors_copy(shared_data: Path) -> None:
    folder = shared_data / "models" / "fsmn_vad"
    expected = load_file(folder / "model.safetensors")
    found = read_all(folder / "model.pt")
    assert found.keys() == expected.keys()
    assert sum(values.size for values in found.values()) == 428_738
    for label, values in expected.items():
        np.testing.assert_array_equal(found[label], values, strict=True)


@pytest.mark.parametrize(
    ("model", "tensors", "values"),
    [
        ("paraformer-tiny", 137, 1_484_277),
        ("bicif-tiny", 149, 1_563_318),
        ("seaco-tiny", 276, 2_345_290),
        ("ct-punc-tiny", 31, 836_870),
        ("nano-tiny", 178, 870_368),
        ("fsmn-vad", 24, 428_738),
    ],
)
def test_checkpoints_saved_by_pytorch(oracle: Path, model: str, tensors: int, values: int) -> None:
    found = read_all(oracle / "checkpoints" / model / "model.pt")
    assert len(found) == tensors
    assert sum(array.size for array in found.values()) == values
    assert all(np.isfinite(array).all() for array in found.values())


def test_paraformer_holds_the_tensors_that_its_configuration_describes(oracle: Path) -> None:
    """Names and shapes of models.md, at 64 wide, 5 encoder and 3 decoder layers."""
    width, hidden, vocabulary, features = 64, 128, 8404, 560
    expected: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, **shapes: tuple[int, ...]) -> None:
        expected.update({prefix + key.replace("__", "."): shape for key, shape in shapes.items()})

    def affine(prefix: str, *shape: int) -> None:
        add(prefix, weight=shape, bias=shape[:1])

    for layer in ("encoders0.0", "encoders.0", "encoders.1", "encoders.2", "encoders.3"):
        prefix, incoming = f"encoder.{layer}.", features if layer == "encoders0.0" else width
        affine(prefix + "norm1.", incoming)
        affine(prefix + "norm2.", width)
        affine(prefix + "self_attn.linear_q_k_v.", 3 * width, incoming)
        affine(prefix + "self_attn.linear_out.", width, width)
        add(prefix, self_attn__fsmn_block__weight=(width, 1, 11))
        affine(prefix + "feed_forward.w_1.", hidden, width)
        affine(prefix + "feed_forward.w_2.", width, hidden)
    affine("encoder.after_norm.", width)
    affine("predictor.cif_conv1d.", width, width, 3)
    affine("predictor.cif_output.", 1, width)
    add("decoder.", embed__0__weight=(vocabulary, width))
    for layer in ("decoders.0", "decoders.1", "decoders.2", "decoders3.0"):
        prefix = f"decoder.{layer}."
        affine(prefix + "norm1.", width)
        affine(prefix + "feed_forward.w_1.", hidden, width)
        add(prefix, feed_forward__w_2__weight=(width, hidden))
        affine(prefix + "feed_forward.norm.", hidden)
        if layer != "decoders3.0":
            affine(prefix + "norm2.", width)
            affine(prefix + "norm3.", width)
            add(prefix, self_attn__fsmn_block__weight=(width, 1, 11))
            affine(prefix + "src_attn.linear_q.", width, width)
            affine(prefix + "src_attn.linear_k_v.", 2 * width, width)
            affine(prefix + "src_attn.linear_out.", width, width)
    affine("decoder.after_norm.", width)
    affine("decoder.output_layer.", vocabulary, width)

    with open_pt(oracle / "checkpoints" / "paraformer-tiny" / "model.pt") as file:
        found = {label: entry.shape for label, entry in file.tensors.items()}
    assert found == expected


@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = write_pt(tmp_path / "model.pt", {"x": values})
    with open_pt(path) as file:
        assert file.tensors["x"].dtype == LABELS[dtype]
        assert file.tensors["x"].shape == (2, 3, 4)
        assert file.tensors["x"].nbytes == values.nbytes
        np.testing.assert_array_equal(file.read("x"), values, strict=True)


def test_a_boolean_is_true_for_any_byte_but_zero(tmp_path: Path) -> None:
    description = program(dictionary({"x": tensor(storage("0", "BoolStorage", 3), (3,), (1,))}))
    path = write_archive(tmp_path / "model.pt", description, {"0": bytes([0, 1, 7])})
    assert read_all(path)["x"].tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.full(shape, 2.5, np.float32)
    path = write_pt(tmp_path / "model.pt", {"x": values})
    np.testing.assert_array_equal(read_all(path)["x"], values, strict=True)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_window_of_a_shared_storage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Transposed, sliced and stepped windows, as numpy itself takes them."""
    base = np.arange(5 * 6 * 7, dtype=np.int32).reshape(5, 6, 7)
    axes = data.draw(st.permutations(range(3)))
    window = base.transpose(axes)
    for axis in range(3):
        length = window.shape[axis]
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start, length))
        step = data.draw(st.integers(1, 3))
        window = window[(slice(None),) * axis + (slice(start, stop, step),)]
    address = window.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    strides = tuple(step // 4 for step in window.strides)
    shared = storage("0", "IntStorage", base.size)
    tensors = {
        "whole": tensor(shared, base.shape, (42, 7, 1)),
        "window": tensor(shared, window.shape, strides, address // 4 if window.size else 0),
    }
    path = tmp_path_factory.mktemp("window") / "model.pt"
    found = read_all(write_archive(path, program(dictionary(tensors)), {"0": base.tobytes()}))
    np.testing.assert_array_equal(found["whole"], base, strict=True)
    np.testing.assert_array_equal(found["window"], window, strict=True)
    assert found["window"].flags.c_contiguous


def test_storages_longer_than_one_read(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=700_001).astype(np.float32)
    whole = storage("0", "FloatStorage", values.size)
    tensors = {
        "across": tensor(whole, (300_000,), (1,), offset=200_000),
        "end": tensor(whole, (1,), (1,), offset=700_000),
    }
    path = tmp_path / "model.pt"
    found = read_all(write_archive(path, program(dictionary(tensors)), {"0": values.tobytes()}))
    np.testing.assert_array_equal(found["across"], values[200_000:500_000])
    np.testing.assert_array_equal(found["end"], values[-1:])


VALUES = {"a.weight": np.ones((2, 2), np.float32), "a.bias": np.zeros(2, np.float32)}
TENSORS = {label: array_tensor(label[2:], array) for label, array in VALUES.items()}
STORAGES = {label[2:]: array.tobytes() for label, array in VALUES.items()}


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers_are_unwrapped_and_other_values_left_out(tmp_path: Path, wrapper: str) -> None:
    contents = {
        wrapper: dictionary(TENSORS),
        "epoch": integer(3),
        "learning_rate": b"G" + b"\0" * 8,
        "note": text("好"),
        "best": b"N",
        "steps": b"](" + integer(1) + integer(70_000) + b"e",
        "optimizer": dictionary({"momentum": TENSORS["a.bias"]}),
    }
    path = write_archive(tmp_path / "model.pt", program(dictionary(contents)), STORAGES)
    assert read_all(path).keys() == VALUES.keys()


def test_nested_wrappers_and_the_prefix_of_data_parallel_training(tmp_path: Path) -> None:
    inner = {f"module.{label}": value for label, value in TENSORS.items()}
    description = program(dictionary({"state_dict": dictionary({"model": dictionary(inner)})}))
    path = write_archive(tmp_path / "model.pt", description, STORAGES)
    assert read_all(path).keys() == VALUES.keys()


def test_only_one_prefix_is_dropped(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", {"module.module.x": np.ones(1, np.float32)})
    assert list(read_all(path)) == ["module.x"]


def test_parameters_module_versions_and_the_memo(tmp_path: Path) -> None:
    """What `torch.save(model.state_dict())` writes beside the tensors themselves."""
    hooks = call("collections.OrderedDict")
    parameter = call("torch._utils._rebuild_parameter", TENSORS["a.bias"], b"\x88", hooks)
    body = (
        call("collections.OrderedDict")
        + (b"(" + text("p") + b"q\x05" + parameter + b"r\x00\x01\x00\x00")
        + (text("again") + b"j\x00\x01\x00\x00" + b"u")
        + (b"}" + text("_metadata") + dictionary({"": text("p")}) + b"s" + b"b")
    )
    path = write_archive(tmp_path / "model.pt", program(body), STORAGES)
    found = read_all(path)
    assert list(found) == ["p", "again"]
    np.testing.assert_array_equal(found["p"], VALUES["a.bias"])


@pytest.mark.parametrize("prefix", ["archive", "我的 模型"])
def test_any_archive_name_and_no_byte_order(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.pt"
    write_archive(path, program(dictionary(TENSORS)), STORAGES, prefix=prefix, byteorder=None)
    assert read_all(path).keys() == VALUES.keys()


def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    with open_pt(write_pt(tmp_path / "model.pt", VALUES)) as file, pytest.raises(KeyError):
        file.read("b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file written by torch.save"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<html>Not found</html>", "not a file written by torch.save"),
        (b"PK\x03\x04 and nothing else", "zip directory is damaged"),
    ],
)
def test_other_kinds_of_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught, open_pt(path):
        pass
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"), open_pt(tmp_path / "model.pt"):
        pass


@pytest.mark.parametrize(
    "body",
    [
        sequence(TENSORS["a.bias"]),
        TENSORS["a.bias"],
        dictionary({"epoch": integer(1)}),
        dictionary({"other": dictionary(TENSORS)}),
        FALSE,
    ],
)
def test_no_tensors_where_they_should_be(tmp_path: Path, body: bytes) -> None:
    path = write_archive(tmp_path / "model.pt", program(body), STORAGES)
    with pytest.raises(CheckpointError, match="tensors"), open_pt(path):
        pass


def test_a_global_by_itself_is_harmless(tmp_path: Path) -> None:
    body = dictionary({**TENSORS, "kind": name("torch.FloatStorage")})
    path = write_archive(tmp_path / "model.pt", program(body), STORAGES)
    assert read_all(path).keys() == VALUES.keys()
