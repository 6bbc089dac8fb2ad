"""The memory that a run needs, and its held-out tokens: choice, eval.csv, TensorBoard, resuming."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minsae_jax import UserError, load_sae
from minsae_jax.activations.imported import write_store
from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import ShuffleBuffers
from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.sae import logger
from minsae_jax.sae.data import measure_scale, physical_memory, sample_batches
from minsae_jax.sae.pareto import draw_pareto
from minsae_jax.sae.run import HELD_OUT_METRICS, read_held_out
from minsae_jax.sae.trainer import train
from tests.conftest import write_small_store
from tests.interrupt import train_until

MEMINFO = Path("/proc/meminfo")


def test_sweep_larger_than_the_memory_is_refused_before_the_folder_is_made(
    settings, tmp_path, monkeypatch
):
    settings = replace(settings, lambda_sparsity=(1.0,), lr=(1e-3,), feature_dim_factor=(2.0,))
    (d_model,) = {open_store(settings.store, -1).d_model}
    d_sae = 2 * d_model
    # W_enc, W_dec, b_enc and b_dec, each with two moments, in float32
    n_bytes = 12 * (2 * d_model * d_sae + d_sae + d_model)
    monkeypatch.setattr("minsae_jax.sae.data.physical_memory", lambda: n_bytes - 1)
    with pytest.raises(UserError, match=r"the weights and Adam's state of the sweep need"):
        train(settings)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("minsae_jax.sae.data.physical_memory", lambda: n_bytes)
    assert train(settings).members


@pytest.mark.skipif(not MEMINFO.exists(), reason="reads Linux's /proc")
def test_physical_memory_is_that_of_proc():
    kilobytes = int(MEMINFO.read_text().split()[1])
    assert physical_memory() == pytest.approx(1024 * kilobytes, rel=0.01)


@pytest.fixture
def val_store(tmp_path):
    return write_small_store(tmp_path / "store_val", seed=1)


def rows(run):
    with (run / "eval.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_held_out_metrics_equal_those_of_the_exported_member(
    settings, small_store, val_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(logger, "draw_pareto", draw_pareto)
    summary = train(replace(settings, eval_every=15)).summary()
    run = tmp_path / "run"
    found = rows(run)
    assert list(found[0]) == ["step", "tokens", "member", *HELD_OUT_METRICS]
    assert [int(r["step"]) for r in found] == [step for step in (15, 30, 40) for _ in range(4)]
    assert [int(r["tokens"]) for r in found[::4]] == [480, 960, 1280]
    x = np.concatenate([open_store(val_store, -1).read(i) for i in range(3)])
    for row in found[-4:]:
        sae = load_sae(run / "members" / row["member"])
        features = np.asarray(sae.encode(x))
        r, variance = np.asarray(sae.decode(features)) - x, ((x - x.mean(0)) ** 2).sum()
        assert float(row["fvu"]) == pytest.approx((r**2).sum() / variance, rel=1e-4)
        assert float(row["l0"]) == pytest.approx((features > 0).sum(1).mean(), rel=2e-3)
        assert f"{float(row['fvu']):.3f}" in summary
        config = json.loads((run / "members" / row["member"] / "config.json").read_text())
        assert config["held_out"] == {name: float(row[name]) for name in HELD_OUT_METRICS}
    board = EventAccumulator(str(run / "members" / found[0]["member"]))
    board.Reload()
    scalars = board.Scalars("eval/cosine")
    assert [s.step for s in scalars] == [15, 30, 40]
    assert scalars[-1].value == pytest.approx(float(found[-4]["cosine"]), rel=1e-6)
    assert (run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    of_run = EventAccumulator(str(run))
    of_run.Reload()
    steps = [image.step for image in of_run.Images("pareto")]
    assert steps[-1] == 40
    assert set(steps) <= {15, 30, 40}  # only at the end, unless this takes ten seconds
    assert "val FVU" in summary


def write_recordings(out, recordings, split):
    """A store of three recordings with a window each."""
    x = np.random.default_rng(0).normal(size=(3, 7, 16)).astype(np.float32)
    return write_store(
        out,
        x,
        encoder="mine",
        tokens=TokenGrid.patches(7, 10),
        seq_len=70,
        recordings=recordings,
        recording=[0, 1, 2],
        window=[0, 0, 0],
        split=split,
    )


def test_held_out_patients_in_the_train_store_are_a_warning(settings, tmp_path, recwarn):
    write_recordings(tmp_path / "mine", ["a_1.npy", "b_1.npy", "c_1.npy"], "train")
    write_recordings(tmp_path / "mine", ["d_1.npy", "e_1.npy", "f_1.npy"], "val")
    settings = replace(settings, store=str(tmp_path / "mine"), batch_size=8, num_steps=2)
    train(settings)
    assert not recwarn.list
    other = tmp_path / "other_seed"
    write_recordings(other, ["d_1.npy", "c_2.npy", "b_1.npy"], "val")
    settings = replace(settings, val_store=f"{other}_val", run_dir=str(tmp_path / "second"))
    message = r"2 of the 3 patients in .*other_seed_val.* train store \(such as b\)"
    with pytest.warns(UserWarning, match=message):
        train(settings)


def test_eval_every_0_measures_nothing(settings, small_store, val_store, tmp_path):
    assert "val FVU" not in train(replace(settings, eval_every=0)).summary()
    assert not (tmp_path / "run/eval.csv").exists()
    assert (tmp_path / "run/pareto.png").exists()  # of the last log interval


def test_held_out_tokens_are_the_same_each_time(val_store):
    store = open_store(val_store, -1)
    everything = [np.concatenate(list(sample_batches(store, n))) for n in (10**6, 105, 40)]
    assert [len(x) for x in everything] == [105, 105, 40]
    np.testing.assert_array_equal(everything[0], everything[1])
    np.testing.assert_array_equal(everything[0][:40], everything[2])
    assert len(np.unique(everything[0], axis=0)) == 105


def test_held_out_tokens_are_read_without_the_rest_of_the_store(tmp_path, monkeypatch):
    (tmp_path / "l-1").mkdir()
    for i in range(4):
        np.save(tmp_path / f"l-1/b{i:04d}.npy", np.ones((40, 7, 16), np.float32))
    monkeypatch.setattr("minsae_jax.activations.stream.SHUFFLE_BUFFER_TOKENS", 1)
    read = []

    def counted(buffers: ShuffleBuffers, i: int) -> np.ndarray:
        read.append(i)
        return get_buffer(buffers, i)

    get_buffer = ShuffleBuffers.__getitem__
    monkeypatch.setattr(ShuffleBuffers, "__getitem__", counted)
    store = open_store(tmp_path, -1)
    n_tokens = store.tokens_per_chunk + 1
    tokens = list(sample_batches(store, n_tokens))
    assert sum(map(len, tokens)) == n_tokens < store.total_tokens
    assert read == [0, 1]


def test_unfit_held_out_store_is_refused_or_ignored(settings, small_store, val_store, tmp_path):
    np.save(val_store / "l-1/b0000.npy", np.ones((5, 7, 8), np.float32))
    for i in (1, 2):
        (val_store / f"l-1/b000{i}.npy").unlink()
    with pytest.raises(
        UserError, match=r"--val_store .* has d_model 8, but the train store has 16"
    ):
        train(replace(settings, val_store=str(val_store)))
    with pytest.raises(UserError, match="there is no store"):
        train(replace(settings, val_store=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="no held-out metrics: .*store_val has d_model 8"):
        train(replace(settings, num_steps=8))
    assert not (tmp_path / "run/eval.csv").exists()


@pytest.mark.slow
def test_interrupted_measurement_is_written_once(settings, small_store, val_store, tmp_path):
    """A measurement after the last checkpoint is repeated, and its rows replaced."""
    settings = replace(settings, eval_every=7)
    train(settings)
    other = replace(settings, run_dir=str(tmp_path / "other"))
    train_until(other, 28)
    train(other)
    assert (tmp_path / "run/eval.csv").read_bytes() == (tmp_path / "other/eval.csv").read_bytes()
    assert read_held_out(tmp_path / "other").keys() == {r["member"] for r in rows(tmp_path / "run")}


def test_changed_or_missing_held_out_store_is_refused(settings, small_store, val_store, tmp_path):
    train_until(settings, 20)
    val_store.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="the held-out store has changed since"):
        train(settings)
    write_small_store(val_store, seed=1)
    np.save(val_store / "l-1/b0003.npy", np.zeros((1, 7, 16), np.float32))
    with pytest.raises(UserError, match="the held-out store has changed since"):
        train(settings)
    (val_store / "l-1/b0003.npy").unlink()
    train(settings)


def test_held_out_metrics_survive_a_damaged_eval_csv(settings, small_store, val_store, tmp_path):
    """Interrupted between the last checkpoint and the export; then eval.csv is damaged."""
    train_until(settings, 40)
    eval_csv = tmp_path / "run/eval.csv"
    measured = {r["member"]: float(r["fvu"]) for r in rows(tmp_path / "run")}
    eval_csv.write_bytes(eval_csv.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"sweep.csv or eval.csv in .* is damaged"):
        train(settings)
    for name, fvu in measured.items():
        config = json.loads((tmp_path / "run/members" / name / "config.json").read_text())
        assert config["held_out"]["fvu"] == fvu


def test_unusable_held_out_tokens_are_refused(settings, small_store, val_store):
    x = np.load(val_store / "l-1/b0001.npy")
    x[2, 3, 4] = np.nan
    np.save(val_store / "l-1/b0001.npy", x)
    with pytest.raises(UserError, match="store_val/l-1 contains NaN"):
        train(settings)
    for i in (1, 2):
        (val_store / f"l-1/b000{i}.npy").unlink()
    np.save(val_store / "l-1/b0000.npy", np.ones((1, 1, 16), np.float32))
    with pytest.raises(UserError, match=r"--val_store .* contains a single token"):
        train(replace(settings, val_store=str(val_store), overwrite=True))


def test_links_have_siblings_by_name(settings, small_store, val_store, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/acts").symlink_to(small_store)
    (tmp_path / "links/acts_val").symlink_to(val_store)
    assert "val FVU" in train(replace(settings, store=str(tmp_path / "links/acts"))).summary()


def test_bad_activations_say_what_to_check(settings, small_store):
    x = np.load(small_store / "l-1/b0000.npy")
    x[0, 0, 0] = np.inf
    np.save(small_store / "l-1/b0000.npy", x)
    store = open_store(small_store, -1)
    with pytest.raises(UserError, match=r"the store .* extract it again"):
        measure_scale(settings.plan(), store)
    live = replace(settings, live=True, root_path="recordings")
    with pytest.raises(UserError, match="check that the recordings are in SD"):
        measure_scale(live.plan(), store)
