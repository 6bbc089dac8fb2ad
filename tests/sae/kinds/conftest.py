"""Run a module's tests with the code for CPUs and with that for accelerators."""

import jax
import pytest


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """The platform that the code believes to be on; the test runs on CPU all the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
