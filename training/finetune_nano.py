"""Goes on training sample-nano's adaptor and LLM, on the encoder's view of noisy speech.

    OPENBLAS_NUM_THREADS=1 python -m training.finetune_nano --init WEIGHTS --data DIR [DIR …] \
        --tokens tokens.json --tokenizer DIR --out DIR

The encoder and the CTC head stay as they are. The encoder is run once over the data and its output
kept in memory, so that the rest can be trained without a GPU. Two such runs with other seeds and
data, one on each core, are joined by `training.average`.

What the LLM lacks after the first training is not grammar: it writes sentences of the domain where
the audio says something else. So more than half of the rows are put together from pieces of several
utterances, cut between words, which no grammar foretells, and more of the text that it reads is
replaced than in `train_nano`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from funasr_batch.cpu import prepare_cpu

prepare_cpu()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from funasr_batch.models.layers import length_mask
from funasr_batch.models.nano import FRAMES_PER_TOKEN, FunAsrNano, NanoConfig, audio_tokens
from training.batches import Dataset, frames_of, noise_bank
from training.nano_batches import NanoLabels, Prompts, load_dataset
from training.nano_llm import hidden_states
from training.nano_tokenizer import RankTokenizer, nano_config
from training.train import FlatAdamW
from training.train import FrontEnd as NoisyFeatures
from training.train_nano import (
    GUIDED_LAYER,
    SMOOTHING,
    Trainee,
    _mean,
    load_weights,
    raw_features,
    save,
    spliced,
)

KEPT = {"zh": 0.8, "en": 1.0, "mixed": 1.0, "digits": 1.0}
"""Part of the utterances of each kind that is used: what errs most is heard most."""
JOINED = 0.6
"""Part of the rows that are put together from pieces of several utterances."""
MOST_PIECES = 6
REPLACED = 0.15
"""Part of the text that the LLM reads as something else."""
HOTWORD_BATCHES = 0.08
WARM_UP = 30
ENCODED_AT_ONCE = 32


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One utterance of L frames and N tokens after the encoder."""

    memory: np.ndarray = field(repr=False)
    """float16 [L, D]"""
    ids: np.ndarray
    """int16 [N], the text without its end."""
    starts: np.ndarray
    """int64 [N], the frame in which each token begins."""
    labels: NanoLabels


def token_starts(frames: np.ndarray, blank: int) -> np.ndarray:
    """CTC labels [L] as `nano_batches.label` lays them out -> the first frame of each token."""
    changes = np.flatnonzero(np.diff(frames, prepend=blank))
    return changes[frames[changes] != blank]


def begins_word(tokenizer: RankTokenizer, ids: np.ndarray) -> np.ndarray:
    """bool [N]: the tokens before which a text may be cut: English words after a space, Chinese
    characters."""
    texts = [tokenizer.decode([int(token)]) for token in ids]
    return np.array([t[:1] == " " or "\u4e00" <= t[:1] <= "\u9fff" for t in texts], bool)


def join(pieces: Sequence[tuple[Encoded, int, int]]) -> Encoded:
    """The tokens [first, last) of each utterance one after the other, each with its sound. What is
    before an utterance's first token and after its last one comes with them."""
    memories, ids, starts, place = [], [], [], 0
    for item, first, last in pieces:
        begin = int(item.starts[first]) if first else 0
        end = int(item.starts[last]) if last < len(item.ids) else len(item.memory)
        memories.append(item.memory[begin:end])
        ids.append(item.ids[first:last])
        starts.append(item.starts[first:last] - begin + place)
        place += end - begin
    labels = pieces[0][0].labels
    return Encoded(np.concatenate(memories), np.concatenate(ids), np.concatenate(starts), labels)


def shifted(item: Encoded, frames: int) -> Encoded:
    """Without so many frames of the silence at its beginning."""
    return Encoded(item.memory[frames:], item.ids, item.starts - frames, item.labels)


