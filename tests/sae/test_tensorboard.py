"""What TensorBoard shows of a sweep, in a browser."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minsae_jax.sae.trainer import train
from tests.conftest import write_small_store

# All text of the page, that of its shadow roots too.
TEXT = """
const all = (node) => node.nodeType === 3 ? node.data
  : ["STYLE", "SCRIPT"].includes(node.nodeName) ? ""
  : [node.shadowRoot, ...node.childNodes].filter(Boolean).map(all).join(" ");
return all(document.body)
"""


@pytest.fixture
def address(settings, small_store, tmp_path):
    """Of a TensorBoard on a run of four members."""
    write_small_store(tmp_path / "store_val", seed=1)
    train(replace(settings, eval_every=20))
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path / "run"),
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONWARNINGS": ""}
    ) as server:
        try:
            line = next(line for line in server.stderr if "at http://" in line)
            yield line.split(" at ")[1].split()[0]
        finally:
            server.kill()


@pytest.mark.slow
def test_all_members_are_shown(address, chromium):
    names = ["lambda=0.1,d_sae=32", "lambda=0.1,d_sae=48", "lambda=3,d_sae=32", "lambda=3,d_sae=48"]
    for tab, wanted in (
        ("hparams", [*names, "eval/fvu"]),
        ("custom_scalars", [*names, "mse", "l0"]),
    ):
        chromium.get("about:blank")
        chromium.get(f"{address}#{tab}")
        end = time.monotonic() + 60
        while missing := [word for word in wanted if word not in chromium.execute_script(TEXT)]:
            assert time.monotonic() < end, f"{tab} does not show {missing}"
            time.sleep(0.5)
    chromium.get("about:blank")
    chromium.get_log("browser")  # TensorBoard's own complaints are not for the next test
