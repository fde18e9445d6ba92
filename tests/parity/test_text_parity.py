"""Texts and token times beside those of the real FunASR code.

Where FunASR is known to be wrong, the test says how, and that we are not:

* a `@@` piece before a Chinese character moves to the next Latin word or is lost (oracle quirk 17);
* a Chinese character after such a piece gets the piece's time;
* tokens that are neither Chinese nor alphabetic have no time, so later times are shifted;
* `<unk>` is dropped after the times were dealt out, so later times are shifted;
* times before the segment's start are negative;
* a plain Paraformer's times are read off the peaks instead of the alphas (quirk 16).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from funasr_batch.text.timestamps import (
    FRAME_SHIFT_MS,
    frame_token_spans,
    upsampled_token_spans,
)
from funasr_batch.text.tokens import detokenise, is_cjk, join_texts, render_text

SINGLE_CLIP_CALLS = {
    "paraformer": ["default", "output_timestamp"],
    "bicif": ["default"],
    "seaco": ["hotwords", "no_hotwords"],
}
CLIPS = ["asr_example", "llamacpp_sample", "mid", "long"]
CALLS = [
    (model, call, clip)
    for model, calls in SINGLE_CLIP_CALLS.items()
    for call in calls
    for clip in CLIPS
]
WITH_TIMESTAMP_HEAD = [row for row in CALLS if row[0] != "paraformer"]


@pytest.fixture(scope="module")
def made_up(oracle: Path) -> dict[str, Any]:
    return json.loads((oracle / "goldens/postprocess.json").read_text())


def golden(oracle: Path, model: str, call: str, clip: str) -> dict[str, Any]:
    return json.loads((oracle / f"goldens/{model}-tiny.json").read_text())[call][clip]


def arrays(oracle: Path, model: str, clip: str) -> Any:
    return np.load(oracle / f"goldens/{model}-tiny_{clip}.npz")


def kept_pieces(oracle: Path, model: str, token_ids: list[int]) -> list[str]:
    vocabulary = json.loads((oracle / f"checkpoints/{model}-tiny/tokens.json").read_text())
    return [vocabulary[number] for number in token_ids if number not in (0, 1, 2)]


def squeezed(text: str) -> str:
    return text.replace(" ", "")


def is_alphabetic(piece: str) -> bool:
    return all(char.isalpha() or char == "'" for char in piece.removesuffix("@@"))


def funasr_misplaces_something(pieces: list[str]) -> bool:
    if any(
        not is_cjk(piece[0]) and not piece.isdigit() and not is_alphabetic(piece)
        for piece in pieces
    ):
        return True  # no time for it; or `<unk>`
    return any(
        piece.endswith("@@")
        and not (following and is_alphabetic(following) and not is_cjk(following[0]))
        for piece, following in zip(pieces, [*pieces[1:], ""], strict=True)
    )


def test_words_and_times_equal_sentence_postprocess(made_up: dict[str, Any]) -> None:
    compared = 0
    for case in made_up["sentence_postprocess"]:
        pieces = case["words"]
        tokens = detokenise(pieces, case["timestamp_in"], [1.0] * len(pieces), 0)
        said = "".join(piece.removesuffix("@@") for piece in pieces if piece != "<unk>")
        assert squeezed(render_text(tokens)).lower() == said
        if funasr_misplaces_something(pieces):
            continue
        compared += 1
        text, times, *_ = case["with_ts"]
        assert [token.text for token in tokens] == text.split()
        assert [[token.start, token.end] for token in tokens] == times
        assert squeezed(render_text(tokens)) == squeezed(case["plain"][0])
    assert compared == 59


def test_texts_join_like_funasr(made_up: dict[str, Any]) -> None:
    for case in made_up["join_vad_texts"]:
        texts = [text.replace("<|zh|>", "") for text in case["texts"]]  # a SenseVoice tag
        assert join_texts(texts) == case["out"]


def test_upsampled_spans_equal_ts_prediction(made_up: dict[str, Any]) -> None:
    """But for alphas above 1, which the head (at most 0.24 before rescaling) does not give."""
    compared = 0
    for case in made_up["ts_prediction_lfr6_standard"]:
        characters = [char for char in case["chars"] if char != "</s>"]
        alphas = np.array(case["alphas"], dtype=np.float32)
        if case["upsample_rate"] != 3 or alphas.max() > 1:
            continue
        compared += 1
        spans = upsampled_token_spans(alphas, len(characters), duration_ms=20 * len(alphas))
        ours = [(start + case["vad_offset"], end + case["vad_offset"]) for start, end in spans]
        assert_times_equal(ours, case["timestamp"], earliest=case["vad_offset"])
    assert compared == 41


def assert_times_equal(ours, theirs, *, earliest: int = 0) -> None:
    """FunASR truncates float seconds (1839 for 1840) and begins before the segment's start."""
    clamped = np.maximum(np.array(theirs), earliest)
    np.testing.assert_allclose(np.array(ours), clamped, rtol=0, atol=1)


