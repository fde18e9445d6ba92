"""Where the tests find the shared material that is never copied into the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from funasr_batch.cpu import prepare_cpu

prepare_cpu()  # before any test imports mlx

SHARED = Path(os.environ.get("FUNASR_BATCH_SHARED", Path(__file__).parents[2] / "shared"))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path.name} test material is not on this machine")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings and published goldens (see its MANIFEST.json)."""
    return _folder(SHARED / "data")


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Goldens computed by the real FunASR code on random weights (see its README)."""
    return _folder(SHARED / "oracle")
