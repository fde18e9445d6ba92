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

from funasr_batch.errors import FunasrBatchError, UsageError

if TYPE_CHECKING:
    from funasr_batch.flags import Flags
    from funasr_batch.run.pipeline import Task
    from funasr_batch.run.progress import Reporter
    from funasr_batch.run.stopping import StopRequest
    from funasr_batch.settings import Settings
    from funasr_batch.sources import SourceList

RESERVED: Final = ("models", "status", "render", "verify", "evaluate", "benchmark")
"""First words kept for commands of later versions; a folder of that name is given as ./models."""

INTERNAL_ERROR: Final = 70


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code of the process."""
    try:
        if arguments[:1] == ["doctor"]:
            return _doctor(arguments[1:])
        if arguments and arguments[0] in RESERVED:
            raise UsageError(
                f"the command {arguments[0]!r} is not in this version",
                hint=f"A folder of that name is given as ./{arguments[0]}",
            )
        return _transcribe(arguments)
    except FunasrBatchError as error:
        _complain(str(error))
        if error.hint:
            _complain(error.hint)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        import traceback

        traceback.print_exc()
        _complain("internal error; what is finished is kept. Please report the lines above.")
        return INTERNAL_ERROR


def _complain(text: str) -> None:
    print(f"funasr-batch: {text}".encode(errors="replace").decode(), file=sys.stderr)


def _doctor(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"doctor takes no arguments, not {arguments[0]!r}")
    from funasr_batch.doctor import examine

    print("\n".join(examine()))
    return 0


def _transcribe(arguments: Sequence[str]) -> int:
    from funasr_batch.config import load_layers
    from funasr_batch.flags import parse_flags

    flags = parse_flags(arguments)
    layers = load_layers(flags.config, flags.values)
    if flags.print_config:
        return _print_config(flags)
    from funasr_batch.sources import find_sources

    found = find_sources(flags.paths, layers.settings, from_file=flags.from_file)
    roots = {source.root: layers.at_root(source.root) for source in found.sources}
    from funasr_batch.run.pipeline import Task

    tasks = [
        Task(source, roots[source.root].for_source(source.relative)) for source in found.sources
    ]
    return _run(tasks, found, layers.settings, flags.verbose)


def _print_config(flags: Flags) -> int:
    """The merged settings; with those of the first input folder when there is one."""
    from pathlib import Path

    from funasr_batch.config import load_layers

    layers = load_layers(flags.config, flags.values)
    for path in map(Path, flags.paths):
        folder = path if path.is_dir() else path.parent
        layers = layers.at_root(folder)
        break
    sys.stdout.write(layers.describe())
    return 0


def _run(tasks: Sequence[Task], found: SourceList, settings: Settings, verbose: bool) -> int:
    from funasr_batch.run.pipeline import run
    from funasr_batch.run.stopping import StopRequest
    from funasr_batch.weights.hub import default_cache_dir

    stop = StopRequest()
    with _reporter(settings) as reporter, _stopping_on_signals(stop):
        for omission in found.skipped if verbose else ():
            reporter.warning(f"{omission.path}: {omission.reason}")
        summary = run(
            tasks,
            [(omission.path, omission.reason) for omission in found.failed],
            reporter=reporter,
            stop=stop,
            cache_dir=default_cache_dir(),
        )
        reporter.run_finished(summary)
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

    Ending at once is safe: files are only ever renamed into place whole.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.set(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
