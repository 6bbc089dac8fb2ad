"""Views of a trained SAE that evaluation and report need beyond encode and decode."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from minsae_jax.sae import member as model
from minsae_jax.sae.member import Params, SparseAutoencoder


def encode_features(
    sae: SparseAutoencoder,
    x: Float[np.ndarray, "*tokens d_model"],
    indices: Sequence[int],
) -> Float[np.ndarray, "*tokens n"]:
    """Return only the features `indices` of activations, without computing the others."""
    columns = np.asarray(indices)
    weights = np.asarray(sae.params["W_enc"][:, columns])
    biases = np.asarray(sae.params["b_enc"][columns])
    return np.maximum(x @ weights + biases, 0)


def decoder_directions(sae: SparseAutoencoder) -> Float[np.ndarray, "d_sae d_model"]:
    """Return the direction that each feature adds to x̂."""
    return np.asarray(sae.params["W_dec"])


def unit_directions(sae: SparseAutoencoder) -> Float[np.ndarray, "d_sae d_model"]:
    """Return decoder directions of L2 norm 1, so that their products are cosines."""
    directions = decoder_directions(sae)
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    return directions / np.maximum(norms, 1e-12)


def reconstruct(
    params: Params,
    x: Float[Array, "tokens d_model"],
) -> Float[Array, "tokens d_model"]:
    """Return x̂ as a pure function of parameters, for use under jit."""
    return model.decode(params, model.encode(params, x))
