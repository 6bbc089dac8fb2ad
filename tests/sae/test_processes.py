"""Training on another mesh and by two processes: the same losses, and the files of one run."""

import csv
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minsae_jax.sae.trainer import train
from tests.cluster import Cluster, minsae, run_here, wait_until
from tests.conftest import write_small_store
from tests.faults.io_errors import error_lines
from tests.interrupt import train_until

FLAGS = (
    *("--batch_size", 32),
    *("--lr", 3e-3),
    *("--eval_window", 8),
    *("--checkpoint_every", 10),
    *("--eval_every", 20),
)
SMALL = (*FLAGS, "--feature_dim_factor", 2)


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """Return step, tokens, loss, mse, l1 and l0 of every member."""
    return {
        path.parent.name: np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)[:, :6]
        for path in sorted(run.rglob("metrics.csv"))
    }


def assert_same_metrics(one: Path, two: Path) -> None:
    first, second = read_metrics(one), read_metrics(two)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name][:, :5], second[name][:, :5], rtol=1e-5)
        np.testing.assert_allclose(first[name][:, 5], second[name][:, 5], rtol=2e-3)  # l0


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_run_resumes_on_another_mesh(settings, tmp_path):
    """Start on 4x2, which the two members of a group do not fill, and finish on one device."""
    train(settings)
    other = replace(settings, run_dir=str(tmp_path / "other"), mesh="4x2")
    train_until(other, step=21)
    assert checkpoint_steps(tmp_path / "other")[-1] == 20
    train(replace(other, mesh="1x1", checkpoint_every=7, max_to_keep=1))  # these may change
    assert_same_metrics(tmp_path / "run", tmp_path / "other")


def test_checkpoints_follow_steps_or_the_clock(settings, tmp_path):
    settings = replace(settings, num_steps=6, checkpoint_every=5, max_to_keep=10)
    train(settings)
    assert checkpoint_steps(tmp_path / "run") == [5, 6]
    train(replace(settings, checkpoint_minutes=1e-9, run_dir=str(tmp_path / "other")))
    assert checkpoint_steps(tmp_path / "other") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_processes_train_like_one(small_store, tmp_path):
    """With members on each process; tokens are on each in the next test."""
    write_small_store(tmp_path / "store_val", seed=1)
    sweep = ("--lambda_sparsity", 0.1, 1, 3, "--feature_dim_factor", 2, 3, "--num_steps", 40)
    flags = ("--store", small_store, *FLAGS, *sweep)
    one = tmp_path / "one"
    two = tmp_path / "two"
    run_here(minsae("train", *flags, "--run_dir", one, "--mesh", "1x1"))
    command = minsae("train", *flags, "--run_dir", two, "--mesh", "2x2")
    # The same command in a program that makes several steps per call, as on GPUs.
    command = [command[0], "-m", "tests.sae.four_steps_per_call", *command[3:]]
    first, second = Cluster(command).wait()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "lambda=0.1,d_sae=32" in first.stdout
    assert_same_metrics(one, two)
    assert_same_held_out(one, two)


