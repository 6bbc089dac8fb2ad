"""The whole pipeline as a user runs it: the README's commands, and `make extract train` in a copy.

Most tests here start interpreters, and so are slow. Where the process is not the point, commands
run in this one.
"""

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import convert.__main__
import minsae_jax.__main__
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.grid import make_groups
from minsae_jax.settings import from_dict, read_yaml
from tests.compiler import COMPILER_FLAGS
from tests.conftest import FIXTURES, all_optimizations
from tests.report.reading import read_cards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COPIED = ("minsae_jax", "convert", "configs", "Makefile", "pyproject.toml")
SHORT_TRAINING = "--num_steps 30 --batch_size 256 --eval_window 10 --feature_dim_factor 1"
SHORT_EVALUATION = "--substitution_windows 4 --top 2 --report_features 16"
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
DEMO_RUN = FIXTURES / "demo_run"  # what a full run of configs/demo.yaml wrote
TARGETS = """
help setup demo prepare convert extract train evaluate tensorboard test test-all check
bench bench-train bench-stream bench-extract bench-gpu cuda-check clean
"""
GPU_PARTS = """
encoder first-steps extraction end-to-end steps kernels resume pytorch memory several-gpus
"""


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    """Return the README's shell commands, except for make."""
    lines = "".join(blocks("bash")).splitlines()
    return [line for line in lines if not line.startswith("make ")]


@pytest.fixture(scope="module")
def environment():
    """A user's shell with this environment activated, and two devices."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "XLA_FLAGS": f"{TWO_DEVICES} {COMPILER_FLAGS}",
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }


def run(command: str | list[str], cwd: Path, environment: dict[str, str]) -> str:
    """Run a command that must succeed without warnings, and return its output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """run_here(command) -> its output, in this process, in tmp_path and on two devices."""
    monkeypatch.chdir(tmp_path)
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)

    def run_here(command: str) -> str:
        words = shlex.split(command)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.simplefilter("error", DeprecationWarning)
            if words[0] == "minsae":
                minsae_jax.__main__.main(words[1:])
            elif words[2].startswith("benchmarks."):
                monkeypatch.setattr(sys, "argv", words[2:])
                # Other tests may have imported it, of which runpy warns.
                monkeypatch.delitem(sys.modules, words[2], raising=False)
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                assert words[0].endswith("python")
                assert words[1] == "-m"
                program = {"convert": convert, "minsae_jax": minsae_jax}[words[2]]
                program.__main__.main(words[3:])
        return capsys.readouterr().out

    return run_here


@pytest.mark.slow
def test_readme(tmp_path, demo_folder, run_here, one_device, without_figure, environment):
    """Every command and the Python of the README, in order, where its files are."""
    shutil.copytree(demo_folder, tmp_path / "tuhab_preprocessed")
    for name in ("checkpoint.pth", "config.yaml"):
        shutil.copy(FIXTURES / "tuhab_patch_100" / name, tmp_path)
    run_here("minsae demo --edf --root_path eeg --patients 10 --minutes 0.5")
    assert len(commands()) == 12
    for command in commands():
        # A later flag overrides an earlier one.
        if command.startswith("minsae train"):
            command += f" {SHORT_TRAINING} --lambda_sparsity 5"
        if command.startswith("minsae evaluate"):
            command += f" {SHORT_EVALUATION}"
        if not command.startswith("tensorboard"):  # see test_tensorboard_starts
            run_here(command)
    for split in ("", "_val", "_test"):
        assert (tmp_path / f"stores/mine{split}/l-1/manifest.json").exists()
    assert (tmp_path / "runs/mine/report/index.html").is_file()

    evaluate_prepared = re.search(r"`(minsae evaluate --run runs/edf \S+ \S+)`", README)[1]
    assert "spindle" in run_here(f"{evaluate_prepared} {SHORT_EVALUATION}")
    assert (tmp_path / "runs/edf/report/index.html").is_file()
    # Annotations of the EDF files are the events of the evaluation.
    evaluation = json.loads((tmp_path / "runs/edf/evaluation.json").read_text())
    scored = set(evaluation["members"][0]["events"])
    planted = {row["event"] for row in read_csv(tmp_path / "eeg/events.csv")}
    assert scored
    assert scored <= planted

    encode, train, report = blocks("python")
    assert "num_steps=1000" in train
    script = [
        encode,
        "assert x_hat.shape == x.shape",
        train.replace("num_steps=1000", "num_steps=30, batch_size=256, feature_dim_factor=(1,)"),
        "assert len(run.members) == 2",
        report,
        "assert len(features.table()) == 128",
    ]
    # Integers for floats, which the type checker of the tests would refuse in this process.
    out = run([sys.executable, "-c", "\n".join(script)], tmp_path, environment)
    assert "lambda=2" in out
    assert "(128, 16)" in out

    start_from_member = re.search(r"`(minsae train --init \S+)`", README)[1]
    flags = f"--store stores/mine {SHORT_TRAINING} --lambda_sparsity 1 --run_dir runs/two"
    assert "lambda=1" in run_here(f"{start_from_member} {flags}")

    beside_a_run = re.search(r"`(minsae evaluate --compare_with \S+)`", README)[1]
    flags = f"--run runs/mine --root_path tuhab_preprocessed --out compared {SHORT_EVALUATION}"
    run_here(f"{beside_a_run} {flags}")
    evaluation = json.loads((tmp_path / "compared/evaluation.json").read_text())
    assert "from_minsae" in evaluation["folders"]


