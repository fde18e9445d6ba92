import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.records import Cue, TextSegment, Token
from funasr_batch.text.cues import (
    BBC,
    NETFLIX_EN,
    NETFLIX_ZH,
    PLAIN,
    STYLES,
    CueStyle,
    layout,
    style_for,
)
from funasr_batch.text.tokens import is_cjk, render_text


def spoken(words: list[str], *, start: int = 0, each: int = 250, text: str | None = None):
    """A segment whose words last `each` ms; a number among them is a pause."""
    tokens, now = [], start
    for word in words:
        if word.isdigit():
            now += int(word)
            continue
        tokens.append(Token(word, now, now + each, 0.9))
        now += each
    return TextSegment(0, start, now, text or render_text(tokens), "cif", tuple(tokens))


def untimed(text: str, start: int, end: int) -> TextSegment:
    return TextSegment(0, start, end, text, "vad")


def texts(cues: tuple[Cue, ...]) -> list[str]:
    return ["/".join(cue.lines) for cue in cues]


ENGLISH = "we walked along the river and talked about the weather until it began to rain"
CHINESE = list("今天的天气非常好所以我们决定一起去公园里走一走")


def test_a_short_sentence_is_one_cue_shown_long_enough_to_read() -> None:
    (cue,) = layout([spoken(["你", "好"])], NETFLIX_ZH)
    assert cue == Cue(0, 833, ("你好",))


def test_sentences_become_cues_of_their_own() -> None:
    text = "We are ready to begin. Please take your seats."
    segment = spoken(text.lower().replace(".", "").split(), text=text)
    assert texts(layout([segment], NETFLIX_EN)) == [
        "We are ready to begin.",
        "Please take your seats.",
    ]


def test_a_pause_is_where_a_cue_ends() -> None:
    words = [*CHINESE[:9], "700", *CHINESE[9:]]
    assert texts(layout([spoken(words)], NETFLIX_ZH))[0] == "今天的天气非常好所"


def test_a_cue_never_goes_on_across_a_second_of_silence() -> None:
    cues = layout([spoken(["one", "1000", "two"]), spoken(["three"], start=3000)], NETFLIX_EN)
    assert texts(cues) == ["one", "two", "three"]


def test_short_neighbouring_segments_share_a_cue() -> None:
    cues = layout([spoken(["yes"]), spoken(["of", "course"], start=350)], NETFLIX_EN)
    assert texts(cues) == ["yes of course"]


def test_a_sentence_too_short_to_read_shares_the_cue_of_the_next() -> None:
    text = "Oh. I have, actually."
    cues = layout([spoken(["oh", "i", "have", "actually"], text=text)], NETFLIX_EN)
    assert texts(cues) == [text]


@pytest.mark.parametrize(("each", "cues"), [(50, 1), (250, 2)])
def test_a_burst_shares_the_time_of_the_slow_sentence_after_it(each: int, cues: int) -> None:
    words = CHINESE[:19]
    first = spoken(words, each=each, text="".join(words) + "。")
    slow = spoken(list("你要来吗"), start=first.end, each=400)
    assert len(layout([first, slow], NETFLIX_ZH)) == cues


def test_cues_without_a_better_place_to_break_are_evened_out() -> None:
    cues = layout([spoken(["字"] * 36, each=150)], NETFLIX_ZH)
    assert [sum(map(len, cue.lines)) for cue in cues] == [18, 18]


def test_lines_do_not_end_with_a_word_that_leans_on_the_next() -> None:
    (cue,) = layout([spoken(ENGLISH.split())], NETFLIX_EN)
    assert len(cue.lines) == 2
    assert cue.lines[0].split()[-1] in {"river", "talked", "weather"}
    assert abs(len(cue.lines[0]) - len(cue.lines[1])) <= 12


def test_a_chinese_particle_does_not_begin_a_line() -> None:
    (cue,) = layout([spoken(list("我昨天在书店里面看到了一本很有意思的书"))], NETFLIX_ZH)
    assert len(cue.lines) == 2
    assert cue.lines[1][0] not in "了的"


def test_chinese_is_measured_by_display_width() -> None:
    assert NETFLIX_ZH.width("今天ab，") == 4
    assert NETFLIX_EN.width("abc é") == 5
    assert NETFLIX_EN.width("e\u0301") == 1


def test_words_and_numbers_stay_whole() -> None:
    digits = spoken(["一", "九", "a", "b", "extraordinarily"])
    narrow = dataclasses.replace(NETFLIX_ZH, max_line_width=2, max_line_count=1)
    lines = texts(layout([digits], narrow))
    assert "extraordinarily" in lines
    tokens = tuple(Token(digit, 200 * n, 200 * n + 200, 0.9) for n, digit in enumerate("1984"))
    year = TextSegment(0, 0, 1200, "1984年", "cif", (*tokens, Token("年", 800, 1000, 0.9)))
    assert texts(layout([year], narrow)) == ["1984", "年"]


