"""Hotwords for a Paraformer through the command: what they change, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import Command, record
from tiny_seaco import write_tiny_seaco


@pytest.fixture(scope="module")
def seaco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_seaco(tmp_path_factory.mktemp("seaco") / "tiny")


def segments(path: Path) -> list[dict[str, object]]:
    content: list[dict[str, object]] = json.loads(path.read_text("utf-8"))["segments"]
    return content


def test_rules_with_lists_of_their_own(
    command: Command, recordings: Path, seaco: Path, tmp_path: Path
) -> None:
    """One model, two lists and none, in an order that alternates: every network is read once."""
    for name in "abcd":
        record(recordings / name / "x.wav", 3.0)
    rules = [
        {"match": "a/**", "hotwords": "今天, World"},
        {"match": "c/**", "hotwords": ["语音", "识别 today"]},
        {"match": "d/**", "hotwords": "今天, World"},
    ]
    (recordings / "funasr-batch.yaml").write_text(
        yaml.safe_dump({"rules": rules, "format": "json", "model": str(seaco)})
    )
    log = tmp_path / "loads"
    sabotage = f"""
import funasr_batch.cpu; funasr_batch.cpu.prepare_cpu()
import funasr_batch.decoding.paraformer as p
def counted(name):
    load = getattr(p, name)
    def wrapper(*arguments):
        open({str(log)!r}, "a").write(name + "\\n")
        return load(*arguments)
    setattr(p, name, wrapper)
counted("load_paraformer"); counted("load_seaco")
"""
    ended = command(recordings, sabotage=sabotage)
    assert ended.code == 0, ended.err
    assert sorted(log.read_text().split()) == ["load_paraformer", "load_seaco"]
    assert "'World'" in ended.err  # no token, and no dictionary to spell it
    found = {name: segments(recordings / name / "x.json") for name in "abcd"}
    assert found["a"] == found["d"]
    texts = {name: [segment["text"] for segment in found[name]] for name in "abc"}
    assert len({str(text) for text in texts.values()}) == 3


def test_other_hotwords_do_the_recording_again(
    command: Command, recordings: Path, seaco: Path
) -> None:
    record(recordings / "a.wav", 3.0)
    options = ("--model", str(seaco), "-f", "json")
    assert command(recordings, *options).code == 0
    without = segments(recordings / "a.json")
    ended = command(recordings, *options, "--hotwords", "今天,语音")
    assert ended.code == 0, ended.err
    assert segments(recordings / "a.json") != without
    before = (recordings / "a.json").stat().st_mtime_ns
    assert command(recordings, *options, "--hotwords", "今天,语音").code == 0
    assert (recordings / "a.json").stat().st_mtime_ns == before


def test_a_model_without_a_hotword_decoder_says_so(command: Command, recordings: Path) -> None:
    record(recordings / "a.wav", 2.0)
    ended = command(recordings, "--hotwords", "今天")
    assert ended.code == 0, ended.err
    assert "hotwords are ignored" in ended.err
    assert "nano" in ended.err


def test_a_checkpoint_of_funasr(command: Command, recordings: Path, oracle: Path) -> None:
    """Through conversion, with its vocabulary of 8404 tokens."""
    record(recordings / "a.wav", 3.0)
    options = ("--model", str(oracle / "checkpoints/seaco-tiny"), "-f", "json")
    assert command(recordings, *options).code == 0
    without = segments(recordings / "a.json")
    ended = command(recordings, *options, "--hotwords", "魔搭,阿里,达摩院,Kubernetes")
    assert ended.code == 0, ended.err
    assert "'Kubernetes'" in ended.err
    assert "魔搭" not in ended.err
    biased = segments(recordings / "a.json")
    assert [s["text"] for s in biased] != [s["text"] for s in without]
    assert [(s["start"], s["end"]) for s in biased] == [(s["start"], s["end"]) for s in without]
