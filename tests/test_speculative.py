"""Drafts: how many passes they save on texts that differ from a reading, and when they are used."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funasr_batch.decoding.speculative import (
    Always,
    Draft,
    FirstOf,
    Gate,
    LookupDraft,
    SaidText,
    TextDraft,
    Tokenizer,
    accepted,
)

LIMIT = 16


@dataclass
class Words:
    """Tokens as a BPE has them: Latin words with the space before them, else single characters."""

    pieces: list[str] = field(default_factory=list)

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.findall(r" ?[A-Za-z]+|.", text, re.DOTALL):
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[id] for id in ids)


class Bytes:
    """Tokens that begin and end within a character."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class Course:
    """What became of the drafts for one text."""

    passes: int
    drafted: int
    accepted: int


def follow(draft: Draft, said: Sequence[int], limit: int = LIMIT) -> Course:
    """Lets an LLM say a text, checking drafts as `generate` does but for its growing reach."""
    ids, passes, drafted, right = list(said[:1]), 0, 0, 0
    while len(ids) < len(said):
        proposed = list(draft.propose(ids, limit))
        assert len(proposed) <= limit
        hits = accepted(proposed, said[len(ids) :])
        ids = list(said[: len(ids) + hits + 1])
        passes, drafted, right = passes + 1, drafted + len(proposed), right + hits
    return Course(passes, drafted, right)


def course(reading: str, text: str, tokenizer: Tokenizer | None = None) -> Course:
    tokenizer = tokenizer or Words()
    return follow(TextDraft(reading, tokenizer), tokenizer.encode(text))


# --- Another reading ------------------------------------------------------------------------------

CHINESE = "今天天气很好我们去公园散步吧然后回家吃饭看书"
ENGLISH = "we will meet at the station tomorrow morning and then take the train to the city"

