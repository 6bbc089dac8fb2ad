"""The whole loop: parity with a run of minSAE, refusals, files."""

import csv
import errno
import json
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from convert.sae import convert_sae
from minsae_jax import UserError, load_sae
from minsae_jax.activations.store import open_store
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import MemberLog
from minsae_jax.sae import logger, sweep, trainer
from minsae_jax.sae.config import PlotConfig, TrainConfig, load_run_config
from minsae_jax.sae.data import measure_scale
from minsae_jax.sae.member import save_member
from minsae_jax.sae.plots import plot
from minsae_jax.sae.run import Run
from minsae_jax.sae.snapshot import FeatureMeasures
from minsae_jax.sae.trainer import train
from tests.conftest import FIXTURES, write_small_store
from tests.interrupt import train_until
from tests.sae.runs import files, minsae, table
from tests.test_monitor import FakeWandb

PARITY = FIXTURES / "sae_parity"


@pytest.mark.parametrize("eval_window", [1, 10])
def test_parity_with_minsae(tmp_path, eval_window):
    """2e-4 at every step; 2e-3 for active features, which flip at the edge of the ReLU."""
    args = json.loads((PARITY / "args.json").read_text())
    convert_sae(PARITY / "sparse_autoencoder_init.pt", "member", tmp_path / "init")
    train(
        TrainConfig(
            recipe="minsae", store=str(PARITY / "embeddings/store"), run_dir=str(tmp_path / "run"),
            init=str(tmp_path / "init"), num_steps=args["num_steps"],
            number_of_arrays=args["number_of_arrays"],
            feature_dim_factor=(float(args["feature_dim_factor"]),), lr=(args["lr"],),
            lambda_sparsity=(args["lambda_sparsity"],), recon_weight=args["recon_weight"],
            eval_window=eval_window,
        )
    )  # fmt: skip
    member = tmp_path / "run/members/lambda=0.01"
    ours, theirs = table(member / "metrics.csv"), table(PARITY / "metrics.csv")
    assert len(ours) == 60 // eval_window
    tolerances = {
        "loss": ("total", 2e-4),
        "mse": ("mse", 2e-4),
        "l1": ("l1", 2e-4),
        "l0": ("active", 2e-3),
    }
    for name, (their_name, tolerance) in tolerances.items():
        expected = theirs[their_name].reshape(-1, eval_window).mean(1)
        np.testing.assert_allclose(ours[name], expected, rtol=tolerance)
    assert (ours["lr"] == 1e-3).all()
    assert (ours["lambda"] == 0.01).all()
    if eval_window == args["eval_window"]:
        ours_active = np.loadtxt(member / "act_freqs.csv", delimiter=",", skiprows=1)
        active = np.loadtxt(PARITY / "act_freqs.csv", delimiter=",", skiprows=1)
        np.testing.assert_array_equal(ours_active[:, 0], active[:, 0])
        assert np.abs(ours_active - active)[:, 1:].sum() <= 2e-3 * active[:, 1:].sum()
        headers = [(p / "act_freqs.csv").read_text().splitlines()[0] for p in (member, PARITY)]
        assert headers[0] == headers[1]
    convert_sae(member, "minsae", tmp_path / "final.pt")
    import torch

    final, expected = (
        torch.load(p, weights_only=True)
        for p in (tmp_path / "final.pt", PARITY / "sparse_autoencoder_final.pt")
    )
    for name in expected:
        np.testing.assert_allclose(final[name], expected[name], atol=1e-3)


def test_repr_of_a_run_is_one_short_line(tmp_path):
    assert repr(Run(tmp_path, (), num_steps=10)) == f"Run({tmp_path}, 0 members)"


