"""A small encoder, and settings for extracting the small demo."""

import pytest

from convert.encoder import convert_encoder
from minsae_jax.encoder.config import ExtractConfig
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def encoder():
    return convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")[0]


@pytest.fixture
def settings(demo_folder, tmp_path):
    return ExtractConfig(
        root_path=str(demo_folder),
        checkpoint_path="encoder",  # `extract` gets the encoder itself
        batch_size=4,
        out=str(tmp_path / "store"),
    )
