"""Multi-head self-attention with residual scores (RealFormer, He et al. 2020)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

Dtype = Any  # jnp.float32 or jnp.bfloat16


class QueriesKeys(NamedTuple):
    """Scaled queries and keys of the layers so far, concatenated along their width."""

    queries: Num[Array, "N heads T width"]
    keys: Num[Array, "N heads T width"]


class Attention(nnx.Module):
    """Multi-head self-attention; the scores of earlier layers are added to this layer's scores."""

    def __init__(self, d_model: int, n_heads: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.n_heads = n_heads
        linear = partial(nnx.Linear, d_model, d_model, dtype=dtype, rngs=rngs)
        self.query = linear()
        self.key = linear()
        self.value = linear()
        self.out = linear()
        # A parameter, since the reference can train it.
        self.scale = nnx.Param(jnp.array((d_model // n_heads) ** -0.5))

    def __call__(
        self, x: Float[Array, "N T d_model"], earlier: QueriesKeys | None = None
    ) -> tuple[Float[Array, "N T d_model"], QueriesKeys]:
        """Return the output of the branch, and queries and keys for the next layer."""
        queries = self._split_heads(self.query(x))
        keys = self._split_heads(self.key(x))
        values = self._split_heads(self.value(x))
        queries = queries * self.scale[...].astype(queries.dtype)
        if earlier is not None:
            # RealFormer adds the score matrices of all layers before the softmax. A matrix product
            # of concatenated factors is the sum of the products:
            #     [Q₁ Q₂] [K₁ K₂]ᵀ = Q₁ K₁ᵀ + Q₂ K₂ᵀ
            # so layers hand on queries and keys, [T, width], and no score matrix, [T, T], is kept
            # beyond its layer.
            queries = jnp.concatenate([earlier.queries, queries], axis=-1)
            keys = jnp.concatenate([earlier.keys, keys], axis=-1)
        mixed = attend(queries, keys, values)
        merged_heads = mixed.swapaxes(1, 2).reshape(x.shape)
        return self.out(merged_heads), QueriesKeys(queries, keys)

    def _split_heads(self, x: Num[Array, "N T d_model"]) -> Num[Array, "N heads T d_head"]:
        return x.reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)


def attend(
    queries: Num[Array, "N heads T width"],
    keys: Num[Array, "N heads T width"],
    values: Num[Array, "N heads T d_head"],
) -> Num[Array, "N heads T d_head"]:
    """Return softmax(queries keysᵀ) values, in the dtype of the values.

    Scores, softmax and sums are computed in float32 for inputs of any precision.
    """
    if queries.dtype == jnp.bfloat16 and has_fused_attention(queries.shape[-1]):
        return _cudnn_attention(queries, keys, values)
    scores = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # The softmax is normalised after the product: this divides d_head numbers per token, not T.
    return (mixed / weights.sum(-1, keepdims=True)).astype(values.dtype)


def has_fused_attention(width: int) -> bool:
    """Return whether cuDNN's flash attention takes queries and keys of this width.

    Its kernels exist for half precision only, for multiples of 8 up to 128.
    """
    return jax.default_backend() == "gpu" and width % 8 == 0 and width <= 128


def _cudnn_attention(queries: Array, keys: Array, values: Array) -> Array:
    """Return the result of `attend` from cuDNN's flash attention."""
    # cuDNN requires values as wide as keys. With residual scores the keys of layer l are l + 1
    # heads wide, so the values are padded with zeros, and the padding is cut off the result.
    d_head = values.shape[-1]
    padding = keys.shape[-1] - d_head
    values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, padding)))
    # It expects [N, T, heads, width].
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    mixed = jax.nn.dot_product_attention(queries, keys, values, scale=1.0, implementation="cudnn")
    return mixed.swapaxes(1, 2)[..., :d_head]
