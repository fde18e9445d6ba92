"""Settings, their digests, the layers they come from, and what a wrong configuration is told."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch import writers
from funasr_batch.config import ROOT_FILE, Layers, load_layers
from funasr_batch.errors import ConfigError, UsageError
from funasr_batch.globs import Glob
from funasr_batch.settings import (
    ALL_GROUPS,
    FORMATS,
    KEYS,
    MODELS,
    PER_RECORDING,
    RECOGNITION,
    RENDERING,
    Settings,
    recognition_digest,
    rendering_digest,
)
from funasr_batch.value_kinds import Switch
from funasr_batch.weights import hub

NO_USER: dict[str, str] = {}
OTHER_VALUES: dict[str, Any] = {
    "recursive": False,
    "include": ("*.wav",),
    "exclude": ("drafts",),
    "order": "newest",
    "max_files": 3,
    "model": "sample-paraformer",
    "language": "en",
    "dtype": "bfloat16",
    "quantize": "encoder=8,llm=4",
    "hotwords": ("通义", "FunASR"),
    "spoken_form": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "no_repeat_ngram": 5,
    "timing_model": "sample-paraformer",
    "channel": 2,
    "track": "eng",
    "vad": "none",
    "vad_model": "fsmn-vad",
    "vad_schedule": "dynamic",
    "vad_threshold": 0.25,
    "vad_min_silence_ms": 300,
    "max_segment": 20.0,
    "merge_segment": 0.0,
    "window_overlap": 1.5,
    "stream_encoder": True,
    "format": ("vtt",),
    "output_dir": Path("/transcripts"),
    "subtitle_style": "bbc",
    "max_line_width": 20,
    "max_line_count": 1,
    "max_cps": 9.0,
    "min_duration": 0.5,
    "max_duration": 6.0,
    "min_gap": 0.1,
    "bom": True,
    "overwrite": True,
    "fail_fast": True,
    "offline": True,
    "batch_seconds": 60.0,
    "workers": 2,
    "draft": "lookup",
    "cache_dir": Path("/cache"),
    "events": Path("/log/events.jsonl"),
    "progress": False,
    "quiet": True,
}


def layers_of(folder: Path, text: str | bytes, **flags: Any) -> Layers:
    file = folder / "config.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_layers(file, flags, environ=NO_USER)


def refusal_of(folder: Path, text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _ = layers_of(folder, text).settings
    assert str(folder / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# --- Settings


def test_every_setting_has_a_checked_default_and_a_group() -> None:
    settings = Settings()
    for item in dataclasses.fields(Settings):
        assert getattr(settings, item.name) == item.default, item.name
        assert KEYS[item.name].group in ALL_GROUPS
        assert (item.default is None) == (KEYS[item.name].unset is not None), item.name
    assert set(OTHER_VALUES) == set(KEYS)


def test_the_names_are_those_that_other_modules_know() -> None:
    assert set(FORMATS) == set(writers.FORMATS)
    assert set(MODELS) <= {*hub.HUB_MODELS, *hub.SAMPLE_MODELS}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_segment", math.nan),
        ("max_segment", math.inf),
        ("max_segment", -1),
        ("max_segment", True),
        ("max_segment", "30"),
        ("channel", True),
        ("channel", 0),
        ("channel", 1.0),
        ("workers", -2),
        ("batch_seconds", -5.0),
        ("recursive", 1),
        ("recursive", "yes"),
        ("recursive", None),
        ("language", "klingon"),
        ("vad", None),
        ("format", ()),
        ("format", "srt,doc"),
        ("format", ["srt", 3]),
        ("include", [1]),
        ("include", "/"),
        ("track", 0),
        ("track", "english language"),
        ("model", ""),
        ("model", "a\nb"),
        ("model", "hf:no-slash"),
        ("events", ""),
        ("output_dir", 5),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be "):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_values_get_their_final_form() -> None:
    settings = Settings(
        format="TXT, srt",  # type: ignore[arg-type]
        language="Chinese",
        max_segment=20,
        output_dir="source",  # type: ignore[arg-type]
        events="-",  # type: ignore[arg-type]
        model="./models/../mine",
        channel="auto",  # type: ignore[arg-type]
    )
    assert settings.format == ("srt", "txt")
    assert settings.language == "zh"
    assert isinstance(settings.max_segment, float)
    assert settings.output_dir is None
    assert settings.events == Path("-")
    assert settings.model == os.path.realpath("mine")
    assert settings.channel is None
    assert Settings(format="all").format == FORMATS  # type: ignore[arg-type]


def test_settings_survive_being_checked_twice() -> None:
    settings = Settings(**OTHER_VALUES)
    assert dataclasses.replace(settings) == settings


# --- Digests


def test_a_digest_changes_with_the_settings_of_its_stage_and_with_no_others() -> None:
    plain = Settings()
    for name, value in OTHER_VALUES.items():
        changed = dataclasses.replace(plain, **{name: value})
        group = KEYS[name].group
        recognises_differently = recognition_digest(changed) != recognition_digest(plain)
        renders_differently = rendering_digest(changed) != rendering_digest(plain)
        assert recognises_differently == (group in RECOGNITION), name
        assert renders_differently == (group in RENDERING), name


def test_a_digest_does_not_know_of_unset_keys() -> None:
    expected = (
        '{"dtype": "auto", "language": "auto", "max_segment": 30.0, "merge_segment": 12.0, '
        '"model": "paraformer", "vad": "auto", "vad_schedule": "explicit", "window_overlap": 2.0}'
    )
    assert recognition_digest(Settings()) == hashlib.sha256(expected.encode()).hexdigest()


# --- Layers


def test_the_later_layer_wins(tmp_path: Path) -> None:
    user = tmp_path / "xdg" / "funasr-batch" / "config.yaml"
    user.parent.mkdir(parents=True)
    user.write_text("language: en\nmax_segment: 10\nvad: none\nbom: true\n")
    config = tmp_path / "night.yaml"
    config.write_text("max-segment: 20\nvad: fsmn\nbom: false\n")
    root = tmp_path / "recordings"
    root.mkdir()
    (root / ROOT_FILE).write_text("vad: silero\nmodel: sample-paraformer\nbom: true\n")
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}

    layers = load_layers(config, {"bom": False}, environ=environ)
    at_root = layers.at_root(root)

    assert layers.settings.vad == "fsmn"
    assert at_root.settings == Settings(
        language="en", max_segment=20.0, vad="silero", model="sample-paraformer", bom=False
    )
    origins = {name: placed.origin for name, placed in at_root.values.items()}
    assert origins["language"] == f"{user} line 1"
    assert origins["max_segment"] == f"{config} line 1"
    assert origins["vad"] == f"{root / ROOT_FILE} line 1"
    assert origins["model"] == f"{root / ROOT_FILE} line 2"
    assert origins["bom"] == "--bom"
    assert origins["dtype"] == "built-in"


@pytest.mark.parametrize("environ", [{}, {"XDG_CONFIG_HOME": "relative"}, {"XDG_CONFIG_HOME": ""}])
def test_the_users_file_is_sought_in_the_home_only_when_there_is_one(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    file = tmp_path / ".config" / "funasr-batch" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("quiet: true")
    assert load_layers(environ=environ).settings == Settings()
    assert load_layers(environ=environ | {"HOME": str(tmp_path)}).settings.quiet


def test_each_root_has_its_own_file(tmp_path: Path) -> None:
    for name, language in (("a", "zh"), ("b", "en")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ROOT_FILE).write_text(f"language: {language}")
    (tmp_path / "c").mkdir()
    layers = load_layers(environ=NO_USER)
    found = [layers.at_root(tmp_path / name).settings.language for name in ("a", "b", "c")]
    assert found == ["zh", "en", "auto"]


def test_rules_are_chosen_by_path_and_the_later_wins(tmp_path: Path) -> None:
    layers = layers_of(
        tmp_path,
        """
