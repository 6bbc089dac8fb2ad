"""A short run of four members on the small store."""

import pytest

from minsae_jax.sae.config import TrainConfig


@pytest.fixture
def settings(small_store, tmp_path):
    return TrainConfig(
        store=str(small_store), run_dir=str(tmp_path / "run"), lambda_sparsity=(0.1, 3.0), lr=(3e-3,), num_steps=40,
        feature_dim_factor=(2.0, 3.0), batch_size=32, eval_window=8, checkpoint_every=10,
    )  # fmt: skip
