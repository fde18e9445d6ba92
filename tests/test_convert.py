"""From FunASR's layout to a converted folder: same tensors, once, or a refusal that helps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from nano_folder import ADDED, CONFIG, LLM_CONFIG, nano_arrays, write_nano_folder
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch_files import cmvn_text, write_funasr_folder, write_pt

from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights.checkpoint import open_checkpoint
from funasr_batch.weights.convert import ARCHITECTURES, convert, ensure_converted
from funasr_batch.weights.safetensors_file import read_header
from funasr_batch.weights.torch_pickle import open_pt


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_funasr_folder(tmp_path / "source")


@pytest.mark.parametrize(
    ("model", "architecture", "tokens", "features"),
    [
        ("paraformer-tiny", "Paraformer", 8404, 560),
        ("bicif-tiny", "BiCifParaformer", 8404, 560),
        ("seaco-tiny", "SeacoParaformer", 8404, 560),
        ("fsmn-vad", "FsmnVADStreaming", None, 400),
    ],
)
def test_checkpoints_of_funasr(
    oracle: Path, tmp_path: Path, model: str, architecture: str, tokens: int | None, features: int
) -> None:
    source = oracle / "checkpoints" / model
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))

    assert checkpoint.architecture == architecture
    assert (checkpoint.tokens and len(checkpoint.tokens)) == tokens
    assert "encoder_conf" in checkpoint.config
    assert checkpoint.cmvn is not None
    assert [vector.shape for vector in checkpoint.cmvn] == [(features,), (features,)]
    published = json.loads((oracle / "goldens" / "checkpoints.sha256.json").read_bytes())
    for name, digest in checkpoint.source["sha256"].items():
        assert digest == published[f"{model}/{name}"]
    assert {"model.pt", "config.yaml", "am.mvn"} <= checkpoint.source["sha256"].keys()

    converted = load_file(checkpoint.folder / "model.safetensors")
    with open_pt(source / "model.pt") as original:
        assert checkpoint.specs.keys() == original.tensors.keys()
        for name in original.tensors:
            np.testing.assert_array_equal(converted[name], original.read(name), strict=True)


def test_cmvn_equals_what_funasr_reads(oracle: Path, tmp_path: Path) -> None:
    golden = np.load(oracle / "goldens" / "cmvn_asr.npz")
    folder = convert(oracle / "checkpoints" / "paraformer-tiny", tmp_path / "converted")
    cmvn = open_checkpoint(folder).cmvn
    assert cmvn is not None
    np.testing.assert_allclose(cmvn[0], golden["shift"], rtol=1e-6)
    np.testing.assert_allclose(cmvn[1], golden["scale"], rtol=1e-6)


def test_only_what_recognition_needs_is_kept_of_the_configuration(
    source: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted", revision="c0ffee"))
    assert checkpoint.config == {
        "encoder": "SANMEncoder",
        "encoder_conf": {"output_size": 4, "num_blocks": 1},
        "frontend_conf": {"n_mels": 2, "lfr_m": 3, "lfr_n": 2},
    }
    assert checkpoint.tokens == ("<blank>", "<s>", "</s>", "好")
    assert checkpoint.revision == "c0ffee"


def test_numbers_that_only_newer_yaml_knows(source: Path, tmp_path: Path) -> None:
    config = source / "config.yaml"
    config.write_text(
        config.read_text() + "model_conf: {a: 1e-4, b: 1.e+3, c: 2, d: e5, e: -1E2}\n"
    )
    found = open_checkpoint(convert(source, tmp_path / "converted")).config["model_conf"]
    assert found == {"a": 1e-4, "b": 1000.0, "c": 2, "d": "e5", "e": -100.0}


def test_a_vocabulary_in_lines(source: Path, tmp_path: Path) -> None:
    (source / "tokens.json").unlink()
    (source / "tokens.txt").write_bytes("<blank>\r\n \n\u2028\n好\n".encode())
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))
    assert checkpoint.tokens == ("<blank>", " ", "\u2028", "好")


def test_the_metadata_of_the_hub_says_where_files_are(source: Path, tmp_path: Path) -> None:
    (source / "parts").mkdir()
    names = {
        "config.yaml": "setup.yaml",
        "model.pt": "w.pt",
        "am.mvn": "m",
        "tokens.json": "t.json",
    }
    for old, new in names.items():
        (source / old).rename(source / "parts" / new)
    (source / "model.pt").write_bytes(b"not the one that is named")
    metas = {
        "init_param": "parts/w.pt",
        "config": "parts/setup.yaml",
        "tokenizer_conf": {"token_list": "parts/t.json"},
        "frontend_conf": {"cmvn_file": "parts/m"},
    }
    (source / "configuration.json").write_text(json.dumps({"file_path_metas": metas}))
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))
    assert checkpoint.source["sha256"].keys() == {
        "configuration.json", "parts/w.pt", "parts/setup.yaml", "parts/t.json", "parts/m",
    }  # fmt: skip


def test_a_cache_made_of_links(source: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files elsewhere and links to them."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert open_checkpoint(convert(snapshot, tmp_path / "converted")).architecture == "Paraformer"


def test_a_model_on_plain_features(source: Path, tmp_path: Path) -> None:
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace("n_mels: 2", "n_mels: 2\n  cmvn_file: null"))
    assert open_checkpoint(convert(source, tmp_path / "converted")).cmvn is None


def test_memory_holds_one_tensor_at_a_time(source: Path, tmp_path: Path) -> None:
    arrays = {f"x{i}": np.full(1 << 21, i, np.float32) for i in range(5)}
    write_pt(source / "model.pt", arrays)
    largest = arrays["x0"].nbytes
    del arrays
    tracemalloc.start()
    convert(source, tmp_path / "converted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.5 * largest


def replace_in_config(old: str, new: str) -> Callable[[Path], object]:
    def change(source: Path) -> None:
        path = source / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def metas(**values: object) -> Callable[[Path], object]:
    content = json.dumps({"file_path_metas": values})
    return lambda source: (source / "configuration.json").write_text(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda source: (source / name).unlink()


def overwrite(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda source: (source / name).write_bytes(data)


# --- Fun-ASR-Nano ---------------------------------------------------------------------------------


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return write_nano_folder(tmp_path / "nano")


def raw_bytes(folder: Path) -> dict[str, bytes]:
    header = read_header(folder / "model.safetensors")
    return {name: header.read_raw(name).tobytes() for name in header.specs}


def test_nano_of_funasr(oracle: Path, tmp_path: Path) -> None:
    source = oracle / "checkpoints" / "nano-tiny"
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))
    assert checkpoint.architecture == "FunASRNano"
    assert checkpoint.tokens is None
    assert checkpoint.cmvn is None
    assert checkpoint.ctc_vocabulary is None
    assert checkpoint.tokenizer is not None
    tokenizer = source / "Qwen3-0.6B" / "tokenizer.json"
    assert checkpoint.tokenizer.read_bytes() == tokenizer.read_bytes()
    llm_config = json.loads((source / "Qwen3-0.6B" / "config.json").read_bytes())
    assert checkpoint.config["llm_config"] == llm_config
    assert checkpoint.config["audio_encoder_conf"]["tp_blocks"] == 3
    assert {"Qwen3-0.6B/config.json", "Qwen3-0.6B/tokenizer.json"} <= checkpoint.source[
        "sha256"
    ].keys()

    converted = load_file(checkpoint.folder / "model.safetensors")
    with open_pt(source / "model.pt") as original:
        assert original.tensors.keys() - converted.keys() == {"llm.lm_head.weight"}
        for name in converted:
            np.testing.assert_array_equal(converted[name], original.read(name), strict=True)


def test_nano_keeps_types_and_bytes(nano: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    arrays = nano_arrays()
    del arrays["llm.lm_head.weight"]
    assert raw_bytes(checkpoint.folder) == {name: a.tobytes() for name, a in arrays.items()}
    assert checkpoint.specs["llm.model.norm.weight"].dtype == "BF16"
    assert checkpoint.ctc_vocabulary is not None
    vocabulary = nano / "multilingual.tiktoken"
    assert checkpoint.ctc_vocabulary.read_bytes() == vocabulary.read_bytes()
    assert checkpoint.config["ctc_decoder_conf"] == CONFIG["ctc_decoder_conf"]
    assert checkpoint.config["tokenizer_conf"] == {"init_param_path": "Qwen3-0.6B"}
    assert "optim_conf" not in checkpoint.config


CTC_NAMES = [name for name in nano_arrays() if name.startswith("ctc")]


@pytest.mark.parametrize("missing", CTC_NAMES)
def test_a_ctc_head_that_is_not_whole_is_left_out(nano: Path, tmp_path: Path, missing: str) -> None:
    arrays = nano_arrays()
    del arrays[missing]
    write_pt(nano / "model.pt", arrays)
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    assert not [name for name in checkpoint.specs if name.startswith("ctc")]
    assert checkpoint.specs.keys() == nano_arrays().keys() - {"llm.lm_head.weight", *CTC_NAMES}
    assert "ctc_decoder" not in checkpoint.config
    assert checkpoint.ctc_vocabulary is None


@pytest.mark.parametrize(
    "conf",
    [
        {"ctc_decoder": None},
        {"ctc_decoder_conf": {"n_layer": 1}},
        {"ctc_decoder_conf": {"n_layer": 3}},
        {"ctc_decoder_conf": {"n_layer": "two"}},
        {"ctc_decoder_conf": None},
    ],
    ids=str,
)
def test_a_ctc_head_that_is_not_described_is_left_out(
    nano: Path, tmp_path: Path, conf: dict[str, object]
) -> None:
    (nano / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **conf}))
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    assert checkpoint.specs.keys().isdisjoint(CTC_NAMES)


def test_a_ctc_head_without_its_vocabulary(nano: Path, tmp_path: Path) -> None:
    """The metadata of copies without it may name it still."""
    metas(ctc_tokenizer_conf={"vocab_path": "multilingual.tiktoken"})(nano)
    (nano / "multilingual.tiktoken").unlink()
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    assert checkpoint.specs.keys() >= set(CTC_NAMES)
    assert checkpoint.ctc_vocabulary is None


@pytest.mark.parametrize("where", ["llm.lm_head.weight", "llm.model.embed_tokens.weight"])
def test_an_output_layer_of_its_own_is_refused(nano: Path, tmp_path: Path, where: str) -> None:
    arrays = nano_arrays()
    changed = arrays[where].copy()
    changed[-1, -1] ^= 1
    write_pt(nano / "model.pt", {**arrays, where: changed})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not equal to llm\.model\.embed"):
        convert(nano, tmp_path / "converted")


def test_a_model_without_an_output_layer_is_as_good(nano: Path, tmp_path: Path) -> None:
    with_head = open_checkpoint(convert(nano, tmp_path / "with"))
    arrays = nano_arrays()
    del arrays["llm.lm_head.weight"]
    write_pt(nano / "model.pt", arrays)
    without = open_checkpoint(convert(nano, tmp_path / "without"))
    assert without.weights_sha256 == with_head.weights_sha256


def test_the_output_layer_is_compared_one_tensor_at_a_time(nano: Path, tmp_path: Path) -> None:
    arrays = nano_arrays()
    arrays["llm.model.embed_tokens.weight"] = np.ones((1 << 10, 1 << 13), np.uint16)
    arrays["llm.lm_head.weight"] = arrays["llm.model.embed_tokens.weight"]
    largest = arrays["llm.lm_head.weight"].nbytes
    write_pt(nano / "model.pt", arrays)
    del arrays
    tracemalloc.start()
    convert(nano, tmp_path / "converted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.5 * largest


def test_a_tokenizer_from_its_parts(nano: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    assert {token: tokenizer.token_to_id(token) for token in ADDED.values()} == {
        token: number for number, token in ADDED.items()
    }
    ids = tokenizer.encode("<|im_start|>hi 好\n<think>").ids
    assert ids == [11, 2, 3, 9, 4, 13]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi 好\n<think>"


def test_a_tokenizer_from_its_parts_is_the_published_one(oracle: Path, tmp_path: Path) -> None:
    source = tmp_path / "nano"
    shutil.copytree(oracle / "checkpoints" / "nano-tiny", source, copy_function=shutil.copyfile)
    for folder in (source, source / "Qwen3-0.6B"):
        folder.chmod(0o755)
    published = json.loads((source / "Qwen3-0.6B" / "tokenizer.json").read_bytes())
    (source / "Qwen3-0.6B" / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))
    assert checkpoint.tokenizer is not None
    built = json.loads(checkpoint.tokenizer.read_bytes())
    assert built["added_tokens"] == published["added_tokens"]
    for key in ("vocab", "merges"):
        assert built["model"][key] == published["model"][key]
    one, other = (Tokenizer.from_str(json.dumps(content)) for content in (built, published))
    text = "<|im_start|>user\n语音转写：It's 12,5 — don't\u3000 stop!  \r\n\n ok<|im_end|>é"
    assert one.encode(text).ids == other.encode(text).ids


def test_files_of_nano_are_where_the_metadata_says(nano: Path, tmp_path: Path) -> None:
    (nano / "parts").mkdir()
    (nano / "Qwen3-0.6B").rename(nano / "parts" / "llm")
    (nano / "multilingual.tiktoken").rename(nano / "parts" / "v.tiktoken")
    metas(
        llm_conf={"init_param_path": "parts/llm"},
        tokenizer_conf={"init_param_path": "parts/llm/"},
        dataset_conf={"ctc_tokenizer_conf": {"vocab_path": "parts/v.tiktoken"}},
    )(nano)
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    assert checkpoint.tokenizer is not None
    assert checkpoint.ctc_vocabulary is not None
    assert {"parts/llm/config.json", "parts/llm/vocab.json", "parts/v.tiktoken"} <= (
        checkpoint.source["sha256"].keys()
    )


@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B/config.json", "Qwen3-0.6B/vocab.json", "multilingual.tiktoken"]
)
def test_a_changed_file_of_nano_converts_again(nano: Path, tmp_path: Path, name: str) -> None:
    first = ensure_converted(nano, tmp_path / "cache")
    assert ensure_converted(nano, tmp_path / "cache") == first
    stat = (nano / name).stat()
    os.utime(nano / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ensure_converted(nano, tmp_path / "cache") != first


@pytest.mark.parametrize("text", ["${a.b}", "${config}", "${x}", "${y}", "a ${llm} b"])
def test_a_reference_that_leads_nowhere_is_text(nano: Path, tmp_path: Path, text: str) -> None:
    config = {**CONFIG, "model_conf": {"v": text}, "config": {"a": 1}, "x": "${y}", "y": "${x}"}
    (nano / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = open_checkpoint(convert(nano, tmp_path / "converted"))
    assert checkpoint.config["model_conf"] == {"v": text}


def llm_config(**changes: object) -> Callable[[Path], object]:
    content = json.dumps({**LLM_CONFIG, **changes})
    return lambda nano: (nano / "Qwen3-0.6B" / "config.json").write_text(content)


def tokens_config(**entries: object) -> Callable[[Path], object]:
    content = json.dumps({"added_tokens_decoder": entries})
    return lambda nano: (nano / "Qwen3-0.6B" / "tokenizer_config.json").write_text(content)


NANO_REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no llm config": (remove("Qwen3-0.6B/config.json"), r"Qwen3-0\.6B has no config\.json"),
    "another llm": (llm_config(model_type="llama"), 'model_type "llama"'),
    "attention bias": (llm_config(attention_bias=True), "attention_bias true"),
    "rope scaling": (llm_config(rope_scaling={"factor": 2}), "rope_scaling {"),
    "untied": (llm_config(tie_word_embeddings=False), "tie_word_embeddings false"),
    "perhaps untied": (llm_config(tie_word_embeddings=None), "tie_word_embeddings null"),
    "sliding window": (llm_config(use_sliding_window=True), "use_sliding_window true"),
    "another activation": (llm_config(hidden_act="gelu"), 'hidden_act "gelu"'),
    "llm config no JSON": (overwrite("Qwen3-0.6B/config.json", "{"), "not JSON"),
    "llm config a list": (overwrite("Qwen3-0.6B/config.json", "[]"), "holds no dictionary"),
    "llm config no number": (llm_config(x=float("inf")), "not a usable number"),
    "llm config too long": (llm_config(x=[0] * 20_000), "more than 10000 values"),
    "no merges": (remove("Qwen3-0.6B/merges.txt"), "no tokenizer.json, and not all of"),
    "tokenizer no JSON": (overwrite("Qwen3-0.6B/tokenizer.json", "x"), "tokenizer.json is not"),
    "tokenizer a list": (overwrite("Qwen3-0.6B/tokenizer.json", "[]"), "not describe a tokenizer"),
    "merges of others": (overwrite("Qwen3-0.6B/merges.txt", "q z\n"), "does not fit vocab.json"),
    "broken merges": (overwrite("Qwen3-0.6B/merges.txt", "h\n"), "does not fit vocab.json"),
    "vocabulary a list": (overwrite("Qwen3-0.6B/vocab.json", "[1]"), "does not fit vocab.json"),
    "a gap in the ids": (tokens_config(**{"12": {"content": "<x>"}}), "'<x>' has the id 12, .* 10"),
    "an id twice": (tokens_config(**{"3": {"content": "hi"}}), "'hi' has the id 3, .* have 2"),
    "no added tokens": (overwrite("Qwen3-0.6B/tokenizer_config.json", "{}"), "no added_tokens"),
    "an odd added token": (tokens_config(**{"10": {"content": 3}}), "added token 10 is malformed"),
    "llm outside": (metas(llm_conf={"init_param_path": "../q"}), "not inside the folder"),
    "llm absolute": (metas(llm_conf={"init_param_path": "/q"}), "not inside the folder"),
    "llm not there": (metas(llm_conf={"init_param_path": "q"}), "q has no config.json"),
    "llm outside by config": (
        replace_in_config("init_param_path: Qwen3-0.6B", "init_param_path: ../Qwen3-0.6B"),
        "config.yaml: llm_conf.init_param_path names '../Qwen3-0.6B', which is not inside",
    ),
    "tokenizer outside": (metas(tokenizer_conf={"init_param_path": "a/../../b"}), "not inside"),
    "vocabulary outside": (metas(ctc_tokenizer_conf={"vocab_path": "/etc/passwd"}), "not inside"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), NANO_REFUSALS.values(), ids=NANO_REFUSALS.keys())
def test_refusals_of_nano(
    nano: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(nano)
    with pytest.raises(CheckpointError, match=message):
        convert(nano, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# --- refusals -------------------------------------------------------------------------------------


ALIASES = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.yaml"), "has no config.yaml"),
    "no weights": (remove("model.pt"), "has no model.pt"),
    "no cmvn": (remove("am.mvn"), "has no am.mvn"),
    "no tokens": (remove("tokens.json"), "has no tokens.json"),
    "unknown model": (replace_in_config("Paraformer", "Whisper"), "'Whisper' is of a kind"),
    "no model": (replace_in_config("model: Paraformer", "x: y"), "'None' is of a kind"),
    "no features": (replace_in_config("n_mels: 2", "x: 2"), "no n_mels and lfr_m"),
    "other features": (replace_in_config("n_mels: 2", "n_mels: 3"), "features of 9"),
    "code in YAML": (
        overwrite("config.yaml", "model: !!python/object/apply:os.system ['true']"),
        "could not determine a constructor",
    ),
    "broken YAML": (overwrite("config.yaml", "model: [\n"), "configuration that can be read"),
    "deep YAML": (overwrite("config.yaml", "[" * 5000), "configuration that can be read"),
    "aliases of aliases": (overwrite("config.yaml", ALIASES), "more than 10000 values"),
    "endless alias": (overwrite("config.yaml", "a: &a [*a]"), "configuration that can be read"),
    "a date in YAML": (overwrite("config.yaml", "a: 2024-01-01"), "a date has no place"),
    "an impossible date": (overwrite("config.yaml", "a: 2024-13-45"), "configuration that can"),
    "no number": (overwrite("config.yaml", "a: .nan"), "not a usable number"),
    "a list": (overwrite("config.yaml", "- a"), "holds no dictionary"),
    "no text": (overwrite("config.yaml", b"\xff\xfe"), "not UTF-8"),
    "metadata no JSON": (overwrite("configuration.json", "{"), "configuration.json is not JSON"),
    "metadata a list": (overwrite("configuration.json", "[]"), "not a dictionary"),
    "climbing out": (metas(init_param="../model.pt"), "not inside the folder"),
    "climbing out deep": (metas(frontend_conf={"cmvn_file": "a/../../x"}), "not inside"),
    "absolute": (metas(config="/etc/passwd"), "not inside the folder"),
    "a drive": (metas(config="C:\\config.yaml"), "not inside the folder"),
    "empty name": (metas(config=""), "not inside the folder"),
    "no name": (metas(init_param=["model.pt"]), "not inside the folder"),
    "named and not there": (metas(tokenizer_conf={"token_list": "t.json"}), "has no t.json"),
    "tokens no list": (overwrite("tokens.json", '{"a": 1}'), "not a list of strings"),
    "cmvn cut": (overwrite("am.mvn", "<Nnet>\n<Splice> 6 6\n[ 0 ]\n"), "am.mvn|shift|CMVN"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(
    source: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(source)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_an_unknown_architecture_lists_the_known_ones(source: Path, tmp_path: Path) -> None:
    replace_in_config("Paraformer", "Whisper")(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "converted")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in ARCHITECTURES)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, np.nan], np.float32),
        np.array([1, -np.inf], np.float16),
        np.array([0x3F80, 0x7F80], np.uint16),
        np.array([0x3F80, 0xFFC0], np.uint16),
    ],
)
def test_values_that_are_no_numbers(source: Path, tmp_path: Path, values: np.ndarray) -> None:
    write_pt(source / "model.pt", {"good": np.ones(3, np.float32), "bad.weight": values})
    with pytest.raises(CheckpointError, match=r"bad\.weight holds NaN or infinite"):
        convert(source, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [source]


def test_another_folder_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds something else"):
        convert(source, tmp_path / "converted")
    assert (tmp_path / "converted" / "thesis.txt").read_text() == "years of work"


# --- once -----------------------------------------------------------------------------------------


def test_the_same_files_are_converted_once(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "converted")
    before = (target / "model.safetensors").stat()
    assert convert(source, target) == target
    assert (target / "model.safetensors").stat().st_ino == before.st_ino
    (source / "tokens.json").write_text('["other"]')
    with pytest.raises(CheckpointError, match="holds something else"):
        convert(source, target)


def test_the_cache_is_used(source: Path, tmp_path: Path) -> None:
    first = ensure_converted(source, tmp_path / "cache")
    inode = (first / "model.safetensors").stat().st_ino
    assert first.is_relative_to(tmp_path / "cache")
    assert ensure_converted(source, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_ino == inode


@pytest.mark.parametrize("name", ["model.pt", "config.yaml", "tokens.json", "am.mvn"])
def test_a_changed_source_is_converted_again(source: Path, tmp_path: Path, name: str) -> None:
    first = ensure_converted(source, tmp_path / "cache")
    stat = (source / name).stat()
    os.utime(source / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ensure_converted(source, tmp_path / "cache") != first


def test_a_converted_folder_is_returned_as_it_is(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "converted")
    assert ensure_converted(folder, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_entry_is_made_again(source: Path, tmp_path: Path) -> None:
    folder = ensure_converted(source, tmp_path / "cache")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    remains = folder.parent / f".{folder.name}.partial-killed"
    remains.mkdir()
    assert ensure_converted(source, tmp_path / "cache") == folder
    assert weights.read_bytes() == whole
    assert not remains.exists()


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        ensure_converted(source, tmp_path / "cache")


RACER = """
import sys, time
from pathlib import Path

