import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from funasr_batch.errors import RecognitionError
from funasr_batch.text.timestamps import frame_token_spans, upsampled_token_spans


def spikes(length: int, at: list[int], height: float = 1.0) -> np.ndarray:
    alphas = np.zeros(length, dtype=np.float32)
    alphas[at] = height
    return alphas


def test_the_worked_example_of_the_upsampled_head() -> None:
    """90 steps of 20 ms, four fires, three characters; the last is cut at 240 ms."""
    spans = upsampled_token_spans(spikes(90, [20, 32, 44, 70]), 3, duration_ms=1800)
    assert spans == ((370, 610), (610, 850), (850, 1090))


def test_the_last_token_takes_a_short_rest_or_half_of_a_longer_one() -> None:
    def last_end(steps: int) -> int:
        return upsampled_token_spans(spikes(steps, [20, 30]), 1, duration_ms=20 * steps)[-1][1]

    assert last_end(33) == 660  # 90 ms after the fire at 570: all of it
    assert last_end(40) == (570 + 800) / 2
    assert last_end(400) == 570 + 240  # not half of seven seconds of silence


def test_a_first_token_never_begins_before_the_segment() -> None:
    assert upsampled_token_spans(spikes(30, [0, 8]), 1, duration_ms=600)[0][0] == 0


def test_alphas_that_fire_too_often_or_too_rarely_are_rescaled_in_a_copy() -> None:
    alphas = np.full(60, 0.1, dtype=np.float32)  # six fires
    before = alphas.copy()
    for kept in (2, 5, 11):
        spans = upsampled_token_spans(alphas, kept, duration_ms=1200)
        assert len(spans) == kept
        spacing = np.diff([start for start, _ in spans])
        assert np.all(np.abs(spacing - 1200 / (kept + 1)) <= 20)
    assert np.array_equal(alphas, before)


def test_frames_place_a_token_inside_the_frame_of_its_spike() -> None:
    """Two frames share the first token's weight: it is placed between them."""
    alphas = spikes(16, [10, 14])
    alphas[4:6] = 0.5
    spans = frame_token_spans(alphas, 2, duration_ms=960, shift_ms=0)
    assert spans == ((300, 540), (630, 960))


def test_a_spike_that_falls_just_short_of_one_keeps_its_place() -> None:
    """The running sum passes 1 only with the second spike, 900 ms after the first."""
    alphas = spikes(40, [5, 20, 35], height=1 - 1e-3)
    spans = frame_token_spans(alphas, 2, duration_ms=2400, shift_ms=0)
    assert [start for start, _ in spans] == pytest.approx([330, 1230], abs=1)


def test_limits_are_times_not_numbers_of_frames() -> None:
    """A silence of 600 ms is ten 60 ms frames; FunASR's twelve steps would not cut it off."""
    (first, _second) = frame_token_spans(spikes(40, [5, 15, 20]), 2, duration_ms=2400)
    assert first[1] - first[0] == 240


def test_a_count_made_by_the_predictor_needs_no_rescaling() -> None:
    """floor(sum + 0.45) tokens: the last one's middle is inside the sum, so nothing stretches."""
    alphas = spikes(40, [5, 20, 35])
    alphas[35] = 0.6
    spans = frame_token_spans(alphas, 2, duration_ms=2400, shift_ms=0)
    assert [start for start, _ in spans] == [330, 1230]


def test_a_shift_moves_every_token() -> None:
    alphas = spikes(40, [10, 20, 30])
    still = frame_token_spans(alphas, 2, duration_ms=2400, shift_ms=0)
    moved = frame_token_spans(alphas, 2, duration_ms=2400, shift_ms=-100)
    assert moved == tuple((start - 100, end - 100) for start, end in still)


@pytest.mark.parametrize("spans_of", [upsampled_token_spans, frame_token_spans])
def test_no_token_no_span(spans_of) -> None:
    assert spans_of(spikes(10, [3]), 0, duration_ms=200) == ()
    assert spans_of(spikes(0, []), 0, duration_ms=0) == ()


@pytest.mark.parametrize("spans_of", [upsampled_token_spans, frame_token_spans])
def test_weights_that_are_not_numbers_are_an_error_of_the_recording(spans_of) -> None:
    with pytest.raises(RecognitionError, match="finite"):
        spans_of(np.array([0.5, np.nan], dtype=np.float32), 1, duration_ms=40)


@pytest.mark.parametrize("spans_of", [upsampled_token_spans, frame_token_spans])
@given(
    alphas=arrays.arrays(
        np.float32, st.integers(0, 80), elements=st.floats(0, 1, width=32, allow_subnormal=False)
    ),
    kept=st.integers(0, 40),
    duration_ms=st.integers(40, 3000),
)
def test_spans_are_in_order_apart_and_inside_whatever_the_weights(
    spans_of, alphas, kept, duration_ms
) -> None:
    spans = spans_of(alphas, kept, duration_ms=duration_ms)
    assert len(spans) == kept
    assert all(start < end for start, end in spans)
    times = [time for span in spans for time in span]
    assert times == sorted(times)
    assert all(0 <= time <= duration_ms for time in times)


def test_more_tokens_than_milliseconds_still_stay_inside() -> None:
    spans = upsampled_token_spans(spikes(3, [0]), 9, duration_ms=4)
    assert len(spans) == 9
    assert all(0 <= start <= end <= 4 for start, end in spans)
