"""Times for a language model's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.records import Token, Word
from funasr_batch.text.align_texts import LabelSpan, align_words, coverage, words_from_ctc
from funasr_batch.text.nano_words import Wording, wording


def said(text: str) -> Wording:
    return wording([text.encode()], [0.5])


def timed(*spans: tuple[str, int, int]) -> list[Token]:
    return [Token(text, start, end, 1.0) for text, start, end in spans]


def times(tokens: Sequence[Token]) -> list[tuple[str, int, int]]:
    return [(token.text, token.start, token.end) for token in tokens]


def check(words: Sequence[Word], tokens: Sequence[Token], start: int, end: int) -> None:
    assert [(token.text, token.confidence) for token in tokens] == [
        (word.text, word.confidence) for word in words
    ]
    bounds = [start, *(time for token in tokens for time in (token.start, token.end)), end]
    assert bounds == sorted(bounds)
    if end - start >= len(words):
        assert all(token.end > token.start for token in tokens)


def edits(left: str, right: str) -> int:
    """Levenshtein's distance, slowly."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        new = [i]
        for j, b in enumerate(right, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    return row[-1]


HELLO = timed(("你", 1000, 1200), ("好", 1200, 1400), ("world", 2000, 2500))


class TestFromAnotherRecogniser:
    def test_same_text(self) -> None:
        words = said("你好，World！").words
        assert times(align_words(words, HELLO, 900, 3000)) == [
            ("你", 1000, 1200),
            ("好，", 1200, 1400),
            ("World！", 2000, 2500),
        ]
        assert coverage(words, HELLO) == 1.0

    def test_width_and_case_do_not_count(self) -> None:
        words = said("ＯＫ 吗").words
        tokens = timed(("ok", 0, 200), ("吗", 300, 400))
        assert times(align_words(words, tokens, 0, 500)) == [
            ("Ｏ", 0, 100),
            ("Ｋ", 100, 200),
            ("吗", 300, 400),
        ]

    def test_word_that_the_other_misheard_takes_its_place(self) -> None:
        words = said("你们 world").words
        tokens = align_words(words, HELLO, 900, 3000)
        assert times(tokens)[1] == ("们", 1200, 1400)
        assert coverage(words, HELLO) == pytest.approx(6 / 7)

    def test_words_that_the_other_left_out_share_the_gap(self) -> None:
        words = said("你好 big blue world").words
        assert times(align_words(words, HELLO, 900, 3000))[2:] == [
            ("big", 1400, 1657),  # three of seven letters
            ("blue", 1657, 2000),
            ("world", 2000, 2500),
        ]

    def test_before_the_first_and_after_the_last(self) -> None:
        words = said("在 你好 world 吗").words
        tokens = times(align_words(words, HELLO, 900, 3000))
        assert tokens[0] == ("在", 900, 1000)
        assert tokens[-1] == ("吗", 2500, 3000)

    def test_no_gap(self) -> None:
        words = said("你也好").words
        tokens = align_words(words, HELLO, 900, 3000)
        assert times(tokens) == [("你", 1000, 1200), ("也", 1200, 1201), ("好", 1201, 1400)]

    def test_word_that_is_partly_the_same(self) -> None:
        """Its other letters take as long as those that are the same, and no more."""
        tokens = timed(("a", 0, 100), ("lo", 1000, 1200), ("b", 5000, 5100))
        words = said("a hallo b").words
        assert times(align_words(words, tokens, 0, 6000))[1] == ("hallo", 700, 1200)

    def test_nothing_in_common(self) -> None:
        words = said("一二三").words
        tokens = timed(("123", 400, 1000))
        assert coverage(words, tokens) == 0.0
        # Still somebody spoke there.
        assert times(align_words(words, tokens, 0, 2000)) == [
            ("一", 400, 600),
            ("二", 600, 800),
            ("三", 800, 1000),
        ]

    def test_nothing_at_all(self) -> None:
        assert align_words([], HELLO, 0, 3000) == ()
        assert coverage([], HELLO) == 0.0
        assert coverage(said("。").words, HELLO) == 0.0
        assert times(align_words(said("你好").words, [], 100, 300)) == [
            ("你", 100, 200),
            ("好", 200, 300),
        ]

    def test_no_room(self) -> None:
        words = said("你好吗").words
        check(words, align_words(words, HELLO, 1000, 1002), 1000, 1002)

    def test_a_loop_is_aligned_in_time(self) -> None:
        """A long text of one segment: 3,000 characters beside 300."""
        words = said("好" * 3000).words
        tokens = timed(*(("好", 100 * n, 100 * n + 100) for n in range(300)))
        check(words, align_words(words, tokens, 0, 30_000), 0, 30_000)
        assert coverage(words, tokens) == pytest.approx(0.1)

    @given(
        st.text("你好ab12 ，.", max_size=20),
        st.lists(
            st.tuples(st.sampled_from(["你", "好", "ab", "b", "12", "，"]), st.integers(0, 400)),
            max_size=8,
        ),
        st.integers(0, 300),
        st.integers(0, 500),
    )
    def test_any_texts(
        self, text: str, heard: list[tuple[str, int]], start: int, length: int
    ) -> None:
        words = said(text).words
        tokens = [
            Token(piece, place, place + 30, 1.0)
            for piece, place in zip(
                [piece for piece, _ in heard], sorted(place for _, place in heard), strict=True
            )
        ]
        result = align_words(words, tokens, start, start + length)
        check(words, result, start, start + length)

    @given(st.text("ab你好", max_size=12), st.text("ab你好", max_size=12))
    def test_as_few_edits_as_possible(self, left: str, right: str) -> None:
        """What is in common lies between the bounds that the number of edits allows."""
        words = said(left).words
        tokens = [Token(char, place, place + 1, 1.0) for place, char in enumerate(right)]
        common = round(coverage(words, tokens) * len(left))
        # max(n, m) - edits <= common: of the aligned columns all but the edits are matches.
        assert max(len(left), len(right)) - edits(left, right) <= common
        assert common <= (len(left) + len(right) - edits(left, right)) / 2

    def test_most_in_common_of_the_fewest_edits(self) -> None:
        """Replacing two characters costs as much as leaving one out and putting one in."""
        assert coverage(said("也好").words, timed(("好", 0, 100), ("吗", 100, 200))) == 0.5

    @given(st.lists(st.sampled_from(["你", "hello", "好", "12"]), min_size=1, max_size=12))
    def test_its_own_times_come_back(self, pieces: list[str]) -> None:
        tokens = [Token(piece, 100 * n, 100 * n + 80, 1.0) for n, piece in enumerate(pieces)]
        words = [Word(piece + "。", 0.5) for piece in pieces]
        assert times(align_words(words, tokens, 0, 100 * len(pieces))) == [
            (token.text + "。", token.start, token.end) for token in tokens
        ]


def labels_of(text: str, cuts: Sequence[int], frames: Sequence[int]) -> Iterator[LabelSpan]:
    """The text's bytes cut into labels, each said in one frame of 60 ms."""
    bounds = [0, *cuts, len(text.encode())]
    for (first, after), frame in zip(pairwise(bounds), frames, strict=True):
        yield LabelSpan(first, after, 60.0 * frame, 60.0 * frame + 60.0)


class TestFromCtc:
    def test_peaks_last_until_the_next_word(self) -> None:
        text = "你好 world!"
        labels = list(labels_of(text, [3, 6, 10], [2, 4, 20, 30]))
        assert times(words_from_ctc(said(text), labels, 0, 3000)) == [
            ("你", 120, 240),
            ("好", 240, 480),  # 240 ms, no longer
            ("world!", 1200, 2040),  # from ` wor` at frame 20 to `ld!` at 30
        ]

    def test_label_of_several_words(self) -> None:
        text = "你好吗"
        labels = list(labels_of(text, [6], [2, 10]))
        assert times(words_from_ctc(said(text), labels, 0, 3000)) == [
            ("你", 120, 150),
            ("好", 150, 390),
            ("吗", 600, 840),
        ]

    def test_character_in_several_labels(self) -> None:
        text = "你好"
        labels = list(labels_of(text, [1, 2, 4, 5], [2, 3, 4, 9, 10]))
        assert times(words_from_ctc(said(text), labels, 0, 3000)) == [
            ("你", 120, 270),  # the third label, 240 to 300, holds the end of one and the start
            ("好", 270, 840),  # of the other
        ]

    def test_punctuation_takes_no_time(self) -> None:
        text = "你，“好”"
        labels = list(labels_of(text, [3, 6, 9, 12], [2, 30, 31, 50, 51]))
        expected = [("你，", 120, 360), ("“好”", 3000, 3240)]
        assert times(words_from_ctc(said(text), labels, 0, 5000)) == expected
        without = [labels[0], labels[3]]
        assert times(words_from_ctc(said(text), without, 0, 5000)) == expected

    def test_word_without_a_label(self) -> None:
        text = "a b c"
        labels = [LabelSpan(0, 1, 0, 60), LabelSpan(4, 5, 600, 660)]
        assert times(words_from_ctc(said(text), labels, 0, 1000)) == [
            ("a", 0, 240),
            ("b", 240, 600),
            ("c", 600, 840),
        ]

    @given(
        st.text("你好ab12 ，.“", max_size=20), st.integers(0, 100), st.integers(0, 900), st.data()
    )
    def test_any_labels(self, text: str, start: int, length: int, data: st.DataObject) -> None:
        result = said(text)
        raw = result.text.encode()
        cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)))
        labels = []
        now = start
        for first, after in pairwise(cuts):
            now += data.draw(st.integers(0, 100))
            labels.append(LabelSpan(first, after, now, now + 60))
            now += 60
        tokens = words_from_ctc(result, labels, start, start + length)
        check(result.words, tokens, start, start + length)
