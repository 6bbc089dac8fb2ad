"""Attention of a head of a sequence in one kernel, which writes no scores to memory.

For NVIDIA GPUs, by Pallas and Triton, and only with MINSAE_ATTENTION=triton in the environment: it
has been compiled and compared on a CPU, but not been timed on a GPU yet. JAX deprecates the Triton
backend of Pallas.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

# A program keeps the scores of all tokens with all tokens in registers.
MAX_TOKENS = 128
MAX_HEAD = 64
# Triton's products are at least this wide.
MIN_WIDTH = 16


def is_chosen(n_sequences: int, n_tokens: int, d_head: int) -> bool:
    """Return whether to use the kernel: on request, for many sequences of a size that fits."""
    fits = n_tokens <= MAX_TOKENS and d_head <= MAX_HEAD
    is_requested = os.environ.get("MINSAE_ATTENTION") == "triton"
    return is_requested and jax.default_backend() == "gpu" and fits and n_sequences > 1


def attend_in_kernel(
    queries: Sequence[Num[Array, "N T d_model"]],
    keys: Sequence[Num[Array, "N T d_model"]],
    values: Num[Array, "N T d_model"],
    n_heads: int,
    interpret: bool = False,
) -> Num[Array, "N T d_model"]:
    """Return softmax(Σ queries keysᵀ) values for every head, in the dtype of the values.

    queries, keys: of all layers whose scores are added. Products of float32 are exact, and sums
    are float32. interpret: run on a CPU, slowly.
    """
    # Imported here, since it takes half a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    n_sequences, _, d_model = values.shape
    arrays = (*queries, *keys, values)
    return pl.pallas_call(
        partial(_attend_head, n_layers=len(queries), d_head=d_model // n_heads),
        grid=(n_sequences, n_heads),
        in_specs=[in_memory] * len(arrays),
        out_specs=in_memory,
        out_shape=jax.ShapeDtypeStruct(values.shape, values.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*arrays)


def _attend_head(*refs: Any, n_layers: int, d_head: int) -> None:
    """Compute one head of one sequence.

    refs: queries and keys of the layers, values and result; each [N, T, d_model], in memory.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *factors, values, result = refs
    n_tokens = values.shape[1]
    # Blocks are powers of 2; what lies beyond the tokens and the head is read as 0.
    n_rows = pl.next_power_of_2(n_tokens)
    width = max(MIN_WIDTH, pl.next_power_of_2(d_head))
    is_token = jnp.arange(n_rows) < n_tokens
    columns = jnp.arange(width)
    mask = is_token[:, None] & (columns < d_head)[None]
    sequence, head = pl.program_id(0), pl.program_id(1)
    place = (sequence, jnp.arange(n_rows)[:, None], (head * d_head + columns)[None])
    product = partial(triton.dot, precision=jax.lax.Precision.HIGHEST)

    def read(ref: Any) -> Array:
        return triton.load(ref.at[place], mask=mask, other=0)

    scores = jnp.zeros((n_rows, n_rows), jnp.float32)
    for queries, keys in zip(factors[:n_layers], factors[n_layers:], strict=True):
        scores += product(read(queries), read(keys), trans_b=True)
    scores = jnp.where(is_token[None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(1, keepdims=True))
    mixed = product(weights.astype(values.dtype), read(values)) / weights.sum(1, keepdims=True)
    triton.store(result.at[place], mixed.astype(result.dtype), mask=mask)
