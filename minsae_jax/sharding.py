"""The only place that knows of devices: the mesh, what is laid out along which of its axes, and start-up.

Members of a sweep lie along `sweep`, windows and tokens along `data`; weights are whole on every device of `data`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minsae_jax.config import UserError

SWEEP, DATA = "sweep", "data"
MAX_CPU_DEVICES = 8  # each holds the weights whole, and adds up gradients with all others


def start(deterministic: bool = False, distributed: bool = False) -> None:
    """Set up JAX; to be called before anything touches a device.

    distributed: with the other processes of a cluster. JAX knows Slurm, Open MPI and Kubernetes; elsewhere the
    environment says JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    On CPU a core becomes a device, up to eight: XLA uses cores better with work split over devices than within one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = flags = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # JAX was used before in this process: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, MAX_CPU_DEVICES))
    if distributed:
        _join_cluster()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"JAX finds no device to run on ({' '.join(str(e).split())[:200]})") from e


def _join_cluster() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = (os.environ.get(name) or None for name in names)
    jax.config.update("jax_enable_preemption_service", False)  # which keeps SIGTERM to itself
    try:
        jax.distributed.initialize(address, int(count) if count else None, int(number) if number else None)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--distributed finds no cluster ({' '.join(str(e).split())[:200]}): start it under Slurm, or set "
            f"{', '.join(names)}"
        ) from e
    # The first meeting sets up the connections, and waits for half a minute only.
    multihost_utils.sync_global_devices("start")


def make_mesh(*group_sizes: int) -> Mesh:
    """All devices, as many as possible along `sweep` (where they need not talk), given the numbers of members that
    have to divide evenly; the rest along `data`. Without members, all along `data`."""
    devices = np.array(jax.devices())
    sweep = math.gcd(len(devices), *group_sizes) if group_sizes else 1
    return Mesh(devices.reshape(sweep, -1), (SWEEP, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


def make_local_mesh() -> Mesh:
    """This process's own devices along `data`, for work that processes share without talking."""
    devices = np.array(jax.local_devices()).reshape(1, -1)
    return Mesh(devices, (SWEEP, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


def process() -> int:
    """This process's number among those that share the work; 0 tidies up."""
    return jax.process_index()


def process_count() -> int:
    return jax.process_count()


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All processes go through this, and leave it together; an error in one is an error in all. Raises UserError in
    those that had none."""
    try:
        yield
    except Exception:
        _all_well(False)
        raise
    if not _all_well(True):
        raise UserError(f"another process failed ({what}), and says why: give the same command again")


def _all_well(well: bool) -> bool:
    """Whether every process says so, once all have."""
    return process_count() == 1 or bool(multihost_utils.process_allgather(np.array(well)).all())


def on_cpu() -> bool:
    """Whether work is best done in pieces that fit the cache, and members one after the other."""
    return jax.default_backend() == "cpu"


def has_fused_attention(dims: int) -> bool:
    """Whether cuDNN's attention, for half precision alone, takes queries and keys of this width."""
    return jax.default_backend() == "gpu" and dims % 8 == 0 and dims <= 128


def members(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the member."""
    return NamedSharding(mesh, P(SWEEP))


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is windows or tokens."""
    return NamedSharding(mesh, P(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Arrays that every device has whole."""
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, x: np.ndarray, multiple: int = 1) -> jax.Array:
    """Rows on the devices, padded with zeros at the end so that every device gets the same multiple of rows."""
    short = -len(x) % (mesh.shape[DATA] * multiple)
    if short:
        x = np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)])
    return jax.device_put(x, rows(mesh))


def host_pieces(x: jax.Array, n_rows: int) -> list[np.ndarray]:
    """The first n_rows rows on the host, a piece a device, in order; on CPU nothing is copied."""
    pieces = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    for piece in pieces:
        piece.data.copy_to_host_async()
    host, left = [], n_rows
    for piece in pieces:
        host.append(np.asarray(piece.data)[:left])
        left -= len(host[-1])
    return [piece for piece in host if len(piece)]


def on_rows(mesh: Mesh, function: Callable) -> Callable:
    """function(weights, rows) -> rows, on every device's own rows."""
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA), check_vma=False)


def on_members_and_rows(mesh: Mesh, function: Callable) -> Callable:
    """function(members, members, rows) -> (members, whole), on every device's own members and rows; it is function's
    business to add up over `data`."""
    specs = (P(SWEEP), P(SWEEP), P(DATA))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(SWEEP), P()), check_vma=False)
