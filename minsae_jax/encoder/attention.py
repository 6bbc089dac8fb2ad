"""Softmax attention of queries, keys and values, by cuDNN where it has a kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from minsae_jax.encoder.linear import Dtype
from minsae_jax.parallel.mesh import on_cpu


def attend(
    queries: Num[Array, "N heads T width"],
    keys: Num[Array, "N heads T width"],
    values: Num[Array, "N heads T d_head"],
) -> Num[Array, "N heads T d_head"]:
    """Return softmax(queries keysᵀ) values, in the dtype of the values.

    Scores, softmax and sums are computed in float32 for inputs of any precision.
    """
    dtype = factor_dtype(values.dtype)
    if has_fused_attention(dtype, queries.shape[-1]):
        mixed = _cudnn_attention(*(a.astype(dtype) for a in (queries, keys, values)))
        return mixed.astype(values.dtype)
    scores = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
    if not on_cpu():
        # One pass over the scores, where the lines below need two.
        weights = jax.nn.softmax(scores).astype(values.dtype)
        return jnp.matmul(weights, values, preferred_element_type=jnp.float32).astype(values.dtype)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # The softmax is normalised after the product: this divides d_head numbers per token, not T.
    return (mixed / weights.sum(-1, keepdims=True)).astype(values.dtype)


def factor_dtype(dtype: Dtype) -> Dtype:
    """Return the dtype of queries, keys and values of a layer that computes in `dtype`.

    A GPU that may round the factors of products to TF32 rounds these to float16, for cuDNN's
    attention. It has the same 10 bits of mantissa; numbers above 65,504 become infinite.
    """
    config: Any = jax.config  # settings have types in some versions of JAX only
    precision = config.jax_default_matmul_precision
    allows_tf32 = precision in (None, "default", "tensorfloat32")
    if jax.default_backend() == "gpu" and dtype == jnp.float32 and allows_tf32:
        return jnp.float16
    return dtype


def has_fused_attention(dtype: Dtype, width: int) -> bool:
    """Return whether cuDNN's flash attention takes queries and keys of this width.

    Its kernels exist for half precision only, for multiples of 8 up to 128.
    """
    is_half = dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and is_half and width % 8 == 0 and width <= 128


def _cudnn_attention(queries: Array, keys: Array, values: Array) -> Array:
    """Return the result of `attend` from cuDNN's flash attention."""
    # It expects [N, T, heads, width].
    queries, keys, values = (a.swapaxes(1, 2) for a in (queries, keys, values))
    mixed = jax.nn.dot_product_attention(queries, keys, values, scale=1.0, implementation="cudnn")
    return mixed.swapaxes(1, 2)
