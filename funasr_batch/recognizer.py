"""A loaded model with all that leads from audio to text: cutting, features, decoding, wording.

Finding a model's files needs no MLX, so that a run with nothing to do never imports it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from funasr_batch.errors import CheckpointError, FileError, ModelError
from funasr_batch.frontend import Cmvn, FrontEnd
from funasr_batch.records import (
    Clip,
    FloatArray,
    ModelInfo,
    Recognition,
    Segment,
    TextSegment,
    Transcript,
)
from funasr_batch.segments import Segmenter, SegmentPolicy, WindowCutter
from funasr_batch.settings import Settings
from funasr_batch.text.tokens import detokenise, render_text
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors, open_checkpoint
from funasr_batch.weights.hub import resolve_model

if TYPE_CHECKING:
    from funasr_batch.decoding.paraformer import BatchResult, ParaformerDecoding
    from funasr_batch.vad import VoiceActivityStream

_BLANK, _SOS, _EOS = "<blank>", "<s>", "</s>"


class Cutter(Protocol):
    """Cuts one recording's blocks into clips; see `segments`."""

    def accept(self, block: FloatArray) -> list[Clip]: ...
    def finish(self) -> list[Clip]: ...


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The checkpoints that some settings call for, found and checked but not loaded."""

    name: str
    asr: Checkpoint
    vad: Checkpoint | None
    """FSMN-VAD's; None where the embedded VAD or none is used."""
    vad_digest: str
    """Of the VAD's weights, whichever it is."""

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(self.name, self.asr.revision, self.asr.weights_sha256)

    @property
    def digest(self) -> str:
        """Names every weight that can change a transcript."""
        digests = f"{self.asr.weights_sha256} {self.vad_digest}"
        return hashlib.sha256(digests.encode()).hexdigest()


def find_model(settings: Settings, cache_dir: Path) -> ModelFiles:
    """Finds, downloads or converts what `settings` names.

    Raises ModelError when something is missing and CheckpointError when it is refused.
    """

    def opened(name: str, offline: bool) -> Checkpoint:
        return open_checkpoint(resolve_model(name, offline=offline, cache_dir=cache_dir))

    asr = opened(settings.model, settings.offline)
    vad = None
    if settings.vad == "fsmn" or (settings.vad == "auto" and settings.vad_model):
        vad = opened(settings.vad_model or "fsmn-vad", settings.offline)
    elif settings.vad == "auto" and not settings.model.startswith("sample-"):
        # FunASR's own VAD where its weights lie at hand; it is not worth a download by itself.
        try:
            vad = opened("fsmn-vad", True)
        except CheckpointError:
            raise
        except ModelError:
            vad = None
    return ModelFiles(settings.model, asr, vad, _vad_digest(vad, settings))


def _vad_digest(vad: Checkpoint | None, settings: Settings) -> str:
    from funasr_batch.models.silero_vad import weights_sha256

    if vad is not None:
        return vad.weights_sha256
    return "none" if settings.vad == "none" else weights_sha256()


@dataclass(frozen=True, slots=True)
class Recognizer:
    """What turns audio into segments of text. Safe to share between threads except `recognise`."""

    info: ModelInfo
    device: str
    dtype: str
    frontend: FrontEnd = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    policy: SegmentPolicy = field(repr=False)
    new_vad: Callable[[], VoiceActivityStream] | None = field(repr=False)
    """Makes the VAD of one recording; None for overlapping windows without a VAD."""
    decoding: ParaformerDecoding = field(repr=False)
    settings: Settings = field(repr=False)

    def cutter(self) -> Cutter:
        """A fresh cutter for one recording."""
        if self.new_vad is None:
            return WindowCutter(self.policy)
        return Segmenter(self.policy, self.new_vad())

    def features(self, clip: Clip) -> FloatArray:
        """float32 [L, 560] of a clip."""
        return self.frontend.features(clip.samples)

    def recognise(self, batch: Sequence[FloatArray]) -> BatchResult:
        """Recognises the features of a batch of clips; to be called from one thread only."""
        return self.decoding.recognise(batch)

    def text_segment(self, segment: Segment, recognition: Recognition) -> TextSegment:
        """Words, characters and their times in the recording."""
        tokens = detokenise(
            [self.tokens[id] for id in recognition.token_ids],
            recognition.spans_ms,
            recognition.confidences,
            segment.start_ms,
        )
        return TextSegment(
            id=segment.index,
            start=segment.start_ms,
            end=segment.end_ms,
            text=render_text(tokens),
            timing="cif",
            tokens=tokens,
        )

    def transcribe(self, audio: str | Path | FloatArray) -> Transcript:
        """Transcribes one recording: a path, or mono float32 samples at 16 kHz in [-1, 1].

        Raises FileError (AudioError, VanishedError, …) when the recording is at fault.
        """
        from funasr_batch.run.engine import transcribe_array, transcribe_paths

        if isinstance(audio, np.ndarray):
            return transcribe_array(audio, self)
        [(_, result)] = transcribe_paths([Path(audio)], self)
        if isinstance(result, FileError):
            raise result
        return result

    def transcribe_files(
        self, paths: Iterable[str | Path]
    ) -> Iterator[tuple[Path, Transcript | FileError]]:
        """Transcribes recordings in batches across files; yields each as it is finished.

        A recording that fails is yielded with its error instead of a transcript.
        """
        from funasr_batch.run.engine import transcribe_paths

        return transcribe_paths([Path(path) for path in paths], self)


