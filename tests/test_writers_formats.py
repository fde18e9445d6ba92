"""ASS and LRC, and hostile text in every format that other programs read back."""

from __future__ import annotations

import re
from dataclasses import replace

import pysubs2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript
from funasr_batch.text.cues import NETFLIX_EN, NETFLIX_ZH, PLAIN, layout
from funasr_batch.writers import WriterOptions, write, write_all

SPOKEN = TextSegment(
    0,
    500,
    1700,
    "你好, World!",
    "cif",
    (Token("你", 504, 740, 0.98), Token("好", 740, 980, 0.9), Token("world", 1006, 1700, 0.8)),
)
LATER = TextSegment(1, 6000, 8004, "再见", "vad")


def transcript(*segments: TextSegment) -> Transcript:
    return Transcript(
        source=SourceInfo("/recordings/会议.wav", "ab" * 32, 65.07, 16000, 2),
        model=ModelInfo("paraformer", None, "cd" * 32),
        settings_digest="ef" * 32,
        language="zh",
        segments=segments,
        status="done",
    )


def said(*texts: str) -> Transcript:
    """One cue each: two seconds of text, then two seconds of silence."""
    return transcript(
        *(TextSegment(n, 4000 * n, 4000 * n + 2000, text, "vad") for n, text in enumerate(texts))
    )


def events(told: Transcript, options: WriterOptions = WriterOptions(style=PLAIN)) -> list[str]:  # noqa: B008
    lines = write(told, "ass", options).decode().splitlines()
    return [line for line in lines if line.startswith("Dialogue:")]


# --- ASS


def test_ass_fills_a_cue_as_it_is_spoken() -> None:
    assert events(transcript(SPOKEN, LATER)) == [
        r"Dialogue: 0,0:00:00.50,0:00:01.70,Karaoke,,0,0,0,,{\k24}你{\k27}好, {\k69}World!",
        r"Dialogue: 0,0:00:06.00,0:00:08.00,Default,,0,0,0,,再见",
    ]


def test_ass_is_a_file_that_pysubs2_knows() -> None:
    told = pysubs2.SSAFile.from_string(write(transcript(SPOKEN, LATER), "ass").decode())
    assert told.format == "ass"
    assert set(told.styles) == {"Default", "Karaoke"}
    assert {event.style for event in told} <= set(told.styles)
    assert (told.info["PlayResX"], told.info["PlayResY"]) == ("1920", "1080")
    assert [event.plaintext for event in told] == ["你好, World!", "再见"]


@st.composite
def spoken_segments(draw: st.DrawFn) -> tuple[TextSegment, ...]:
    """Segments with the times of their tokens, some of which overlap or last no time."""
    now = 0
    segments = []
    for number in range(draw(st.integers(0, 4))):
        words = draw(st.lists(st.sampled_from(["今", "天", "word", "it's", "7"]), min_size=1))
        tokens = []
        for word in words:
            start = now + draw(st.integers(0, 400))
            now = start + draw(st.integers(0, 900))
            tokens.append(Token(word, start, now + draw(st.integers(0, 30)), 0.5))
        text = " ".join(words)
        segments.append(TextSegment(number, tokens[0].start, now + 30, text, "cif", tuple(tokens)))
    return tuple(segments)


@given(segments=spoken_segments())
def test_syllables_fill_their_cue_and_begin_when_they_are_spoken(
    segments: tuple[TextSegment, ...],
) -> None:
    told = transcript(*segments)
    cues = layout(segments, NETFLIX_ZH)
    lines = events(told, WriterOptions(style=NETFLIX_ZH))
    spoken = iter(
        token.start for segment in segments for token in segment.tokens for _ in token.text
    )
    assert len(lines) == len(cues)
    for line, cue in zip(lines, cues, strict=True):
        offset = hundredths(cue.start)
        length = max(hundredths(cue.end) - offset, 1)
        now = 0
        for duration, text in re.findall(r"\{\\k(\d+)\}([^{]*)", line):
            starts = [next(spoken) for _ in re.sub(r"\\N|\s", "", text)]
            if starts:  # not the silence before the first word
                assert len(set(starts)) == 1
                assert now == min(max(hundredths(starts[0]) - offset, 0), length)
            now += int(duration)
        assert now == length
    assert next(spoken, None) is None