@pytest.mark.slow
def test_tensorboard_starts(tmp_path, environment):
    (command,) = [command for command in commands() if command.startswith("tensorboard")]
    (tmp_path / "runs").mkdir()
    with subprocess.Popen(
        [*shlex.split(command), "--port", "0"],
        cwd=tmp_path,
        env=environment | {"PYTHONWARNINGS": ""},  # TensorBoard's own warnings are not ours
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert any("at http://localhost:" in line for line in process.stderr)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A fresh copy with a smaller demo; its .venv is this environment."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    config = yaml.safe_load((folder / "configs/demo.yaml").read_text())
    config["demo"] |= {"patients": 10, "minutes": 0.5}
    config["train"] |= {
        "num_steps": 60,
        "batch_size": 256,
        "checkpoint_every": 20,
        "feature_dim_factor": 1,
    }
    # A member of each kind
    config["train"] |= {"lambda_sparsity": 2, "k": 4}
    config["evaluate"] |= {"substitution_windows": 4, "top": 2, "report_features": 16}
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(config))
    of_edf = yaml.safe_load((folder / "configs/edf.yaml").read_text())
    for section in ("demo", "train"):
        small = ("patients", "minutes", "num_steps", "batch_size", "feature_dim_factor")
        of_edf[section] |= {k: v for k, v in config[section].items() if k in small}
    (folder / "configs/edf.yaml").write_text(yaml.safe_dump(of_edf))
    return folder


def make(*targets: str) -> list[str]:
    """Return the command for targets of the Makefile, without an installation."""
    return ["make", "--no-print-directory", "-o", ".venv/.installed", *targets]


@pytest.fixture
def made_here(checkout, environment, run_here, one_device, without_figure, monkeypatch):
    """made_here(*targets) -> outputs of the commands that make would start, run in this process."""

    def made_here(*targets: str) -> list[str]:
        monkeypatch.chdir(checkout)
        commands = run(make("--dry-run", *targets), checkout, environment)
        return [run_here(command) for command in commands.splitlines()]

    return made_here


