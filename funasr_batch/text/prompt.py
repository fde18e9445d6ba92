"""The words around the audio in Fun-ASR-Nano's prompt.

Text and order are those that the model was trained with (FunASR's
`funasr/models/fun_asr_nano/model.py`, `get_prompt` and `data_load_speech`). The audio goes between
the two halves. FunASR marks its place in a string with `<|startofspeech|>…<|endofspeech|>`; these
are no tokens and never reach the model, so here they do not exist.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from funasr_batch.errors import UsageError

if TYPE_CHECKING:
    from funasr_batch.text.llm_tokenizer import LlmTokenizer

NANO_LANGUAGES = ("zh", "en", "ja")
"""Languages of Fun-ASR-Nano-2512; Fun-ASR-MLT-Nano-2512 knows all of `LANGUAGE_NAMES`."""

LANGUAGE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "zh": "中文",
        "en": "英文",
        "ja": "日文",
        "yue": "粤语",
        "ko": "韩文",
        "vi": "越南语",
        "id": "印尼语",
        "th": "泰语",
        "ms": "马来语",
        "fil": "菲律宾语",
        "ar": "阿拉伯语",
        "hi": "印地语",
        "bg": "保加利亚语",
        "hr": "克罗地亚语",
        "cs": "捷克语",
        "da": "丹麦语",
        "nl": "荷兰语",
        "et": "爱沙尼亚语",
        "fi": "芬兰语",
        "el": "希腊语",
        "hu": "匈牙利语",
        "ga": "爱尔兰语",
        "lv": "拉脱维亚语",
        "lt": "立陶宛语",
        "mt": "马耳他语",
        "pl": "波兰语",
        "pt": "葡萄牙语",
        "ro": "罗马尼亚语",
        "sk": "斯洛伐克语",
        "sl": "斯洛文尼亚语",
        "sv": "瑞典语",
    }
)
"""What the prompt calls a language, by its BCP 47 code (the model card's names)."""

MAX_HOTWORDS = 50
"""With more, the list itself begins to turn up in the text, or replaces what was said; users of the
model report about this number as the limit. SeACo-Paraformer has the same one."""
MAX_HOTWORD_LENGTH = 64
"""A longer one is a sentence, not a term, and its tokens are read again for every segment."""

_SYSTEM = "You are a helpful assistant."
_CONTEXT = (
    "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。"
    "\n\n\n**上下文信息：**\n\n\n热词列表：[{hotwords}]\n"
)
_JOINERS = "\u200c\u200d"
"""Invisible, but part of the spelling in Persian and Indian scripts."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids before and after the audio; the audio's rows go in between."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def build_prompt(
    tokenizer: LlmTokenizer,
    *,
    language: str | None,
    itn: bool = True,
    hotwords: Sequence[str] = (),
    think: bool = True,
) -> Prompt:
    """The prompt for one segment.

    `language` is a key of `LANGUAGE_NAMES`, or None to leave it to the model. `itn` False asks for
    numbers as they are spoken. `hotwords` are cleaned by `clean_hotwords`. `think` False adds the
    empty block of thought with which a model without FunASR's `do_think` was trained.

    Raises:
        UsageError: the language is unknown.
        CheckpointError: the tokenizer lacks a token that the prompt needs.
    """
    begin, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    line_break = tokenizer.encode("\n")
    user = _user_text(language, itn=itn, hotwords=clean_hotwords(hotwords))
    thought: tuple[int, ...] = ()
    if not think:
        blank = tokenizer.encode("\n\n")
        opening, closing = tokenizer.special("<think>"), tokenizer.special("</think>")
        thought = (opening, *blank, closing, *blank)
    return Prompt(
        prefix=(
            *(begin, *tokenizer.encode(f"system\n{_SYSTEM}"), end, *line_break),
            *(begin, *tokenizer.encode(f"user\n{user}")),
        ),
        suffix=(end, *line_break, begin, *tokenizer.encode("assistant\n"), *thought),
    )


def clean_hotwords(hotwords: Iterable[str]) -> tuple[str, ...]:
    """Hotwords as they go into the prompt.

    White space and control characters become single spaces, invisible characters go; what is then
    empty, was there before or is longer than `MAX_HOTWORD_LENGTH` is left out; the first
    `MAX_HOTWORDS` stay.
    """
    cleaned = (" ".join("".join(map(_visible, word)).split()) for word in hotwords)
    kept = dict.fromkeys(word for word in cleaned if 0 < len(word) <= MAX_HOTWORD_LENGTH)
    return tuple(kept)[:MAX_HOTWORDS]


def _visible(char: str) -> str:
    match unicodedata.category(char):
        case "Cc" | "Zl" | "Zp":
            return " "
        case "Cf" if char not in _JOINERS:
            return ""
        case "Cs" | "Co" | "Cn":
            return ""
        case _:
            return char


def _user_text(language: str | None, *, itn: bool, hotwords: Sequence[str]) -> str:
    context = _CONTEXT.format(hotwords=", ".join(hotwords)) if hotwords else ""
    into = "" if language is None else f"成{_language_name(language)}"
    spoken_numbers = "" if itn else "，不进行文本规整"
    return f"{context}语音转写{into}{spoken_numbers}："


def _language_name(language: str) -> str:
    if language not in LANGUAGE_NAMES:
        raise UsageError(
            f"unknown language: {language}", hint=f"Known: {', '.join(LANGUAGE_NAMES)}"
        )
    return LANGUAGE_NAMES[language]
