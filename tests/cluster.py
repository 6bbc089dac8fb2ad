"""Run one command in two processes at once, as on two machines, with simulated devices."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from socket import socket

from minsae_jax.__main__ import main
from tests.compiler import COMPILER_FLAGS

ROOT = Path(__file__).parent.parent
TIMEOUT = 400  # seconds


class Cluster:
    """A command with `--distributed` in two processes; `second` replaces it in the second one."""

    def __init__(
        self, command: Sequence[str], second: Sequence[str] | None = None, n_devices: int = 2
    ):
        with socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(n_devices),
            # Without the number of devices that tests simulate in process.
            "XLA_FLAGS": COMPILER_FLAGS,
        }
        self.processes = [
            self._start(0, command),
            self._start(1, command if second is None else second),
        ]

    def _start(self, index: int, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--distributed"],
            cwd=ROOT,
            env=self.environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> list[subprocess.CompletedProcess[str]]:
        """Return both processes' exit codes and output when they have ended."""
        return [self.wait_for(index) for index in range(len(self.processes))]

    def wait_for(self, index: int) -> subprocess.CompletedProcess[str]:
        """Return a process's exit code and output when it has ended."""
        process = self.processes[index]
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def minsae(verb: str, *flags: object) -> list[str]:
    """Return the command line of a verb."""
    return [sys.executable, "-m", "minsae_jax", verb, *map(str, flags)]


def run_here(command: Sequence[str]) -> None:
    """Run the command line of a verb in this process, which has imported and compiled much."""
    main(command[3:])


def wait_until(condition, seconds: float = 180) -> None:
    """Poll `condition` until it is true; fail after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)
