"""Contestants side by side: alternating in one process, medians, and the machine's name."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch


def alternate(contestants: dict[str, Callable[[], None]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of a call of each, after one call to warm up; the contestants take turns in every round."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def matrix_product_flops(size: int = 2048, dtype: str = "float32") -> float:
    """Best flops a second of a square product, JAX's or torch's, on one device."""
    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    on_device = jax.device_put(a).astype(dtype)
    product = jax.jit(lambda a: jax.numpy.matmul(a, a, precision="highest"))
    t = torch.from_numpy(a).to(
        "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    )
    out = torch.empty_like(t)

    def with_torch() -> None:
        torch.matmul(t, t, out=out)
        out[0, 0].item()

    seconds = alternate(
        {"jax": lambda: product(on_device).block_until_ready(), "torch": with_torch}
    )
    return 2 * size**3 / min(seconds.values())


def peak_memory(module: str, *arguments: str) -> int:
    """Of a process that runs a module's `--alone`, in MB."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def peak_rss() -> int:
    """Of this process, in bytes. (getrusage would tell of the parent too, from before the program was started.)"""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux; macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(
        int(line.split()[1]) << 10
        for line in status.read_text().splitlines()
        if line.startswith("VmHWM")
    )


def machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}, jax {jax.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{name}, {os.cpu_count()} cores, jax {jax.__version__}"
