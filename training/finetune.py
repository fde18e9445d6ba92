"""Goes on training the CIF predictor and the decoder alone, on the encoder's view of noisy speech.

    python -m training.finetune --init WEIGHTS --data DIR [DIR …] --tokens tokens.json --out DIR

The encoder is run once over the data and its output kept in memory, so that the two small modules
can be trained for many steps without a GPU. They learn from the weights as they are: scaled to
the right count, as `train` does it, only where the count is wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from funasr_batch.cpu import prepare_cpu

prepare_cpu()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import yaml
from mlx.utils import tree_flatten

from funasr_batch.frontend import Cmvn, FrontEnd
from funasr_batch.models.layers import length_mask
from funasr_batch.models.paraformer import Paraformer, ParaformerConfig
from training.batches import EOS, Dataset, noise_bank
from training.train import FlatAdamW, alignment_loss, rate_at, save, token_embeddings


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One utterance after the encoder."""

    memory: np.ndarray = field(repr=False)
    """float16 [L, D]"""
    sums: np.ndarray = field(repr=False)
    tokens: np.ndarray


def encode(
    model: Paraformer, dataset: Dataset, front_end: FrontEnd, rng: np.random.Generator
) -> list[Encoded]:
    """Every utterance once, with noise, through the encoder; shortest first."""
    noise = noise_bank(dataset, 60, int(rng.integers(1 << 30)))
    encoded: list[Encoded] = []
    order = np.argsort(dataset.lengths)
    started = time.monotonic()
    for first in range(0, len(order), 16):
        chosen = [int(index) for index in order[first : first + 16]]
        features = [front_end.features(_noisy(dataset.samples(i), noise, rng)) for i in chosen]
        lengths = mx.array([len(item) for item in features])
        padded = np.zeros((len(chosen), max(map(len, features)), features[0].shape[1]), np.float32)
        for row, item in zip(padded, features, strict=True):
            row[: len(item)] = item
        memory = model.encode(mx.array(padded), length_mask(lengths, padded.shape[1]))
        for index, row in zip(chosen, np.array(memory.astype(mx.float16)), strict=True):
            labels = dataset.labels(index)
            kept = row[: len(labels.frame_tokens)]
            encoded.append(Encoded(kept, labels.sums[: len(kept) + 1], labels.tokens))
        if first % 800 == 0:
            print(
                f"encoded {first} of {len(order)} in {time.monotonic() - started:.0f} s", flush=True
            )
    return encoded


def _noisy(samples: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 in [-1, 1]: the speech with noise 8 to 50 dB below it, at a random level."""
    speech = samples.astype(np.float32) / 32768
    start = int(rng.integers(len(noise) - len(samples)))
    other = noise[start : start + len(samples)].astype(np.float32) / 32768
    gain = speech.std() / (other.std() + 1e-6) * 10 ** (-rng.uniform(8, 50) / 20)
    mixed = speech + gain * other
    return mixed / (np.abs(mixed).max() + 1e-5) * np.float32(10 ** (-rng.uniform(0, 30) / 20))


def batch_of(items: list[Encoded]) -> dict[str, mx.array]:
    frames, tokens = max(len(i.memory) for i in items), max(len(i.tokens) for i in items) + 1
    memory = np.zeros((len(items), frames, items[0].memory.shape[1]), np.float32)
    sums = np.zeros((len(items), frames + 1), np.float32)
    ids = np.full((len(items), tokens), EOS, np.int32)
    for row, item in enumerate(items):
        memory[row, : len(item.memory)] = item.memory
        sums[row, : len(item.sums)] = item.sums
        sums[row, len(item.sums) :] = item.sums[-1]
        ids[row, : len(item.tokens)] = item.tokens
    return {
        "memory": mx.array(memory),
        "lengths": mx.array([len(item.memory) for item in items]),
        "sums": mx.array(sums),
        "tokens": mx.array(ids),
        "counts": mx.array([len(item.tokens) + 1 for item in items]),
    }


class Head(nn.Module):
    """What is trained here."""

    def __init__(self, model: Paraformer) -> None:
        super().__init__()
        self.predictor, self.decoder = model.predictor, model.decoder


def losses(head: Head, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    """The loss and, for the log, [alignment, cross-entropy, accuracy, counts]."""
    memory = batch["memory"]
    mask = length_mask(batch["lengths"], memory.shape[1])
    token_mask = length_mask(batch["counts"], batch["tokens"].shape[1])
    alphas = head.predictor(memory, mask)
    alignment = alignment_loss(alphas, batch["sums"], mask)
    total = alphas.sum(axis=1, keepdims=True)
    wrong = mx.floor(total + 0.45) != batch["counts"][:, None]
    scaled = alphas * (batch["counts"][:, None] / mx.maximum(mx.stop_gradient(total), 0.5))
    used = mx.where(wrong, scaled, alphas)
    embeddings = token_embeddings(used, memory, batch["tokens"].shape[1])
    logits = head.decoder(embeddings, token_mask, memory, mask)
    count = token_mask.sum()
    entropy = nn.losses.cross_entropy(logits, batch["tokens"], label_smoothing=0.1)
    entropy = (entropy * token_mask).sum() / count
    right = ((mx.argmax(logits, axis=-1) == batch["tokens"]) & token_mask).sum() / count
    return entropy + 2 * alignment, mx.stack([alignment, entropy, right, 1 - wrong.mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--init", type=Path, required=True, help="weights that train.py wrote")
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders of shards")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("sample_paraformer.yaml")
    )
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, after encoding")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    mx.random.seed(args.seed)
    tokens = json.loads(args.tokens.read_text(encoding="utf-8"))
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    model = Paraformer(ParaformerConfig.from_checkpoint(config, len(tokens)))
    start = mx.load(str(args.init))
    names = [name for name, _ in tree_flatten(model.parameters())]
    model.load_weights([(name, start[name].astype(mx.float32)) for name in names])
    dataset = Dataset(args.data, processes=2)
    shift, scale = start["cmvn.shift"], start["cmvn.scale"]
    front_end = FrontEnd(7, 6, Cmvn(np.array(shift), np.array(scale)))
    rng = np.random.default_rng(args.seed)
    encoded = encode(model, dataset, front_end, rng)

    head = Head(model)
    optimizer = FlatAdamW(head.trainable_parameters())
    gradient = nn.value_and_grad(head, losses)
    begun = reported = time.monotonic()
    logs: list[np.ndarray] = []
    step = 0
    while (progress := (time.monotonic() - begun) / (60 * args.minutes)) < 1:
        first = int(rng.integers(0, max(1, len(encoded) - 4 * args.batch)))
        near = rng.choice(np.arange(first, min(first + 4 * args.batch, len(encoded))), args.batch)
        (_, log), gradients = gradient(head, batch_of([encoded[int(i)] for i in near]))
        head.update(optimizer.update(gradients, rate_at(step, progress, args.rate), 0.998))
        mx.eval(head.parameters(), optimizer.state, log)
        logs.append(np.array(log))
        step += 1
        if time.monotonic() - reported > 20:
            alignment, entropy, right, counted = np.mean(logs, axis=0)
            print(
                f"{time.monotonic() - begun:5.0f} s  step {step}  align {alignment:.4f}"
                f"  ce {entropy:.3f}  tokens right {right:.4f}  counts right {counted:.3f}",
                flush=True,
            )
            logs, reported = [], time.monotonic()
    head.update(optimizer.tree(optimizer.average))
    args.out.mkdir(parents=True, exist_ok=True)
    save({"model": model.parameters()}, shift, scale, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
