"""The whole way as a user goes it: the README's commands, and `make extract train` in a fresh copy."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import FIXTURES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRACKED = ("minsae_jax", "convert", "configs", "Makefile", "pyproject.toml")
# What keeps a command of the README short here; a later flag overrides an earlier one.
SHORTER = {
    "minsae train": "--num_steps 30 --batch_size 256 --eval_window 10 --feature_dim_factor 1"
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def environment():
    """As a user's shell, with this environment activated, and two devices."""
    flags = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }
    return os.environ | flags | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command, cwd, env):
    done = subprocess.run(
        command, cwd=cwd, env=env, shell=isinstance(command, str), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_readme(tmp_path, demo_folder, environment):
    """Every command and the Python of the README, in order, where its files are."""
    shutil.copytree(demo_folder, tmp_path / "tuhab_preprocessed")
    for source, target in (("checkpoint.pth", "checkpoint.pth"), ("config.yaml", "config.yaml")):
        shutil.copy(FIXTURES / "tuhab_patch_100" / source, tmp_path / target)
    commands = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if not line.startswith("make ")
    ]
    assert len(commands) == 8
    for command in commands:
        if command.startswith("tensorboard"):
            continue  # test_tensorboard_starts
        shorter = next((flags for start, flags in SHORTER.items() if command.startswith(start)), "")
        run(f"{command} {shorter}", tmp_path, environment)
    for split in ("", "_val", "_test"):
        assert (tmp_path / f"stores/mine{split}/l-1/manifest.json").exists()
    assert (tmp_path / "runs/mine/report/index.html").is_file()
    for block, check in zip(
        blocks("python"), ("x_hat.shape == x.shape", "len(found.table()) == 128"), strict=True
    ):
        run([sys.executable, "-c", f"{block}\nassert {check}"], tmp_path, environment)
    init = re.search(r"`(minsae train --init \S+)`", README)[1]
    out = run(
        f"{init} --store stores/mine --lambda_sparsity 1 {SHORTER['minsae train']} --run_dir runs/two",
        tmp_path,
        environment,
    )
    assert "lambda=1" in out