@pytest.mark.parametrize(("model", "call", "clip"), CALLS)
def test_text_equals_funasr(oracle: Path, model: str, call: str, clip: str) -> None:
    """Whole words only where FunASR does not move pieces; no piece missing anywhere."""
    result = golden(oracle, model, call, clip)
    pieces = kept_pieces(oracle, model, result["token_ids"])
    tokens = detokenise(pieces, [(0, 1)] * len(pieces), [1.0] * len(pieces), 0)
    assert squeezed(render_text(tokens)) == "".join(piece.removesuffix("@@") for piece in pieces)
    theirs = squeezed(result["text"])
    ours = squeezed(render_text(tokens))
    if funasr_misplaces_something(pieces):
        chinese = [char for char in ours if is_cjk(char)]
        assert [char for char in theirs if is_cjk(char)] == chinese
        assert ours != theirs
        assert len(ours) >= len(theirs)
    else:
        assert ours == theirs


def times_of_chinese(result: dict[str, Any]) -> list[list[int]]:
    return [
        span
        for word, span in zip(result["text"].split(), result["timestamp"], strict=True)
        if is_cjk(word[0])
    ]


def as_funasr_deals_them_out(
    pieces: list[str], spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The times of the Chinese pieces; after unfinished words, those of the unfinished words."""
    dealt = []
    unfinished: list[tuple[int, int]] = []
    for piece, span in zip(pieces, spans, strict=True):
        if piece.endswith("@@"):
            unfinished.append(span)
            continue
        if is_cjk(piece[0]):
            dealt.append((unfinished[0][0], unfinished[-1][1]) if unfinished else span)
        unfinished = []
    return dealt


@pytest.mark.parametrize(("model", "call", "clip"), WITH_TIMESTAMP_HEAD)
def test_times_equal_funasr(oracle: Path, model: str, call: str, clip: str) -> None:
    """Each piece's time is FunASR's; after unfinished words FunASR gives it to the wrong word."""
    result = golden(oracle, model, call, clip)
    pieces = kept_pieces(oracle, model, result["token_ids"])
    alphas = arrays(oracle, model, clip)["us_alphas"][0]
    spans = upsampled_token_spans(alphas, len(pieces), duration_ms=20 * len(alphas))
    dealt = as_funasr_deals_them_out(pieces, list(spans))
    assert len(dealt) > 15
    assert_times_equal(dealt, times_of_chinese(result))

    tokens = detokenise(pieces, spans, [1.0] * len(pieces), 0)
    ours = [(token.start, token.end) for token in tokens if is_cjk(token.text[0])]
    assert ours == [span for piece, span in zip(pieces, spans, strict=True) if is_cjk(piece[0])]


def funasr_fires(curve: np.ndarray, kept: int) -> np.ndarray:
    """Steps at which FunASR's loop fires when a curve is rescaled to one fire more than tokens."""
    fires, total = [], 0.0
    for step, weight in enumerate(curve.astype(np.float64) * (kept + 1) / curve.sum()):
        total += weight
        if total >= 1 - 1e-4:
            fires.append(step)
            total -= 1 - 1e-4
    return np.array(fires)


@pytest.mark.parametrize("clip", CLIPS)
def test_plain_paraformer_times_come_from_alphas_where_funasr_takes_peaks(
    oracle: Path, clip: str
) -> None:
    """FunASR's golden is what its rule makes of the *peaks*; ours follow the alphas."""
    result = golden(oracle, "paraformer", "output_timestamp", clip)
    pieces = kept_pieces(oracle, "paraformer", result["token_ids"])
    stored = arrays(oracle, "paraformer", clip)
    alphas, peaks = stored["alphas"][0, :-1], stored["cif_peak"][0]

    from_peaks = 60 * (funasr_fires(peaks, len(pieces)) - 1.5)
    dealt = as_funasr_deals_them_out(pieces, [(start, start) for start in from_peaks[:-1]])
    theirs = [start for start, _ in times_of_chinese(result)]
    np.testing.assert_allclose([start for start, _ in dealt], theirs, rtol=0, atol=1)

    spans = frame_token_spans(alphas, len(pieces), duration_ms=60 * len(alphas))
    mass = np.concatenate(([0.0], np.cumsum(alphas, dtype=np.float64)))
    mass *= (len(pieces) + 1) / mass[-1]
    there = np.interp(
        [start - FRAME_SHIFT_MS for start, _ in spans], 60 * np.arange(len(mass)), mass
    )
    np.testing.assert_allclose(there, np.arange(len(pieces)) + 0.5, rtol=0, atol=0.02)


def test_real_alphas_place_every_token_at_its_spike(shared_data: Path) -> None:
    """A published Paraformer's alphas: all but a few of its 65 tokens are one spike each.

    The running sum passes many whole numbers only one spike later (FunASR's fire is then up to
    300 ms late); ours are at the spike.
    """
    real = json.loads((shared_data / "golden/paraformer_cif/ali_example_1.json").read_text())
    alphas = np.array(real["alphas"][: real["n_frames"]], dtype=np.float32)
    kept = real["n_tokens"] - 1
    spans = frame_token_spans(alphas, kept, duration_ms=60 * len(alphas), shift_ms=0)
    frames = np.array([start // 60 for start, _ in spans])
    at_spike = alphas[frames] > 0.5
    assert at_spike.sum() == kept
    late = np.array(real["idx"][:kept]) - frames
    assert late.min() >= 0
    assert late.max() >= 4