LONG_ENGLISH = (
    "so the first thing that I want to say is that we have been working on this for about three "
    "years now and the results are better than what we expected when we started with the project"
)
LONG_CHINESE = (
    "昨天下午我们在会议室里讨论了明年的计划大家都觉得应该先把现有的问题解决然后再考虑新的功能"
    "毕竟人手不够时间也很紧张"
)


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, CHINESE + ENGLISH])
@pytest.mark.parametrize("tokenizer", [Words(), Bytes()], ids=["words", "bytes"])
def test_the_same_text_is_drafted_to_its_end(text: str, tokenizer: Tokenizer) -> None:
    tokens = len(tokenizer.encode(text))
    followed = course(text, text, tokenizer)
    # A first token that is a part of a character tells nothing: the rest of it is not drafted.
    rest = len(text[0].encode()) - 1 if isinstance(tokenizer, Bytes) else 0
    assert followed.passes == rest + -(-(tokens - rest - 1) // (LIMIT + 1))
    assert followed.drafted - followed.accepted <= rest * LIMIT


@pytest.mark.parametrize(
    ("reading", "text", "passes"),
    [
        # A mark that the reading lacks costs one pass: it is what the network says instead.
        (CHINESE, "今天天气很好，我们去公园散步吧，然后回家吃饭看书。", 3),
        (CHINESE, "今天，天气，很好，我们，去公园，散步吧，然后回家，吃饭看书。", 8),
        (ENGLISH, "we will meet at the station tomorrow morning, and then take the train.", 2),
        # A mark that only the reading has.
        ("今天天气很好，我们去公园散步吧。", "今天天气很好我们去公园散步吧", 2),
        ("今天天气很好，我们去公园散步吧。", "今天天气很好！我们去公园散步吧！", 2),
        # Capitals: the word itself is another token. At the start it comes of the prompt.
        (ENGLISH, ENGLISH.replace("we", "We"), 1),
        (ENGLISH, ENGLISH.replace("station", "Station").replace("city", "City"), 2),
        (ENGLISH.upper(), ENGLISH.upper().capitalize(), 15),
        # A wrong character or word, two of them.
        (CHINESE.replace("园", "元"), CHINESE, 2),
        (CHINESE.replace("园", "元").replace("饭", "范"), CHINESE, 3),
        (ENGLISH.replace("train", "drain"), ENGLISH, 2),
        (ENGLISH.replace("tomorrow", "to morrow"), ENGLISH, 2),
        # Something that the reading did not hear, or heard and nobody said.
        (CHINESE.replace("散步", ""), CHINESE, 4),
        (CHINESE, CHINESE.replace("散步", ""), 2),
        (ENGLISH.replace(" tomorrow morning", ""), ENGLISH, 4),
        (ENGLISH, ENGLISH.replace(" tomorrow morning", ""), 2),
        (CHINESE[5:], CHINESE, 6),
        (CHINESE, CHINESE[5:], 1),
    ],
)
def test_passes_for_a_text_that_differs(reading: str, text: str, passes: int) -> None:
    """Without drafts there would be a pass for every token but the first."""
    followed = course(reading, text)
    assert followed.passes <= passes, followed


@pytest.mark.parametrize("punctuated", [False, True])
def test_characters_of_several_tokens(punctuated: bool) -> None:
    """Within a character nothing is known, and at its end the reading is found again."""
    text = "今天天气很好，我们去公园散步吧。" if punctuated else "今天天气很好我们去公园散步吧"
    followed = course("今天天汽很好我们去公园散步吧", text, Bytes())
    assert followed.passes < len(text.encode()) / 3


def test_a_reading_is_followed_again_after_a_stretch_that_it_lacks() -> None:
    before, missing, after = ENGLISH, "这里有一段别人的话", CHINESE
    tokenizer = Words()
    said = tokenizer.encode(before + missing + after)
    draft = TextDraft(before + after, tokenizer)
    alone = course(before, before).passes + course(after, after).passes
    assert follow(draft, said).passes <= alone + len(missing) + 4


def test_repeated_words_are_not_taken_for_one_another() -> None:
    """The place is looked for where the reading stood, not at the first match."""
    text = "好的好的我知道了好的我们明天好的再说好的就这样好的"
    assert course(text, text.replace("知道", "晓得")).passes <= 4
    laughter = "哈" * 20 + "笑死我了"
    assert course(laughter, laughter[:12] + "，" + laughter[12:]).passes <= 2


def test_nothing_is_proposed_after_the_end() -> None:
    tokenizer = Words()
    draft = TextDraft(CHINESE, tokenizer)
    ids = tokenizer.encode(CHINESE)
    for said in range(len(ids)):
        assert list(draft.propose(ids[:said], 99)) == ids[said:]
    assert list(draft.propose(ids, 99)) == []
    assert list(draft.propose([*ids, *tokenizer.encode("。")], 99)) == []
    more = [*ids, *tokenizer.encode("。嗯嗯")]
    assert list(draft.propose(more, 99)) == []


@pytest.mark.parametrize("reading", ["", "。", " ", "…！"])
def test_a_reading_without_letters(reading: str) -> None:
    tokenizer = Words()
    draft = TextDraft(reading, tokenizer)
    said = tokenizer.encode(CHINESE)
    for length in range(len(said)):
        assert len(draft.propose(said[:length], 8)) <= len(reading)


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab好的，。 Aß½İ\u0301\ufffd", max_size=25),
    st.text("ab好的，。 Aß½İ\u0301\ufffd", min_size=1, max_size=25),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_reading_of_any_text(reading: str, text: str, limit: int, in_bytes: bool) -> None:
    """Nothing is raised, and no more is proposed than is asked for and than there is to read."""
    tokenizer: Tokenizer = Bytes() if in_bytes else Words()
    said = tokenizer.encode(text)
    everything = len(tokenizer.encode(reading))
    draft = TextDraft(reading, tokenizer)
    followed = follow(draft, said, limit)
    assert followed.passes <= max(0, len(said) - 1)
    assert len(draft.propose(said, 99)) <= everything


@pytest.mark.parametrize(
    ("text", "separator", "passes"),
    [
        # Measured: 8.0 and 9.5 passes for 37 and 56 tokens, at one error in ten words.
        (LONG_ENGLISH, " ", 10),
        (LONG_CHINESE, "", 12),
    ],
    ids=["English", "Chinese"],
)
def test_readings_with_errors_save_passes(text: str, separator: str, passes: int) -> None:
    """Of a tenth of the words, a third each is left out, replaced, and followed by another."""
    words = text.split(separator) if separator else list(text)
    taken = [course(with_errors(words, seed, separator), text).passes for seed in range(50)]
    assert sum(taken) / len(taken) < passes


def with_errors(words: Sequence[str], seed: int, separator: str) -> str:
    chance = random.Random(seed)
    result: list[str] = []
    for word in words:
        match chance.randrange(30):
            case 0:
                pass
            case 1:
                result.append(chance.choice(words))
            case 2:
                result += [word, chance.choice(words)]
            case _:
                result.append(word)
    return separator.join(result)


# --- Look-up --------------------------------------------------------------------------------------


def looked_up(ids: Sequence[int], limit: int, earlier: Sequence[int] = ()) -> list[int]:
    return list(LookupDraft(SaidText(earlier)).propose(ids, limit))


def test_what_followed_the_newest_tokens_before_is_proposed() -> None:
    assert looked_up([1, 2, 3, 4, 5, 2, 3], 9) == [4, 5, 2, 3]
    assert looked_up([1, 2, 3, 4, 5, 2, 3], 2) == [4, 5]
    assert looked_up([1, 2, 3, 4, 5, 2, 6], 9) == []


def test_the_longest_match_counts_and_of_these_the_last() -> None:
    #                 -------          -----           -----
    assert looked_up([1, 2, 3, 7, 9, 2, 3, 8, 9, 1, 2, 3], 1) == [7]
    assert looked_up([2, 3, 7, 2, 3, 8, 5, 2, 3], 1) == [8]


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [5, 6, 7, 8]])
def test_what_was_never_said_is_not_proposed(ids: list[int]) -> None:
    assert looked_up(ids, 9) == []
    assert looked_up(ids, 9, earlier=[9, 9, 9, 9]) == []