def hundredths(milliseconds: int) -> int:
    return (milliseconds + 5) // 10


# --- LRC


def test_lrc_has_a_time_for_each_line_and_is_cleared_in_pauses() -> None:
    assert write(transcript(SPOKEN, LATER), "lrc", WriterOptions(style=PLAIN)).decode() == (
        "[length:01:05]\n[re:funasr-batch]\n"
        "[00:00.50]你好, World!\n[00:01.70]\n[00:06.00]再见\n[00:08.00]\n"
    )


def test_lrc_has_minutes_without_end_and_no_line_breaks() -> None:
    two_lines = "a sentence that is too long for one line, and so it has two"
    told = transcript(TextSegment(0, 6_000_000, 6_004_000, two_lines, "vad"))
    lines = write(told, "lrc", WriterOptions(style=NETFLIX_EN)).decode().splitlines()
    assert lines[2] == f"[100:00.00]{two_lines}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[00:01.00]no", "[\u200b00:01.00]no"),
        ("a <00:01.00> b", "a <\u200b00:01.00> b"),
        ("[ar:nobody]", "[\u200bar:nobody]"),
        ("x [sic] <b>", "x [sic] <b>"),
    ],
)
def test_lrc_text_is_no_tag(text: str, line: str) -> None:
    written = write(said(text), "lrc", WriterOptions(style=PLAIN)).decode()
    assert written.splitlines()[2] == f"[00:00.00]{line}"


# --- Hostile text

HOSTILE = (
    "a --> b",
    "00:00:01,000 --> x",
    "<b>bold</b> <i>x",
    r"{\an8}top {\k50}",
    r"C:\New\new\hot",
    "a & b &amp; &lt;",
    "👩‍👩‍👧 🎉 emoji",
    "שלום עולם",
    "nul\x00 and bell\x07",
    "x" * 10_000,
    "Dialogue: 0,0:00:00.00,Default,,0,0,0,,no",
    "[Events]",
    "WEBVTT NOTE",
    "one\n\n2\n\nthree",
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
@pytest.mark.parametrize("name", ["srt", "vtt", "ass"])
def test_hostile_text_reads_back_the_same(name: str, text: str) -> None:
    content = write(said("before", text, "after"), name, WriterOptions(style=PLAIN)).decode()
    read = pysubs2.SSAFile.from_string(content, format_=name, keep_html_tags=True)
    assert visible(read[0].text) == "before"
    assert visible(read[-1].text) == "after"
    assert [event.start for event in read][:2] == [0, 4000]
    back = "".join(shown(name, event.text) for event in read[1:-1])
    assert visible(back) == visible(text)
    assert "\x00" not in content


def shown(name: str, text: str) -> str:
    """What a viewer sees of a cue's raw text."""
    if name == "ass" or "New" not in text:
        text = text.replace("\\N", "\n")  # pysubs2 makes no difference in SRT and VTT
    match name:
        case "vtt":
            return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        case "ass":
            assert not re.search("[{}]", text)  # of a cue without times
            return text.translate(str.maketrans("｛｝", "{}"))
    return text


def visible(text: str) -> str:
    return re.sub("[\\s\x00\x07\u200b]", "", text)


def test_a_time_line_in_a_text_begins_no_cue_in_srt() -> None:
    content = write(said("00:00:01,000 --> 00:00:02,000", "after"), "srt").decode()
    assert content.splitlines()[2] == "00:00:01\u200b,000 -\u200b-> 00:00:02\u200b,000"
    assert len(pysubs2.SSAFile.from_string(content, format_="srt")) == 2


def test_several_formats_are_what_each_is_alone() -> None:
    told = transcript(SPOKEN, LATER)
    names = ("srt", "vtt", "ass", "lrc", "html", "json", "txt", "tsv")
    assert write_all(told, names) == {name: write(told, name) for name in names}


def test_silence_gives_valid_files() -> None:
    silent = replace(transcript(), status="no_speech")
    assert len(pysubs2.SSAFile.from_string(write(silent, "ass").decode())) == 0
    assert write(silent, "lrc").decode() == "[length:01:05]\n[re:funasr-batch]\n"
