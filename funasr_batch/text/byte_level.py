"""The alphabet of byte-level BPE: each of the 256 bytes written as one printable character.

GPT-2 (Radford et al., 2019) keeps its vocabulary as text that way; Qwen's `tokenizer.json` does the
same. Printable Latin-1 characters stand for themselves, the other bytes for characters from
U+0100 on, in order. A token may hold a part of a character, so a text is put together from bytes.
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER = sorted(set(range(256)).difference(_PRINTABLE))

BYTE_OF: dict[str, int] = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + order): byte for order, byte in enumerate(_OTHER)
}
"""From a character of the alphabet to its byte."""

_CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def to_bytes(piece: str) -> bytes:
    """The bytes that a piece of the vocabulary stands for.

    A character outside the alphabet stands for itself (for its UTF-8), as in the `tokenizers`
    library's decoder.
    """
    try:
        return bytes(BYTE_OF[char] for char in piece)
    except KeyError:
        return piece.encode("utf-8", "replace")


def from_bytes(raw: bytes) -> str:
    """The piece of a vocabulary that stands for some bytes."""
    return "".join(_CHAR_OF[byte] for byte in raw)
