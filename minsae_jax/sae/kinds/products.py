"""The matrix products of a step; their factors are rounded as `Objective` says."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.parallel.mesh import on_cpu
from minsae_jax.sae.kinds.base import Objective, Params


class Weights(NamedTuple):
    """Factors of the products, and the biases."""

    w_enc_T: Float[Array, "d_sae d_model"]
    w_dec: Float[Array, "d_sae d_model"]
    w_dec_T: Float[Array, "d_model d_sae"]
    b_enc: Float[Array, " d_sae"]
    b_dec: Float[Array, " d_model"]


def round_weights(params: Params, objective: Objective) -> Weights:
    # Transposed before the loop over tiles: XLA for CPU would do it for every tile.
    w_dec = objective.round_factor(params["W_dec"])
    return Weights(
        w_enc_T=objective.round_factor(params["W_enc"]).T,
        w_dec=w_dec,
        w_dec_T=w_dec.T,
        b_enc=params["b_enc"],
        b_dec=params["b_dec"],
    )


def pre_activations(
    weights: Weights, x: Float[Array, "tile d_model"], objective: Objective
) -> Float[Array, "d_sae tile"]:
    """Return x W_enc + b_enc, transposed."""
    return product(weights.w_enc_T, objective.round_factor(x).T) + weights.b_enc[:, None]


def zero_gradients(params: Params) -> Params:
    """Return zeros for the gradients of the two maps, with W_enc transposed."""
    zeros = {name: jnp.zeros_like(params[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return zeros | {"W_enc": zeros["W_enc"].T}


def row_sums(a: Float[Array, "m n"]) -> Float[Array, " m"]:
    """Return a.sum(1). On CPU a product with ones is faster; elsewhere it would not be fused."""
    if on_cpu():
        return a @ jnp.ones(a.shape[1])
    return a.sum(1)


def column_sums(a: Float[Array, "m n"]) -> Float[Array, " n"]:
    """Return a.sum(0), see `row_sums`."""
    if on_cpu():
        return jnp.ones(a.shape[0]) @ a
    return a.sum(0)


def product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Return a matrix product, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