def test_tensorboard_starts(tmp_path, environment):
    (command,) = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("tensorboard")
    ]
    (tmp_path / "runs").mkdir()
    environment = environment | {"PYTHONWARNINGS": ""}  # tensorboard's own are not ours
    with subprocess.Popen(
        [*shlex.split(command), "--port", "0"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert any("at http://localhost:" in line for line in process.stderr)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, environment):
    """A fresh copy with a smaller demo; its .venv is this environment."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in TRACKED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    config = yaml.safe_load((folder / "configs/demo.yaml").read_text())
    config["demo"] |= {"patients": 10, "minutes": 0.5}
    config["train"] |= {
        "num_steps": 60,
        "batch_size": 256,
        "checkpoint_every": 20,
        "feature_dim_factor": 1,
    }
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(config))
    return folder


def make(*targets):
    return ["make", "-o", ".venv/.installed", *targets]  # the environment is there


def test_make(checkout, environment):
    first = run(make("extract", "train"), checkout, environment)
    assert "windows of split train" in first
    assert "windows of split test" in first
    members = sorted(p.name for p in (checkout / "runs/demo/members").iterdir())
    assert members == [f"lambda={v}" for v in ("0.5", "1", "10", "2", "20", "5")]
    assert all(name in first for name in members)
    began = time.time()
    second = run(make("extract", "train"), checkout, environment)
    assert second.count("finished already") == 4
    assert time.time() - began < 30
    told = run(make("evaluate"), checkout, environment)
    assert "recommended: lambda=" in told
    assert (checkout / re.search(r"^open (\S+)", told, re.M)[1]).is_file()
    assert len(list((checkout / "runs/demo/report/data").iterdir())) == 128


def test_killed_at_any_moment(small_store, tmp_path, environment):
    """SIGKILL between checkpoints, twice, and SIGTERM and Ctrl-C, which save first; then the same command: the files of
    an undisturbed run, to the byte."""
    command = (
        f"minsae train --store {small_store} --lambda_sparsity 0.1 1 --lr 1e-3 --num_steps 2000 --batch_size 64 "
        "--checkpoint_every 100 --eval_window 130 --run_dir "
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command + "whole", tmp_path, environment)

    def latest():
        return max(
            (int(p.name) for p in killed.glob("checkpoints/*") if p.name.isdigit()), default=0
        )

    for wanted, how in (
        (100, signal.SIGKILL),
        (400, signal.SIGTERM),
        (700, signal.SIGKILL),
        (1000, signal.SIGINT),
    ):
        with subprocess.Popen(
            shlex.split(command + "killed"),
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while latest() < wanted:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(how)
            told = process.communicate()[1].splitlines()[-1]
        if how != signal.SIGKILL:
            assert process.returncode == 128 + how
            assert (
                f"stopped at step {latest()}, and saved: the same command goes on from there"
                in told
            )
    assert not (killed / "sweep.csv").exists()
    run(command + "killed", tmp_path, environment)
    compared = [
        p.relative_to(whole) for p in whole.rglob("*") if p.suffix in (".csv", ".safetensors")
    ]
    assert len(compared) == 7
    for name in compared:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_extraction_killed_at_any_moment(demo_folder, tmp_path, environment):
    """SIGKILL, SIGTERM and a disk that takes no more, then the same command: the store of an undisturbed run."""
    checkpoint = FIXTURES / "tuhab_patch_100/checkpoint.pth"
    command = f"minsae extract --root_path {demo_folder} --checkpoint_path {checkpoint} --batch_size 1 --out "
    whole, killed = tmp_path / "whole/l-1", tmp_path / "killed/l-1"
    run(command + "whole", tmp_path, environment)
    for wanted, how in ((3, signal.SIGKILL), (12, signal.SIGTERM), (18, signal.SIGKILL)):
        with subprocess.Popen(
            shlex.split(command + "killed"),
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.DEVNULL,
        ) as process:
            while len(list(killed.glob("b*.npy"))) < wanted:
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(how)
        assert not (killed / "provenance.npz").exists()
    full = subprocess.run(
        ["bash", "-c", f"ulimit -f 50; exec {command} killed"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert full.returncode == 2
    assert b"could not be written (File too large); free some space" in full.stderr.splitlines()[-1]
    run(command + "killed", tmp_path, environment)
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in killed.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


def test_make_explains_itself(checkout, environment):
    told = run(["make"], checkout, environment)
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"\.PHONY: (.*)", makefile)[1].split()
    for target in targets:
        assert f"make {target}" in told
    assert set(targets) == {
        "help", "setup", "demo", "convert", "extract", "train", "evaluate", "tensorboard", "test", "check", "bench",
        "bench-train", "bench-stream",
        "bench-extract", "clean",
    }  # fmt: skip
    for line in blocks("bash")[0].splitlines():
        assert set(line.split("#")[0].split()[1:]) <= set(targets)


def test_full_demo_is_as_promised():
    """What the README says of configs/demo.yaml, which test_make makes smaller."""
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    lambdas = config["train"]["lambda_sparsity"]
    assert (
        f"activations, {['four', 'five', 'six', 'seven'][len(lambdas) - 4]} autoencoders" in README
    )
    told = [line.split() for line in blocks("text")[0].splitlines()[1:]]
    assert [row[0] for row in told] == [f"lambda={v:g}" for v in lambdas]
    l0, fvu = np.array([(float(row[3]), float(row[4])) for row in told]).T
    assert (np.diff(l0) < 0).all()
    assert (np.diff(fvu) > 0).all()


def test_benchmarks_run(environment):
    for name in ("train", "stream", "extract"):
        out = run([sys.executable, "-m", f"benchmarks.{name}", "--quick"], ROOT, environment)
        assert "| " in out
