"""From the name of a model to the converted folder that holds it.

A name is that of a model inside this package, of a folder, of a row in `HUB_MODELS`, or
`hf:ORG/NAME[@REVISION]`. What is in the hub's local cache is used before the network is asked.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from funasr_batch.errors import CheckpointError, ModelError, StorageError

HUB_MODELS: Mapping[str, str] = {
    "paraformer": "funasr/paraformer-zh",
    "nano": "FunAudioLLM/Fun-ASR-Nano-2512",
    "nano-mlt": "FunAudioLLM/Fun-ASR-MLT-Nano-2512",
    "fsmn-vad": "funasr/fsmn-vad",
}
SAMPLE_MODELS = ("sample-paraformer", "sample-nano")
WANTED_FILES = (
    "configuration.json",
    "config.yaml",
    "model.pt",
    "am.mvn",
    "tokens.json",
    "tokens.txt",
    "seg_dict",
    "Qwen3-0.6B/config.json",
    "Qwen3-0.6B/tokenizer.json",
    "Qwen3-0.6B/tokenizer_config.json",
    "Qwen3-0.6B/vocab.json",
    "Qwen3-0.6B/merges.txt",
    "multilingual.tiktoken",
)
"""Patterns for the hub, which are compared with whole relative paths."""

_HUB_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>(?!.*\.\.)[\w./-]+))?", re.ASCII
)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/funasr-batch`, or `~/.cache/funasr-batch`.

    Raises:
        StorageError: this user has no home folder.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured, "funasr-batch")
    try:
        return Path.home() / ".cache" / "funasr-batch"
    except RuntimeError as error:
        raise StorageError(
            "this user has no home folder for converted models",
            hint="Set HOME or XDG_CACHE_HOME, or give --cache-dir.",
        ) from error


def resolve_model(name: str, *, offline: bool, cache_dir: Path) -> Path:
    """Returns the converted folder of a model, converting and downloading it where needed.

    Offline, no socket is opened. `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are
    honoured.

    Raises:
        ModelError: there is no such model, or it is not here and cannot be fetched.
        CheckpointError: its files were refused.
        StorageError: the disk refuses.
    """
    from funasr_batch.weights.convert import ensure_converted

    if name in SAMPLE_MODELS:
        return _sample_model(name)
    if name in HUB_MODELS:
        snapshot = _hub_snapshot(HUB_MODELS[name], None, offline=offline)
        return ensure_converted(snapshot, cache_dir, revision=snapshot.name)
    if match := _HUB_NAME.fullmatch(name):
        snapshot = _hub_snapshot(match["repo"], match["revision"], offline=offline)
        return ensure_converted(snapshot, cache_dir, revision=snapshot.name)
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise _unknown(name)
    return ensure_converted(folder, cache_dir)


def _sample_model(name: str) -> Path:
    folder = Path(__file__).parents[1] / "sample_models" / name
    if not folder.is_dir():
        raise ModelError(
            f"the model {name} is not part of this installation",
            hint="Install funasr-batch again, from a wheel or a complete checkout.",
        )
    return folder


def _unknown(name: str) -> ModelError:
    known = ", ".join((*SAMPLE_MODELS, *HUB_MODELS))
    if name.startswith("ms:"):
        return ModelError(
            f"{name}: this version cannot download from ModelScope",
            hint="Use hf:ORG/NAME, or download the model with ModelScope's own tool and give its "
            "folder.",
        )
    if name.startswith("hf:"):
        return ModelError(f"{name} is not a model name", hint="Write hf:ORG/NAME[@REVISION].")
    return ModelError(
        f"there is no model and no folder named '{name}'",
        hint=f"Known names: {known}; or a folder in FunASR's layout, or hf:ORG/NAME.",
    )


def _hub_snapshot(repo: str, revision: str | None, *, offline: bool) -> Path:
    """The folder of a repository's files in the hub's cache; its name is the commit."""
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    # A folder that is not there needs no client to say so: to import it takes a third of a second.
    if offline and not Path(constants.HF_HUB_CACHE, _cache_folder(repo)).is_dir():
        raise _not_here(repo)
    cached = _cached_snapshot(repo, revision)
    if cached is not None and (offline or _is_complete(cached)):
        return cached
    if offline:
        raise _not_here(repo)
    return _download(repo, revision)


def _cache_folder(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            repo, revision=revision, allow_patterns=list(WANTED_FILES), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(f"{repo} cannot be the name of a model on the hub") from error
    return Path(snapshot)


def _is_complete(snapshot: Path) -> bool:
    from funasr_batch.weights.convert import read_layout

    try:
        read_layout(snapshot)
    except CheckpointError:
        return False
    return True


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=list(WANTED_FILES))
    except GatedRepoError as error:
        raise ModelError(
            f"{repo} is given only to users who accepted its terms",
            hint=f"Accept them at {constants.ENDPOINT}/{repo} and set HF_TOKEN.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{constants.ENDPOINT} has no model {repo}, or shows it to its members only",
            hint="Check the name; for a private model set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise _not_here(repo, f"and {constants.ENDPOINT} cannot be reached") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StorageError(
                f"{repo} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}",
                hint="Free some space there, or choose another folder with HF_HOME.",
            ) from error
        raise _broken_download(repo, error) from error
    except Exception as error:  # the transport below the hub's client changes with its versions
        raise _broken_download(repo, error) from error
    return Path(snapshot)


def _broken_download(repo: str, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return ModelError(
        f"the download of {repo} failed: {reason}",
        hint="Run it again: what has arrived is kept, and the download goes on from there.",
    )


def _not_here(repo: str, why: str = "and no network may be used") -> ModelError:
    from huggingface_hub import constants

    folder = _cache_folder(repo)
    return ModelError(
        f"the model {repo} is not on this machine, {why}",
        hint=f"On a machine with a network run `hf download {repo}`. Then copy the folder "
        f"~/.cache/huggingface/hub/{folder} from there into {constants.HF_HUB_CACHE} here.",
    )
