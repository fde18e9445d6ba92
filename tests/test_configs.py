"""The examples in `configs/` are understood, use what they say they show, and are explained."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

import pytest

from funasr_batch.config import load_layers
from funasr_batch.settings import KEYS, Settings

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))


def test_the_examples_are_there() -> None:
    assert {"archive.yaml", "podcast.yaml", "mixed.yaml"} <= {file.name for file in EXAMPLES}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_loads_and_changes_something(file: Path) -> None:
    layers = load_layers(file, environ={})
    assert layers.settings != Settings()
    assert file.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_rule_of_an_example_has_an_effect(file: Path) -> None:
    layers = load_layers(file, environ={})
    for rule in layers.rules:
        path = PurePath(re.sub(r"\*\*?", "x", rule.match[0].pattern))
        assert rule.applies_to(path)
        settings = layers.for_source(path)
        assert settings != layers.settings, rule.origin
        for name, placed in rule.values.items():
            assert getattr(settings, name) == placed.value, rule.origin


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_command_in_an_example_names_it(file: Path) -> None:
    assert re.search(rf"^#   funasr-batch .*--config {file.name}", file.read_text("utf-8"), re.M)


def test_the_examples_say_what_they_promise() -> None:
    archive = load_layers(CONFIGS / "archive.yaml", environ={}).settings
    assert archive.output_dir == CONFIGS / "transcripts"
    assert (archive.quiet, archive.offline, archive.order) == (True, True, "newest")
    podcast = load_layers(CONFIGS / "podcast.yaml", environ={}).settings
    assert (podcast.subtitle_style, podcast.language) == ("netflix-zh", "zh")
    mixed = load_layers(CONFIGS / "mixed.yaml", environ={})
    assert mixed.for_source(PurePath("english/talks/a.mp3")).language == "en"
    assert mixed.for_source(PurePath("a.en.mp3")).language == "en"
    assert mixed.for_source(PurePath("calls/a.wav")).channel == 2
    assert mixed.for_source(PurePath("film/a.mkv")).vad == "none"
    trial = mixed.for_source(PurePath("lectures/trial/a.wav"))
    assert (trial.model, trial.max_segment) == ("sample-paraformer", 40.0)


def test_a_flag_overrides_an_example() -> None:
    layers = load_layers(CONFIGS / "mixed.yaml", {"language": "zh", "model": "x"}, environ={})
    trial = layers.for_source(PurePath("lectures/trial/a.en.wav"))
    assert (trial.language, trial.model) == ("zh", "x")
    assert set(layers.values) == set(KEYS)
