from __future__ import annotations

from pathlib import Path

import pytest
from command import Command
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Command:
    home = tmp_path / "home"
    home.mkdir()
    return Command(home, model)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """An empty folder for the inputs."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    return folder
