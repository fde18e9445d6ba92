from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import Command, is_tool
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Command:
    return Command.with_home(tmp_path / "home", model)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """An empty folder for the inputs."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    return folder


@pytest.fixture
def stranger(command: Command, tmp_path: Path) -> tuple[str, ...]:
    """A prefix that runs the command as a user without rights whom the system does not know, but
    who can write in `tmp_path`."""
    if os.geteuid() != 0 or not is_tool("setpriv"):
        pytest.skip("needs root, to become somebody else")
    for folder in (*tmp_path.parents, *command.model.parents):
        if folder.is_relative_to(tmp_path.parents[1]):  # pytest keeps them to their owner
            folder.chmod(0o755)
    tmp_path.chmod(0o777)
    prefix = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
    if command("--version", prefix=prefix).code != 0:
        pytest.skip("Python or the project is out of that user's reach")
    return prefix
