"""The small demo through a small encoder, and a short sweep on it: made once for all tests of features."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from convert.encoder import convert_encoder
from minsae_jax import load_sae
from minsae_jax.config import Extract, Train
from minsae_jax.encoder.converted import Encoder, save_encoder
from minsae_jax.encoder.extract import extract
from minsae_jax.features.dataset import Dataset, open_dataset
from minsae_jax.sae.train import train
from tests.conftest import FIXTURES


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
    save_encoder(folder / "encoder", encoder, {})
    store, run = folder / "store", folder / "run"
    settings = Extract(root_path=str(demo_folder), batch_size=4, out=str(store), split=("train", "val", "test"))
    list(extract(encoder, settings))
    train(
        Train(store=str(store), checkpoint_path=str(folder / "encoder"), run_dir=str(run), lambda_sparsity=(0.1, 1.0),
              feature_dim_factor=(0.5,), lr=(3e-3,), num_steps=150, batch_size=256, eval_every=0),
        encoder.fingerprint,
    )  # fmt: skip
    return Trained(encoder, folder / "encoder", demo_folder, store, run)
