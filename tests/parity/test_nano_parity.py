"""Fun-ASR-Nano beside the real FunASR code: each stage, every step, one clip and many.

The goldens are of FunASR's modules and of transformers' Qwen3 on random weights. Their README
derives what to accept from another float32 implementation that is fed the same features; from raw
audio it is four times that. Texts and ids have to be equal: no step's two best tokens are closer
than 0.002.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import soundfile

from funasr_batch.decoding.generate import Request, generate
from funasr_batch.decoding.kv_cache import KvCache
from funasr_batch.decoding.nano import NanoDecoding, NanoRecognition, _Piece
from funasr_batch.decoding.nano_loading import NanoOptions, load_nano, load_network
from funasr_batch.decoding.sampling import Sampling
from funasr_batch.decoding.speculative import Always
from funasr_batch.frontend import FrontEnd, low_frame_rate
from funasr_batch.models.nano import audio_tokens
from funasr_batch.records import FloatArray
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint
from funasr_batch.weights.convert import convert

CLIPS = ["asr_example", "llamacpp_sample", "mid", "long"]
STEPS = 40
NO_STOP: frozenset[int] = frozenset()
"""FunASR's only stop, `<|im_end|>`, is in none of the golden sequences."""

# Quantity, what is accepted, and in the comment the largest difference measured on the four clips:
# from golden features / from audio.
ACCEPTED = {
    # In the first frame of llamacpp_sample, which hardly varies, so that its norm enlarges what is
    # rounded; 5.7e-6 / 9e-6 everywhere else.
    "encoder_out": 5e-5,  # 3.5e-5 / 3.8e-5
    "adaptor_out": 1e-4,  # 1.8e-5 / 2.1e-5
    "inputs_embeds": 1e-4,  # the same: the other rows are copied
    "first_logits": 1e-3,  # 3.7e-6 / 5.1e-6
    "step_logits_top5": 1e-3,  # 5.0e-6 / 7.2e-6
}
FROM_AUDIO = 4

VARIANTS = {
    "default": NanoOptions(),
    "language": NanoOptions(language="zh"),
    "hotwords": NanoOptions(language="zh", hotwords=("开放时间", "魔搭")),
    "no_itn": NanoOptions(language="en", itn=False),
}

Arrays = dict[str, np.ndarray]
Features = dict[str, FloatArray]


@dataclass(frozen=True)
class Model:
    """The converted checkpoint of the oracle, loaded."""

    checkpoint: Checkpoint
    decoding: NanoDecoding

    def with_options(self, options: NanoOptions) -> Model:
        decoding = load_nano(self.checkpoint, self.decoding.model, options)
        return Model(self.checkpoint, replace(decoding, streams=()))

    def embeddings(self, audio: mx.array) -> mx.array:
        """What the LLM is given: [P, D]."""
        llm, prompt = self.decoding.model.llm, self.decoding.prompt
        prefix, suffix = (llm.embed(mx.array(ids)) for ids in (prompt.prefix, prompt.suffix))
        return mx.concatenate([prefix, audio, suffix])

    def stages(self, features: FloatArray) -> Arrays:
        """What each stage makes of one clip, under the names of the goldens."""
        network = self.decoding.model
        memory = network.encode(mx.array(features)[None], None)
        everything = network.audio_adaptor(memory, None, len(features))
        [audio] = network.adapt(memory, None)
        embeddings = self.embeddings(audio)[None]
        logits = network.llm.logits(network.llm(embeddings)[0, -1])
        stages = {
            "encoder_out": memory,
            "adaptor_out": everything,
            "inputs_embeds": embeddings,
            "first_logits": logits,
        }
        return {name: np.array(value) for name, value in stages.items()}

    def requests(self, clips: Sequence[FloatArray]) -> list[Request]:
        """The clips as one padded batch through encoder and adaptor."""
        encoded = self.decoding.encode(clips)
        lengths = [len(one) for one in encoded]
        size = max(lengths)
        memory = mx.stack([mx.pad(one.memory, [(0, size - len(one)), (0, 0)]) for one in encoded])
        adapted = self.decoding.model.adapt(memory, mx.array(lengths))
        return [
            Request(self.embeddings(adapted[row, : audio_tokens(length)]), STEPS)
            for row, length in enumerate(lengths)
        ]

    def ids(
        self, clips: Sequence[FloatArray], *, rows: int = 16, sampling: Sampling | None = None
    ) -> list[list[int]]:
        texts, _ = generate(
            self.decoding.model.llm,
            self.requests(clips),
            stops=NO_STOP,
            rows=rows,
            sampling=sampling,
        )
        return [list(text.ids) for text in texts]


