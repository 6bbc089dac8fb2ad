"""Eight simulated devices, strict promotion, and small data that several tests share."""

import os
import shutil

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from selenium import webdriver

from convert.encoder import convert_encoder
from minsae_jax import load_sae
from minsae_jax.eeg.synthetic import DemoConfig, write_demo
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import Encoder, save_encoder
from minsae_jax.encoder.extract import extract
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

FIXTURES = Path(__file__).parent / "fixtures"
ENCODERS = ("tuhab_patch_10", "tuhab_patch_100", "revin_affine_gelu_overlap", "layernorm_prenorm")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Many tests run the same programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def one_device(monkeypatch):
    """Meshes made in the test have one device instead of eight."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A small demo: ten patients with half a minute each."""
    folder = tmp_path_factory.mktemp("demo") / "tuhab_preprocessed"
    write_demo(DemoConfig(root_path=str(folder), patients=10, minutes=0.5))
    return folder


@pytest.fixture
def small_store(tmp_path) -> Path:
    """What minSAE writes: three files of [5, 7, 16] tokens with structure, no manifest."""
    return write_small_store(tmp_path / "store", seed=0)


def write_small_store(store: Path, seed: int) -> Path:
    folder = store / "l-1"
    folder.mkdir(parents=True)
    directions = np.random.default_rng(0).normal(size=(24, 16))
    rng = np.random.default_rng([1, seed])
    for i in range(3):
        sources = rng.exponential(size=(5, 7, 24)) * (rng.random((5, 7, 24)) < 0.1)
        np.save(
            folder / f"b{i:04d}.npy",
            (sources @ directions + 0.1 * rng.normal(size=(5, 7, 16))).astype(np.float32),
        )
    return store


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Without one, tests of pages are skipped aloud, but not in CI."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    browser, driver = next((path for path in found if path), None), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "PAGES ARE NOT TESTED: install chromium and chromedriver (Debian: chromium-driver)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield page
    page.quit()


@dataclass(frozen=True)
class Trained:
    encoder: Encoder
    encoder_folder: Path
    recordings: Path
    stores: Path
    run: Path

    def dataset(self, split: str) -> Dataset:
        store = self.stores.with_name(f"{self.stores.name}_{split}")
        return open_dataset(store, -1, self.encoder.architecture, self.recordings)

    def sae(self, name: str = "lambda=1"):
        return load_sae(self.run / "members" / name)


@pytest.fixture(scope="session")
def trained(demo_folder, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    encoder, _ = convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")
    save_encoder(folder / "encoder", encoder)
    store, run = folder / "store", folder / "run"
    settings = ExtractConfig(
        root_path=str(demo_folder), checkpoint_path="encoder", batch_size=4, out=str(store),
        split=("train", "val", "test"),
    )  # fmt: skip
    extract(encoder, settings)
    train(
        TrainConfig(store=str(store), checkpoint_path=str(folder / "encoder"), run_dir=str(run), lambda_sparsity=(0.1, 1.0),
              feature_dim_factor=(0.5,), lr=(3e-3,), num_steps=150, batch_size=256, eval_every=0),
        encoder.fingerprint,
    )  # fmt: skip
    return Trained(encoder, folder / "encoder", demo_folder, store, run)
