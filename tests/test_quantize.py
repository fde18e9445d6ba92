"""Quantised layers: which ones, how exact, one at a time, and the same after saving and loading."""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from nano_folder import nano_arrays, write_nano_folder
from torch_files import write_funasr_folder

from funasr_batch.errors import CheckpointError, UsageError
from funasr_batch.models_command import run_models
from funasr_batch.settings import KEYS, Settings, recognition_digest
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors, open_checkpoint
from funasr_batch.weights.convert import convert
from funasr_batch.weights.quantize import (
    NONE,
    PRESETS,
    Quantization,
    dequantize_tensors,
    group_size,
    parse_quantization,
    quantizable,
    quantize_layers,
    quantize_tensor,
    quantize_tensors,
    unquantizable,
)
from funasr_batch.weights.quantized_checkpoint import load_tensors, plain_specs, save_quantized

BOTH = Quantization(encoder=8, llm=4)
ENCODER_LAYER = "audio_encoder.encoders.0.feed_forward.w_1"
ADAPTOR_LAYER = "audio_adaptor.linear1"
LLM_LAYER = "llm.model.layers.0.mlp.up_proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(convert(write_nano_folder(tmp_path / "nano"), tmp_path / "plain"))


@pytest.fixture
def tiny(oracle: Path, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(convert(oracle / "checkpoints" / "nano-tiny", tmp_path / "tiny"))


def assert_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert mx.array_equal(one[name], other[name]), name


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan", "canonical"),
    [
        ("none", NONE, "none"),
        ("int8", Quantization(encoder=8), "encoder=8"),
        ("int8-all", Quantization(encoder=8, llm=8), "encoder=8,llm=8"),
        (" INT4 ", Quantization(encoder=8, llm=4), "encoder=8,llm=4"),
        ("llm=4,encoder=8", Quantization(encoder=8, llm=4), "encoder=8,llm=4"),
        (" LLM = 8 ", Quantization(llm=8), "llm=8"),
        ("encoder=4", Quantization(encoder=4), "encoder=4"),
    ],
)
def test_specs(text: str, plan: Quantization, canonical: str) -> None:
    assert parse_quantization(text) == plan
    assert str(plan) == canonical
    assert parse_quantization(canonical) == plan
    assert bool(plan) == (canonical != "none")


@pytest.mark.parametrize(
    "text",
    ["", "8", "int2", "llm", "llm=", "llm=16", "llm=08", "llm=4,llm=4", "llm=4,", "ctc=8", "llm:4",
     "int8,llm=4", "none,llm=4", "llm=٤"],
)  # fmt: skip
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match="no quantisation"):
        parse_quantization(text)


def test_equal_specs_have_equal_digests() -> None:
    def digest(spec: str | None) -> str:
        return recognition_digest(Settings(quantize=spec))

    assert Settings(quantize="int4").quantize == "encoder=8,llm=4"
    assert digest("int4") == digest("LLM=4, encoder=8") != digest("int8")
    # A later default must not redo what was made before there was the setting.
    assert digest("none") == digest("None ") == digest(None) == recognition_digest(Settings())


def test_settings_refuse_what_is_no_spec() -> None:
    with pytest.raises(UsageError, match=r"^quantize must be int8, int8-all, int4 or bits such as"):
        Settings(quantize="int3")
    assert set(PRESETS) == {"none", *KEYS["quantize"].kind.names}


@pytest.mark.parametrize("word", ["float16", "fp16", "half"])
def test_float16_is_refused_with_the_reason(word: str) -> None:
    with pytest.raises(UsageError, match=r"float32 or bfloat16 .*float16 Nano writes garbage"):
        Settings(dtype=word)  # type: ignore[arg-type]


