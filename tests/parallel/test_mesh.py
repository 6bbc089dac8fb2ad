"""Batches to the devices and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minsae_jax.parallel.mesh import fetch_batch, fetch_late, make_mesh, put_batch


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("n_rows", [1, 8, 21, 40])
def test_fetched_batch_equals_the_one_put(n_rows, backend, monkeypatch):
    """GPUs copy through page-locked memory, which the CPU backend has too."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = np.random.default_rng(0).normal(size=(n_rows, 3, 5)).astype(np.float32)
    on_devices = put_batch(make_mesh(), x, multiple=2)
    assert len(on_devices) % 16 == 0
    arrays = fetch_batch(on_devices, n_rows)
    assert all(len(array) > 0 for array in arrays)
    np.testing.assert_array_equal(np.concatenate(arrays), x)


@pytest.mark.parametrize(
    ("backend", "order"),
    [("cpu", "start 0 get 0 start 1 get 1"), ("gpu", "start 0 start 1 get 0 get 1")],
)
def test_results_are_fetched_after_the_next_call_was_started(backend, order, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    events = []

    def run():
        for i in range(2):
            events.append(f"start {i}")
            yield i, jnp.full(3, i)

    for i, x in fetch_late(run()):
        events.append(f"get {i}")
        assert isinstance(x, np.ndarray)
        assert x.tolist() == [i] * 3
    assert " ".join(events) == order
    assert list(fetch_late([])) == []