def encode(
    model: FunAsrNano,
    dataset: Dataset,
    front_end: NoisyFeatures,
    blank: int,
    rng: np.random.Generator,
    seconds: float,
) -> list[Encoded]:
    """Utterances by `KEPT`, once each with noise, until the time is over; shortest first."""
    kept = [
        index
        for index in rng.permutation(len(dataset)).tolist()
        if (labels := dataset.labels(index)) is not None and rng.random() < KEPT[labels.kind]
    ]
    started, encoded = time.monotonic(), []
    # Groups of similar length, in random order: stopping early leaves out no length.
    groups = []
    for first in range(0, len(kept), 32 * ENCODED_AT_ONCE):
        ordered = sorted(
            kept[first : first + 32 * ENCODED_AT_ONCE], key=dataset.lengths.__getitem__
        )
        groups += [
            ordered[i : i + ENCODED_AT_ONCE] for i in range(0, len(ordered), ENCODED_AT_ONCE)
        ]
    order = rng.permutation(len(groups)).tolist()
    for done, number in enumerate(order):
        chosen = groups[number]
        sizes = dataset.lengths[chosen].astype(np.int32)
        waves = np.zeros((len(chosen), int(sizes.max())), np.int16)
        for row, index in zip(waves, chosen, strict=True):
            samples = dataset.samples(index)
            row[: len(samples)] = samples
        batch = {"waves": mx.array(waves), "samples": mx.array(sizes)}
        inputs, lengths = front_end(batch, mx.random.key(int(rng.integers(1 << 30))))
        memories = np.array(model.encode(inputs, lengths).astype(mx.float16))
        for index, size, memory in zip(chosen, sizes, memories, strict=True):
            labels = dataset.labels(index)
            starts = token_starts(labels.frames, blank)
            own = memory[: frames_of(int(size))].copy()
            encoded.append(Encoded(own, labels.ids, starts, labels))
        elapsed = time.monotonic() - started
        if done % 40 == 0:
            print(f"encoded {len(encoded)} of {len(kept)} in {elapsed:.0f} s", flush=True)
        if elapsed > seconds:
            break
    return sorted(encoded, key=lambda item: len(item.memory))


