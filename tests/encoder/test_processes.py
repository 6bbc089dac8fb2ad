"""Two processes write one store."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minsae_jax.encoder.converted import save_encoder
from tests.cluster import Cluster, minsae, wait_until
from tests.encoder.extraction import contents, extract

STORES = ("store/l0", "store/l-1", "store_val/l0", "store_val/l-1")


def assert_same_store(one: Path, two: Path) -> None:
    first, second = contents(one), contents(two)
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("npy"):
            shards = [np.load(io.BytesIO(files[name])) for files in (first, second)]
            np.testing.assert_allclose(*shards, atol=1e-5, rtol=0)
    manifests = [json.loads(files["manifest.json"]) for files in (first, second)]
    for manifest in manifests:
        for entry in manifest["shards"]:
            entry.pop("sha256")  # the numbers of devices differ, and so the last bits
    assert manifests[0] == manifests[1]
    assert first["provenance.npz"] == second["provenance.npz"]


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(encoder, settings, tmp_path):
    """First with a full disk on one of them, then with one killed, then undisturbed."""
    settings = replace(settings, cache_layer=(0, -1), batch_size=1)
    extract(encoder, settings, "train", "val")
    save_encoder(tmp_path / "encoder", encoder)  # reading it takes less time than torch's import
    command = minsae(
        "extract",
        *("--root_path", settings.root_path),
        *("--checkpoint_path", tmp_path / "encoder"),
        *("--out", tmp_path / "two"),
        *("--batch_size", settings.batch_size),
        *("--cache_layer", 0, -1),
        *("--split", "train", "val"),
    )
    # Files are limited to 50 kB in the second process, as if its disk were full.
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "bash", *command]
    first, second = Cluster(command, limited).wait()
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "could not be written (File too large)" in second.stderr
    assert "another process failed" in first.stderr.splitlines()[-1]

    cluster = Cluster(command)
    wait_until(lambda: list(tmp_path.glob("two/*/manifest.1.json")))
    cluster.kill()
    cluster.wait()
    assert not list(tmp_path.glob("two/*/provenance.npz"))
    assert list(tmp_path.glob("two/*/manifest.1.json"))

    for result in Cluster(command).wait():
        assert result.returncode == 0, result.stderr
    for store in STORES:
        assert_same_store(tmp_path / store, tmp_path / store.replace("store", "two", 1))
