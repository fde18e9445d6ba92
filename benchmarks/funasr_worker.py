"""FunASR's side of paraformer_cpu.py, run by the Python that has FunASR and PyTorch.

python funasr_worker.py write FOLDER      random weights as model.pt, in the hubs' layout
python funasr_worker.py serve FOLDER      loads them as FunASR does, then measures
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import large_model
import torch
from funasr import AutoModel

STAGES = {
    "encode": "encode",
    "calc_predictor": "cif",
    "cal_decoder_with_predictor": "decode",
    "calc_predictor_timestamp": "timestamps",
}
"""Methods of FunASR's models."""


def write(folder: Path) -> None:
    model, _ = AutoModel.build_model(model=str(folder), device="cpu", disable_update=True)
    weights = {
        name: torch.from_numpy(large_model.tensor(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    torch.save(weights, folder / "model.pt")


def load(folder: Path) -> large_model.Run:
    automodel = AutoModel(
        model=str(folder),
        device="cpu",
        ncpu=len(os.sched_getaffinity(0)),
        disable_update=True,
        disable_pbar=True,
        disable_log=True,
        log_level="ERROR",
    )
    samples = large_model.clip()
    clock = dict.fromkeys(["features", *STAGES.values(), "timestamps"], 0.0)
    model = automodel.model
    module = sys.modules[type(model).__module__]
    for method, stage in STAGES.items():
        if hasattr(model, method):
            setattr(model, method, _timed(getattr(model, method), stage, clock))
    for function, stage in (
        ("extract_fbank", "features"),
        ("ts_prediction_lfr6_standard", "timestamps"),
    ):
        setattr(module, function, _timed(getattr(module, function), stage, clock))

    def run(count: int) -> dict[str, float]:
        clock.update(dict.fromkeys(clock, 0.0))
        started = time.perf_counter()
        results = automodel.generate(
            input=[samples] * count, batch_size=count, output_timestamp=True
        )
        total = time.perf_counter() - started
        return {**clock, "total": total, "tokens": len(results[0]["timestamp"])}

    return run


def _timed(function: Callable[..., Any], stage: str, clock: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock[stage] += time.perf_counter() - started

    return timed


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "write":
        write(folder)
    else:
        large_model.serve(lambda: load(folder))