def load_recognizer(files: ModelFiles, settings: Settings) -> Recognizer:
    """Loads the weights onto the device. The first call in a process imports MLX."""
    from funasr_batch.cpu import prepare_cpu

    prepare_cpu()
    import mlx.core as mx

    from funasr_batch.decoding.paraformer import load_paraformer
    from funasr_batch.models.paraformer import ARCHITECTURES

    checkpoint = files.asr
    if checkpoint.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.folder} holds a {checkpoint.architecture}: it does not recognise speech",
            hint=f"Recognition models are: {', '.join(ARCHITECTURES)}.",
        )
    if checkpoint.tokens is None:
        raise CheckpointError(f"{checkpoint.folder} has no tokens.json")
    on_gpu = mx.default_device().type == mx.gpu
    dtype = settings.dtype
    if dtype == "auto":
        # bfloat16 products are several times slower than float32 ones on a CPU.
        dtype = "bfloat16" if on_gpu else "float32"
    tokens = checkpoint.tokens
    dropped = frozenset(i for i, token in enumerate(tokens) if token in (_BLANK, _SOS, _EOS))
    return Recognizer(
        info=files.info,
        device="gpu" if on_gpu else "cpu",
        dtype=dtype,
        frontend=_frontend(checkpoint),
        tokens=tokens,
        policy=SegmentPolicy(
            max_seconds=settings.max_segment,
            target_seconds=settings.merge_segment,
            overlap_seconds=settings.window_overlap,
        ),
        new_vad=_vad_factory(files.vad, settings),
        decoding=load_paraformer(checkpoint, getattr(mx, dtype), dropped),
        settings=settings,
    )


def load(
    model: str | Path = "paraformer", *, cache_dir: Path | None = None, **settings: object
) -> Recognizer:
    """Loads a model by name or folder: `load("sample-paraformer").transcribe("talk.wav").text`.

    Further keywords are settings of the command line, such as `vad="none"` or `offline=True`.
    Raises ModelError when the model is not there, UsageError for a setting that is wrong.
    """
    from funasr_batch.weights.hub import default_cache_dir

    chosen = Settings(model=str(model), **settings)  # type: ignore[arg-type]
    return load_recognizer(find_model(chosen, cache_dir or default_cache_dir()), chosen)


def _vad_factory(
    checkpoint: Checkpoint | None, settings: Settings
) -> Callable[[], VoiceActivityStream] | None:
    """Makes the VAD stream of one recording; the network is shared by all."""
    if settings.vad == "none":
        return None
    return _silero(settings) if checkpoint is None else _fsmn(checkpoint, settings)


def _silero(settings: Settings) -> Callable[[], VoiceActivityStream]:
    from funasr_batch.models.silero_vad import load_silero_vad
    from funasr_batch.vad import SileroOptions, SileroVadStream

    options = SileroOptions(
        **_given(threshold=settings.vad_threshold, min_silence_ms=settings.vad_min_silence_ms)
    )
    network = load_silero_vad()
    return lambda: SileroVadStream(network, options)


def _fsmn(checkpoint: Checkpoint, settings: Settings) -> Callable[[], VoiceActivityStream]:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from funasr_batch.models.fsmn_vad import FsmnVad, FsmnVadConfig
    from funasr_batch.vad import FsmnVadOptions, FsmnVadStream

    if checkpoint.architecture != "FsmnVADStreaming":
        raise CheckpointError(f"{checkpoint.folder} holds a {checkpoint.architecture}, not a VAD")
    network = FsmnVad(FsmnVadConfig.from_encoder_conf(checkpoint.config["encoder_conf"]))
    expected = {name: value.shape for name, value in tree_flatten(network.parameters())}
    check_tensors(checkpoint.specs, expected, path=checkpoint.folder)
    network.load_weights(list(checkpoint.load_tensors().items()), strict=True)
    mx.eval(network.parameters())  # what is not read yet could not be from a reader's thread
    threshold = settings.vad_threshold
    options = FsmnVadOptions(
        schedule=settings.vad_schedule,
        **_given(
            max_end_silence_ms=settings.vad_min_silence_ms,
            speech_noise_threshold=None if threshold is None else 2 * threshold - 1,
        ),
    )
    frontend = _frontend(checkpoint)
    return lambda: FsmnVadStream(network, frontend, options)


def _frontend(checkpoint: Checkpoint) -> FrontEnd:
    cmvn = Cmvn(*checkpoint.cmvn) if checkpoint.cmvn is not None else None
    match checkpoint.config.get("frontend_conf"):
        case {"lfr_m": int() as stack, "lfr_n": int() as stride}:
            return FrontEnd(stack, stride, cmvn)
        case _:
            raise CheckpointError(
                f"the configuration of {checkpoint.folder} has no lfr_m and lfr_n in frontend_conf"
            )


def _given(**options: Any) -> dict[str, Any]:
    """The options that were set; the others keep the defaults of what they are for."""
    return {name: value for name, value in options.items() if value is not None}
