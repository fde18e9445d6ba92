import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.records import Token
from funasr_batch.text.tokens import detokenise, is_cjk, join_texts, render_text


def tokens_of(*pieces: str, offset_ms: int = 0) -> tuple[Token, ...]:
    """Piece n lasts from 100 n to 100 n + 80 ms and has confidence 0.9 - n / 100."""
    spans = [(100 * n, 100 * n + 80) for n in range(len(pieces))]
    confidences = [0.9 - n / 100 for n in range(len(pieces))]
    return detokenise(pieces, spans, confidences, offset_ms)


def words_of(*pieces: str) -> list[str]:
    return [token.text for token in tokens_of(*pieces)]


def test_each_chinese_character_is_a_token_with_its_own_time() -> None:
    assert tokens_of("你", "好", offset_ms=1000) == (
        Token("你", 1000, 1080, 0.9),
        Token("好", 1100, 1180, 0.89),
    )


def test_pieces_of_a_word_are_joined_from_the_first_start_to_the_last_end() -> None:
    (token,) = tokens_of("re@@", "cog@@", "nition")
    assert token == Token("recognition", 0, 280, pytest.approx(0.88))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["j@@", "德", "years"], ["j", "德", "years"]),
        (["j@@", "德", "tho@@", "沚"], ["j", "德", "tho", "沚"]),
        (["的", "coun@@"], ["的", "coun"]),
        (["coun@@", "<unk>", "try"], ["country"]),
        (["1@@", "9", "年"], ["19", "年"]),
        (["x@@", "-@@", "ray"], ["x-ray"]),
        (["@@", "好"], ["好"]),
    ],
)
def test_an_unfinished_word_stays_where_it_was_said(pieces: list[str], words: list[str]) -> None:
    assert words_of(*pieces) == words


def test_an_unknown_piece_takes_its_time_with_it() -> None:
    assert tokens_of("<s>", "你", "<unk>", "好", "</s>") == (
        Token("你", 100, 180, 0.89),
        Token("好", 300, 380, pytest.approx(0.87)),
    )


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["a", "p", "p"], ["APP"]),
        (["用", "a", "p", "p", "好"], ["用", "APP", "好"]),
        (["i", "am", "a", "b"], ["i", "am", "AB"]),
        (["i"], ["i"]),
        (["b", "天", "c"], ["b", "天", "c"]),
        (["wor@@", "a", "b"], ["wora", "b"]),
    ],
)
def test_spelt_letters_become_an_abbreviation(pieces: list[str], words: list[str]) -> None:
    assert words_of(*pieces) == words


def test_an_abbreviation_lasts_from_its_first_letter_to_its_last() -> None:
    assert tokens_of("a", "p", "p") == (Token("APP", 0, 280, pytest.approx(0.88)),)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["it", "'s"], ["it's"]),
        (["do", "n't"], ["don't"]),
        (["i", "'re"], ["i're"]),
        (["的", "'s"], ["的", "'s"]),
        (["'s"], ["'s"]),
    ],
)
def test_english_endings_join_the_word_before(pieces: list[str], words: list[str]) -> None:
    assert words_of(*pieces) == words


def test_nothing_gives_nothing() -> None:
    assert tokens_of() == ()
    assert tokens_of("<unk>") == ()
    assert render_text(()) == ""
    assert join_texts([]) == ""


def test_sequences_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        detokenise(["你"], [(0, 1)], [], 0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["今", "天"], "今天"),
        (["hello", "world"], "hello world"),
        (["我", "用", "python", "写"], "我用 python 写"),
        (["下", "午", "3", "点"], "下午3点"),
        (["1", "9", "年"], "19年"),
        (["iphone", "4", "s"], "iphone 4 s"),
        (["at", "&", "t"], "at & t"),
        (["3", ".", "5"], "3.5"),
        (["hello", "，", "今", "天", "。"], "hello，今天。"),
        (["well", ",", "yes", "."], "well, yes."),
    ],
)
def test_spacing(words: list[str], text: str) -> None:
    assert render_text([Token(word, 0, 1, 1.0) for word in words]) == text


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["今天", "很好"], "今天很好"),
        (["hello", "world"], "hello world"),
        (["今天", "hello", "很好"], "今天 hello 很好"),
        (["", "好", "  "], "好"),
        (["好。", "今天"], "好。今天"),
    ],
)
def test_join_texts(texts: list[str], joined: str) -> None:
    assert join_texts(texts) == joined


def test_scripts() -> None:
    assert all(map(is_cjk, "今〇々。，《？カな𫖯"))
    assert not any(map(is_cjk, "a1 .é한ก"))


pieces = st.sampled_from(
    ["今", "天", "hello", "wor@@", "ld", "a", "b", "'s", "1", "3@@", ".", "é", "<unk>", "&"]
)


@given(st.lists(pieces, max_size=30))
def test_no_piece_is_lost_and_times_stay_in_order(heard: list[str]) -> None:
    tokens = tokens_of(*heard)
    kept = "".join(piece.removesuffix("@@") for piece in heard if piece != "<unk>")
    assert "".join(token.text for token in tokens).lower() == kept
    times = [time for token in tokens for time in (token.start, token.end)]
    assert times == sorted(times)
    assert render_text(tokens).replace(" ", "").lower() == kept
