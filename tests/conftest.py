"""Shared test set-up: eight simulated devices, strict promotion, and small data for many tests."""

# Imports come after what they read.
# ruff: noqa: E402

import gc
import os
import shutil
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import temporary, type_checks
from tests.compiler import COMPILER_FLAGS

# Tracing makes many objects and few cycles; Python would look for those at every 700 objects.
gc.set_threshold(20_000)
temporary.use_memory()

# Before any module of the package is imported.
type_checks.install()

# JAX reads these when it is imported, here and in the commands that tests start. All of them
# share one folder of compiled programs, which also serves the next run of the tests. Two processes
# may write the same program at once: a reader that meets half of it compiles it again.
# A GPU is used if JAX_PLATFORMS says so; the workers then share its memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {COMPILER_FLAGS}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Most tests compile for longer than they compute; LLVM's optimizations are a third of that time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Programs without lines of Python in them are made in 4 % less time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Idle threads of PyTorch and OpenBLAS spin, and workers of pytest share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import jax
import numpy as np
import pytest
from filelock import FileLock
from selenium import webdriver
from threadpoolctl import threadpool_limits

from convert.encoder import convert_encoder
from minsae_jax import load_sae
from minsae_jax.eeg.synthetic import DemoConfig, write_demo
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import load_encoder, save_encoder
from minsae_jax.encoder.extract import extract
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.evaluation import summary
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.sae import trainer
from minsae_jax.sae.config import TrainConfig, TrainPlan
from minsae_jax.sae.grid import Group
from minsae_jax.sae.sweep import Sweep
from minsae_jax.sae.trainer import train
from tests.described import Described, read_described, write_described

# jaxtyping's plugin imports NumPy before OMP_NUM_THREADS is set above.
threadpool_limits(1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# GPUs multiply float32 in TF32 by default.
jax.config.update("jax_default_matmul_precision", "highest")

FIXTURES = Path(__file__).parent / "fixtures"
ENCODERS = ("tuhab_patch_10", "tuhab_patch_100", "revin_affine_gelu_overlap", "layernorm_prenorm")
MAX_SWEEPS = 16  # whose programs are kept
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, so that no worker waits for another at the end."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@contextmanager
def all_optimizations() -> Iterator[None]:
    """Compile with all optimizations, here and in commands: for what computes for many seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optimized():
    """Run a module with all optimizations."""
    with all_optimizations():
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Give meshes made in the test one device instead of eight."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.fixture
def eight_devices():
    """Skip a test that needs several devices, on a machine with fewer GPUs."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, got {jax.device_count()}")


