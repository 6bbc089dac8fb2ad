"""Processes of `prepare --jobs`; what they write is tested in test_prepare.py."""

import subprocess
import sys

import pytest

from minsae_jax.eeg.prepare.workers import HAS_FORK_SERVER, MODULES

# Python ignores modules that it cannot import in advance.
LOADED = """
from minsae_jax.eeg.prepare import workers

workers.start_imports()
with workers.worker_pool(1) as pool:
    print(*pool.submit(eval, "list(__import__('sys').modules)").result())
"""


@pytest.mark.skipif(not HAS_FORK_SERVER, reason="elsewhere, workers import modules themselves")
def test_workers_start_with_their_modules_and_without_jax():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert set(MODULES) <= set(loaded)
    assert "jax" not in loaded
