"""Multi-head self-attention with residual scores (RealFormer, He et al. 2020)."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from minsae_jax.encoder.attention import attend, factor_dtype, has_fused_attention
from minsae_jax.encoder.linear import (
    Dtype,
    bias_of,
    linear,
    linear_from_tokens_last,
    linear_to_tokens_last,
    product,
    unmerged,
)
from minsae_jax.encoder.patchtst.reduction import attend_by_reduction, fits_reduction
from minsae_jax.parallel.mesh import materialize


class QueriesKeys(NamedTuple):
    """Scaled queries and keys of a layer.

    [N, heads, T, d_head], or [heads, d_head, N, T] for `attend_by_reduction`.
    """

    queries: Num[Array, "_ _ _ _"]
    keys: Num[Array, "_ _ _ _"]


class Attention(nnx.Module):
    """Multi-head self-attention; the scores of earlier layers are added to this layer's scores.

    n_summed: layers whose scores are added in the last layer.
    """

    def __init__(self, d_model: int, n_heads: int, n_summed: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.n_heads = n_heads
        self.n_summed = n_summed
        projection = partial(nnx.Linear, d_model, d_model, dtype=dtype, rngs=rngs)
        self.query = projection()
        self.key = projection()
        self.value = projection()
        self.out = projection()
        # A parameter, since the reference can train it.
        self.scale = nnx.Param(jnp.array((d_model // n_heads) ** -0.5))

    def __call__(
        self, x: Float[Array, "N T d_model"], earlier: tuple[QueriesKeys, ...] = ()
    ) -> tuple[Float[Array, "N T d_model"], tuple[QueriesKeys, ...]]:
        """Return the output of the branch, and queries and keys of all layers for the next one."""
        dtype = factor_dtype(self.query.dtype)
        n_sequences, n_tokens, d_model = x.shape
        if fits_reduction(dtype, n_sequences, n_tokens, d_model // self.n_heads, self.n_summed):
            return self._attend_by_reduction(x, earlier)
        x = x.astype(self.query.dtype)
        queries = linear(self.query, x, self._scaled, dtype)
        keys = linear(self.key, unmerged(x, queries), dtype=dtype)
        x = unmerged(x, keys)
        layers = (*earlier, QueriesKeys(self._split_heads(queries), self._split_heads(keys)))
        # RealFormer adds the score matrices of all layers before the softmax. A matrix product of
        # concatenated factors is the sum of the products:
        #     [Q₁ Q₂] [K₁ K₂]ᵀ = Q₁ K₁ᵀ + Q₂ K₂ᵀ
        # so layers hand on queries and keys, [T, d_head], and no score matrix, [T, T], is kept
        # beyond its layer.
        queries = jnp.concatenate([layer.queries for layer in layers], axis=-1)
        keys = jnp.concatenate([layer.keys for layer in layers], axis=-1)
        if earlier and has_fused_attention(dtype, keys.shape[-1]):
            return self._attend_padded(x, queries, keys), layers
        values = self._split_heads(linear(self.value, x, dtype=dtype))
        merged_heads = attend(queries, keys, values).swapaxes(1, 2).reshape(x.shape)
        return linear(self.out, merged_heads), layers

    def _scaled(self, queries: Array) -> Array:
        return queries * self.scale[...].astype(queries.dtype)

    def _attend_by_reduction(
        self, x: Float[Array, "N T d_model"], earlier: tuple[QueriesKeys, ...]
    ) -> tuple[Float[Array, "N T d_model"], tuple[QueriesKeys, ...]]:
        """Return the result of `__call__`; no score matrix is written to memory."""

        def split_heads(y: Float[Array, "d_model N T"]) -> Float[Array, "heads d_head N T"]:
            return y.reshape(self.n_heads, -1, *y.shape[1:])

        queries = split_heads(linear_to_tokens_last(self.query, x, self._scaled))
        keys = split_heads(linear_to_tokens_last(self.key, x))
        values = split_heads(linear_to_tokens_last(self.value, x))
        layers = (*earlier, QueriesKeys(queries, keys))
        all_queries = [layer.queries for layer in layers]
        all_keys = [layer.keys for layer in layers]
        mixed = attend_by_reduction(all_queries, all_keys, values)
        merged_heads = mixed.reshape(-1, *mixed.shape[2:])
        return linear_from_tokens_last(self.out, merged_heads), layers

    def _attend_padded(
        self,
        x: Float[Array, "N T d_model"],
        queries: Num[Array, "N heads T width"],
        keys: Num[Array, "N heads T width"],
    ) -> Float[Array, "N T d_model"]:
        """Return the output of the branch from cuDNN's attention, for keys wider than a head.

        cuDNN requires values as wide as keys. Zeros are added to the weights of the values and to
        those that read them, so that no pass over the tokens is needed for it.
        """
        d_model = x.shape[2]
        padding = (0, keys.shape[-1] - d_model // self.n_heads)
        value_kernel = self.value.kernel[...].reshape(d_model, self.n_heads, -1)
        value_kernel = jnp.pad(value_kernel, ((0, 0), (0, 0), padding)).reshape(d_model, -1)
        values = materialize(product(x, value_kernel, self.value.dtype).astype(keys.dtype))
        mixed = attend(queries, keys, self._split_heads(values)).swapaxes(1, 2)
        out_kernel = self.out.kernel[...].reshape(self.n_heads, -1, d_model)
        out_kernel = jnp.pad(out_kernel, ((0, 0), padding, (0, 0))).reshape(-1, d_model)
        merged_heads = mixed.reshape(*x.shape[:2], -1)
        branch = product(merged_heads, out_kernel, self.out.dtype)
        # The weights of attention sum to 1: the bias of the values reaches every token unchanged.
        bias = bias_of(self.value) @ self.out.kernel[...] + bias_of(self.out)
        return materialize(branch.astype(self.out.dtype)).astype(bias.dtype) + bias[None, None]

    def _split_heads(self, x: Num[Array, "N T d_model"]) -> Num[Array, "N heads T d_head"]:
        return x.reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)
