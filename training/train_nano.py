"""Trains sample-nano with this project's own model code.

    python -m training.train_nano --data DIR [DIR …] --tokens tokens.json --tokenizer DIR \
        --out DIR --minutes 13 --init-encoder sample-paraformer/model.safetensors --test DIR

All parts learn from the first step, each from a loss of its own: the CTC head from labels for each
frame, the audio tokens from the tokens of text that begin within them, the LLM from the text. A
decoder-only LLM finds out late that the text runs along the audio, so one head of its attention is
taught where each token of text is spoken (guided attention: Tachibana et al. 2018 teach a diagonal,
here the times are known).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from funasr_batch.models.layers import FsmnBlock, length_mask, sinusoidal_positions
from funasr_batch.models.nano import FunAsrNano, NanoConfig
from funasr_batch.models.qwen3 import fuse, unfuse
from funasr_batch.text.prompt import build_prompt
from training.batches import BUCKET_SECONDS, Dataset, frames_of, noise_bank
from training.features import log_mel, stack_frames
from training.nano_batches import (
    SHORT_PREFIX,
    SLOTS,
    NanoBatch,
    NanoBatches,
    bucket_of,
    build,
    load_dataset,
    room,
    silence,
)
from training.nano_llm import hidden_states
from training.nano_scoring import edits, units_of
from training.nano_tokenizer import RankTokenizer, nano_config
from training.shards import SAMPLE_RATE
from training.train import FlatAdamW, FrontEnd, _unfolded, rate_at

Arrays = dict[str, mx.array]

GUIDED_LAYER = 2
"""The layers before it find out where the text is, those from it on read what comes next."""
SMOOTHING = 0.05


class Trainee(nn.Module):
    """The model, and a classifier of its audio tokens that only training needs."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.model = FunAsrNano(config)
        width = config.llm.width
        self.slots = nn.Linear(width, SLOTS * width)
        for module in self.model.modules():
            if isinstance(module, FsmnBlock):
                module.weight = mx.random.normal(module.weight.shape) * 0.1
        for block in self.model.audio_encoder.tp_encoders:
            # What follows a trained encoder begins as almost nothing.
            for linear in (block.self_attn.linear_out, block.feed_forward.w_2):
                linear.weight = linear.weight * 0.1
            block.self_attn.fsmn_block.weight = block.self_attn.fsmn_block.weight * 0.1

    def slot_logits(self, audio: mx.array) -> mx.array:
        """audio tokens [B, A, H] -> [B, A, SLOTS, V], by the LLM's own embeddings."""
        hidden = self.slots(audio)
        return self.model.llm.logits(hidden.reshape(*audio.shape[:2], SLOTS, -1))


def spliced(trainee: Trainee, audio: mx.array, ids: mx.array, prefix: mx.array) -> mx.array:
    """Embeddings of `ids` [B, T] with the audio tokens [B, A, H] from position `prefix` [B] on.

    A row with fewer audio tokens than A has the ids of what follows in their place; see `build`.
    The copy is a product with ones and zeros: its gradient is one too, without a scatter.
    """
    place = prefix[:, None, None] + mx.arange(audio.shape[1])[None, None, :]
    copied = (mx.arange(ids.shape[1])[None, :, None] == place).astype(mx.float32)
    free = (ids == 0) & (copied.sum(axis=-1) > 0)
    copied = copied * free[..., None]
    return mx.where(free[..., None], copied @ audio, trainee.model.llm.embed(ids))