@pytest.fixture(scope="module")
def model(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("converted") / "nano-tiny"
    checkpoint = open_checkpoint(convert(oracle / "checkpoints" / "nano-tiny", folder))
    network = load_network(checkpoint, mx.float32)
    return Model(checkpoint, load_nano(checkpoint, network, NanoOptions())).with_options(
        NanoOptions()
    )


@pytest.fixture(scope="module")
def golden_features(oracle: Path) -> Features:
    """FunASR's own filter banks; Nano's front end has no CMVN."""
    return {
        clip: low_frame_rate(np.load(oracle / f"goldens/feats_{clip}.npz")["fbank"], 7, 6)
        for clip in CLIPS
    }


@pytest.fixture(scope="module")
def own_features(oracle: Path) -> Features:
    frontend = FrontEnd(7, 6, None)
    return {
        clip: frontend.features(soundfile.read(oracle / f"inputs/{clip}.wav", dtype="float32")[0])
        for clip in CLIPS
    }


@pytest.fixture(scope="module")
def golden(oracle: Path) -> Callable[[str], Arrays]:
    @cache
    def read(clip: str) -> Arrays:
        with np.load(oracle / f"goldens/nano-tiny_{clip}.npz") as stored:
            return dict(stored)

    return read


@pytest.fixture(scope="module")
def texts(oracle: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((oracle / "goldens/nano-tiny.json").read_text())
    return stored


# --- Features, encoder, adaptor, prompt -----------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
def test_the_front_end_is_funasrs(
    own_features: Features,
    golden_features: Features,
    golden: Callable[[str], Arrays],
    clip: str,
) -> None:
    """The goldens keep every eighth feature, after the encoder scaled them in place by 64**0.5."""
    ours, theirs = own_features[clip], golden(clip)["speech"][0] / 8
    np.testing.assert_array_equal(golden_features[clip][:, ::8], theirs)

    difference = ours - golden_features[clip]
    assert ours.shape == (len(theirs), 560)
    assert np.abs(difference).max() <= 5e-3  # measured: 1.2e-3, in quiet bins
    assert np.sqrt(np.square(difference).mean()) <= 1e-4  # measured: 1.0e-5


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("source", ["golden features", "audio"])
def test_each_stage_is_funasrs(
    model: Model,
    golden_features: Features,
    own_features: Features,
    golden: Callable[[str], Arrays],
    source: str,
    clip: str,
) -> None:
    features, times = (
        (golden_features, 1) if source == "golden features" else (own_features, FROM_AUDIO)
    )
    ours, theirs = model.stages(features[clip]), golden(clip)

    for quantity, value in ours.items():
        atol = times * ACCEPTED[quantity]
        np.testing.assert_allclose(value, theirs[quantity], rtol=0, atol=atol, err_msg=quantity)
    best = np.argsort(-ours["first_logits"])[:10]
    assert best.tolist() == theirs["first_logits_top10_ids"].tolist()


def test_norms_have_funasrs_epsilons(model: Model) -> None:
    """Two of them, which change less than what is accepted above."""
    network = model.decoding.model
    for part, epsilon in ((network.audio_encoder, 1e-5), (network.audio_adaptor, 1e-12)):
        norms = [layer for layer in part.modules() if isinstance(layer, nn.LayerNorm)]
        assert norms
        assert {norm.eps for norm in norms} == {epsilon}


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_have_funasrs_ids(model: Model, texts: dict[str, Any], variant: str) -> None:
    expected = texts["asr_example"][variant]
    [[begin]], [[count]] = expected["fbank_beg"], expected["fake_token_len"]
    prompt = model.with_options(VARIANTS[variant]).decoding.prompt

    assert list(prompt.prefix) == expected["source_ids"][:begin]
    assert list(prompt.suffix) == expected["source_ids"][begin + count :]
    assert count == audio_tokens(expected["speech_frames"][0][0])


@pytest.mark.parametrize("clip", CLIPS)
def test_a_clip_has_funasrs_number_of_audio_tokens(
    golden_features: Features, texts: dict[str, Any], clip: str
) -> None:
    [[count]] = texts[clip]["default"]["fake_token_len"]
    assert audio_tokens(len(golden_features[clip])) == count


# --- The LLM's steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("block", [1, 4, STEPS])
def test_each_step_has_funasrs_logits(
    model: Model,
    golden_features: Features,
    golden: Callable[[str], Arrays],
    texts: dict[str, Any],
    block: int,
    clip: str,
) -> None:
    """One token a pass, four, and all of them at once: what drafts make of it."""
    ids = texts[clip]["default"]["greedy_ids"]
    llm = model.decoding.model.llm
    [request] = model.requests([golden_features[clip]])
    cache = KvCache(llm.config, 1, 128, block, mx.float32)
    context, layers = cache.admit([0], [len(request.embeddings)])
    hidden = [llm(request.embeddings[None], context, layers)[:, -1:]]
    for first in range(0, STEPS, block):
        context, layers = cache.extend(block)
        inputs = mx.array([ids[first : first + block]])
        hidden.append(llm(llm.embed(inputs), context, layers))
    [logits] = np.array(llm.logits(mx.concatenate(hidden, axis=1)))[:, :STEPS]

    top5_ids = golden(clip)["step_logits_top5_ids"]
    np.testing.assert_array_equal(np.argsort(-logits, axis=-1)[:, 0], top5_ids[:, 0])
    np.testing.assert_allclose(
        np.take_along_axis(logits, top5_ids, axis=-1),
        golden(clip)["step_logits_top5"],
        rtol=0,
        atol=ACCEPTED["step_logits_top5"],
    )
    fifth = golden(clip)["step_logits_top5"][:, 4:]
    others = logits.copy()
    np.put_along_axis(others, top5_ids, -np.inf, axis=-1)
    assert (others <= fifth + ACCEPTED["step_logits_top5"]).all()


@pytest.mark.parametrize("source", ["golden features", "audio"])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_single_clip_has_funasrs_ids(
    model: Model,
    golden_features: Features,
    own_features: Features,
    texts: dict[str, Any],
    source: str,
    clip: str,
) -> None:
    features = golden_features if source == "golden features" else own_features
    assert model.ids([features[clip]]) == [texts[clip]["default"]["greedy_ids"]]
    penalty = Sampling(repetition_penalty=1.2)
    expected = texts[clip]["default"]["repetition_penalty_1.2_ids"]
    assert expected != texts[clip]["default"]["greedy_ids"]
    assert model.ids([features[clip]], sampling=penalty) == [expected]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_prompt_leads_to_funasrs_ids(
    model: Model, own_features: Features, texts: dict[str, Any], variant: str
) -> None:
    asked = model.with_options(VARIANTS[variant])
    [ids] = asked.ids([own_features["asr_example"]])
    assert ids == texts["asr_example"][variant]["greedy_ids"]
    assert as_funasr_writes(asked.decoding, ids) == texts["asr_example"][variant]["text"]
    assert len({tuple(texts["asr_example"][name]["greedy_ids"]) for name in VARIANTS}) == 4


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0, 3, 1]], ids=str)
def test_a_batch_has_the_ids_of_its_clips(
    model: Model, own_features: Features, texts: dict[str, Any], order: list[int], rows: int
) -> None:
    clips = [CLIPS[place] for place in order]
    features = [own_features[clip] for clip in clips]
    expected = [texts[clip]["default"] for clip in clips]

    assert model.ids(features, rows=rows) == [one["greedy_ids"] for one in expected]
    if rows == 2:
        penalised = model.ids(features, rows=rows, sampling=Sampling(repetition_penalty=1.2))
        assert penalised == [one["repetition_penalty_1.2_ids"] for one in expected]
    assert all(
        texts["batch"][clip]["ids"] == texts[clip]["default"]["greedy_ids"] for clip in clips
    )


