"""The matrix products of a step; their factors are rounded as `Objective` says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

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
    pre = product(weights.w_enc_T, objective.round_factor(x).T) + weights.b_enc[:, None]
    return written(pre)


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


def written(a: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Return an array; an accelerator writes it to memory, in the product that it comes from.

    Without this barrier, XLA for GPU computes it again wherever it is used, from larger arrays, or
    leaves the sum over the parts of a product to a slow pass.
    """
    return a if on_cpu() else jax.lax.optimization_barrier(a)


def kept(a: Float[Array, "d_sae tile"], objective: Objective) -> Num[Array, "d_sae tile"]:
    """Return an array of features in the form in which it is kept for later products and sums.

    An accelerator's step is limited by memory traffic, so there it is rounded as a factor.
    """
    return a if on_cpu() else jax.lax.optimization_barrier(objective.round_factor(a))


def kept_product(
    a: Num[Array, "d_sae d_model"], b: Num[Array, "d_model tile"]
) -> Num[Array, "d_sae tile"]:
    """Return a product as it is kept: an accelerator writes it in the dtype of its factors."""
    if on_cpu():
        return product(a, b)
    return jnp.matmul(a, b, preferred_element_type=a.dtype)


def together(*arrays: Array) -> tuple[Array, ...]:
    """Return the arrays; an accelerator has all of them before it reads one for what follows."""
    return arrays if on_cpu() else jax.lax.optimization_barrier(arrays)


def encoder_gradient(
    pre_gradient: Num[Array, "d_sae tile"], x: Num[Array, "tile d_model"]
) -> Float[Array, "d_sae d_model"]:
    """Return the gradient of W_enc, transposed."""
    if on_cpu():
        return product(pre_gradient, x)
    # In the layout of W_enc, so that the optimizer need not transpose it.
    return product(x.T, pre_gradient.T).T


def count_active(features: Num[Array, "d_sae tile"]) -> Int[Array, " d_sae"]:
    """Return on how many tokens each feature, which is at least 0, is active."""
    if on_cpu():
        return (features > 0).sum(1, dtype=jnp.int32)
    # XLA for GPU would keep the result of a comparison in memory to use it for gradients too. Sums
    # of ones are exact up to 2^24.
    return jnp.sign(features).sum(1, dtype=jnp.float32).astype(jnp.int32)
