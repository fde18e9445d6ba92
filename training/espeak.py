"""Speech with word times from libespeak-ng, called in process.

The library is used in its synchronous mode: it hands every block of audio to a callback together
with the events (word, phoneme, end of clause) that fall into it, each with its sample position.
It keeps global state, so a process has one `Espeak` at a time.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Constants and structures of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000
_BUFFER_MS = 1000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_EVENT_LIST_TERMINATED, _EVENT_WORD, _EVENT_END, _EVENT_PHONEME = 0, 1, 5, 7
_RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7

_VARIANTS = os.path.join("voices", "!v")

_PAUSES = frozenset({b"_", b"_:", b"_::", b"_!", b"_^_"})
"""Phonemes that are silence. `_|` is not among them: it is a boundary of no length."""


class _EventId(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a sentence is spoken."""

    variant: str = ""
    """Voice variant such as `f2` or `croak`; the plain voice when empty."""
    rate: int = 175
    """Words a minute, 80 to 450."""
    pitch: int = 50
    """0 to 100."""
    pitch_range: int = 50
    """0 (monotone) to 100."""
    word_gap: int = 0
    """Extra silence between words, in units of 10 ms at the default rate."""
    volume: int = 80
    """0 to 200; above 100 many voices clip."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word that the synthesiser announced: samples [start, end) of the audio."""

    position: int
    """Index of its first character in the text."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Speech:
    samples: npt.NDArray[np.int16] = field(repr=False)
    """int16 [samples] at `Espeak.sample_rate`."""
    words: tuple[Word, ...]
    """In time order, not overlapping."""


class Espeak:
    """The library, initialised once a process.

    `library` is the shared object (environment variable `ESPEAK_LIBRARY`), `data` the folder that
    holds `espeak-ng-data` (`ESPEAK_DATA_PATH`); both default to the system's.

    Raises OSError when the library cannot be loaded or finds no data.
    """

    def __init__(self, library: str | None = None, data: str | None = None) -> None:
        library = library or os.environ.get("ESPEAK_LIBRARY", "libespeak-ng.so.1")
        data = data or os.environ.get("ESPEAK_DATA_PATH")
        self._library = ctypes.CDLL(library)
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self.sample_rate: int = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS,
            _BUFFER_MS,
            data.encode() if data else None,
            _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT,
        )
        if self.sample_rate <= 0:
            raise OSError(f"espeak-ng found no espeak-ng-data in {data or 'its default folder'}")
        found = ctypes.c_char_p()
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._library.espeak_Info(ctypes.byref(found))
        self.variants = frozenset(
            os.listdir(os.path.join(os.fsdecode(found.value or b""), _VARIANTS))
        )
        self._blocks: list[bytes] = []
        self._events: list[tuple[int, int, int, bytes]] = []
        self._callback = _Callback(self._collect)  # kept: the library holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, voice: str, text: str, delivery: Delivery) -> Speech:
        """Speak `text`, which holds ASCII only, with an espeak-ng voice such as `en-us`.

        Raises ValueError when the voice does not exist, RuntimeError when synthesis fails.
        """
        self._select(voice, delivery)
        self._blocks.clear()
        self._events.clear()
        encoded = text.encode("ascii") + b"\0"
        status = self._library.espeak_Synth(
            encoded, len(encoded), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak-ng returned {status} for {text!r}")
        samples = np.frombuffer(b"".join(self._blocks), dtype=np.int16)
        return Speech(samples, _words(self._events, len(samples)))

    def phonemes(self, voice: str, text: str) -> str:
        """The phoneme mnemonics of one clause, as the synthesiser would speak it."""
        self._select(voice, Delivery())
        pointer = ctypes.c_void_p()
        buffer = ctypes.create_string_buffer(text.encode("ascii"))
        pointer.value = ctypes.addressof(buffer)
        phonemes: bytes = self._library.espeak_TextToPhonemes(ctypes.byref(pointer), _CHARS_UTF8, 0)
        return phonemes.decode("ascii")

    def _select(self, voice: str, delivery: Delivery) -> None:
        name = f"{voice}+{delivery.variant}" if delivery.variant else voice
        known = not delivery.variant or delivery.variant in self.variants
        if not known or self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name}")
        for parameter, value in (
            (_RATE, delivery.rate),
            (_VOLUME, delivery.volume),
            (_PITCH, delivery.pitch),
            (_RANGE, delivery.pitch_range),
            (_WORD_GAP, delivery.word_gap),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)

    def _collect(self, block: ctypes._Pointer[ctypes.c_short], count: int, events: object) -> int:
        if block and count:
            self._blocks.append(ctypes.string_at(block, count * 2))
        for event in events:  # type: ignore[attr-defined]
            if event.type == _EVENT_LIST_TERMINATED:
                return 0
            name = event.id.string if event.type == _EVENT_PHONEME else b""
            self._events.append((event.type, event.text_position, event.sample, name))
        return 0


def _words(events: list[tuple[int, int, int, bytes]], total: int) -> tuple[Word, ...]:
    """Words from their start events; each ends at the next word, pause or end of clause."""
    words: list[Word] = []
    opened: tuple[int, int] | None = None
    for kind, position, sample, name in events:
        starts = kind == _EVENT_WORD
        silent = kind == _EVENT_END or (kind == _EVENT_PHONEME and name in _PAUSES)
        if not (starts or silent):
            continue
        if opened is not None and sample > opened[1]:
            words.append(Word(opened[0], opened[1], sample))
            opened = None
        if starts:
            opened = (position - 1, sample)
    if opened is not None and total > opened[1]:
        words.append(Word(opened[0], opened[1], total))
    return tuple(words)
