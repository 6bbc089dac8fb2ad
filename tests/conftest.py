"""Eight simulated devices, strict promotion, and small data that several tests share."""

import os
import shutil

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from pathlib import Path

import jax
import numpy as np
import pytest
from selenium import webdriver

from minsae_jax.config import Demo
from minsae_jax.eeg.synthetic import write_demo

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
    write_demo(Demo(root_path=str(folder), patients=10, minutes=0.5))
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
        np.save(folder / f"b{i:04d}.npy", (sources @ directions + 0.1 * rng.normal(size=(5, 7, 16))).astype(np.float32))
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
