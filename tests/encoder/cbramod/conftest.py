"""A small CBraMod of Braindecode, and what Braindecode computes with it."""

import numpy as np
import pytest

from convert.encoder import convert_encoder
from tests.conftest import FIXTURES

SOURCE = FIXTURES / "cbramod"


@pytest.fixture(scope="module")
def encoder():
    return convert_encoder(SOURCE).encoder


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(SOURCE / "expected.npz"))
