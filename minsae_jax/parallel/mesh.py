"""The device mesh and how arrays are laid out on it.

The mesh has two axes: members of a sweep are split over `sweep`, windows and tokens over `data`.
Weights are replicated along `data`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from minsae_jax.errors import UserError

T = TypeVar("T")

SWEEP = "sweep"
DATA = "data"
# Largest tile of a batch, in tokens: on CPU its features should fit the cache.
CPU_TILE_TOKENS = 256
# On an accelerator: features of all members of a tile, in float32 numbers (512 MB).
ACCELERATOR_TILE_FEATURES = 2**27


def make_mesh(*group_sizes: int, shape: str | None = None) -> Mesh:
    """Return a mesh (sweep, data) of `shape`, such as "4x2", or of all devices.

    Without a shape, as many devices as possible lie along `sweep`, where they need no
    communication, so that each has the same number of members of every group; the rest lie along
    `data`. group_sizes: members of each group; without groups all devices lie along `data`. Raises
    UserError if there are too few devices.
    """
    devices = np.array(jax.devices())
    if shape is None:
        # The largest number that divides the devices and the members of every group.
        n_sweep = math.gcd(len(devices), *group_sizes) if group_sizes else 1
    else:
        n_sweep, n_data = map(int, shape.split("x"))
        n_needed = n_sweep * n_data
        if n_needed > len(devices):
            raise UserError(f"--mesh {shape} needs {n_needed} devices, got {len(devices)}")
        # Every process of a cluster must take part.
        if n_needed < len(devices) and jax.process_count() > 1:
            raise UserError(f"--mesh {shape} must use all {len(devices)} devices of the cluster")
        devices = devices[:n_needed]
    return Mesh(devices.reshape(n_sweep, -1), (SWEEP, DATA), axis_types=(AxisType.Auto,) * 2)


def make_local_mesh() -> Mesh:
    """Return a mesh of this process's devices along `data`, for work without communication."""
    devices = np.array(jax.local_devices()).reshape(1, -1)
    return Mesh(devices, (SWEEP, DATA), axis_types=(AxisType.Auto,) * 2)


def on_cpu() -> bool:
    """Return whether to compute in small tiles that fit the cache, one member after the other."""
    return jax.default_backend() == "cpu"


def materialize(arrays: PyTree) -> PyTree:
    """Return arrays that an accelerator writes to memory before anything reads one of them.

    Without this barrier XLA for GPU computes an array again wherever it is used, from larger ones,
    leaves the sum over the parts of a product, a bias or an activation to further passes, or reads
    large arrays once for each result that one pass over them could give. Memory traffic limits the
    speed of a step, and of extraction.
    """
    return arrays if on_cpu() else jax.lax.optimization_barrier(arrays)


def sum_devices(values: PyTree) -> PyTree:
    """Return the sums over `data` of every leaf, each leaf after the one before it."""
    leaves, structure = jax.tree.flatten(values)
    sums: list[Array] = []
    for leaf in leaves:
        waiting = after(leaf, sums[-1]) if sums else leaf
        sums.append(jax.lax.psum(waiting, DATA))
    return jax.tree.unflatten(structure, sums)


def after(values: PyTree, done: Array) -> PyTree:
    """Return `values`, such that their sum over devices waits for `done`.

    JAX gives all sums of a `shard_map` the same channel, and XLA for CPU (jaxlib 0.10) starts a sum
    before an independent one is complete. It then adds numbers of one to the other, or reads beyond
    their memory. So on CPU each sum of a program must depend on the one before it.
    """
    if not on_cpu() or jax.lax.axis_size(DATA) == 1:
        return values
    # No result is ever the lowest number, but XLA does not know that.
    is_float = jnp.issubdtype(done.dtype, jnp.floating)
    lowest = jnp.finfo(done.dtype).min if is_float else jnp.iinfo(done.dtype).min
    never = done.ravel()[0] == lowest
    return jax.tree.map(lambda value: jnp.where(never, jnp.zeros_like(value), value), values)