def test_punctuation_stays_with_its_word() -> None:
    segment = spoken(list("他说你好然后走了"), text="他说：“你好。”然后走了！")
    narrow = dataclasses.replace(NETFLIX_ZH, max_line_width=4, max_line_count=1)
    lines = texts(layout([segment], narrow))
    assert "".join(lines) == "他说：“你好。”然后走了！"
    assert not any(line[0] in "：。”！" for line in lines)
    assert not any(line[-1] == "“" for line in lines)


def test_times_are_those_of_the_tokens_under_punctuation_and_capitals() -> None:
    segment = spoken(["hello", "300", "world"], start=5000, text="Hello, World!")
    (cue,) = layout([segment], dataclasses.replace(PLAIN, max_duration_ms=60_000))
    assert cue == Cue(5000, 5800, ("Hello, World!",))


@pytest.mark.parametrize(
    ("style", "pause", "end"),
    [
        (NETFLIX_ZH, 0, 2917),  # two frames, at the cost of the speech
        (NETFLIX_ZH, 500, 3417),  # chained
        (NETFLIX_ZH, 501, 3000),  # left open
        (BBC, 0, 3000),
        (BBC, 900, 3900),
        (PLAIN, 0, 3000),
        (PLAIN, 500, 3000),
    ],
)
def test_gaps_are_closed_or_left_as_the_style_says(style: CueStyle, pause: int, end: int) -> None:
    first = spoken(CHINESE[:12], text="".join(CHINESE[:12]) + "。")
    cues = layout([first, spoken(CHINESE[12:], start=3000 + pause)], style)
    assert [cue.start for cue in cues] == [0, 3000 + pause]
    assert cues[0].end == end


def test_fast_speech_lingers_at_most_half_a_second_and_keeps_every_word() -> None:
    fast = spoken(CHINESE, each=60)
    cues = layout([fast, spoken(["好"], start=20_000)], NETFLIX_ZH)
    assert "".join(texts(cues)).replace("/", "") == "".join(CHINESE) + "好"
    assert cues[-2].end == fast.end + 500


def test_a_cue_is_not_shown_longer_than_the_maximum() -> None:
    (cue,) = layout([untimed("嗯", 1000, 30_000)], NETFLIX_ZH)
    assert cue == Cue(1000, 8000, ("嗯",))


def test_cues_of_the_same_instant_are_shown_one_after_the_other() -> None:
    cues = layout([untimed("a", 0, 0), untimed("b", 0, 0), untimed("c", 0, 0)], PLAIN)
    assert cues == (Cue(0, 1, ("a",)), Cue(1, 2, ("b",)), Cue(2, 3, ("c",)))


def test_a_segment_without_token_times_is_one_cue_if_it_fits() -> None:
    segments = [untimed("好。可以。", 0, 2000), untimed("走吧", 2000, 3000)]
    cues = layout(segments, NETFLIX_ZH)
    assert [(cue.start, cue.lines) for cue in cues] == [(0, ("好。可以。",)), (2000, ("走吧",))]


def test_a_longer_one_shares_its_span_by_length_of_text() -> None:
    text = "".join(CHINESE) * 2
    cues = layout([untimed(text, 10_000, 20_000)], NETFLIX_ZH)
    assert "".join(texts(cues)).replace("/", "") == text
    for cue, following in itertools.pairwise(cues):
        share = sum(map(len, cue.lines)) / len(text) * 10_000
        assert following.start - cue.start == pytest.approx(share, abs=2)
    assert cues[0].start == 10_000
    assert cues[-1].end <= 20_000 + 500


def test_tokens_that_are_not_the_text_do_not_lose_the_text() -> None:
    segment = dataclasses.replace(spoken(["hello", "world"]), text="goodbye world")
    assert texts(layout([segment], NETFLIX_EN)) == ["goodbye world"]


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("今天天气很好", NETFLIX_ZH),
        ("今天我们讨论 machine learning framework", NETFLIX_ZH),
        ("the word 好 means good", NETFLIX_EN),
        ("hello", NETFLIX_EN),
        ("", NETFLIX_EN),
    ],
)
def test_the_style_follows_the_script(text: str, style: CueStyle) -> None:
    assert style_for(text) is style


def test_styles_by_name() -> None:
    assert {name: style.max_line_width for name, style in STYLES.items()} == {
        "netflix-zh": 16,
        "netflix-en": 42,
        "bbc": 37,
        "plain": 42,
    }
    assert all(style.name == name for name, style in STYLES.items())
    assert BBC.min_gap_ms == 0


