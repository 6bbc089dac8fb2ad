"""Baselines without training: principal components and raw dimensions as autoencoders.

Their features are the positive and the negative parts, so that they are measured like members.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.sae.member import SparseAutoencoder

# Names of the baselines in results and saved files; they differ from those of members and PCAs.
RAW = "raw"
COMPONENTS = "pca"
PCA_K = (4, 8, 16, 32)
PCA_TOKENS = 1_000_000  # from all over a store; with 100,000, FVU on the demo changes by 0.2 %


class PCA(NamedTuple):
    """The mean of tokens and their principal directions, in columns, by decreasing variance."""

    mean: Float[np.ndarray, " d_model"]
    directions: Float[np.ndarray, "d_model d_model"]


def fit_pca(batches: Iterable[np.ndarray]) -> PCA:
    """Return the principal components of all tokens [tokens, d_model], from moments in float64."""
    n_tokens = 0
    shift: np.ndarray | None = None
    for batch in batches:
        x = batch.astype(np.float64)
        if shift is None:
            # Moments about a point among the tokens lose no digits where the mean is large.
            shift = x.mean(axis=0)
            total = np.zeros(x.shape[1])
            products = np.zeros((x.shape[1], x.shape[1]))
        x -= shift
        n_tokens += len(x)
        total += x.sum(axis=0)
        products += x.T @ x
    assert shift is not None, "there are no tokens"
    mean = total / n_tokens
    covariance = products / n_tokens - np.outer(mean, mean)
    _, directions = np.linalg.eigh(covariance)
    return PCA(mean + shift, directions[:, ::-1])


def pca_autoencoder(pca: PCA, k: int) -> SparseAutoencoder:
    """Return x̂ = mean + the k principal components of largest magnitude.

    It is a TopK autoencoder whose features are the components' positive and negative parts: of the
    two at most one is positive, so that the k largest features are the k largest magnitudes.
    """
    params = _both_signs(pca.mean, pca.directions) | {"k": np.array(k)}
    return SparseAutoencoder(params, {"kind": "topk", "k": k})


def raw_autoencoder(mean: Float[np.ndarray, " d_model"]) -> SparseAutoencoder:
    """Return x̂ = x, whose features are the positive and negative parts of each dimension - mean."""
    return SparseAutoencoder(_both_signs(mean, np.eye(len(mean))), {"kind": "relu"})


def _both_signs(
    mean: Float[np.ndarray, " d_model"], directions: Float[np.ndarray, "d_model n"]
) -> dict[str, np.ndarray]:
    """Return parameters with a feature for each direction, and one for its opposite."""
    both_signs = np.concatenate([directions, -directions], axis=1)
    return {
        "W_enc": both_signs,
        "b_enc": -mean @ both_signs,
        "W_dec": both_signs.T,
        "b_dec": mean,
    }
