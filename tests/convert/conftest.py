"""A checkpoint of gPatchTST with its YAML, and their conversion through files."""

import pytest
import torch
import yaml

from convert.encoder import convert_encoder
from tests.conftest import FIXTURES

SOURCE = FIXTURES / "layernorm_prenorm"


@pytest.fixture
def checkpoint():
    return torch.load(SOURCE / "checkpoint.pth", weights_only=True)


@pytest.fixture
def settings():
    return yaml.safe_load((SOURCE / "config.yaml").read_text())


@pytest.fixture
def through_files(tmp_path):
    """through_files(checkpoint, settings), as a user would convert."""

    def run(checkpoint, settings=None):
        torch.save(checkpoint, tmp_path / "x.pth")
        if settings is None:
            return convert_encoder(tmp_path / "x.pth")
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
        return convert_encoder(tmp_path / "x.pth", tmp_path / "x.yaml")

    return run
