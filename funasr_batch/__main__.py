"""`python -m funasr_batch` and the console script `funasr-batch`."""

from __future__ import annotations

import sys


def main() -> None:
    from funasr_batch.cli import run_command

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
