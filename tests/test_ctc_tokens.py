"""The CTC head's vocabulary beside the definition of its byte pair encoding."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import CheckpointError
from funasr_batch.text.ctc_tokens import CtcTokens, load_ctc_tokens

BYTES = [bytes([byte]) for byte in range(256)]
JOINED = [b"th", b" t", b" th", b"he", b" the", b"aa", b"aaa", b"\xe4\xbd", "你".encode()]
JOINED += ["好".encode()[:2], "好".encode(), "你好".encode(), b" a", b"12", b"'s"]


def lines_of(pieces: Iterable[bytes]) -> list[bytes]:
    return [b"%s %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]


def write(folder: Path, lines: Iterable[bytes]) -> Path:
    path = folder / "multilingual.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> CtcTokens:
    lines = [*lines_of([*BYTES, *JOINED]), b"= %d" % (256 + len(JOINED))]
    return load_ctc_tokens(write(tmp_path_factory.mktemp("ctc"), lines))


def encode_slowly(word: bytes) -> list[bytes]:
    """Byte pair encoding by its definition."""
    ranks = {piece: rank for rank, piece in enumerate([*BYTES, *JOINED])}
    parts = [bytes([byte]) for byte in word]
    while True:
        joins = [
            (ranks[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in ranks
        ]
        if not joins:
            return parts
        _, place = min(joins)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_pieces_of_text(tokens: CtcTokens) -> None:
    assert [tokens.token_bytes(label) for label in tokens.encode("the the你好12's")] == [
        *(b"th", b"e", b" the", "你好".encode(), b"12", b"'s")
    ]


def test_lowest_rank_is_joined_first(tokens: CtcTokens) -> None:
    assert [tokens.token_bytes(label) for label in tokens.encode("thaaaaa")] == [
        *(b"th", b"aa", b"aaa")
    ]


@given(st.text("the a你好12's\n.", max_size=30) | st.text())
def test_every_text_comes_back(tokens: CtcTokens, text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text


@given(st.text("theaä你好", max_size=40))
def test_is_byte_pair_encoding(tokens: CtcTokens, text: str) -> None:
    pieces = [tokens.token_bytes(label) for label in tokens.encode(text)]
    # A whole word that is a piece is taken as such, whatever the joins would lead to.
    assert pieces == ([text.encode()] if text.encode() in JOINED else encode_slowly(text.encode()))


def test_special_labels_are_no_text(tokens: CtcTokens) -> None:
    first_special = len(tokens.pieces)
    assert first_special == 256 + len(JOINED) + 1
    for label in (first_special - 1, first_special, 60514, -1):
        assert tokens.token_bytes(label) == b""
    assert tokens.decode([0x61, first_special, 0x62]) == "ab"
    ids = tokens.encode("<|nospeech|>")
    assert max(ids) < first_special
    assert tokens.decode(ids) == "<|nospeech|>"


def test_parts_of_characters(tokens: CtcTokens) -> None:
    assert tokens.decode([0xE4, 0x61]) == "\ufffda"
    assert tokens.decode(tokens.encode("\ud83d")) == "?"


class TestDamagedFiles:
    def refused(self, folder: Path, lines: Iterable[bytes], match: str) -> None:
        path = write(folder, lines)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_ctc_tokens(path)
        assert str(path) in str(caught.value)
        assert caught.value.hint

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_ctc_tokens(tmp_path / "no.tiktoken")

    def test_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "big.tiktoken"
        with path.open("wb") as file:
            file.truncate((16 << 20) + 1)
        with pytest.raises(CheckpointError, match="larger than"):
            load_ctc_tokens(path)

    @pytest.mark.parametrize(
        "line",
        [
            *(b"YQ==", b"YQ== 256 1", b"YQ== x", b"YQ== -1", b"YQ== 1.5", b"YQ== 99999999"),
            *(b"YQ== 1048576", b"@@ 256", b"YQ 256", b"\xff\xfe", "YQ== ２".encode()),
            base64.b64encode(b"x" * 1025) + b" 256",
        ],
    )
    def test_bad_line(self, tmp_path: Path, line: bytes) -> None:
        self.refused(tmp_path, [*lines_of(BYTES), line], "line 257")

    def test_bad_lists(self, tmp_path: Path) -> None:
        self.refused(tmp_path, [], "256 of 256 bytes")
        self.refused(tmp_path, lines_of(BYTES[1:]), "1 of 256 bytes")
        self.refused(tmp_path, [*lines_of(BYTES), b"YWI= 0"], "rank 0 again")
        self.refused(tmp_path, [*lines_of(BYTES), b"YWI= 257"], "leaves out ranks")
        self.refused(tmp_path, [*lines_of(BYTES), b"YQ== 256"], "two ranks")

    def test_order_and_blank_lines_do_not_matter(self, tmp_path: Path) -> None:
        path = write(tmp_path, [b"", *reversed(lines_of(BYTES)), b"\r"])
        assert load_ctc_tokens(path).pieces == tuple(BYTES)
