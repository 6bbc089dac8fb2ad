"""A member that diverges is frozen, and leaves the others as they are."""

import csv
import json
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from minsae_jax.sae import step
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.kinds.topk import TopK
from minsae_jax.sae.run import HELD_OUT_METRICS
from minsae_jax.sae.sweep import Sweep
from minsae_jax.sae.trainer import train
from tests.conftest import write_small_store
from tests.interrupt import train_until
from tests.sae.runs import files, table


def test_diverged_member_is_frozen_and_the_others_are_unchanged(settings, tmp_path):
    """It is marked; the others are, to the bit, as beside a healthy one."""
    write_small_store(tmp_path / "store_val", seed=1)
    both = replace(settings, lambda_sparsity=(0.1,), feature_dim_factor=(2.0,), eval_every=20)
    with pytest.warns(
        UserWarning, match=r"lambda=0.1,lr=1e\+30 diverged at step 2 .*the other members continue"
    ) as seen:
        train(replace(both, lr=(3e-3, 1e30)))
    assert len(seen) == 1
    train(replace(both, lr=(3e-3, 1e-3), run_dir=str(tmp_path / "healthy")))
    names = ("metrics.csv", "act_freqs.csv", "sae.safetensors")
    one, two = (
        files(tmp_path / r / "members/lambda=0.1,lr=0.003", *names) for r in ("run", "healthy")
    )
    assert one == two

    with (tmp_path / "run/sweep.csv").open() as f:
        rows = {row["member"]: row for row in csv.DictReader(f)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "lambda=0.1,lr=0.003": "finished", "lambda=0.1,lr=1e+30": "diverged",
    }  # fmt: skip
    assert rows["lambda=0.1,lr=1e+30"]["loss"] == "nan"
    sick = tmp_path / "run/members/lambda=0.1,lr=1e+30"
    config = json.loads((sick / "config.json").read_text())
    assert config["diverged_at_step"] == 2
    assert config["held_out"]["dead_fraction"] is None
    with (tmp_path / "run/eval.csv").open() as f:
        held_out = [row for row in csv.DictReader(f) if row["member"] == sick.name]
    assert len(held_out) == 2
    assert len({tuple(row[name] for name in HELD_OUT_METRICS) for row in held_out}) == 1
    assert {row["dead_fraction"] for row in held_out} == {"nan"}
    assert np.isnan(table(sick / "metrics.csv")["mse"]).all()
    assert all(np.isfinite(v).all() for v in load_file(sick / "sae.safetensors").values())


def test_summary_names_members_that_explain_nothing(settings):
    """Those that diverged are named when they do."""
    settings = replace(settings, lambda_sparsity=(0.1,), feature_dim_factor=(2.0,))
    assert "warning" not in train(settings).summary()
    with pytest.warns(UserWarning, match="diverged"):
        run = train(replace(settings, lr=(3e-3, 1.0, 1e30), run_dir=settings.run_dir + "2"))
    assert run.metrics["lambda=0.1,lr=1"]["fvu"] > 1
    told = " ".join(run.summary().split())
    assert re.search(r"warning: FVU is 1 or more, .*, for lambda=0.1,lr=1 \(\S+\); try", told)


def test_frozen_member_keeps_its_state(settings, monkeypatch):
    """Its state before the step that it could not make, optimizer and counts too."""
    small = replace(settings, lambda_sparsity=(0.1,), lr=(3e-3, 1e30), feature_dim_factor=(2.0,))
    sweep = Sweep(small.plan(), make_groups(small.plan(), 16), 16)
    states, state, rng = [], sweep.init(), np.random.default_rng(0)
    for _ in range(4):
        x = rng.normal(size=(32, 16)).astype(np.float32)
        state, _ = sweep.step(state, sweep.hyper, sweep.put(x), np.float32(1), n_tokens=32)
        states.append(jax.device_get(state.groups[0]))
    after_one, last = states[0], states[-1]
    assert last.frozen.tolist() == [False, True]
    assert last.steps.tolist() == [4, 1]
    for name in ("params", "opt_state", "tokens_since_fired", "metrics"):
        for before, now in zip(
            jax.tree.leaves(getattr(after_one, name)),
            jax.tree.leaves(getattr(last, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(before[1], now[1])
            assert name == "tokens_since_fired" or (before[0] != now[0]).any()


@dataclass(frozen=True)
class CountsDead(TopK):
    """Stores how many dead features AuxK trains in b_dec."""

    def finish_update(self, params, context):
        return params | {"b_dec": jnp.full_like(params["b_dec"], context.n_dead)}


def test_dead_features_of_a_frozen_member_are_not_trained(settings, monkeypatch):
    """Nor do they slow the others down: accelerators compute AuxK for all members or none."""
    monkeypatch.setattr(step, "on_cpu", lambda: False)
    topk = replace(settings, kind=("topk",), lambda_sparsity=(), k=(2.0,), lr=(1e-3, 2e-3))
    plan = replace(topk, feature_dim_factor=(2.0,), mesh="1x1").plan()
    (group,) = make_groups(plan, 16)
    sweep = Sweep(plan, (tuple(replace(member, kind=CountsDead()) for member in group),), 16)
    state = sweep.init()
    dead = np.zeros((2, 32), np.int32)
    dead[0, :3] = plan.aux_dead_after
    dead[1, :9] = plan.aux_dead_after
    members = state.groups[0]._replace(tokens_since_fired=dead, frozen=np.array([False, True]))
    x = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    state, _ = sweep.step(
        state._replace(groups=(members,)), sweep.hyper, sweep.put(x), np.float32(1), n_tokens=32
    )
    assert set(np.asarray(state.groups[0].params["b_dec"][0])) == {3}


def test_divergence_is_remembered_after_a_resume(settings, tmp_path):
    diverging = replace(
        settings, lambda_sparsity=(0.1,), lr=(3e-3, 1e30), feature_dim_factor=(2.0,)
    )
    with pytest.warns(UserWarning, match="diverged"):
        train_until(diverging, 24)
    train(diverging)  # does not warn again
    config = json.loads((tmp_path / "run/members/lambda=0.1,lr=1e+30/config.json").read_text())
    assert (config["status"], config["diverged_at_step"]) == ("diverged", 2)
