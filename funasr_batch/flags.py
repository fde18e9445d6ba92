"""The command line of the main job: `funasr-batch PATH... [options]`.

The settings and their help come from `settings.py`; here are only the flags that are no settings,
and the way in which flags are spelled. `--output_format` is understood as `--output-format`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from funasr_batch import __version__
from funasr_batch.errors import UsageError
from funasr_batch.settings import DEFAULTS, KEYS, Group, Key, flag_of, nearest, quoted
from funasr_batch.value_kinds import Globs, Switch, Value

_TITLES: Final[Mapping[Group, str]] = {
    "inputs": "inputs",
    "recognition": "recognition",
    "segmentation": "cutting into segments",
    "format": "outputs",
    "output": "outputs",
    "subtitles": "subtitles (the style sets what is not given)",
    "run": "the run",
}

_SEE_HELP: Final = "funasr-batch --help shows all options"

_EPILOG: Final = """\
examples:
  funasr-batch ./recordings                           SRT, JSON and text beside each recording
  funasr-batch ./recordings -o transcripts -f srt     subtitles only, in a tree of their own
  funasr-batch talk.mp4 --subtitle-style netflix-zh   one video, laid out as Netflix asks
  find . -name '*.m4a' -print0 | funasr-batch --from-file -
  funasr-batch ./recordings --config nightly.yaml --print-config

settings may stand in files too, as lines such as `max-segment: 20`:
  $XDG_CONFIG_HOME/funasr-batch/config.yaml
  the file given with --config
  funasr-batch.yaml in an input folder

other commands:
  funasr-batch lint FILE...      which norms of subtitling SRT and VTT files do not keep
  funasr-batch models convert    a converted, perhaps quantised model in a folder
  funasr-batch doctor            what this machine has and lacks

exit codes:
  0  all done, or nothing to do             5  the disk cannot keep the results
  1  finished, but some recordings failed   70 internal error
  2  wrong command line or configuration    75 another run holds the output folder
  3  no recording was found                 130, 143  stopped by INT or TERM
  4  a model or a dependency is missing
"""


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said."""

    paths: tuple[str, ...]
    values: Mapping[str, Value]
    """The settings that were given, by name, checked."""
    from_file: str | None = None
    """A file that lists inputs; `-` is standard input."""
    config: Path | None = None
    print_config: bool = False
    verbose: bool = False


def parse_flags(argv: Sequence[str]) -> Flags:
    """Reads the arguments after the command's name.

    Raises UsageError. `--help` and `--version` print and raise SystemExit(0).
    """
    options, paths = _split(argv)
    namespace, unknown = build_parser().parse_known_intermixed_args(options)
    if unknown:
        hint = nearest(unknown[0].partition("=")[0], map(flag_of, KEYS)) or _SEE_HELP
        raise UsageError(f"unknown option {quoted(unknown[0])}", hint=hint)
    given = vars(namespace)
    flags = Flags(
        paths=(*given["paths"], *paths),
        values={name: _as_value(given[name]) for name in KEYS if name in given},
        from_file=given["from_file"],
        config=given["config"],
        print_config=given["print_config"],
        verbose=given["verbose"],
    )
    if not (flags.paths or flags.from_file or flags.print_config):
        raise UsageError("no input: name a file or a folder", hint=_SEE_HELP)
    return flags


def build_parser() -> argparse.ArgumentParser:
    """The parser of the main job. A setting that is not given is absent from its result."""
    parser = _Parser(
        prog="funasr-batch",
        usage="funasr-batch PATH... [options]",
        description="Transcribe whole folders of recordings. What is done is not done again.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(_TITLES.values())}
    _add_inputs(groups["inputs"])
    for name, key in KEYS.items():
        _add_setting(groups[_TITLES[key.group]], name, key)
    _add_constants(parser)
    _add_general(parser.add_argument_group("general"))
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("paths", nargs="*", metavar="PATH", help="a recording, a folder or a glob")
    group.add_argument(
        "--from-file",
        metavar="LIST",
        help="read paths from this file, one a line or ended by NUL (- is stdin)",
    )


def _add_general(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", type=Path, metavar="FILE", help="read settings from this file")
    group.add_argument(
        "--print-config",
        action="store_true",
        help="show the settings and where each comes from, and end",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="show the version",
    )
    group.add_argument("-h", "--help", action="help", help="show this text")


def _add_setting(group: argparse._ArgumentGroup, name: str, key: Key) -> None:
    flag = flag_of(name)
    hidden: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    shown = hidden | {"help": _help(name, key)}
    if isinstance(key.kind, Switch):
        off = f"--no-{flag[2:]}"
        default_is_on = DEFAULTS[name]
        on_help, off_help = (hidden, shown) if default_is_on else (shown, hidden)
        group.add_argument(*key.short, flag, action="store_true", **on_help)
        group.add_argument(off, action="store_false", **off_help)
        for other in key.also:
            group.add_argument(other, action="store_true", **hidden)
        return
    takes: dict[str, Any] = {"metavar": key.metavar, "type": _reader(key)}
    if isinstance(key.kind, Globs):
        takes["action"] = "extend"
    group.add_argument(*key.short, flag, **takes, **shown)
    for other in key.also:
        group.add_argument(other, **takes, **hidden)


def _add_constants(parser: argparse.ArgumentParser) -> None:
    constants: dict[str, tuple[str, Value]] = {
        "--no-vad": ("vad", "none"),
        "--skip-existing": ("overwrite", False),
    }
    for flag, (name, value) in constants.items():
        parser.add_argument(
            flag,
            dest=name,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _reader(key: Key) -> Callable[[str], Value]:
    def read(text: str) -> Value:
        try:
            return key.parse(text)
        except ValueError:
            message = f"must be {key.allowed}, not {quoted(text)}"
            hint = nearest(text, key.kind.names)
            raise argparse.ArgumentTypeError(f"{message}; {hint}" if hint else message) from None

    return read


def _as_value(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


def _help(name: str, key: Key) -> str:
    default = DEFAULTS[name]
    if isinstance(default, bool):
        return f"do not {key.help}" if default else key.help
    names = ", ".join(key.kind.names)
    text = f"{key.help}: {names}" if names else key.help
    match default:
        case None | ():
            return text
        case tuple():
            return f"{text} (default: {','.join(default)})"
        case float():
            return f"{text} (default: {default:g})"
    return f"{text} (default: {default})"


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, with `--output_format=x` as `--output-format=x`, and after it."""
    end = argv.index("--") if "--" in argv else len(argv)
    options = []
    for argument in argv[:end]:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = flag.replace("_", "-") + equals + value
        options.append(argument)
    return options, list(argv[end + 1 :])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-m, --model NAME`, where argparse would say `-m NAME, --model NAME`."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, action.dest.upper())
        return f"{', '.join(action.option_strings)} {metavar}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=_SEE_HELP)
