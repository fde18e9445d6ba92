from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.lint import MEANINGS, RULES, check, count_by_rule
from funasr_batch.lint_reader import Rule, SubtitleFormat, Violation, read_subtitles
from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript
from funasr_batch.text.cues import BBC, NETFLIX_EN, NETFLIX_ZH, PLAIN, CueStyle, style_for
from funasr_batch.writers import WriterOptions, write


def lint(
    text: str | bytes, format: SubtitleFormat = "srt", style: CueStyle | None = None
) -> list[Violation]:
    content = text if isinstance(text, bytes) else text.encode()
    return check(read_subtitles(content, format), lambda said: style or style_for(said))


def rules(
    text: str | bytes, format: SubtitleFormat = "srt", style: CueStyle | None = None
) -> list[tuple[Rule, int]]:
    return [(violation.rule, violation.line) for violation in lint(text, format, style)]


def srt(*cues: tuple[float, float, str]) -> str:
    return "".join(
        f"{number}\n{clock(start)} --> {clock(end)}\n{text}\n\n"
        for number, (start, end, text) in enumerate(cues, start=1)
    )


def clock(seconds: float) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{milliseconds:03d}"


GOOD = srt((1, 3, "Hello there."), (3.083, 5, "你好，\n世界。"), (6, 8, "Bye."))


def test_a_good_file_has_no_violations() -> None:
    assert rules(GOOD) == []
    assert rules(GOOD.replace("\n", "\r\n")) == []
    assert rules("WEBVTT\n\n" + GOOD.replace(",", "."), "vtt") == []
    assert rules("") == []
    assert rules("WEBVTT", "vtt") == []


def test_every_rule_has_a_meaning() -> None:
    assert set(MEANINGS) == set(RULES)


@pytest.mark.parametrize(
    ("cue", "found"),
    [
        ((0, 5, "x" * 42), []),
        ((0, 5, "x" * 43), ["width"]),
        ((0, 5, "好" * 16), []),
        ((0, 5, "好" * 16 + "a"), ["width"]),
        ((0, 5, "好" * 16 + "\n" + "好" * 17), ["width"]),
        ((0, 5, "one\ntwo"), []),
        ((0, 5, "one\ntwo\nthree"), ["lines"]),
        ((0, 2, "x" * 40), []),
        ((0, 2, "x" * 41), ["speed"]),
        ((0, 1, "好" * 9), []),
        ((0, 1, "好" * 10), ["speed"]),
        ((0, 0.833, "Yes."), []),
        ((0, 0.8, "Yes."), ["short"]),
        ((0, 7, "Well."), []),
        ((0, 7.1, "Well."), ["long"]),
        ((0, 2, ""), ["empty"]),
        ((0, 2, "<i></i>"), ["empty"]),
        ((0, 2, "\u200b"), ["empty"]),
        ((2, 2, "Now."), ["time"]),
        ((3, 2, "Now."), ["time"]),
    ],
)
def test_rules_of_one_cue(cue: tuple[float, float, str], found: list[Rule]) -> None:
    assert [rule for rule, _ in rules(srt(cue))] == found


@pytest.mark.parametrize(
    ("next_start", "found"),
    [
        (3.083, []),
        (3.05, ["gap"]),
        (3.0, ["gap"]),
        (2.5, ["overlap"]),
        (0.5, ["order"]),
        (3.3, ["chain"]),
        (3.5, ["chain"]),
        (3.501, []),
    ],
)
def test_rules_between_cues(next_start: float, found: list[Rule]) -> None:
    text = srt((1, 3, "One."), (next_start, next_start + 2, "Two."))
    assert [rule for rule, _ in rules(text)] == found


def test_a_gap_is_not_to_be_closed_when_that_would_show_a_cue_too_long() -> None:
    assert rules(srt((0, 6.9, "One."), (7.2, 9, "Two."))) == []


def test_the_style_decides() -> None:
    text = srt((0, 1, "x" * 40), (1, 3, "Two."))
    assert count_by_rule(lint(text, style=NETFLIX_EN)) == {"speed": 1, "gap": 1}
    assert count_by_rule(lint(text, style=BBC)) == {"width": 1, "speed": 1}
    assert count_by_rule(lint(text, style=PLAIN)) == {}


def test_tags_escapes_and_what_has_no_width_do_not_count() -> None:
    seen = "<i>" + "x" * 40 + "</i> {\\an8}\u200b\u200e-"
    assert rules(srt((0, 5, seen))) == []
    file = "WEBVTT\n\n00:01.000 --> 00:06.000 line:0\n<v Ann><00:02.000><c.x>a &lt; b</c>\n"
    [cue] = read_subtitles(file.encode(), "vtt").cues
    assert (cue.start, cue.end, cue.lines) == (1000, 6000, ("a < b",))


def test_where_a_violation_is_and_what_it_says() -> None:
    [first, second] = lint(srt((0, 5, "fine"), (6, 7, "好" * 17), (8, 10, "fine")))
    assert first == Violation("width", 6, 2, "a line of 17; at most 16 in netflix-zh")
    assert second == Violation("speed", 6, 2, "17.0 characters a second; at most 9 in netflix-zh")


# --- The file's form


def test_numbers() -> None:
    assert rules(GOOD.replace("2\n00", "7\n00").replace("3\n00", "8\n00")) == [("number", 6)]
    assert rules(GOOD.replace("1\n00", "0\n00", 1)) == [("number", 2), ("number", 6)]
    without = GOOD.replace("2\n00", "00")
    assert [violation.message for violation in lint(without)] == ["no number; 2 is next"]


