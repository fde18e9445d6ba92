"""What MLX wants on a Linux CPU before it is imported: a real BLAS and a patient allocator.

The `mlx[cpu]` wheels link the reference BLAS by its plain symbol names. A BLAS that is loaded
with RTLD_GLOBAL before MLX is first imported comes earlier in the dynamic linker's search order,
so its symbols win, and matrix products run 40 to 70 times faster. macOS uses Accelerate, and CUDA
has its own: nothing to do there.
"""

from __future__ import annotations

import _ctypes
import ctypes
import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ENVIRONMENT_VARIABLE = "FUNASR_BATCH_BLAS"
KERNELS_VARIABLE = "OPENBLAS_CORETYPE"
_KERNELS_WITHOUT_AVX = (b"Prescott", b"Core2", b"Penryn", b"Dunnington", b"Nehalem", b"Generic")

SLOW_BLAS_ADVICE = (
    "MLX runs on the reference BLAS here, about 40 times slower than this CPU can. "
    "Install OpenBLAS (apt install libopenblas0, dnf install openblas) or the extra: "
    "pip install 'funasr-batch[mkl]'"
)


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that MLX computes with."""

    kind: Literal["accelerate", "openblas", "mkl", "reference"]
    path: str | None = None

    @property
    def is_fast(self) -> bool:
        return self.kind != "reference"


def prepare_cpu() -> Blas:
    """Call once before anything imports mlx; later it has no effect. Never raises."""
    _keep_freed_memory()
    return load_fast_blas()


def load_fast_blas() -> Blas:
    """Loads the first BLAS found: `$FUNASR_BATCH_BLAS`, the system's OpenBLAS, the mkl wheel.

    Without a fast BLAS the answer is the reference one.
    """
    if sys.platform == "darwin":
        return Blas("accelerate")
    for path in _candidates():
        try:
            _choose_kernels(path)
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            return Blas("mkl" if "mkl" in path else "openblas", path)
    return Blas("reference")


def _choose_kernels(path: str) -> None:
    """Names the processor to an OpenBLAS that is older than it.

    Such a one takes it for a Pentium 4 and does without AVX: OpenBLAS 0.3.21 on an Emerald Rapids
    was three to six times slower (benchmarks/RESULTS.md). It reads the variable when it is loaded,
    so it is loaded once to be asked and a second time to be used.
    """
    if KERNELS_VARIABLE in os.environ:
        return
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    ask = getattr(library, "openblas_get_corename", None)
    if ask is None:
        return
    ask.restype = ctypes.c_char_p
    if ask() in _KERNELS_WITHOUT_AVX and (better := _kernels_for(_processor_flags())):
        _ctypes.dlclose(library._handle)
        os.environ[KERNELS_VARIABLE] = better


def _kernels_for(flags: frozenset[str]) -> str | None:
    """The newest kernels of OpenBLAS 0.3.21 that a processor with these flags can run."""
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "Cooperlake" if "avx512_bf16" in flags else "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None


def _processor_flags() -> frozenset[str]:
    """What Linux says that the processor can do; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Limits the threads of a matrix product meanwhile, in the whole process.

    Does nothing where the BLAS has no such setting.
    """
    loaded = ctypes.CDLL(None)
    for getter, setter in _BLAS_THREADS:
        if hasattr(loaded, setter):
            before = loaded[getter]()
            loaded[setter](count)
            try:
                yield
            finally:
                loaded[setter](before)
            return
    yield


_BLAS_THREADS = (
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20


def _keep_freed_memory() -> None:
    """Tells glibc to reuse the memory of large arrays instead of returning it to the kernel.

    MLX allocates each result anew; with glibc's defaults, arrays of some megabytes are mapped and
    unmapped every time, and clearing their pages costs more than computing them
    (benchmarks/RESULTS.md). musl and macOS have no mallopt: nothing is done there.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the largest that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 512 * _MIB)
        mallopt(_M_TOP_PAD, 64 * _MIB)


def _candidates() -> Iterator[str]:
    """File names and sonames to try, best first."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        yield chosen
    yield from (
        "libopenblas.so.0",
        "libopenblaso.so.0",  # Fedora's OpenMP build
        "libopenblas.so",
    )
    # The mkl wheel puts its libraries into <prefix>/lib, outside any package.
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        yield from sorted(glob.glob(str(Path(prefix) / "lib" / "libmkl_rt.so*")), reverse=True)
    # numpy's own OpenBLAS is built with 64-bit integers and suffixed symbols: of no use to MLX.
