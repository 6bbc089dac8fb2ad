"""Types are checked at run time in functions with and without arrays."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from minsae_jax.monitor import table
from minsae_jax.report.spectra import relative_power
from minsae_jax.sae.hyper import sparsity


def test_wrong_types_are_refused():
    with pytest.raises(TypeCheckError, match="columns"):
        table("member", [["lambda=1"]])
    with pytest.raises(TypeCheckError, match="hyper"):
        sparsity(3)


def test_wrong_shapes_and_dtypes_are_refused():
    with pytest.raises(TypeCheckError, match="segments"):
        relative_power(np.zeros(8, np.float32), 100.0, 45.0)
    with pytest.raises(TypeCheckError, match="segments"):
        relative_power(np.zeros((2, 8), np.int32), 100.0, 45.0)
