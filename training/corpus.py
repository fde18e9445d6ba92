"""Sentences of the sample models' domain, with what a synthesiser needs to speak them.

The domain is written down in `grammar/`: templates with slots, one file a language. A sentence
belongs to the test set when its template is marked so or when a hash of its text says so, which
keeps test sentences out of the training set without a list of them. Sentences of templates without
slots are for training: their words may occur nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

Language = Literal["zh", "en"]
Kind = Literal["zh", "en", "mixed"]
Split = Literal["train", "test"]

GRAMMAR = Path(__file__).with_name("grammar")

_TEST_SHARE = 26 / 256
"""Part of the sentences of ordinary templates that is kept for testing."""
_NUMBERS = 0.15
"""Part of the random words that are numbers."""
_HAN = re.compile(r"[\u4e00-\u9fff]+")
_RUN = re.compile(r"[\u4e00-\u9fff]+|[A-Za-z']+")
_SLOT = re.compile(r"\{([^}]*)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")

_ZH_DIGITS = "零一二三四五六七八九"
_EN_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_EN_TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_EN_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMERALS = dict(
    zip(
        "零一二三四五六七八九十百千万两",
        (
            *("ling2", "yi1", "er4", "san1", "si4", "wu3", "liu4", "qi1", "ba1", "jiu3"),
            *("shi2", "bai3", "qian1", "wan4", "liang3"),
        ),
        strict=True,
    )
)
_YEARS = range(1950, 2031)


@dataclass(frozen=True, slots=True)
class Unit:
    """What the recogniser writes between two cuts: a Chinese character or an English word."""

    text: str
    spoken: str
    """What espeak-ng reads: a pinyin syllable with its tone, or an English word."""
    language: Language


@dataclass(frozen=True, slots=True)
class Sentence:
    units: tuple[Unit, ...]

    @property
    def text(self) -> str:
        return join(unit.text for unit in self.units)

    @property
    def kind(self) -> Kind:
        languages = {unit.language for unit in self.units}
        return languages.pop() if len(languages) == 1 else "mixed"


def join(units: Iterator[str] | tuple[str, ...]) -> str:
    """Text as Paraformer's post-processing writes it: Chinese and what touches it without spaces,
    English words with one, and two or more single letters in a row as one word in capitals."""
    words: list[str] = []
    letters: list[str] = []
    for unit in (*units, ""):
        if len(unit) == 1 and unit.isascii() and unit.isalpha():
            letters.append(unit)
            continue
        if letters:
            words.append("".join(letters).upper() if len(letters) > 1 else letters[0])
            letters.clear()
        words.append(unit)
    text = words[0]
    for before, word in pairwise(words):
        spaced = word and word.isascii() and before.isascii()
        text += f" {word}" if spaced else word
    return text


def is_test(text: str) -> bool:
    """Whether a sentence of an ordinary template is kept for testing."""
    digest = hashlib.blake2b(text.encode(), digest_size=1).digest()
    return digest[0] < 256 * _TEST_SHARE


@dataclass(frozen=True, slots=True)
class Pattern:
    """Literal text and slots in turn: `parts[0::2]` are literals, `parts[1::2]` slot names."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Pattern:
        return cls(tuple(_SLOT.split(line)))

    @property
    def literals(self) -> tuple[str, ...]:
        return self.parts[0::2]


