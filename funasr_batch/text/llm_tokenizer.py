"""The tokenizer of Fun-ASR-Nano's language model: a byte-level BPE in Hugging Face's format.

`tokenizer.json` names some tokens that are not text, such as `<|im_end|>`. They are kept apart from
the BPE here: text is encoded by a BPE that does not have them, so no text, whatever it holds, can
turn into one, and whoever wants one asks for it by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from funasr_batch.errors import CheckpointError
from funasr_batch.text.byte_level import BYTE_OF, to_bytes

_MAX_FILE_BYTES = 64 << 20
"""Qwen3's file has 11 MB."""
_MAX_VOCAB_SIZE = 1 << 20
"""Qwen3 has 152 thousand tokens."""

_PROBE = "Aa 1.5\n\n\t<|x|> 语音转写：日本語 ÿ 🎙\u0301 \x00"
"""Text whose tokens must give back its bytes; it is in Unicode's composed form (NFC)."""

_GET_AGAIN = "Use the tokenizer.json that belongs to the model, or download the model again."


@dataclass(frozen=True, slots=True, eq=False)
class LlmTokenizer:
    """Text to token ids and back. Made by `load_llm_tokenizer`."""

    path: Path
    """The file that it was read from, for messages."""
    vocab_size: int
    """One more than the largest id; the model may have more rows of embeddings."""
    _bpe: Tokenizer = field(repr=False)
    """Without the tokens that are not text."""
    _named: Mapping[str, tuple[int, ...]] = field(repr=False)
    """The ids of each token that is not text; more than one where the file contradicts itself."""
    _added: Mapping[int, bytes] = field(repr=False)
    """What each of them looks like in decoded text: nothing, or its name."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of text as plain text: `<|im_end|>` in it is ten ordinary characters.

        The text is brought into Unicode's composed form (NFC) first where the tokenizer says so, as
        Qwen's does. What is not valid Unicode (half a surrogate pair) becomes `?`.
        """
        valid = text.encode("utf-8", "replace").decode("utf-8")
        return tuple(self._bpe.encode(valid, add_special_tokens=False).ids)

    def special(self, name: str) -> int:
        """The id of a token that is not text, for example `<|im_end|>`.

        Raises:
            CheckpointError: the tokenizer has no such token, or more than one.
        """
        match self._named.get(name, ()):
            case (token,):
                return token
            case ():
                raise CheckpointError(f"{self.path} has no token {name}", hint=_GET_AGAIN)
            case several:
                raise CheckpointError(
                    f"{self.path}: the token {name} has no id of its own (ids {several})",
                    hint=_GET_AGAIN,
                )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, leaving out those that the tokenizer marks as special.

        Like FunASR's (`skip_special_tokens=True`): ids beyond the vocabulary are nothing, bytes
        that are not UTF-8 are U+FFFD.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of UTF-8 that a token adds to a text; none for a special or unknown token.

        They may begin or end within a character. A token that is not text but not marked as special
        either (Qwen's `<think>`) is spelt out, as FunASR's decoding does.
        """
        if token in self._added:
            return self._added[token]
        piece = self._bpe.id_to_token(token) if 0 <= token < self.vocab_size else None
        return b"" if piece is None else to_bytes(piece)


def load_llm_tokenizer(path: Path) -> LlmTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        CheckpointError: it cannot be read, is too large, or is not a byte-level BPE.
    """
    spec = _read(path)
    vocab, added = _checked(path, spec)
    named = _named_ids(path, vocab, added)
    tokenizer = LlmTokenizer(
        path=path,
        vocab_size=1 + max(*vocab.values(), *(token["id"] for token in added)),
        _bpe=_without(frozenset(named), path, spec),
        _named=named,
        _added={
            token["id"]: b"" if token.get("special") else token["content"].encode("utf-8")
            for token in added
        },
    )
    if b"".join(map(tokenizer.token_bytes, tokenizer.encode(_PROBE))) != _PROBE.encode("utf-8"):
        raise CheckpointError(
            f"{path}: this tokenizer changes the text that it encodes", hint=_GET_AGAIN
        )
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_FILE_BYTES} bytes", hint=_GET_AGAIN)
        spec = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", hint=_GET_AGAIN
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint=_GET_AGAIN) from error
    if not isinstance(spec, dict):
        raise CheckpointError(f"{path} does not describe a tokenizer", hint=_GET_AGAIN)
    return spec


def _checked(path: Path, spec: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The vocabulary and the added tokens, once they are what they should be."""
    model, added = spec.get("model"), spec.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocab, dict):
        raise CheckpointError(f"{path} does not describe a BPE tokenizer", hint=_GET_AGAIN)
    entries_are_sound = (
        all(map(_is_id, vocab.values()))
        and len(set(vocab.values())) == len(vocab)
        and isinstance(model.get("merges"), list)
        and isinstance(added, list)
        and all(isinstance(token, dict) and _is_id(token.get("id")) for token in added)
        and all(isinstance(token.get("content"), str) and token["content"] for token in added)
    )
    if not entries_are_sound:
        raise CheckpointError(f"{path} has damaged lists of tokens", hint=_GET_AGAIN)
    missing = [char for char in BYTE_OF if char not in vocab]
    if missing:
        raise CheckpointError(
            f"{path} is not a byte-level BPE: {len(missing)} of 256 bytes have no token",
            hint=_GET_AGAIN,
        )
    return vocab, added


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_VOCAB_SIZE


def _named_ids(
    path: Path, vocab: dict[str, int], added: list[dict[str, Any]]
) -> dict[str, tuple[int, ...]]:
    """The ids that the file gives to each token that is not text: one, if it is in order."""
    piece_of = {number: piece for piece, number in vocab.items()}
    ids: dict[str, set[int]] = {}
    for token in added:
        name, number = token["content"], token["id"]
        if piece_of.setdefault(number, name) != name:
            raise CheckpointError(
                f"{path}: {name} and {piece_of[number]} share the id {number}", hint=_GET_AGAIN
            )
        ids.setdefault(name, {vocab.get(name, number)}).add(number)
    return {name: tuple(sorted(numbers)) for name, numbers in ids.items()}


def _without(names: frozenset[str], path: Path, spec: dict[str, Any]) -> Tokenizer:
    """The BPE alone: nothing in it can produce one of the named tokens.

    A vocabulary may list them beside the pieces of text, where merges, or `ignore_merges`, could
    still reach them.
    """
    model = spec["model"]
    try:
        if not names.isdisjoint(model["vocab"]):
            vocab = {piece: id_ for piece, id_ in model["vocab"].items() if piece not in names}
            merges = [merge for merge in model["merges"] if not _involves(merge, names)]
            model = {**model, "vocab": vocab, "merges": merges}
        plain = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": spec.get("normalizer"),
            "pre_tokenizer": spec.get("pre_tokenizer"),
            "model": model,
        }
        return Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing more exact
        raise CheckpointError(f"{path} is refused: {error}", hint=_GET_AGAIN) from error


def _involves(merge: Any, names: frozenset[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return not names.isdisjoint((left, right, left + right))
