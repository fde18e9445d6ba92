"""The BLAS that MLX gets on a Linux CPU. In processes of their own: it is loaded once for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from funasr_batch.cpu import (
    _KERNELS_WITHOUT_AVX,
    ENVIRONMENT_VARIABLE,
    KERNELS_VARIABLE,
    Blas,
    _kernels_for,
    _processor_flags,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux chooses its BLAS")

PREPARE = """
import json, sys
from funasr_batch.cpu import prepare_cpu
blas = prepare_cpu()
answer = {"kind": blas.kind, "path": blas.path, "fast": blas.is_fast}
answer["mlx"] = any(name.partition(".")[0] == "mlx" for name in sys.modules)
"""

MULTIPLY = """
import mlx.core as mx, numpy as np
random = np.random.default_rng(0)
a, b = (random.integers(-8, 8, (300, 300)).astype(np.float32) for _ in range(2))
product = mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu)
answer["equal"] = bool((np.array(product) == a.astype(np.int64) @ b.astype(np.int64)).all())
"""

WHO_MULTIPLIES = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p) for name in ("file", "base", "symbol", "address")]
everything = ctypes.CDLL(None)
info = Info()
address = ctypes.cast(everything.cblas_sgemm, ctypes.c_void_p)
assert everything.dladdr(address, ctypes.byref(info))
answer["library"] = info.file.decode()
"""


def run(code: str, **environment: str) -> dict[str, Any]:
    """What `code` leaves in `answer`, in a fresh process."""
    inherited = {k: v for k, v in os.environ.items() if k != ENVIRONMENT_VARIABLE}
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(json.dumps(answer))"],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environment},
    )
    assert process.stderr == ""
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    answer = run(PREPARE + MULTIPLY + WHO_MULTIPLIES)
    if not answer["fast"]:
        pytest.skip("this machine has no fast BLAS")
    return answer


def test_what_is_found_is_what_mlx_multiplies_with(found: dict[str, Any]) -> None:
    assert found["kind"] in ("openblas", "mkl")
    assert found["kind"] in found["library"]
    assert found["equal"]


def test_preparing_does_not_import_mlx(found: dict[str, Any]) -> None:
    assert found["mlx"] is False


@pytest.mark.parametrize("path", ["/nowhere/libblas.so", "", __file__, "libm.so.6"])
def test_a_choice_that_is_no_blas_falls_through(found: dict[str, Any], path: str) -> None:
    """A path that is not there, nothing, a file that is no library, a library without a BLAS."""
    answer = run(PREPARE, **{ENVIRONMENT_VARIABLE: path})
    assert (answer["kind"], answer["path"]) == (found["kind"], found["path"])


def test_a_choice_comes_first(found: dict[str, Any]) -> None:
    assert os.path.isabs(found["library"])
    answer = run(PREPARE, **{ENVIRONMENT_VARIABLE: found["library"]})
    assert answer["path"] == found["library"]


def test_without_any_blas_the_products_are_slow_and_right() -> None:
    nothing = "import funasr_batch.cpu\nfunasr_batch.cpu._candidates = lambda: iter(())\n"
    answer = run(nothing + PREPARE + MULTIPLY)
    assert (answer["kind"], answer["path"], answer["fast"]) == ("reference", None, False)
    assert answer["equal"]


def test_only_the_reference_is_slow() -> None:
    assert [Blas(kind).is_fast for kind in ("accelerate", "openblas", "mkl", "reference")] == [
        True,
        True,
        True,
        False,
    ]


KERNELS = """
import ctypes, os
library = ctypes.CDLL(None)
library.openblas_get_corename.restype = ctypes.c_char_p
answer["kernels"] = library.openblas_get_corename().decode()
"""


def test_an_openblas_older_than_the_processor_uses_avx(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _kernels_for(_processor_flags()):
        pytest.skip("a processor without AVX2")
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    if run(PREPARE)["kind"] != "openblas":
        pytest.skip("no OpenBLAS")
    assert run(PREPARE + KERNELS)["kernels"].encode() not in _KERNELS_WITHOUT_AVX


def test_the_users_choice_of_kernels_holds() -> None:
    if run(PREPARE)["kind"] != "openblas":
        pytest.skip("no OpenBLAS")
    assert run(PREPARE + KERNELS, **{KERNELS_VARIABLE: "Prescott"})["kernels"] == "Prescott"


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("fpu sse2", None),
        ("avx2 fma", "Haswell"),
        ("avx2 fma avx512f avx512dq avx512bw avx512vl", "SkylakeX"),
        ("avx2 fma avx512f avx512dq avx512bw avx512vl avx512_bf16", "Cooperlake"),
        ("avx2 fma avx512f", "Haswell"),
    ],
)
def test_kernels_that_a_processor_can_run(flags: str, kernels: str | None) -> None:
    assert _kernels_for(frozenset(flags.split())) == kernels