@dataclass(frozen=True)
class Grammar:
    language: Language
    """The language of its numbers."""
    slots: dict[str, tuple[Pattern, ...]]
    training: tuple[Pattern, ...]
    """Templates for both sets; `is_test` divides their sentences."""
    testing: tuple[Pattern, ...]
    """Templates for the test set only."""
    words: tuple[str, ...]

    @classmethod
    def read(cls, language: Language, *paths: Path) -> Grammar:
        """Read grammar files; slots of later ones replace those of earlier ones, the sentences
        and words are those of the last."""
        slots: dict[str, tuple[Pattern, ...]] = {}
        sections: dict[str, list[str]] = {}
        for path in paths:
            sections = _sections(path.read_text(encoding="utf-8"))
            slots |= {
                name: tuple(Pattern.parse(item) for item in _items(lines))
                for name, lines in sections.items()
                if name not in ("sentences", "words")
            }
        lines = sections["sentences"]
        return cls(
            language,
            slots,
            tuple(Pattern.parse(line) for line in lines if not line.startswith("!")),
            tuple(Pattern.parse(line[1:].strip()) for line in lines if line.startswith("!")),
            tuple(_items(sections.get("words", []))),
        )

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """How often each training template is drawn: more the more slots it has."""
        return tuple(len(pattern.parts) for pattern in self.training)

    @property
    def patterns(self) -> Iterator[Pattern]:
        yield from self.training
        yield from self.testing
        for alternatives in self.slots.values():
            yield from alternatives

    @property
    def lexicon(self) -> tuple[str, ...]:
        """What random words are drawn from, of two characters or more: everything that fills a slot
        as it stands, the further words, and the vocabulary of the templates for testing (Chinese by
        the stretch, English by the word), which training would not meet otherwise."""
        items = {
            pattern.parts[0]
            for alternatives in self.slots.values()
            for pattern in alternatives
            if len(pattern.parts) == 1
        }
        items.update(self.words)
        for pattern in self.testing:
            items.update(run for literal in pattern.literals for run in _RUN.findall(literal))
        return tuple(sorted(item for item in items if len(item) > 1))


