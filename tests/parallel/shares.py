"""One process of a cluster: batches that processes share are those of a single process.

    python -m tests.parallel.shares STORE --distributed

`tests/parallel/test_shares.py` runs it in two processes. For every mesh of their devices, it
compares the rows on each device of this process, to the bit, with the batches of a stream that
reads everything.
"""

import sys

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import shuffled_tokens
from minsae_jax.parallel.mesh import DATA, make_mesh
from minsae_jax.parallel.processes import process_share, start_jax
from minsae_jax.parallel.shares import put_shares
from minsae_jax.sae.resident import ResidentStore

BATCH = 31  # tokens, which no mesh divides


def assert_rows(batch, expected: np.ndarray) -> None:
    """Compare the rows on this process's devices; rows after the expected ones are padding.

    batch: on the devices, one or several; expected: [*batches, rows, width].
    """
    padded = np.zeros(batch.shape, expected.dtype)
    padded[..., : expected.shape[-2], :] = expected
    for shard in batch.addressable_shards:
        actual = np.asarray(shard.data)
        assert actual.dtype == expected.dtype
        assert actual.tobytes() == padded[shard.index].tobytes(), shard.index


def check_streams(mesh: Mesh, folder: str) -> None:
    """Compare more than two epochs, in shares and gathered from a resident store."""
    store = open_store(folder)
    whole = shuffled_tokens(store, BATCH, 0)
    share = shuffled_tokens(store, BATCH, 0, process_share())
    resident = ResidentStore(mesh, store)
    numbers = shuffled_tokens(resident.row_numbers, BATCH, 0)
    n_padded = BATCH + -BATCH % mesh.shape[DATA]
    n_zeros = 0
    for _ in range(5):
        expected, own, rows = (
            np.stack([next(stream) for _ in range(5)]) for stream in (whole, share, numbers)
        )
        n_zeros += (own == 0).all(2).sum()
        # One batch, then all five at once.
        for i in (0, slice(None)):
            assert_rows(put_shares(mesh, own[i], multiple=2), expected[i])
            assert_rows(resident.gather(rows[i, ..., 0], n_padded), expected[i])
    assert 0 < n_zeros < 25 * BATCH


def check_bits(mesh: Mesh) -> None:
    """All 16-bit patterns, among them -0, subnormal numbers, infinity and NaN."""
    rows = np.arange(2**16, dtype=np.uint16).reshape(-1, 16)
    first, end = process_share().bounds(len(rows))
    own = np.zeros_like(rows)
    own[first:end] = rows[first:end]
    for dtype in (ml_dtypes.bfloat16, np.float16):
        assert_rows(put_shares(mesh, own.view(dtype)), rows.view(dtype))


def main() -> None:
    start_jax(distributed=True)
    n_devices = jax.device_count()
    for n_sweep in range(1, n_devices + 1):
        if n_devices % n_sweep:
            continue
        mesh = make_mesh(shape=f"{n_sweep}x{n_devices // n_sweep}")
        check_streams(mesh, sys.argv[1])
        check_bits(mesh)
    print("equal")


if __name__ == "__main__":
    main()
