"""A store in the memory of the devices, from which batches are gathered there.

The stream then yields row numbers instead of tokens: `RowNumbers` has the shards and chunks of the
store, so that order, position and batches are the same as without a resident store, to the bit.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from minsae_jax.activations.store import Store
from minsae_jax.activations.stream import Source
from minsae_jax.errors import UserError
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import DATA, batch_sharding, by_device, put_replicated
from minsae_jax.parallel.processes import any_process
from minsae_jax.parallel.shares import from_bits, to_bits

PIECE_TOKENS = 65_536  # copied to a device at a time
# Share of a device's free memory that a store may take; a step needs the rest.
MAX_SHARE = 0.6


class RowNumbers(Store):
    """A store that reads the number of each token instead of the token, as int32 of width 1."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32)

    def read_into(self, out: Int[np.ndarray, "tokens 1"], shard: int, start: int) -> None:
        first = self.shard_starts[shard] + start
        out[:, 0] = np.arange(first, first + len(out))


class ResidentStore:
    """A store on the devices of a mesh: split over `data`, repeated along `sweep`."""

    def __init__(self, mesh: Mesh, store: Store):
        """Load the store, a piece at a time."""
        self.mesh = mesh
        self.row_numbers = RowNumbers(
            store.folder, store.shards, d_model=1, dtype_on_disk="", manifest=store.manifest
        )
        self.rows_per_device = -(-store.total_tokens // mesh.shape[DATA])
        self.tokens = _load(mesh, store, self.rows_per_device)
        self._gather = jax.jit(self._traced_gather, static_argnames="batches")

    def gather(
        self, rows: Int[np.ndarray, "*batches tokens"], n_padded: int
    ) -> Float[Array, "*batches n_padded d_model"]:
        """Return tokens of the store as a batch, or several, with zeros after the last token.

        n_padded: rows of a batch, a multiple of the devices along `data`.
        """
        padded = np.full((*rows.shape[:-1], n_padded), -1, np.int32)
        padded[..., : rows.shape[-1]] = rows
        parts = by_device(self.mesh, padded[..., None])
        on_devices = put_replicated(self.mesh, parts.ravel())
        return self._gather(self.tokens, on_devices, batches=rows.shape[:-1])

    def _traced_gather(
        self, tokens: Float[Array, "rows d_model"], rows: Int[Array, " n"], batches: tuple[int, ...]
    ) -> Float[Array, "*batches n_padded d_model"]:
        def on_one_device(tokens: Array, rows: Array) -> Array:
            place = rows - jax.lax.axis_index(DATA) * self.rows_per_device
            # Row -1 is nowhere.
            is_here = (rows >= 0) & (place >= 0) & (place < self.rows_per_device)
            values = tokens[jnp.clip(place, 0, self.rows_per_device - 1)]
            # Exactly one device has each row.
            bits = to_bits(values)
            bits = jnp.where(is_here[:, None], bits, jnp.zeros_like(bits))
            x = from_bits(jax.lax.psum_scatter(bits, DATA, tiled=True), values.dtype)
            return x.reshape(*batches, -1, x.shape[1])

        run = jax.shard_map(
            on_one_device,
            mesh=self.mesh,
            in_specs=(P(DATA), P()),
            out_specs=batch_sharding(self.mesh, len(batches)).spec,
            check_vma=False,
        )
        return run(tokens, rows)


def open_resident(
    setting: Literal["auto", "on", "off"], mesh: Mesh, source: Source
) -> ResidentStore | None:
    """Return the store on the devices, or None if batches are to be streamed from the host.

    "auto" loads it if it fits into the free memory of every device. CPU devices have none of their
    own, so that a store is streamed there. Raises UserError if it must be loaded but does not fit.
    """
    if setting == "off" or not isinstance(source, Store):
        return None
    bytes_per_token = source.d_model * source.dtype.itemsize
    n_bytes = source.total_tokens * bytes_per_token / mesh.shape[DATA]
    free = _free_bytes(mesh)
    if setting == "on":
        limit = math.inf if free is None else free
    else:
        limit = 0 if free is None else MAX_SHARE * free
    # Numbers of rows are int32. In a cluster, all processes stream or none.
    (is_too_large,) = any_process(n_bytes >= limit or source.total_tokens >= 2**31)
    if not is_too_large:
        return ResidentStore(mesh, source)
    if setting == "on":
        available = "" if free is None else f", but {free / 2**30:.1f} GB are free"
        raise UserError(
            f"--resident on needs {n_bytes / 2**30:.1f} GB on each device for {source.folder}"
            f"{available}; use more devices, or --resident off"
        )
    return None


def _free_bytes(mesh: Mesh) -> int | None:
    """Return the free memory of the fullest of this process's devices, None for CPUs."""
    free = []
    for device in mesh.local_devices:
        statistics = device.memory_stats()
        if not statistics or "bytes_limit" not in statistics:
            return None
        free.append(statistics["bytes_limit"] - statistics["bytes_in_use"])
    return min(free)


def _load(mesh: Mesh, store: Store, rows_per_device: int) -> Float[Array, "rows d_model"]:
    """Return all tokens, split over `data`, with zeros after the last token.

    The host has one piece at a time in its memory.
    """
    sharding = batch_sharding(mesh)
    shape = (rows_per_device * mesh.shape[DATA], store.d_model)
    # First row -> the devices along `sweep` that need the rows from there, which are read once.
    devices_by_start: dict[int, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        devices_by_start.setdefault(index[0].start or 0, []).append(device)
    n_rows = len(devices_by_start) * rows_per_device
    arrays = []
    with progress("load the store", n_rows, "tokens", delay=2.0) as bar:
        for start, devices in devices_by_start.items():
            stop = min(start + rows_per_device, store.total_tokens)
            shape_on_device = (rows_per_device, store.d_model)
            buffers = [jnp.zeros(shape_on_device, store.dtype, device=d) for d in devices]
            for first in range(start, stop, PIECE_TOKENS):
                piece = store.read_rows(first, min(first + PIECE_TOKENS, stop))
                for i, device in enumerate(devices):
                    on_device = jax.device_put(piece, SingleDeviceSharding(device))
                    buffers[i] = _write_rows(buffers[i], on_device, np.int32(first - start))
                bar.advance(len(piece))
            arrays += buffers
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


# The buffer is donated, so that there is one copy of it.
@partial(jax.jit, donate_argnums=0)
def _write_rows(
    buffer: Float[Array, "rows d_model"], piece: Float[Array, "n d_model"], first: Int[Array, ""]
) -> Float[Array, "rows d_model"]:
    return jax.lax.dynamic_update_slice_in_dim(buffer, piece, first, axis=0)