def test_drafts_do_not_change_funasrs_ids(
    model: Model, own_features: Features, texts: dict[str, Any]
) -> None:
    """Drafts that are right but for every seventh token."""
    requests = []
    for request, clip in zip(model.requests(list(own_features.values())), CLIPS, strict=True):
        ids = texts[clip]["default"]["greedy_ids"]
        guess = [id if place % 7 else 0 for place, id in enumerate(ids)]
        requests.append(replace(request, draft=InPlace(guess)))
    results, tally = generate(
        model.decoding.model.llm, requests, stops=NO_STOP, rows=3, planner=Always("drafted")
    )
    assert [list(result.ids) for result in results] == [
        texts[clip]["default"]["greedy_ids"] for clip in CLIPS
    ]
    assert tally.accepted > STEPS


@dataclass(frozen=True)
class InPlace:
    """Proposes a text by place, whatever was said."""

    text: Sequence[int]

    def propose(self, ids: Sequence[int], limit: int) -> Sequence[int]:
        return self.text[len(ids) : len(ids) + limit]


# --- Texts ----------------------------------------------------------------------------------------


def as_funasr_writes(decoding: NanoDecoding, ids: Sequence[int]) -> str:
    """FunASR's decoding: special tokens skipped, runs of white space made one space."""
    return re.sub(r"\s+", " ", decoding.tokenizer.decode(ids).replace("/sil", " "))


