"""Texts of overlapping windows: nothing twice, nothing lost, edge errors left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, cycle, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.records import TextSegment, Token, Word
from funasr_batch.text.join import TextWindow, join_segments, join_windows
from funasr_batch.text.nano_words import clean_text, word_spans
from funasr_batch.text.tokens import join_texts

Timed = tuple[str, int, int]


def window(start: int, end: int, *tokens: Timed) -> TextWindow:
    return TextWindow(start, end, tuple(Token(text, a, b, 0.9) for text, a, b in tokens))


def spoken(text: str, start: int, step: int = 200) -> list[Timed]:
    """Characters, or words where there are spaces, one every `step` ms."""
    words = text.split() if " " in text else list(text)
    return [(word, start + i * step, start + (i + 1) * step) for i, word in enumerate(words)]


def joined(*windows: TextWindow) -> list[str]:
    return [" ".join(token.text for token in kept) for kept in join_windows(windows)]


def test_no_window_and_one_window() -> None:
    assert join_windows([]) == []
    only = window(0, 20_000, *spoken("你好", 100))
    assert join_windows([only]) == [only.tokens]


def test_windows_without_overlap_keep_everything() -> None:
    left = window(0, 2_000, *spoken("好好", 1_600))
    right = window(2_000, 4_000, *spoken("好好", 2_000))
    assert joined(left, right) == ["好 好", "好 好"]


def test_agreed_text_is_handed_over_near_the_middle() -> None:
    left = window(0, 20_000, *spoken("今天天气真不错我们去公园", 17_600))
    right = window(18_000, 38_000, *spoken("天气真不错我们去公园玩吧", 18_000))
    assert joined(left, right) == ["今 天 天 气 真 不 错", "我 们 去 公 园 玩 吧"]


def test_words_cut_by_an_edge_are_read_from_the_other_window() -> None:
    left = window(0, 20_000, *spoken("we are going to the part", 17_400, 430))
    right = window(18_000, 38_000, *spoken("hour going to the park tomorrow", 18_000, 430))
    assert " ".join(joined(left, right)) == "we are going to the park tomorrow"


@pytest.mark.parametrize(("ours", "theirs"), [("ＯK", "ok"), ("don't", "dont"), ("停，", "停")])
def test_case_width_and_punctuation_do_not_hide_agreement(ours: str, theirs: str) -> None:
    """Taken for two words, both would stay: they lie on different sides of the middle."""
    left = window(0, 20_000, (ours, 18_800, 18_990))
    right = window(18_000, 38_000, (theirs, 19_000, 19_180))
    assert joined(left, right) == [ours, ""]


def test_agreement_at_an_edge_proves_nothing() -> None:
    """The left window misheard 丙 at its edge as the word that comes next."""
    left = window(0, 20_000, ("甲", 18_050, 18_250), ("丁", 19_720, 19_920))
    right = window(18_000, 38_000, ("丙", 19_720, 19_920), ("丁", 19_930, 20_100))
    assert joined(left, right) == ["甲", "丙 丁"]


def test_a_long_agreement_counts_more_than_a_single_word_in_the_middle() -> None:
    same = spoken("一二三", 18_300)
    left = window(0, 20_000, *same, ("的", 18_920, 19_020), ("人", 19_100, 19_200))
    right = window(18_000, 38_000, *same, ("红", 18_920, 19_020), ("的", 19_100, 19_200))
    assert joined(left, right) == ["一 二 三", "红 的"]


def test_repeated_words_are_neither_lost_nor_doubled() -> None:
    """Each window lost the repetition at its edge, so a text-only match would slide by one."""
    for word in ("哈", "no"):
        times = [(word, 18_100 + 200 * i, 18_250 + 200 * i) for i in range(9)]
        left = window(0, 20_000, *times[:8], ("x", 19_700, 19_900))
        right = window(18_000, 38_000, ("y", 18_000, 18_250), *times[1:])
        assert " ".join(joined(left, right)).split() == [word] * 9


def test_a_substitution_inside_the_overlap_does_not_stop_the_alignment() -> None:
    left = window(0, 20_000, *spoken("一二三四五六七八九", 18_000))
    right = window(18_000, 38_000, *spoken("一二三思五六七八九", 18_000))
    assert "".join(joined(left, right)).replace(" ", "") == "一二三四五六七八九"


def test_shifted_times_still_agree() -> None:
    left = window(0, 20_000, *spoken("天气真不错我们去", 18_200))
    right = window(18_000, 38_000, *spoken("天气真不错我们去", 18_320))
    assert "".join(joined(left, right)).replace(" ", "") == "天气真不错我们去"


def test_equal_words_far_apart_in_time_are_two_words() -> None:
    left = window(0, 20_000, ("好", 18_300, 18_500))
    right = window(18_000, 38_000, ("好", 19_500, 19_700))
    assert joined(left, right) == ["好", "好"]


def test_without_agreement_the_middle_decides() -> None:
    left = window(0, 20_000, *spoken("甲乙丙丁", 18_200, 400))
    right = window(18_000, 38_000, *spoken("子丑寅卯", 18_200, 400))
    assert joined(left, right) == ["甲 乙", "寅 卯"]


def test_two_readings_of_the_word_in_the_middle_give_one_word() -> None:
    early, late = (18_860, 19_060), (18_940, 19_140)
    for left_times, right_times in ((early, late), (late, early)):
        left = window(0, 20_000, ("石", *left_times))
        right = window(18_000, 38_000, ("是", *right_times))
        assert sum(map(len, join_windows([left, right]))) == 1


def test_a_window_that_heard_nothing_in_the_overlap_does_not_silence_the_other() -> None:
    words = spoken("天气真不错", 18_300)
    before, after = window(0, 20_000, ("早", 5_000, 5_200)), window(18_000, 38_000, *words)
    assert joined(before, after) == ["早", "天 气 真 不 错"]
    assert joined(window(0, 20_000), after) == ["", "天 气 真 不 错"]
    before, after = window(0, 20_000, *words), window(18_000, 38_000, ("晚", 25_000, 25_200))
    assert joined(before, after) == ["天 气 真 不 错", "晚"]


def test_an_empty_window_between_two_others() -> None:
    left, right = spoken("一二", 5_000), spoken("三四", 45_000)
    windows = window(0, 20_000, *left), window(18_000, 38_000), window(36_000, 56_000, *right)
    assert joined(*windows) == ["一 二", "", "三 四"]


def test_times_that_cross_meet() -> None:
    left = window(0, 20_000, ("我", 18_600, 18_800), ("们", 18_800, 19_200))
    right = window(18_000, 38_000, ("们", 18_760, 19_100), ("去", 19_100, 19_300))
    (kept_left, kept_right) = join_windows([left, right])
    assert [(t.text, t.start, t.end) for t in kept_left + kept_right] == [
        ("我", 18_600, 18_800),
        ("们", 18_800, 19_150),
        ("去", 19_150, 19_300),
    ]


# --- whole segments, and words without times ---------------------------------------------------


def untimed(start: int, end: int, text: str) -> TextSegment:
    """A window as Nano gives it where the times of words are not measured."""
    assert clean_text(text) == text
    words = tuple(Word(text[a:b], 0.9) for a, b in word_spans(text))
    return TextSegment(0, start, end, text, "vad", words=words)


def timed(start: int, end: int, text: str, first_at: int) -> TextSegment:
    """The same with a word every 180 ms from `first_at` on."""
    tokens = tuple(
        Token(text[a:b], first_at + 180 * i, first_at + 180 * (i + 1), 0.9)
        for i, (a, b) in enumerate(word_spans(text))
    )
    return TextSegment(0, start, end, text, "ctc", tokens=tokens)


def texts(*segments: TextSegment) -> list[str]:
    joined = join_segments(segments)
    for before, after in zip(segments, joined, strict=True):
        assert after == replace(before, text=after.text, tokens=after.tokens, words=after.words)
        assert bool(after.words) <= bool(before.words)
        assert bool(after.tokens) <= bool(before.tokens)
        said = "".join(word.text for word in (*after.words, *after.tokens))
        assert said == after.text.replace(" ", "")
    return [segment.text for segment in joined]


LEFT = "昨天我们去了公园，今天天气真不错，我们还去公园"
RIGHT = "天气真不错。我们还去公园玩吧，明天在家休息"


def test_words_without_times_are_joined_by_what_both_windows_say() -> None:
    left, right = untimed(0, 6_000, LEFT), untimed(4_000, 10_000, RIGHT)
    assert texts(left, right) == [
        "昨天我们去了公园，今天天气真不错，我",
        "们还去公园玩吧，明天在家休息",
    ]


@pytest.mark.parametrize("kinds", ["tt", "tu", "ut"])
def test_times_or_not_the_text_is_the_same(kinds: str) -> None:
    left = timed(0, 6_000, LEFT, 2_200) if kinds[0] == "t" else untimed(0, 6_000, LEFT)
    right = timed(4_000, 10_000, RIGHT, 4_000) if kinds[1] == "t" else untimed(4_000, 10_000, RIGHT)
    assert "".join(texts(left, right)).replace("。", "，") == (
        "昨天我们去了公园，今天天气真不错，我们还去公园玩吧，明天在家休息"
    )


def test_each_window_keeps_its_own_spaces_capitals_and_marks() -> None:
    left = untimed(0, 6_000, '我用 Python 写了3 行代码, and it works: "Hello, World" she sa')
    right = untimed(4_000, 10_000, 'and it works: "hello, world" she said (twice) 对吧？')
    assert texts(left, right) == [
        "我用 Python 写了3 行代码, and it works:",
        '"hello, world" she said (twice) 对吧？',
    ]


def test_a_timed_text_keeps_its_spelling_too() -> None:
    segment = timed(0, 6_000, "写了 3 行 code ，好。", 100)
    assert texts(segment, untimed(5_000, 9_000, "")) == ["写了 3 行 code ，好。", ""]


def test_a_single_common_word_is_no_agreement() -> None:
    """的 is in both overlaps, but the texts have nothing else in common there."""
    left = untimed(0, 8_000, "甲乙丙丁戊己庚辛壬癸子的寅卯辰巳")
    right = untimed(6_000, 14_000, "金木的火土日月星云风雨雷电山水石")
    # A quarter of either is shared: four words, of which each window keeps two.
    assert texts(left, right) == ["甲乙丙丁戊己庚辛壬癸子的寅卯", "的火土日月星云风雨雷电山水石"]


def test_a_refrain_is_joined_where_the_overlap_is() -> None:
    """The same line is said three times; only one of them is in both windows."""
    line = "la la hey you "
    left = untimed(0, 12_000, f"{line}one two three {line}four five".strip())
    right = untimed(8_000, 20_000, f"{line}four five six seven {line}eight".strip())
    assert join_texts(texts(left, right)) == (
        "la la hey you one two three la la hey you four five six seven la la hey you eight"
    )


def test_a_window_without_words_takes_nothing_away() -> None:
    windows = untimed(0, 6_000, LEFT), untimed(4_000, 10_000, ""), untimed(8_000, 14_000, RIGHT)
    assert texts(*windows) == [LEFT, "", RIGHT]
    assert texts() == []


# --- properties --------------------------------------------------------------------------------

WINDOW_MS, OVERLAP_MS, EDGE_MS = 6_000, 2_000, 300
words = st.sampled_from("的了是我你好哈不") | st.sampled_from(["no", "yes", "ok"])


@st.composite
def speech(draw: st.DrawFn) -> list[Token]:
    """Up to half a minute of tokens of 80 to 700 ms with pauses; few words, so many repeats."""
    parts = draw(
        st.lists(
            st.tuples(
                words,
                st.integers(80, 250) | st.integers(250, 700),
                st.just(20) | st.just(20) | st.integers(20, 2_500),
            ),
            max_size=80,
        )
    )
    starts = accumulate((length + pause for _, length, pause in parts), initial=0)
    return [
        Token(text, start, start + length, 1.0)
        for start, (text, length, _) in zip(starts, parts, strict=False)
        if start + length < 30_000
    ]


def heard(token: Token, start: int, end: int, misheard: str | None) -> Token:
    """The token as the window [start, end) has it: right inside it, maybe not near its edges."""
    cut = replace(token, start=max(token.start, start), end=min(token.end, end))
    is_inside = token.start >= start + EDGE_MS and token.end <= end - EDGE_MS
    is_end_of_recording = (start == 0 and token.start < EDGE_MS) or end >= 30_000
    if is_inside or is_end_of_recording or misheard is None:
        return cut
    return replace(cut, text=misheard)


@st.composite
def windows_of(draw: st.DrawFn, tokens: list[Token]) -> list[TextWindow]:
    errors = cycle(draw(st.lists(st.none() | words, min_size=1, max_size=20)))
    windows = []
    for start in range(0, 30_000, WINDOW_MS - OVERLAP_MS):
        end = start + WINDOW_MS
        near = [token for token in tokens if token.end > start and token.start < end]
        readings = [heard(token, start, end, next(errors)) for token in near]
        windows.append(TextWindow(start, end, tuple(readings)))
    return windows


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_of_a_text_join_to_the_text(data: st.DataObject) -> None:
    """Even though each window may mishear, as any other word, what is within 300 ms of its edge."""
    tokens = data.draw(speech())
    kept = join_windows(data.draw(windows_of(tokens)))
    result = [token for part in kept for token in part]
    assert [token.text for token in result] == [token.text for token in tokens]
    assert all(a.end <= b.start for a, b in pairwise(result))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_jitter_of_one_cif_frame_changes_no_word(data: st.DataObject) -> None:
    tokens = [token for token in data.draw(speech()) if token.end - token.start >= 120]
    shifted = []
    for index, part in enumerate(data.draw(windows_of(tokens))):
        by = 60 if index % 2 else 0
        moved = tuple(replace(t, start=t.start + by, end=t.end + by) for t in part.tokens)
        shifted.append(replace(part, tokens=moved))
    result = [token for part in join_windows(shifted) for token in part]
    assert [token.text for token in result] == [token.text for token in tokens]
    assert all(a.start <= a.end <= b.start for a, b in pairwise(result))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input_keeps_stretches_of_each_window(data: st.DataObject) -> None:
    windows = [
        TextWindow(start, start + WINDOW_MS, tuple(data.draw(speech())))
        for start in range(0, 12_000, WINDOW_MS - OVERLAP_MS)
    ]
    for source, kept in zip(windows, join_windows(windows), strict=True):
        texts = [token.text for token in source.tokens]
        found = [token.text for token in kept]
        assert any(texts[i : i + len(found)] == found for i in range(len(texts) + 1))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_untimed_windows_of_a_text_join_to_the_text(data: st.DataObject) -> None:
    """At the pace of speech, though each window mishears the words that its edges cut."""
    lengths = data.draw(st.lists(st.integers(200, 450), min_size=1, max_size=60))
    starts = list(accumulate(lengths, initial=0))
    said = [f"w{number % 37}" for number in range(len(lengths))]
    end = starts[-1]
    segments = []
    for start in range(0, max(end - OVERLAP_MS, 1), WINDOW_MS - OVERLAP_MS):
        stop = min(start + WINDOW_MS, end)
        heard = []
        for word, a, b in zip(said, starts, starts[1:], strict=False):
            if b > start and a < stop:
                whole = a >= start and b <= stop
                heard.append(word if whole else data.draw(st.sampled_from([word, "uh", "w1"])))
        segments.append(untimed(start, stop, " ".join(heard)))
    assert join_texts(texts(*segments)) == " ".join(said)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(words, max_size=12), min_size=2, max_size=4), st.booleans())
def test_any_untimed_words_keep_stretches_of_each_window(
    parts: list[list[str]], spaced: bool
) -> None:
    segments = [
        untimed(4_000 * number, 4_000 * number + WINDOW_MS, (" " if spaced else "").join(part))
        for number, part in enumerate(parts)
    ]
    for before, after in zip(segments, texts(*segments), strict=True):
        assert after in before.text
