"""Two real processes write one store."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from socket import socket

import numpy as np

from tests.conftest import FIXTURES
from tests.encoder.extraction import contents, extract

PROCESS = """
import os, sys

from minsae_jax.parallel.processes import start_jax
from minsae_jax.encoder.config import ExtractConfig
start_jax(distributed=True)
from minsae_jax import load_encoder
from minsae_jax.encoder.extract import extract
import jax
assert jax.process_count() == 2
checkpoint, root, out, batches = sys.argv[1:]
settings = ExtractConfig(root_path=root, out=out, batch_size=4, cache_layer=(0, -1), split=("train", "val"))
writes = []
if batches != "all" and jax.process_index() == 1:  # dies
    import os
    from minsae_jax.activations import writer
    StoreWriter = writer.StoreWriter
    write = StoreWriter.write
    def dying(self, number, pieces):
        write(self, number, pieces)
        writes.append(number)
        if len(writes) == int(batches):
            os._exit(9)
    StoreWriter.write = dying
from minsae_jax import cli
if "fails" in os.environ and jax.process_index() == 1:
    from minsae_jax.activations import writer
    def failing(file, block):
        raise OSError(28, "No space left on device")
    writer._write_all = failing
cli.run(lambda _: list(extract(load_encoder(checkpoint), settings)), [])
"""


def test_two_processes_write_the_store_of_one(encoder, settings, tmp_path, monkeypatch):
    extract(encoder, replace(settings, cache_layer=(0, -1)), "train", "val")
    checkpoint = FIXTURES / "tuhab_patch_100/checkpoint.pth"

    def run_both(batches):
        with socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PLATFORMS": "cpu",
        }
        command = [
            sys.executable,
            "-c",
            PROCESS,
            checkpoint,
            settings.root_path,
            tmp_path / "two",
            batches,
        ]
        both = [
            subprocess.Popen(list(map(str, command)), env=environment | {"JAX_PROCESS_ID": str(i)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]  # fmt: skip
        if batches != "all":  # the other would wait for the dead one until it is missed
            both[1].wait(100)
            both[0].kill()
        told = [process.communicate(timeout=100)[1] for process in both]
        return [process.returncode for process in both], told

    monkeypatch.setenv("fails", "1")
    codes, told = run_both("all")
    assert codes == [2, 2], told
    assert "could not be written (No space left on device)" in told[1]
    assert told[0].splitlines()[-1].startswith("error: another process failed")
    monkeypatch.delenv("fails")
    codes, told = run_both("3")
    assert codes[1] == 9, told
    assert not any(
        (tmp_path / "two" / layer / "provenance.npz").exists() for layer in ("l0", "l-1")
    )
    assert list(tmp_path.glob("two/*/manifest.1.json"))
    codes, told = run_both("all")
    assert codes == [0, 0], told
    for name in ("store/l0", "store/l-1", "store_val/l0", "store_val/l-1"):
        one, two = (
            contents(tmp_path / name.replace("store", base, 1)) for base in ("store", "two")
        )
        assert one.keys() == two.keys()
        for file in one:
            if file.endswith("npy"):
                np.testing.assert_allclose(
                    *(np.load(io.BytesIO(c[file])) for c in (one, two)), atol=1e-5, rtol=0
                )
        manifests = [json.loads(c["manifest.json"]) for c in (one, two)]
        for manifest in manifests:
            for entry in manifest["shards"]:
                entry.pop("sha256")  # another number of devices a process
        assert manifests[0] == manifests[1]
        assert one["provenance.npz"] == two["provenance.npz"]
