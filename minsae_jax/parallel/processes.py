"""Start-up of JAX, alone or in a cluster of processes, and what the processes do together."""

import contextlib
import hashlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from minsae_jax.errors import UserError, brief

MAX_CPU_DEVICES = 8  # each holds the weights whole, and adds up gradients with all others


def start_jax(deterministic: bool = False, distributed: bool = False) -> None:
    """Set up JAX; to be called before anything touches a device.

    distributed: with the other processes of a cluster. JAX knows Slurm, Open MPI and Kubernetes; elsewhere the
    environment says JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    On CPU a core becomes a device, up to eight: XLA uses cores better with work split over devices than within one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = flags = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if (
        "xla_force_host_platform_device_count" not in flags
        and "JAX_NUM_CPU_DEVICES" not in os.environ
    ):
        with contextlib.suppress(
            RuntimeError
        ):  # JAX was used before in this process: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, MAX_CPU_DEVICES))
    if distributed:
        _join_cluster()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"JAX finds no device to run on ({brief(e)})") from e


def _join_cluster() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = (os.environ.get(name) or None for name in names)
    jax.config.update("jax_enable_preemption_service", False)  # which keeps SIGTERM to itself
    try:
        jax.distributed.initialize(
            address, int(count) if count else None, int(number) if number else None
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--distributed finds no cluster ({brief(e)}): start it under Slurm, or set "
            f"{', '.join(names)}"
        ) from e
    # The first meeting sets up the connections, and waits for half a minute only.
    multihost_utils.sync_global_devices("start")


def process_index() -> int:
    """This process's number among those that share the work; 0 tidies up."""
    return jax.process_index()


def process_count() -> int:
    return jax.process_count()


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """All processes go through this, and leave it together; an error in one is an error in all. Raises UserError in
    those that had none."""
    try:
        yield
    except Exception:
        _all_well(False)
        raise
    if not _all_well(True):
        raise UserError(
            f"another process failed ({what}), and says why: give the same command again"
        )


def _all_well(well: bool) -> bool:
    """Whether every process says so, once all have."""
    return process_count() == 1 or bool(multihost_utils.process_allgather(np.array(well)).all())


def any_process(first: bool, second: bool) -> tuple[bool, bool]:
    """Each flag, or whether any process has it set. All processes go through this."""
    if process_count() == 1:
        return first, second
    flags = multihost_utils.process_allgather(np.array([first, second]))
    return bool(flags[:, 0].any()), bool(flags[:, 1].any())


def same_on_all_processes(text: str) -> bool:
    """Whether every process has this text. All go through this."""
    if process_count() == 1:
        return True
    digests = multihost_utils.process_allgather(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    )
    return bool((digests == digests[0]).all())
