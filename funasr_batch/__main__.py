"""`python -m funasr_batch` and the console script `funasr-batch`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    _open_closed_streams()
    from funasr_batch.cli import run_command

    try:
        sys.exit(run_command(sys.argv[1:]))
    finally:
        _give_up_broken_streams()


def _open_closed_streams() -> None:
    """Opens /dev/null for each of stdin, stdout and stderr that is closed, as in some cron jobs.

    The next file that is opened would get its number, and a library that writes to stderr would
    write into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _give_up_broken_streams() -> None:
    """Lets go of what nobody reads any more: Python's last act would be to complain about it and to
    change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
