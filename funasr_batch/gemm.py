"""Matrix products that stay on the thread that asks for them.

numpy's OpenBLAS spreads any product above a size over all cores. While MLX keeps those cores busy,
the hand-over costs several times the product itself; our parallelism is threads that each work
on a recording of their own.
"""

from __future__ import annotations

import numpy as np

from funasr_batch.records import FloatArray

_LARGEST_PRODUCT = 500_000
"""Multiplications per call. OpenBLAS takes a second thread from 2 * 4 * 65536 on (its
SMP_THRESHOLD_MIN and GEMM_MULTITHREAD_THRESHOLD)."""


def matmul(a: FloatArray, b: FloatArray) -> FloatArray:
    """float32 [n, k] times [k, m], computed a few rows at a time on the calling thread."""
    rows = max(2, _LARGEST_PRODUCT // b.size)
    whole = len(a) - len(a) % rows
    product = np.empty((len(a), b.shape[1]), np.float32)
    np.matmul(
        a[:whole].reshape(-1, rows, b.shape[0]),
        b,
        out=product[:whole].reshape(-1, rows, b.shape[1]),
    )
    np.matmul(a[whole:], b, out=product[whole:])
    return product