# --- which layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        ("audio_encoder.encoders.3.self_attn.linear_q_k_v.weight", (1536, 512), 8),
        ("audio_encoder.tp_encoders.3.feed_forward.w_2.weight", (512, 2048), 8),
        ("audio_adaptor.blocks.1.feed_forward.w_2.weight", (1024, 256), 8),
        ("audio_adaptor.blocks.1.feed_forward.w_2.weight", (1024, 96), 8),
        ("llm.model.layers.27.self_attn.o_proj.weight", (1024, 2048), 4),
        ("audio_encoder.encoders0.0.self_attn.linear_q_k_v.weight", (1536, 560), None),
        ("audio_adaptor.blocks.1.feed_forward.w_2.weight", (1024, 16), None),
        ("audio_encoder.encoders.3.self_attn.linear_out.bias", (512,), None),
        ("audio_encoder.encoders.3.norm1.weight", (512,), None),
        ("audio_encoder.encoders.3.self_attn.fsmn_block.weight", (512, 1, 11), None),
        ("llm.model.layers.27.self_attn.q_norm.weight", (128,), None),
        ("llm.model.embed_tokens.weight", (151936, 1024), None),
        ("llm.model.norm.weight", (1024,), None),
        ("ctc_decoder.linear1.weight", (2048, 512), None),
        ("ctc.ctc_lo.weight", (60515, 512), None),
        ("encoder.encoders.3.feed_forward.w_1.weight", (2048, 512), None),
    ],
)
def test_layers_that_are_quantised(name: str, shape: tuple[int, ...], bits: int | None) -> None:
    assert quantizable(name, shape, BOTH) == bits
    assert quantizable(name, shape, NONE) is None
    only_encoder = quantizable(name, shape, Quantization(encoder=8))
    assert only_encoder == (bits if name.startswith("audio") else None)


def test_groups_fit_the_width() -> None:
    assert [group_size(width) for width in (2048, 96, 560, 32, 16, 0)] == [64, 32, None, 32] + [
        None
    ] * 2


def test_layers_that_stay_are_listed(checkpoint: Checkpoint) -> None:
    shapes = [(name, spec.shape) for name, spec in checkpoint.specs.items()]
    first = "audio_encoder.encoders0.0.self_attn.linear_q_k_v.weight"
    assert unquantizable(shapes, BOTH) == [first]
    assert unquantizable(shapes, Quantization(llm=4)) == []


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [128, 96])
def test_a_weight_is_off_by_its_rounding(bits: int, width: int, dtype: mx.Dtype) -> None:
    mx.random.seed(bits)
    weight = mx.random.normal((32, width)).astype(dtype)
    name = f"{LLM_LAYER}.weight"
    plan = Quantization(llm=bits)
    pieces = quantize_tensor(name, weight, plan)
    size = group_size(width)
    assert size is not None
    assert pieces[name].dtype == mx.uint32
    assert pieces[name].shape == (32, width * bits // 32)
    assert pieces[f"{LLM_LAYER}.scales"].shape == (32, width // size)

    plain = dequantize_tensors(dict(pieces), plan, mx.float32)[name]
    exact = weight.astype(mx.float32).reshape(32, -1, size)
    error = mx.abs(plain.reshape(exact.shape) - exact)
    step = mx.abs(pieces[f"{LLM_LAYER}.scales"].astype(mx.float32))[..., None]
    # Half a step inside the range. At its ends more: MLX moves the codes so that one of them is
    # zero, by half a step at most, and the rounding of scale and bias to bfloat16 moves each of
    # them by up to 2**-9 of the last code.
    assert (error <= (1 + (2**bits - 1) * 2**-8) * step).all()
    # Rounding to steps alone gives step / sqrt(12); the ends, where few weights are, add little.
    rms = mx.sqrt(mx.mean(mx.square(error)))
    uniform = mx.sqrt(mx.mean(mx.square(step)) / 12)
    assert 0.9 * uniform < rms < 1.1 * uniform


def test_rounded_scales_cost_less_than_mlx_s_own() -> None:
    mx.random.seed(0)
    weight = mx.random.normal((64, 512)).astype(mx.bfloat16)
    name = f"{ENCODER_LAYER}.weight"
    ours = dequantize_tensors(quantize_tensor(name, weight, BOTH), BOTH, mx.float32)[name]
    codes, scales, biases = mx.quantize(weight, group_size=64, bits=8)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    theirs = mx.dequantize(codes, scales, biases, group_size=64, bits=8)
    exact = weight.astype(mx.float32)
    assert mx.std(ours - exact) < 0.8 * mx.std(theirs - exact)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30])
