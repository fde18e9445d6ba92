"""The files of Fun-ASR-Nano that other models do not have: its language model's and its CTC head's.

A folder of Nano holds, beside `config.yaml` and `model.pt`, the folder of a Qwen3 language model
with configuration and tokenizer but without weights, which are in `model.pt` under `llm.`; and
sometimes the vocabulary of a CTC head, whose tensors are in some copies of `model.pt` and not in
others (FunASR funasr/models/fun_asr_nano/model.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funasr_batch.errors import CheckpointError
from funasr_batch.weights.source_files import (
    INCOMPLETE,
    inside,
    read_json,
    read_json_config,
    read_text,
    required,
)
from funasr_batch.weights.torch_pickle import TensorFile

EMBEDDING = "llm.model.embed_tokens.weight"
OUTPUT_LAYER = "llm.lm_head.weight"

_LLM_FOLDER = "Qwen3-0.6B"
_CTC_VOCABULARY = "multilingual.tiktoken"
_CTC_BLOCKS = 5
"""What FunASR's `Transformer` adaptor has where `n_layer` is not given."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts a text before it looks for pairs (Qwen2Tokenizer)."""


@dataclass(frozen=True, slots=True)
class NanoFiles:
    """Where the files of a Nano are; each is there."""

    llm_config: Path
    tokenizer: tuple[Path, ...]
    """`tokenizer.json`, or `vocab.json`, `merges.txt` and `tokenizer_config.json`."""
    ctc_vocabulary: Path | None

    def all(self) -> tuple[Path, ...]:
        vocabulary = () if self.ctc_vocabulary is None else (self.ctc_vocabulary,)
        return (self.llm_config, *self.tokenizer, *vocabulary)


def find_nano_files(
    source: Path, metas: Mapping[str, Any], config_file: Path, config: Mapping[str, Any]
) -> NanoFiles:
    """Finds the files as FunASR does: configuration.json's names win over config.yaml's.

    Raises:
        CheckpointError: one is missing, or its name leads out of the folder.
    """

    def place(*keys: str) -> Path | None:
        found = inside(source, source / "configuration.json", metas, *keys)
        return inside(source, config_file, config, *keys) if found is None else found

    llm = place("llm_conf", "init_param_path") or source / _LLM_FOLDER
    tokenizer = place("tokenizer_conf", "init_param_path") or llm
    vocabulary = (
        place("ctc_tokenizer_conf", "vocab_path")
        or place("dataset_conf", "ctc_tokenizer_conf", "vocab_path")
        or source / _CTC_VOCABULARY
    )
    return NanoFiles(
        llm_config=required(llm / "config.json"),
        tokenizer=_tokenizer_files(tokenizer),
        # Copies without the CTC head are published with a metadata file that still names it.
        ctc_vocabulary=vocabulary if vocabulary.is_file() else None,
    )


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return (whole,)
    parts = tuple(folder / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json"))
    if not all(part.is_file() for part in parts):
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and not all of vocab.json, merges.txt and "
            "tokenizer_config.json",
            hint=INCOMPLETE,
        )
    return parts


def read_llm_config(path: Path) -> dict[str, Any]:
    """The configuration of the language model, if it is one that this project computes.

    Raises:
        CheckpointError: it asks for something else; the message names the key.
    """
    config = read_json_config(path)
    wanted = {
        "model_type": config.get("model_type") == "qwen3",
        "attention_bias": not config.get("attention_bias", False),
        "rope_scaling": config.get("rope_scaling") is None,
        "tie_word_embeddings": config.get("tie_word_embeddings") is True,
        "use_sliding_window": not config.get("use_sliding_window", False),
        "hidden_act": config.get("hidden_act", "silu") == "silu",
    }
    for key, is_known in wanted.items():
        if not is_known:
            raise CheckpointError(
                f"{path}: this version cannot compute a language model with "
                f"{key} {json.dumps(config.get(key))[:80]}",
                hint="It runs Qwen3 with tied embeddings, as Fun-ASR-Nano and -MLT-Nano have it.",
            )
    return config


def read_tokenizer(files: tuple[Path, ...]) -> bytes:
    """The tokenizer as one `tokenizer.json`, put together from its parts where it is not one yet.

    Raises:
        CheckpointError: the parts do not fit.
    """
    if len(files) == 1:
        content = read_json(files[0])
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{files[0]} does not describe a tokenizer", hint=INCOMPLETE)
        return files[0].read_bytes()
    return _assembled(*files)


