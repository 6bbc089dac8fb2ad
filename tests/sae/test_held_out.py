"""Held-out tokens while training: which store, which tokens, eval.csv, TensorBoard, the picture, interruption."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minsae_jax import UserError, load_sae
from minsae_jax.activations.shards import open_store
from minsae_jax.config import Train
from minsae_jax.sae.inputs import held_out_batches, sibling_store
from minsae_jax.sae.journal import Journal
from minsae_jax.sae.run import HELD_OUT, Run
from minsae_jax.sae.train import train
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
    everything = [np.concatenate(list(held_out_batches(Train(eval_tokens=n), store))) for n in (10**6, 105, 40)]
    assert [len(x) for x in everything] == [105, 105, 40]
    np.testing.assert_array_equal(everything[0], everything[1])
    np.testing.assert_array_equal(everything[0][:40], everything[2])
    assert len(np.unique(everything[0], axis=0)) == 105


@pytest.mark.parametrize(
    ("store", "sibling"),
    [("embeddings/store", "embeddings/store_val"), ("a/mine/", "a/mine_val"), ("a/mine/l-1", "a/mine_val/l-1"),
     ("a/l2/l0", "a/l2_val/l0"), ("a/layers", "a/layers_val")],
)  # fmt: skip
def test_the_sibling(tmp_path, monkeypatch, store, sibling):
    monkeypatch.chdir(tmp_path)
    assert sibling_store(tmp_path / store) == tmp_path.resolve() / sibling


def test_a_store_of_another_kind(settings, small_store, val_store, tmp_path):
    np.save(val_store / "l-1/b0000.npy", np.ones((5, 7, 8), np.float32))
    for i in (1, 2):
        (val_store / f"l-1/b000{i}.npy").unlink()
    with pytest.raises(UserError, match=r"--val_store .* is of d_model 8, but the train store of 16"):
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
