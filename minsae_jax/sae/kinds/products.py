"""The matrix products of a step; their factors are rounded as `Objective` says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from minsae_jax.parallel.mesh import materialize, on_cpu
from minsae_jax.sae.kinds.base import Objective, Params


class Weights(NamedTuple):
    """Parameters as a step uses them: factors of products, rounded, and biases."""

    w_enc_T: Float[Array, "d_sae d_model"]
    w_dec: Float[Array, "d_sae d_model"]
    w_dec_T: Float[Array, "d_model d_sae"]
    b_enc: Float[Array, " d_sae"]
    b_dec: Float[Array, " d_model"]


def round_weights(params: Params, objective: Objective) -> Weights:
    # Transposed before the loop over tiles: XLA for CPU would do it for every tile, which costs a
    # tenth of a step.
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
    pre = product(weights.w_enc_T, objective.round_factor(x).T) + weights.b_enc[:, None]
    return materialize(pre)


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


def store_features(
    features: Float[Array, "d_sae tile"], objective: Objective
) -> Num[Array, "d_sae tile"]:
    """Return the features of a tile for all later uses; rounded as a factor on accelerators."""
    return features if on_cpu() else materialize(objective.round_factor(features))


def project_back(
    w_dec: Num[Array, "d_sae d_model"], error: Num[Array, "d_model tile"]
) -> Num[Array, "d_sae tile"]:
    """Return W_dec error; accelerators write it in the dtype of the factors."""
    if on_cpu():
        return product(w_dec, error)
    return jnp.matmul(w_dec, error, preferred_element_type=w_dec.dtype)


def encoder_gradient(
    pre_gradient: Num[Array, "d_sae tile"], x: Num[Array, "tile d_model"]
) -> Float[Array, "d_sae d_model"]:
    """Return the gradient of W_enc, transposed; its factors are rounded."""
    if on_cpu():
        return product(pre_gradient, x)
    # In the layout of W_enc, so that the optimizer need not transpose it.
    return product(x.T, pre_gradient.T).T


def is_positive(a: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Return 1 where a number is above 0, else 0."""
    if on_cpu():
        return (a > 0).astype(jnp.float32)
    # XLA for GPU would write the result of a comparison to memory if several results depend on it.
    return jnp.sign(jax.nn.relu(a))


def count_active(features: Num[Array, "d_sae tile"]) -> Int[Array, " d_sae"]:
    """Return on how many tokens each feature, which is at least 0, is active."""
    if on_cpu():
        return (features > 0).sum(1, dtype=jnp.int32)
    # See `is_positive`. Sums of ones are exact up to 2^24.
    return jnp.sign(features).sum(1, dtype=jnp.float32).astype(jnp.int32)


def tanh_of_positive(a: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Return tanh of numbers that are at least 0, on accelerators to 1e-7."""
    if on_cpu():
        return jnp.tanh(a)
    # XLA for GPU would write tanh to memory, since it counts as expensive, but computes this again
    # for every result that depends on it.
    return 1 - 2 / (1 + jnp.exp(2 * a))


def norm_gradient(w_dec: Float[Array, "d_sae d_model"]) -> Float[Array, "d_sae d_model"]:
    """Return d‖W_i‖/dW_i = W_i / ‖W_i‖ of every row, and 0 for a row of zeros."""
    norms = jnp.linalg.norm(w_dec, axis=1)[:, None]
    return jnp.where(norms > 0, w_dec / norms, 0)
