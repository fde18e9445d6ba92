"""Every setting of the main job: its type, limits, default, help and spellings, said once.

The flags of the command line and the checks of configuration files are both derived from
`Settings`. Where values come from and which of them wins is in `config.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_args

from funasr_batch.errors import UsageError
from funasr_batch.text.prompt import LANGUAGE_NAMES as PROMPT_LANGUAGES
from funasr_batch.value_kinds import (
    Globs,
    Kind,
    Model,
    Number,
    OneOf,
    PathOf,
    Quantized,
    SomeOf,
    Switch,
    Track,
    Value,
    Whole,
    Words,
)

Group: TypeAlias = Literal[
    "inputs", "recognition", "segmentation", "format", "subtitles", "output", "run"
]
ALL_GROUPS: Final[frozenset[Group]] = frozenset(get_args(Group))
RECOGNITION: Final[frozenset[Group]] = frozenset({"recognition", "segmentation"})
RENDERING: Final[frozenset[Group]] = frozenset({"subtitles"})
PER_RECORDING: Final[frozenset[Group]] = RECOGNITION | RENDERING | {"format"}
"""The groups that a rule, and a configuration file found among the inputs, may set."""

Format: TypeAlias = Literal["srt", "json", "txt", "vtt", "tsv", "ass", "lrc", "html"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

MODELS: Final = ("paraformer", "nano", "nano-mlt", "sample-paraformer", "sample-nano")
LANGUAGE_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {name: code for code, name in PROMPT_LANGUAGES.items()}
    | {"chinese": "zh", "mandarin": "zh", "english": "en", "japanese": "ja", "cantonese": "yue"}
)


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one setting beside its default."""

    group: Group
    kind: Kind
    help: str
    metavar: str = ""
    short: tuple[str, ...] = ()
    """Other spellings of the flag that its help shows."""
    also: tuple[str, ...] = ()
    """Spellings that users bring from other tools; understood, not shown."""
    unset: str | None = None
    """The word for None, where None is a value."""

    @property
    def allowed(self) -> str:
        return self.kind.allowed + (f", or {self.unset}" if self.unset else "")

    def check(self, value: object, folder: Path) -> Value:
        """The value in its final type; relative paths start at `folder`. Raises ValueError."""
        if self.unset is not None and (value is None or value == self.unset):
            return None
        return self.kind.check(value, folder)

    def parse(self, text: str) -> Value:
        """The value that `text` of the command line stands for. Raises ValueError."""
        value: object = text
        match self.kind:
            case Number() if text != self.unset:
                value = float(text)
            case Whole() if text != self.unset:
                value = int(text)
            case Track() if text.isdecimal():
                value = int(text)
        return self.check(value, Path())


