"""Memory of training does not grow with the store. The files are sparse: 50 GB occupy 0.2 GB."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc"),
]

PROGRAM = """
import sys, threading, time

from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train

peak = 0
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        peak = max(peak, int(line.split()[1]))
watching = threading.Thread(target=watch)
watching.start()
start_jax()
store, run_dir = sys.argv[1:]
train(TrainConfig(store=store, run_dir=run_dir, feature_dim_factor=(2.0,),
                  lambda_sparsity=(1.0, 2.0), num_steps=20, checkpoint_every=10))
done.set()
watching.join()
print(peak // 1000)
"""


def peak_of(folder: Path, files: int) -> int:
    """Return the peak of anonymous memory, in MB, of a short run on `files` files of 126 MB."""
    store = folder / "store/l-1"
    store.mkdir(parents=True)
    first = np.random.default_rng(0).normal(size=(8, 101, 128))  # all zeros are refused
    for i in range(files):
        x = np.lib.format.open_memmap(
            store / f"b{i:04d}.npy", "w+", np.float32, (128 * 19, 101, 128)
        )
        x[:8] = first
        del x
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(store.parent), str(folder / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_store(tmp_path):
    small = peak_of(tmp_path / "1", 8)
    large = peak_of(tmp_path / "50", 400)
    assert sum(p.stat().st_size for p in (tmp_path / "50").rglob("b*.npy")) > 50e9
    assert large < 1.1 * small + 20, (small, large)
