"""Commands under limits of the system: few open files, little memory."""

import os
import signal
import subprocess
import sys

import pytest

from minsae_jax.cli.process import run
from tests.cluster import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="requires ulimit")


def minsae(limit: str, *args: str) -> subprocess.CompletedProcess:
    """Run a command under a limit."""
    script = f'ulimit {limit}; exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "minsae_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def train_args(small_store, run_dir, *more: str) -> list[str]:
    args = ["train", "--store", str(small_store), "--run_dir", str(run_dir), "--num_steps", "4"]
    return [*args, "--eval_window", "1", "--batch_size", "32", "--feature_dim_factor", "1", *more]


@pytest.mark.slow
def test_many_members_train_with_64_open_files(small_store, tmp_path):
    members = ["--seed", *map(str, range(100))]
    args = train_args(small_store, tmp_path / "run", "--lambda_sparsity", "1", *members)
    result = minsae("-n 64", *args)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "run/members").glob("*/sae.safetensors"))) == 100
    assert len(list((tmp_path / "run/members").glob("*/events.out.tfevents.*"))) == 100


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [500_000, 1_500_000])
def test_too_little_memory_is_one_line(small_store, tmp_path, kilobytes):
    result = minsae(f"-v {kilobytes}", *train_args(small_store, tmp_path / "run"))
    assert result.returncode == 2
    (line,) = [x for x in result.stderr.splitlines() if not x.startswith("train ")]
    assert "memory" in line
    assert f"limited to {kilobytes * 1024 / 1e9:.1f} GB; raise the limit" in line


@pytest.mark.slow
def test_exit_codes_are_those_of_the_command(tmp_path):
    missing = minsae("-v 8000000", "plot", "--run", str(tmp_path))
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"error: {tmp_path} is not a run")
    version = minsae("-v 8000000", "--version")
    assert version.returncode == 0
    assert version.stdout.startswith("minsae_jax ")


CRASHES = """
import ctypes, os, sys
from minsae_jax.cli import run, watch_cluster

def crash(args):
    print("progress", file=sys.stderr)
    os.write(2, b"Check failed: " + args[1].encode() + b"\\n")
    if args[0] == "null pointer":
        ctypes.string_at(0)
    if args[0] == "abort":
        os.abort()
    watch_cluster()
    raise OSError("a full disk")

run(crash)
"""


def crash(how: str, message: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a command that crashes under a limit of 2 GB, far more than it needs."""
    script = 'ulimit -c 0; ulimit -v 2000000; exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, "-c", CRASHES, how, message, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(("how", "name"), [("null pointer", "SIGSEGV"), ("abort", "SIGABRT")])
def test_crash_is_one_line_that_advises_more_memory(how, name):
    result = crash(how, "std::bad_alloc")
    assert result.returncode == 2
    progress, line = result.stderr.splitlines()
    assert progress == "progress"
    assert line.startswith(f"error: native code crashed ({name}; --debug shows its output), probab")
    assert "for lack of memory, which is limited to 2.0 GB; raise the limit (ulimit -v)" in line


def test_debug_shows_what_native_code_printed_and_where_python_was():
    result = crash("abort", "a bug", "--debug")
    assert result.returncode == -signal.SIGABRT
    lines = result.stderr.splitlines()
    assert lines[:2] == ["progress", "Check failed: a bug"]
    assert any(line.startswith('  File "<string>", line') for line in lines)


def test_process_of_a_cluster_prints_its_error_under_a_limit():
    result = crash("not at all", "")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["progress", "error: a full disk"]


@pytest.mark.parametrize("message", ["Unable to allocate 9.0 GiB", "RESOURCE_EXHAUSTED: 9 GB", ""])
def test_out_of_memory_is_one_line(capsys, message):
    def main(_: list[str]) -> None:
        if message.startswith("RESOURCE"):
            raise RuntimeError(message)
        raise MemoryError(message)

    with pytest.raises(SystemExit) as end:
        run(main, [])
    assert end.value.code == 2
    reason = message or "MemoryError"
    assert capsys.readouterr().err.startswith(f"error: out of memory ({reason}); try a smaller")