def losses(
    trainee: Trainee, inputs: mx.array, lengths: mx.array, batch: Arrays, guide: float
) -> tuple[mx.array, mx.array]:
    """The training loss and, for the log, [text, frames, slots, guide, tokens right, frames right,
    slots right]."""
    model = trainee.model
    mask = length_mask(lengths, inputs.shape[1])
    memory = model.encode(inputs, lengths)

    ctc = model.ctc_logits(memory, lengths)
    frame_loss = _mean(nn.losses.cross_entropy(ctc, batch["frames"]), mask)
    spoken = mask & (batch["frames"] != ctc.shape[-1] - 1)
    frames_right = _mean(mx.argmax(ctc, axis=-1) == batch["frames"], spoken)

    audio = model.adapt(memory, lengths)
    audio_mask = length_mask((lengths + 7) // 8, audio.shape[1])
    slot_logits = trainee.slot_logits(audio)
    nothing = ctc.shape[-1] - 1  # the id after the text tokens: <|endoftext|>
    taught = mx.where(batch["slots"] < 0, nothing, batch["slots"])
    slot_mask = mx.broadcast_to(audio_mask[..., None], taught.shape)
    slot_loss = _mean(nn.losses.cross_entropy(slot_logits, taught), slot_mask)
    slots_right = _mean(mx.argmax(slot_logits, axis=-1) == taught, slot_mask & (taught != nothing))

    embeddings = spliced(trainee, audio, batch["ids"], batch["prefix"])
    hidden, seen = hidden_states(model.llm, embeddings, GUIDED_LAYER)
    targets = batch["targets"]
    text_mask = length_mask(batch["counts"], targets.shape[1])
    place = batch["starts"][:, None, None] + mx.arange(targets.shape[1])[None, :, None]
    taken = (mx.arange(hidden.shape[1])[None, None, :] == place).astype(mx.float32)  # [B, N, T]
    logits = model.llm.logits(taken @ hidden)
    text_loss = _mean(
        nn.losses.cross_entropy(logits, targets, label_smoothing=SMOOTHING), text_mask
    )
    right = _mean(mx.argmax(logits, axis=-1) == targets, text_mask)

    seen = taken @ seen
    where = (batch["prefix"][:, None] + batch["places"])[..., None]
    found = mx.where(mx.arange(hidden.shape[1])[None, None, :] == where, seen, 0).sum(axis=-1)
    guide_loss = _mean(-mx.log(found + 1e-4), text_mask)

    log = mx.stack([text_loss, frame_loss, slot_loss, guide_loss, right, frames_right, slots_right])
    return text_loss + frame_loss + slot_loss + guide * guide_loss, log


def _mean(values: mx.array, mask: mx.array) -> mx.array:
    return (values * mask).sum() / mx.maximum(mask.sum(), 1)


def raw_features(noise: np.ndarray) -> FrontEnd:
    """The front end without CMVN, as Fun-ASR-Nano's."""
    return FrontEnd(noise, mx.zeros(560), mx.ones(560))


def start_encoder(model: FunAsrNano, path: Path, dataset: Dataset) -> int:
    """Fills the encoder's first stack from a trained Paraformer's; returns the tensors taken.

    That one was given features after CMVN, this one is not. The first norm's weight and bias are
    fitted so that on speech of the data it gives what the other's first norm gave.
    """
    found = mx.load(str(path))
    named = dict(tree_flatten(model.audio_encoder.parameters()))
    taken = {
        name: found[f"encoder.{name}"].astype(mx.float32)
        for name, value in named.items()
        if f"encoder.{name}" in found and found[f"encoder.{name}"].shape == value.shape
    }
    shift, scale = (np.array(found[f"cmvn.{name}"]) for name in ("shift", "scale"))
    rng = np.random.default_rng(0)
    raw = [_clean_features(dataset.samples(int(i))) for i in rng.choice(len(dataset), 300)]
    width = model.config.encoder.width
    ours = np.concatenate([_first_norm(x, width) for x in raw])
    theirs = np.concatenate([_first_norm((x + shift) * scale, width) for x in raw])
    centred = ours - ours.mean(axis=0)
    slope = (centred * theirs).mean(axis=0) / np.square(centred).mean(axis=0)
    offset = theirs.mean(axis=0) - slope * ours.mean(axis=0)
    weight, bias = taken["encoders0.0.norm1.weight"], taken["encoders0.0.norm1.bias"]
    taken["encoders0.0.norm1.bias"] = bias + weight * mx.array(offset, mx.float32)
    taken["encoders0.0.norm1.weight"] = weight * mx.array(slope, mx.float32)
    model.audio_encoder.load_weights(list(taken.items()), strict=False)
    explained = 1 - np.square(theirs - slope * ours - offset).mean() / theirs.var()
    print(f"encoder: {len(taken)} tensors taken, input explained to {explained:.3f}", flush=True)
    return len(taken)


def _clean_features(samples: np.ndarray) -> np.ndarray:
    mel = log_mel(mx.array(samples[None].astype(np.float32) / 32768.0))
    return np.array(stack_frames(mel, mx.array([mel.shape[1]])))[0]


def _first_norm(features: np.ndarray, width: int) -> np.ndarray:
    x = features * width**0.5 + np.array(sinusoidal_positions(*features.shape))
    x = x - x.mean(axis=1, keepdims=True)
    return x / x.std(axis=1, keepdims=True)


def load_weights(model: FunAsrNano, path: Path) -> None:
    """Fills the model from a file that `save` wrote."""
    weights = dict(mx.load(str(path)))
    fuse(weights)
    model.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()])


def save(parameters: dict, config: NanoConfig, path: Path) -> None:
    """Writes the model's weights under the checkpoint's names, float16."""
    weights = {
        name.removeprefix("model."): value.astype(mx.float16)
        for name, value in tree_flatten(parameters)
        if name.startswith("model.")
    }
    mx.save_safetensors(str(path), unfuse(weights, config.llm))


