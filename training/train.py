"""Trains sample-paraformer with this project's own model code.

    python -m training.train --data DIR [DIR …] --tokens tokens.json --minutes 7 --out DIR

Paraformer's two-pass training with its glancing sampler exists because nothing says where a token
is spoken. The synthesiser does say it, so here the CIF weights are taught the token times
directly: the running sum passes k + 1/2 where token k begins, and N - 1/2 where the last one ends,
which is where `funasr_batch.text.timestamps` looks for them. That makes one pass enough.

`mx.compile` is not used: on CUDA it spent 230 s on compiling kernels for the first batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import yaml
from mlx.utils import tree_flatten, tree_unflatten

from funasr_batch.models.layers import FsmnBlock, length_mask
from funasr_batch.models.paraformer import Paraformer, ParaformerConfig
from training.batches import Batch, Batches, Dataset, noise_bank
from training.features import add_noise, augment_mel, log_mel, stack_frames
from training.shards import SAMPLE_RATE

Losses = tuple[mx.array, mx.array]


class Trainee(nn.Module):
    """The model and a frame classifier that only training needs."""

    def __init__(self, config: ParaformerConfig) -> None:
        super().__init__()
        self.model = Paraformer(config)
        self.frame_head = nn.Linear(config.width, config.vocabulary)
        for module in self.model.modules():
            if isinstance(module, FsmnBlock):
                module.weight = mx.random.normal(module.weight.shape) * 0.1
        conv = self.model.predictor.cif_conv1d
        conv.weight = mx.random.normal(conv.weight.shape) * (3 * config.width) ** -0.5


def _unfolded(block: FsmnBlock, x: mx.array) -> mx.array:
    """The FSMN convolution as a product with shifted copies of its input.

    The gradient of MLX's grouped convolution takes 16 ms a layer on an H200, this one under 1 ms.
    """
    padded = mx.pad(x, [(0, 0), (block._left, block._right), (0, 0)])
    taps = block.weight[:, 0, :].T
    shifted = [padded[:, tap : tap + x.shape[1]] for tap in range(taps.shape[0])]
    return (mx.stack(shifted, axis=2) * taps).sum(axis=2)


def token_embeddings(alphas: mx.array, memory: mx.array, longest: int) -> mx.array:
    """decoding.cif.token_weights, differentiable: alphas [B, L], memory [B, L, D] -> [B, N, D]."""
    after = mx.cumsum(alphas, axis=1)[:, None, :]
    before = after - alphas[:, None, :]
    token = mx.arange(longest)[None, :, None]
    return mx.maximum(mx.minimum(after, token + 1) - mx.maximum(before, token), 0) @ memory


def alignment_loss(alphas: mx.array, sums: mx.array, mask: mx.array) -> mx.array:
    """How far alphas [B, L] are from those whose running sum is `sums` [B, L + 1]."""
    taught = mx.clip(sums[:, 1:] - sums[:, :-1], 0, 1)
    drift = mx.abs(mx.cumsum(alphas, axis=1) - sums[:, 1:])
    missed = mx.abs(alphas.sum(axis=1) - sums[:, -1])
    # Cross-entropy, whose optimum is the mean: half of the taught weights are zero, and the median
    # that an absolute error asks for would be zero everywhere. The logarithm keeps a gradient for
    # sums that are far off without letting them rule.
    local = nn.losses.binary_cross_entropy(
        mx.clip(alphas, 1e-4, 1 - 1e-4), taught, with_logits=False
    )
    near = mx.where(mask, 2 * local + 0.5 * mx.log1p(drift), 0).sum() / mask.sum()
    return near + 0.2 * mx.log1p(missed).mean()


def losses(
    trainee: Trainee, inputs: mx.array, lengths: mx.array, batch: dict[str, mx.array], guide: float
) -> Losses:
    """The training loss and, for the log, [alignment, cross-entropy, frames, accuracy, counts].

    `guide` is the share of the taught weights in those that make the embeddings: 1 at first.
    """
    mask = length_mask(lengths, inputs.shape[1])
    token_mask = length_mask(batch["counts"], batch["tokens"].shape[1])
    memory = trainee.model.encode(inputs, mask)
    alphas = trainee.model.alphas(memory, mask)
    taught = mx.clip(batch["sums"][:, 1:] - batch["sums"][:, :-1], 0, 1)
    frames = mask.sum()
    alignment = alignment_loss(alphas, batch["sums"], mask)
    end = batch["sums"][:, -1:]
    scaled = alphas * (end / mx.maximum(mx.stop_gradient(alphas.sum(axis=1, keepdims=True)), 0.5))
    used = guide * taught + (1 - guide) * scaled
    embeddings = token_embeddings(used, memory, batch["tokens"].shape[1])
    logits = trainee.model.decode(embeddings, token_mask, memory, mask)
    tokens = token_mask.sum()
    entropy = nn.losses.cross_entropy(logits, batch["tokens"], label_smoothing=0.1)
    entropy = (entropy * token_mask).sum() / tokens
    frame_loss = nn.losses.cross_entropy(trainee.frame_head(memory), batch["frame_tokens"])
    frame_loss = (frame_loss * mask).sum() / frames
    right = ((mx.argmax(logits, axis=-1) == batch["tokens"]) & token_mask).sum() / tokens
    counted = mx.mean(mx.floor(alphas.sum(axis=1) + 0.45) == batch["counts"])
    log = mx.stack([alignment, entropy, frame_loss, right, counted])
    return entropy + alignment + 0.3 * frame_loss, log


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) with clipping and an average of the weights.

    All parameters are one vector: an update is a dozen kernels instead of a dozen for each tensor.
    """

    _ALIGNMENT = 64
    """Each tensor begins at a multiple of so many values: cuBLAS refuses unaligned weights."""

    def __init__(self, parameters: dict) -> None:
        named = tree_flatten(parameters)
        self._names = [name for name, _ in named]
        self._shapes = [value.shape for _, value in named]
        self._sizes = [value.size for _, value in named]
        self._padding = [mx.zeros(-size % self._ALIGNMENT) for size in self._sizes]
        padded = [size + pad.size for size, pad in zip(self._sizes, self._padding, strict=True)]
        self._ends = np.cumsum(padded)[:-1].tolist()
        self.vector = self._flat(parameters)
        self.average = self.vector + 0
        # Norms and biases are not decayed.
        self._decay = mx.concatenate(
            [
                mx.full(n, float(len(shape) > 1))
                for n, shape in zip(padded, self._shapes, strict=True)
            ]
        )
        self._mean = mx.zeros_like(self.vector)
        self._square = mx.zeros_like(self.vector)
        self._step = 0

    def _flat(self, tree: dict) -> mx.array:
        values = (value.reshape(-1) for _, value in tree_flatten(tree))
        return mx.concatenate([x for pair in zip(values, self._padding, strict=True) for x in pair])

    def update(self, gradients: dict, rate: float, keep: float) -> dict:
        """One step; returns the new parameters as a tree."""
        self._step += 1
        gradient = self._flat(gradients)
        gradient = gradient * mx.minimum(1.0, 1.0 / (mx.linalg.norm(gradient) + 1e-6))
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.98 * self._square + 0.02 * mx.square(gradient)
        mean = self._mean / (1 - 0.9**self._step)
        scale = mx.sqrt(self._square / (1 - 0.98**self._step)) + 1e-8
        self.vector = self.vector - rate * (mean / scale + 0.02 * self._decay * self.vector)
        self.average = keep * self.average + (1 - keep) * self.vector
        return self.tree(self.vector)

    def tree(self, vector: mx.array) -> dict:
        parts = mx.split(vector, self._ends)
        described = zip(parts, self._sizes, self._shapes, strict=True)
        shaped = [part[:size].reshape(shape) for part, size, shape in described]
        return tree_unflatten(list(zip(self._names, shaped, strict=True)))

    @property
    def state(self) -> list[mx.array]:
        return [self.vector, self.average, self._mean, self._square]


