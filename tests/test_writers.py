import base64
import json
import os
import re
from dataclasses import replace

import pysubs2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch import __version__
from funasr_batch.errors import UsageError
from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript
from funasr_batch.text.cues import NETFLIX_EN, PLAIN, layout
from funasr_batch.writers import FORMATS, WriterOptions, write

HOUR = 3_600_000

SPOKEN = TextSegment(
    0,
    500,
    1700,
    "你好 world",
    "cif",
    (Token("你", 500, 740, 0.98765), Token("好", 740, 980, 0.9), Token("world", 1000, 1700, 0.8)),
    ("low_confidence",),
)
LATER = TextSegment(1, 100 * HOUR, 100 * HOUR + 2001, "再见", "vad")


def transcript(*segments: TextSegment) -> Transcript:
    return Transcript(
        source=SourceInfo("/recordings/会议.wav", "ab" * 32, 1.70049, 16000, 2),
        model=ModelInfo("paraformer", None, "cd" * 32),
        settings_digest="ef" * 32,
        language="zh",
        segments=segments,
        status="done",
        warnings=("too quiet",),
        stats={"rtf": 0.01, "speed": 100.0, "stages": {"encode": 0.2}},
    )


def said(*texts: str) -> Transcript:
    """One cue each: two seconds of text, then two seconds of silence."""
    return transcript(
        *(TextSegment(n, 4000 * n, 4000 * n + 2000, text, "vad") for n, text in enumerate(texts))
    )


def test_srt() -> None:
    assert write(transcript(SPOKEN, LATER), "srt").decode() == (
        "1\n00:00:00,500 --> 00:00:01,700\n你好 world\n\n"
        "2\n100:00:00,000 --> 100:00:02,001\n再见\n\n"
    )


def test_vtt() -> None:
    assert write(transcript(SPOKEN, LATER), "vtt").decode() == (
        "WEBVTT\n"
        "\n00:00:00.500 --> 00:00:01.700\n你好 world\n"
        "\n100:00:00.000 --> 100:00:02.001\n再见\n"
    )


def test_tsv_has_integer_milliseconds() -> None:
    assert write(transcript(SPOKEN, LATER), "tsv").decode() == (
        "start\tend\ttext\n500\t1700\t你好 world\n360000000\t360002001\t再见\n"
    )


def test_txt_has_a_line_for_each_segment() -> None:
    assert write(transcript(SPOKEN, LATER), "txt").decode() == "你好 world\n再见\n"


def test_json_has_the_documented_keys() -> None:
    assert json.loads(write(transcript(SPOKEN), "json")) == {
        "schema_version": 1,
        "source": {
            "path": "/recordings/会议.wav",
            "sha256": "ab" * 32,
            "duration": 1.7,
            "sample_rate": 16000,
            "channels": 2,
        },
        "model": {
            "name": "paraformer",
            "revision": None,
            "weights_sha256": "cd" * 32,
            "quantization": None,
        },
        "settings": "ef" * 32,
        "language": "zh",
        "text": "你好 world",
        "segments": [
            {
                "id": 0,
                "start": 0.5,
                "end": 1.7,
                "text": "你好 world",
                "timing": "cif",
                "tokens": [
                    {"text": "你", "start": 0.5, "end": 0.74, "confidence": 0.9877},
                    {"text": "好", "start": 0.74, "end": 0.98, "confidence": 0.9},
                    {"text": "world", "start": 1.0, "end": 1.7, "confidence": 0.8},
                ],
                "flags": ["low_confidence"],
            }
        ],
        "stats": {"rtf": 0.01, "speed": 100.0, "stages": {"encode": 0.2}},
        "status": "done",
        "warnings": ["too quiet"],
        "tool": {"name": "funasr-batch", "version": __version__},
    }


def test_json_keeps_chinese_readable() -> None:
    assert "你好 world" in write(transcript(SPOKEN), "json").decode()


def test_json_has_no_infinities() -> None:
    endless = replace(
        transcript(), stats={"speed": float("inf"), "stages": {"vad": float("nan")}, "files": 1}
    )
    stats = json.loads(write(endless, "json"), parse_constant=pytest.fail)["stats"]
    assert stats == {"speed": None, "stages": {"vad": None}, "files": 1}


def test_a_path_that_is_not_text_does_not_crash_and_is_not_lost() -> None:
    name = b"/recordings/\xff\xfe\xe4\xbd\xa0.wav"
    odd = transcript(SPOKEN)
    odd = replace(
        odd,
        source=replace(odd.source, path=os.fsdecode(name)),
        warnings=(f"{os.fsdecode(name)}: odd",),
    )
    document = json.loads(write(odd, "json"))
    assert document["source"]["path"] == "/recordings/\ufffd\ufffd你.wav"
    assert base64.b64decode(document["source"]["path_base64"]) == name
    assert document["warnings"] == ["/recordings/\ufffd\ufffd你.wav: odd"]


