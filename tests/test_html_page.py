"""The HTML page: what is in it, and how it behaves in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin

import browser
import pytest
from browser import Page

from funasr_batch.records import ModelInfo, SourceInfo, TextSegment, Token, Transcript, Word
from funasr_batch.rendering import render
from funasr_batch.settings import Settings
from funasr_batch.writers import WriterOptions, write
from funasr_batch.writers.html_page import link_to

HOSTILE_NAME = """a b#1?%41 '"<&>+;:你\u202e.wav"""
ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\"'"

SEGMENTS = (
    TextSegment(
        0,
        500,
        2000,
        "你好, World!",
        "cif",
        (Token("你", 500, 740, 0.95), Token("好", 740, 980, 0.3), Token("world", 1000, 1700, 0.8)),
    ),
    TextSegment(1, 3000, 5000, ATTACK, "vad"),
    TextSegment(
        2,
        6000,
        8000,
        "the world again",
        "vad",
        words=(Word("the", 0.9), Word("world", 0.2), Word("again", 0.9)),
    ),
    TextSegment(3, 9000, 9500, "שלום 𝄞\x00 " + "x" * 10_000, "vad"),
)


def transcript(*segments: TextSegment, name: str = HOSTILE_NAME) -> Transcript:
    return Transcript(
        source=SourceInfo(f"/recordings/{name}", "ab" * 32, 15.07, 16000, 1),
        model=ModelInfo("/models/<mine>", None, "cd" * 32),
        settings_digest="ef" * 32,
        language="zh",
        segments=segments,
        status="done_with_warnings",
        warnings=("<b>too</b> quiet",),
    )


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, and text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(told: Transcript, options: WriterOptions = WriterOptions()) -> Reader:  # noqa: B008
    return Reader(write(told, "html", options))


def test_the_text_is_there_and_nothing_of_it_is_markup() -> None:
    page = read(transcript(*SEGMENTS))
    for segment in SEGMENTS:
        assert segment.text.replace("\x00", "") in page.text
    assert len(page.of("script")) == 1
    assert page.of("img") == []
    assert page.of("b") == []
    assert "<b>too</b> quiet" in page.text


def test_words_have_their_times_and_the_doubtful_are_marked() -> None:
    words = read(transcript(*SEGMENTS[:1])).of("span")
    assert [(word["data-t"], word["data-e"]) for word in words] == [
        ("500", "740"),
        ("740", "980"),
        ("1000", "1700"),
    ]
    assert [word.get("title") for word in words] == [None, "30% sure", None]
    assert [word.get("class") for word in words] == [None, "low", None]


def test_a_time_that_was_not_measured_is_not_given() -> None:
    words = read(transcript(SEGMENTS[2])).of("span")
    assert [word.get("data-t") for word in words] == [None, None, None]
    assert [word.get("title") for word in words] == [None, "20% sure", None]


def test_nothing_is_fetched_but_the_recording() -> None:
    page = read(transcript(*SEGMENTS))
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset") and not (value or "").startswith("#")
    ]
    recording = page.of("audio")[0]["src"]
    assert links == ["data:,", recording, recording]
    content = write(transcript(*SEGMENTS), "html").decode()
    assert not re.search(r"https?://|@import|url\(", content)


def test_the_link_is_the_recording_beside_the_page() -> None:
    link = read(transcript()).of("audio")[0]["src"]
    assert link is not None
    assert unquote(link) == HOSTILE_NAME
    assert urljoin("file:///recordings/page.html", link).startswith("file:///recordings/a%20b%231")


@pytest.mark.parametrize(
    ("recording", "folder", "link"),
    [
        ("/a/x.wav", "/a", "x.wav"),
        ("/a/b/x.wav", "/a/out/b", "../../b/x.wav"),
        ("/a/x y#1?.wav", "/out", "../a/x%20y%231%3F.wav"),
        ("/a/12:30.wav", "/a", "12%3A30.wav"),
        ("/a/\udcff.wav", "/a", "%FF.wav"),
    ],
)
def test_the_link_is_relative_to_the_page(recording: str, folder: str, link: str) -> None:
    assert link_to(recording, folder) == link


def test_rendering_links_beside_elsewhere_and_absolutely() -> None:
    told = transcript(name="x.wav")
    beside = Settings(format=("html",))
    away = Settings(format=("html",), output_dir=Path("/out"))

    def link(settings: Settings, folder: Path | None = None) -> str | None:
        return Reader(render(told, settings, folder)["html"]).of("audio")[0]["src"]

    assert link(beside) == "x.wav"
    assert link(away, Path("/out/deep")) == "../../recordings/x.wav"
    assert link(away) == "file:///recordings/x.wav"


def test_a_page_without_speech_says_so() -> None:
    assert "No speech was found." in read(replace(transcript(), status="no_speech")).text


# --- In a browser

