"""Sentences of the domain as sample-nano writes them: with punctuation and capitals.

Everything follows from the words alone, so that the same words are always written alike and a model
can learn it: a question by its words, a comma where a clause of the grammar begins, capitals for
names. Numbers stay in words. A sentence with a Chinese character has full-width marks.

    python -m training.nano_texts --kind en --count 20
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

from training.corpus import GRAMMAR, Corpus, Grammar, join
from training.tokens import _units

_HAN = re.compile(r"[\u4e00-\u9fff]")
_NUMERAL = "零一二三四五六七八九十百千万两"

_CHINESE_QUESTION = re.compile(
    r"[吗呢]$|怎么(样|走|用|付款)$|多少钱$|几点了$|几路车$|有没有|会不会|什么(看法)?$|贵姓$|还是|哪个"
)
_CHINESE_COMMAS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<=.)(?<!最高)(?=(?:最高)?气温[{_NUMERAL}]+度)",
        r"(?<=.)(?<!东)(?<!西)(?=(?:东南|西北|东|南|西|北)风三到四级)",
        r"(?<=.)(?=再(?:去|回|向|登录))",
        r"(?<=[米转])(?=就[到是])",
        r"(?<=请注意)(?=开往)",
        r"(?<=.)(?=请(?:准备下车|不要告诉|联系))",
        r"(?<=.)(?=有没有小一点)",
        r"(?<=^服务员)(?=我们)",
        r"(?<=.)(?=不喜欢喝)",
        r"(?<=.)(?=也可以用手机)",
        r"(?<=.)(?=您(?:怎么付款|有什么看法))",
        r"(?<=打折)(?=便宜了)",
        r"(?<=听到这个消息)(?=.)",
        r"(?<=了)(?=(?:要|不能)去)",
        r"(?<=^对不起)(?=.)",
        r"(?<=.)(?=我不能去)",
        r"(?<=.)(?=我们就不去了)",
        r"(?<=吃药)(?=多喝)",
        r"(?<=的时候)(?=.)",
        r"(?<=.)(?=我是主持人)",
        r"(?<=收听)(?=我们)",
        r"(?<=.)(?=所以)",
        r"(?<=快乐)(?=身体健康)",
        r"(?<=没关系)(?=.)",
        r"(?<=叫小白)(?=今年)",
        r"(?<=.)(?=但是)",
        r"(?<=.)(?=就一定)",
        r"(?<=好)(?=各位听众)",
        r"(?<=.)(?=这里是)",
        r"(?<=好)(?=欢迎收[听看])",
        r"(?<=之后)(?=马上)",
        r"(?<=钱)(?=两张票)",
        r"(?<=元)(?=两张票)",
        r"(?<=.)(?=电话是)",
        r"(?<=.)(?=你喜欢哪个)",
        r"(?<=.)(?=也有)",
        r"(?<=.)(?=今天的主题)",
    )
)

_ENGLISH_QUESTION = re.compile(
    r"^(?:excuse me )?"
    r"(?:what|where|who|how|when|why|is|are|do|does|did|can|could|would|will|may i)\b"
)
_ENGLISH_COMMAS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<=^excuse me)(?= )",
        r"(?<=.)(?= please(?:$| come\b))",
        r"(?<=^it doesn't matter)(?= )",
        r"(?<=^i'm sorry)(?= )",
        r"(?<=any questions)(?= please)",
        r"(?<=^nice to meet you)(?= )",
        r"(?<=.)(?= and then\b)",
        r"(?<=.)(?= then to\b)",
        r"(?<=.)(?= and two are\b)",
        r"(?<=.)(?= but (?:the|we)\b)",
        r"(?<=.)(?= and (?:my name|his telephone|see you)\b)",
    )
)
_GUEST = re.compile(r"^(our guest(?: today)? is .+?) (an? .+ from .+)$")
_APPOSITION = re.compile(r"^(\S+(?: \S+)?) (the \S+(?: officer| fighter)?) (lives in .+)$")
_PLACE_FIRST = re.compile(r"^(in \S+(?: york)?) (it's .+)$")

_BRANDS = {
    "iphone": "iPhone",
    "ipad": "iPad",
    "wifi": "WiFi",
    "youtube": "YouTube",
    "github": "GitHub",
    **{
        name: name.capitalize()
        for name in (
            *("facebook", "google", "twitter", "instagram", "skype", "python", "linux", "chrome"),
            *("android", "bluetooth", "microsoft", "amazon", "netflix"),
        )
    },
}
_BRANDS_IN_CHINESE = {
    name: name.capitalize() for name in ("word", "excel", "zoom", "docker", "windows", "apple")
}
"""Ordinary words in an English sentence."""
_TITLES = frozenset({"doctor", "professor", "mister"})
_COMMON_SURNAMES = frozenset({"brown", "green", "baker", "walker"})
"""Names only after a title or a first name."""


def write(sentences: Iterable[Sequence[str]]) -> str:
    """The text of sentences, each given as its units: Chinese characters and lower-case words."""
    text = ""
    for units in sentences:
        written = write_sentence(units)
        spaced = text and text[-1].isascii()
        text += f" {written}" if spaced else written
    return text


def write_unpunctuated(text: str) -> str:
    """`Sentence.text` as one sentence of ours."""
    return write([list(_units(text))]) if text else ""


def write_sentence(units: Sequence[str]) -> str:
    """One sentence with its marks and capitals."""
    if _HAN.search("".join(units)):
        return _chinese(units)
    return _english(units)


def _chinese(units: Sequence[str]) -> str:
    text = join(tuple(units))
    mark = "？" if _CHINESE_QUESTION.search(text) else "。"
    for pattern in _CHINESE_COMMAS:
        text = pattern.sub("，", text, count=1)
    brands = _BRANDS | _BRANDS_IN_CHINESE

    def cased(match: re.Match[str]) -> str:
        word = match[0]
        return word.upper() if len(word) == 1 else brands.get(word, word)

    return re.sub(r"[A-Za-z']+", cased, text) + mark


def _english(units: Sequence[str]) -> str:
    text = join(tuple(units))
    lower = " ".join(units)
    mark = "?" if _ENGLISH_QUESTION.search(lower) else "."
    words = text.split(" ")
    cased = [_cased(word, words[index - 1] if index else "") for index, word in enumerate(words)]
    for number, comma in enumerate(_commas(text)):
        cased[number] += comma
    written = " ".join(_name_pairs(cased))
    return written[0].upper() + written[1:] + mark


def _commas(text: str) -> list[str]:
    """The comma after each word, or nothing."""
    for pattern in _ENGLISH_COMMAS:
        text = pattern.sub(",", text, count=1)
    text = _GUEST.sub(r"\1, \2", text)
    if (match := _APPOSITION.match(text)) and match[1].split()[0] in _names():
        text = f"{match[1]}, {match[2]}, {match[3]}"
    text = _PLACE_FIRST.sub(r"\1, \2", text)
    return ["," if word.endswith(",") else "" for word in text.split(" ")]


def _cased(word: str, before: str) -> str:
    if word == "i" or word.startswith("i'"):
        return "I" + word[1:]
    if word in _BRANDS:
        return _BRANDS[word]
    if word in _COMMON_SURNAMES:
        return word.capitalize() if before in _TITLES or before in _names() else word
    if word in _proper():
        return word.capitalize()
    return word


def _name_pairs(words: Sequence[str]) -> list[str]:
    """Titles before a name, and words that are names only together with their neighbour."""
    out = list(words)
    for index, (word, following) in enumerate(pairwise(words)):
        if word in _TITLES and following[0].isupper():
            out[index] = word.capitalize()
        if word == "new" and following.rstrip(",") in ("york", "year"):
            out[index] = "New"
            out[index + 1] = following.capitalize()
    return out


@cache
def _english_grammar() -> Grammar:
    return Grammar.read("en", GRAMMAR / "english.txt")


def _slot(*names: str) -> frozenset[str]:
    slots = _english_grammar().slots
    return frozenset(
        word for name in names for item in slots[name] for word in item.parts[0].split()
    )


@cache
def _names() -> frozenset[str]:
    return _slot("name")


@cache
def _proper() -> frozenset[str]:
    others = {"english", "chinese", "christmas", "easter"}
    listed = _slot("weekday", "month", "city", "country", "name", "surname")
    return (listed | others) - {"new", "york"} - _COMMON_SURNAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("zh", "en", "mixed"), default="zh")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    corpus, rng = Corpus(), random.Random(arguments.seed)
    for _ in range(arguments.count):
        sentence = corpus.sentence(rng, arguments.kind, arguments.split)
        print(write_sentence([unit.text for unit in sentence.units]))


if __name__ == "__main__":
    main()