def test_equal_weights_are_kept(value: float) -> None:
    """Groups without a range have no step, and must not become NaN."""
    name = f"{LLM_LAYER}.weight"
    plain = dequantize_tensors(
        quantize_tensor(name, mx.full((2, 64), value), BOTH), BOTH, mx.float32
    )[name]
    # 2**-8 is what bfloat16 is exact to; 1e-7 the smallest step of mx.quantize.
    np.testing.assert_allclose(np.array(plain), value, rtol=2**-8, atol=1e-6)


def test_the_model_is_the_same_in_both_types(tiny: Checkpoint) -> None:
    coarse, _ = load_tensors(tiny, BOTH, mx.bfloat16)
    fine, _ = load_tensors(tiny, BOTH, mx.float32)
    quantised = [name for name in fine if name.endswith((".scales", ".biases"))]
    assert len(quantised) == 2 * sum(tensor.dtype == mx.uint32 for tensor in fine.values()) > 0
    for name in (*quantised, f"{LLM_LAYER}.weight"):
        assert mx.array_equal(coarse[name], fine[name]), name


def test_layers_compute_what_their_plain_weights_would() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(128, 96, bias=False)
            self.down_proj = nn.Linear(96, 24)
            self.odd = nn.Linear(24, 8)
            self.norm = nn.RMSNorm(8)

        def __call__(self, x: mx.array) -> mx.array:
            return self.norm(self.odd(self.down_proj(self.up_proj(x))))

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.audio_encoder = Block()

    mx.random.seed(1)
    plain, quantised, x = Wrapper(), Wrapper(), mx.random.normal((5, 128))
    weights = dict(nn.utils.tree_flatten(plain.parameters()))
    for bits in (8, 4):
        plan = Quantization(encoder=bits)
        model = Wrapper()
        quantize_layers(model, plan)
        quantised = quantize_tensors(dict(weights), plan, mx.float32)
        model.load_weights(list(quantised.items()), strict=True)
        assert type(model.audio_encoder.up_proj) is nn.QuantizedLinear
        assert model.audio_encoder.down_proj.group_size == 32
        assert type(model.audio_encoder.odd) is nn.Linear
        plain.load_weights(list(dequantize_tensors(quantised, plan, mx.float32).items()))
        # Sums of 128 products in another order.
        assert mx.allclose(model.audio_encoder(x), plain.audio_encoder(x), rtol=1e-4, atol=1e-5)


def test_no_plan_leaves_the_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_layers(model, NONE)
    assert type(model.layers[0]) is nn.Linear


# --- one at a time --------------------------------------------------------------------------------