class FrontEnd:
    """Batches of waveforms to features, with noise and augmentation."""

    def __init__(self, noise: np.ndarray, shift: mx.array, scale: mx.array) -> None:
        self._noise, self._shift, self._scale = mx.array(noise), shift, scale

    def __call__(self, batch: dict[str, mx.array], key: mx.array) -> tuple[mx.array, mx.array]:
        """-> features [B, L, 560] after CMVN, lengths [B]."""
        keys = mx.random.split(key, 4)
        count, width = batch["waves"].shape
        waves = batch["waves"].astype(mx.float32) / 32768.0
        start = mx.random.randint(0, self._noise.size - width, (count, 1), key=keys[3])
        noise = self._noise[start + mx.arange(width)[None, :]].astype(mx.float32) / 32768.0
        snr = mx.random.uniform(5, 50, (count,), key=keys[0])
        gain = mx.random.uniform(-35, 0, (count,), key=keys[1])
        inside = length_mask(batch["samples"], width)
        waves = mx.where(inside, add_noise(waves, noise, snr, gain), 0)
        mel = augment_mel(log_mel(waves), keys[2])
        counts = 1 + (batch["samples"] - 400) // 160
        return (stack_frames(mel, counts) + self._shift) * self._scale, (counts + 5) // 6


def cmvn_of(dataset: Dataset) -> tuple[mx.array, mx.array]:
    """Shift and scale over 560 values from a few hundred utterances."""
    rng = np.random.default_rng(0)
    frames = []
    for index in rng.choice(len(dataset), min(400, len(dataset)), replace=False):
        samples = dataset.samples(int(index))
        frames.append(np.array(log_mel(mx.array(samples[None].astype(np.float32) / 32768.0)))[0])
    stacked = np.concatenate(frames)
    scale = 1 / np.maximum(stacked.std(axis=0), 1e-3)
    return (
        mx.array(np.tile(-stacked.mean(axis=0), 7), mx.float32),
        mx.array(np.tile(scale, 7), mx.float32),
    )