def _sections(text: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def _items(lines: list[str]) -> Iterator[str]:
    return (item.strip() for line in lines for item in line.split("|"))


class Corpus:
    """Draws sentences. The same calls with the same random state give the same sentences."""

    def __init__(self, folder: Path = GRAMMAR) -> None:
        mandarin, english, mixed = (folder / f"{n}.txt" for n in ("mandarin", "english", "mixed"))
        self.grammars: dict[Kind, Grammar] = {
            "zh": Grammar.read("zh", mandarin),
            "en": Grammar.read("en", english),
            "mixed": Grammar.read("zh", mandarin, mixed),
        }
        self._pinyin = _read_pinyin(folder / "pinyin.tsv")
        self._fixed = {
            self._sentence([pattern.parts[0]]).text
            for grammar in self.grammars.values()
            for pattern in grammar.training
            if len(pattern.parts) == 1
        }
        self._reserved = {sentence.text for _, sentence in self.samples(folder)}
        self._lexicon: dict[Kind, tuple[str, ...]] = {
            kind: grammar.lexicon for kind, grammar in self.grammars.items()
        }

    def sentence(self, rng: random.Random, kind: Kind, split: Split) -> Sentence:
        """A sentence of the domain. Half of the test sentences are of templates that training
        never uses, half of templates that it fills in otherwise."""
        grammar = self.grammars[kind]
        if split == "test" and rng.random() < 0.5:
            return self._expand(rng, grammar, rng.choice(grammar.testing))
        while True:
            pattern = rng.choices(grammar.training, grammar.weights)[0]
            sentence = self._expand(rng, grammar, pattern)
            if self._split(sentence) == split:
                return sentence

    def words(self, rng: random.Random, kind: Kind, split: Split) -> Sentence:
        """Two to eight words or phrases of the lexicon in any order, with numbers among them."""
        cardinal = _CARDINALS[self.grammars[kind].language]
        while True:
            items = rng.choices(self._lexicon[kind], k=rng.randint(2, 8))
            for index in range(len(items)):
                if rng.random() < _NUMBERS:
                    items[index] = cardinal(rng.choice((rng.randrange(100), rng.randrange(1000))))
            sentence = self._sentence(items)
            if self._split(sentence) == split:
                return sentence

    def digits(self, rng: random.Random, language: Language, split: Split) -> Sentence:
        """One to ten digits, read one by one; three to eight for testing."""
        least, most = (1, 10) if split == "train" else (3, 8)
        while True:
            sentence = self._sentence([_digits(rng, language, least, most)])
            if self._split(sentence) == split or len(sentence.units) == 1:
                return sentence

    def samples(self, folder: Path = GRAMMAR) -> Iterator[tuple[str, Sentence]]:
        """The sentences written by hand for `sample_audio/`, each with the name of its recording.
        They are in neither set."""
        for name, lines in _sections((folder / "samples.txt").read_text(encoding="utf-8")).items():
            for line in lines:
                yield name, self._sentence([line])

    @cached_property
    def characters(self) -> tuple[str, ...]:
        """Every Chinese character of the domain, in code point order."""
        return tuple(sorted({*"".join(self._pinyin), *_NUMERALS}))

    @cached_property
    def english_words(self) -> tuple[str, ...]:
        """Every English word of the domain, in alphabetical order."""
        words = {*_EN_DIGITS, *_EN_TEENS, *_EN_TENS[2:], "hundred", "thousand", "and"}
        for grammar in self.grammars.values():
            literals = (text for pattern in grammar.patterns for text in pattern.literals)
            for text in (*literals, *grammar.words):
                found = (run for run in _RUN.findall(text) if run.isascii())
                words.update(run for run in found if not run.isupper())
        return tuple(sorted(words))

    def _split(self, sentence: Sentence) -> Split | None:
        if sentence.text in self._reserved:
            return None
        if sentence.text in self._fixed:
            return "train"
        return "test" if is_test(sentence.text) else "train"

    def _expand(self, rng: random.Random, grammar: Grammar, pattern: Pattern) -> Sentence:
        return self._sentence(list(_fill(rng, grammar, pattern)))

    def _sentence(self, fragments: list[str]) -> Sentence:
        units = [unit for fragment in fragments for unit in self._units(fragment)]
        return Sentence(tuple(tone_sandhi(units)))

    def _units(self, fragment: str) -> Iterator[Unit]:
        for run in _RUN.findall(fragment):
            if not run.isascii():
                numerals = all(character in _NUMERALS for character in run)
                syllables = [_NUMERALS[c] for c in run] if numerals else self._pinyin[run]
                yield from (Unit(c, s, "zh") for c, s in zip(run, syllables, strict=True))
            elif run.isupper() and run != "I":
                # espeak-ng reads a lone "A" as the article.
                yield from (Unit(c.lower(), "eigh" if c == "A" else c, "en") for c in run)
            else:
                yield Unit(run.lower(), run.lower(), "en")


def _fill(rng: random.Random, grammar: Grammar, pattern: Pattern) -> Iterator[str]:
    for index, part in enumerate(pattern.parts):
        if index % 2 == 0:
            yield part
        elif bounds := _RANGE.fullmatch(part):
            number = rng.randint(int(bounds[1]), int(bounds[2]))
            yield _CARDINALS[grammar.language](number)
        elif bounds := _RANGE.fullmatch(part.removeprefix("digits ")):
            yield _digits(rng, grammar.language, int(bounds[1]), int(bounds[2]))
        elif part == "year":
            yield year_words(rng.choice(_YEARS), grammar.language)
        else:
            yield from _fill(rng, grammar, rng.choice(grammar.slots[part]))


def _digits(rng: random.Random, language: Language, least: int, most: int) -> str:
    digits = rng.choices(range(10), k=rng.randint(least, most))
    if language == "zh":
        return "".join(_ZH_DIGITS[digit] for digit in digits)
    return " ".join(_EN_DIGITS[digit] for digit in digits)


def year_words(year: int, language: Language) -> str:
    """A year from 1000 to 2999 as it is said."""
    if language == "zh":
        return "".join(_ZH_DIGITS[int(digit)] for digit in str(year))
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return english_cardinal(year)
    return f"{english_cardinal(century)} {english_cardinal(rest)}" if rest else "two thousand"


def english_cardinal(number: int) -> str:
    """A whole number from 0 to 9999, British style: "three hundred and five"."""
    if number < 20:
        return (_EN_DIGITS + _EN_TEENS)[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return f"{_EN_TENS[tens]} {_EN_DIGITS[rest]}" if rest else _EN_TENS[tens]
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    count, rest = divmod(number, size)
    head = f"{english_cardinal(count)} {name}"
    if not rest:
        return head
    return f"{head} {'and ' if rest < 100 else ''}{english_cardinal(rest)}"


def chinese_cardinal(number: int) -> str:
    """A whole number from 0 to 9999."""
    if number < 10:
        return _ZH_DIGITS[number]
    if number < 20:
        return "十" + (_ZH_DIGITS[number - 10] if number > 10 else "")
    if number < 100:
        return _ZH_DIGITS[number // 10] + chinese_cardinal(10 + number % 10)
    size, name = (100, "百") if number < 1000 else (1000, "千")
    count, rest = divmod(number, size)
    head = ("两" if count == 2 else _ZH_DIGITS[count]) + name
    if not rest:
        return head
    if rest < size // 10:
        return f"{head}零{chinese_cardinal(rest)}"
    # After a hundred, ten to nineteen are read with their leading one.
    return head + ("一" if rest < 20 else "") + chinese_cardinal(rest)


_CARDINALS = {"zh": chinese_cardinal, "en": english_cardinal}


def tone_sandhi(units: list[Unit]) -> Iterator[Unit]:
    """Tones as spoken: 3-3 becomes 2-3; 不 and 一 rise before a fourth tone; 一 falls before the
    others, unless it counts."""
    syllables = [unit.spoken for unit in units]
    for index, unit in enumerate(units):
        if unit.text in ("不", "一") and index + 1 < len(units):
            following = units[index + 1]
            counts = unit.text == "一" and (
                (index > 0 and units[index - 1].text in "零一二三四五六七八九十第周期初")
                or following.text in "零一二三四五六七八九十月号日楼"
            )
            if following.language == "zh" and not counts:
                # 个 is in the fourth tone, though unstressed.
                rises = following.spoken.endswith("4") or following.text == "个"
                if rises or unit.text == "一":
                    syllables[index] = syllables[index][:-1] + ("2" if rises else "4")
    for index in reversed(range(len(units) - 1)):
        if syllables[index].endswith("3") and units[index + 1].spoken.endswith("3"):
            syllables[index] = syllables[index][:-1] + "2"
    for unit, syllable in zip(units, syllables, strict=True):
        yield unit if unit.language == "en" else Unit(unit.text, syllable, "zh")


def _read_pinyin(path: Path) -> dict[str, tuple[str, ...]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = (line.split("\t") for line in lines)
    return {phrase: tuple(syllables.split()) for phrase, syllables in rows}


def write_pinyin(folder: Path) -> int:
    """Write the pinyin of every stretch of Chinese in the grammar (needs the package pypinyin).

    Corrections of `pinyin_corrections.tsv`, by stretch, come before pypinyin's readings.
    Returns the number of stretches.
    """
    from pypinyin import Style, lazy_pinyin

    corrections = _read_pinyin(folder / "pinyin_corrections.tsv")
    stretches = {
        run
        for path in sorted(folder.glob("*.txt"))
        for run in _HAN.findall(_SLOT.sub(" ", path.read_text(encoding="utf-8")))
    }
    rows = []
    for stretch in sorted(stretches):
        read = lazy_pinyin(stretch, style=Style.TONE3, neutral_tone_with_five=True)
        rows.append(f"{stretch}\t{' '.join(corrections.get(stretch, read))}\n")
    (folder / "pinyin.tsv").write_text("".join(rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print sentences of the domain.")
    parser.add_argument("--kind", choices=("zh", "en", "mixed"), default="zh")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write-pinyin", action="store_true", help="renew grammar/pinyin.tsv")
    arguments = parser.parse_args()
    if arguments.write_pinyin:
        print(f"{write_pinyin(GRAMMAR)} stretches of Chinese")
        return
    corpus, rng = Corpus(), random.Random(arguments.seed)
    for _ in range(arguments.count):
        sentence = corpus.sentence(rng, arguments.kind, arguments.split)
        print(sentence.text, "|", " ".join(unit.spoken for unit in sentence.units))


if __name__ == "__main__":
    main()
