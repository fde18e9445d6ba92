"""Path patterns, as `--include`, `--exclude` and the rules of a configuration use them.

`*` and `?` stay inside one name, `[abc]` is one of these characters, `**` stands for any number of
folders. A pattern matches a recording when it matches its path below the input folder, or the path
of a folder that it lies in; a pattern without a slash may match at any depth. So `*.wav`, `drafts`
and `interviews/**/*.m4a` mean what users of gitignore files expect. Case counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

_ANY_FOLDERS = "**"
_PIECE = re.compile(r"\*+|\?|\[!?.[^]]*\]|.", re.DOTALL)
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class Glob:
    """One pattern, ready to be matched."""

    pattern: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_regex", re.compile(_translate(self.pattern), re.DOTALL))

    def matches(self, path: str) -> bool:
        """Whether `path`, relative and with `/` between its names, is meant by the pattern."""
        return self._regex.fullmatch(path) is not None


def compile_globs(patterns: Iterable[str]) -> tuple[Glob, ...]:
    return tuple(Glob(pattern) for pattern in patterns)


def matches_any(globs: Iterable[Glob], path: str) -> bool:
    return any(glob.matches(path) for glob in globs)


def has_magic(pattern: str) -> bool:
    return _MAGIC.search(pattern) is not None


def name_regex(pattern: str) -> re.Pattern[str]:
    """The regular expression for one name: a pattern without slashes."""
    return re.compile(_translate_name(pattern), re.DOTALL)


def _translate(pattern: str) -> str:
    """A regular expression that takes linear or quadratic time whatever the pattern.

    Between two `**` stands a run of names. Where a run first fits is as good as anywhere later, so
    every run is an atomic group and is never tried a second time.
    """
    anchored = "/" in pattern.rstrip("/")
    names = [name for name in pattern.split("/") if name not in ("", ".")]
    if not anchored:
        names.insert(0, _ANY_FOLDERS)
    regex, floating, tail = "", False, "(?:/.*)?"
    for is_any, group in groupby(names, key=_ANY_FOLDERS.__eq__):
        if is_any:
            floating, tail = True, "/.+" if regex else ".+"
            continue
        run = "/".join(_translate_name(name) for name in group) + "(?=/|\\Z)"
        lead = "/" if regex else ""
        regex += f"(?>{lead}(?:[^/]+/)*?{run})" if floating else lead + run
        floating, tail = False, "(?:/.*)?"
    return regex + tail


def _translate_name(name: str) -> str:
    parts = list(_fixed_parts(name))
    first, *rest = parts
    if not rest:
        return first
    *middle, last = rest
    return first + "".join(f"(?>[^/]*?{part})" for part in middle) + f"[^/]*{last}"


def _fixed_parts(name: str) -> Iterator[str]:
    """Regular expressions for what stands before, between and after the stars of `name`."""
    fixed = ""
    for piece in _PIECE.findall(name):
        if piece.startswith("*"):
            yield fixed
            fixed = ""
        elif piece == "?":
            fixed += "[^/]"
        elif len(piece) > 2:
            fixed += _translate_set(piece[1:-1])
        else:
            fixed += re.escape(piece)
    yield fixed


def _translate_set(members: str) -> str:
    negated = len(members) > 1 and members.startswith("!")
    members = members[1:] if negated else members
    escaped = re.sub(r"[\\\[\]^&|~]|-(?=-)", r"\\\g<0>", members)
    try:
        re.compile(f"[{escaped}]")
    except re.error:  # a range that runs backwards, such as [z-a], holds nothing
        return "[^/]" if negated else "(?!)"
    return f"(?!/)[{'^' if negated else ''}{escaped}]"
