"""From a model's files to a recogniser: weights onto the device, what is said about it, its VAD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funasr_batch.errors import CheckpointError, UsageError
from funasr_batch.frontend import Cmvn, FrontEnd
from funasr_batch.model_files import NANO, ModelFiles, find_model, has_vad
from funasr_batch.recognizer import Decoding, Recognizer
from funasr_batch.records import (
    FloatArray,
    Token,
)
from funasr_batch.segments import SegmentPolicy
from funasr_batch.settings import Settings
from funasr_batch.text.hotwords import SpelledHotwords, spell_hotwords
from funasr_batch.text.prompt import MAX_HOTWORD_LENGTH, NANO_LANGUAGES
from funasr_batch.weights.checkpoint import Checkpoint, check_tensors

if TYPE_CHECKING:
    import mlx.core as mx

    from funasr_batch.decoding.nano import Companion, DraftSource
    from funasr_batch.decoding.paraformer import ParaformerDecoding
    from funasr_batch.vad import VoiceActivityStream

_BLANK, _SOS, _EOS = "<blank>", "<s>", "</s>"


class Networks:
    """The network that was loaded last: settings that share it do not load it again.

    One at a time is kept, so that two models are never in memory together.
    """

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._network: Any = None

    def get(self, key: tuple[str, ...], load: Callable[[], Any]) -> Any:
        if key != self._key:
            self._key, self._network = (), None  # gives its memory back first
            self._network = load()
            self._key = key
        return self._network


def load_recognizer(
    files: ModelFiles, settings: Settings, networks: Networks | None = None
) -> Recognizer:
    """Loads the weights onto the device. The first call in a process imports MLX."""
    from funasr_batch.cpu import prepare_cpu

    prepare_cpu()
    import mlx.core as mx

    from funasr_batch.models.paraformer import ARCHITECTURES

    checkpoint = files.asr
    on_gpu = mx.default_device().type == mx.gpu
    dtype = settings.dtype
    if dtype == "auto":
        # bfloat16 products are several times slower than float32 ones on a CPU.
        dtype = "bfloat16" if on_gpu else "float32"
    networks = networks or Networks()
    decoding: Decoding
    if files.is_nano:
        if settings.model == "nano":
            _refuse_language(settings, NANO_LANGUAGES, "Choose --model nano-mlt (31 languages).")
        decoding = _nano(files, settings, getattr(mx, dtype), networks)
    elif checkpoint.architecture in ARCHITECTURES:
        hint = "Choose --model nano (zh, en, ja) or nano-mlt (31 languages)."
        _refuse_language(settings, ("zh", "en"), hint)
        decoding = _paraformer_with(settings, checkpoint, getattr(mx, dtype), networks)
    else:
        raise CheckpointError(
            f"{checkpoint.folder} holds a {checkpoint.architecture}: it does not recognise speech",
            hint=f"Recognition models are: {', '.join((*ARCHITECTURES, *NANO))}.",
        )
    return Recognizer(
        info=files.info,
        device="gpu" if on_gpu else "cpu",
        dtype=dtype,
        frontend=_frontend(checkpoint),
        policy=SegmentPolicy(
            max_seconds=settings.max_segment,
            target_seconds=settings.merge_segment,
            overlap_seconds=settings.window_overlap,
        ),
        new_vad=_vad_factory(files.vad, settings),
        decoding=decoding,
        settings=settings,
        decode_stage="prefill/generate" if files.is_nano else "predict/decode",
        warnings=_warnings(files, settings, on_gpu=on_gpu),
    )


def _refuse_language(settings: Settings, known: Sequence[str], hint: str) -> None:
    if settings.language not in ("auto", *known):
        raise UsageError(
            f"{settings.model} recognises {', '.join(known)}, not {settings.language}", hint=hint
        )


def _warnings(files: ModelFiles, settings: Settings, *, on_gpu: bool) -> tuple[str, ...]:
    warnings = []
    if settings.hotwords and not files.is_nano:
        warnings += _hotword_warnings(files, settings)
    if files.quantization and not on_gpu:
        warnings.append(
            f"{files.name} in {files.quantization}: products of quantised weights are slower than "
            "float32 on a CPU, so the weights are unpacked once; memory is not saved here"
        )
    if files.is_nano and not files.has_ctc and files.timing is None:
        warnings.append(
            f"{files.name} has no CTC head and no Paraformer is at hand: times are those of "
            "segments, not of words (timing: vad)"
        )
    return tuple(warnings)


def _hotword_warnings(files: ModelFiles, settings: Settings) -> list[str]:
    if not _knows_hotwords(files.asr):
        return [
            f"{files.name} is a {files.asr.architecture} without a hotword decoder: hotwords are "
            "ignored. Models that use them are paraformer (SeACo), nano and nano-mlt"
        ]
    left_out = _spelled(files.asr, settings.hotwords).left_out
    if not left_out:
        return []
    shown = ", ".join(f"{hotword[:MAX_HOTWORD_LENGTH]!r}" for hotword in left_out[:10])
    more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return [
        f"hotwords that {files.name} cannot spell, or that are longer than {MAX_HOTWORD_LENGTH} "
        f"characters, are left out: {shown}{more}"
    ]


def _knows_hotwords(checkpoint: Checkpoint) -> bool:
    return "hotword_output_layer.weight" in checkpoint.specs


def _spelled(checkpoint: Checkpoint, hotwords: Iterable[str]) -> SpelledHotwords:
    return spell_hotwords(hotwords, checkpoint.tokens or (), checkpoint.seg_dict)


def _paraformer_with(
    settings: Settings, checkpoint: Checkpoint, dtype: mx.Dtype, networks: Networks
) -> ParaformerDecoding:
    """The decoding with the hotwords of `settings`, which are no part of what is kept.

    The bias network is loaded with the first list and kept beside the network it belongs to.
    """
    decoding: ParaformerDecoding
    decoding, bias_networks = networks.get(
        (checkpoint.weights_sha256, str(dtype)),
        lambda: (_paraformer(checkpoint, dtype), Networks()),
    )
    if not settings.hotwords or not _knows_hotwords(checkpoint):
        return decoding
    ids = _spelled(checkpoint, settings.hotwords).ids
    if not ids:
        return decoding
    if _SOS not in decoding.tokens:
        raise CheckpointError(f"{checkpoint.folder} has no token {_SOS}, which hotwords need")
    from funasr_batch.decoding.paraformer import load_seaco, with_hotwords

    network = bias_networks.get(("seaco",), lambda: load_seaco(checkpoint, dtype))
    return with_hotwords(decoding, network, ids, none_id=decoding.tokens.index(_SOS))


def _paraformer(checkpoint: Checkpoint, dtype: mx.Dtype) -> ParaformerDecoding:
    from funasr_batch.decoding.paraformer import load_paraformer

    if checkpoint.tokens is None:
        raise CheckpointError(f"{checkpoint.folder} has no tokens.json")
    named = enumerate(checkpoint.tokens)
    dropped = frozenset(i for i, token in named if token in (_BLANK, _SOS, _EOS))
    return load_paraformer(checkpoint, dtype, dropped)


def _nano(files: ModelFiles, settings: Settings, dtype: mx.Dtype, networks: Networks) -> Decoding:
    from funasr_batch.decoding.nano_loading import NanoOptions, load_nano, load_network
    from funasr_batch.decoding.sampling import Sampling
    from funasr_batch.weights.quantize import NONE, parse_quantization

    plan = parse_quantization(settings.quantize) if settings.quantize else NONE
    digests = (files.asr.weights_sha256, _digest_of(files.timing), _digest_of(files.draft))
    network, companion, drafting = networks.get(
        (*digests, str(dtype), str(plan)),
        lambda: (
            load_network(files.asr, dtype, plan),
            _companion(files, dtype),
            load_network(files.draft, dtype) if files.draft else None,
        ),
    )
    sampling = Sampling(
        **_given(
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram=settings.no_repeat_ngram,
        )
    )
    options = NanoOptions(
        language=None if settings.language == "auto" else settings.language,
        itn=not settings.spoken_form,
        hotwords=settings.hotwords,
        sampling=sampling,
        drafts=_draft_sources(files, settings),
        longest_segment=settings.max_segment,
        guard_silence=not has_vad(settings),
    )
    draft_model = None
    if files.draft is not None:
        plain = replace(options, sampling=Sampling(), drafts=frozenset())
        draft_model = load_nano(files.draft, drafting, plain)
    return load_nano(files.asr, network, options, companion, draft_model)


def _draft_sources(files: ModelFiles, settings: Settings) -> frozenset[DraftSource]:
    if files.draft is not None:
        return frozenset({"model", "lookup"})
    match settings.draft:
        case "none":
            return frozenset()
        case "lookup":
            return frozenset({"lookup"})
        case "ctc":
            return frozenset({"ctc", "lookup"})
        case None if files.has_ctc:
            return frozenset({"ctc", "lookup"})
        case None if files.timing is None:
            return frozenset({"lookup"})
    return frozenset({"companion", "lookup"})


def _companion(files: ModelFiles, dtype: mx.Dtype) -> Companion | None:
    from funasr_batch.decoding.nano import Companion

    checkpoint = files.timing
    if checkpoint is None:
        return None
    decoding = _paraformer(checkpoint, dtype)
    cmvn = _frontend(checkpoint).cmvn

    def read(batch: Sequence[FloatArray]) -> list[tuple[Token, ...]]:
        features = [item if cmvn is None else cmvn.apply(item) for item in batch]
        recognitions = decoding.recognise(features).recognitions
        return [decoding.tokens_of(recognition, offset_ms=0) for recognition in recognitions]

    return Companion(read)


def _digest_of(checkpoint: Checkpoint | None) -> str:
    return "" if checkpoint is None else checkpoint.weights_sha256


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
    if not has_vad(settings):
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
