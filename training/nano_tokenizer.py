"""The tokenizer of sample-nano: a small byte-level BPE in the layout of Qwen's.

    python -m training.nano_tokenizer --out DIR

Writes `tokenizer.json` and the same tokens as a tiktoken file, `ctc.tiktoken`, for the CTC head:
the rank of a token there is its id here. Ids: the 256 bytes; what two bytes of Chinese characters
begin with; the characters and full-width marks, one token each; pieces of English by byte-pair
encoding (Sennrich et al. 2016); last the tokens that are not text, which the CTC head lacks.

No merge of two Chinese characters is learned, so each one stays a token wherever it stands.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from funasr_batch.text.byte_level import from_bytes, to_bytes
from training.corpus import Corpus, Kind
from training.nano_texts import write_sentence

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Qwen's tokens that are not text, as far as the prompt needs them."""
MARKS = "，。？！：；、“”《》（）"
PROMPTS = (
    "system\nYou are a helpful assistant.",
    "user\n语音转写：语音转写成中文：语音转写成英文：语音转写成日文：语音转写，不进行文本规整：",
    "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。",
    "\n\n\n**上下文信息：**\n\n\n热词列表：[a, b, c]\n",
    "assistant\n",
)
"""Sentences of models that were trained with this prompt (text/prompt.py), so that it is short."""

_WIDE = re.compile(r"[\u3000-\u9fff\uff00-\uffef“”]+")
_CUT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
"""How GPT-2 cuts a text before it looks for pairs."""
_SENTENCES = 40_000


@dataclass(frozen=True)
class RankTokenizer:
    """Encodes by the ranks of a tiktoken file, with the place of each token in the text.

    Training needs the places, and no library that may be missing where it runs.
    `funasr_batch.text.prompt.build_prompt` takes it in place of an `LlmTokenizer`.
    """

    ranks: dict[bytes, int] = field(repr=False)
    specials: dict[str, int]
    _known: dict[bytes, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder: Path) -> RankTokenizer:
        lines = (folder / "ctc.tiktoken").read_text(encoding="ascii").splitlines()
        ranks = {base64.b64decode(t): int(rank) for t, rank in (line.split() for line in lines)}
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return cls(ranks, {token["content"]: token["id"] for token in spec["added_tokens"]})

    @property
    def base(self) -> int:
        """The number of text tokens; the CTC head's blank has this id."""
        return len(self.ranks)

    @property
    def size(self) -> int:
        return self.base + len(self.specials)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(token for token, _, _ in self.pieces(text))

    def special(self, name: str) -> int:
        return self.specials[name]

    def decode(self, ids: Iterable[int]) -> str:
        raw = b"".join(self._bytes[i] for i in ids if i < self.base)
        return raw.decode("utf-8", "replace")

    @cached_property
    def _bytes(self) -> list[bytes]:
        return list(self.ranks)  # in the order of their ranks

    def pieces(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token, in characters of the text. A token of a part of a
        character has all of it."""
        for match in _CUT.finditer(text):
            ends = [i for i, c in enumerate(match[0], match.start()) for _ in c.encode()]
            place = 0
            for token, size in self._merged(match[0].encode()):
                yield token, ends[place], ends[place + size - 1] + 1
                place += size

    def _merged(self, raw: bytes) -> Iterator[tuple[int, int]]:
        ids = self._known.get(raw)
        if ids is None:
            ids = self._known[raw] = tuple(self.ranks[part] for part in merge(raw, self.ranks))
        return ((token, len(self._bytes[token])) for token in ids)


def merge(raw: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens of a word: neighbours that make the token of the lowest rank are joined first."""
    parts = [raw[i : i + 1] for i in range(len(raw))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(joined)
        if best == len(ranks):
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def learn(texts: Sequence[str], characters: Iterable[str], merges: int) -> dict[bytes, int]:
    """The ranks of all text tokens, in order."""
    tokens = [bytes([value]) for value in range(256)]
    wide = [character.encode() for character in dict.fromkeys(characters)]
    tokens += dict.fromkeys(raw[:end] for raw in wide for end in range(2, len(raw)))
    tokens += wide
    known = set(tokens)
    for token in _english_pieces(texts, merges):
        if token not in known:
            tokens.append(token)
            known.add(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # A token that the ranks before it do not lead to in one join could never be made.
    sound = [token for token in tokens if len(token) == 1 or _parents(token, ranks) is not None]
    return {token: rank for rank, token in enumerate(sound)}


def _parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that are joined to make this one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(joined)
        if best >= ranks[token]:
            return None
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _english_pieces(texts: Sequence[str], merges: int) -> Iterator[bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    narrow = (part for text in texts for part in _WIDE.split(text) if part)
    tokenizer.train_from_iterator(narrow, trainer)
    vocabulary = tokenizer.get_vocab()
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        yield to_bytes(piece)


def tokenizer_json(ranks: dict[bytes, int]) -> str:
    """The ranks as Hugging Face's file, with the tokens that are not text after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for token in ranks:
        if len(token) > 1:
            parents = _parents(token, ranks)
            assert parents is not None
            merges.append((from_bytes(parents[0]), from_bytes(parents[1])))
    vocabulary = {from_bytes(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    for name in SPECIAL:
        tokenizer.add_tokens([AddedToken(name, special=name.startswith("<|"), normalized=False)])
    return str(tokenizer.to_str(pretty=False))


def domain_texts(corpus: Corpus, count: int) -> list[str]:
    """Sentences as they are written, random words among them, and each word of the domain."""
    rng = random.Random(0)
    texts = list(PROMPTS) * 20
    kinds: tuple[Kind, ...] = ("en", "en", "en", "mixed", "zh")
    for index in range(count):
        kind = kinds[index % len(kinds)]
        draw = corpus.words if rng.random() < 0.3 else corpus.sentence
        texts.append(write_sentence([unit.text for unit in draw(rng, kind, "train").units]))
    for word in corpus.english_words:
        # More than once, or the word would stay in pieces.
        texts += [f"the {word} ", write_sentence([word, "the"])] * 3
    return texts


def write(folder: Path, ranks: dict[bytes, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(ranks), encoding="utf-8")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "ctc.tiktoken").write_text("".join(lines), encoding="ascii")


def nano_config(config: Path, llm: Path, tokenizer: RankTokenizer) -> dict[str, Any]:
    """FunASR's configuration with the LLM's under `llm_config`, sized for the tokenizer."""
    loaded: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    end, padding = tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>")
    loaded["llm_config"] = {
        **json.loads(llm.read_text(encoding="utf-8")),
        "vocab_size": tokenizer.size,
        "bos_token_id": padding,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--merges", type=int, default=2000, help="for English")
    parser.add_argument("--sentences", type=int, default=_SENTENCES)
    arguments = parser.parse_args()
    corpus = Corpus()
    texts = domain_texts(corpus, arguments.sentences)
    prompts = sorted({c for text in PROMPTS for c in text if not c.isascii()})
    ranks = learn(texts, (*corpus.characters, *MARKS, *prompts), arguments.merges)
    write(arguments.out, ranks)
    words = sum(len(text) for text in texts)
    print(f"{len(ranks)} tokens of text and {len(SPECIAL)} others; learned on {words} characters")


if __name__ == "__main__":
    main()