model: paraformer
rules:
  - match: interviews/**
    model: sample-paraformer
    language: zh
  - match: ["*.en.wav", "english/*"]
    language: en
    format: srt
""",
        dtype="float32",
    )
    plain = layers.for_source(PurePath("talk.wav"))
    interview = layers.for_source(PurePath("interviews/2024/x.wav"))
    both = layers.for_source(PurePath("interviews/2024/x.en.wav"))
    assert (plain.model, plain.language) == ("paraformer", "auto")
    assert (interview.model, interview.language) == ("sample-paraformer", "zh")
    assert (both.model, both.language, both.format) == ("sample-paraformer", "en", ("srt",))
    assert layers.for_source(PurePath("English/x.wav")) == plain
    assert layers.for_source(PurePath("english/x.wav")).language == "en"
    assert {s.dtype for s in (plain, interview, both)} == {"float32"}
    assert layers.for_source(PurePath("interviews/y.wav")) is interview


def test_what_a_later_layer_says_wins_over_the_rules_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / ROOT_FILE).write_text("vad: fsmn\nrules: [{match: '*', language: zh}]")
    text = "vad: silero\nrules: [{match: '*', language: en, vad: none, max_segment: 5}]"
    layers = layers_of(tmp_path, text, max_segment=9.0).at_root(tmp_path)
    settings = layers.for_source(PurePath("x.wav"))
    assert (settings.language, settings.vad, settings.max_segment) == ("zh", "fsmn", 9.0)


def test_a_config_given_by_name_is_not_read_again_as_that_of_the_root(tmp_path: Path) -> None:
    file = tmp_path / ROOT_FILE
    file.write_text("output_dir: out\n")
    layers = load_layers(file, environ=NO_USER)
    assert layers.at_root(tmp_path) is layers
    with pytest.raises(ConfigError, match=r"output_dir may not be set by funasr-batch\.yaml"):
        load_layers(environ=NO_USER).at_root(tmp_path)


@pytest.mark.parametrize("name", [name for name in KEYS if KEYS[name].group not in PER_RECORDING])
def test_neither_a_root_file_nor_a_rule_may_set_what_concerns_the_run(
    tmp_path: Path, name: str
) -> None:
    value = OTHER_VALUES[name]
    text = json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
    (tmp_path / ROOT_FILE).write_text(f"language: zh\n{name}: {text}\n")
    with pytest.raises(ConfigError, match=f"line 2: {name} may not be set"):
        load_layers(environ=NO_USER).at_root(tmp_path)
    error = refusal_of(tmp_path, f"rules:\n- match: x\n  {name}: {text}\n")
    assert f"line 3: {name} may not be set by a rule" in str(error)
    assert getattr(layers_of(tmp_path, f"{name}: {text}").settings, name) == value


def test_paths_start_at_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SECRET", "x")
    text = "output_dir: ../out\nmodel: models/mine\nevents: ~/log\ncache_dir: $SECRET/{0}%s\n"
    settings = layers_of(tmp_path, text).settings
    assert settings.output_dir == tmp_path.parent / "out"
    assert settings.model == str(tmp_path / "models/mine")
    assert settings.events == Path("/home/me/log")
    assert settings.cache_dir == tmp_path / "$SECRET/{0}%s"
    monkeypatch.chdir(tmp_path)
    assert load_layers(Path("config.yaml"), environ=NO_USER).settings == settings


def test_values_that_contradict_each_other_name_both_places(tmp_path: Path) -> None:
    layers = layers_of(tmp_path, "min_duration: 5", max_duration=2.0)
    with pytest.raises(ConfigError, match=r"min_duration 5 \(.* line 1\).*2 \(--max-duration\)"):
        _ = layers.settings


# --- --print-config


def test_the_description_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    awkward = {
        "include": ("- a: b", "*.wav", "yes", "[x]", "1", "数"),
        "events": Path("/tmp/a\udcff\n#b"),
        "max_cps": 9.5,
    }
    text = "rules:\n- match: ['a/**', 'no']\n  vad: none\n- match: b\n  vad: fsmn\n"
    layers = layers_of(tmp_path, text, **(OTHER_VALUES | awkward | {"vad": None}))
    del layers.flags.values["vad"]  # type: ignore[attr-defined]
    described = layers.describe()
    again = layers_of(tmp_path, described)
    for path in ("x.wav", "a/x.wav", "b/x.wav", "no"):
        relative = PurePath(path)
        assert again.for_source(relative) == layers.for_source(relative), path
    assert again.settings.vad == "auto"
    assert again.for_source(PurePath("a/x.wav")).vad == "none"


def test_the_description_shows_where_each_value_comes_from(tmp_path: Path) -> None:
    text = "# mine\nlanguage: zh\nrules:\n- match: a/**\n  language: en\n  vad: none\n"
    described = layers_of(tmp_path, text, vad="silero", output_dir=None).describe()
    origin = {
        line.split("#")[0].rstrip(): line.split("# ")[1] for line in described.splitlines()[:-3]
    }
    file = tmp_path / "config.yaml"
    assert origin["language: zh"] == f"{file} line 2"
    assert origin["vad: silero"] == "--vad"
    assert origin["output_dir: source"] == "--output-dir"
    assert origin["model: paraformer"] == "built-in"
    rules = [line.split("  #") for line in described.splitlines()[-3:]]
    assert [left.rstrip() for left, *_ in rules] == [
        "rules:",
        '- match: ["a/**"]',
        "  language: en",
    ]
    assert rules[1][1] == f" {file} line 4"
    assert rules[2][1] == f" {file} line 5"


# --- Wrong files


@pytest.mark.parametrize(
    ("text", "line", "says", "hint"),
    [
        ("language: zh\nmodle: x", 2, "unknown key 'modle'", "did you mean model?"),
        ("12: x", 1, "unknown key 12", None),
        ("<<: {vad: none}", 1, "unknown key '<<'", None),
        (
            "vad: fsnm",
            1,
            "vad must be auto, fsmn, silero or none, not 'fsnm'",
            "did you mean fsmn?",
        ),
        ("vad: off", 1, "vad must be auto, fsmn, silero or none, not False", None),
        ("\n\nmax_segment: .nan", 3, "max_segment must be a number from 1 to 60, not nan", None),
        ("max_segment: true", 1, "not True", None),
        ("max_segment: '30'", 1, "not '30'", None),
        ("batch_seconds: -1", 1, "batch_seconds must be a number from 1 to 100000, or auto", None),
        ("workers: 1.5", 1, "workers must be a whole number from 1 to 256, or auto", None),
        ("workers: " + "9" * 5000, 1, "workers must be a whole number", None),
        ("workers: 2001-13-77", 1, "workers must be a whole number", None),
        ("model: {a: b}", 1, "model must be paraformer", None),
        ("model: [a]", 1, "model must be paraformer", None),
        ("model:", 1, "model must be paraformer", None),
        (
            "format: srt;txt",
            1,
            "format must be all, or some of srt,json,txt,vtt,tsv,ass,lrc,html",
            None,
        ),
        ("vad: none\nvad: none", 2, "'vad' is set twice", None),
        ("max_segment: 3\nmax-segment: 3", 2, "'max_segment' is set twice", None),
        ("- language: zh", 1, "a configuration must be lines such as", None),
        ("language", 1, "a configuration must be lines such as", None),
        ("language: zh\n\tvad: x", 2, "found character '\\t' that cannot start any token", None),
        ("a: [1, 2\nb: 3", 2, "expected ',' or ']'", None),
        ("a: 1\n---\nb: 2", 2, "but found another document", None),
        ("a: \x07", 1, "not YAML text", None),
        ("model: &a paraformer", 1, "anchors, aliases and tags are not supported", None),
        ("vad: *a", 1, "anchors, aliases and tags are not supported", None),
        ("model: !!python/object/apply:os.system [ls]", 1, "anchors, aliases and tags", None),
        ("a: " + "[" * 100_000, 1, "nested too deeply", None),
        ("model: " + "x" * 20_000, 1, "too long for a value", None),
        ("rules: none", 1, "rules must be a list", None),
        ("rules: [x]", 1, "a rule must be lines such as", None),
        ("rules:\n- vad: none", 2, "a rule needs a match", None),
        ("rules:\n- {match: [], vad: none}", 2, "match must be a path pattern", None),
        ("rules:\n- match: 3", 2, "match must be a path pattern", None),
        ("rules:\n- match: x\n  vda: none", 3, "unknown key 'vda'", "did you mean vad?"),
        ("rules:\n- match: x\n  rules: []", 3, "unknown key 'rules'", None),
    ],
)
def test_a_wrong_file_is_told_line_key_and_what_is_allowed(
    tmp_path: Path, text: str, line: int, says: str, hint: str | None
) -> None:
    error = refusal_of(tmp_path, text)
    assert f" line {line}: " in str(error)
    assert says in str(error)
    if hint:
        assert error.hint == hint


def test_a_billion_laughs_do_not_grow(tmp_path: Path) -> None:
    bomb = "a: &a [x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)
    )
    assert "line 1: anchors" in str(refusal_of(tmp_path, bomb))


def test_a_file_must_be_utf8_small_and_readable(tmp_path: Path) -> None:
    assert "line 2: not UTF-8 text" in str(refusal_of(tmp_path, b"vad: none\n# caf\xe9"))
    assert "larger than a configuration may be" in str(refusal_of(tmp_path, b"#" * 1_000_001))
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml: No such file"):
        load_layers(tmp_path / "nothing.yaml", environ=NO_USER)
    with pytest.raises(ConfigError, match="is a folder"):
        load_layers(tmp_path, environ=NO_USER)


@pytest.mark.parametrize("text", ["", "# nothing\n", "rules:\n", "rules: []\n", "{}", "---\n...\n"])
def test_a_file_may_be_empty(tmp_path: Path, text: str) -> None:
    assert layers_of(tmp_path, text).settings == Settings()


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    assert layers_of(tmp_path, b"\xef\xbb\xbfvad: none\r\nbom: true\r\n").settings == Settings(
        vad="none", bom=True
    )


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        settings = layers_of(tmp_path_factory.getbasetemp(), data).settings
    except ConfigError as error:
        message = str(error)
    else:
        assert settings == Settings()
        return
    assert message.isprintable()


@given(
    name=st.sampled_from(sorted(KEYS)),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.text(max_size=4), max_size=2),
)
def test_any_value_is_accepted_for_good_or_refused(name: str, value: object) -> None:
    try:
        settings = Settings(**{name: value})  # type: ignore[arg-type]
    except UsageError as error:
        message = str(error)
    else:
        assert dataclasses.replace(settings) == settings
        assert isinstance(KEYS[name].kind, Switch) <= isinstance(value, bool)
        return
    assert message.startswith(f"{name} must be ")
    assert message.isprintable()


# --- Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.wav", "x.wav", True),
        ("*.wav", "a/b/x.wav", True),
        ("*.wav", "x.WAV", False),
        ("*.wav", "x.wave", False),
        ("/*.wav", "x.wav", True),
        ("/*.wav", "a/x.wav", False),
        ("a/*.wav", "a/x.wav", True),
        ("a/*.wav", "a/b/x.wav", False),
        ("a/*.wav", "z/a/x.wav", False),
        ("**/a/*.wav", "z/a/x.wav", True),
        ("**/a/*.wav", "a/x.wav", True),
        ("a/**", "a/b/c.wav", True),
        ("a/**", "a", False),
        ("a/**", "ab/c.wav", False),
        ("a/**/c.wav", "a/c.wav", True),
        ("a/**/c.wav", "a/b/b/c.wav", True),
        ("a/**/c.wav", "a/b/xc.wav", False),
        ("**/b/**/c", "a/b/b/x/c", True),
        ("**", "x", True),
        ("drafts", "a/drafts/x.wav", True),
        ("drafts", "a/mydrafts/x.wav", False),
        ("drafts/", "drafts/x.wav", True),
        ("./a/x", "a/x", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[!a-c]x", "dx", True),
        ("[]]x", "]x", True),
        ("[z-a]", "z", False),
        ("[^a]", "^", True),
        ("[", "[", True),
        ("a[/]b", "a/b", False),
        ("a.b", "axb", False),
        ("a\nb*", "a\nb\nc", True),
        ("*\udcff", "x\udcff", True),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool) -> None:
    assert Glob(pattern).matches(path) is matches


NAMES = st.text("ab*?", min_size=1, max_size=4).filter(lambda name: "**" not in name)


@given(
    pattern=st.lists(NAMES | st.just("**"), min_size=2, max_size=6),
    path=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=7),
)
def test_a_pattern_matches_as_by_trying_everything(pattern: list[str], path: list[str]) -> None:
    expected = any(by_trying(pattern, path[: end + 1]) for end in range(len(path)))
    assert Glob("/".join(pattern)).matches("/".join(path)) == expected


def by_trying(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern == ["**"]:
        return bool(path)
    if pattern[0] == "**":
        return any(by_trying(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and name_by_trying(pattern[0], path[0]) and by_trying(pattern[1:], path[1:])


def name_by_trying(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(name_by_trying(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and name_by_trying(pattern[1:], name[1:])


def test_a_hostile_pattern_does_not_explode() -> None:
    """Backtracking would take longer than the universe has lasted."""
    program = (
        "from funasr_batch.globs import Glob\n"
        "assert not Glob('**/a/' * 30 + 'b').matches('a/' * 1500 + 'c')\n"
        "assert not Glob('x/' + '*a' * 60 + 'b').matches('x/' + 'a' * 250)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
