"""Batches to the devices and back."""

import numpy as np
import pytest

from minsae_jax.parallel.mesh import fetch_batch, make_mesh, put_batch


@pytest.mark.parametrize("copy_bytes", [None, 1, 100, 1 << 20])
@pytest.mark.parametrize("n_rows", [1, 8, 21, 40])
def test_fetched_batch_equals_the_one_put(n_rows, copy_bytes):
    x = np.random.default_rng(0).normal(size=(n_rows, 3, 5)).astype(np.float32)
    on_devices = put_batch(make_mesh(), x, multiple=2)
    assert len(on_devices) % 16 == 0
    parts = fetch_batch(on_devices, n_rows, copy_bytes)
    assert all(len(part) > 0 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), x)


def test_large_rows_are_copied_in_parts():
    x = np.zeros((8 * 4, 25), np.float32)  # 4 rows of 100 bytes per device
    parts = fetch_batch(put_batch(make_mesh(), x), len(x), copy_bytes=250)
    assert [len(part) for part in parts] == [2] * 16