@pytest.mark.slow
def test_make_runs_the_demo_once(checkout, environment, made_here):
    first = run(make("extract", "train"), checkout, environment)
    for split in ("train", "val", "test"):
        assert f"split {split}" in first
    members = sorted(path.name for path in (checkout / "runs/demo/members").iterdir())
    assert members == ["batchtopk,k=4", "jumprelu,target_l0=16", "lambda=2", "matryoshka,k=4"]
    assert all(name in first for name in members)

    files = [*checkout.glob("runs/demo/**/*"), *checkout.glob("embeddings/**/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    extracted, trained = made_here("extract", "train")
    assert extracted.count("already") == 3
    assert trained.count("already") == 1
    assert {path: path.stat().st_mtime_ns for path in files} == before

    (out,) = made_here("evaluate")
    assert re.search(r"^recommended: (\S+)", out, re.M)[1] in members
    report = re.search(r"^open (\S+)", out, re.M)[1]
    assert (checkout / report).is_file()
    assert len(read_cards(checkout / "runs/demo/report")) == 16


@pytest.mark.slow
def test_make_goes_from_edf_files_to_a_run(checkout, made_here):
    """`test_readme` evaluates one, and `test_make_runs_the_demo_once` runs `make evaluate`."""
    made_here("prepare", "extract", "train", "CONFIG=configs/edf.yaml")
    assert (checkout / "runs/edf/sweep.csv").is_file()
    (again,) = made_here("prepare", "CONFIG=configs/edf.yaml")
    assert re.search(r"^data/edf/recordings +15 +0 ", again, re.M)


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bytes(small_store, tmp_path, run_here, environment):
    """SIGKILL between checkpoints, then SIGTERM and Ctrl-C, which save first.

    `test_run_of_all_kinds_resumes_to_the_same_bytes` resumes the other kinds.
    """
    command = (
        f"minsae train --store {small_store} --kind relu batchtopk "
        "--lambda_sparsity 0.1 1 --k 4 --feature_dim_factor 2 --aux_dead_after 500 --lr 1e-3 "
        "--num_steps 420 --batch_size 64 --checkpoint_every 40 --eval_window 52 --run_dir "
    )
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    run_here(command + "whole")

    def latest_checkpoint() -> int:
        names = [path.name for path in killed.glob("checkpoints/*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    for step, number in ((40, signal.SIGKILL), (120, signal.SIGTERM), (200, signal.SIGINT)):
        with subprocess.Popen(
            shlex.split(command + "killed"),
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while latest_checkpoint() < step:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate()
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number
            assert f"stopped at step {latest_checkpoint()}" in err.splitlines()[-1]
    assert not (killed / "sweep.csv").exists()
    run_here(command + "killed")

    paths = [path for path in whole.rglob("*") if path.suffix in (".csv", ".safetensors")]
    assert len(paths) == 3 * 3 + 1
    for path in paths:
        name = path.relative_to(whole)
        assert path.read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.slow
def test_killed_extraction_resumes_to_the_same_bytes(trained, tmp_path, run_here, environment):
    """SIGKILL and a full disk."""
    inputs = f"--root_path {trained.recordings} --checkpoint_path {trained.encoder_folder}"
    command = f"minsae extract {inputs} --batch_size 1 --out "
    whole = tmp_path / "whole/l-1"
    killed = tmp_path / "killed/l-1"
    run_here(command + "whole")
    with subprocess.Popen(
        shlex.split(command + "killed"),
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.DEVNULL,
    ) as process:
        while len(list(killed.glob("b*.npy"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not (killed / "provenance.npz").exists()
    full_disk = subprocess.run(
        ["bash", "-c", f"ulimit -f 50; exec {command} killed"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert full_disk.returncode == 2
    assert "could not be written (File too large)" in full_disk.stderr.splitlines()[-1]
    run_here(command + "killed")
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in killed.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


def test_make_lists_its_targets(checkout, environment):
    out = run(["make"], checkout, environment)
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert sorted(targets) == sorted(TARGETS.split())
    for target in targets:
        assert f"make {target}" in out
    for line in blocks("bash")[0].splitlines():
        command, _, _ = line.partition("#")
        assert set(command.split()[1:]) <= set(targets)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_readme_shows_the_demo_run():
    """The README's table is that of the run in the fixtures, and that run is of the demo's YAML."""
    config = from_dict(TrainConfig, read_yaml(ROOT / "configs/demo.yaml")["train"])
    sweep = read_csv(DEMO_RUN / "sweep.csv")
    members = make_groups(config.plan(), d_model=128)
    assert [row["member"] for row in sweep] == [m.name for group in members for m in group]
    held_out = {
        row["member"]: row
        for row in read_csv(DEMO_RUN / "eval.csv")
        if int(row["step"]) == config.num_steps
    }
    header, *lines = blocks("text")[0].splitlines()
    assert " ".join(header.split()) == "member MSE L0 FVU dead val L0 val FVU status"
    for line, row in zip(lines, sweep, strict=True):
        expected = [
            row["member"],
            f"{float(row['mse']):.4g}",
            f"{float(row['l0']):.1f}",
            f"{float(row['fvu']):.3f}",
            f"{float(row['dead_fraction']):.1%}",
            f"{float(held_out[row['member']]['l0']):.1f}",
            f"{float(held_out[row['member']]['fvu']):.3f}",
            row["status"],
        ]
        assert line.split() == expected
    assert "activations, ten SAEs" in README
    assert len(sweep) == 10


def test_rows_of_tables_in_the_docs_are_not_rewrapped():
    """A table whose rows are filled like a paragraph is shown as text."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    delimiters = [
        line for page in pages for line in page.read_text().splitlines() if "| ---" in line
    ]
    assert len(delimiters) > 20
    for line in delimiters:
        assert set(line) <= set("|- :")


DEMO_STEPS = """
from tests.interrupt import train_until
from minsae_jax.sae.config import TrainConfig
from minsae_jax.settings import from_dict, read_yaml

settings = read_yaml("configs/demo.yaml")["train"] | {"eval_window": 10}
config = from_dict(TrainConfig, settings)
train_until(config, step=52)
"""


@pytest.mark.slow
def test_demo_reproduces_its_first_steps(tmp_path, run_here, environment):
    """The full demo, unlike the small one of test_make, up to its step 50."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    demo = "configs/demo.yaml"
    encoder = "configs/demo/encoder.pth --config_path configs/demo/encoder.yaml"
    run_here(f"minsae demo --config {demo}")
    run_here(f"python -m convert encoder {encoder} --out checkpoints/demo")
    with all_optimizations():
        run_here(f"minsae extract --config {demo} --split train")
    # Its end writes the rows that it has logged.
    changes = {
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "XLA_FLAGS": TWO_DEVICES,  # compiled as for users
    }
    run([sys.executable, "-c", DEMO_STEPS], tmp_path, environment | changes)
    for first in read_csv(DEMO_RUN / "first_steps.csv"):
        metrics = f"members/{first['member']}/metrics.csv"
        columns = np.genfromtxt(tmp_path / "runs/demo" / metrics, delimiter=",", names=True)
        record = np.genfromtxt(DEMO_RUN / metrics, delimiter=",", names=True)
        assert columns["step"][0] == float(first["step"])
        assert columns["step"][4] == record["step"][0]
        assert columns["tokens"][4] == record["tokens"][0]
        for name in ("loss", "mse", "l1", "l0"):
            # Training amplifies rounding: means of ten steps differ by 4e-6 between jax 0.10.2 and
            # 0.12.0.1, and by 2e-5 if the store changes by 1e-6; an lr larger by 0.1 % changes
            # them by 5e-4 or more.
            np.testing.assert_allclose(columns[name][0], float(first[name]), rtol=3e-4)
            # Means of 50 steps differ by 1 %, and with this lr by 8 %.
            np.testing.assert_allclose(columns[name][:5].mean(), record[name][0], rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "kinds", "stream", "extract", "prepare"])
def test_benchmarks_run(run_here, name):
    assert "| " in run_here(f"python -m benchmarks.{name} --quick")


@pytest.mark.slow
def test_gpu_benchmark_rehearses_every_part(environment, tmp_path):
    file = tmp_path / "runs/gpu.md"
    out = run(
        [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(file)], ROOT, environment
    )
    assert file.read_text() == out
    sections = re.split(r"^\*\*([\w-]+)\*\*", out, flags=re.M)[1:]
    parts = dict(zip(sections[::2], sections[1::2], strict=True))
    assert [*parts] == [*GPU_PARTS.split(), "Goals"]
    for text in parts.values():
        _, _, rows = text.partition("| --- |")
        assert re.search(r"\d", rows)
    # torch.compile is left out.
    assert parts["Goals"].count("not measured") == 1
    assert out.endswith("\nFailures: none.\n")


@pytest.mark.slow
def test_gpu_benchmark_without_a_gpu(environment):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line
