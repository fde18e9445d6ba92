"""Features beside FunASR's own (torchaudio's fbank) and kaldi-native-fbank's."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from funasr_batch.frontend import FrontEnd, fbank, parse_am_mvn
from funasr_batch.records import FloatArray

CLIPS = ["asr_example", "llamacpp_sample", "mid", "long"]
SHORT = [300, 400, 401, 560, 720, 880, 1040, 1200, 1360, 1600, 2000, 2400, 3200]


def clip(oracle: Path, name: str) -> FloatArray:
    samples, _ = soundfile.read(oracle / "inputs" / f"{name}.wav", dtype="float32")
    return samples


@pytest.fixture
def frontend(oracle: Path) -> FrontEnd:
    return FrontEnd(7, 6, parse_am_mvn((oracle / "inputs/asr_am.mvn").read_text()))


def assert_close_fbank(ours: FloatArray, theirs: FloatArray) -> None:
    assert ours.shape == theirs.shape
    difference = ours - theirs
    assert np.abs(difference).max() < 5e-3
    assert np.sqrt(np.mean(difference**2)) < 1e-4


@pytest.mark.parametrize("name", CLIPS)
def test_fbank_is_torchaudios(oracle: Path, name: str) -> None:
    golden = np.load(oracle / f"goldens/feats_{name}.npz")
    samples = clip(oracle, name)
    np.testing.assert_array_equal(samples[:64], golden["wav_head"])

    assert_close_fbank(fbank(samples), golden["fbank"])


@pytest.mark.parametrize("name", CLIPS)
def test_features_are_funasrs(oracle: Path, frontend: FrontEnd, name: str) -> None:
    golden = np.load(oracle / f"goldens/feats_{name}.npz")["lfr_cmvn"]

    np.testing.assert_allclose(
        frontend.features(clip(oracle, name)), golden.reshape(-1, 560), rtol=0, atol=5e-4
    )


@pytest.mark.parametrize("length", SHORT)
def test_features_of_short_clips_are_funasrs(oracle: Path, frontend: FrontEnd, length: int) -> None:
    golden = np.load(oracle / "goldens/feats_short.npz")
    start = int(golden["start"])

    features = frontend.features(clip(oracle, "asr_example")[start : start + length])

    np.testing.assert_allclose(features, golden[f"n{length}"], rtol=0, atol=1e-4)


def test_cmvn_is_funasrs(oracle: Path, frontend: FrontEnd) -> None:
    golden = np.load(oracle / "goldens/cmvn_asr.npz")

    assert frontend.cmvn is not None
    np.testing.assert_array_equal(frontend.cmvn.shift, golden["shift"])
    np.testing.assert_array_equal(frontend.cmvn.scale, golden["scale"])


def test_features_are_those_of_kaldi_native_fbank(oracle: Path, shared_data: Path) -> None:
    golden = np.load(shared_data / "golden/paraformer_frontend/asr_example.npz")

    assert_close_fbank(fbank(clip(oracle, "asr_example")), golden["fbank80"])
