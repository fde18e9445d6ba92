"""Makes docs/terminal.svg: a real run, in a real pseudo-terminal, drawn by rich.

python docs/make_terminal.py funasr-batch sample_audio -o /tmp/transcripts
"""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_COLUMNS = 92
_DRAWN = re.compile(r"\x1b\[(?:\?25[lh]|[0-9]*[AKJGH])")


def record(command: list[str]) -> str:
    """What the command prints on a terminal of fixed width."""
    chunks: list[bytes] = []

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        chunks.append(data)
        return data

    os.environ |= {"COLUMNS": str(_COLUMNS), "TERM": "xterm-256color"}
    pty.spawn(command, read)
    return b"".join(chunks).decode(errors="replace")


def final_screen(output: str) -> list[str]:
    """The lines that stay: the moves that redraw the live display are carried out."""
    lines: list[str] = [""]
    row = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", output):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            continue
        elif re.fullmatch(r"\x1b\[[0-9]*A", part):
            row = max(0, row - int(part[2:-1] or 1))
        elif re.fullmatch(r"\x1b\[[0-9]*K", part):
            lines[row] = ""
        elif not re.fullmatch(r"\x1b\[[0-9;?]*[A-Za-ln-z]", part):
            lines[row] += part
    return lines


def main() -> None:
    command = sys.argv[1:]
    lines = final_screen(record(command))
    console = Console(record=True, width=_COLUMNS, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), " ".join(command)))
    for line in lines:
        console.print(Text.from_ansi(line))
    target = Path(__file__).with_name("terminal.svg")
    console.save_svg(str(target), title="funasr-batch")


if __name__ == "__main__":
    main()
