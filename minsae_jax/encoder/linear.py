"""Linear maps of the layers, in few passes over memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from minsae_jax.parallel.mesh import materialize, on_cpu

Dtype = Any  # such as jnp.bfloat16


def unchanged(y: Array) -> Array:
    return y


def linear(
    layer: nnx.Linear,
    x: Num[Array, "N T n_inputs"],
    then: Callable[[Array], Array] = unchanged,
    dtype: Dtype | None = None,
) -> Num[Array, "N T n_outputs"]:
    """Return then(layer(x)) in the layer's dtype.

    An accelerator adds the bias and computes `then` in float32, and may return another `dtype`.
    """
    if on_cpu():
        return then(layer(x))
    y = product(x, layer.kernel[...], layer.dtype) + bias_of(layer)[None, None]
    return materialize(then(y).astype(dtype or layer.dtype))


def linear_to_tokens_last(
    layer: nnx.Linear,
    x: Float[Array, "N T n_inputs"],
    then: Callable[[Array], Array] = unchanged,
) -> Float[Array, "n_outputs N T"]:
    """Return then(layer(x)) with the axes in another order, in float32."""
    y = jnp.einsum("io,nti->ont", layer.kernel[...], x) + bias_of(layer)[:, None, None]
    return materialize(then(y))


def linear_from_tokens_last(
    layer: nnx.Linear, x: Float[Array, "n_inputs N T"]
) -> Float[Array, "N T n_outputs"]:
    """Return layer(x) for tokens that are the last axis, in float32."""
    return materialize(jnp.einsum("int,io->nto", x, layer.kernel[...]) + bias_of(layer)[None, None])


def bias_of(layer: nnx.Linear) -> Float[Array, " n_outputs"]:
    assert layer.bias is not None
    return layer.bias[...]


def product(
    x: Num[Array, "N T n_inputs"], kernel: Num[Array, "n_inputs n_outputs"], dtype: Dtype
) -> Num[Array, "N T n_outputs"]:
    """Return a matrix product of factors rounded to `dtype`, summed in float32."""
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def unmerged(x: Array, done: Array) -> Array:
    """Return x for a product that is not merged with `done`, another product of x.

    XLA for GPU merges small products in half precision that share a factor, and then adds bias and
    rounding in further passes.
    """
    if on_cpu() or done.dtype == jnp.float32:
        return x
    return jax.lax.optimization_barrier((x, done))[0]
