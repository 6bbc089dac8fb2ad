"""Start-up of JAX, alone or in a cluster, and decisions shared by the processes of a cluster.

Process 0 of a cluster writes the files that all share.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from minsae_jax.errors import UserError, brief

# Each simulated device has all weights and takes part in every sum of gradients.
MAX_CPU_DEVICES = 8
HEARTBEAT_SECONDS = 30  # without a heartbeat, after which JAX considers a process dead
SHUTDOWN_SECONDS = 20  # a process that ends waits this long for the others


def start_jax(deterministic: bool = False, distributed: bool = False) -> None:
    """Configure JAX; call this before anything uses a device.

    deterministic: use deterministic GPU kernels only.
    distributed: join the other processes of a cluster. JAX detects Slurm, Open MPI and Kubernetes;
    elsewhere the environment must define JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    On CPU every core of this process becomes a device, up to eight: XLA uses the cores better with
    work split over devices than within one. Raises UserError if there is no device or no cluster,
    if numbers have 64 bits by default, or if JAX may not copy arrays to the devices.
    """
    if jnp.result_type(float) == jnp.float64:
        raise UserError(
            "64-bit numbers of JAX (jax_enable_x64) change the results; unset JAX_ENABLE_X64, or "
            "turn it off in your program"
        )
    config: Any = jax.config  # settings have types in some versions of JAX only
    if str(config.jax_transfer_guard).startswith("disallow"):
        raise UserError(
            "arrays are copied to the devices, which JAX_TRANSFER_GUARD=disallow forbids; unset it"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags:
        flags = f"{flags} --xla_gpu_deterministic_ops=true".strip()
        os.environ["XLA_FLAGS"] = flags
    has_device_count = "xla_force_host_platform_device_count" in flags
    if not has_device_count and "JAX_NUM_CPU_DEVICES" not in os.environ:
        n_cores = os.cpu_count() or 1
        # A scheduler can assign some of the cores to a process. macOS and Windows lack this.
        if hasattr(os, "sched_getaffinity"):
            n_cores = len(os.sched_getaffinity(0))
        n_devices = min(n_cores, MAX_CPU_DEVICES)
        # JAX may have been used before in this process; its devices then stay as they are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", n_devices)
    # A program may have joined the cluster before, as the command line does to extract.
    if distributed and not jax.distributed.is_initialized():
        _join_cluster()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        # Without a plugin for a platform, JAX's assertion has no message.
        raise UserError(f"JAX found no device ({brief(e) or 'check JAX_PLATFORMS'})") from e


def _join_cluster() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name) or None for name in names)
    # JAX's preemption service would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            int(count) if count else None,
            int(index) if index else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--distributed found no cluster ({brief(e)}); start it under Slurm, or set "
            f"{', '.join(names)}"
        ) from e
    # The first collective sets up the connections, with a time limit of half a minute.
    multihost_utils.sync_global_devices("start")


@dataclass(frozen=True)
class Share:
    """One of `count` nearly equal parts of some work, numbered from 0."""

    index: int
    count: int

    def bounds(self, n: int) -> tuple[int, int]:
        """Return the bounds (start, stop) of this part among n items.

        >>> [Share(i, 3).bounds(8) for i in range(3)]
        [(0, 2), (2, 5), (5, 8)]
        """
        start = self.index * n // self.count
        stop = (self.index + 1) * n // self.count
        return start, stop


WHOLE = Share(0, 1)


def process_share() -> Share:
    """Return this process's part of the work."""
    return Share(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """Barrier: if any process raises inside the block, all raise.

    The processes that had no error themselves raise UserError. Nothing in the block may wait for
    the other processes, since one that raises has left it.
    """
    try:
        yield
    except Exception:
        # The other processes wait at the end of the block for this result.
        any_process(True)
        raise
    (has_failed,) = any_process(False)
    if has_failed:
        raise UserError(f"another process failed to {what}; see its message, then rerun")


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether any process has set it. Every process must call this."""
    if jax.process_count() == 1:
        return flags
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(0).tolist())


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """Return the sum of all processes' arrays, of equal shapes. Every process must call this."""
    if jax.process_count() == 1:
        return x
    # NumPy would sum small integers as 64 bits.
    return multihost_utils.process_allgather(x).sum(0, dtype=x.dtype)


def same_on_all_processes(text: str) -> bool:
    """Return whether every process has the same text. Every process must call this."""
    if jax.process_count() == 1:
        return True
    # Arrays in a collective must have equal shapes, which texts do not.
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    return bool((digests == digests[0]).all())
