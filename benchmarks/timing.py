"""Measure contestants side by side: alternating in one process, medians, and the machine's name."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(*columns: str) -> str:
    """Return the first two lines of a Markdown table."""
    return f"{row(*columns)}\n{row(*['---'] * len(columns))}"


def alternate(contestants: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of a call of each contestant, see `alternate_all`."""
    seconds = alternate_all(contestants, rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def alternate_all(
    contestants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of every call of each contestant.

    Each is called once to warm up; then they take turns in every round.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


# Products or passes between two waits for the device: one alone is as short as the wait.
CALLS = 10


def matrix_product_flops(precision: str = "float32", quick: bool = False) -> float:
    """Return the best FLOP/s of a large square product, JAX's or torch's, on one device.

    precision: float32, tf32 or bfloat16. quick: of a small product, which says little. torch counts
    if it is installed and sees the same device.
    """
    on_gpu = jax.default_backend() == "gpu"
    size = 8192 if on_gpu else 2048
    if quick:
        size = 256
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    on_device = jax.device_put(a).astype(dtype)
    jax_precision = "default" if precision == "tf32" else "highest"
    jax_product = jax.jit(lambda a: jax.numpy.matmul(a, a, precision=jax_precision))
    contestants = {"jax": in_a_row(lambda: jax_product(on_device), CALLS)}
    torch = import_torch()
    if torch is not None and torch.cuda.is_available() == on_gpu:
        tensor = torch.from_numpy(a).to("cuda" if on_gpu else "cpu", getattr(torch, dtype))
        out = torch.empty_like(tensor)

        def run_torch() -> None:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            for _ in range(CALLS):
                torch.matmul(tensor, tensor, out=out)
            out[0, 0].item()

        contestants["torch"] = run_torch
    seconds = alternate(contestants)
    return CALLS * 2 * size**3 / min(seconds.values())


def copy_bandwidth(n_bytes: int) -> float:
    """Return bytes read and written per second, by a pass over an array on one device."""
    x = jax.numpy.arange(n_bytes // 4, dtype=np.float32)
    negate = jax.jit(jax.numpy.negative)
    seconds = alternate({"passes": in_a_row(lambda: negate(x), CALLS)})
    return CALLS * 2 * n_bytes / seconds["passes"]


def in_a_row(start: Callable[[], jax.Array], n_calls: int) -> Callable[[], None]:
    """Return a function that starts some calls, and waits for the last."""

    def run() -> None:
        for _ in range(n_calls):
            done = start()
        done.block_until_ready()

    return run


def import_torch() -> Any:
    """Return torch, or None if it is not installed, as on machines that run JAX alone."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def peak_memory(module: str, *arguments: str) -> int:
    """Return the peak RSS, in MB, that a module prints when run with these arguments."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_rss() -> int:
    """Return the peak RSS of this process in bytes.

    Linux's getrusage would include the parent's memory from before the program was started.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux; macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def machine() -> str:
    """Return the name of the device, the number of cores or cards, and JAX's version."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}, jax {jax.__version__}"
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
                break
    return f"{name}, {os.cpu_count()} cores, jax {jax.__version__}"
