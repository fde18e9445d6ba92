"""Loops, and repetitions that people make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.text.loops import find_loop, says_too_much

SAID_BY_PEOPLE = [
    "",
    "。",
    "你好，世界。",
    "哈哈哈",
    "哈哈哈哈哈哈",
    "对对对，对，对对。",
    "好好好，好的好的好的。",
    "谢谢谢谢，谢谢谢谢",
    "是的是的是的是的，没错没错",
    "不不不不不，我不是这个意思",
    "no no no",
    "No, no, no, no, no!",
    "very very very very good",
    "It was a long, long, long, long time ago.",
    "go go go go go go",
    "一二三四一二三四",
    "一二三四，一二三四，一二三四，一二三四，一二三四",
    "一二一，一二一，一二一，一二一，一二一，一二一",
    "我的电话是13800138000，再说一遍，13800138000",
    "138 0013 8000, 138 0013 8000, 138 0013 8000",
    "密码是 1 1 1 1 1 1 1 1 1 1 1 1",
    "六二二二零二零二零二零二零二零二零二",
    "零零零零零零零零零零零零",
    "加油加油加油加油加油",
    "新年快乐，新年快乐，新年快乐，新年快乐！",
    "中国队加油！中国队加油！中国队加油！中国队加油！",
    "let it be, let it be, let it be, let it be",
    "请各位旅客注意，列车马上就要进站了。请各位旅客注意，列车马上就要进站了。",
    "是不是？是不是？是不是这样？是不是？",
    "那个那个那个，就是就是说",
    "等等等等，……………………",
    "wait... wait... wait...",
    "bla bla bla bla bla",
    "ABAB ABAB ABAB",
]

LOOPS = [
    ("谢谢观看。" * 5, "谢谢观看。", 5),
    ("我想问我在滨海新区有房" + "有房有房有房有房有房有房有房有房", "有房", 9),
    ("嗯" * 30, "嗯", 30),
    ("嗯，嗯。" * 8, "嗯，", 16),
    ("Thank you. " * 8, "Thank you. ", 8),
    ("I don't know. I DON'T KNOW, " * 4, "I don't know. ", 8),
    ("the cat sat on the mat and " * 4, "the cat sat on the mat and ", 4),
    ("今天我们要讲的内容是这样的，" * 3, "今天我们要讲的内容是这样的，", 3),
    ("stud" * 40, "stud", 40),
    ("stud " * 40, "stud ", 40),
    ("很好" * 8 + "很", "很好", 8),
    ("1" * 300, "1", 300),
    ("一二三四" * 11, "一二三四", 11),
    ("!" * 512, "!", 512),
    ("你好" + "！" * 12, "！", 12),
    ("ＡＢＣ，abc，" * 8, "ＡＢＣ，abc，", 8),
]


@pytest.mark.parametrize("text", SAID_BY_PEOPLE)
def test_what_people_say_is_no_loop(text: str) -> None:
    assert find_loop(text) is None


@pytest.mark.parametrize(("text", "unit", "count"), LOOPS)
def test_loops(text: str, unit: str, count: int) -> None:
    loop = find_loop(text)
    assert loop is not None
    assert (loop.unit, loop.count) == (unit, count)
    assert text[loop.start :].startswith(unit)


def test_where_it_is() -> None:
    innocent = "有房的人都说，房价不会跌。"
    loop = find_loop(innocent + "他说谢谢大家，谢谢大家。谢谢 大家谢谢大家谢谢大家，谢谢")
    assert loop is not None
    assert loop.start == len(innocent) + 2
    assert loop.unit == "谢谢大家，"
    assert loop.count == 5
    text = innocent + "他说谢谢大家，谢谢大家。谢谢 大家谢谢大家谢谢大家，谢谢"
    assert text[: loop.cut] == innocent + "他说谢谢大家，谢谢大家。"


def test_the_first_of_two() -> None:
    loop = find_loop("我们今天讲的这个问题很重要" * 3 + "嗯" * 20)
    assert loop is not None
    assert (loop.start, loop.count) == (0, 3)


@given(
    st.text("你我他好的", max_size=10),
    st.text("天地人日月", min_size=1, max_size=12),
    st.integers(10, 20),
)
def test_ten_rounds_of_anything_are_a_loop(before: str, unit: str, count: int) -> None:
    """However the unit repeats in itself (`天天地` may be found as `天`, never as more)."""
    loop = find_loop(before + unit * count)
    assert loop is not None
    assert len(before) <= loop.start <= len(before) + len(unit)
    assert loop.unit in unit * 2
    assert loop.cut == loop.start + 2 * len(loop.unit)


@given(st.text())
def test_any_text(text: str) -> None:
    loop = find_loop(text)
    if loop is not None:
        assert loop.count >= 3
        assert loop.start < loop.cut <= len(text)


@given(st.lists(st.sampled_from("天地人日月水火木金土"), max_size=60, unique=True))
def test_no_repetition_no_loop(chars: list[str]) -> None:
    assert find_loop("".join(chars)) is None


@pytest.mark.parametrize(
    ("text", "seconds", "too_much"),
    [
        ("", 0.0, False),
        ("嗯。", 0.1, False),
        ("今天天气很好我们出去走走吧" * 2, 5.0, False),  # 26 characters: brisk
        ("今天天气很好我们出去走走吧" * 2, 2.6, False),  # 10 a second: as fast as people get
        ("今天天气很好我们出去走走吧" * 2, 1.0, True),
        ("开放时间早上九点至下午五点。", 0.4, True),
        ("The quick brown fox jumps over the lazy dog.", 2.0, False),
        ("The quick brown fox jumps over the lazy dog. " * 10, 3.0, True),
        ("internationalization", 0.4, False),
        ("总共10000000元", 0.8, False),  # five syllables
        ("안녕하세요 여러분 반갑습니다", 2.0, False),
        ("안녕하세요 여러분 반갑습니다" * 3, 1.0, True),
        ("！！！！！！！！！！！！！！！！", 0.1, False),  # says nothing; find_loop finds it
    ],
)
def test_too_much_for_the_time(text: str, seconds: float, too_much: bool) -> None:
    assert says_too_much(text, seconds) is too_much
