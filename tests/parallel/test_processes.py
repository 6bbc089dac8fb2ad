"""The environment in which JAX starts."""

import os
import subprocess
import sys

import jax
import pytest

from minsae_jax import UserError
from minsae_jax.parallel.processes import start_jax
from tests.compiler import COMPILER_FLAGS


def test_64_bit_numbers_are_refused():
    """A sweep would train on other numbers, and a resumed run would end with other weights."""
    with jax.enable_x64(True), pytest.raises(UserError, match="unset JAX_ENABLE_X64"):
        start_jax()


def start_with(**environment: str) -> str:
    """Start JAX in a new process, and return the last line that it prints."""
    program = "from minsae_jax.parallel.processes import start_jax; start_jax()"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return result.stderr.splitlines()[-1]


def test_refused_transfers_are_named():
    last_line = start_with(JAX_TRANSFER_GUARD="disallow")
    assert "UserError: arrays are copied to the devices, which JAX_TRANSFER_GUARD" in last_line


def test_missing_platform_has_a_reason():
    """The platform is one that JAX knows, but has no plugin for."""
    last_line = start_with(JAX_PLATFORMS="cuda")
    assert last_line.startswith("minsae_jax.errors.UserError: JAX found no device (")
    assert "JAX_PLATFORMS" in last_line


@pytest.mark.skipif(sys.platform != "linux", reason="processes are bound to cores")
def test_devices_are_the_cores_of_the_process():
    """As under Slurm with --cpus-per-task=1 on a machine of many cores."""
    program = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from minsae_jax.parallel.processes import start_jax
start_jax()
import jax
print(jax.device_count())
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILER_FLAGS}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1"]
