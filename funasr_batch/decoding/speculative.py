"""Drafts of what the LLM is going to say, so that it checks many tokens in one pass.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding". In
greedy decoding a draft cannot change a token: the network's own choice is taken at every position,
and a draft only decides how many positions one pass covers. Drafts here come from another reading
of the same speech (the CTC head, a Paraformer, a smaller model) and from text that was said before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

Mode: TypeAlias = Literal["drafted", "plain"]

LONGEST_MATCH = 8
"""Characters of the newest text that are looked for in a reading after a mismatch."""
LOOKED_UP = (3, 2)
"""How many of the newest tokens are looked up in earlier text."""
REACH_BACK, REACH_AHEAD = 24, 24
"""Characters around the expected place in which they are looked for. Back, because what the reading
lacks moves the expected place on."""


class Draft(Protocol):
    """Guesses how a text goes on."""

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        """At most `limit` tokens that may follow `ids`; none where it has no idea."""
        ...


class Tokenizer(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextDraft:
    """Drafts from another reading of the same speech.

    The reading is followed by its letters alone: it may lack the punctuation and the capitals that
    the LLM writes. After a mismatch the newest letters are looked up near the place where the
    reading stood, and drafting goes on behind them.
    """

    def __init__(self, reading: str, tokenizer: Tokenizer) -> None:
        self._reading = reading
        self._tokenizer = tokenizer
        letters = [(char, place) for place, char in enumerate(reading) if char.isalnum()]
        self._letters = "".join(char.casefold()[0] for char, _ in letters)
        self._places = [place for _, place in letters]
        self._at = 0
        """Letters of the reading that count as said."""
        self._seen = 0
        """Tokens that were followed already."""
        self._ahead: tuple[int, ...] = ()
        """The tokens of the reading from there on, as far as they were right until now."""

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        new = tuple(ids[self._seen :])
        self._seen = len(ids)
        if not new or self._ahead[: len(new)] != new:
            self._follow(ids, new)
        else:
            self._ahead = self._ahead[len(new) :]
            self._at += _letter_count(self._tokenizer.decode(new))
        return self._ahead[:limit]

    def _follow(self, ids: Sequence[int], new: Sequence[int]) -> None:
        expected = self._at + (_letter_count(self._tokenizer.decode(new)) if new else 0)
        text = self._tokenizer.decode(ids[-2 * LONGEST_MATCH :]) if ids else ""
        said = "".join(char.casefold()[0] for char in text if char.isalnum())
        self._at = min(self._found(said, expected), len(self._letters))
        rest = self._rest()
        if text and not text[-1].isalnum():
            rest = rest.lstrip() if text[-1].isspace() else _without_leading_marks(rest)
        self._ahead = tuple(self._tokenizer.encode(rest)) if rest else ()

    def _found(self, said: str, expected: int) -> int:
        for length in range(min(LONGEST_MATCH, len(said)), 0, -1):
            newest = said[-length:]
            ends = [
                end
                for end in range(max(expected - REACH_BACK, length), expected + REACH_AHEAD)
                if self._letters[end - length : end] == newest
            ]
            if ends:
                return min(ends, key=lambda end: abs(end - expected))
        return expected

    def _rest(self) -> str:
        """What follows the last letter that counts as said."""
        return self._reading[self._places[self._at - 1] + 1 if self._at else 0 :]


class SaidText:
    """Tokens that were said, and where each run of a few of them was said last."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.add(ids)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Iterable[int]) -> None:
        """Appends what was said next. A run counts once something has followed it."""
        for token in ids:
            for length in LOOKED_UP:
                if len(self._ids) >= length:
                    self._ends[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def after(self, newest: Sequence[int], limit: int) -> Sequence[int]:
        """What followed these tokens when they were last said; nothing where they never were."""
        end = self._ends.get(tuple(newest))
        return () if end is None else self._ids[end : end + limit]


class LookupDraft:
    """Drafts from earlier text: what followed the newest tokens when they were last said.

    Its own text is looked at first, then `earlier`, which many drafts may share. Source: Saxena
    2023, "Prompt Lookup Decoding".
    """

    def __init__(self, earlier: SaidText | None = None) -> None:
        self._earlier = earlier or SaidText()
        self._own = SaidText()

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        self._own.add(ids[len(self._own) :])
        for length in LOOKED_UP:
            if len(ids) >= length:
                newest = ids[-length:]
                found = self._own.after(newest, limit) or self._earlier.after(newest, limit)
                if found:
                    return found
        return ()


@dataclass(frozen=True, slots=True)
class FirstOf:
    """The first draft that has something to say."""

    drafts: tuple[Draft, ...]

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        proposals = [draft.propose(ids, limit) for draft in self.drafts]  # all of them follow
        return next((proposal for proposal in proposals if proposal), ())


@dataclass(slots=True)
class Gate:
    """Decides, by what was measured, whether drafts are checked or passes are plain.

    Both ways are tried for `probe` passes; then the faster one runs for `period` passes before the
    other is tried again. What is decided changes no token, only the time. To be kept from call to
    call: what it has learned goes on to hold.
    """

    probe: int = 4
    period: int = 64
    _rates: dict[Mode, float] = field(default_factory=dict)
    """Tokens a second that each way has reached of late."""
    _turns: Iterator[tuple[Mode, int]] | None = None

    def next_stretch(self) -> tuple[Mode, int]:
        """How to go on, and for how many passes."""
        if self._turns is None:
            self._turns = self._plan()
        return next(self._turns)

    def record(self, mode: Mode, tokens: int, seconds: float) -> None:
        """Tells what a stretch has brought; seconds of prompts do not count."""
        if tokens and seconds > 0:
            rate = tokens / seconds
            # A slow stretch may be one that met a new shape, for which a GPU prepares itself: what
            # was fast is forgotten slowly, what is faster is believed at once.
            self._rates[mode] = max(rate, (self._rates.get(mode, rate) + rate) / 2)

    def _plan(self) -> Iterator[tuple[Mode, int]]:
        yield "drafted", self.probe
        while True:
            yield "plain", self.probe
            yield "drafted", self.probe
            drafted, plain = self._rates.get("drafted", 0.0), self._rates.get("plain", 0.0)
            yield ("drafted" if drafted >= plain else "plain"), self.period


@dataclass(frozen=True, slots=True)
class Always:
    """A gate that stays one way: for measurements and tests."""

    mode: Mode

    def next_stretch(self) -> tuple[Mode, int]:
        return self.mode, 1 << 30

    def record(self, mode: Mode, tokens: int, seconds: float) -> None:
        pass


def accepted(draft: Sequence[int], choices: Sequence[int]) -> int:
    """How many tokens of a draft are what the network chose at their places."""
    count = 0
    for guessed, chosen in zip(draft, choices, strict=False):
        if guessed != chosen:
            break
        count += 1
    return count


def _letter_count(text: str) -> int:
    return sum(map(str.isalnum, text))


def _without_leading_marks(text: str) -> str:
    """The text without marks that were said already; one space before a word stays."""
    start = next((place for place, char in enumerate(text) if char.isalnum()), len(text))
    return text[start - 1 :] if start and text[start - 1].isspace() else text[start:]
