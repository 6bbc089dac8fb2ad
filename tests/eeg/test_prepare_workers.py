"""Processes of `prepare --jobs`; what they write is tested in test_prepare.py."""

import importlib.util
import os
import subprocess
import sys

import pytest

from minsae_jax.eeg.prepare.workers import MODULES

# Prints the modules that a worker has imported before its first recording.
LOADED = """
from minsae_jax.eeg.prepare import workers

workers.start_imports()
if __name__ == "__main__":
    with workers.worker_pool(1) as pool:
        print(*pool.submit(eval, "list(__import__('sys').modules)").result())
"""


def loaded_modules(**variables):
    environment = os.environ | variables
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, workers import modules themselves")
def test_workers_start_with_their_modules_and_without_jax():
    loaded = loaded_modules()
    # Python ignores modules that it cannot import in advance. MNE works without joblib.
    installed = {name for name in MODULES if importlib.util.find_spec(name)}
    assert installed >= set(MODULES) - {"joblib"}
    assert installed <= set(loaded)
    assert "jax" not in loaded


def test_workers_start_where_there_can_be_no_socket(tmp_path):
    folder = tmp_path / ("x" * 120)  # sockets allow 107 characters
    folder.mkdir()
    assert "minsae_jax.eeg.prepare.workers" in loaded_modules(TMPDIR=str(folder))
