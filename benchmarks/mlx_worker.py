"""Our side of paraformer_cpu.py.

python mlx_worker.py write FOLDER      random weights in our format, beside FOLDER's config.yaml
python mlx_worker.py serve FOLDER      loads them as a run does, then measures
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import large_model
import numpy as np

from funasr_batch.cpu import blas_threads, prepare_cpu

BLAS = prepare_cpu()

import mlx.core as mx  # noqa: E402  (after the BLAS)
from mlx.utils import tree_flatten  # noqa: E402

from funasr_batch.decoding.cif import token_counts, token_weights  # noqa: E402
from funasr_batch.decoding.paraformer import (  # noqa: E402
    FRAME_MS,
    ParaformerDecoding,
    load_paraformer,
)
from funasr_batch.frontend import Cmvn, FrontEnd  # noqa: E402
from funasr_batch.models.layers import peak_probability  # noqa: E402
from funasr_batch.models.paraformer import (  # noqa: E402
    CifPredictorV3,
    Paraformer,
    ParaformerConfig,
)
from funasr_batch.text.timestamps import frame_token_spans, upsampled_token_spans  # noqa: E402
from funasr_batch.weights.checkpoint import open_checkpoint, write_checkpoint  # noqa: E402
from funasr_batch.weights.safetensors_file import TensorSpec  # noqa: E402

CONVERTED = "converted"


def write(folder: Path) -> None:
    config = json.loads((folder / "config.yaml").read_text(encoding="utf-8"))
    network = Paraformer(ParaformerConfig.from_checkpoint(config, len(large_model.TOKENS)))
    shapes = {name: tuple(value.shape) for name, value in tree_flatten(network.parameters())}
    write_checkpoint(
        folder / CONVERTED,
        architecture=config["model"],
        config=config,
        tokens=large_model.TOKENS,
        cmvn=large_model.CMVN,
        tensors={name: TensorSpec("F32", shape) for name, shape in shapes.items()},
        read=lambda name: large_model.tensor(name, shapes[name]),
    )


def load(folder: Path) -> large_model.Run:
    print(f"our BLAS: {BLAS.kind} {BLAS.path or ''}", file=sys.stderr)
    checkpoint = open_checkpoint(folder / CONVERTED)
    assert checkpoint.cmvn is not None
    frontend = FrontEnd(7, 6, Cmvn(*checkpoint.cmvn))
    decoding = load_paraformer(checkpoint, mx.float32, frozenset({0, 1, 2}))
    samples = large_model.clip()

    def run(count: int) -> dict[str, float]:
        seconds: dict[str, float] = {}
        with _measured(seconds, "features"):
            features = [frontend.features(samples) for _ in range(count)]
        with _measured(seconds, "total"):
            recognitions = decoding.recognise(features).recognitions
        seconds["total"] += seconds["features"]
        _by_stage(decoding, features, seconds)
        return {**seconds, "tokens": len(recognitions[0].token_ids)}

    return run


def _by_stage(
    decoding: ParaformerDecoding, features: Sequence[Any], seconds: dict[str, float]
) -> None:
    """What `recognise` does, with a stop after each stage."""
    model = decoding.model

    def embed(alphas: mx.array) -> mx.array:
        weights = np.array(alphas)
        return mx.array(token_weights(weights, token_counts(weights, decoding.tail_threshold)))

    def decode(weights: mx.array, memory: mx.array) -> tuple[mx.array, mx.array]:
        logits = model.decode(weights @ memory, None, memory, None)
        return mx.argmax(logits, axis=-1), peak_probability(logits)

    def date(memory: mx.array, alphas: mx.array, weights: mx.array) -> None:
        length, count = memory.shape[1], weights.shape[1]
        if isinstance(model.predictor, CifPredictorV3):
            timing = np.array(model.upsampled_alphas(memory, mx.array([length])))[0]
            scaled = timing * (count / timing.sum())
            upsampled_token_spans(scaled, count, duration_ms=length * FRAME_MS)
        else:
            frame_token_spans(np.array(alphas)[0], count, duration_ms=length * FRAME_MS)

    streams = decoding.streams
    with _measured(seconds, "encode"):
        memories = _side_by_side(streams, lambda x: model.encode(mx.array(x[None]), None), features)
    with _measured(seconds, "cif"):
        alphas = _side_by_side(streams, lambda memory: model.alphas(memory, None), memories)
        weights = [embed(one) for one in alphas]
    with _measured(seconds, "decode"):
        _side_by_side(streams, decode, weights, memories)
    with _measured(seconds, "timestamps"):
        for item in zip(memories, alphas, weights, strict=True):
            date(*item)


def _side_by_side(
    streams: Sequence[Any], function: Callable[..., Any], *columns: Sequence[Any]
) -> list[Any]:
    """The function of each row of the columns, as many at a time as there are streams."""
    rows = list(zip(*columns, strict=True))
    results = []
    for first in range(0, len(rows), len(streams)):
        together = rows[first : first + len(streams)]
        with blas_threads(1) if len(together) > 1 else nullcontext():
            lanes = []
            for row, stream in zip(together, streams, strict=False):
                with mx.stream(stream):
                    lanes.append(function(*row))
            mx.eval(lanes)
        results += lanes
    return results


@contextmanager
def _measured(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


if __name__ == "__main__":
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "write":
        write(folder)
    else:
        large_model.serve(lambda: load(folder))
