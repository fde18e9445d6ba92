"""The dictionary that spells hotwords goes from FunASR's folder into the converted one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from torch_files import write_funasr_folder

from funasr_batch.errors import CheckpointError
from funasr_batch.weights.checkpoint import open_checkpoint
from funasr_batch.weights.convert import convert, ensure_converted
from funasr_batch.weights.hub import WANTED_FILES

CONTENT = "hello hel@@ lo\n好 好\n"


def write_source(folder: Path, model: str = "SeacoParaformer") -> Path:
    write_funasr_folder(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": model}))
    (folder / "seg_dict").write_text(CONTENT, "utf-8")
    return folder


def test_it_is_kept_and_known_by_its_digest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(write_source(tmp_path / "source"), tmp_path / "converted"))
    assert checkpoint.seg_dict is not None
    assert checkpoint.seg_dict.read_text("utf-8") == CONTENT
    assert "seg_dict" in checkpoint.source["sha256"]


def test_models_without_it_or_without_hotwords_have_none(tmp_path: Path) -> None:
    plain = write_source(tmp_path / "plain", "Paraformer")
    assert open_checkpoint(convert(plain, tmp_path / "a")).seg_dict is None
    bare = write_source(tmp_path / "bare")
    (bare / "seg_dict").unlink()
    assert open_checkpoint(convert(bare, tmp_path / "b")).seg_dict is None


def test_another_dictionary_converts_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    first = ensure_converted(source, tmp_path / "cache")
    assert ensure_converted(source, tmp_path / "cache") == first
    stat = (source / "seg_dict").stat()
    os.utime(source / "seg_dict", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ensure_converted(source, tmp_path / "cache") != first


def test_one_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "seg_dict").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="seg_dict is not UTF-8"):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_it_is_fetched_from_the_hub() -> None:
    assert "seg_dict" in WANTED_FILES