class Rows:
    """Draws rows of similar length and lays them out for the LLM."""

    def __init__(self, encoded: Sequence[Encoded], tokenizer: RankTokenizer) -> None:
        self._encoded, self._tokenizer = encoded, tokenizer
        self._prompts = Prompts(tokenizer)
        self._cuts = [
            np.flatnonzero(begins_word(tokenizer, item.ids)[1:]) + 1 if len(item.ids) else []
            for item in encoded
        ]
        # By duration, as `train_nano` draws its batches: long utterances err most.
        weight = np.cumsum([len(item.memory) for item in encoded], dtype=np.float64)
        self._below = weight / weight[-1]

    def draw(self, frames: int, rng: np.random.Generator) -> dict[str, mx.array]:
        """A batch of about so many encoder frames."""
        middle = int(np.searchsorted(self._below, rng.random()))
        rows = max(6, min(96, frames // max(len(self._encoded[middle].memory), 1)))
        low = max(0, min(middle - rows, len(self._encoded) - 2 * rows))
        near = np.arange(low, min(low + 2 * rows, len(self._encoded)))
        items = [self._item(int(i), near, rng) for i in rng.choice(near, rows)]
        return self._laid_out(items, bool(rng.random() < HOTWORD_BATCHES), rng)

    def _item(self, index: int, near: np.ndarray, rng: np.random.Generator) -> Encoded:
        item = self._encoded[index]
        if rng.random() < JOINED:
            item = self._joined(index, near, rng)
        if len(item.starts):
            # The place of a word among the 8 frames of an audio token changes.
            item = shifted(item, int(rng.integers(0, min(FRAMES_PER_TOKEN, item.starts[0] + 1))))
        return item

    def _joined(self, index: int, near: np.ndarray, rng: np.random.Generator) -> Encoded:
        """The beginning of the utterance, some words of others, and the end of one more."""
        item, kind = self._encoded[index], self._encoded[index].labels.kind
        others = [int(i) for i in near if self._encoded[i].labels.kind == kind]
        others = [i for i in others if len(self._cuts[i]) > 1]
        if not others or not len(self._cuts[index]):
            return item
        *middle, end = rng.choice(others, int(rng.integers(1, MOST_PIECES)))
        pieces = [(item, 0, int(rng.choice(self._cuts[index])))]
        for other in middle:
            cuts = self._cuts[other]
            first = int(rng.integers(0, len(cuts) - 1))
            last = min(len(cuts) - 1, first + int(rng.integers(1, 4)))
            pieces.append((self._encoded[other], int(cuts[first]), int(cuts[last])))
        last_item = self._encoded[end]
        pieces.append((last_item, int(rng.choice(self._cuts[end])), len(last_item.ids)))
        return join(pieces)

    def _laid_out(
        self, items: Sequence[Encoded], hotwords: bool, rng: np.random.Generator
    ) -> dict[str, mx.array]:
        """Rows as `nano_batches.build` has them, without room for more than the longest."""
        prompts = [self._prompts.draw(item.labels, rng, hotwords) for item in items]
        frames = max(len(item.memory) for item in items)
        longest = max(len(item.ids) for item in items) + 1
        audio = [audio_tokens(len(item.memory)) for item in items]
        before = [
            len(prompt.prefix) + tokens + len(prompt.suffix)
            for prompt, tokens in zip(prompts, audio, strict=True)
        ]
        width = max(n + len(item.ids) for n, item in zip(before, items, strict=True))
        # The widest audio is copied into every row, past its end into nothing.
        width = max(width, max(len(p.prefix) for p in prompts) + audio_tokens(frames))
        memory = np.zeros((len(items), frames, items[0].memory.shape[1]), np.float32)
        ids = np.zeros((len(items), width), np.int32)
        targets = np.zeros((len(items), longest), np.int32)
        places = np.zeros((len(items), longest), np.int32)
        end = self._tokenizer.special("<|im_end|>")
        for row, (item, prompt, tokens) in enumerate(zip(items, prompts, audio, strict=True)):
            count, text = len(item.ids), before[row]
            memory[row, : len(item.memory)] = item.memory
            targets[row, :count] = item.ids
            targets[row, count] = end
            places[row, :count] = item.starts // FRAMES_PER_TOKEN
            places[row, count] = places[row, max(count - 1, 0)]
            ids[row, : len(prompt.prefix)] = prompt.prefix
            ids[row, len(prompt.prefix) + tokens : text] = prompt.suffix
            heard = item.ids.astype(np.int32)
            other = rng.random(count) < REPLACED
            heard[other] = rng.integers(256, self._tokenizer.base, int(other.sum()))
            ids[row, text : text + count] = heard
        return {
            "memory": mx.array(memory),
            "lengths": mx.array([len(item.memory) for item in items]),
            "ids": mx.array(ids),
            "prefix": mx.array([len(prompt.prefix) for prompt in prompts]),
            "starts": mx.array(before) - 1,
            "targets": mx.array(targets),
            "counts": mx.array([len(item.ids) + 1 for item in items]),
            "places": mx.array(places),
        }


class Head(nn.Module):
    """What is trained here."""

    def __init__(self, model: FunAsrNano) -> None:
        super().__init__()
        self.audio_adaptor, self.llm = model.audio_adaptor, model.llm


def losses(trainee: Trainee, batch: dict[str, mx.array], guide: float) -> tuple[mx.array, mx.array]:
    """The loss and, for the log, [text, guide, tokens right]; see `train_nano.losses`."""
    llm = trainee.model.llm
    audio = trainee.model.adapt(batch["memory"], batch["lengths"])
    embeddings = spliced(trainee, audio, batch["ids"], batch["prefix"])
    hidden, seen = hidden_states(llm, embeddings, GUIDED_LAYER)
    targets = batch["targets"]
    mask = length_mask(batch["counts"], targets.shape[1])
    place = batch["starts"][:, None] + mx.arange(targets.shape[1])[None, :]
    place = mx.minimum(place, hidden.shape[1] - 1)[..., None]
    logits = llm.logits(mx.take_along_axis(hidden, place, axis=1))
    text = _mean(nn.losses.cross_entropy(logits, targets, label_smoothing=SMOOTHING), mask)
    right = _mean(mx.argmax(logits, axis=-1) == targets, mask)
    where = (batch["prefix"][:, None] + batch["places"])[..., None]
    looked = mx.take_along_axis(mx.take_along_axis(seen, place, axis=1), where, axis=2)[..., 0]
    guided = _mean(-mx.log(looked + 1e-4), mask)
    return text + guide * guided, mx.stack([text, guided, right])


def rate_at(step: int, progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to almost nothing at the end of the time."""
    return (
        peak * min(1.0, (step + 1) / WARM_UP) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--init", type=Path, required=True, help="weights that train_nano.py wrote")
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders of shards")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("sample_nano.yaml"))
    parser.add_argument(
        "--llm-config", type=Path, default=Path(__file__).with_name("sample_nano_llm.json")
    )
    parser.add_argument("--tokens", type=Path, required=True, help="the shards' tokens.json")
    parser.add_argument("--tokenizer", type=Path, required=True, help="nano_tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28.0, help="of training, after encoding")
    parser.add_argument("--encode-minutes", type=float, default=4.0, help="at most")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--guide", type=float, default=0.1, help="weight of the guided attention")
    parser.add_argument("--batch-frames", type=int, default=2400, help="60 ms each")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    mx.random.seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = RankTokenizer.read(args.tokenizer)
    config = NanoConfig.from_checkpoint(
        nano_config(args.config, args.llm_config, tokenizer), tokenizer.base + 1
    )
    trainee = Trainee(config)
    load_weights(trainee.model, args.init)
    dataset = load_dataset(args.data, args.tokenizer, args.tokens, 1)
    front_end = raw_features(noise_bank(dataset, 60, args.seed))
    encoded = encode(
        trainee.model, dataset, front_end, tokenizer.base, rng, 60 * args.encode_minutes
    )
    hours = sum(len(item.memory) for item in encoded) * 0.06 / 3600
    print(f"{len(encoded)} utterances, {hours:.2f} h", flush=True)
    rows = Rows(encoded, tokenizer)
    head = Head(trainee.model)
    optimizer = FlatAdamW(head.trainable_parameters())
    gradient = nn.value_and_grad(head, lambda batch: losses(trainee, batch, args.guide))
    args.out.mkdir(parents=True, exist_ok=True)

    def keep_copy() -> None:
        head.update(optimizer.tree(optimizer.average))
        save(trainee.parameters(), config, args.out / "model.safetensors")
        head.update(optimizer.tree(optimizer.vector))

    begun = reported = kept = time.monotonic()
    logs: list[np.ndarray] = []
    step = 0
    while (progress := (time.monotonic() - begun) / (60 * args.minutes)) < 1:
        (_, log), gradients = gradient(rows.draw(args.batch_frames, rng))
        keep = min(0.98, (step + 1) / (step + 10))
        head.update(optimizer.update(gradients, rate_at(step, progress, args.rate), keep))
        mx.eval(head.parameters(), optimizer.state, log)
        logs.append(np.array(log))
        step += 1
        now = time.monotonic()
        if now - reported > 20:
            text, guided, right = np.mean(logs, axis=0)
            print(
                f"{now - begun:5.0f} s  step {step}  text {text:.3f}  guide {guided:.3f}"
                f"  tokens right {right:.4f}",
                flush=True,
            )
            logs, reported = [], now
        if now - kept > 120:
            keep_copy()
            kept = now
    keep_copy()
    print(f"{step} steps", flush=True)


if __name__ == "__main__":
    main()