def tile_batch(mesh: Mesh, n_tokens: int, n_features: int) -> tuple[int, int]:
    """Return (tiles, tokens in a tile) for one device's share of a batch.

    n_features: features of one token, summed over the members that a device computes at once.
    """
    share = -(-n_tokens // mesh.shape[DATA])
    if on_cpu():
        largest_tile = CPU_TILE_TOKENS
    else:
        largest_tile = max(CPU_TILE_TOKENS, ACCELERATOR_TILE_FEATURES // n_features)
    n_tiles = -(-share // largest_tile)
    # Tiles of equal size need the least padding.
    return n_tiles, -(-share // n_tiles)


def map_first_axis(function: Callable, *arrays: Any) -> Any:
    """Map over the first axis of all arrays: of members, windows or channels.

    vmap on accelerators. On CPU one after the other, since XLA's batched matrix products are slow
    there.
    """
    if on_cpu():
        return jax.lax.map(lambda each: function(*each), arrays)
    return jax.vmap(function)(*arrays)


def members_sharding(mesh: Mesh) -> NamedSharding:
    """Split the first axis, members, over `sweep`."""
    return NamedSharding(mesh, P(SWEEP))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split an axis, windows or tokens, over `data`."""
    return NamedSharding(mesh, P(*[None] * axis, DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Give every device the whole array."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, x: np.ndarray, multiple: int = 1, axis: int = 0) -> jax.Array:
    """Put a batch on the devices, zero-padded at the end; or several, whose rows are along `axis`.

    Every device of `data` gets the same number of rows, a multiple of `multiple`.
    """
    return _put(pad_axis(x, axis, mesh.shape[DATA] * multiple), batch_sharding(mesh, axis))


def put_replicated(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """Put the whole array, which every process has, on every device."""
    return _put(x, replicated(mesh))


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Every process has the whole array and puts the parts for its devices.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def by_device(mesh: Mesh, x: np.ndarray) -> np.ndarray:
    """Return for each device along `data` its rows of all batches, one batch after the other.

    x: [*batches, rows, width] with rows that the devices divide; the result is
    [devices, rows of a device, width].
    """
    n_data = mesh.shape[DATA]
    parts = x.reshape(-1, n_data, x.shape[-2] // n_data, x.shape[-1])
    return parts.swapaxes(0, 1).reshape(n_data, -1, x.shape[-1])


def pad_axis(x: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """Return x with zeros added at the end of an axis, up to a multiple of a length."""
    n_added = -x.shape[axis] % multiple
    # np.pad copies also where there is nothing to add.
    if n_added == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, n_added)
    return np.pad(x, widths)


def fetch_late(running: Iterable[T]) -> Iterator[T]:
    """Yield the results of calls on the host, each after the next call was started.

    So accelerators always have work. On CPU, where nothing is copied, results are yielded at once.
    running: yields the results of a call, in any structure.
    """
    n_late = 0 if on_cpu() else 1
    waiting: deque[T] = deque()
    for results in running:
        waiting.append(results)
        if len(waiting) > n_late:
            yield jax.device_get(waiting.popleft())
    yield from map(jax.device_get, waiting)


def start_fetch(x: jax.Array) -> jax.Array:
    """Start copying an array to the host, for `fetch_batch`.

    An accelerator copies into page-locked memory: on an H200 at 44 GB/s, against 1.4 GB/s into
    ordinary memory. Start this before the next computation, behind which the copy would have to
    wait. On CPU nothing is copied.
    """
    return x if on_cpu() else jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def fetch_batch(x: jax.Array, n_rows: int) -> list[np.ndarray]:
    """Fetch the first n_rows rows to the host, one array for each device, in order."""
    x = start_fetch(x)
    # On a single device the index is slice(None), without a start.
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    arrays = []
    n_missing = n_rows
    for shard in shards:
        array = np.asarray(shard.data)[:n_missing]
        n_missing -= len(array)
        if len(array):
            arrays.append(array)
    return arrays


def shard_over_batch(mesh: Mesh, function: Callable) -> Callable:
    """Run function(weights, batch) -> batch on every device's share of the batch."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA), check_vma=False
    )
