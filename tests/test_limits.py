"""Commands under limits of the system: few open files, little memory."""

import os
import subprocess
import sys

import pytest

from minsae_jax.cli.process import run

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
