"""What a benchmark ran on: `python benchmarks/machine.py` prints it."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe() -> str:
    """A line for a table: date, processor, cores, memory, system, load, versions."""
    parts = (
        date.today().isoformat(),
        _processor(),
        f"{_cores()} cores",
        _memory(),
        f"{platform.system()} {platform.machine()}",
        f"load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}",
        *_versions("mlx", "numpy"),
    )
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return " / ".join(sorted(names)) or platform.processor()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size / 2**30:.0f} GiB"


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    print(describe())
