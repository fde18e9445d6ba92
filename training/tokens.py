"""The token list of the sample models: Chinese characters and pieces of English words.

The layout is that of Paraformer's `tokens.json`: `<blank>`, `<s>`, `</s>`, the characters, the
pieces, `<unk>` last. A piece that does not end its word carries the mark `@@`. The pieces come from
byte-pair encoding (Sennrich et al. 2016) of the domain's words.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

from training.corpus import Corpus

BLANK, SOS, EOS = 0, 1, 2
_CONTINUED = "@@"
_MERGES = 1500
_SENTENCES = 20_000


@dataclass(frozen=True)
class Tokens:
    entries: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        return cls(tuple(json.loads(path.read_text(encoding="utf-8"))))

    def write(self, path: Path) -> None:
        text = json.dumps(self.entries, ensure_ascii=False, indent=0)
        path.write_text(text + "\n", encoding="utf-8")

    @cached_property
    def ids(self) -> dict[str, int]:
        return {entry: index for index, entry in enumerate(self.entries)}

    def encode(self, text: str) -> list[tuple[int, ...]]:
        """The ids of every character or English word of `text`, one tuple for each.

        `text` is written as `Sentence.text` is; a word in capitals is spelled."""
        return [self.encode_unit(unit) for unit in _units(text)]

    def encode_unit(self, unit: str) -> tuple[int, ...]:
        """One Chinese character, or an English word as the longest pieces from its left."""
        if unit in self.ids:
            return (self.ids[unit],)
        if not unit.isascii():
            return (self.ids["<unk>"],)
        return tuple(self.ids[piece] for piece in _longest_pieces(unit, self.ids))

    def spread(self, unit: str, start: int, end: int) -> list[tuple[int, int, int]]:
        """(id, start, end) for the tokens of a unit, which share its time by their letters."""
        ids = self.encode_unit(unit)
        letters = [len(self.entries[token].removesuffix(_CONTINUED)) for token in ids]
        scale = (end - start) / sum(letters)
        times = [start + round(scale * before) for before in accumulate(letters, initial=0)]
        return list(zip(ids, times, times[1:], strict=False))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Characters and words; pieces are joined, special tokens are left out."""
        words: list[str] = []
        open_word = ""
        for token in ids:
            if token <= EOS:
                continue
            entry = self.entries[token]
            open_word += entry.removesuffix(_CONTINUED)
            if not entry.endswith(_CONTINUED):
                words.append(open_word)
                open_word = ""
        return [*words, open_word] if open_word else words


def _units(text: str) -> Iterator[str]:
    word = ""
    for character in (*text, " "):
        if character.isascii() and (character.isalpha() or character == "'"):
            word += character
            continue
        if word:
            yield from (word.lower() if word.isupper() else (word,))
            word = ""
        if not character.isspace():
            yield character


def _longest_pieces(word: str, known: Container[str]) -> Iterator[str]:
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = word[start:end] + ("" if end == len(word) else _CONTINUED)
            if piece in known:
                break
        else:
            piece, end = "<unk>", start + 1
        yield piece
        start = end


def learn_pieces(counts: dict[str, int], merges: int) -> tuple[str, ...]:
    """Byte-pair encoding of the words: join the most frequent pair of neighbours `merges` times.

    Returns the pieces that the words are still made of, and every letter in both forms."""
    words = {word: [letter + _CONTINUED for letter in word[:-1]] + [word[-1]] for word in counts}
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {word: _merged(pieces, best) for word, pieces in words.items()}
    letters = (*string.ascii_lowercase, "'")
    known = {piece for pieces in words.values() for piece in pieces}
    known.update(letters)
    known.update(letter + _CONTINUED for letter in letters)
    return tuple(sorted(known))


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] = merged[-1].removesuffix(_CONTINUED) + piece
        else:
            merged.append(piece)
    return merged


def learn(corpus: Corpus, merges: int = _MERGES, sentences: int = _SENTENCES) -> Tokens:
    """The token list of a corpus, by the words of some of its training sentences; every word of the
    domain counts at least once.

    With many merges frequent words are one token each, which suits a model that predicts all
    tokens at once; rare words stay in pieces."""
    rng = random.Random(0)
    counts = Counter(corpus.english_words)
    for index in range(sentences):
        sentence = corpus.sentence(rng, "mixed" if index % 8 == 0 else "en", "train")
        counts.update(unit.text for unit in sentence.units if unit.language == "en")
    pieces = learn_pieces(counts, merges)
    return Tokens(("<blank>", "<s>", "</s>", *corpus.characters, *pieces, "<unk>"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the token list of the domain.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--merges", type=int, default=_MERGES)
    arguments = parser.parse_args()
    tokens = learn(Corpus(), arguments.merges)
    tokens.write(arguments.out)
    print(f"{len(tokens.entries)} tokens")


if __name__ == "__main__":
    main()
