"""`funasr-batch doctor` says what this machine offers and what is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from command import PROJECT, Command

from funasr_batch import __version__


def test_what_this_machine_offers(command: Command) -> None:
    ended = command("doctor")
    assert (ended.code, ended.err) == (0, "")
    lines = dict(re.split(r"\s{2,}|(?<=product) ", line, maxsplit=1) for line in named(ended.out))
    assert lines["funasr-batch"].startswith(f"{__version__}, Python 3.")
    assert re.fullmatch(r"\S+, on the (cpu|gpu)", lines["MLX"])
    assert re.fullmatch(r"[\d,]+ GFLOP/s", lines["float32 product"])
    assert "wav flac ogg mp3" in lines["libsndfile"]
    assert "m4a aac opus webm mp4 mkv mov" in lines["PyAV"]
    assert lines["models"] == f"{command.home}/.cache/huggingface/hub  (not there yet)"
    assert lines["converted"] == f"{command.home}/.cache/funasr-batch  (not there yet)"
    assert lines["HF_HUB_OFFLINE"] == "1"


def named(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if not line.startswith("! ")]
    return [line for line in lines if line != "nothing is missing"]


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS is chosen on Linux only")
def test_a_reference_blas_comes_with_advice(command: Command) -> None:
    sabotage = "import funasr_batch.cpu as m; m._candidates = lambda: iter(())"
    ended = command("doctor", sabotage=sabotage)
    assert ended.code == 0
    assert re.search("^BLAS +reference$", ended.out, re.MULTILINE)
    assert "! MLX runs on the reference BLAS here, about 40 times slower" in ended.out
    assert "nothing is missing" not in ended.out


@pytest.mark.parametrize("package", ["mlx", "av", "soundfile"])
def test_a_package_that_is_missing(command: Command, tmp_path: Path, package: str) -> None:
    (tmp_path / "hidden" / package).mkdir(parents=True)
    (tmp_path / "hidden" / package / "__init__.py").write_text("raise ImportError('gone')\n")
    path = f"{tmp_path}/hidden:{PROJECT}"
    ended = command("doctor", env={"PYTHONPATH": path})
    assert ended.code == 0, ended.err
    assert re.search(r"cannot be (imported|loaded): gone", ended.out)
    assert re.search(rf"^! .*pip install .*{package}", ended.out, re.MULTILINE)
    assert "nothing is missing" not in ended.out
