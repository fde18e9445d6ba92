"""Averages the weights of two runs: `python -m training.average A B --share 0.6 --out DIR`.

Runs that share their beginning lie in one basin, and a point between them generalises better than
either (Wortsman et al. 2022, "Model soups").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs=2, help="folders that train or finetune wrote")
    parser.add_argument("--share", type=float, default=0.5, help="of the second run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, second = (load_file(run / "model.safetensors") for run in arguments.runs)
    weights = {
        name: (
            (1 - arguments.share) * value.astype(np.float32)
            + arguments.share * second[name].astype(np.float32)
        ).astype(value.dtype)
        for name, value in first.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.out / "model.safetensors")


if __name__ == "__main__":
    main()
