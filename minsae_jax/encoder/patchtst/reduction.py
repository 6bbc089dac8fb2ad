"""Attention in float32 as one reduction over keys, for GPUs.

XLA for GPU writes the result of every matrix product to memory, and in float32 has no attention
without score matrices, which would be more than half of the encoder's memory traffic. A reduction
is one launch, which also computes everything elementwise that it reads. So here scores are not a
matrix product but a sum over the head's dimensions, and go from there into the sums over keys
without being written. benchmarks/CUDA.md lists the savings and costs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.encoder.linear import Dtype

# XLA (jaxlib 0.10) lets one thread sum over all keys if there are at most 255 and an axis of one or
# two elements follows them. So the last axis of the queries has this size. Otherwise threads share
# the keys of a query, and the products of queries and keys are written to memory after all.
LAST_QUERIES = 2
MAX_TOKENS = 255
# Groups of queries: a thread computes one query of each, for which it loads keys and values once.
GROUPS = 2
# With wider heads or more layers, the instructions would take longer than writing score matrices.
MAX_WIDTH = 64
# Largest score of no key. The difference of two of them must not be NaN, as that of -inf is.
LOWEST_SCORE = float(jnp.finfo(jnp.float32).min)


class Sums(NamedTuple):
    """Sums over some of the keys, for every query; weights are exp(score - largest score)."""

    largest_score: Array
    weights: Array
    weighted_values: tuple[Array, ...]  # for each dimension of the head


def fits_reduction(
    dtype: Dtype, n_sequences: int, n_tokens: int, d_head: int, n_layers: int
) -> bool:
    """Return whether to use `attend_by_reduction`, for scores that are sums over n_layers."""
    # Evaluation maps over single sequences, and XLA (jaxlib 0.10) then fails to compile the
    # product after this attention.
    is_extraction = n_sequences > 1
    # For each dimension of a head, sums of values take about as many instructions as the scores of
    # two layers.
    is_small = n_tokens <= MAX_TOKENS and d_head * (n_layers + 2) <= MAX_WIDTH
    is_gpu = jax.default_backend() == "gpu"
    return is_gpu and dtype == jnp.float32 and is_extraction and is_small


def attend_by_reduction(
    queries: Sequence[Float[Array, "heads d_head N T"]],
    keys: Sequence[Float[Array, "heads d_head N T"]],
    values: Float[Array, "heads d_head N T"],
) -> Float[Array, "heads d_head N T"]:
    """Return softmax(scores) values, where scores are queriesᵀ keys, summed over the layers.

    queries, keys: of each layer.
    """
    heads, d_head, n_sequences, n_tokens = values.shape
    groups_by_layer = [_query_groups(q) for q in queries]
    values_by_dimension = [values[:, d] for d in range(d_head)]
    groups = zip(*groups_by_layer, strict=True)
    each_key = [_sums_of_each_key(group, keys, values_by_dimension) for group in groups]

    zero = jnp.zeros((), jnp.float32)
    no_key = Sums(jnp.full((), LOWEST_SCORE, jnp.float32), zero, (zero,) * d_head)
    over_keys = jax.lax.reduce(each_key, [no_key] * GROUPS, _add, dimensions=(3,))

    # The barrier keeps XLA from computing the reduction again for every dimension of the result.
    means = [
        [weighted / sums.weights for weighted in sums.weighted_values]
        for sums in jax.lax.optimization_barrier(over_keys)
    ]
    all_queries = [
        jnp.concatenate([mean.reshape(heads, n_sequences, -1) for mean in of_groups], axis=-1)
        for of_groups in zip(*means, strict=True)
    ]
    return jnp.stack(all_queries, axis=1)[..., :n_tokens]


def _query_groups(
    queries: Float[Array, "heads d_head N T"],
) -> list[Float[Array, "heads d_head N blocks 1 last"]]:
    """Return the groups of queries, padded to equal size, with an axis for the keys."""
    n_padding = -queries.shape[-1] % (GROUPS * LAST_QUERIES)
    padded = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, n_padding)))
    shape = (*queries.shape[:-1], -1, 1, LAST_QUERIES)
    groups = [group.reshape(shape) for group in jnp.split(padded, GROUPS, axis=-1)]
    # Without the barrier, the reduction would pad again for every key.
    return jax.lax.optimization_barrier(groups)


def _sums_of_each_key(
    queries: Sequence[Float[Array, "heads d_head N blocks 1 last"]],
    keys: Sequence[Float[Array, "heads d_head N T"]],
    values_by_dimension: Sequence[Float[Array, "heads N T"]],
) -> Sums:
    """Return the sums over every key alone, as arrays of [heads, N, blocks, T, last]."""
    # Without the barrier, XLA would compute the products of all groups together and write them.
    queries, keys = jax.lax.optimization_barrier((list(queries), list(keys)))
    by_layer = zip(queries, keys, strict=True)
    products = [q * k[:, :, :, None, :, None] for q, k in by_layer]
    scores = sum(products[1:], start=products[0]).sum(1)
    values = [
        jnp.broadcast_to(value[:, :, None, :, None], scores.shape) for value in values_by_dimension
    ]
    return Sums(scores, jnp.ones_like(scores), tuple(values))


def _add(some: list[Sums], others: list[Sums]) -> list[Sums]:
    """Return the sums over two sets of keys together, for each group of queries."""
    return [_add_sums(a, b) for a, b in zip(some, others, strict=True)]


def _add_sums(a: Sums, b: Sums) -> Sums:
    # As in flash attention (Dao et al. 2022), the weights of the set with the smaller largest score
    # are scaled to the larger one.
    difference = a.largest_score - b.largest_score
    scale = jnp.exp(-jnp.abs(difference))
    scale_a = jnp.where(difference > 0, 1, scale)
    scale_b = jnp.where(difference > 0, scale, 1)
    by_dimension = zip(a.weighted_values, b.weighted_values, strict=True)
    return Sums(
        jnp.maximum(a.largest_score, b.largest_score),
        a.weights * scale_a + b.weights * scale_b,
        tuple(value_a * scale_a + value_b * scale_b for value_a, value_b in by_dimension),
    )