def test_a_transcript_without_speech_gives_valid_empty_files() -> None:
    silent = replace(transcript(), status="no_speech")
    assert write(silent, "srt") == b""
    assert write(silent, "vtt") == b"WEBVTT\n"
    assert write(silent, "tsv") == b"start\tend\ttext\n"
    assert write(silent, "txt") == b""
    assert json.loads(write(silent, "json"))["segments"] == []
    assert json.loads(write(silent, "json"))["text"] == ""


def test_a_byte_order_mark_only_when_asked_for_and_never_in_json() -> None:
    marked = WriterOptions(bom=True)
    for name in FORMATS:
        plain = write(transcript(SPOKEN), name)
        assert not plain.startswith(b"\xef\xbb\xbf")
        with_mark = write(transcript(SPOKEN), name, marked)
        assert with_mark == (plain if name == "json" else b"\xef\xbb\xbf" + plain)


def test_the_style_is_an_option() -> None:
    longer = WriterOptions(style=replace(PLAIN, min_duration_ms=2000))
    assert "00:00:00,500 --> 00:00:02,500" in write(transcript(SPOKEN), "srt", longer).decode()


def test_an_unknown_format_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="doc") as caught:
        write(transcript(), "doc")
    assert caught.value.hint is not None
    assert ", ".join(FORMATS) in caught.value.hint


@pytest.mark.parametrize(
    ("text", "srt", "vtt"),
    [
        ("a --> b", "a -\u200b-> b", "a --&gt; b"),
        ("a ---> b", "a --\u200b-> b", "a ---&gt; b"),
        ("x < y & z", "x < y & z", "x &lt; y &amp; z"),
        ("<b>bold</b>", "<\u200bb>bold<\u200b/b>", "&lt;b&gt;bold&lt;/b&gt;"),
        (r"{\an8}top", "{\u200b\\an8}top", r"{\an8}top"),
        ("nul\x00 bell\x07 esc\x1b[0m", "nul bell esc[0m", "nul bell esc[0m"),
        ("one\n\ntwo\r\nthree\u2028four", "one two three four", "one two three four"),
        ("\ufeffmark", "mark", "mark"),
    ],
)
def test_hostile_text_stays_text(text: str, srt: str, vtt: str) -> None:
    assert write(said(text), "srt").decode().split("\n")[2:] == [srt, "", ""]
    assert write(said(text), "vtt").decode().split("\n")[3:] == [vtt, ""]


def test_text_of_nothing_but_controls_is_no_cue_and_no_line() -> None:
    quiet = said("\x00\x07", "later")
    assert write(quiet, "srt").decode().startswith("1\n00:00:04,000")
    assert write(quiet, "vtt").decode().count("-->") == 1
    assert write(quiet, "txt") == b"later\n"
    assert write(quiet, "tsv") == b"start\tend\ttext\n4000\t6000\tlater\n"


def test_tabs_do_not_make_columns() -> None:
    assert write(said("a\tb"), "tsv").decode().splitlines()[1] == "0\t2000\ta b"


# --- What was written reads back

TEXTS = st.lists(
    st.text(st.sampled_from("今天好,。 abcXYZ<>&-1'\"\n\x00"), min_size=1, max_size=60),
    max_size=6,
)


@pytest.mark.parametrize("name", ["srt", "vtt"])  # (pysubs2 takes `{}` for its own tags)
@given(texts=TEXTS)
def test_pysubs2_reads_the_same_times_and_texts(name: str, texts: list[str]) -> None:
    written = said(*texts)
    cues = [cue for cue in layout(written.segments, NETFLIX_EN) if visible("".join(cue.lines))]
    content = write(written, name, WriterOptions(style=NETFLIX_EN)).decode()
    read = pysubs2.SSAFile.from_string(content, format_=name, keep_unknown_html_tags=True)
    assert [(event.start, event.end) for event in read] == [(cue.start, cue.end) for cue in cues]
    assert [visible(unescaped(event.plaintext)) for event in read] == [
        visible("".join(cue.lines)) for cue in cues
    ]


def unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def visible(text: str) -> str:
    """Without white space and controls."""
    return re.sub("[\\s\x00\u200b]", "", text)


@given(texts=TEXTS)
def test_json_and_lines_keep_every_segment(texts: list[str]) -> None:
    written = said(*texts)
    document = json.loads(write(written, "json"))
    assert [segment["text"] for segment in document["segments"]] == texts
    lines = write(written, "txt").decode().splitlines()
    assert [visible(line) for line in lines] == [visible(text) for text in texts if visible(text)]
    rows = [row.split("\t") for row in write(written, "tsv").decode().splitlines()[1:]]
    assert [row[2] for row in rows] == lines