def arrays_of(batch: NanoBatch) -> Arrays:
    return {field.name: mx.array(getattr(batch, field.name)) for field in fields(batch)}


def train(
    trainee: Trainee,
    optimizer: FlatAdamW,
    batches: NanoBatches,
    front_end: FrontEnd,
    *,
    seconds: float,
    peak: float,
    key: mx.array,
    keep_copy: Callable[[], None],
    report_every: float = 10.0,
    guide: float = 0.3,
) -> int:
    """Trains until the time is over, with a copy kept every minute; returns the steps."""
    gradient = nn.value_and_grad(trainee, losses)
    logs: list[mx.array] = []
    started = reported = kept = time.monotonic()
    for step, batch in enumerate(batches):
        now = time.monotonic()
        progress = (now - started) / seconds
        if progress >= 1:
            return step
        key, current = mx.random.split(key)
        arrays = arrays_of(batch)
        inputs, lengths = front_end(arrays, current)
        # Late in training the LLM may look where it likes.
        weight = guide * min(1.0, max(0.1, (0.7 - progress) / 0.3))
        (_, log), gradients = gradient(trainee, inputs, lengths, arrays, weight)
        keep = min(0.998, (step + 1) / (step + 10))
        trainee.update(optimizer.update(gradients, rate_at(step, progress, peak), keep))
        mx.async_eval(trainee.parameters(), optimizer.state, log)
        logs.append(log)
        mx.eval(logs[max(0, len(logs) - 3)])  # two steps ahead of the device are enough
        if now - reported > report_every:
            _report(now - started, step, rate_at(step, progress, peak), logs, batches.waiting)
            logs, reported = [], now
        if now - kept > 60:
            keep_copy()
            kept = now
    raise AssertionError("the batches never end")


def _report(elapsed: float, step: int, rate: float, logs: Sequence[mx.array], waiting: int) -> None:
    text, frames, slots, guide, right, frames_right, slots_right = np.mean(
        [np.array(log) for log in logs], axis=0
    )
    print(
        f"{elapsed:5.0f} s  step {step:5d}  rate {rate:.2e}  text {text:.3f}  frames {frames:.3f}"
        f"  slots {slots:.3f}  guide {guide:.3f}  right: tokens {right:.4f}"
        f"  frames {frames_right:.4f}  slots {slots_right:.4f}  batches ready {waiting}",
        flush=True,
    )


def transcribe(
    trainee: Trainee, tokenizer: RankTokenizer, waves: Sequence[np.ndarray], seconds: float
) -> Iterator[tuple[str, str]]:
    """The LLM's greedy text and the CTC head's, of utterances of at most `seconds` each.

    Whole passes without a cache, all rows together.
    """
    prompt = build_prompt(tokenizer, language=None)  # type: ignore[arg-type]
    batch = build(
        waves,
        [silence(frames_of(len(wave)), tokenizer) for wave in waves],
        [prompt] * len(waves),
        tokenizer,
        seconds,
        SHORT_PREFIX,
        replaced=0,
        rng=np.random.default_rng(0),
    )
    arrays = arrays_of(batch)
    sound = arrays["waves"].astype(mx.float32) / 32768.0
    counts = 1 + (arrays["samples"] - 400) // 160
    inputs, lengths = stack_frames(log_mel(sound), counts), (counts + 5) // 6
    memory = trainee.model.encode(inputs, lengths)
    labels = np.array(mx.argmax(trainee.model.ctc_logits(memory, lengths), axis=-1))
    x = spliced(trainee, trainee.model.adapt(memory, lengths), arrays["ids"], arrays["prefix"])
    positions = mx.arange(x.shape[1])[None, :]
    end = tokenizer.special("<|im_end|>")
    found = np.zeros((len(waves), 0), np.int64)
    place = arrays["starts"]
    for _ in range(room(seconds) - 1):
        here = (positions == place[:, None]).astype(mx.float32)[:, None, :]
        hidden, _ = hidden_states(trainee.model.llm, x, GUIDED_LAYER)
        best = mx.argmax(trainee.model.llm.logits(here @ hidden), axis=-1)
        place = place + 1
        x = mx.where((positions == place[:, None])[..., None], trainee.model.llm.embed(best), x)
        found = np.concatenate([found, np.array(best)], axis=1)
        if (found == end).any(axis=1).all():
            break
    for row, own, frames in zip(found.tolist(), labels, np.array(lengths), strict=True):
        text = row[: row.index(end)] if end in row else row
        own = own[:frames]
        changes = own[np.flatnonzero(np.diff(own, prepend=-1))]
        yield tokenizer.decode(text), tokenizer.decode(changes[changes != tokenizer.base].tolist())


