"""Processes read their share of a store: the same batches, and half of the bytes for each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minsae_jax.activations.store import open_store
from tests.cluster import ROOT, Cluster, minsae, run_here, wait_until
from tests.faults.io_errors import error_lines
from tests.sae.test_processes import SHORT_WAITS, assert_same_metrics


@pytest.mark.slow
def test_shared_batches_are_those_of_one_process(small_store):
    """With three devices on each, so that the middle row of a mesh of 3x2 is split."""
    command = [sys.executable, "-m", "tests.parallel.shares", str(small_store / "l-1")]
    for result in Cluster(command, n_devices=3).wait():
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "equal"


def write_large_store(folder: Path) -> Path:
    """Write 64 MB: two shuffle buffers in seven shards, whose last chunks are short."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(7):
        x = rng.normal(size=(2**17 // 7, 1, 128)).astype(np.float32)
        np.save(folder / f"b{i:04d}.npy", x)
    return folder


def bytes_read(stdout: str) -> int:
    return int(stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_two_processes_read_half_of_the_store_each(tmp_path):
    """A whole run: scale, six epochs, the start of Python and all its imports.

    At the end, the reader may be ahead by a shuffle buffer, or not.
    """
    batch = 16_384
    store = write_large_store(tmp_path / "store")
    n_steps = 6 * sum(open_store(store).tokens_per_shard) // batch
    flags = ("--store", store, "--batch_size", batch, "--num_steps", n_steps, "--eval_window", 8)
    sweep = ("--lambda_sparsity", 0.1, 1, 3, 10, "--feature_dim_factor", 0.0625)

    def command(name: str, *more: object) -> list[str]:
        line = minsae("train", *flags, *sweep, "--run_dir", tmp_path / name, *more)
        # The same command in a program that counts.
        return [line[0], "-m", "tests.parallel.count_reads", *line[3:]]

    one = subprocess.run(
        command("one", "--mesh", "1x1"), check=True, capture_output=True, text=True, cwd=ROOT
    )
    whole = bytes_read(one.stdout)
    assert whole > 6 * 64e6
    # Every device needs all tokens.
    for result in Cluster(command("two", "--mesh", "4x1")).wait():
        assert result.returncode == 0, result.stderr
        assert 0.45 < bytes_read(result.stdout) / whole < 0.6
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_file_that_one_process_cannot_read_ends_both(tmp_path):
    """Chunk 0 of two is read by the first process in some epochs, by the second in others."""
    store = tmp_path / "store"
    store.mkdir()
    for i in range(2):
        np.save(store / f"b{i:04d}.npy", np.random.default_rng(i).normal(size=(256, 1, 16)))
    run = tmp_path / "run"
    flags = ("--store", store, "--num_steps", 1_000_000, "--batch_size", 32, "--eval_window", 8)
    python, _, _, *arguments = minsae("train", *flags, "--checkpoint_every", 10, "--run_dir", run)
    # The process that cannot read waits for the other one, which waits for its tokens.
    cluster = Cluster([python, "-c", SHORT_WAITS, *arguments])
    wait_until((run / "checkpoints/10").exists, seconds=180)
    with (store / "b0001.npy").open("r+b") as file:
        file.truncate(1000)
    results = cluster.wait()
    messages = [error_lines(result.stderr) for result in results]
    assert [result.returncode for result in results] == [2, 2], messages
    assert [len(lines) for lines in messages] == [1, 1]
    assert any("b0001.npy has become shorter" in lines[0] for lines in messages)


@pytest.mark.slow
def test_two_processes_train_on_live_activations_like_one(trained, tmp_path):
    source = ("--live", "--root_path", trained.recordings, "--live_batch_size", 4)
    encoder = ("--checkpoint_path", trained.encoder_folder)
    sweep = ("--lambda_sparsity", 0.1, 1, "--lr", 1e-3, "--feature_dim_factor", 0.5)
    steps = ("--num_steps", 30, "--batch_size", 500, "--eval_window", 10)
    flags = (*source, *encoder, *sweep, *steps)
    run_here(minsae("train", *flags, "--run_dir", tmp_path / "one", "--mesh", "1x1"))
    for result in Cluster(minsae("train", *flags, "--run_dir", tmp_path / "two")).wait():
        assert result.returncode == 0, result.stderr
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
