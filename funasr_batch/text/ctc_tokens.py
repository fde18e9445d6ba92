"""The vocabulary of Fun-ASR-Nano's CTC head: a rank file in tiktoken's format.

Each line has a piece of UTF-8 in base64 and its rank, which is its id. Whoever has the ranks has
the byte pair encoding: of all neighbours in a word whose joined bytes are a piece, those of the
lowest rank are joined first, the leftmost among equals. FunASR reads the file as Whisper does
(`funasr/models/sense_voice/whisper_lib/tokenizer.py`), and words are cut by GPT-2's pattern.

The ids above the ranks are the head's special labels (languages, events, times, the blank). They
stand for no text.
"""

from __future__ import annotations

import binascii
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from funasr_batch.errors import CheckpointError

_MAX_FILE_BYTES = 16 << 20
"""Whisper's multilingual file has 0.8 MB."""
_MAX_PIECES = 1 << 20
_MAX_PIECE_BYTES = 1024

_WORDS = Split(
    Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    behavior="isolated",
)

_GET_AGAIN = "Use the file that belongs to the model, or download the model again."


@dataclass(frozen=True, slots=True, eq=False)
class CtcTokens:
    """Text to the CTC head's labels and back. Made by `load_ctc_tokens`."""

    path: Path
    pieces: tuple[bytes, ...] = field(repr=False)
    """The bytes of each label that is text, in the order of ids."""
    _ranks: Mapping[bytes, int] = field(repr=False)

    def encode(self, text: str) -> tuple[int, ...]:
        """The labels of text as plain text; the name of a special label in it is ordinary text.

        What is not valid Unicode (half a surrogate pair) becomes `?`.
        """
        valid = text.encode("utf-8", "replace").decode("utf-8")
        return tuple(
            label
            for word, _ in _WORDS.pre_tokenize_str(valid)
            for label in _encode_word(word.encode("utf-8"), self._ranks)
        )

    def token_bytes(self, label: int) -> bytes:
        """The bytes of UTF-8 of a label, perhaps a part of a character; none for a special one."""
        return self.pieces[label] if 0 <= label < len(self.pieces) else b""

    def decode(self, labels: Iterable[int]) -> str:
        """The text of labels without the special ones; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, labels)).decode("utf-8", "replace")


def load_ctc_tokens(path: Path) -> CtcTokens:
    """Read a rank file.

    Raises:
        CheckpointError: it cannot be read, is too large, or is not a complete list of ranks.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_FILE_BYTES} bytes", hint=_GET_AGAIN)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", hint=_GET_AGAIN
        ) from error

    piece_of: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rank, piece = _parsed(path, number, line)
        if rank in piece_of:
            raise CheckpointError(f"{path}, line {number}: rank {rank} again", hint=_GET_AGAIN)
        piece_of[rank] = piece
    pieces = tuple(piece_of[rank] for rank in sorted(piece_of))
    ranks = {piece: rank for rank, piece in enumerate(pieces) if piece}
    bytes_missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if bytes_missing:
        raise CheckpointError(
            f"{path} is no byte-level vocabulary: {bytes_missing} of 256 bytes have no rank",
            hint=_GET_AGAIN,
        )
    if max(piece_of) != len(pieces) - 1:
        raise CheckpointError(f"{path} leaves out ranks", hint=_GET_AGAIN)
    if len(ranks) < sum(map(bool, pieces)):
        raise CheckpointError(f"{path} has one piece under two ranks", hint=_GET_AGAIN)
    return CtcTokens(path=path, pieces=pieces, _ranks=ranks)


def _parsed(path: Path, number: int, line: bytes) -> tuple[int, bytes]:
    match line.split():
        case [encoded, rank] if rank.isdigit() and len(rank) <= 7 and int(rank) < _MAX_PIECES:
            # Whisper's file ends with an unused piece, written as a lone padding sign.
            encoded = b"" if encoded == b"=" else encoded
            try:
                piece = binascii.a2b_base64(encoded, strict_mode=True)
            except ValueError as error:
                raise CheckpointError(f"{path}, line {number}: {error}", hint=_GET_AGAIN) from error
            if len(piece) <= _MAX_PIECE_BYTES:
                return int(rank), piece
    raise CheckpointError(f"{path}, line {number} is not a piece and a rank", hint=_GET_AGAIN)


def _encode_word(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Join neighbours until no two of them make a piece.

    A heap of the joins that are possible makes it n log n: a Chinese sentence is one word. An entry
    whose parts have changed since it was made is skipped.
    """
    if word in ranks:
        return [ranks[word]]
    size = len(word)
    after = list(range(1, size + 1))  # where the part that begins here ends; 0: none begins here
    before = list(range(-1, size))  # where the part before begins

    def join_at(start: int) -> None:
        middle = after[start]
        if middle < size:
            end = after[middle]
            rank = ranks.get(word[start:end])
            if rank is not None:
                heapq.heappush(joins, (rank, start, end))

    joins: list[tuple[int, int, int]] = []
    for start in range(size):
        join_at(start)
    while joins:
        _, start, end = heapq.heappop(joins)
        middle = after[start]
        if not start < middle < end or after[middle] != end:
            continue
        after[start], after[middle] = end, 0
        if end < size:
            before[end] = start
        join_at(start)
        if before[start] >= 0:
            join_at(before[start])

    parts = []
    start = 0
    while start < size:
        parts.append(ranks[word[start : after[start]]])
        start = after[start]
    return parts
