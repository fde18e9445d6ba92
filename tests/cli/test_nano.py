"""Fun-ASR-Nano through the command: subtitles, rules that mix models, quantisation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pysubs2
import pytest
import yaml
from command import Command, record
from tiny_nano import write_tiny_nano

from funasr_batch.errors import UsageError
from funasr_batch.loading import _refuse_language
from funasr_batch.settings import Settings
from funasr_batch.text.prompt import NANO_LANGUAGES


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_nano(tmp_path_factory.mktemp("nano") / "tiny")


def transcript(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def test_subtitles_with_times_of_the_ctc_head(
    command: Command, recordings: Path, nano: Path
) -> None:
    record(recordings / "a.wav", 3.0)
    ended = command(recordings, "--model", nano, "--format", "srt,json")
    assert ended.code == 0, ended.err
    told = transcript(recordings / "a.json")
    assert told["text"]
    assert told["model"]["name"] == str(nano)
    assert {"encode", "prefill/generate"} <= set(told["stats"]["stages"])
    for segment in told["segments"]:
        assert segment["timing"] == "ctc"
        times = [time for token in segment["tokens"] for time in (token["start"], token["end"])]
        assert times == sorted(times)
        assert segment["start"] <= times[0]
        assert times[-1] <= segment["end"]
    assert len(pysubs2.load(str(recordings / "a.srt"))) > 0


def test_without_any_source_of_times_there_are_none(
    command: Command, recordings: Path, tmp_path: Path
) -> None:
    record(recordings / "a.wav", 3.0)
    silent = write_tiny_nano(tmp_path / "no-ctc", ctc=False)
    ended = command(recordings, "--model", silent, "--timing-model", "none", "-f", "json")
    assert ended.code == 0, ended.err
    assert "times are those of segments" in ended.err
    for segment in transcript(recordings / "a.json")["segments"]:
        assert segment["timing"] == "vad"
        assert segment["tokens"]
        assert {token["start"] for token in segment["tokens"]} == {None}
        assert all(0 <= token["confidence"] <= 1 for token in segment["tokens"])


def test_rules_mix_models_and_each_is_loaded_once(
    command: Command, recordings: Path, nano: Path, tmp_path: Path
) -> None:
    """Nano with two lists of hotwords and a Paraformer, in an order that alternates."""
    for name in ("a/x.wav", "b/x.wav", "c/x.wav"):
        record(recordings / name, 2.0)
    rules = [
        {"match": "a/**", "model": str(nano), "hotwords": "达摩院, Kubernetes"},
        {"match": "c/**", "model": str(nano), "hotwords": ["<|im_end|>"]},
    ]
    (recordings / "funasr-batch.yaml").write_text(
        yaml.safe_dump({"rules": rules, "format": "json"})
    )
    log = tmp_path / "loads"
    sabotage = f"""
import funasr_batch.cpu; funasr_batch.cpu.prepare_cpu()
import funasr_batch.decoding.nano_loading as n, funasr_batch.decoding.paraformer as p
def counted(module, name):
    load = getattr(module, name)
    def wrapper(*arguments, **more):
        open({str(log)!r}, "a").write(name + "\\n")
        return load(*arguments, **more)
    setattr(module, name, wrapper)
counted(n, "load_network"); counted(p, "load_paraformer")
"""
    ended = command(recordings, sabotage=sabotage)
    assert ended.code == 0, ended.err
    assert sorted(log.read_text().split()) == ["load_network", "load_paraformer"]
    models = {name: transcript(recordings / name / "x.json")["model"]["name"] for name in "abc"}
    assert models == {"a": str(nano), "b": str(command.model), "c": str(nano)}


def test_a_quantised_copy(command: Command, recordings: Path, nano: Path, tmp_path: Path) -> None:
    record(recordings / "a.wav", 2.0)
    copy = tmp_path / "copy"
    made = command("models", "convert", nano, "--quantize", "int8", "-o", copy)
    assert made.code == 0, made.err
    ended = command(recordings, "--model", copy, "-f", "json")
    assert ended.code == 0, ended.err
    assert "quantised weights are slower" in ended.err
    kept = transcript(recordings / "a.json")
    assert kept["model"]["quantization"] == "encoder=8"
    ended = command(recordings, "--model", nano, "--quantize", "encoder=8", "-f", "json", "-y")
    assert ended.code == 0, ended.err
    assert transcript(recordings / "a.json")["text"] == kept["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "Nano writes garbage"),
        (("--quantize", "llm=3"), "encoder=8,llm=4"),
        (("--language", "klingon"), "language"),
        (("--draft", "paraformr"), "there is no model and no folder named 'paraformr'"),
    ],
)
def test_what_is_refused_says_why(
    command: Command, recordings: Path, nano: Path, options: tuple[str, ...], message: str
) -> None:
    record(recordings / "a.wav")
    ended = command(recordings, "--model", nano, *options)
    assert ended.code in (2, 4)
    assert message in ended.err


def test_a_paraformer_is_not_quantised(command: Command, recordings: Path) -> None:
    record(recordings / "a.wav")
    ended = command(recordings, "--quantize", "int8")
    assert (ended.code, "only Nano can be quantised" in ended.err) == (2, True)


def test_a_language_that_the_chosen_model_does_not_know() -> None:
    settings = Settings(model="nano", language="ko")
    with pytest.raises(UsageError, match="nano recognises zh, en, ja, not ko") as refused:
        _refuse_language(settings, NANO_LANGUAGES, "Choose --model nano-mlt (31 languages).")
    assert "nano-mlt" in (refused.value.hint or "")
    _refuse_language(Settings(model="nano", language="ja"), NANO_LANGUAGES, "")
