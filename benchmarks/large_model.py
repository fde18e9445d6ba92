"""A Paraformer-large with random weights, for two implementations in two Python environments.

Needs numpy alone. A tensor's values depend on its name and shape only, so both sides compute with
the same numbers without exchanging a gigabyte of them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

RATE = 16_000
CLIP_SECONDS = 40
VOCABULARY = 8404
FEATURES = 560

TOKENS = ("<blank>", "<s>", "</s>", *map(chr, range(0x4E00, 0x4E00 + VOCABULARY - 4)), "<unk>")

CMVN = np.full(FEATURES, -10, np.float32), np.full(FEATURES, 0.3, np.float32)
"""Shift and scale that bring the log energies of the clips to about zero and one."""


def config(timestamp_head: bool) -> dict[str, Any]:
    """FunASR's config.yaml of the network; with `timestamp_head` it is a BiCifParaformer."""
    block = {"attention_heads": 4, "linear_units": 2048, "kernel_size": 11, "sanm_shfit": 0}
    predictor: dict[str, Any] = {
        "idim": 512,
        "threshold": 1.0,
        "l_order": 1,
        "r_order": 1,
        "tail_threshold": 0.45,
    }
    if timestamp_head:
        predictor |= {
            "smooth_factor2": 0.25,
            "noise_threshold2": 0.01,
            "upsample_times": 3,
            "use_cif1_cnn": False,
            "upsample_type": "cnn_blstm",
        }
    return {
        "model": "BiCifParaformer" if timestamp_head else "Paraformer",
        "model_conf": {"ctc_weight": 0.0, "predictor_bias": 1},
        "encoder": "SANMEncoder",
        "encoder_conf": {
            **block,
            "output_size": 512,
            "num_blocks": 50,
            "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "selfattention_layer_type": "sanm",
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {**block, "num_blocks": 16, "att_layer_num": 16},
        "predictor": "CifPredictorV3" if timestamp_head else "CifPredictorV2",
        "predictor_conf": predictor,
        "frontend": "WavFrontend",
        "frontend_conf": {
            "fs": RATE,
            "window": "hamming",
            "n_mels": 80,
            "frame_length": 25,
            "frame_shift": 10,
            "dither": 0.0,
            "lfr_m": 7,
            "lfr_n": 6,
        },
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "normalize": None,
    }


def tensor(name: str, shape: tuple[int, ...]) -> FloatArray:
    """Random values that keep activations of order one, with about four tokens a second."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 0.1 * values + np.float32(name.endswith("weight"))
    if name == "predictor.cif_output.bias":
        return values * 0 - np.float32(1.2)
    if len(shape) == 1:
        return 0.05 * values
    return values / np.float32(math.sqrt(math.prod(shape[1:])))


def clip() -> FloatArray:
    """40 s of noise that comes and goes as syllables do, at the level of speech."""
    generator = np.random.default_rng(0)
    times = np.arange(CLIP_SECONDS * RATE, dtype=np.float32) / RATE
    envelope = 0.05 * (1 + np.sin(2 * np.pi * 4 * times))
    return (envelope * generator.standard_normal(len(times))).astype(np.float32)


Run = Callable[[int], dict[str, float]]
"""Recognises so many clips at once: seconds by stage, and `total`."""


def serve(load: Callable[[], Run]) -> None:
    """A worker: measures a batch for each number that comes in, and tells its peak memory.

    One line of JSON goes out when the model is loaded and one for each batch. Whatever libraries
    print goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run = load()
    print(json.dumps({"ready": peak_memory()}), file=out, flush=True)
    for line in sys.stdin:
        seconds = run(int(line))
        print(json.dumps({"seconds": seconds, "peak": peak_memory()}), file=out, flush=True)


def peak_memory() -> int:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_hub_files(folder: Path, timestamp_head: bool) -> None:
    """All files of FunASR's layout but the weights."""
    files = {
        "config.yaml": config(timestamp_head),  # JSON is YAML
        "tokens.json": TOKENS,
        "configuration.json": {
            "framework": "pytorch",
            "task": "auto-speech-recognition",
            "model": {"type": "funasr"},
            "file_path_metas": {
                "init_param": "model.pt",
                "config": "config.yaml",
                "tokenizer_conf": {"token_list": "tokens.json"},
                "frontend_conf": {"cmvn_file": "am.mvn"},
            },
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    shift, scale = (" ".join(f"{value:g}" for value in vector) for vector in CMVN)
    size = f"{FEATURES} {FEATURES}"
    lines = (
        "<Nnet>",
        f"<Splice> {size}",
        "[ 0 ]",
        f"<AddShift> {size}",
        f"<LearnRateCoef> 0 [ {shift} ]",
        f"<Rescale> {size}",
        f"<LearnRateCoef> 0 [ {scale} ]",
        "</Nnet>",
    )
    (folder / "am.mvn").write_text("\n".join(lines) + "\n")