def test_nothing_gives_nothing() -> None:
    assert layout([], NETFLIX_ZH) == ()
    assert layout([untimed("  ", 0, 1000)], NETFLIX_ZH) == ()


# --- Whatever is said

WORDS = st.sampled_from(
    ["今", "天", "的", "好", "hello", "the", "a", "extraordinarily", "1", "9", "it's", "café"]
)
MARKS = st.sampled_from(["", "", "", "，", "。", ",", ".", "?", " ", " “", "》"])


@st.composite
def transcripts(draw: st.DrawFn) -> list[TextSegment]:
    segments, now = [], draw(st.integers(0, 2000))
    for number in range(draw(st.integers(0, 4))):
        now += draw(st.sampled_from([0, 40, 300, 900, 5000]))
        start = now
        tokens = []
        for word in draw(st.lists(WORDS, max_size=40)):
            length = draw(st.sampled_from([1, 60, 200, 500]))
            tokens.append(Token(word, now, now + length, 0.5))
            now += length + draw(st.sampled_from([0, 0, 0, 150, 600, 1500]))
        kind = draw(st.sampled_from(["as spoken", "punctuated", "vad"]))
        text = render_text(tokens)
        if kind == "punctuated":
            text = "".join(f"{draw(MARKS)} {token.text.capitalize()}" for token in tokens)
        if kind == "vad":
            segments.append(TextSegment(number, start, now, text, "vad"))
        else:
            segments.append(TextSegment(number, start, now, text, "cif", tuple(tokens)))
    return segments


@st.composite
def styles(draw: st.DrawFn) -> CueStyle:
    style = draw(st.sampled_from(list(STYLES.values())))
    return dataclasses.replace(
        style,
        max_line_width=draw(st.sampled_from([1, 5, style.max_line_width])),
        max_line_count=draw(st.integers(1, 3)),
        max_cps=draw(st.sampled_from([5, style.max_cps])),
        min_duration_ms=draw(st.sampled_from([1, style.min_duration_ms])),
        min_gap_ms=draw(st.sampled_from([0, 83, 400])),
    )


def letters(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=200, deadline=None)
@given(transcripts(), styles())
def test_invariants(segments: list[TextSegment], style: CueStyle) -> None:
    cues = layout(segments, style)

    shown = "".join(line for cue in cues for line in cue.lines)
    assert letters(shown) == letters("".join(segment.text for segment in segments))

    assert all(cue.start < cue.end <= cue.start + style.max_duration_ms for cue in cues)
    for cue, following in itertools.pairwise(cues):
        room = following.start - cue.start
        assert following.start - cue.end >= min(style.min_gap_ms, room // 2)

    for cue in cues:
        assert 1 <= len(cue.lines) <= style.max_line_count
        for line in cue.lines:
            assert line == line.strip()
            assert style.width(line) <= style.max_line_width or is_single_unit(line)


def is_single_unit(line: str) -> bool:
    """One word, number or Chinese character, with punctuation."""
    words = re.sub(r"[^\w\s]", "", line).split()
    return len(words) == 1 and (len(words[0]) == 1 or not any(map(is_cjk, words[0])))


@settings(max_examples=200, deadline=None)
@given(transcripts(), styles())
def test_a_cue_begins_with_its_first_token_and_covers_its_speech(
    segments: list[TextSegment], style: CueStyle
) -> None:
    """One character per token, so that characters lead back from a cue to its tokens."""
    tokens = [
        Token("字", token.start, token.end, token.confidence)
        for segment in segments
        for token in segment.tokens
    ]
    if not tokens:
        return
    segment = TextSegment(
        0, tokens[0].start, tokens[-1].end, "字" * len(tokens), "cif", tuple(tokens)
    )
    remaining = iter(tokens)
    for cue in layout([segment], style):
        said = list(itertools.islice(remaining, sum(map(len, cue.lines))))
        assert cue.start == said[0].start
        if len(said) > 1:
            assert said[-1].end - cue.start <= style.max_duration_ms
        lingering = max(said[-1].end + style.linger_ms, cue.start + style.min_duration_ms)
        assert cue.end <= lingering + max(style.chain_gap_ms, style.min_gap_ms)
        assert cue.end >= min(said[-1].end, cue.start + (said[-1].end - cue.start) // 2)


def test_an_unbroken_hour_is_cut_between_characters() -> None:
    unbroken = spoken(CHINESE * 600)
    cues = layout([unbroken], NETFLIX_ZH)
    assert "".join(line for cue in cues for line in cue.lines) == unbroken.text
    assert all(cue.start % 250 == 0 for cue in cues)
    widths = [sum(map(len, cue.lines)) for cue in cues]
    assert 16 < sum(widths) / len(widths) <= 28  # full, within seven seconds
