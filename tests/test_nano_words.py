"""Generated tokens to text and words."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.records import Token, Word
from funasr_batch.text.cues import _token_cuts
from funasr_batch.text.nano_words import clean_text, word_spans, wording

TYPICAL = st.text("你好的 ，。！“”《》ab3'\".-()$é\u0301ー🎙\u200d|&>Ｏ\n\ufffd", max_size=40)


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


def without_spaces(text: str) -> str:
    return "".join(text.split())


class TestCleaning:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("  你好 \n 世界\u3000。 ", "你好 世界 。"),
            ("你好/sil世界", "你好 世界"),
            ("km/silver", "km/silver"),
            ("[breath]你好[noise]。", "你好。"),
            ("你好endofbreak", "你好"),
            ("你好FFFF", "你好"),
            ("address 0xFFFF", "address 0xFFFF"),
            ("你\ufffd好\x00\x1b", "你好"),
            ("<|zh|>你好<|im_end|></s><think>", "你好"),
            ("3 < 5 且 7 > 6", "3 < 5 且 7 > 6"),
            (">ab>ab>ab>ab>ab你好", "你好"),
            (">>> 你好", "你好"),
            ("[张三] 说", "[张三] 说"),
            ("你|好｜Ｏ", "你好"),
            ("ＯＫ 没问题", "ＯＫ 没问题"),
            ("R&D and AT&T, Q & A", "R&D and AT&T, Q & A"),
            ("&你好＆", "你好"),
            ("", ""),
            ("\ufffd", ""),
        ],
    )
    def test_table(self, written: str, meant: str) -> None:
        assert clean_text(written) == meant

    @given(TYPICAL | st.text())
    def test_nothing_is_added_and_white_space_is_single(self, text: str) -> None:
        cleaned = clean_text(text)
        assert cleaned == " ".join(cleaned.split())
        rest = iter(text)
        assert all(char == " " or char in rest for char in cleaned)


class TestWords:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("他说：“你好，world！”（笑）", "他|说：|“你|好，|world！”|（笑）"),
            ("don't go, it's 3.5% of $5.", "don't|go,|it's|3.5%|of|$5."),
            ("它说don’t，行。", "它|说|don’t，|行。"),
            ('f(x) "hi" he said', 'f(x)|"hi"|he|said'),
            ('说"你好"。', '说|"你|好"。'),
            ("hello，world", "hello，|world"),
            ("well—maybe", "well—|maybe"),
            ("well - I think", "well -|I|think"),
            ("- yes 'quoted' text", "- yes|'quoted'|text"),
            ("花¥5和￥6", "花|¥5|和|￥6"),
            ("我用 python 写3行code。", "我|用|python|写|3|行|code。"),
            ("e.g. U.S. e-mail", "e.g.|U.S.|e-mail"),
            ("(「你」)", "(「你」)"),
            ("カーテンが", "カ|ー|テ|ン|が"),
            ("か\u3099く", "か\u3099|く"),
            ("कक्षा में", "कक्षा|में"),
            ("안녕하세요 여러분.", "안녕하세요|여러분."),
            ("……。", "……。"),
            ("", ""),
            (" ", ""),
        ],
    )
    def test_table(self, text: str, expected: str) -> None:
        assert "|".join(words(text)) == expected

    @given(TYPICAL | st.text())
    def test_words_are_the_text(self, text: str) -> None:
        found = words(text)
        assert without_spaces("".join(found)) == without_spaces(text)
        assert all(word == word.strip() != "" for word in found)
        if len(found) > 1:
            assert all(any(map(str.isalnum, word)) for word in found)
        for word in found:
            chinese = [c for c in word if "\u4e00" <= c <= "\u9fff"]
            latin = [c for c in word if c.isascii() and c.isalnum()]
            assert len(chinese) <= 1
            assert not (chinese and latin)


class TestWording:
    def test_parts_of_characters_and_least_confidence(self) -> None:
        ni, hao = "你".encode(), "好，".encode()
        result = wording(
            [b"", ni[:2], ni[2:] + hao[:1], hao[1:], b"wor", b"ld", b""],
            [0.1, 0.9, 0.8, 0.95, 0.7, 0.6, 0.1],
        )
        assert result.text == "你好，world"
        assert result.words == (Word("你", 0.8), Word("好，", 0.8), Word("world", 0.6))

    def test_broken_bytes_cost_only_themselves(self) -> None:
        result = wording([b"\xe4", b"a", b"\xbd\xa0b"], [0.1, 0.9, 0.8])
        assert result.text == "ab"
        assert result.words == (Word("ab", 0.8),)

    def test_junk_leaves_no_mark_on_confidence(self) -> None:
        result = wording([b"<|x|>", b"a", b" ", b"b"], [0.1, 0.9, 0.2, 0.8])
        assert result.words == (Word("a", 0.9), Word("b", 0.8))

    def test_nothing(self) -> None:
        assert wording([], []).words == ()
        assert wording([b"\xff", b" "], [0.5, 0.5]).text == ""

    @given(TYPICAL | st.text(), st.randoms(use_true_random=False))
    def test_how_the_bytes_are_cut_does_not_matter(self, text: str, rng: random.Random) -> None:
        raw = text.encode("utf-8")
        cuts = sorted(rng.choices(range(len(raw) + 1), k=5)) if raw else []
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        confidences = [rng.random() for _ in pieces]
        result = wording(pieces, confidences)
        assert result.text == clean_text(text)
        assert [word.text for word in result.words] == words(result.text)
        assert {word.confidence for word in result.words} <= set(confidences)

    @given(TYPICAL)
    def test_cues_find_the_words(self, text: str) -> None:
        """Cues place words in the text by themselves, and fall back on sharing out if they fail."""
        result = wording([text.encode()], [1.0])
        tokens = [Token(word.text, 0, 1, 1.0) for word in result.words]
        cuts = _token_cuts(result.text, tokens)
        if not tokens:
            assert cuts is None
            return
        assert cuts is not None
        slices = [result.text[a:b].strip() for a, b in pairwise([*cuts, len(result.text)])]
        assert slices == [token.text for token in tokens]