needs_browser = pytest.mark.skipif(browser.executable() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with a real recording of a hostile name, in a folder beside it."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "recordings").mkdir()
    (folder / "out").mkdir()
    recording = folder / "recordings" / HOSTILE_NAME
    shutil.copy(Path(__file__).parents[1] / "sample_audio" / "mandarin.wav", recording)
    options = WriterOptions(recording=link_to(str(recording), str(folder / "out")))
    path = folder / "out" / "transcript.html"
    path.write_bytes(write(transcript(*SEGMENTS), "html", options))
    with browser.page(folder / "profile") as page:
        page.open(path.as_uri())
        yield page


WORD = "document.querySelectorAll('main span')[{}]"
TIME = "document.getElementById('player').currentTime"
NOTE_SEEKS = f"""
    window.sought = [];
    document.getElementById('player').onseeking = () => sought.push({TIME});
"""


@needs_browser
class TestInABrowser:
    """In order: the last test looks at what the console said during all of them."""

    def test_the_recording_is_found(self, opened: Page) -> None:
        opened.wait_for("document.getElementById('player').readyState >= 1")
        length = opened.value("document.getElementById('player').duration")
        assert length == pytest.approx(15.07, abs=0.1)  # of sample_audio/mandarin.wav
        assert opened.value("document.getElementById('trouble').hidden")

    def test_hostile_text_is_text(self, opened: Page) -> None:
        assert opened.value("document.title").startswith("a b#1?%41 '\"<&>+;:你")
        assert opened.value("document.querySelectorAll('main p')[1].textContent") == ATTACK
        # The longest word is broken, not the page widened.
        assert opened.value("document.documentElement.scrollWidth <= innerWidth")

    def test_a_click_on_a_word_plays_from_there(self, opened: Page) -> None:
        opened.value(NOTE_SEEKS)
        opened.click(WORD.format(2))
        opened.wait_for(f"{TIME} > 1.05")  # it plays
        assert opened.value("window.sought") == [1.0]

    def test_the_word_that_is_spoken_is_marked(self, opened: Page) -> None:
        opened.value("document.getElementById('player').pause()")
        opened.value(f"{TIME} = 0.8")
        opened.wait_for("document.querySelector('.on')?.textContent === '好,'")
        assert opened.value("document.querySelectorAll('.on').length") == 1
        assert opened.value("document.querySelectorAll('.now').length") == 1
        opened.value(f"{TIME} = 5.5")  # nobody speaks
        opened.wait_for("document.querySelector('.on') === null")

    def test_a_click_on_a_time_plays_and_can_be_linked_to(self, opened: Page) -> None:
        opened.value(NOTE_SEEKS)
        opened.click("document.querySelectorAll('.time')[2]")
        assert opened.value("location.hash") == "#t=6.0"
        opened.wait_for(f"{TIME} > 6.05")
        assert opened.value("window.sought") == [6.0]
        opened.value("document.getElementById('player').pause()")
        opened.value("location.hash = '#t=3.0'")
        opened.wait_for(f"Math.abs({TIME} - 3) < 0.01")

    def test_the_search_hides_and_marks(self, opened: Page) -> None:
        hidden = "[...document.querySelectorAll('main section')].map(s => s.hidden)"
        hits = "[...document.querySelectorAll('.hit')].map(word => word.textContent)"
        opened.click("document.getElementById('search')")
        opened.type("WORLD")
        assert opened.value(hidden) == [False, True, False, True]
        assert opened.value(hits) == ["World!", "world"]
        assert opened.value("document.getElementById('found').textContent") == "2 found"
        opened.press("Enter")
        opened.press("Enter")
        assert opened.value("document.getElementById('found').textContent") == "2 of 2"
        opened.press("Escape")
        assert opened.value(hidden) == [False] * 4
        opened.type("你好")  # two words
        assert opened.value(hits) == ["你", "好,"]
        opened.press("Escape")
        opened.type("</script>")
        assert opened.value(hidden) == [True, False, True, True]
        opened.press("Escape")
        assert opened.value(hits) == []

    def test_dark_and_light(self, opened: Page) -> None:
        papers = []
        for scheme in ("light", "dark"):
            opened.prefer(scheme)
            papers.append(opened.value("getComputedStyle(document.body).backgroundColor"))
        assert papers == ["rgb(251, 251, 249)", "rgb(25, 26, 28)"]

    def test_the_policy_holds_the_page_to_itself(self, opened: Page) -> None:
        """An element that somehow got in would neither run nor load."""
        before = len(opened.complaints)
        opened.value(
            "document.body.insertAdjacentHTML('beforeend', '<i onclick=\"owned = 1\">x</i>')"
        )
        opened.value("document.body.lastElementChild.click()")
        assert opened.value("typeof owned") == "undefined"
        assert any("Content Security Policy" in text for text in opened.complaints[before:])
        del opened.complaints[before:]

    def test_the_console_stayed_empty(self, opened: Page) -> None:
        assert opened.complaints == []


@needs_browser
def test_a_recording_that_is_gone_is_told(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(write(transcript(*SEGMENTS[:1], name="gone.wav"), "html"))
    with browser.page(tmp_path / "profile") as page:
        page.open(path.as_uri())
        page.wait_for("!document.getElementById('trouble').hidden")
        assert page.value("document.getElementById('trouble').innerText") == (
            "The browser cannot play gone.wav."
        )
