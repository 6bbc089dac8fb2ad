"""The only place that knows of devices: the mesh, what is laid out along which of its axes, and start-up.

Members of a sweep lie along `sweep`, windows and tokens along `data`; weights are whole on every device of `data`.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minsae_jax.config import UserError

SWEEP, DATA = "sweep", "data"
MAX_CPU_DEVICES = 8  # each holds the weights whole, and adds up gradients with all others
CPU_PIECE = 256  # tokens at a time, so that their features fit the cache
PIECE_NUMBERS = 2**27  # features of all members at a time on an accelerator: 512 MB


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


def make_mesh(*group_sizes: int, shape: str | None = None) -> Mesh:
    """Devices along `sweep` and `data`: as many as `shape` says, "4x2" say, or all.

    Without a shape as many as possible are along `sweep`, where they need not talk, such that each has as many members
    of every group (their numbers are given) as the others; the rest along `data`. Without groups, all along `data`.
    """
    devices = np.array(jax.devices())
    if shape:
        sweep, data = map(int, shape.split("x"))
        fits = sweep * data <= len(devices) if process_count() == 1 else sweep * data == len(devices)
        if not fits:
            raise UserError(f"--mesh {shape} is of {sweep * data} devices, but there are {len(devices)}")
        devices = devices[: sweep * data]
    else:
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


def any_of(first: bool, second: bool) -> tuple[bool, bool]:
    """Each flag, or whether any process has it set. All processes go through this."""
    if process_count() == 1:
        return first, second
    flags = multihost_utils.process_allgather(np.array([first, second]))
    return bool(flags[:, 0].any()), bool(flags[:, 1].any())


def is_same_everywhere(text: str) -> bool:
    """Whether every process has this text. All go through this."""
    if process_count() == 1:
        return True
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    return bool((digests == digests[0]).all())


def on_cpu() -> bool:
    """Whether work is best done in pieces that fit the cache, and members one after the other."""
    return jax.default_backend() == "cpu"


def pieces(mesh: Mesh, tokens: int, features: int) -> tuple[int, int]:
    """Into how many pieces of how many tokens each device of `data` cuts its share of a batch, a token having so many
    features for all members that are computed at once."""
    share = -(-tokens // mesh.shape[DATA])
    most = CPU_PIECE if on_cpu() else max(CPU_PIECE, PIECE_NUMBERS // features)
    count = -(-share // most)
    return count, -(-share // count)


def each_member(function: Callable, *members: Any) -> Any:
    """function over the leading axis: on CPU one member after the other, since batched products are slow there."""
    if on_cpu():
        return jax.lax.map(lambda member: function(*member), members)
    return jax.vmap(function)(*members)


@lru_cache
def product_flops(mesh: Mesh, dtype: str) -> float:
    """Flops a second of a large matrix product on each of the mesh's devices at once, all together: their limit."""
    size = 1024 if on_cpu() else 8192
    x = jax.jit(
        lambda: jnp.ones((mesh.size * size, size), dtype), out_shardings=NamedSharding(mesh, P((SWEEP, DATA)))
    )()

    def square(a: jax.Array) -> jax.Array:
        return jnp.matmul(a, a, precision="highest", preferred_element_type=jnp.float32)

    spec = P((SWEEP, DATA))
    product = jax.jit(jax.shard_map(square, mesh=mesh, in_specs=spec, out_specs=spec))
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 * mesh.size / min(seconds)


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
    if rows(mesh).is_fully_addressable:
        return jax.device_put(x, rows(mesh))
    return jax.make_array_from_callback(x.shape, rows(mesh), lambda index: x[index])


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
    """function(members, rows) -> (members, whole), on every device's own members and rows; it is function's business
    to add up over `data`."""
    specs = (P(SWEEP), P(DATA))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(SWEEP), P()), check_vma=False)
