"""Makes the model folder that ships: `python -m training.package --help`.

What training wrote (`model.safetensors` under the checkpoint's names, float16) becomes a converted
folder as `funasr_batch.weights.checkpoint` reads it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from funasr_batch.weights.checkpoint import write_checkpoint
from funasr_batch.weights.safetensors_file import TensorSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("sample_paraformer.yaml")
    )
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tensors = load_file(arguments.run / "model.safetensors")
    cmvn = (tensors.pop("cmvn.shift"), tensors.pop("cmvn.scale"))
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    write_checkpoint(
        arguments.out,
        architecture=config.pop("model"),
        config=config,
        tokens=json.loads(arguments.tokens.read_text(encoding="utf-8")),
        cmvn=cmvn,
        tensors={name: TensorSpec("F16", value.shape) for name, value in tensors.items()},
        read=lambda name: np.ascontiguousarray(tensors[name], dtype=np.float16),
    )
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