def evaluate(trainee: Trainee, tokenizer: RankTokenizer, dataset: Dataset, limit: int) -> None:
    """Prints error rates of the LLM's and the CTC head's texts without marks, by kind."""
    scores: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    usable = [i for i in range(len(dataset)) if dataset.labels(i) is not None][:limit]
    usable.sort(key=lambda i: int(dataset.lengths[i]))
    shown = 0
    for first in range(0, len(usable), 100):
        chosen = usable[first : first + 100]
        longest = max(int(dataset.lengths[i]) for i in chosen) / SAMPLE_RATE
        seconds = max(BUCKET_SECONDS[bucket_of(longest)], longest)
        waves = [dataset.samples(i) for i in chosen]
        for index, (text, ctc) in zip(
            chosen, transcribe(trainee, tokenizer, waves, seconds), strict=True
        ):
            labels = dataset.labels(index)
            score = scores[labels.kind]
            wanted = units_of(labels.written)
            score[0] += len(wanted)
            score[1] += edits(wanted, units_of(text))
            score[2] += edits(wanted, units_of(ctc))
            if text != labels.written and shown < 12:
                shown += 1
                print(f"  - {labels.written}\n  + {text}\n  c {ctc}")
    for kind, (units, errors, ctc_errors) in sorted(scores.items()):
        print(
            f"{kind:7s} LLM {errors / max(units, 1):7.2%}  CTC {ctc_errors / max(units, 1):7.2%}"
            f"  of {units} units",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders of shards")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="scored at the end")
    parser.add_argument("--test-limit", type=int, default=200, help="utterances of each folder")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("sample_nano.yaml"))
    parser.add_argument(
        "--llm-config", type=Path, default=Path(__file__).with_name("sample_nano_llm.json")
    )
    parser.add_argument("--tokens", type=Path, required=True, help="the shards' tokens.json")
    parser.add_argument("--tokenizer", type=Path, required=True, help="nano_tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init-encoder", type=Path, help="a Paraformer's model.safetensors")
    parser.add_argument("--init", type=Path, help="weights to go on from, as --out holds them")
    parser.add_argument("--minutes", type=float, default=13.0)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--guide", type=float, default=0.3, help="weight of the guided attention")
    parser.add_argument("--batch-seconds", type=float, default=1000.0)
    parser.add_argument("--workers", type=int, default=12, help="processes that label")
    parser.add_argument("--threads", type=int, default=4, help="threads that build batches")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    mx.random.seed(args.seed)
    sys.setswitchinterval(5e-4)  # this thread feeds the device; those that build wait for it
    begun = time.monotonic()
    tokenizer = RankTokenizer.read(args.tokenizer)
    config = NanoConfig.from_checkpoint(
        nano_config(args.config, args.llm_config, tokenizer), tokenizer.base + 1
    )
    dataset = load_dataset(args.data, args.tokenizer, args.tokens, args.workers)
    batches = NanoBatches(dataset, tokenizer, args.batch_seconds, args.seed)
    print(
        f"{len(dataset)} utterances, {dataset.lengths.sum() / SAMPLE_RATE / 3600:.1f} h, "
        f"{batches.left_out} left out, labelled in {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    front_end = raw_features(noise_bank(dataset, 120, args.seed))
    batches.start(args.threads)

    FsmnBlock._convolve = _unfolded
    trainee = Trainee(config)
    if args.init_encoder:
        start_encoder(trainee.model, args.init_encoder, dataset)
    if args.init:
        load_weights(trainee.model, args.init)
    size = sum(v.size for _, v in tree_flatten(trainee.model.parameters()))
    print(f"{size / 1e6:.2f} M parameters", flush=True)
    optimizer = FlatAdamW(trainee.trainable_parameters())
    args.out.mkdir(parents=True, exist_ok=True)

    def keep_copy() -> None:
        save(optimizer.tree(optimizer.average), config, args.out / "model.safetensors")

    steps = train(
        trainee,
        optimizer,
        batches,
        front_end,
        seconds=args.minutes * 60,
        peak=args.rate,
        key=mx.random.key(args.seed),
        keep_copy=keep_copy,
        guide=args.guide,
    )
    keep_copy()
    print(f"{steps} steps", flush=True)
    trainee.update(optimizer.tree(optimizer.average))
    for folder in args.test:
        print(folder.name)
        tested = load_dataset([folder], args.tokenizer, args.tokens, 1)
        evaluate(trainee, tokenizer, tested, args.test_limit)


if __name__ == "__main__":
    main()
