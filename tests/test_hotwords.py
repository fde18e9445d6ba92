"""From hotwords to the tokens that a Paraformer's vocabulary has for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import CheckpointError
from funasr_batch.text.hotwords import spell_hotwords
from funasr_batch.text.prompt import MAX_HOTWORD_LENGTH

TOKENS = (
    "<blank>", "<s>", "</s>",
    "魔", "搭", "达", "摩", "院", "hello", "iphone", "kuber@@", "netes", "swift", "2", "1@@",
    "<unk>",
)  # fmt: skip


def spelled(*hotwords: str, seg_dict: Path | None = None) -> list[list[str]]:
    ids = spell_hotwords(hotwords, TOKENS, seg_dict).ids
    return [[TOKENS[id] for id in row] for row in ids]


@pytest.fixture
def seg_dict(tmp_path: Path) -> Path:
    path = tmp_path / "seg_dict"
    path.write_text(
        "kubernetes kuber@@ netes\n达摩 达 摩\n魔 魔\n\nlonely\n院 <unk>\n12 1@@ 2\n", "utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("hotword", "expected"),
    [
        ("魔搭", ["魔", "搭"]),
        ("Hello", ["hello"]),
        ("IPHONE", ["iphone"]),
        ("ｉＰｈｏｎｅ", ["iphone"]),
        ("达摩院iPhone2", ["达", "摩", "院", "iphone", "2"]),
        ("  hello \t swift ", ["hello", "swift"]),
    ],
)
def test_without_a_dictionary_parts_are_looked_up(hotword: str, expected: list[str]) -> None:
    assert spelled(hotword) == [expected]


@pytest.mark.parametrize(
    "hotword",
    ["阿里", "魔里", "Kubernetes", "hello-swift", "3", "<unk>", "<s>", "魔<s>", "😀", "kuber"],
)
def test_what_is_no_token_is_left_out_whole(hotword: str) -> None:
    """Half a hotword would be another one, and `<unk>` would stand for anything."""
    found = spell_hotwords([hotword, "魔搭"], TOKENS, None)
    assert found.ids == ((3, 4),)
    assert found.left_out == (hotword,)


def test_a_dictionary_spells_whole_words(seg_dict: Path) -> None:
    assert spelled("Kubernetes", "达摩搭 12", "12", seg_dict=seg_dict) == [
        ["kuber@@", "netes"],
        ["达", "摩", "搭", "1@@", "2"],
        ["1@@", "2"],
    ]


def test_a_dictionary_that_knows_no_better_is_no_help(seg_dict: Path) -> None:
    found = spell_hotwords(["达摩院", "lonely"], TOKENS, seg_dict)
    assert found.ids == ()
    assert found.left_out == ("达摩院", "lonely")


def test_repetitions_and_nothing() -> None:
    found = spell_hotwords(["魔搭", "魔 搭", "", "  ", "阿里", "阿里"], TOKENS, None)
    assert found.ids == ((3, 4),)
    assert found.left_out == ("阿里",)


def test_sentences_are_no_hotwords() -> None:
    longest = "魔" * MAX_HOTWORD_LENGTH
    found = spell_hotwords([longest, longest + "搭"], TOKENS, None)
    assert found.ids == ((3,) * MAX_HOTWORD_LENGTH,)
    assert found.left_out == (longest + "搭",)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", None])
def test_a_dictionary_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "seg_dict"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="seg_dict cannot be read"):
        spell_hotwords(["魔搭"], TOKENS, path)


@given(st.lists(st.text(st.sampled_from("魔搭阿 hHeElo<s>unk2，\n\0\u200d") | st.characters())))
def test_ids_are_never_those_of_special_tokens(hotwords: list[str]) -> None:
    found = spell_hotwords(hotwords, TOKENS, None)
    for row in found.ids:
        assert row
        assert not {0, 1, 2, 15} & set(row)
    assert len(set(found.ids)) == len(found.ids)
