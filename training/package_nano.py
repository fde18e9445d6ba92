"""Makes the folder of sample-nano that ships: `python -m training.package_nano --help`.

What training wrote (`model.safetensors` under the checkpoint's names, float16) becomes a converted
folder as `funasr_batch.weights.checkpoint` reads it. float16 is how it is stored, not how it is
computed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from funasr_batch.weights.checkpoint import (
    CTC_VOCABULARY_FILE,
    TOKENIZER_FILE,
    write_checkpoint,
)
from funasr_batch.weights.safetensors_file import TensorSpec
from training.nano_tokenizer import RankTokenizer, nano_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that train_nano.py wrote")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("sample_nano.yaml"))
    parser.add_argument(
        "--llm-config", type=Path, default=Path(__file__).with_name("sample_nano_llm.json")
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="nano_tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = RankTokenizer.read(arguments.tokenizer)
    config = nano_config(arguments.config, arguments.llm_config, tokenizer)
    tensors = load_file(arguments.run / "model.safetensors")
    write_checkpoint(
        arguments.out,
        architecture=config.pop("model"),
        config=config,
        tokens=None,
        cmvn=None,
        tensors={name: TensorSpec("F16", value.shape) for name, value in tensors.items()},
        read=lambda name: np.ascontiguousarray(tensors[name], dtype=np.float16),
        files={
            name: (arguments.tokenizer / name).read_bytes()
            for name in (TOKENIZER_FILE, CTC_VOCABULARY_FILE)
        },
    )
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
