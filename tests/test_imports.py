"""Who imports what. MLX stays behind a few doors, and the command answers before it is loaded.

* `models/` and `decoding/` are made of MLX and import it at the top.
* `weights/`, `loading.py` and `doctor.py` import it inside the functions that need it, so that a
  run that finds nothing to do never loads it.
* Nothing else imports it at all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import funasr_batch

PACKAGE = Path(funasr_batch.__file__).parent
AT_THE_TOP = ("models/", "decoding/")
IN_FUNCTIONS = ("weights/", "loading.py", "doctor.py")
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(tree: ast.AST, *, functions: bool) -> Iterator[str]:
    """Names of imported modules; those for type checkers only do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.orelse:
                yield from imported(statement, functions=functions)
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node, functions=functions)


def imports_mlx(module: str, *, functions: bool) -> bool:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    return any(name.partition(".")[0] == "mlx" for name in imported(tree, functions=functions))


@pytest.mark.parametrize("module", MODULES)
def test_mlx_is_imported_behind_its_doors_only(module: str) -> None:
    if not module.startswith(AT_THE_TOP):
        assert not imports_mlx(module, functions=False)
        if not module.startswith(IN_FUNCTIONS):
            assert not imports_mlx(module, functions=True)


def test_the_doors_are_in_use() -> None:
    """Else the rule above would hold for the wrong reason."""
    with_mlx = {module for module in MODULES if imports_mlx(module, functions=True)}
    for door in (*AT_THE_TOP, *IN_FUNCTIONS):
        assert any(module.startswith(door) for module in with_mlx), door
    assert imports_mlx("models/layers.py", functions=False)
    assert not imports_mlx("loading.py", functions=False)


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n' + ' '.join(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_everything_before_the_model_can_be_imported_without_mlx() -> None:
    """Also through other modules, which reading the source would not show."""
    names = [
        "funasr_batch." + module.removesuffix(".py").replace("/", ".")
        for module in MODULES
        if not module.startswith(AT_THE_TOP) and not module.endswith(("__init__.py", "__main__.py"))
    ]
    modules = loaded_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= modules
    assert not {"mlx", "mlx.core", "torch"} & modules


def test_help_loads_nothing_heavy() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "funasr_batch", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "funasr-batch" in run.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "funasr_batch.cli" in modules
    heavy = {"mlx", "mlx.core", "numpy", "rich", "yaml", "av", "soundfile", "soxr", "sqlite3"}
    assert not heavy & modules


@pytest.mark.parametrize("module", ["funasr_batch", "funasr_batch.cli", "funasr_batch.errors"])
def test_the_package_and_its_command_are_light_to_import(module: str) -> None:
    modules = loaded_after(f"import {module}")
    assert module in modules
    assert not {"mlx", "numpy", "rich", "yaml"} & modules