class Source(MutableMapping[str, mx.array]):
    """Tensors that come into being when they are asked for, and must have been let go by then."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.baseline = mx.get_active_memory()
        self.held: list[int] = []

    def __getitem__(self, name: str) -> mx.array:
        self.held.append(mx.get_active_memory() - self.baseline)
        tensor = mx.random.normal(self.shapes[name])
        mx.eval(tensor)
        return tensor

    def __delitem__(self, name: str) -> None:
        del self.shapes[name]

    def __setitem__(self, name: str, tensor: mx.array) -> None:
        raise AssertionError("nothing is put back")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_tensors_are_quantised_one_by_one() -> None:
    names = [f"llm.model.layers.{i}.mlp.up_proj.weight" for i in range(8)]
    source = Source(dict.fromkeys(names, (512, 1024)))
    result = quantize_tensors(source, Quantization(llm=4), mx.bfloat16)
    assert len(source) == 0
    assert len(result) == 3 * len(names)
    one_result = 512 * 1024 // 2 + 2 * 2 * 512 * 1024 // 64
    # When the n-th is read, n - 1 results are held and no source: 2 MiB each, eight times as much.
    # The allocator's own rounding is small beside a result.
    for done, held in enumerate(source.held):
        assert done * one_result <= held < (done + 0.5) * one_result


def test_loading_holds_the_result_and_one_tensor(tmp_path: Path) -> None:
    arrays = nano_arrays()
    for i in range(12):
        arrays[f"llm.model.layers.{i}.mlp.up_proj.weight"] = np.ones((1024, 2048), np.uint16)
    source = write_nano_folder(tmp_path / "nano", arrays=arrays)
    checkpoint = open_checkpoint(convert(source, tmp_path / "plain"))
    del arrays
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tensors, _ = load_tensors(checkpoint, Quantization(llm=4), mx.bfloat16)
    peak = mx.get_peak_memory() - before
    held = sum(tensor.nbytes for tensor in tensors.values())
    largest = 1024 * 2048 * 2
    # On the way a tensor is there in float32 a few times over: 8 times its bytes in bfloat16.
    # All sources together would be 12 times as much, beside the result.
    assert held < peak < held + 10 * largest
    assert mx.get_active_memory() - before < held + largest


def test_what_is_no_layer_is_cast_only() -> None:
    tensors = {"llm.model.norm.weight": mx.ones(4), "steps": mx.array([1, 2])}
    result = quantize_tensors(dict(tensors), BOTH, mx.bfloat16)
    assert {name: tensor.dtype for name, tensor in result.items()} == {
        "llm.model.norm.weight": mx.bfloat16,
        "steps": mx.int32,
    }


def test_what_is_quantised_already_is_left(tiny: Checkpoint) -> None:
    once, _ = load_tensors(tiny, BOTH, mx.float32)
    assert_same(quantize_tensors(dict(once), BOTH, mx.float32), once)


# --- saved and loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [Quantization(8), Quantization(None, 8), BOTH], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_saved_is_as_quantised_in_memory(
    tiny: Checkpoint, tmp_path: Path, plan: Quantization, dtype: mx.Dtype
) -> None:
    saved = open_checkpoint(save_quantized(tiny, tmp_path / "saved", plan))
    assert saved.quantization == plan
    expected, used = load_tensors(tiny, plan, dtype)
    assert used == plan
    for asked in (NONE, plan):
        found, used = load_tensors(saved, asked, dtype)
        assert used == plan
        assert_same(found, expected)


def test_a_saved_folder_has_everything(checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = open_checkpoint(save_quantized(checkpoint, tmp_path / "saved", BOTH))
    assert checkpoint.quantization is None
    assert saved.weights_sha256 != checkpoint.weights_sha256
    assert saved.architecture == checkpoint.architecture
    assert saved.config == checkpoint.config
    assert saved.source == checkpoint.source
    for one, other in (
        (saved.tokenizer, checkpoint.tokenizer),
        (saved.ctc_vocabulary, checkpoint.ctc_vocabulary),
    ):
        assert one is not None
        assert other is not None
        assert one.read_bytes() == other.read_bytes()
    description = json.loads((saved.folder / "model.json").read_bytes())
    assert description["quantization"] == {"encoder": 8, "llm": 4, "group_size": 64}
    assert saved.specs[f"{ADAPTOR_LAYER}.weight"].dtype == "U32"
    for name in ("llm.model.embed_tokens.weight", "ctc.ctc_lo.weight"):
        assert saved.specs[name] == checkpoint.specs[name]


def test_a_quantised_folder_is_checked_as_a_plain_one(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    saved = open_checkpoint(save_quantized(checkpoint, tmp_path / "saved", BOTH))
    expected = {name: spec.shape for name, spec in checkpoint.specs.items()}
    check_tensors(plain_specs(saved), expected, path=saved.folder)
    assert plain_specs(checkpoint) == checkpoint.specs
    with pytest.raises(CheckpointError, match=rf"{ENCODER_LAYER}\.weight \[6, 64\] instead of"):
        check_tensors(
            plain_specs(saved), {**expected, f"{ENCODER_LAYER}.weight": (6, 128)}, path=saved.folder
        )


def test_a_copy_is_the_same_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = open_checkpoint(save_quantized(checkpoint, tmp_path / "copy", NONE))
    assert copy.weights_sha256 == checkpoint.weights_sha256
    assert copy.quantization is None
    quantised = open_checkpoint(save_quantized(checkpoint, tmp_path / "quantised", BOTH))
    copy = open_checkpoint(save_quantized(quantised, tmp_path / "copy of quantised", NONE))
    assert copy.weights_sha256 == quantised.weights_sha256
    assert copy.quantization == BOTH


def test_a_paraformer_can_be_copied_and_not_quantised(tmp_path: Path) -> None:
    source = write_funasr_folder(tmp_path / "source")
    checkpoint = open_checkpoint(convert(source, tmp_path / "plain"))
    copy = open_checkpoint(save_quantized(checkpoint, tmp_path / "copy", NONE))
    assert (copy.tokens, copy.weights_sha256) == (checkpoint.tokens, checkpoint.weights_sha256)
    with pytest.raises(CheckpointError, match="no layers that encoder=8 could quantise"):
        save_quantized(checkpoint, tmp_path / "quantised", Quantization(encoder=8))
    assert not (tmp_path / "quantised").exists()


def test_what_is_quantised_is_not_quantised_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = open_checkpoint(save_quantized(checkpoint, tmp_path / "saved", Quantization(8)))
    for plan in (BOTH, Quantization(encoder=4)):
        with pytest.raises(CheckpointError, match="quantised already, by encoder=8; it cannot"):
            load_tensors(saved, plan, mx.float32)
        with pytest.raises(CheckpointError, match="quantised already"):
            save_quantized(saved, tmp_path / "again", plan)


def test_a_quantised_folder_is_no_conversion_of_the_source(tmp_path: Path) -> None:
    source = write_nano_folder(tmp_path / "nano")
    plain = open_checkpoint(convert(source, tmp_path / "plain"))
    saved = save_quantized(plain, tmp_path / "saved", BOTH)
    with pytest.raises(CheckpointError, match="holds something else"):
        convert(source, saved)


def test_a_quantisation_of_another_version(checkpoint: Checkpoint, tmp_path: Path) -> None:
    saved = save_quantized(checkpoint, tmp_path / "saved", BOTH)
    path = saved / "model.json"
    description = json.loads(path.read_bytes())
    for other in (
        {"encoder": 8, "llm": 4, "group_size": 16},
        {"encoder": 3, "llm": 4, "group_size": 64},
        {"encoder": 8, "group_size": 64},
        {"encoder": 8, "llm": 4, "group_size": 64, "mode": "mxfp4"},
        "int8",
    ):
        path.write_text(json.dumps({**description, "quantization": other}))
        with pytest.raises(CheckpointError, match="a quantisation that this version does not know"):
            open_checkpoint(saved)


def test_plain_weights_for_the_cpu(tiny: Checkpoint) -> None:
    tensors, plan = load_tensors(tiny, BOTH, mx.bfloat16)
    codes = tensors[f"{LLM_LAYER}.weight"]
    plain = dequantize_tensors(tensors, plan, mx.float32)
    assert tensors == {}
    assert {name: tensor.shape for name, tensor in plain.items()} == {
        name: spec.shape for name, spec in tiny.specs.items()
    }
    assert {tensor.dtype for tensor in plain.values()} == {mx.float32}
    assert codes.dtype == mx.uint32


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_a_folder_that_loads(tmp_path: Path) -> None:
    source = write_nano_folder(tmp_path / "nano")
    target = tmp_path / "out" / "nano-int4"
    words = ["convert", str(source), "--quantize", "int4", "-o", str(target)]
    lines = list(run_models([*words, "--cache-dir", str(tmp_path / "cache")]))
    assert open_checkpoint(target).quantization == BOTH
    assert f"--model {target}" in lines[-1]
    assert any("encoders0.0.self_attn.linear_q_k_v.weight" in line for line in lines)


def test_the_command_without_quantisation(tmp_path: Path) -> None:
    source = write_nano_folder(tmp_path / "nano")
    words = ["convert", str(source), "-o", str(tmp_path / "out")]
    lines = list(run_models([*words, "--cache-dir", str(tmp_path / "cache")]))
    assert open_checkpoint(tmp_path / "out").quantization is None
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["compress"], "invalid choice: 'compress'"),
        (["convert", "x"], "required: -o/--output-dir"),
        (["convert", "-o", "y"], "required: MODEL"),
        (["convert", "x", "-o", "y", "--quantize", "3"], "must be int8, int8-all, int4 or bits"),
        (["convert", "x", "-o", "y", "--quant", "int8"], "unrecognized arguments"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(run_models(words))
