"""What remains of an abort; tests/sae/test_processes.py has those of JAX in a real cluster."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cluster import ROOT

PROGRAM = """
import os, sys
from minsae_jax.cli import watch_cluster
watch_cluster()
print("progress", file=sys.stderr)
os.write(2, sys.argv[1].encode())
os.abort()
"""
FATAL = "the JAX distributed service detected fatal errors"
JOINING = "CoordinationService/RegisterTask"


def abort_with(message: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a process that prints as native code does, and aborts."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, message, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("message", "process"),
    [
        (f"{FATAL}: UNAVAILABLE: Failed to send RPC to coordination service", "process 0"),
        (f"{FATAL}: tasks (stopped sending heartbeats):\n3\nThe tasks", "process 3"),
        (f"{FATAL}: ABORTED", "another process"),
    ],
)
def test_abort_of_a_lost_process_is_one_line(message, process):
    done = abort_with(message)
    assert done.returncode == 2
    error = f"error: {process} of the cluster has ended; see its message, then rerun"
    assert done.stderr.splitlines() == ["progress", error]


def test_abort_of_a_process_that_waits_for_others_to_start_is_one_line():
    """JAX aborts after five minutes; the message is its own."""
    done = abort_with(f"{FATAL}: DEADLINE_EXCEEDED\nRPC: /xla.coordination.{JOINING}")
    assert done.returncode == 2
    error = "error: a process of the cluster did not start; start all with the same command"
    assert done.stderr.splitlines() == ["progress", error]


def test_other_aborts_show_what_native_code_printed():
    done = abort_with("check failed: a bug\n")
    assert done.returncode == -signal.SIGABRT
    lines = done.stderr.splitlines()
    assert lines[:2] == ["progress", "check failed: a bug"]
    assert any('File "<string>", line 7' in line for line in lines)


def test_debug_changes_nothing():
    done = abort_with(FATAL, "--debug")
    assert done.returncode == -signal.SIGABRT
    assert FATAL in done.stderr