def test_files_of_a_run(settings, tmp_path):
    settings = replace(settings, seed=(1_000_001,))
    result = train(settings)
    run = tmp_path / "run"
    left = sorted(p.name for p in run.iterdir() if not p.name.startswith("events.out.tfevents."))
    files = ["SHA256SUMS", "config.yaml", "pareto.png", "sweep.csv"]
    assert left == sorted([*files, "checkpoints", "members"])
    names = ["lambda=0.1,d_sae=32", "lambda=0.1,d_sae=48", "lambda=3,d_sae=32", "lambda=3,d_sae=48"]
    assert sorted(p.name for p in (run / "members").iterdir()) == names
    assert sorted(member.name for member in result.members) == names
    for member in result.members:
        assert member.hyper["seed"] == 1_000_001
        assert type(member.hyper["seed"]) is type(member.hyper["d_sae"]) is int
    assert all(name in result.summary() for name in names)
    assert load_run_config(run) == settings.resolved()
    with (run / "sweep.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == [
        "member", "kind", "lambda_sparsity", "lr", "seed", "d_sae", "loss", "mse", "l1", "l0",
        "fvu", "dead_fraction", "status",
    ]  # fmt: skip
    assert {r["status"] for r in rows} == {"finished"}
    for row in rows:
        member = run / "members" / row["member"]
        metrics = table(member / "metrics.csv")
        columns = "step tokens loss mse l1 l0 dead_fraction lr lambda"
        assert " ".join(metrics.dtype.names) == columns
        assert metrics["step"].tolist() == [8, 16, 24, 32, 40]
        assert metrics["tokens"].tolist() == [256, 512, 768, 1024, 1280]
        for name in ("loss", "mse", "l1", "l0", "dead_fraction"):
            assert float(row[name]) == metrics[name][-1]
        active = np.loadtxt(member / "act_freqs.csv", delimiter=",", skiprows=1)
        np.testing.assert_allclose(active[:, 1:].sum(1) / 256, metrics["l0"], rtol=1e-5)
        held = load_file(member / "sae.safetensors")
        assert held["W_enc"].shape == (16, int(row["d_sae"]))
        config = json.loads((member / "config.json").read_text())
        assert (config["lambda_sparsity"], config["d_sae"]) == (
            float(row["lambda_sparsity"]),
            int(row["d_sae"]),
        )
        assert any(p.name.startswith("events.out.tfevents") for p in member.iterdir())
    plot(PlotConfig(run=str(run)))
    assert sorted(p.name for p in (run / "plots").iterdir()) == ["density.gif", "mse_l1.png"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(settings).was_finished
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_rows_that_are_written_late_are_the_same(settings, tmp_path, monkeypatch):
    """Rows of many log intervals are written at once, at a checkpoint and at the end."""
    writes = []
    write = MemberLog.write

    def count(log):
        writes.append(log.folder.name)
        write(log)

    settings = replace(settings, eval_window=2, checkpoint_every=10**6)
    monkeypatch.setattr(logger, "WRITE_SECONDS", 0)
    train(replace(settings, run_dir=str(tmp_path / "at once")))
    monkeypatch.setattr(MemberLog, "write", count)
    monkeypatch.setattr(logger, "WRITE_SECONDS", 1e9)
    train(replace(settings, run_dir=str(tmp_path / "late")))
    paths = sorted((tmp_path / "at once").glob("members/*/*.csv"))
    assert len(paths) == 2 * len(set(writes))
    for path in paths:
        late = tmp_path / "late" / path.relative_to(tmp_path / "at once")
        assert late.read_bytes() == path.read_bytes()
    # The first interval, the last checkpoint and the end.
    assert len(writes) == 3 * len(set(writes))


def test_schedules_are_evaluated_under_jit_only(settings, monkeypatch):
    """Any other operation on a GPU would wait for all steps that are queued there."""

    def traced_only(step):
        assert isinstance(step, jax.core.Tracer)
        return step * 0 + 1

    monkeypatch.setattr(sweep, "make_schedules", lambda plan: (traced_only, traced_only))
    train(settings)


def test_shorter_last_interval_counts_for_sweep_csv_only(settings, tmp_path):
    train(replace(settings, num_steps=20, lambda_sparsity=(3.0,), feature_dim_factor=(2.0,)))
    assert table(tmp_path / "run/members/lambda=3/metrics.csv")["step"].tolist() == [8, 16]
    with (tmp_path / "run/sweep.csv").open() as f:
        assert float(next(csv.DictReader(f))["mse"]) > 0


def test_exported_weights_reconstruct_raw_activations(settings, small_store, tmp_path):
    """The FVU of the last log interval, on scaled tokens, is that of the export on raw ones."""
    settings = replace(
        settings,
        num_steps=400,
        lambda_sparsity=(0.1,),
        feature_dim_factor=(3.0,),
        batch_size=105,
        checkpoint_every=400,
    )
    train(settings)
    store = open_store(small_store, -1)
    x = np.concatenate([store.read(i) for i in range(3)])
    sae = load_sae(tmp_path / "run/members/lambda=0.1")
    fvu = ((sae.decode(sae.encode(x)) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    with (tmp_path / "run/sweep.csv").open() as f:
        told = float(next(csv.DictReader(f))["fvu"])
    assert float(fvu) == pytest.approx(told, rel=0.05)
    assert told < 0.2


def test_scale(settings, small_store):
    store = open_store(small_store, -1)
    x = np.concatenate([store.read(i) for i in range(3)])
    expected = 4 / np.linalg.norm(x.astype(np.float64), axis=1).mean()
    assert measure_scale(settings.plan(), store) == pytest.approx(expected, rel=1e-6)
    half = measure_scale(replace(settings, scale_tokens=50).plan(), store)
    assert half == pytest.approx(expected, rel=0.2)
    assert half != pytest.approx(expected, rel=1e-6)
    assert measure_scale(TrainConfig(recipe="minsae").plan(), store) == 1


def test_other_settings_are_refused_by_name(settings, tmp_path):
    train(settings)
    before = files(tmp_path / "run", "*.csv", "*.yaml")
    with pytest.raises(
        UserError, match=r"lr \(\[0.003\], now \[0.001\]\), num_steps \(40, now 41\)"
    ):
        train(replace(settings, lr=(1e-3,), num_steps=41))
    init = f"train a member longer, start another run with --init {tmp_path}/run/members/MEMBER$"
    with pytest.raises(UserError, match=init):
        train(replace(settings, num_steps=41))
    with pytest.raises(UserError, match=r"or use --overwrite$"):
        train(replace(settings, lr=(1e-3,)))
    assert files(tmp_path / "run", "*.csv", "*.yaml") == before
    train(replace(settings, lr=(1e-3,), overwrite=True))
    assert load_run_config(tmp_path / "run").lr == (1e-3,)
    assert train(replace(settings, lr=(1e-3,))).was_finished


def test_changed_store_is_refused(settings, small_store):
    train_until(settings, 10)
    np.save(small_store / "l-1/b0003.npy", np.zeros((1, 7, 16), np.float32))
    with pytest.raises(UserError, match="has changed since"):
        train(settings)


def test_nothing_is_written_before_all_inputs_are_checked(settings, small_store, tmp_path):
    convert_sae(PARITY / "sparse_autoencoder_init.pt", "member", tmp_path / "init")
    np.save(small_store / "l-1/b0002.npy", np.full((5, 7, 16), np.nan, np.float32))
    wrong = [
        (replace(settings, store=str(tmp_path / "nowhere")), "no store|there is no store"),
        (replace(settings, cache_layer=0), "no store of layer 0"),
        (
            replace(settings, init=str(tmp_path / "init")),
            "--init .* d_model 32 and d_sae 128, expected 16",
        ),
        (replace(settings, init=str(tmp_path)), "has no sae.safetensors"),
        (replace(settings, feature_dim_factor=(0.01,)), "gives d_sae 0"),
        (
            replace(minsae(settings), number_of_arrays=4),
            "--number_of_arrays 4 is more than the 3 files",
        ),
        (settings, "contains NaN"),
    ]
    for bad, told in wrong:
        with pytest.raises(UserError, match=told):
            train(bad)
        assert not (tmp_path / "run").exists()


def test_foreign_folder_is_never_overwritten(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"contains thesis\.tex"):
            train(replace(settings, overwrite=overwrite))
    (tmp_path / "run/config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"contains thesis\.tex"):
        train(replace(settings, overwrite=True))
    assert (tmp_path / "run/thesis.tex").exists()


def test_paths_are_compared_after_resolving(settings, small_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder.yaml").write_text("{}")
    settings = replace(settings, config_path="encoder.yaml")
    train(settings)
    assert train(replace(settings, config_path="./encoder.yaml")).was_finished
    assert train(replace(settings, store="store", run_dir="run")).was_finished
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(replace(settings, run_dir="moved")).was_finished


@pytest.mark.parametrize("recipe", ["april2024", "minsae"])
def test_nan_late_in_the_store_stops_the_run(settings, small_store, recipe):
    settings = minsae(settings) if recipe == "minsae" else replace(settings, scale_tokens=32)
    x = np.load(small_store / "l-1/b0002.npy")
    x[-1, -1, -1] = np.nan
    np.save(small_store / "l-1/b0002.npy", x)
    with pytest.raises(UserError, match="contains NaN"):
        train(settings)


def test_locked_run_is_refused(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run"), pytest.raises(UserError, match="by another process"):
        train(settings)


def test_full_disk_is_one_line(settings, monkeypatch):
    def full(self, *args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device"):
        train(settings)


def test_init_starts_every_member_from_the_given_weights(settings, tmp_path):
    """With λ = 0 and lr = 0 nothing moves: in and out are the same, through the scale and back."""
    first = replace(settings, lambda_sparsity=(3.0,), feature_dim_factor=(2.0,), num_steps=5)
    train(first)
    init = tmp_path / "run/members/lambda=3"
    two = replace(first, init=str(init), lr=(0.0,), seed=(0, 1), run_dir=str(tmp_path / "two"))
    with pytest.warns(UserWarning, match="--seed has no effect with --init"):
        train(two)
    for name in ("lambda=3,seed=0", "lambda=3,seed=1"):
        for key, value in load_file(tmp_path / "two/members" / name / "sae.safetensors").items():
            np.testing.assert_allclose(
                value, load_file(init / "sae.safetensors")[key], rtol=1e-6, atol=1e-7
            )


def test_resumed_run_does_not_need_the_weights_of_init(settings, tmp_path):
    settings = replace(settings, lambda_sparsity=(3.0,), feature_dim_factor=(2.0,), num_steps=12)
    train(settings)
    init = shutil.copytree(tmp_path / "run/members/lambda=3", tmp_path / "init")
    settings = replace(settings, init=str(init), run_dir=str(tmp_path / "whole"))
    train(settings)
    killed = replace(settings, run_dir=str(tmp_path / "killed"))
    train_until(killed, 11)
    shutil.rmtree(init)
    train(killed)
    weights = "members/lambda=3/sae.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()


def test_overwrite_never_deletes_the_weights_of_init(settings, tmp_path):
    settings = replace(settings, lambda_sparsity=(3.0,), feature_dim_factor=(2.0,), num_steps=2)
    train(settings)
    init = tmp_path / "run/members/lambda=3"
    before = files(tmp_path / "run", "*.safetensors", "*.csv", "*.yaml")
    with pytest.raises(UserError, match="is in the run that --overwrite would delete"):
        train(replace(settings, init=str(init), overwrite=True))
    assert files(tmp_path / "run", "*.safetensors", "*.csv", "*.yaml") == before


@pytest.mark.parametrize("kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_init_from_rows_of_norm_1_keeps_reconstructions(settings, tmp_path, small_store, kind):
    """The weights of other libraries have such rows for raw activations, here of SD 100."""
    store = tmp_path / "large/l-1"
    store.mkdir(parents=True)
    for shard in sorted((small_store / "l-1").glob("*.npy")):
        np.save(store / shard.name, 100 * np.load(shard))
    x = np.concatenate([np.load(shard) for shard in store.glob("*.npy")])
    settings = replace(
        settings, store=str(store.parent), lambda_sparsity=(), kind=(kind,), k=(3.0,),
        feature_dim_factor=(2.0,),
    )  # fmt: skip
    first = train(settings).members[0].load()
    unit = first.kind.normalize_decoder(first.params)
    norms = np.linalg.norm(unit["W_dec"], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
    save_member(tmp_path / "init", unit, {"kind": kind})
    init = load_sae(tmp_path / "init")
    np.testing.assert_allclose(init(x), first(x), rtol=1e-4, atol=1e-2)
    settings = replace(settings, init=str(tmp_path / "init"), lr=(0.0,), num_steps=2)
    last = train(replace(settings, run_dir=str(tmp_path / "last"))).members[0].load()
    if kind == "topk":
        np.testing.assert_allclose(last(x), init(x), rtol=1e-4, atol=1e-2)
    # The threshold of BatchTopK moves a little, by those of the two batches.
    errors = [np.square(sae(x) - x).mean() for sae in (init, last)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[0] < 0.3 * x.var()


def test_init_with_a_decoder_row_of_zeros_keeps_reconstructions(settings, tmp_path, small_store):
    settings = replace(
        settings, lambda_sparsity=(), kind=("topk",), k=(3.0,), feature_dim_factor=(2.0,)
    )
    params = train(settings).members[0].load().params
    zeroed = {name: np.array(array) for name, array in params.items()}
    zeroed["W_dec"][5] = 0
    save_member(tmp_path / "init", zeroed, {"kind": "topk"})
    settings = replace(
        settings,
        init=str(tmp_path / "init"),
        lr=(0.0,),
        num_steps=2,
        run_dir=str(tmp_path / "last"),
    )
    member = train(settings).members[0]
    assert member.status == "finished"
    # On tokens on which the feature was not selected: on others it makes room for the next one
    x = np.concatenate([np.load(shard) for shard in (small_store / "l-1").glob("*.npy")])
    init = load_sae(tmp_path / "init")
    x = x[np.asarray(init.encode(x))[..., 5] == 0]
    assert len(x) > 50
    last = member.load()
    np.testing.assert_allclose(last(x), init(x), rtol=1e-4, atol=1e-4)
    norms = np.linalg.norm(last.decoder_directions, axis=1)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)


def test_mesh_that_does_not_fit_is_refused_before_the_folder_is_made(settings, tmp_path):
    with pytest.raises(UserError, match="--mesh 4x4 needs 16 devices"):
        train(replace(settings, mesh="4x4"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_snapshots_of_a_sweep_with_padding_are_its_members(settings, tmp_path):
    """Three members of each size on two positions along `sweep`."""
    snapshots = []

    def measure_features(members):
        snapshots.extend(members)
        return FeatureMeasures({}, {})

    val = open_store(write_small_store(tmp_path / "val", seed=1), -1)
    x = np.concatenate([val.read(shard) for shard in range(3)])
    settings = replace(settings, lambda_sparsity=(0.1, 1.0, 3.0), mesh="2x4", num_steps=8)
    settings = replace(settings, val_store=str(tmp_path / "val"), eval_every=8)
    run = train(settings, open_monitor=lambda held_out: measure_features)
    assert [snapshot.name for snapshot in snapshots] == [member.name for member in run.members]
    for snapshot, member in zip(snapshots, run.members, strict=True):
        for name, weights in member.load().params.items():
            np.testing.assert_array_equal(snapshot.sae.params[name], weights)
        is_live = (np.asarray(snapshot.sae.encode(x)) > 0).any(0)
        assert (snapshot.is_live == is_live).mean() > 0.95


def test_slow_measures_of_features_are_made_less_often(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SLOW_MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "MEASURE_SHARE", 1e-9)
    n_calls = 0

    def measure_features(members):
        nonlocal n_calls
        n_calls += 1
        return FeatureMeasures({}, {})

    write_small_store(tmp_path / "val", seed=1)
    settings = replace(settings, num_steps=8, val_store=str(tmp_path / "val"), eval_every=2)
    train(settings, open_monitor=lambda _: measure_features)
    # The first one, and that at the end
    assert n_calls == 2


def test_wandb(settings, tmp_path, monkeypatch):
    """A row of metrics.csv is a row there; a run may be finished without it."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    train(replace(settings, wandb=True))
    assert train(settings).was_finished
    for member in (tmp_path / "run/members").iterdir():
        metrics = table(member / "metrics.csv")
        logged = [(step, f) for name, step, f in fake.logged if name == member.name]
        assert [step for step, _ in logged] == metrics["step"].tolist()
        for theirs, ours in (("avg_mse", "mse"), ("avg_l1", "l1"), ("avg_active_features", "l0")):
            assert [f[theirs] for _, f in logged] == metrics[ours].tolist()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="W&B failed and is disabled") as seen:
        train(replace(settings, wandb=True, overwrite=True))
    assert len(seen) == 1


def test_failed_send_to_wandb_keeps_the_metrics_and_ends_its_runs(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb("log"))
    with pytest.warns(UserWarning, match="W&B failed and is disabled"):
        train(replace(settings, wandb=True))
    members = tmp_path / "run/members"
    assert sorted(fake.finished) == sorted(member.name for member in members.iterdir())
    with_wandb = files(members, "metrics.csv")
    train(replace(settings, overwrite=True))
    assert with_wandb == files(members, "metrics.csv")


def test_failed_write_of_metrics_ends_the_runs_of_wandb(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())

    def fail(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemberLog, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        train(replace(settings, wandb=True))
    assert sorted(fake.finished) == sorted(run["name"] for run in fake.started) != []
