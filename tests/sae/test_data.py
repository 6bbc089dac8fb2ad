"""Held-out tokens in training: choice of store and tokens, eval.csv, TensorBoard, resuming."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minsae_jax import UserError, load_sae
from minsae_jax.activations.store import open_store
from minsae_jax.sae.checkpoints import Checkpoints
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import held_out_batches
from minsae_jax.sae.logger import Journal
from minsae_jax.sae.run import HELD_OUT, Run
from minsae_jax.sae.trainer import train
from tests.conftest import write_small_store


@pytest.fixture
def val_store(tmp_path):
    return write_small_store(tmp_path / "store_val", seed=1)


def rows(run):
    with (run / "eval.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_what_is_measured(settings, small_store, val_store, tmp_path):
    told = train(replace(settings, eval_every=15))
    run = tmp_path / "run"
    found = rows(run)
    assert list(found[0]) == ["step", "tokens", "member", *HELD_OUT]
    assert [int(r["step"]) for r in found] == [step for step in (15, 30, 40) for _ in range(4)]
    assert [int(r["tokens"]) for r in found[::4]] == [480, 960, 1280]
    x = np.concatenate([open_store(val_store, -1).read(i) for i in range(3)])
    for row in found[-4:]:
        sae = load_sae(run / "members" / row["member"])
        features = np.asarray(sae.encode(x))
        r, variance = np.asarray(sae.decode(features)) - x, ((x - x.mean(0)) ** 2).sum()
        assert float(row["fvu"]) == pytest.approx((r**2).sum() / variance, rel=1e-4)
        assert float(row["l0"]) == pytest.approx((features > 0).sum(1).mean(), rel=2e-3)
        assert f"{float(row['fvu']):.3f}" in told
        config = json.loads((run / "members" / row["member"] / "config.json").read_text())
        assert config["held_out"] == {name: float(row[name]) for name in HELD_OUT}
    board = EventAccumulator(str(run / "members" / found[0]["member"]))
    board.Reload()
    scalars = board.Scalars("eval/cosine")
    assert [s.step for s in scalars] == [15, 30, 40]
    assert scalars[-1].value == pytest.approx(float(found[-4]["cosine"]), rel=1e-6)
    assert (run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    of_run = EventAccumulator(str(run))
    of_run.Reload()
    assert [image.step for image in of_run.Images("pareto")] == [15, 30, 40]
    assert "val FVU" in told


def test_nothing_is_held_out(settings, small_store, val_store, tmp_path):
    assert "val FVU" not in train(replace(settings, eval_every=0))
    assert not (tmp_path / "run/eval.csv").exists()
    assert (tmp_path / "run/pareto.png").exists()  # of the training's last window


def test_which_tokens(val_store):
    store = open_store(val_store, -1)
    everything = [
        np.concatenate(list(held_out_batches(TrainConfig(eval_tokens=n), store)))
        for n in (10**6, 105, 40)
    ]
    assert [len(x) for x in everything] == [105, 105, 40]
    np.testing.assert_array_equal(everything[0], everything[1])
    np.testing.assert_array_equal(everything[0][:40], everything[2])
    assert len(np.unique(everything[0], axis=0)) == 105


def test_a_store_of_another_kind(settings, small_store, val_store, tmp_path):
    np.save(val_store / "l-1/b0000.npy", np.ones((5, 7, 8), np.float32))
    for i in (1, 2):
        (val_store / f"l-1/b000{i}.npy").unlink()
    with pytest.raises(
        UserError, match=r"--val_store .* is of d_model 8, but the train store of 16"
    ):
        train(replace(settings, val_store=str(val_store)))
    with pytest.raises(UserError, match="there is no store"):
        train(replace(settings, val_store=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="nothing is held out: .*store_val is of d_model 8"):
        train(replace(settings, num_steps=8))
    assert not (tmp_path / "run/eval.csv").exists()


class Killed(Exception):
    pass


def test_interrupted_measurements(settings, small_store, val_store, tmp_path, monkeypatch):
    """Cut off after a measurement that no checkpoint has seen: it is made anew, and there once."""
    settings = replace(settings, eval_every=7)
    train(settings)
    held_out = Journal.held_out

    def dying(self, step, *args):
        held_out(self, step, *args)
        if step == 28:
            raise Killed

    other = replace(settings, run_dir=str(tmp_path / "other"))
    monkeypatch.setattr(Journal, "held_out", dying)
    with pytest.raises(Killed):
        train(other)
    monkeypatch.setattr(Journal, "held_out", held_out)
    train(other)
    assert (tmp_path / "run/eval.csv").read_bytes() == (tmp_path / "other/eval.csv").read_bytes()
    assert Run(other).read_held_out().keys() == {r["member"] for r in rows(tmp_path / "run")}


def cut_off(settings, monkeypatch, step=20):
    """A run that dies once its checkpoint of a step is written."""
    save = Checkpoints.save

    def dying(self, at, *args):
        save(self, at, *args)
        if at == step:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", dying)
    with pytest.raises(Killed):
        train(settings)
    monkeypatch.undo()


def test_a_held_out_store_that_changed_or_vanished(
    settings, small_store, val_store, tmp_path, monkeypatch
):
    cut_off(settings, monkeypatch)
    val_store.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"the held-out store is not the one that .* began with"):
        train(settings)
    write_small_store(val_store, seed=1)
    np.save(val_store / "l-1/b0003.npy", np.zeros((1, 7, 16), np.float32))
    with pytest.raises(UserError, match=r"the held-out store is not the one that .* began with"):
        train(settings)
    (val_store / "l-1/b0003.npy").unlink()
    train(settings)


def test_what_was_measured_outlives_a_damaged_table(
    settings, small_store, val_store, tmp_path, monkeypatch
):
    """Cut off between the last checkpoint and the exports, and then eval.csv is cut as well."""

    def dying(*_):
        raise Killed

    monkeypatch.setattr(Journal, "export", dying)
    with pytest.raises(Killed):
        train(settings)
    monkeypatch.undo()
    eval_csv = tmp_path / "run/eval.csv"
    measured = {r["member"]: float(r["fvu"]) for r in rows(tmp_path / "run")}
    eval_csv.write_bytes(eval_csv.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"sweep.csv or eval.csv in .* is damaged"):
        train(settings)
    for name, fvu in measured.items():
        config = json.loads((tmp_path / "run/members" / name / "config.json").read_text())
        assert config["held_out"]["fvu"] == fvu


def test_tokens_that_cannot_be_measured(settings, small_store, val_store):
    x = np.load(val_store / "l-1/b0001.npy")
    x[2, 3, 4] = np.nan
    np.save(val_store / "l-1/b0001.npy", x)
    with pytest.raises(UserError, match="store_val/l-1 holds NaN"):
        train(settings)
    for i in (1, 2):
        (val_store / f"l-1/b000{i}.npy").unlink()
    np.save(val_store / "l-1/b0000.npy", np.ones((1, 1, 16), np.float32))
    with pytest.raises(UserError, match=r"--val_store .* holds a single token"):
        train(replace(settings, val_store=str(val_store), overwrite=True))


def test_links_have_siblings_by_name(settings, small_store, val_store, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/acts").symlink_to(small_store)
    (tmp_path / "links/acts_val").symlink_to(val_store)
    assert "val FVU" in train(replace(settings, store=str(tmp_path / "links/acts")))


def test_a_frozen_member_is_measured_as_it_was(settings, small_store, val_store, tmp_path):
    sick = replace(
        settings, lambda_sparsity=(0.1,), lr=(3e-3, 1e30), feature_dim_factor=(2.0,), eval_every=20
    )
    with pytest.warns(UserWarning, match="diverged"):
        train(sick)
    found = [r for r in rows(tmp_path / "run") if r["member"].endswith("1e+30")]
    assert len({tuple(r[name] for name in HELD_OUT) for r in found}) == 1
    assert {r["dead_fraction"] for r in found} == {"nan"}
    config = json.loads((tmp_path / "run/members/lambda=0.1,lr=1e+30/config.json").read_text())
    assert config["held_out"]["dead_fraction"] is None
