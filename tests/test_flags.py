"""The command line: spellings, errors, help."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from funasr_batch import __version__
from funasr_batch.config import load_layers
from funasr_batch.errors import UsageError
from funasr_batch.flags import Flags, build_parser, parse_flags
from funasr_batch.settings import DEFAULTS, KEYS, Settings
from funasr_batch.value_kinds import Switch


def settings_of(*arguments: str) -> dict[str, Any]:
    return dict(parse_flags(["x.wav", *arguments]).values)


def refusal_of(*arguments: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_flags(arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_not_given_is_absent() -> None:
    assert parse_flags(["x.wav"]) == Flags(paths=("x.wav",), values={})


def test_paths_and_flags_mix() -> None:
    flags = parse_flags(["a", "-m", "nano", "b", "-q", "c", "--", "-d.wav", "--quiet", "--"])
    assert flags.paths == ("a", "b", "c", "-d.wav", "--quiet", "--")
    assert flags.values == {"model": "nano", "quiet": True}


def test_names_of_any_bytes_are_kept() -> None:
    assert parse_flags(["\udcff\n.wav", "%s{0}"]).paths == ("\udcff\n.wav", "%s{0}")


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--model", "paraformer"], {"model": "paraformer"}),
        (["-m", "hf:a/b"], {"model": "hf:a/b"}),
        (["-l", "Chinese"], {"language": "zh"}),
        (["--language=auto"], {"language": "auto"}),
        (["-o", "/out"], {"output_dir": Path("/out")}),
        (["--output_dir", "source"], {"output_dir": None}),
        (["-f", "srt"], {"format": ("srt",)}),
        (["--format", "txt,srt,txt"], {"format": ("srt", "txt")}),
        (
            ["--output-format", "all"],
            {"format": ("srt", "json", "txt", "vtt", "tsv", "ass", "lrc", "html")},
        ),
        (["--output_format=tsv"], {"format": ("tsv",)}),
        (["-y"], {"overwrite": True}),
        (["--overwrite", "--skip-existing"], {"overwrite": False}),
        (["--no-overwrite"], {"overwrite": False}),
        (["--no-vad"], {"vad": "none"}),
        (["--no-vad", "--vad", "fsmn"], {"vad": "fsmn"}),
        (["--vad-min-silence-duration-ms", "300"], {"vad_min_silence_ms": 300}),
        (["--vad_max_speech_duration_s", "20"], {"max_segment": 20.0}),
        (["--include", "a", "--match", "b/*"], {"include": ("a", "b/*")}),
        (["--exclude", "a,b", "--ignore", "c_d"], {"exclude": ("a,b", "c_d")}),
        (["--no-recursive"], {"recursive": False}),
        (["--no-recursive", "--recursive"], {"recursive": True}),
        (["--no-progress"], {"progress": False}),
        (["--local-files-only"], {"offline": True}),
        (["--channel", "2", "--track", "2"], {"channel": 2, "track": 2}),
        (["--channel", "auto", "--track", "ENG"], {"channel": None, "track": "eng"}),
        (["--events", "-"], {"events": Path("-")}),
        (["--max-files", "all", "--workers", "auto"], {"max_files": None, "workers": None}),
        (["--max-cps", "1.5e1"], {"max_cps": 15.0}),
        (["--stream-encoder"], {"stream_encoder": True}),
        (["--stream_encoder", "--no-stream-encoder"], {"stream_encoder": False}),
    ],
)
def test_spellings(arguments: list[str], values: dict[str, Any]) -> None:
    assert settings_of(*arguments) == values


@pytest.mark.parametrize("arguments", [["--config", "c.yaml"], ["--from-file", "-"]])
def test_flags_that_are_no_settings(arguments: list[str]) -> None:
    flags = parse_flags([*arguments, "-v", "--print-config"])
    assert (flags.verbose, flags.print_config, flags.paths) == (True, True, ())
    assert (flags.config, flags.from_file) in ((Path("c.yaml"), None), (None, "-"))


def test_every_setting_has_a_flag_that_overrides_a_file(tmp_path: Path) -> None:
    words = {
        "vad_threshold": "0.5",
        "track": "en",
        "vad_model": "m",
        "quantize": "encoder=8,llm=4",
        "temperature": "0.5",
        "top_p": "0.9",
        "repetition_penalty": "1.1",
        "timing_model": "paraformer",
        "draft": "ctc",
    }
    for name, key in KEYS.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(key.kind, Switch):
            on, off = settings_of(flag), settings_of(flag.replace("--", "--no-", 1))
            assert (on, off) == ({name: True}, {name: False})
        elif key.unset:
            assert settings_of(flag, key.unset) == {name: None}
            assert settings_of(flag, words.get(name, "4"))[name] is not None
        elif DEFAULTS[name]:
            default = DEFAULTS[name]
            word = ",".join(default) if isinstance(default, tuple) else str(default)
            assert settings_of(flag, word) == {name: default}
    config = tmp_path / "c.yaml"
    config.write_text("output_dir: out\nquiet: true\n")
    flags = parse_flags(["x", "-o", "source", "--no-quiet"])
    assert load_layers(config, flags.values, environ={}).settings == Settings()


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        ([], "no input", "--help"),
        (["-q"], "no input", "--help"),
        (["x", "--formt", "srt"], "unknown option '--formt'", "did you mean --format?"),
        (["x", "--mod", "y"], "unknown option '--mod'", ""),
        (["x", "-Z"], "unknown option '-Z'", "--help"),
        (["x", "--model"], "-m/--model: expected one argument", "--help"),
        (["x", "--quiet=yes"], "ignored explicit argument", "--help"),
        (["x", "--vad", "fsnm"], "must be auto, fsmn, silero or none, not 'fsnm'; did you", ""),
        (
            ["x", "-f", "doc"],
            "must be all, or some of srt,json,txt,vtt,tsv,ass,lrc,html, not 'doc'",
            "",
        ),
        (["x", "--max-segment", "nan"], "must be a number from 1 to 60, not 'nan'", ""),
        (["x", "--max-segment", "ten"], "must be a number from 1 to 60, not 'ten'", ""),
        (["x", "--workers", "-1"], "a whole number from 1 to 256, or auto, not '-1'", ""),
        (["x", "--workers", "1.0"], "a whole number from 1 to 256, or auto, not '1.0'", ""),
        (["x", "--track", "0"], "must be a track's number from 1", ""),
        (["x", "--include", ""], "must be a path pattern", ""),
        (["x", "--model", "a\nb"], r"not 'a\nb'", ""),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], says: str, hint: str) -> None:
    error = refusal_of(*arguments)
    assert says in str(error)
    assert hint in (error.hint or "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(["-V"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"funasr-batch {__version__}\n"


def test_help_shows_every_setting_once_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse_flags(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options, _, rest = text.partition("examples:")
    for name, key in KEYS.items():
        flag = "--" + name.replace("_", "-")
        shown = flag.replace("--", "--no-", 1) if DEFAULTS[name] is True else flag
        pattern = rf"^  (-\w, )?{shown}( {re.escape(key.metavar)})?\s"
        assert len(re.findall(pattern, options, re.MULTILINE)) == 1, name
    assert "--local-files-only" not in text
    assert max(map(len, options.splitlines())) <= 80
    for code in ("0", "1", "2", "3", "4", "5", "70", "75", "130"):
        assert re.search(rf"\b{code}\b", rest), code


def test_examples_of_the_help_are_understood() -> None:
    epilog = build_parser().epilog or ""
    examples = re.findall(r"funasr-batch (\S.*?)(?:   .*)?$", epilog.partition("settings")[0], re.M)
    assert len(examples) == 5
    for example in examples:
        parse_flags(example.split())


def test_flags_and_parser_say_nothing_twice() -> None:
    actions = build_parser()._actions
    spellings = [spelling for action in actions for spelling in action.option_strings]
    assert len(spellings) == len(set(spellings))
    assert {action.dest for action in actions if action.default is argparse.SUPPRESS} >= set(KEYS)


def test_the_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from funasr_batch.flags import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = {'yaml', 'numpy', 'mlx', 'av', 'soxr', 'soundfile', 'rich', 'difflib'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
