"""Members during training, for measures that are made outside this package."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from minsae_jax.sae.member import SparseAutoencoder

Image = UInt8[np.ndarray, "height width 3"]


class Snapshot(NamedTuple):
    """A member as it is at one step of training."""

    name: str
    # For raw activations
    sae: SparseAutoencoder
    # Whether each feature was active on a held-out token
    is_live: Bool[np.ndarray, " d_sae"]


class FeatureMeasures(NamedTuple):
    """Measures of the features of several members, for TensorBoard."""

    # By member, then by name
    metrics: Mapping[str, Mapping[str, float]]
    images: Mapping[str, Image]


MeasureFeatures = Callable[[Sequence[Snapshot]], FeatureMeasures]
