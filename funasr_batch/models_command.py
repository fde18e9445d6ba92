"""`funasr-batch models convert`: a converted, perhaps quantised model in a folder of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from funasr_batch.errors import UsageError

_SEE_HELP = "see funasr-batch models convert --help"


def run_models(arguments: Sequence[str]) -> Iterator[str]:
    """Does what the words after `models` say, and yields lines for people.

    Raises:
        UsageError: the words are wrong.
        ModelError, CheckpointError, StorageError: there is no such model, its files were refused,
            or the disk refuses.
    """
    options = _parser().parse_args(arguments)
    yield from _convert(options)


def _convert(options: argparse.Namespace) -> Iterator[str]:
    from funasr_batch.weights.checkpoint import WEIGHTS_FILE, open_checkpoint
    from funasr_batch.weights.hub import default_cache_dir, resolve_model
    from funasr_batch.weights.quantize import unquantizable
    from funasr_batch.weights.quantized_checkpoint import save_quantized

    plan = options.quantize
    cache = options.cache_dir or default_cache_dir()
    checkpoint = open_checkpoint(
        resolve_model(options.model, offline=options.offline, cache_dir=cache)
    )
    folder = save_quantized(checkpoint, options.output_dir.absolute(), plan)
    before, after = (
        (place / WEIGHTS_FILE).stat().st_size / 1e6 for place in (checkpoint.folder, folder)
    )
    yield f"{folder}: {after:,.1f} MB of weights, before {before:,.1f} MB"
    shapes = ((name, spec.shape) for name, spec in checkpoint.specs.items())
    for name in unquantizable(shapes, plan):
        yield f"not quantised, as its width is not a multiple of 32: {name}"
    yield f"Use it with --model {folder}"


def _parser() -> argparse.ArgumentParser:
    from funasr_batch.weights.quantize import NONE

    parser = _Parser(prog="funasr-batch models", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    convert = commands.add_parser(
        "convert",
        help="write a converted model into a folder",
        description="Writes a model into a folder that --model takes, quantised if asked.",
        allow_abbrev=False,
    )
    convert.add_argument("model", metavar="MODEL", help="a name, hf:ORG/NAME or a folder")
    convert.add_argument(
        "-o", "--output-dir", metavar="DIR", type=Path, required=True, help="the folder to write"
    )
    convert.add_argument(
        "--quantize",
        metavar="SPEC",
        type=_quantization,
        default=NONE,
        help="bits of Nano's layers: int8 (the encoder), int8-all, int4 (8 bits in the encoder), "
        "or such as encoder=8,llm=4",
    )
    convert.add_argument("--offline", action="store_true", help="never use the network")
    convert.add_argument(
        "--cache-dir", metavar="DIR", type=Path, help="keep what is converted on the way here"
    )
    return parser


def _quantization(text: str) -> object:
    from funasr_batch.value_kinds import Quantized
    from funasr_batch.weights.quantize import parse_quantization

    try:
        return parse_quantization(text)
    except ValueError:
        message = f"must be {Quantized.allowed}, or none, not {text[:60]!r}"
        raise argparse.ArgumentTypeError(message) from None


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=_SEE_HELP)