def test_byte_order_mark_and_encodings() -> None:
    assert rules(b"\xef\xbb\xbf" + GOOD.encode()) == [("bom", 1)]
    assert rules(GOOD.encode("utf-16")) == [("encoding", 1)]
    [fault] = lint(GOOD.encode("gb18030"))
    assert (fault.rule, fault.line) == ("encoding", 7)
    assert "gb18030" in fault.message
    assert [cue.lines for cue in read_subtitles(GOOD.encode("gb18030"), "srt").cues][1] == (
        "你好，",
        "世界。",
    )


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("0:00:01,000 --> 00:00:03,000", 1000),
        ("00:00:01.000 --> 00:00:03.000", 1000),
        ("00:00:01,5 --> 00:00:03,0", 1500),
        ("00:01,000 --> 00:03,000", 1000),
        ("00:00:01,000-->00:00:03,000", 1000),
        ("00:00:01,000 --> 00:00:03,000 X1:0", 1000),
        ("00:00:61,000 --> 00:01:03,000", 61_000),
        ("00:00:01 --> 00:00:03", None),
        ("soon --> later", None),
        (f"{'9' * 5000}:00:01,000 --> 00:00:03,000", None),
    ],
)
def test_times_that_are_written_otherwise(line: str, start: int | None) -> None:
    content = f"1\n{line}\nWell then.\n"
    assert rules(content) == [("time", 2)]
    [cue] = read_subtitles(content.encode(), "srt").cues
    assert (cue.start, cue.lines) == (start, ("Well then.",))


def test_text_where_no_cue_is() -> None:
    assert rules("Translated by me\n\n" + GOOD) == [("stray", 1)]
    assert rules("1\n00:00:01,000 --> 00:00:03,000\none\n\ntwo\n") == [("stray", 5)]
    assert rules("1\n00:00:01,000 --> 00:00:03,000\na --> b\n") == []


def test_webvtt_blocks_and_header() -> None:
    cue = "intro\n00:01.000 --> 00:03.000\nOne.\n"
    blocks = "\n\nSTYLE\n::cue { color: red }\n\nNOTE a --> b\n\n"
    assert rules(f"WEBVTT a title{blocks}{cue}\nNOTE\nmore\nlines\n", "vtt") == []
    assert rules(cue, "vtt") == [("header", 1)]
    assert rules(f"WEBVTTX\n\n{cue}", "vtt") == [("header", 1)]


@given(st.lists(st.sampled_from(["1", "", "00:00:01,000 --> 00:00:02,000", "-->", "x", "\ufeff"])))
def test_no_file_breaks_the_reader(lines: list[str]) -> None:
    content = "\n".join(lines).encode()
    for format in ("srt", "vtt"):
        file = read_subtitles(content, format)
        assert len(file.cues) >= sum(line.startswith("00") for line in lines)
        for violation in check(file, style_for):
            assert 1 <= violation.line <= len(lines) + 1


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    check(read_subtitles(content, "srt"), style_for)
    check(read_subtitles(content, "vtt"), style_for)


# --- What we write


def transcript(*segments: TextSegment) -> Transcript:
    return Transcript(
        source=SourceInfo("/recordings/x.wav", "ab" * 32, 60.0, 16000, 1),
        model=ModelInfo("paraformer", None, "cd" * 32),
        settings_digest="ef" * 32,
        language="zh",
        segments=segments,
        status="done",
    )


def slow_speech(*words: str, spacing: int) -> Transcript:
    tokens = tuple(
        Token(word, spacing * n, spacing * n + spacing - 20, 0.9) for n, word in enumerate(words)
    )
    segment = TextSegment(0, 0, tokens[-1].end, " ".join(words), "cif", tokens)
    return transcript(segment)


@pytest.mark.parametrize("format", ["srt", "vtt"])
@pytest.mark.parametrize("style", [NETFLIX_EN, NETFLIX_ZH, BBC, PLAIN], ids=lambda s: s.name)
def test_slow_speech_is_written_without_violations(format: SubtitleFormat, style: CueStyle) -> None:
    words = ("apples", "and", "pears", "are", "green,", "but", "cherries", "red.") * 12
    told = slow_speech(*words, spacing=600)
    content = write(told, format, WriterOptions(style=style))
    assert len(read_subtitles(content, format).cues) > 10
    assert lint(content, format, style) == []


def test_fast_speech_is_a_violation_of_speed_and_nothing_is_dropped() -> None:
    told = slow_speech(*("words",) * 60, spacing=100)
    content = write(told, "srt", WriterOptions(style=NETFLIX_EN))
    assert "speed" in count_by_rule(lint(content, style=NETFLIX_EN))
    cues = read_subtitles(content, "srt").cues
    assert " ".join(line for cue in cues for line in cue.lines).split() == ["words"] * 60


@pytest.mark.parametrize("text", ["a --> b", "00:00:01,000 --> 00:00:02,000", "{\\an8}<b>x", "12"])
def test_hostile_text_that_we_wrote_is_read_as_it_was(text: str) -> None:
    segments = (TextSegment(0, 0, 4000, text, "vad"), TextSegment(1, 5000, 7000, "after", "vad"))
    told = transcript(*segments)
    for format in ("srt", "vtt"):
        cues = read_subtitles(write(told, format, WriterOptions(style=PLAIN)), format).cues
        assert [" ".join(cue.lines) for cue in cues] == [text, "after"]


def test_a_byte_order_mark_that_was_asked_for_is_named() -> None:
    told = slow_speech("apples", "and", "pears", spacing=600)
    marked = replace(WriterOptions(), bom=True)
    assert rules(write(told, "srt", marked)) == [("bom", 1)]