def _assembled(vocab_file: Path, merges_file: Path, config_file: Path) -> bytes:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    lines = read_text(merges_file).split("\n")
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=read_json(vocab_file), merges=merges))
    except Exception as error:  # the library raises nothing more particular
        raise CheckpointError(
            f"{merges_file} does not fit {vocab_file.name}: {error}", hint=INCOMPLETE
        ) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token_id, token in _added_tokens(config_file):
        # The library numbers added tokens by itself.
        tokenizer.add_tokens([AddedToken(**token)])
        found = tokenizer.token_to_id(token["content"])
        if found != token_id:
            raise CheckpointError(
                f"{config_file}: the token {token['content']!a} has the id {token_id}, and with "
                f"{vocab_file.name} it would have {found}",
                hint=INCOMPLETE,
            )
    text: str = tokenizer.to_str()
    return text.encode()


def _added_tokens(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ids and properties of `added_tokens_decoder`, in the order of the ids."""
    content = read_json(path)
    entries = content.get("added_tokens_decoder") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        raise CheckpointError(f"{path} has no added_tokens_decoder", hint=INCOMPLETE)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for key in sorted(entries, key=int):
        match entries[key]:
            case {"content": str() as token} as entry if all(
                isinstance(entry.get(flag, False), bool) for flag in flags
            ):
                yield int(key), {"content": token, **{f: entry.get(f, False) for f in flags}}
            case _:
                raise CheckpointError(f"{path}: added token {key} is malformed", hint=INCOMPLETE)


def kept_tensors(weights: TensorFile, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that a converted Nano holds.

    The output layer is left out, as it is the embedding once more. The CTC head is left out unless
    it is whole: FunASR would fill what is missing with random numbers and give times all the same.

    Raises:
        CheckpointError: the output layer is not the embedding.
    """
    _refuse_untied(weights)
    names = [name for name in weights.tensors if name != OUTPUT_LAYER]
    ctc = {name for name in names if _is_ctc(name)}
    if ctc != _described_ctc_tensors(config):
        names = [name for name in names if name not in ctc]
    return tuple(names)


def has_ctc(names: tuple[str, ...]) -> bool:
    return any(_is_ctc(name) for name in names)


def _is_ctc(name: str) -> bool:
    return name.startswith(("ctc_decoder.", "ctc."))


def _described_ctc_tensors(config: Mapping[str, Any]) -> set[str]:
    """The names of the CTC head's tensors: FunASR's `Transformer` adaptor, of `n_layer` blocks, and
    `CTC` (funasr/models/llm_asr/adaptor.py, funasr/models/ctc/ctc.py)."""
    if not config.get("ctc_decoder"):
        return set()
    conf = config.get("ctc_decoder_conf")
    blocks = conf.get("n_layer", _CTC_BLOCKS) if isinstance(conf, dict) else _CTC_BLOCKS
    if type(blocks) is not int or not 0 <= blocks <= 1000:
        return set()
    parts = (
        "norm1", "norm2",
        "self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v", "self_attn.linear_out",
        "feed_forward.w_1", "feed_forward.w_2",
    )  # fmt: skip
    layers = ["ctc_decoder.linear1", "ctc_decoder.linear2", "ctc.ctc_lo"]
    layers += [f"ctc_decoder.blocks.{i}.{part}" for i in range(blocks) for part in parts]
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def _refuse_untied(weights: TensorFile) -> None:
    if OUTPUT_LAYER not in weights.tensors:
        return
    if EMBEDDING in weights.tensors:
        one, other = weights.tensors[EMBEDDING], weights.tensors[OUTPUT_LAYER]
        same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
        if same_kind and _digest(weights, EMBEDDING) == _digest(weights, OUTPUT_LAYER):
            return
    raise CheckpointError(
        f"{weights.path}: {OUTPUT_LAYER} is not equal to {EMBEDDING}, though the configuration "
        "ties them",
        hint="This version cannot run a language model whose output layer differs.",
    )


def _digest(weights: TensorFile, name: str) -> bytes:
    """Of the values; two digests are compared instead of two tensors, to hold one at a time."""
    return hashlib.sha256(weights.read(name).data).digest()
