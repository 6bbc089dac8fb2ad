"""Interrupted runs end with the same bytes as others."""

import os
import time
from dataclasses import replace
from os import mkfifo

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minsae_jax import UserError
from minsae_jax.sae.checkpoints import Checkpoints, Progress
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.grid import make_groups
from minsae_jax.sae.sweep import Sweep
from minsae_jax.sae.trainer import train
from tests.interrupt import train_until
from tests.sae.runs import files, minsae


def _latest(run):
    steps = [int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [
        ("april2024", (13, 26, 39)),
        pytest.param("april2024", (13,), marks=pytest.mark.slow),
        pytest.param("minsae", (13,), marks=pytest.mark.slow),
        pytest.param("minsae", (13, 26, 39), marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, recipe, kills):
    """Same bytes; checkpoints fall inside log intervals."""
    if recipe == "minsae":
        settings = minsae(settings)
    train(settings)
    other = replace(settings, run_dir=str(tmp_path / "other"))
    for step in kills:
        train_until(other, step)
    assert _latest(tmp_path / "other") > 0
    train(other)
    names = ("metrics.csv", "act_freqs.csv", "sae.safetensors", "sweep.csv")
    expected = files(tmp_path / "run", *names)
    assert len(expected) == 4 * 3 + 1
    assert files(tmp_path / "other", *names) == expected


def test_densities_of_an_interval_that_contains_a_resume(settings, tmp_path):
    """TensorBoard's densities are shares of all tokens of the interval, as in act_freqs.csv."""
    train_until(settings, 13)
    assert _latest(tmp_path / "run") == 10
    train(settings)
    for member in (tmp_path / "run/members").iterdir():
        board = EventAccumulator(str(member), {"histograms": 0}).Reload()
        counts = np.loadtxt(member / "act_freqs.csv", delimiter=",", skiprows=1)[:, 1:]
        histograms = board.Histograms("train_density/log10")
        assert [histogram.step for histogram in histograms] == [8, 16, 24, 32, 40]
        for histogram, active in zip(histograms, counts, strict=True):
            densities = active[active > 0] / (8 * settings.batch_size)
            limits = [histogram.histogram_value.min, histogram.histogram_value.max]
            expected = np.log10([densities.min(), densities.max()])
            np.testing.assert_allclose(limits, expected, atol=1e-6)


@pytest.mark.slow
def test_kill_between_the_last_checkpoint_and_the_export(settings, tmp_path, capsys):
    train_until(settings, 40)
    assert _latest(tmp_path / "run") == 40
    assert not (tmp_path / "run/sweep.csv").exists()
    capsys.readouterr()
    train(settings)
    assert capsys.readouterr().err == "train 100%, 40/40\n"
    train(replace(settings, run_dir=str(tmp_path / "other")))
    names = ("metrics.csv", "act_freqs.csv", "sae.safetensors", "sweep.csv")
    assert files(tmp_path / "run", *names) == files(tmp_path / "other", *names)


def test_checkpoint_is_of_its_step_on_a_slow_file_system(tmp_path, monkeypatch):
    """Its folder, and then its metrics, are written when training has gone on."""
    plan = TrainConfig(feature_dim_factor=(2.0,), mesh="1x1").plan()
    sweep = Sweep(plan, make_groups(plan, 4), 4)
    make_at_once = os.mkdir

    def make_slowly(*args, **kwargs):
        time.sleep(0.2)
        make_at_once(*args, **kwargs)

    progress = Progress(scale=1.0, store="a", held_out_store=None, step=3, tokens=10)
    progress.metrics["m"] = {"mse": 1.0}
    with Checkpoints(tmp_path / "checkpoints", max_to_keep=2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", make_slowly)
            checkpoints.save(progress, sweep.init(), {})
            progress.metrics["m"] = {"mse": 2.0}
            progress.diverged["m"] = 5
            checkpoints.wait()
        _, saved, _ = checkpoints.restore(3, sweep.abstract_portable())
    assert saved.metrics == {"m": {"mse": 1.0}}
    assert not saved.diverged


def test_named_pipe_in_a_checkpoint_is_refused(tmp_path):
    step = tmp_path / "checkpoints/10"
    step.mkdir(parents=True)
    mkfifo(step / "_CHECKPOINT_METADATA")
    with pytest.raises(OSError, match="not a regular file"):
        Checkpoints(tmp_path / "checkpoints", max_to_keep=2)


def test_run_killed_at_its_start_resumes(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml.tmp").write_text("tra")
    train(settings)
    assert train(settings).was_finished


def test_run_whose_first_checkpoint_was_interrupted_starts_anew(settings, tmp_path):
    """From the weights of --init, that is."""
    first = replace(settings, lambda_sparsity=(3.0,), feature_dim_factor=(2.0,), num_steps=10)
    train(first)
    again = replace(
        first, init=str(tmp_path / "run/members/lambda=3"), run_dir=str(tmp_path / "again")
    )
    (tmp_path / "again/checkpoints/10.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "again/config.yaml").write_bytes((tmp_path / "run/config.yaml").read_bytes())
    with pytest.raises(UserError, match="init"):
        train(again)
    (tmp_path / "again/config.yaml").unlink()
    (tmp_path / "again/checkpoints").rename(tmp_path / "kept")
    train(replace(again, run_dir=str(tmp_path / "whole")))
    (tmp_path / "again/config.yaml").write_text(
        (tmp_path / "whole/config.yaml")
        .read_text()
        .replace(f"{tmp_path}/whole", f"{tmp_path}/again")
    )
    (tmp_path / "kept").rename(tmp_path / "again/checkpoints")
    train(again)
    names = ("metrics.csv", "act_freqs.csv", "sae.safetensors")
    assert files(tmp_path / "again", *names) == files(tmp_path / "whole", *names)