def save(parameters: dict, shift: mx.array, scale: mx.array, path: Path) -> None:
    """Writes weights under the checkpoint's names, float16, with the CMVN in float32."""
    weights = {
        name.removeprefix("model."): value.astype(mx.float16)
        for name, value in tree_flatten(parameters)
        if name.startswith("model.")
    }
    weights |= {"cmvn.shift": shift, "cmvn.scale": scale}
    mx.save_safetensors(str(path), weights)


def rate_at(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over 500 steps, then a cosine to almost nothing at the end of the time."""
    return (
        peak * min(1.0, (step + 1) / 500) * max(0.003, 0.5 * (1 + float(np.cos(np.pi * progress))))
    )


def train(
    trainee: Trainee,
    optimizer: FlatAdamW,
    batches: Batches,
    front_end: FrontEnd,
    *,
    seconds: float,
    peak: float,
    key: mx.array,
    keep_copy: Callable[[], None],
) -> int:
    """Trains until the time is over, with a copy kept at every report; returns the steps."""
    gradient = nn.value_and_grad(trainee, losses)
    logs: list[mx.array] = []
    started = reported = time.monotonic()
    for step, batch in enumerate(batches):
        now = time.monotonic()
        progress = (now - started) / seconds
        if progress >= 1:
            return step
        key, current = mx.random.split(key)
        arrays = {name: mx.array(getattr(batch, name)) for name in Batch.__slots__}
        inputs, lengths = front_end(arrays, current)
        guide = min(1.0, max(0.0, (0.45 - progress) / 0.3))
        (_, log), gradients = gradient(trainee, inputs, lengths, arrays, guide)
        keep = min(0.998, (step + 1) / (step + 10))
        trainee.update(optimizer.update(gradients, rate_at(step, progress, peak), keep))
        mx.async_eval(trainee.parameters(), optimizer.state, log)
        logs.append(log)
        mx.eval(logs[max(0, len(logs) - 3)])  # two steps ahead of the device are enough
        if now - reported > 10:
            _report(now - started, step, rate_at(step, progress, peak), logs)
            logs, reported = [], now
            keep_copy()
    raise AssertionError("the batches never end")


def _report(elapsed: float, step: int, rate: float, logs: Sequence[mx.array]) -> None:
    alignment, entropy, frame_loss, right, counted = np.mean(
        [np.array(log) for log in logs], axis=0
    )
    print(
        f"{elapsed:6.0f} s  step {step:6d}  rate {rate:.2e}  align {alignment:.3f}"
        f"  ce {entropy:.3f}  frames {frame_loss:.3f}  tokens right {right:.4f}"
        f"  counts right {counted:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders of shards")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("sample_paraformer.yaml")
    )
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="weights to go on from, as --out holds them")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--batch-seconds", type=float, default=1200.0)
    parser.add_argument("--workers", type=int, default=12, help="processes that label")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    mx.random.seed(args.seed)
    sys.setswitchinterval(
        5e-4
    )  # this thread feeds the device; those that build batches wait for it
    tokens = json.loads(args.tokens.read_text(encoding="utf-8"))
    config = ParaformerConfig.from_checkpoint(
        yaml.safe_load(args.config.read_text(encoding="utf-8")), len(tokens)
    )
    dataset = Dataset(args.data, args.workers)
    print(
        f"{len(dataset)} utterances, {dataset.lengths.sum() / SAMPLE_RATE / 3600:.1f} h", flush=True
    )
    shift, scale = cmvn_of(dataset)
    front_end = FrontEnd(noise_bank(dataset, 120, args.seed), shift, scale)
    batches = Batches(dataset, args.batch_seconds, args.seed)
    batches.start(threads=4)

    FsmnBlock._convolve = _unfolded
    trainee = Trainee(config)
    if args.init:
        start = mx.load(str(args.init))
        names = [name for name, _ in tree_flatten(trainee.model.parameters())]
        trainee.model.load_weights([(name, start[name].astype(mx.float32)) for name in names])
    size = sum(v.size for _, v in tree_flatten(trainee.model.parameters()))
    print(f"{size / 1e6:.2f} M parameters", flush=True)
    optimizer = FlatAdamW(trainee.trainable_parameters())
    args.out.mkdir(parents=True, exist_ok=True)

    def keep_copy() -> None:
        save(optimizer.tree(optimizer.average), shift, scale, args.out / "model.safetensors")

    steps = train(
        trainee,
        optimizer,
        batches,
        front_end,
        seconds=args.minutes * 60,
        peak=args.rate,
        key=mx.random.key(args.seed),
        keep_copy=keep_copy,
    )
    keep_copy()
    print(f"{steps} steps", flush=True)


if __name__ == "__main__":
    main()
