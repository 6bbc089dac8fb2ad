"""Batches of which each process of a cluster has read a share, put on the devices of all."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from minsae_jax.parallel.mesh import (
    DATA,
    batch_sharding,
    by_device,
    pad_axis,
    put_batch,
)
from minsae_jax.parallel.processes import sum_over_processes


def put_shares(mesh: Mesh, x: np.ndarray, multiple: int = 1) -> jax.Array:
    """Put a batch of which each process has some rows, and zeros for the others, on the devices.

    The result is that of `put_batch` for the whole batch, or for several, to the bit.
    x: [*batches, rows, width]. Every process of a cluster must call this.
    """
    axis = x.ndim - 2
    if batch_sharding(mesh).is_fully_addressable:
        return put_batch(mesh, x, multiple, axis)
    blocks = _process_blocks(mesh)
    if blocks is None:
        bits_dtype = np.dtype(f"u{x.dtype.itemsize}")
        whole = sum_over_processes(x.view(bits_dtype)).view(x.dtype)
        return put_batch(mesh, whole, multiple, axis)
    x = pad_axis(x, axis, mesh.shape[DATA] * multiple)
    # Each device of a process gets an equal part of the rows that it adds for the devices at its
    # place along `data`; parts of devices along `sweep`, which need the same rows, differ. The axes
    # are the places of this block along `sweep` and `data`, then the block along `data` that needs
    # the rows, the device in it, and the part of that device's rows.
    parts = by_device(mesh, x)
    share = parts.shape[1]
    parts = pad_axis(parts, 1, blocks.shape["in_sweep"])
    shape = (blocks.shape["data"], blocks.shape["in_data"], blocks.shape["in_sweep"], -1)
    parts = parts.reshape(1, 1, *shape, x.shape[-1])
    spec = P("sweep", "data", None, "in_data", "in_sweep")
    summands = jax.make_array_from_process_local_data(NamedSharding(blocks, spec), parts)
    return _add_shares(mesh, blocks, spec, share, x.shape[:-2])(summands)


@lru_cache
def _process_blocks(mesh: Mesh) -> Mesh | None:
    """Return the mesh with four axes: blocks of the devices of a process, and devices in a block.

    Returns None if the devices of the processes are not equal blocks.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    # The size of a block, if all are like that of the first device's process.
    in_sweep = int((owners[:, 0] == owners[0, 0]).sum())
    in_data = int((owners[0] == owners[0, 0]).sum())
    n_sweep, n_data = owners.shape
    if n_sweep % in_sweep or n_data % in_data:
        return None
    shape = (n_sweep // in_sweep, in_sweep, n_data // in_data, in_data)
    of_blocks = owners.reshape(shape)
    first_owners = of_blocks[:, :1, :, :1]
    is_of_one_process = (of_blocks == first_owners).all()
    has_one_block_each = len(np.unique(first_owners)) == first_owners.size
    if not (is_of_one_process and has_one_block_each):
        return None
    names = ("sweep", "in_sweep", "data", "in_data")
    return Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * 4)


@lru_cache
def _add_shares(
    mesh: Mesh, blocks: Mesh, spec: P, share: int, batches: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Return the compiled sum over processes.

    share: rows of a device in the result. batches: sizes of the axes before the rows.
    """
    axis = len(batches)

    def on_one_device(part: Array) -> Array:
        bits = to_bits(part.reshape(-1, part.shape[-1]))
        # Each block along `data` gets the sum of the rows that it needs.
        bits = jax.lax.psum_scatter(bits, "data", tiled=True)
        bits = jax.lax.psum(bits, "sweep")
        # From the parts of the devices along `sweep` of this block.
        bits = jax.lax.all_gather(bits, "in_sweep", tiled=True)
        x = from_bits(bits[:share], part.dtype)
        return x.reshape(*batches, -1, x.shape[1])

    sharded = jax.shard_map(
        on_one_device,
        mesh=blocks,
        in_specs=spec,
        out_specs=P(*[None] * axis, ("data", "in_data")),
        check_vma=False,
    )
    return jax.jit(sharded, out_shardings=batch_sharding(mesh, axis))


def to_bits(x: Array) -> Array:
    """Return the bits of x as uint32.

    The sum of arrays of which at most one is not 0 then has the bits of that one, be it -0 or NaN.
    GPUs have no sums of 16 bits over devices.
    """
    bits_dtype = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
    return jax.lax.bitcast_convert_type(x, bits_dtype).astype(jnp.uint32)


def from_bits(bits: Array, dtype: jnp.dtype) -> Array:
    """Undo `to_bits`."""
    bits_dtype = jnp.uint32 if dtype.itemsize == 4 else jnp.uint16
    return jax.lax.bitcast_convert_type(bits.astype(bits_dtype), dtype)