def _about(group: Group, kind: Kind, help: str, **more: Any) -> dict[str, Key]:
    return {"key": Key(group, kind, help, **more)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one recording, checked. Raises UsageError for a value that is not allowed."""

    recursive: bool = field(
        default=True, metadata=_about("inputs", Switch(), "look into the subfolders of a folder")
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "inputs", Globs(), "take only recordings that match", metavar="GLOB", also=("--match",)
        ),
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "inputs", Globs(), "leave out what matches", metavar="GLOB", also=("--ignore",)
        ),
    )
    order: Literal["name", "newest", "oldest", "shortest"] = field(
        default="name",
        metadata=_about(
            "inputs",
            OneOf(("name", "newest", "oldest", "shortest")),
            "what comes first; shortest goes by size",
            metavar="ORDER",
        ),
    )
    max_files: int | None = field(
        default=None,
        metadata=_about(
            "inputs",
            Whole(1, 10_000_000),
            "transcribe at most this many recordings",
            metavar="N",
            unset="all",
        ),
    )

    model: str = field(
        default="paraformer",
        metadata=_about(
            "recognition",
            Model(MODELS),
            "a model, hf:ORG/NAME or a folder",
            metavar="NAME",
            short=("-m",),
        ),
    )
    language: str = field(
        default="auto",
        metadata=_about(
            "recognition",
            OneOf(("auto", *PROMPT_LANGUAGES), LANGUAGE_NAMES),
            "the language spoken; Paraformer knows zh and en, Nano ja too, nano-mlt all of them",
            metavar="LANG",
            short=("-l",),
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata=_about(
            "recognition",
            OneOf(
                ("auto", "float32", "bfloat16"),
                because="in float16 Nano writes garbage and Paraformer's encoder overflows",
            ),
            "precision of the computation",
            metavar="TYPE",
        ),
    )
    quantize: str | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Quantized(),
            "bits of Nano's layers, as encoder=8,llm=4 or in short",
            metavar="SPEC",
            unset="none",
        ),
    )
    hotwords: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "recognition",
            Words(),
            "names and terms to expect, separated by commas (Nano, SeACo-Paraformer)",
            metavar="LIST",
            also=("--hotword",),
        ),
    )
    spoken_form: bool = field(
        default=False,
        metadata=_about(
            "recognition",
            Switch(),
            "have Nano write numbers and dates as they are spoken",
            also=("--no-itn",),
        ),
    )
    temperature: float | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Number(0, 2),
            "sample Nano's tokens instead of taking the most probable",
            metavar="T",
            unset="greedy",
        ),
    )
    top_p: float | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Number(0.01, 1),
            "sample only from the most probable tokens that reach P together",
            metavar="P",
            unset="all",
        ),
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Number(0.5, 2),
            "above 1 Nano repeats itself less; 1 is what it was trained for",
            metavar="P",
            unset="none",
        ),
    )
    no_repeat_ngram: int | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Whole(2, 100),
            "forbid Nano to write so many tokens twice in a segment",
            metavar="N",
            unset="none",
        ),
    )
    timing_model: str | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Model(("none", "paraformer", "sample-paraformer")),
            "a Paraformer that times Nano's words where it has no CTC head; auto takes one that "
            "is on this machine",
            metavar="NAME",
            unset="auto",
        ),
    )
    channel: int | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Whole(1, 64),
            "hear this channel, counted from 1, instead of a mix of all",
            metavar="N",
            unset="auto",
        ),
    )
    track: int | str | None = field(
        default=None,
        metadata=_about(
            "recognition",
            Track(),
            "audio track of a video, by number from 1 or by language",
            metavar="TRACK",
            unset="auto",
        ),
    )

    vad: Literal["auto", "fsmn", "silero", "none"] = field(
        default="auto",
        metadata=_about(
            "segmentation",
            OneOf(("auto", "fsmn", "silero", "none")),
            "voice activity detector; none cuts overlapping windows, as does --no-vad",
            metavar="NAME",
        ),
    )
    vad_model: str | None = field(
        default=None,
        metadata=_about(
            "segmentation",
            Model(("fsmn-vad",)),
            "weights of the FSMN detector, or their folder",
            metavar="NAME",
            unset="auto",
        ),
    )
    vad_schedule: Literal["explicit", "dynamic"] = field(
        default="explicit",
        metadata=_about(
            "segmentation",
            OneOf(("explicit", "dynamic")),
            "silence that ends a segment: always the same, or less the longer it is",
            metavar="NAME",
        ),
    )
    vad_threshold: float | None = field(
        default=None,
        metadata=_about(
            "segmentation",
            Number(0, 1),
            "score above which a frame is speech",
            metavar="P",
            unset="auto",
        ),
    )
    vad_min_silence_ms: int | None = field(
        default=None,
        metadata=_about(
            "segmentation",
            Whole(0, 60_000),
            "silence that ends a segment",
            metavar="MS",
            also=("--vad-min-silence-duration-ms",),
            unset="auto",
        ),
    )
    max_segment: float = field(
        default=30.0,
        metadata=_about(
            "segmentation",
            Number(1, 60),
            "longest segment, in seconds",
            metavar="S",
            also=("--vad-max-speech-duration-s",),
        ),
    )
    merge_segment: float = field(
        default=12.0,
        metadata=_about(
            "segmentation",
            Number(0, 60),
            "merge short neighbours up to this many seconds; 0 is never",
            metavar="S",
        ),
    )
    window_overlap: float = field(
        default=2.0,
        metadata=_about(
            "segmentation",
            Number(0, 10),
            "overlap of the windows without a VAD, in seconds",
            metavar="S",
        ),
    )

    stream_encoder: bool = field(
        default=False,
        metadata=_about(
            "segmentation",
            Switch(),
            "with Nano, for the first text soon: no VAD and no overlap, but pieces of up to 10 "
            "seconds that touch, each encoded with the audio around it; --events has each text "
            "as soon as it is there",
        ),
    )

    format: tuple[Format, ...] = field(
        default=("srt", "json", "txt"),
        metadata=_about(
            "format",
            SomeOf(FORMATS),
            "what to write, separated by commas, or all",
            metavar="LIST",
            short=("-f",),
            also=("--output-format",),
        ),
    )
    output_dir: Path | None = field(
        default=None,
        metadata=_about(
            "output",
            PathOf("folder"),
            "write into this folder, in a tree like that of the inputs (default: beside each "
            "recording, which the word source means too)",
            metavar="DIR",
            short=("-o",),
            unset="source",
        ),
    )

    subtitle_style: Literal["auto", "netflix-zh", "netflix-en", "bbc", "plain"] = field(
        default="auto",
        metadata=_about(
            "subtitles",
            OneOf(("auto", "netflix-zh", "netflix-en", "bbc", "plain")),
            "rules for the layout of cues",
            metavar="NAME",
        ),
    )
    max_line_width: int | None = field(
        default=None,
        metadata=_about(
            "subtitles", Whole(4, 1000), "characters of a line", metavar="N", unset="auto"
        ),
    )
    max_line_count: int | None = field(
        default=None,
        metadata=_about("subtitles", Whole(1, 10), "lines of a cue", metavar="N", unset="auto"),
    )
    max_cps: float | None = field(
        default=None,
        metadata=_about(
            "subtitles", Number(1, 1000), "most characters a second", metavar="N", unset="auto"
        ),
    )
    min_duration: float | None = field(
        default=None,
        metadata=_about(
            "subtitles", Number(0, 60), "shortest cue, in seconds", metavar="S", unset="auto"
        ),
    )
    max_duration: float | None = field(
        default=None,
        metadata=_about(
            "subtitles", Number(0.1, 600), "longest cue, in seconds", metavar="S", unset="auto"
        ),
    )
    min_gap: float | None = field(
        default=None,
        metadata=_about(
            "subtitles",
            Number(0, 10),
            "pause between two cues, in seconds",
            metavar="S",
            unset="auto",
        ),
    )
    bom: bool = field(
        default=False,
        metadata=_about("subtitles", Switch(), "begin text files with a byte order mark"),
    )

    overwrite: bool = field(
        default=False,
        metadata=_about("run", Switch(), "redo recordings that are already done", short=("-y",)),
    )
    fail_fast: bool = field(
        default=False, metadata=_about("run", Switch(), "stop at the first recording that fails")
    )
    offline: bool = field(
        default=False,
        metadata=_about("run", Switch(), "never use the network", also=("--local-files-only",)),
    )
    batch_seconds: float | None = field(
        default=None,
        metadata=_about(
            "run",
            Number(1, 100_000),
            "padded audio of one batch, in seconds",
            metavar="S",
            unset="auto",
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=_about(
            "run",
            Whole(1, 256),
            "recordings that are read at the same time",
            metavar="N",
            unset="auto",
        ),
    )
    draft: str | None = field(
        default=None,
        metadata=_about(
            "run",
            Model(("none", "ctc", "paraformer", "lookup")),
            "what guesses Nano's next tokens, so that it checks many at once; a folder is a "
            "smaller Nano",
            metavar="NAME",
            unset="auto",
        ),
    )
    cache_dir: Path | None = field(
        default=None,
        metadata=_about(
            "run",
            PathOf("folder"),
            "keep converted models here",
            metavar="DIR",
            unset="auto",
        ),
    )
    events: Path | None = field(
        default=None,
        metadata=_about(
            "run",
            PathOf("file"),
            "write the progress as JSON lines; - is stdout",
            metavar="FILE",
            unset="none",
        ),
    )
    progress: bool = field(
        default=True, metadata=_about("run", Switch(), "show a live display on a terminal")
    )
    quiet: bool = field(
        default=False, metadata=_about("run", Switch(), "print failures only", short=("-q",))
    )

    def __post_init__(self) -> None:
        for name, key in KEYS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, key.check(value, Path()))
            except ValueError:
                message, hint = refusal(name, value)
                raise UsageError(message, hint=hint) from None


KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {item.name: item.metadata["key"] for item in fields(Settings)}
)
DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {item.name: item.default for item in fields(Settings)}
)


def recognition_digest(settings: Settings) -> str:
    """SHA-256 of the settings that change what is recognised, and of nothing else."""
    return _digest(settings, RECOGNITION)


def rendering_digest(settings: Settings) -> str:
    """SHA-256 of the settings that change the bytes of an output but not what is recognised.

    `format` is not among them: it says which outputs there are, and changes none.
    """
    return _digest(settings, RENDERING)


def _digest(settings: Settings, groups: frozenset[Group]) -> str:
    # Unset keys are left out: an optional key that a later version adds must not redo an archive.
    values = {
        name: value
        for name, key in KEYS.items()
        if key.group in groups and not _is_unset(value := getattr(settings, name))
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_unset(value: object) -> bool:
    return value is None or value is False or value == ()


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def refusal(name: str, value: object) -> tuple[str, str | None]:
    """Message and hint for a value that the setting `name` may not have."""
    key = KEYS[name]
    return f"{name} must be {key.allowed}, not {quoted(value)}", nearest(value, key.kind.names)


def nearest(word: object, names: Iterable[str]) -> str | None:
    """A hint with the name that was probably meant."""
    from difflib import get_close_matches  # only needed when something is wrong

    if not isinstance(word, str):
        return None
    found = get_close_matches(word[:100].casefold(), list(names), n=1)
    return f"did you mean {found[0]}?" if found else None


def quoted(value: object) -> str:
    """A value as it can stand in a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