@pytest.mark.parametrize("clip", CLIPS)
def test_texts_are_funasrs(model: Model, texts: dict[str, Any], clip: str) -> None:
    expected = texts[clip]["default"]
    assert as_funasr_writes(model.decoding, expected["greedy_ids"]) == expected["text"]
    penalised = expected["repetition_penalty_1.2_ids"]
    assert as_funasr_writes(model.decoding, penalised) == expected["repetition_penalty_1.2_text"]


def test_recognitions_begin_with_funasrs_ids(
    model: Model, own_features: Features, texts: dict[str, Any]
) -> None:
    """The whole way, one clip at a time and padded together; the goldens end after 40 tokens."""
    decoding = replace(model.decoding, rows=3)
    together = uncut(decoding, list(own_features.values()))
    for clip, recognition in zip(CLIPS, together, strict=True):
        [single] = uncut(decoding, [own_features[clip]])
        assert single.token_ids == recognition.token_ids
        assert single.text == recognition.text
        expected = texts[clip]["default"]["greedy_ids"]
        assert list(recognition.token_ids[:STEPS]) == expected


def uncut(decoding: NanoDecoding, batch: list[FloatArray]) -> list[NanoRecognition]:
    """Random weights never end a text; without this, each clip would be cut and read again."""
    encoded = decoding.encode(batch)
    pieces = [_Piece(number, 0, one) for number, one in enumerate(encoded)]
    return [decoding._recognition([read]) for read in decoding._read(pieces)]


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0]], ids=str)
def test_a_padded_batch_encodes_as_single_clips_do(
    model: Model, golden_features: Features, order: list[int]
) -> None:
    """Padding is filled with noise: nothing of it may be read."""
    network = model.decoding.model
    clips = [golden_features[CLIPS[place]] for place in order] + [golden_features["mid"][:1]]
    lengths, size = [len(clip) for clip in clips], max(map(len, clips))
    padded = np.random.default_rng(0).normal(0, 50, (len(clips), size, 560)).astype(np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip

    memory = network.encode(mx.array(padded), mx.array(lengths))
    adapted = np.array(network.adapt(memory, mx.array(lengths)))

    for row, clip in enumerate(clips):
        single = network.encode(mx.array(clip)[None], None)
        own = np.array(memory)[row]
        # Measured: 1.9e-6, audio tokens 3.3e-6: other sizes of the same products.
        np.testing.assert_allclose(own[: len(clip)], np.array(single)[0], rtol=0, atol=1e-5)
        assert not own[len(clip) :].any()
        [expected] = np.array(network.adapt(single, None))
        rows = audio_tokens(len(clip))
        np.testing.assert_allclose(adapted[row, :rows], expected, rtol=0, atol=1e-5)