def assert_same_held_out(one: Path, two: Path) -> None:
    with (one / "eval.csv").open() as f:
        expected_rows = list(csv.DictReader(f))
    with (two / "eval.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(expected_rows)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["member"] == expected["member"]
        assert float(row["fvu"]) == pytest.approx(float(expected["fvu"]), rel=1e-3)


@pytest.mark.slow
def test_two_processes_select_the_same_features(small_store, tmp_path):
    """ReLU, and kinds that select over the whole batch, of which each process has a part."""
    write_small_store(tmp_path / "store_val", seed=1)
    kinds = ("--kind", "relu", "batchtopk", "jumprelu", "matryoshka")
    sparsity = ("--lambda_sparsity", 1, "--k", 3, "--target_l0", 3, "--aux_dead_after", 62)
    steps = ("--num_steps", 8, "--batch_size", 31, "--eval_window", 2, "--lr", 1e-3)
    flags = ("--store", small_store, *kinds, *sparsity, *steps, "--feature_dim_factor", 2)
    one = tmp_path / "one"
    two = tmp_path / "two"
    run_here(minsae("train", *flags, "--run_dir", one, "--mesh", "1x1"))
    results = Cluster(minsae("train", *flags, "--run_dir", two, "--mesh", "1x4")).wait()
    for result in results:
        assert result.returncode == 0, result.stderr
    assert_same_metrics(one, two)
    assert_same_held_out(one, two)
    paths = sorted(one.rglob("act_freqs.csv"))
    assert len(paths) == 4
    for path in paths:
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


@pytest.mark.slow
def test_signal_to_one_process_stops_both(small_store, tmp_path):
    run = tmp_path / "run"
    flags = ("--store", small_store, *SMALL, "--num_steps", 100_000, "--run_dir", run)
    cluster = Cluster(minsae("train", *flags))
    wait_until((run / "checkpoints/10").exists)
    cluster.processes[1].send_signal(signal.SIGTERM)
    first, second = cluster.wait()
    assert (first.returncode, second.returncode) == (143, 143), first.stderr + second.stderr
    message = first.stderr.splitlines()[-1]
    assert second.stderr.splitlines()[-1] == message
    assert f"stopped at step {checkpoint_steps(run)[-1]}" in message
    assert "saved" in message


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_checkpoint_that_fails_in_one_process_ends_both(small_store, tmp_path, full):
    flags = ("--store", small_store, *FLAGS, "--num_steps", 100_000, "--feature_dim_factor", 64)
    command = minsae("train", *flags, "--run_dir", tmp_path / "run", "--mesh", "1x4")
    # Files are limited to 60 kB in one process, as if its disk were full.
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command]
    commands = [command, command]
    commands[full] = limited
    for result in Cluster(*commands).wait():
        assert result.returncode == 2, result.stderr
        lines = error_lines(result.stderr)
        assert len(lines) == 1, result.stderr
        assert "could not write a checkpoint" in lines[0]


@pytest.mark.slow
def test_member_that_cannot_be_written_ends_both(small_store, tmp_path):
    run = tmp_path / "run"
    flags = ("--store", small_store, *SMALL, "--lambda_sparsity", 1, 2, "--num_steps", 30)
    cluster = Cluster(minsae("train", *flags, "--run_dir", run, "--mesh", "2x2"))
    wait_until((run / "checkpoints/10").exists)
    blocked = run / "members/lambda=1/config.json.tmp"
    blocked.mkdir()
    first, second = cluster.wait()
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert error_lines(first.stderr) == [f"error: Is a directory: {blocked}"]
    (line,) = error_lines(second.stderr)
    assert "another process failed to write the members" in line


SHORT_WAITS = """
from minsae_jax.__main__ import entry
from minsae_jax.parallel import processes

processes.HEARTBEAT_SECONDS = 5
processes.SHUTDOWN_SECONDS = 2
entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "signal_number", "named"),
    [
        (0, signal.SIGKILL, "(process 0|another process)"),
        (1, signal.SIGSTOP, "process 1"),  # as if its machine had vanished
    ],
)
def test_lost_process_ends_the_other_in_one_line(small_store, tmp_path, lost, signal_number, named):
    run = tmp_path / "run"
    flags = ("--store", small_store, *SMALL, "--num_steps", 100_000, "--run_dir", run)
    python, _, _, *arguments = minsae("train", *flags, "--mesh", "1x4")
    cluster = Cluster([python, "-c", SHORT_WAITS, *arguments])
    wait_until((run / "checkpoints/10").exists)
    cluster.processes[lost].send_signal(signal_number)
    lost_at = time.monotonic()
    other = cluster.wait_for(1 - lost)
    assert time.monotonic() - lost_at < 60
    cluster.processes[lost].kill()
    cluster.wait_for(lost)
    lines = error_lines(other.stderr)
    assert (other.returncode, len(lines)) == (2, 1), other.stderr
    assert re.fullmatch(f"error: {named} of the cluster has ended; .*", lines[0])


@pytest.mark.slow
def test_different_commands_are_refused(small_store, tmp_path):
    run = tmp_path / "run"
    command = minsae("train", "--store", small_store, *SMALL, "--num_steps", 40, "--run_dir", run)
    results = Cluster(command, [*command, "--lr", "1e-3"]).wait()
    for result in results:
        assert result.returncode == 2, result.stderr
        assert "same command" in result.stderr
    assert not run.exists()
