"""The command: arguments to one call, errors and signals to exit codes. No logic of the work.

Imports are inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final

from funasr_batch.errors import FunasrBatchError, StorageError, UsageError

if TYPE_CHECKING:
    from funasr_batch.config import Layers
    from funasr_batch.flags import Flags
    from funasr_batch.run.progress import Reporter
    from funasr_batch.run.stopping import StopRequest
    from funasr_batch.settings import Settings

RESERVED: Final = ("status", "render", "verify", "evaluate", "benchmark")
"""First words kept for commands of later versions; a folder of that name is given as ./models."""

INTERNAL_ERROR: Final = FunasrBatchError.exit_code

STOPPING: Final = b"funasr-batch: finishing the batch in hand; once more ends at once\n"
SHOW_CURSOR: Final = b"\x1b[?25h"


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code of the process."""
    try:
        return _dispatch(arguments)
    except FunasrBatchError as error:
        _complain(str(error), error.hint)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        import traceback

        with contextlib.suppress(OSError):
            traceback.print_exc()
        _complain(
            f"internal error: {type(error).__name__}",
            "What is finished is kept. Please report the lines above.",
        )
        return INTERNAL_ERROR


def _dispatch(arguments: Sequence[str]) -> int:
    match arguments:
        case ["doctor", *rest]:
            return _doctor(rest)
        case ["models", *rest]:
            return _models(rest)
        case ["lint", *rest]:
            return _lint(rest)
        case [word, *_] if word in RESERVED:
            raise UsageError(
                f"the command {word!r} is not in this version",
                hint=f"A folder of that name is given as ./{word}",
            )
    return _transcribe(arguments)


def _complain(message: str, hint: str | None) -> None:
    from funasr_batch.run.progress import displayable

    lines = [f"funasr-batch: {line}" for line in message.splitlines()]
    lines += [f"hint: {line}" for line in (hint or "").splitlines()]
    with contextlib.suppress(OSError):  # nobody reads it
        print("\n".join(map(displayable, lines)), file=sys.stderr)


def _print(text: str) -> None:
    """Text to stdout, at once. Raises StorageError when it cannot be kept."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write to standard output: {error.strerror}") from error


def _doctor(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"doctor takes no arguments, not {arguments[0]!r}")
    from funasr_batch.doctor import examine

    for line in examine():
        _print(line)
    return 0


def _models(arguments: Sequence[str]) -> int:
    from funasr_batch.models_command import run_models

    for line in run_models(arguments):
        _print(line)
    return 0


def _lint(arguments: Sequence[str]) -> int:
    from funasr_batch.lint_command import run_lint

    return run_lint(arguments, _print)


def _transcribe(arguments: Sequence[str]) -> int:
    from funasr_batch.config import load_layers
    from funasr_batch.flags import parse_flags

    flags = parse_flags(arguments)
    layers = load_layers(flags.config, flags.values)
    if flags.print_config:
        _print(_at_first_input(layers, flags).describe().removesuffix("\n"))
        return 0
    return _run(flags, layers)


def _at_first_input(layers: Layers, flags: Flags) -> Layers:
    """The layers that hold for the first path, whose folder may have a configuration."""
    from pathlib import Path

    if not flags.paths:
        return layers
    path = Path(flags.paths[0])
    return layers.at_root(path if path.is_dir() else path.parent)


def _run(flags: Flags, layers: Layers) -> int:
    from funasr_batch.run.pipeline import Task, run
    from funasr_batch.run.stopping import StopRequest
    from funasr_batch.sources import find_sources
    from funasr_batch.weights.hub import default_cache_dir

    settings = layers.settings
    found = find_sources(flags.paths, settings, from_file=flags.from_file)
    roots = {root: layers.at_root(root) for root in {source.root for source in found.sources}}
    tasks = [
        Task(source, roots[source.root].for_source(source.relative)) for source in found.sources
    ]
    stop = StopRequest()
    with _reporter(settings) as reporter, _stopping_on_signals(stop):
        for omission in found.skipped if flags.verbose else ():
            reporter.warning(f"left out: {omission.path}: {omission.reason}")
        summary = run(
            tasks,
            [(omission.path, omission.reason) for omission in found.failed],
            reporter=reporter,
            stop=stop,
            cache_dir=settings.cache_dir or default_cache_dir(),
        )
    return summary.exit_code


@contextlib.contextmanager
def _reporter(settings: Settings) -> Iterator[Reporter]:
    from funasr_batch.run import progress

    reporters: list[Reporter] = []
    if settings.quiet:
        reporters.append(progress.QuietProgress(sys.stderr))
    elif settings.progress:
        reporters.append(progress.choose_reporter(sys.stderr, os.environ))
    else:
        reporters.append(progress.LineProgress(sys.stderr))
    with contextlib.ExitStack() as stack:
        if settings.events is not None:
            events = progress.EventLog(settings.events)
            stack.callback(events.close)
            reporters.append(events)
        yield progress.Broadcast(reporters)


@contextlib.contextmanager
def _stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """INT, TERM and HUP end the run after the batch in hand; the second one ends it at once.

    Ending at once is safe: files are only ever renamed into place whole. A signal that the parent
    had ignored, as `nohup` does with HUP, stays ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            if os.isatty(2):
                os.write(2, SHOW_CURSOR)  # the live display has hidden it
            os._exit(128 + number)
        stop.set(number)
        with contextlib.suppress(OSError):
            # Not through sys.stderr, which the signal may have interrupted in the middle of a line.
            os.write(2, STOPPING)

    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
