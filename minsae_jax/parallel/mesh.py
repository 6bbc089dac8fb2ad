"""The device mesh, and what is laid out along which of its axes.

Members of a sweep lie along `sweep`, windows and tokens along `data`; weights are whole on every device of `data`.
"""

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minsae_jax.errors import UserError
from minsae_jax.parallel.processes import process_count

SWEEP, DATA = "sweep", "data"
CPU_PIECE = 256  # tokens at a time, so that their features fit the cache
# Bytes per copy from an accelerator to the host. One large copy runs at a tenth of the bus's speed:
# malloc maps memory of this size anew for each array, and the kernel clears it page by page, while
# arrays below glibc's largest mmap threshold (32 MB) reuse memory that was freed before.
COPY_BYTES = 8 << 20
PIECE_NUMBERS = 2**27  # features of all members at a time on an accelerator: 512 MB


def make_mesh(*group_sizes: int, shape: str | None = None) -> Mesh:
    """Devices along `sweep` and `data`: as many as `shape` says, "4x2" say, or all.

    Without a shape as many as possible are along `sweep`, where they need not talk, such that each has as many members
    of every group (their numbers are given) as the others; the rest along `data`. Without groups, all along `data`.
    """
    devices = np.array(jax.devices())
    if shape:
        sweep, data = map(int, shape.split("x"))
        fits = (
            sweep * data <= len(devices) if process_count() == 1 else sweep * data == len(devices)
        )
        if not fits:
            raise UserError(
                f"--mesh {shape} is of {sweep * data} devices, but there are {len(devices)}"
            )
        devices = devices[: sweep * data]
    else:
        sweep = math.gcd(len(devices), *group_sizes) if group_sizes else 1
    return Mesh(
        devices.reshape(sweep, -1), (SWEEP, DATA), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def make_local_mesh() -> Mesh:
    """This process's own devices along `data`, for work that processes share without talking."""
    devices = np.array(jax.local_devices()).reshape(1, -1)
    return Mesh(devices, (SWEEP, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


def on_cpu() -> bool:
    """Whether work is best done in pieces that fit the cache, and members one after the other."""
    return jax.default_backend() == "cpu"


def tile_batch(mesh: Mesh, tokens: int, features: int) -> tuple[int, int]:
    """Into how many pieces of how many tokens each device of `data` cuts its share of a batch, a token having so many
    features for all members that are computed at once."""
    share = -(-tokens // mesh.shape[DATA])
    most = CPU_PIECE if on_cpu() else max(CPU_PIECE, PIECE_NUMBERS // features)
    count = -(-share // most)
    return count, -(-share // count)


def map_members(function: Callable, *members: Any) -> Any:
    """function over the leading axis: on CPU one member after the other, since batched products are slow there."""
    if on_cpu():
        return jax.lax.map(lambda member: function(*member), members)
    return jax.vmap(function)(*members)


@lru_cache
def product_flops(mesh: Mesh, dtype: str) -> float:
    """Flops a second of a large matrix product on each of the mesh's devices at once, all together: their limit."""
    size = 1024 if on_cpu() else 8192
    x = jax.jit(
        lambda: jnp.ones((mesh.size * size, size), dtype),
        out_shardings=NamedSharding(mesh, P((SWEEP, DATA))),
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


def members_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the member."""
    return NamedSharding(mesh, P(SWEEP))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is windows or tokens."""
    return NamedSharding(mesh, P(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays that every device has whole."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, x: np.ndarray, multiple: int = 1) -> jax.Array:
    """Put rows on the devices of `data`.

    Zeros are appended so that every device gets the same number of rows, a multiple of `multiple`.
    """
    missing = -len(x) % (mesh.shape[DATA] * multiple)
    if missing:
        x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def fetch_batch(x: jax.Array, n_rows: int, copy_bytes: int | None = None) -> list[np.ndarray]:
    """Copy the first n_rows rows to the host; returns consecutive parts, in order.

    On CPU nothing is copied. copy_bytes: size of one copy, by default one copy per device on CPU
    and COPY_BYTES on accelerators.
    """
    if copy_bytes is None and not on_cpu():
        copy_bytes = COPY_BYTES
    parts = []
    for shard in sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0):
        start = shard.index[0].start or 0
        n_wanted = min(len(shard.data), n_rows - start)
        if n_wanted > 0:
            parts += _copy_in_parts(shard.data, n_wanted, copy_bytes)
    for part, _ in parts:
        part.copy_to_host_async()
    return [np.asarray(part)[:n] for part, n in parts]


def _copy_in_parts(
    x: jax.Array, n_rows: int, copy_bytes: int | None
) -> list[tuple[jax.Array, int]]:
    """Return consecutive slices of one device's rows, and how many of their rows are needed."""
    if copy_bytes is None:
        return [(x, n_rows)]
    step = max(1, copy_bytes // (x.nbytes // len(x)))
    slices = []
    for start in range(0, n_rows, step):
        stop = min(start + step, len(x))
        slices.append((jax.lax.slice_in_dim(x, start, stop), min(stop, n_rows) - start))
    return slices


def shard_over_batch(mesh: Mesh, function: Callable) -> Callable:
    """function(weights, rows) -> rows, on every device's own rows."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA), check_vma=False
    )


def shard_over_members_and_batch(mesh: Mesh, function: Callable) -> Callable:
    """function(members, rows) -> (members, whole), on every device's own members and rows; it is function's business
    to add up over `data`."""
    specs = (P(SWEEP), P(DATA))
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=(P(SWEEP), P()), check_vma=False
    )
