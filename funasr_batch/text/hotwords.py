"""How the hotwords of a Paraformer are spelled: from words to the tokens of its vocabulary.

Source: FunASR funasr/models/seaco_paraformer/model.py, generate_hotwords_list. There, what the
vocabulary cannot spell becomes `<unk>`, which then stands for anything; here it is left out, and
Chinese is spelled by its characters also where the model comes without a dictionary.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from funasr_batch.errors import CheckpointError
from funasr_batch.text.prompt import MAX_HOTWORD_LENGTH

_PART = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff0-9]|[^\u3400-\u4dbf\u4e00-\u9fff0-9]+")
"""One Chinese character, one digit, or what stands between them."""


@dataclass(frozen=True, slots=True)
class SpelledHotwords:
    """Hotwords as a model reads them."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each, without repetitions."""
    left_out: tuple[str, ...]
    """Those that the vocabulary cannot spell or that are too long, as they were given."""


def spell_hotwords(
    hotwords: Iterable[str], tokens: Sequence[str], seg_dict: Path | None
) -> SpelledHotwords:
    """Looks each hotword up: its words as they stand in `seg_dict`, else part by part.

    A part is a Chinese character, a digit or a Latin word; all in lower case, as the vocabulary is.
    A hotword with a part that is not a token, or longer than `MAX_HOTWORD_LENGTH`, is left out.

    Raises:
        CheckpointError: `seg_dict` cannot be read.
    """
    given = list(hotwords)
    words = {hotword: unicodedata.normalize("NFKC", hotword).lower().split() for hotword in given}
    wanted = {part for parts in words.values() for word in parts for part in _parts(word)}
    wanted.update(word for parts in words.values() for word in parts)
    pieces = {} if seg_dict is None else _read_pieces(seg_dict, wanted)
    numbers = {token: id for id, token in enumerate(tokens) if not re.fullmatch(r"<.*>", token)}
    ids: dict[tuple[int, ...], None] = {}
    left_out: dict[str, None] = {}
    for hotword in given:
        if not words[hotword]:
            continue
        spelled = [piece for word in words[hotword] for piece in _spell(word, pieces)]
        if len(hotword) <= MAX_HOTWORD_LENGTH and all(piece in numbers for piece in spelled):
            ids[tuple(numbers[piece] for piece in spelled)] = None
        else:
            left_out[hotword] = None
    return SpelledHotwords(tuple(ids), tuple(left_out))


def _spell(word: str, pieces: Mapping[str, Sequence[str]]) -> list[str]:
    if word in pieces:
        return list(pieces[word])
    return [piece for part in _parts(word) for piece in pieces.get(part, (part,))]


def _parts(word: str) -> list[str]:
    return _PART.findall(word)


def _read_pieces(path: Path, wanted: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The entries of a seg_dict for some words: a line is a word and its pieces, by spaces."""
    pieces = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                word, *spelled = line.split() or [""]
                if spelled and word in wanted:
                    pieces[word] = tuple(spelled)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="Convert or download the model again."
        ) from error
    return pieces