written = []

def watch(event, arguments):
    if event == "open" and "x" in str(arguments[1]) and arguments[0].endswith(".safetensors"):
        written.append(arguments[0])

sys.addaudithook(watch)
from funasr_batch.weights.convert import ensure_converted

source, cache, go = map(Path, sys.argv[1:])
while not go.exists():
    time.sleep(0.001)
print(ensure_converted(source, cache), len(written))
"""


def test_processes_that_convert_at_once_do_it_once(source: Path, tmp_path: Path) -> None:
    arrays = {f"x{i}": np.ones((64, 64), np.float32) for i in range(20)}
    write_pt(source / "model.pt", arrays)
    go = tmp_path / "go"
    command = [sys.executable, "-c", RACER, str(source), str(tmp_path / "cache"), str(go)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    time.sleep(0.3)
    go.touch()
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(written for _, written in answers) == ["0", "0", "1"]
    (folder,) = {folder for folder, _ in answers}
    assert open_checkpoint(Path(folder)).specs.keys() == arrays.keys()
    entries = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert sorted(entries) == sorted([Path(folder).name, f".{Path(folder).name}.lock"])


def test_the_digest_of_the_weights_does_not_depend_on_place_or_time(
    source: Path, tmp_path: Path
) -> None:
    one = open_checkpoint(convert(source, tmp_path / "one"))
    two = open_checkpoint(ensure_converted(source, tmp_path / "cache"))
    assert one.weights_sha256 == two.weights_sha256
    data = (one.folder / "model.safetensors").read_bytes()
    assert one.weights_sha256 == hashlib.sha256(data).hexdigest()


def test_cmvn_goes_through_unchanged(source: Path, tmp_path: Path) -> None:
    shift, scale = np.float32([[1.5, -2, 3, 4, 5, 6.25], [0.5, 1, 2, 4, 8, 16]])
    (source / "am.mvn").write_text(cmvn_text(shift, scale))
    cmvn = open_checkpoint(convert(source, tmp_path / "converted")).cmvn
    assert cmvn is not None
    np.testing.assert_array_equal(cmvn[0], shift, strict=True)
    np.testing.assert_array_equal(cmvn[1], scale, strict=True)
