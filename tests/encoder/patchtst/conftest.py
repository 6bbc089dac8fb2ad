"""The paths for GPUs, on a CPU."""

import jax
import pytest


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    yield
    jax.clear_caches()