@pytest.fixture
def without_figure():
    """Evaluate without drawing evaluation.png, which takes longer than measuring two members."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "draw_evaluation", lambda path, _: path.touch())
        yield


sweeps: dict[Hashable, Sweep] = {}
# Settings of data, files and logs, which no program of a sweep depends on.
OTHER_SETTINGS = (
    *("config", "run_dir", "store", "val_store", "init", "overwrite", "wandb", "max_to_keep"),
    *("eval_window", "eval_every", "eval_tokens", "checkpoint_every", "checkpoint_minutes"),
)


@contextmanager
def sharing_programs() -> Iterator[None]:
    """Let equal sweeps share their programs across tests, and other sweeps their equal steps.

    Tracing a step takes longer than the 40 steps of a small run.
    """

    def shared_sweep(plan: TrainPlan, groups: tuple[Group, ...], d_model: int) -> Sweep:
        settings = vars(plan) | vars(plan.config) | dict.fromkeys(OTHER_SETTINGS)
        key = (repr(settings), groups, d_model, tuple(jax.devices()))
        if key not in sweeps:
            if len(sweeps) == MAX_SWEEPS:
                sweeps.clear()
            sweeps[key] = Sweep(plan, groups, d_model)
            program = step_key(sweeps[key])
            for other in sweeps.values():
                if step_key(other) == program:
                    sweeps[key].step = other.step
                    sweeps[key].take_metrics = other.take_metrics
                    break
        return sweeps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Sweep", shared_sweep)
        yield


def step_key(sweep: Sweep) -> Hashable:
    """Return all that a step is traced with, and how many members each group has."""
    # Functions are equal if they are the same object; these are made from `plan.optimizer`.
    functions = ("optimizer", "sparsity_schedule", "lr_schedule")
    values = [value for name, value in vars(sweep.program).items() if name not in functions]
    sizes = [len(group) for group in sweep.groups]
    return (*values, sweep.plan.optimizer, *sizes)


@pytest.fixture
def shared_programs():
    """Share programs (`sharing_programs`); a test that patches what is traced must not use this."""
    with sharing_programs():
        yield


def write_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[[Path], None]
) -> Path:
    """Return a folder that `write` fills once per test run, in whichever xdist worker comes first.

    Workers share the folder, so that tests may only read it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own below this one
    folder = base / name
    is_written = base / f"{name}.written"
    with FileLock(base / f"{name}.lock"):
        if not is_written.exists():
            folder.mkdir(exist_ok=True)
            write(folder)
            is_written.touch()
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A small demo: ten patients with half a minute each."""

    def write(folder: Path) -> None:
        root_path = str(folder / "tuhab_preprocessed")
        write_demo(DemoConfig(root_path=root_path, patients=10, minutes=0.5))

    return write_once(tmp_path_factory, "demo", write) / "tuhab_preprocessed"


@pytest.fixture(scope="session")
def described(tmp_path_factory) -> Described:
    """Recordings with a dataset.json: 30 channels at 200 Hz with planted bursts."""
    return read_described(write_once(tmp_path_factory, "described", write_described))


@pytest.fixture
def small_store(tmp_path) -> Path:
    """A store as minSAE writes it: three files of [5, 7, 16] structured tokens, no manifest."""
    return write_small_store(tmp_path / "store", seed=0)


def write_small_store(store: Path, seed: int) -> Path:
    folder = store / "l-1"
    folder.mkdir(parents=True)
    directions = np.random.default_rng(0).normal(size=(24, 16))
    rng = np.random.default_rng([1, seed])
    for i in range(3):
        sources = rng.exponential(size=(5, 7, 24)) * (rng.random((5, 7, 24)) < 0.1)
        tokens = sources @ directions + 0.1 * rng.normal(size=(5, 7, 16))
        np.save(folder / f"b{i:04d}.npy", tokens.astype(np.float32))
    return store


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Without one, tests of pages are skipped with a reason, or fail in CI."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "PAGES ARE NOT TESTED: install chromium and chromedriver (Debian: chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in CHROMIUM_FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield page
    page.quit()


@dataclass(frozen=True)
class Trained:
    """A trained sweep and everything that it was made from."""

    encoder: PatchTSTEncoder
    encoder_folder: Path
    recordings: Path
    stores: Path
    run: Path

    def dataset(self, split: str) -> Dataset:
        store = self.stores.with_name(f"{self.stores.name}_{split}")
        return open_dataset(store, -1, self.encoder, self.recordings)

    def sae(self, name: str = "lambda=1"):
        return load_sae(self.run / "members" / name)


@pytest.fixture(scope="session")
def trained(demo_folder, tmp_path_factory) -> Trained:
    """Two members trained on the small demo; evaluation may write to this worker's `run`."""

    def write(folder: Path) -> None:
        encoder, _ = convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")
        save_encoder(folder / "encoder", encoder)
        extract_settings = ExtractConfig(
            root_path=str(demo_folder),
            checkpoint_path=str(folder / "encoder"),
            batch_size=4,
            out=str(folder / "store"),
            split=("train", "val", "test"),
        )
        extract(encoder, extract_settings)
        train_settings = TrainConfig(
            store=str(folder / "store"),
            checkpoint_path=str(folder / "encoder"),
            run_dir=str(folder / "run"),
            lambda_sparsity=(0.1, 1.0),
            feature_dim_factor=(0.5,),
            lr=(3e-3,),
            num_steps=150,
            batch_size=256,
            eval_every=0,
            mesh="1x1",
        )
        train(train_settings, encoder.fingerprint)

    folder = write_once(tmp_path_factory, "trained", write)
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(folder / "run", run)
    encoder = load_encoder(folder / "encoder")
    return Trained(encoder, folder / "encoder", demo_folder, folder / "store", run)
