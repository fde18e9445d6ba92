"""From FunASR's layout to a converted folder: same tensors, once, or a refusal that helps."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch_files import cmvn_text, write_funasr_folder, write_pt

from funasr_batch.errors import CheckpointError, StorageError
from funasr_batch.weights.checkpoint import open_checkpoint
from funasr_batch.weights.convert import ARCHITECTURES, convert, ensure_converted
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


# --- refusals -------------------------------------------------------------------------------------


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
