"""Which checkpoints some settings call for: found, converted, checked, but not loaded.

Nothing here needs MLX, so a run with nothing to do never imports it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from funasr_batch.errors import CheckpointError, ModelError, UsageError
from funasr_batch.records import (
    ModelInfo,
)
from funasr_batch.settings import Settings
from funasr_batch.weights.checkpoint import Checkpoint, open_checkpoint
from funasr_batch.weights.hub import resolve_model

if TYPE_CHECKING:
    pass

NANO: tuple[str, ...] = ("FunASRNano",)
"""Architectures that write text with a language model; they are not imported to be told apart."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The checkpoints that some settings call for, found and checked but not loaded."""

    name: str
    asr: Checkpoint
    vad: Checkpoint | None
    """FSMN-VAD's; None where the embedded VAD or none is used."""
    vad_digest: str
    """Of the VAD's weights, whichever it is."""
    quantization: str | None = None
    timing: Checkpoint | None = None
    """A Paraformer that reads the same segments as Nano: for times, or for drafts."""
    draft: Checkpoint | None = None
    """A smaller Nano whose texts are drafts; it changes no transcript."""

    @property
    def info(self) -> ModelInfo:
        digest = self.asr.weights_sha256
        return ModelInfo(self.name, self.asr.revision, digest, self.quantization)

    @property
    def is_nano(self) -> bool:
        return self.asr.architecture in NANO

    @property
    def has_ctc(self) -> bool:
        """Whether Nano can time its own words."""
        return "ctc.ctc_lo.weight" in self.asr.specs and self.asr.ctc_vocabulary is not None

    @property
    def digest(self) -> str:
        """Names every weight that can change a transcript."""
        digests = f"{self.asr.weights_sha256} {self.vad_digest}"
        if self.timing is not None and not self.has_ctc:
            digests += f" {self.timing.weights_sha256}"
        return hashlib.sha256(digests.encode()).hexdigest()


def find_model(settings: Settings, cache_dir: Path) -> ModelFiles:
    """Finds, downloads or converts what `settings` names.

    Raises ModelError when something is missing and CheckpointError when it is refused.
    """

    def opened(name: str, offline: bool) -> Checkpoint:
        return open_checkpoint(resolve_model(name, offline=offline, cache_dir=cache_dir))

    def at_hand(name: str) -> Checkpoint | None:
        """A model that would be good to have but is not worth a download by itself."""
        try:
            return opened(name, True)
        except CheckpointError:
            raise
        except ModelError:
            return None

    asr = opened(settings.model, settings.offline)
    vad = None
    if not has_vad(settings):
        pass
    elif settings.vad == "fsmn" or (settings.vad == "auto" and settings.vad_model):
        vad = opened(settings.vad_model or "fsmn-vad", settings.offline)
    elif settings.vad == "auto" and not settings.model.startswith("sample-"):
        vad = at_hand("fsmn-vad")
    quantization = str(asr.quantization) if asr.quantization else settings.quantize
    files = ModelFiles(settings.model, asr, vad, _vad_digest(vad, settings), quantization)
    if not files.is_nano:
        if settings.quantize:
            raise UsageError(
                f"{settings.model} is a {asr.architecture}: only Nano can be quantised",
                hint="Leave quantize out, or choose --model nano.",
            )
        if settings.stream_encoder:
            raise UsageError(
                f"{settings.model} is a {asr.architecture}: it needs whole segments, and "
                "stream_encoder hands out pieces that may begin and end within a sentence",
                hint="Leave stream_encoder out, or choose --model nano.",
            )
        return files
    return replace(
        files,
        timing=_timing_model(files, settings, opened, at_hand),
        draft=_draft_model(settings, opened),
    )


def _timing_model(
    files: ModelFiles,
    settings: Settings,
    opened: Callable[[str, bool], Checkpoint],
    at_hand: Callable[[str], Checkpoint | None],
) -> Checkpoint | None:
    name = settings.timing_model
    if settings.draft == "paraformer" and name in (None, "none"):
        return opened("paraformer", settings.offline)
    if name == "none" or (files.has_ctc and settings.draft != "paraformer"):
        return None
    return at_hand("paraformer") if name is None else opened(name, settings.offline)


def _draft_model(
    settings: Settings, opened: Callable[[str, bool], Checkpoint]
) -> Checkpoint | None:
    if settings.draft in (None, "none", "ctc", "paraformer", "lookup"):
        return None
    checkpoint = opened(settings.draft, settings.offline)
    if checkpoint.architecture not in NANO:
        raise CheckpointError(
            f"{checkpoint.folder} holds a {checkpoint.architecture}, which cannot draft for Nano",
            hint="draft is ctc, paraformer, lookup, none or the folder of a smaller Nano.",
        )
    return checkpoint


def _vad_digest(vad: Checkpoint | None, settings: Settings) -> str:
    from funasr_batch.models.silero_vad import weights_sha256

    if vad is not None:
        return vad.weights_sha256
    return weights_sha256() if has_vad(settings) else "none"


def has_vad(settings: Settings) -> bool:
    """The streaming encoder takes the place of a VAD, whichever is set."""
    return settings.vad != "none" and not settings.stream_encoder
