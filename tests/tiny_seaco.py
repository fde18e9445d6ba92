"""The tiny Paraformer of tiny_model.py with a hotword decoder: a SeacoParaformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten
from tiny_model import TOKENS, WIDTH, _config, _random

from funasr_batch.models.paraformer import Paraformer, ParaformerConfig
from funasr_batch.models.seaco import Seaco, SeacoConfig
from funasr_batch.weights.checkpoint import write_checkpoint
from funasr_batch.weights.safetensors_file import TensorSpec

NO_BIAS = TOKENS.index("yes")


def write_tiny_seaco(folder: Path, *, seed: int = 0, seg_dict: str | None = None) -> Path:
    """Writes a converted checkpoint to `folder`, which must not exist, and returns it.

    With any list of hotwords, some tokens of a clip are the hotword decoder's and some are not.
    """
    config = {
        **_config(True),
        "model_conf": {"inner_dim": WIDTH, "NO_BIAS": NO_BIAS},
        "seaco_decoder_conf": {
            "attention_heads": 2,
            "linear_units": WIDTH,
            "num_blocks": 4,
            "kernel_size": 21,
        },
    }
    main = ParaformerConfig.from_checkpoint(config, len(TOKENS))
    bias = Seaco(SeacoConfig.from_checkpoint(config, main))
    parameters = dict(tree_flatten(Paraformer(main).parameters()))
    parameters |= dict(tree_flatten(bias.parameters()))
    arrays = {name: _random(name, value, seed) for name, value in parameters.items()}
    arrays["hotword_output_layer.weight"] *= 2
    arrays["hotword_output_layer.bias"][NO_BIAS] += 4
    cmvn = np.full(560, -10.0, np.float32), np.full(560, 0.3, np.float32)
    write_checkpoint(
        folder,
        architecture="SeacoParaformer",
        config=config,
        tokens=TOKENS,
        cmvn=cmvn,
        tensors={name: TensorSpec("F32", array.shape) for name, array in arrays.items()},
        read=arrays.__getitem__,
        files={} if seg_dict is None else {"seg_dict": seg_dict.encode()},
    )
    return folder
