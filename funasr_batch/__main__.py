"""`python -m funasr_batch` and the console script `funasr-batch`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    _fill_standard_streams()
    from funasr_batch.cli import run_command

    sys.exit(run_command(sys.argv[1:]))


def _fill_standard_streams() -> None:
    """Opens /dev/null for each of stdin, stdout and stderr that is closed, as in some cron jobs.

    The next file that is opened would get its number, and a library that writes to stderr would
    write into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


if __name__ == "__main__":
    main()