def test_earlier_texts_are_looked_up_too() -> None:
    earlier = [10, 11, 12, 13, 14]
    assert looked_up([11, 12], 2, earlier) == [13, 14]
    assert looked_up([5], 2, earlier) == []
    # What it said itself counts more.
    assert looked_up([11, 12, 7, 11, 12], 1, earlier) == [7]


def test_earlier_texts_are_shared_and_stay_as_they_are() -> None:
    earlier = SaidText([1, 2, 3])
    first = LookupDraft(earlier)
    assert list(first.propose([4, 5, 6], 9)) == []
    assert list(LookupDraft(earlier).propose([4, 5], 9)) == []
    assert len(earlier) == 3


def test_a_growing_text_is_followed() -> None:
    draft = LookupDraft()
    ids = [1, 2, 3, 4, 1, 2]
    seen = [list(draft.propose(ids[: size + 1], 1)) for size in range(len(ids))]
    assert seen == [[], [], [], [], [], [3]]


def test_a_loop_is_drafted() -> None:
    said = [1, 2, 3] * 10
    assert follow(LookupDraft(), said).passes < 12


# --- Several drafts -------------------------------------------------------------------------------


@dataclass
class Says:
    """Proposes one thing; remembers what it was told."""

    proposal: Sequence[int]
    told: list[tuple[int, ...]] = field(default_factory=list)

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        self.told.append(tuple(ids))
        return self.proposal[:limit]


def test_the_first_draft_that_knows_something_wins() -> None:
    silent, first, second = Says(()), Says((1, 2)), Says((3,))
    assert FirstOf((silent, first, second)).propose([7], 9) == (1, 2)
    assert FirstOf((silent, second, first)).propose([7], 9) == (3,)
    assert list(FirstOf((silent, silent)).propose([7], 9)) == []
    assert list(FirstOf(()).propose([7], 9)) == []


def test_all_drafts_follow_the_text() -> None:
    drafts = (Says((1, 2)), Says(()), Says((3,)))
    both = FirstOf(drafts)
    both.propose([7], 9)
    both.propose([7, 8], 9)
    assert all(draft.told == [(7,), (7, 8)] for draft in drafts)


# --- Whether drafts pay ---------------------------------------------------------------------------


def stretches(gate: Gate, rates: dict[str, float], count: int) -> list[tuple[str, int]]:
    """What a gate decides while each way has the same speed all the time, in tokens a second."""
    decided = []
    for mode, passes in (gate.next_stretch() for _ in range(count)):
        decided.append((mode, passes))
        tokens = 3 * passes if mode == "drafted" else passes
        gate.record(mode, tokens, tokens / rates[mode])
    return decided


@pytest.mark.parametrize(("drafted", "plain", "better"), [(50, 20, "drafted"), (20, 50, "plain")])
def test_both_ways_are_tried_and_the_faster_one_goes_on(
    drafted: float, plain: float, better: str
) -> None:
    gate = Gate(probe=4, period=64)
    decided = stretches(gate, {"drafted": drafted, "plain": plain}, 7)
    assert decided == [("drafted", 4)] + [("plain", 4), ("drafted", 4), (better, 64)] * 2


def test_a_gate_changes_its_mind() -> None:
    gate = Gate(probe=2, period=10)
    assert stretches(gate, {"drafted": 30, "plain": 20}, 4)[-1] == ("drafted", 10)
    # What was fast is forgotten slowly, so one bad stretch is not enough.
    assert stretches(gate, {"drafted": 15, "plain": 20}, 3)[-1] == ("drafted", 10)
    assert stretches(gate, {"drafted": 15, "plain": 20}, 3)[-1] == ("plain", 10)


def test_a_slow_first_stretch_is_forgiven() -> None:
    gate = Gate(probe=2, period=10)
    stretches(gate, {"drafted": 1, "plain": 20}, 1)  # a GPU met new shapes
    assert stretches(gate, {"drafted": 30, "plain": 20}, 3)[-1] == ("drafted", 10)


def test_what_brought_nothing_is_not_measured() -> None:
    gate = Gate()
    gate.next_stretch()
    gate.record("drafted", 0, 1.0)
    gate.record("drafted", 5, 0.0)
    assert gate.next_stretch()[0] == "plain"
    gate.record("plain", 1, 100.0)
    gate.next_stretch()
    assert gate.next_stretch() == ("plain", gate.period)


def test_gates_that_stay_one_way() -> None:
    for mode in ("drafted", "plain"):
        gate = Always(mode)  # type: ignore[arg-type]
        gate.record(mode, 1, 100.0)  # type: ignore[arg-type]
        modes, passes = zip(*islice(iter(gate.next_stretch, None), 3), strict=True)
        assert set(modes) == {mode}
        assert min(passes) > 1_000_000


# --- Acceptance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "choices", "count"),
    [
        ([], [], 0),
        ([], [1, 2], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([9, 2, 3], [1, 2, 3], 0),
        ([1, 1, 2], [1, 1, 1], 2),
    ],
)
def test_tokens_are_right_up_to_the_first_that_is_not(
    draft: list[int], choices: list[int], count: int
) -> None:
    assert accepted(draft, choices) == count
