"""`funasr-batch lint FILE...`: which norms SRT and VTT files do not keep, ours or others'."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from funasr_batch.errors import NoInputError, UsageError
from funasr_batch.lint import MEANINGS, RULES, check, count_by_rule
from funasr_batch.lint_reader import Rule, SubtitleFormat, Violation, read_subtitles
from funasr_batch.rendering import cue_style
from funasr_batch.run.progress import displayable
from funasr_batch.settings import Settings
from funasr_batch.text.cues import STYLES

_SEE_HELP: Final = "see funasr-batch lint --help"
_FORMATS: Final[dict[str, SubtitleFormat]] = {".srt": "srt", ".vtt": "vtt"}
_LIMITS: Final = (
    ("max_line_width", int, "characters of a line"),
    ("max_line_count", int, "lines of a cue"),
    ("max_cps", float, "most characters a second"),
    ("min_duration", float, "shortest cue, in seconds"),
    ("max_duration", float, "longest cue, in seconds"),
    ("min_gap", float, "pause between two cues, in seconds; two frames at 25 a second are 0.08"),
)


@dataclass(frozen=True, slots=True)
class Linted:
    """What was found in one file."""

    path: str
    cues: int
    violations: list[Violation]

    @property
    def counts(self) -> dict[Rule, int]:
        return count_by_rule(self.violations)


def run_lint(arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """Does what the words after `lint` ask for, and returns the exit code: 1 when a file could not
    be read, or with `--strict` when there are violations; otherwise 0.

    Raises:
        UsageError: the words are wrong.
        NoInputError: there is no subtitle file.
    """
    options = _parser().parse_args(arguments)
    settings = _settings(options)
    linted: list[Linted] = []
    failed: list[tuple[str, str]] = []
    for path in _files(options.paths):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            failed.append((path, error.strerror or str(error)))
            continue
        file = read_subtitles(content, _FORMATS[os.path.splitext(path)[1].lower()])
        violations = check(file, lambda text: cue_style(settings, text))
        linted.append(Linted(path, len(file.cues), violations))
    if options.json:
        say(_document(linted, failed))
    else:
        for line in _report(linted, failed, verbose=options.verbose):
            say(displayable(line))
    violated = any(file.violations for file in linted)
    return 1 if failed or (options.strict and violated) else 0


# --- Which files


def _files(paths: Sequence[str]) -> list[str]:
    """The named files, and the subtitles in folders; each once."""
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            found.update(dict.fromkeys(_inside(path)))
        elif os.path.splitext(path)[1].lower() in _FORMATS:
            found[path] = None
        else:
            raise UsageError(f"{path}: not a folder, nor a .srt or .vtt file", hint=_SEE_HELP)
    if not found:
        raise NoInputError(f"no .srt or .vtt file in {', '.join(paths)}")
    return list(found)


def _inside(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in _FORMATS and not name.startswith("."):
                path = os.path.join(place, name)
                if os.path.isfile(path):
                    yield path


# --- What is said


def _report(
    linted: Sequence[Linted], failed: Sequence[tuple[str, str]], *, verbose: bool
) -> Iterator[str]:
    if verbose:
        for file in linted:
            for violation in file.violations:
                cue = "" if violation.cue is None else f"cue {violation.cue}: "
                place = f"{file.path}:{violation.line}"
                yield f"{place}: {violation.rule}: {cue}{violation.message}"
        if any(file.violations for file in linted):
            yield ""
    if linted:
        yield from _table(linted)
    for path, reason in failed:
        yield f"cannot be read: {path}: {reason}"
    if not verbose and any(file.violations for file in linted):
        yield "-v lists each violation"


def _table(linted: Sequence[Linted]) -> Iterator[str]:
    counts = _total(linted)
    cues = sum(file.cues for file in linted)
    rules = list(counts)
    rows = [["file", "cues", *rules, "all"]]
    for file in linted:
        found = file.counts
        rows.append([file.path, str(file.cues), *_cells(found, rules)])
    if len(linted) > 1:
        rows.append([f"{len(linted)} files", str(cues), *_cells(counts, rules)])
    if cues and counts:
        shares = [counts[rule] for rule in rules] + [sum(counts.values())]
        rows.append(["per 100 cues", "", *(f"{100 * share / cues:.1f}" for share in shares)])
    rows = [[displayable(row[0]), *row[1:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((first.ljust(widths[0]), *cells)).rstrip()


def _cells(counts: dict[Rule, int], rules: Sequence[Rule]) -> list[str]:
    return [*(str(counts.get(rule, 0)) for rule in rules), str(sum(counts.values()))]


def _total(linted: Sequence[Linted]) -> dict[Rule, int]:
    return count_by_rule([violation for file in linted for violation in file.violations])


def _document(linted: Sequence[Linted], failed: Sequence[tuple[str, str]]) -> str:
    files: list[dict[str, Any]] = [
        {
            "path": file.path,
            "cues": file.cues,
            "counts": file.counts,
            "violations": [asdict(violation) for violation in file.violations],
        }
        for file in linted
    ]
    document = {
        "files": files,
        "total": {
            "files": len(linted),
            "cues": sum(file.cues for file in linted),
            "counts": _total(linted),
        },
        "failed": [{"path": path, "error": reason} for path, reason in failed],
    }
    text = json.dumps(document, ensure_ascii=False, indent=1)
    return text.encode("utf-8", "replace").decode()  # names whose bytes are not text


# --- The words


def _settings(options: argparse.Namespace) -> Settings:
    limits = {name: getattr(options, name) for name, _, _ in _LIMITS}
    return Settings(subtitle_style=options.style, **limits)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="funasr-batch lint",
        description="Says which norms of subtitling SRT and VTT files do not keep.",
        epilog="rules:\n" + "\n".join(f"  {rule:<9} {MEANINGS[rule]}" for rule in RULES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", metavar="FILE", nargs="+", help="a .srt or .vtt file, or a folder")
    parser.add_argument(
        "--style",
        "--subtitle-style",
        choices=("auto", *STYLES),
        default="auto",
        help="whose norms (default: netflix-zh or netflix-en, by the script of each cue)",
    )
    for name, kind, help in _LIMITS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, metavar="N", type=kind, help=f"{help} (default: the style's)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there are violations")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="list each violation")
    return parser


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=_SEE_HELP)
