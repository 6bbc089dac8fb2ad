"""Batches gathered from a store on the devices are those of the stream, to the bit."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import shuffled_tokens
from minsae_jax.parallel.mesh import make_mesh
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.resident import ResidentStore, open_resident
from minsae_jax.sae.trainer import train
from tests.interrupt import train_until


def results(run):
    """Return the bytes of all results of a run, by path."""
    names = ("*.csv", "sae.safetensors", "config.json")
    paths = [path for name in names for path in run.rglob(name)]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("shape", ["1x1", "1x8", "2x4", "8x1"])
def test_gathered_batches_are_the_streams(small_store, shape):
    store = open_store(small_store, -1)
    resident = ResidentStore(make_mesh(shape=shape), store)
    tokens = shuffled_tokens(store, 16, shuffle_seed=3)
    numbers = shuffled_tokens(resident.row_numbers, 16, shuffle_seed=3)
    for _ in range(20):
        expected = next(tokens)
        batch = np.asarray(resident.gather(next(numbers)[:, 0], n_padded=24))
        np.testing.assert_array_equal(batch[:16].view(np.uint32), expected.view(np.uint32))
        assert not batch[16:].any()


@pytest.mark.usefixtures("eight_devices")
def test_half_precision_keeps_its_bits(tmp_path):
    """All finite float16 numbers, among them -0 and subnormal ones."""
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)].reshape(-1, 1, 16)
    np.save(tmp_path / "b0000.npy", x)
    store = open_store(tmp_path)
    resident = ResidentStore(make_mesh(shape="1x8"), store)
    rows = np.random.default_rng(0).permutation(len(x)).astype(np.int32)
    batch = np.asarray(resident.gather(rows, n_padded=len(x)))
    np.testing.assert_array_equal(batch.view(np.uint16), x[rows, 0].view(np.uint16))


@pytest.mark.parametrize(
    ("recipe", "mesh"),
    [
        pytest.param("april2024", "2x4", marks=pytest.mark.slow),
        ("minsae", "1x1"),
        pytest.param("april2024", "1x1", marks=pytest.mark.slow),
        pytest.param("minsae", "2x4", marks=pytest.mark.slow),
    ],
)
def test_a_resident_run_gives_the_same_bytes_as_a_streamed_one(settings, tmp_path, recipe, mesh):
    if recipe == "minsae":
        settings = TrainConfig(
            recipe="minsae", store=settings.store, lambda_sparsity=(0.01, 0.1), num_steps=7
        )
    for resident in ("on", "off"):
        run_dir = str(tmp_path / resident)
        train(replace(settings, mesh=mesh, resident=resident, run_dir=run_dir))
    streamed = results(tmp_path / "off")
    assert len(streamed) > 4
    assert results(tmp_path / "on") == streamed


def test_a_streamed_run_resumes_with_a_resident_store(settings, tmp_path):
    whole = replace(settings, run_dir=str(tmp_path / "whole"))
    train(whole)
    resumed = replace(settings, run_dir=str(tmp_path / "resumed"))
    train_until(resumed, 5)
    train(replace(resumed, resident="on"))
    assert results(tmp_path / "resumed") == results(tmp_path / "whole")


def test_auto_streams_on_cpu_and_loads_what_fits(small_store, monkeypatch):
    store = open_store(small_store, -1)
    mesh = make_mesh(shape="1x1")
    assert open_resident("auto", mesh, store) is None
    n_bytes = store.total_tokens * store.d_model * 4
    device = type(jax.devices()[0])
    for free, is_loaded in ((10 * n_bytes, True), (1.1 * n_bytes, False)):
        statistics = {"bytes_limit": int(free) + 100, "bytes_in_use": 100}
        monkeypatch.setattr(device, "memory_stats", lambda _, s=statistics: s)
        assert (open_resident("auto", mesh, store) is not None) == is_loaded
        assert open_resident("on", mesh, store) is not None
    monkeypatch.setattr(device, "memory_stats", lambda _: {"bytes_limit": 100, "bytes_in_use": 0})
    with pytest.raises(UserError, match=r"--resident on needs .* GB are free; use more devices"):
        open_resident("on", mesh, store)


def test_live_activations_have_no_store_to_load():
    with pytest.raises(UserError, match="--resident on requires a store, not --live"):
        TrainConfig(store="x", live=True, root_path="y", checkpoint_path="z", resident="on")
