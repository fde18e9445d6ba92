"""The language that a text's script tells."""

from __future__ import annotations

import pytest

from funasr_batch.text.language import UNKNOWN, language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("今天天气怎么样？", "zh"),
        ("hello world", "en"),
        ("it's fine", "en"),
        ("你好 hello", "zh"),  # as many words of both
        ("我在 Kubernetes 上 deploy 一个 service 的时候", "zh"),
        ("開放時間は午前九時から", "ja"),
        ("コンピューター", "ja"),
        ("優の良品", "zh"),  # a Chinese brand name with one kana
        ("안녕하세요 hello", "ko"),
        ("Привет мир", UNKNOWN),
        ("สวัสดี", UNKNOWN),
        ("l'été au café", "en"),  # the Latin script counts as English
        ("12:30, 45 %", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_the_language_of_a_text(text: str, language: str) -> None:
    assert language_of(text) == language
