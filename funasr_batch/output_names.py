"""Names of outputs: short while they can be, never the same for two recordings.

`talk.mp3` becomes `talk` (and `talk.srt`, `talk.json`, …). Recordings of one folder that would
share a name, such as `talk.mp3` and `talk.wav`, keep their full names: `talk.mp3.srt`. Names are
compared as a file system does that ignores case and Unicode normalisation, so that a tree written
on Linux can be copied to a Mac; names that even then are equal (`A.wav`, `a.wav`) get a digest.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from funasr_batch.settings import FORMATS

_SUFFIXES: Final = """
    .3g2 .3ga .3gp .aac .ac3 .aif .aifc .aiff .amr .ape .asf .au .avi .awb .caf .dss .dts .eac3
    .f4v .flac .flv .gsm .m2ts .m4a .m4b .m4r .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpeg .mpg .mts
    .mxf .oga .ogg .ogv .opus .ra .rf64 .rm .snd .sph .spx .tak .ts .tta .voc .vob .w64 .wav
    .wave .weba .webm .wma .wmv .wv
"""
MEDIA_SUFFIXES: Final = frozenset(_SUFFIXES.split())
"""Suffixes of recordings, in lower case."""

OUTPUT_SUFFIXES: Final = frozenset(f".{name}" for name in FORMATS)

MAX_NAME_BYTES: Final = 255 - max(map(len, OUTPUT_SUFFIXES))


def output_paths(recordings: Sequence[tuple[str, str]]) -> list[str]:
    """The path of the outputs, without suffix, of each recording.

    A recording is given as the folder of its outputs and its own file name; no two are the same.
    The results are different files on every file system and do not depend on the order.
    """
    distinct = {folder for folder, _ in recordings}
    folders = {folder: _folded(os.path.realpath(folder)) for folder in distinct}
    forms = [0] * len(recordings)
    names = [_FORMS[0](*recording) for recording in recordings]
    while True:
        sharing: dict[tuple[str, str], list[int]] = {}
        for i, (folder, _) in enumerate(recordings):
            sharing.setdefault((folders[folder], _folded(names[i])), []).append(i)
        rising = [
            i for group in sharing.values() if len(group) > 1 for i in _shortest(group, forms)
        ]
        if not rising:
            placed = zip(recordings, names, strict=True)
            return [f"{folder.rstrip('/')}/{name}" for (folder, _), name in placed]
        for i in rising:
            forms[i] += 1
            names[i] = _FORMS[forms[i]](*recordings[i])


def _shortest(group: Sequence[int], forms: Sequence[int]) -> list[int]:
    """Those of a group that shares a name whose names can best be longer: a stem gives way to a
    full name."""
    least = min(forms[i] for i in group)
    return [i for i in group if forms[i] == least < len(_FORMS) - 1]


def _stem(folder: str, name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return _shortened(stem if suffix.lower() in MEDIA_SUFFIXES else name)


def _full_name(folder: str, name: str) -> str:
    return _shortened(name)


def _full_name_and_digest(folder: str, name: str) -> str:
    return _shortened(f"{name}~{_digest(os.path.join(folder, name))}")


_FORMS: Final[tuple[Callable[[str, str], str], ...]] = (_stem, _full_name, _full_name_and_digest)
"""What a name may be, the one that is wanted first; the next when it clashes."""


def _shortened(name: str) -> str:
    """A name to which every suffix can be appended: a digest replaces what is too long."""
    if len(os.fsencode(name)) <= MAX_NAME_BYTES:
        return name
    ending = f"~{_digest(name)}"
    while len(os.fsencode(name)) + len(ending) > MAX_NAME_BYTES:
        name = name[:-1]
    return name + ending


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())
