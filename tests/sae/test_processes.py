"""Training on other devices and by several processes: the same losses, one run's files."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from socket import socket

import numpy as np
import pytest

from minsae_jax.sae.checkpoints import Checkpoints
from minsae_jax.sae.trainer import train
from tests.conftest import write_small_store


class Killed(Exception):
    pass


def losses(run: Path) -> dict[str, np.ndarray]:
    return {
        p.parent.name: np.loadtxt(p, delimiter=",", skiprows=1, ndmin=2)[:, :6]
        for p in sorted(run.rglob("metrics.csv"))
    }


def assert_alike(one: Path, two: Path) -> None:
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name][:, :5], b[name][:, :5], rtol=1e-5)
        np.testing.assert_allclose(a[name][:, 5], b[name][:, 5], rtol=2e-3)


def test_a_run_goes_on_on_another_mesh(settings, tmp_path, monkeypatch):
    """Begun on 4x2, which its two members do not fill, and ended on one device."""
    train(settings)
    save = Checkpoints.save

    def dying(self, step, *args):
        save(self, step, *args)
        if step == 20:
            raise Killed

    other = replace(settings, run_dir=str(tmp_path / "other"), mesh="4x2")
    monkeypatch.setattr(Checkpoints, "save", dying)
    with pytest.raises(Killed):
        train(other)
    monkeypatch.setattr(Checkpoints, "save", save)
    train(replace(other, mesh="1x1", checkpoint_every=7, max_to_keep=1))  # how it runs may change
    assert_alike(tmp_path / "run", tmp_path / "other")


def test_checkpoints_by_the_clock(settings, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *a: (saved.append(step), save(self, step, *a))
    )
    settings = replace(settings, num_steps=6, checkpoint_every=5)
    train(settings)
    assert saved == [5, 6]
    saved.clear()
    train(replace(settings, checkpoint_minutes=1e-9, run_dir=str(tmp_path / "other")))
    assert saved == [1, 2, 3, 4, 5, 6]


COMMON = "--batch_size 32 --lr 3e-3 --eval_window 8 --checkpoint_every 10 --eval_every 20 --feature_dim_factor 2 3"


class Cluster:
    """The same command in two processes on two devices each."""

    def __init__(self, flags: list[str], of_second: tuple[str, ...] = ()):
        with socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": "2"}  # fmt: skip
        command = [sys.executable, "-m", "minsae_jax", "train", "--distributed", *flags]
        self.processes = [
            subprocess.Popen(
                [*command, *of_second][: None if i else len(command)], env=environment | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            )
            for i in range(2)
        ]  # fmt: skip

    def end(self) -> tuple[list[int], list[str], list[str]]:
        told = [process.communicate(timeout=200) for process in self.processes]
        return [p.returncode for p in self.processes], [t[0] for t in told], [t[1] for t in told]


@pytest.mark.parametrize("mesh", ["2x2", "1x4"])  # members on each process, tokens on each process
def test_two_processes_are_one(small_store, tmp_path, mesh):
    write_small_store(tmp_path / "store_val", seed=1)
    flags = [
        "--store",
        str(small_store),
        *COMMON.split(),
        "--lambda_sparsity",
        "0.1",
        "1",
        "3",
        "--num_steps",
        "40",
    ]
    one = subprocess.run(
        [sys.executable, "-m", "minsae_jax", "train", *flags, "--run_dir", str(tmp_path / "one")], check=True,
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "lambda=0.1,d_sae=32" in one.stdout
    cluster = Cluster([*flags, "--run_dir", str(tmp_path / "two"), "--mesh", mesh])
    codes, out, told = cluster.end()
    assert codes == [0, 0], told
    assert "lambda=0.1,d_sae=32" in out[0]
    assert_alike(tmp_path / "one", tmp_path / "two")
    with (tmp_path / "one/eval.csv").open() as a, (tmp_path / "two/eval.csv").open() as b:
        for ours, theirs in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            assert ours["member"] == theirs["member"]
            assert float(ours["fvu"]) == pytest.approx(float(theirs["fvu"]), rel=1e-3)


def test_a_signal_to_one_process_stops_both(small_store, tmp_path):
    flags = [
        "--store",
        str(small_store),
        *COMMON.split(),
        "--num_steps",
        "100000",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    cluster = Cluster(flags)
    wait_for(tmp_path / "run/checkpoints/10")
    cluster.processes[1].send_signal(signal.SIGTERM)
    codes, _, told = cluster.end()
    assert codes == [143, 143], told
    steps = [t.splitlines()[-1] for t in told]
    assert steps[0] == steps[1]
    assert "and saved: the same command goes on from there" in steps[0]
    stopped_at = int(steps[0].split("step ")[1].split(",")[0])
    assert (tmp_path / f"run/checkpoints/{stopped_at}").is_dir()


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.1)


def test_processes_of_unlike_commands_are_refused(small_store, tmp_path):
    flags = [
        "--store",
        str(small_store),
        *COMMON.split(),
        "--num_steps",
        "40",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    codes, _, told = Cluster(flags, ("--lr", "1e-3")).end()
    assert codes == [2, 2], told
    assert all("the processes were not given the same command" in t for t in told)
    assert not (tmp_path / "run").exists()
