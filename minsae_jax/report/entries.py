"""The active entries of a batch of features, as lists on the host.

Few features are active on a token. The device sends one bit for each entry, and then the values of
those that are not 0, so that the dense features [tokens, d_sae] never leave it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from minsae_jax.parallel.mesh import on_cpu
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.padding import pad_rows, power_of_two

WORD = 32  # bits
ENCODE_TILE = 256  # tokens, a multiple of WORD
EDGES = np.geomspace(1e-4, 1e4, 8 * 8 + 1)  # of the activation histogram
# The smallest float32 numbers that are not below them.
_ROUNDED = EDGES.astype(np.float32)
_NEXT = np.nextafter(_ROUNDED, np.float32(np.inf))
_EDGES_32 = np.where(_ROUNDED < EDGES, _NEXT, _ROUNDED)


@dataclass(frozen=True)
class ActiveEntries:
    """The entries of a batch's features [rows, d_sae] that are not 0; a row is a token.

    Those of a feature are in the order of their rows.
    """

    row: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    # Index of the bin between EDGES; the outer bins contain those beyond
    histogram_bin: Int[np.ndarray, " n"]


def encode_padded(
    sae: SparseAutoencoder, tokens: Float[np.ndarray, "tokens d_model"], n_rows: int
) -> Float[Array, "rows d_sae"]:
    """Return the features of tokens, with those of padding after them.

    rows: n_rows rounded up to a multiple of ENCODE_TILE.
    """
    rows = pad_rows(tokens, n_rows + -n_rows % ENCODE_TILE)
    with jax.default_matmul_precision("highest"):
        return _encode(sae.kind, sae.params, rows)


@partial(jax.jit, static_argnums=0)
def _encode(
    kind: SAEKind, params: Params, rows: Float[Array, "rows d_model"]
) -> Float[Array, "rows d_sae"]:
    if not on_cpu():
        return kind.encode(params, rows)
    # Biases and thresholds are applied while a tile is in the cache: two thirds of the time.
    tiles = rows.reshape(-1, ENCODE_TILE, rows.shape[1])
    features = jax.lax.map(partial(kind.encode, params), tiles)
    return features.reshape(len(rows), -1)


@jax.jit
def _active_bits(features: Float[Array, "rows d_sae"]) -> UInt32[Array, "words d_sae"]:
    """Return a bit for each entry that is not 0, in words of WORD rows."""
    is_active = features.reshape(-1, WORD, features.shape[1]) > 0
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    words = jnp.where(is_active, bit[None, :, None], jnp.uint32(0))
    return words.sum(axis=1, dtype=jnp.uint32)


def active_entries(
    sae: SparseAutoencoder, x: Float[np.ndarray, "n n_tokens d_model"], sequences: int
) -> ActiveEntries:
    """Encode sequences of tokens, and return the entries that are not 0.

    sequences: to which x is padded, so that all batches have one shape.
    """
    n_sequences, n_tokens, d_model = x.shape
    features = encode_padded(sae, x.reshape(-1, d_model), sequences * n_tokens)
    # Compiled separately, since XLA for CPU would repeat the product for the sum.
    bits = np.asarray(_active_bits(features))
    d_sae = bits.shape[1]
    words = bits.ravel()
    place = np.flatnonzero(words)
    words = words[place]
    # Little-endian bytes, so that bits come in the order of their tokens.
    flags = np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little")
    bit = np.flatnonzero(flags.view(bool)).astype(np.int32) & (WORD - 1)
    word, feature = np.divmod(place.astype(np.int32), np.int32(d_sae))
    counts = np.bitwise_count(words)
    row = np.repeat(word * WORD, counts) + bit
    feature = np.repeat(feature, counts)
    is_token = np.flatnonzero(row < n_sequences * n_tokens)
    row = row[is_token]
    feature = feature[is_token]
    n_entries = len(row)
    flat = row * np.int32(d_sae) + feature
    value, histogram_bin = _take(features, pad_rows(flat, power_of_two(n_entries)))
    return ActiveEntries(
        row=row,
        feature=feature,
        value=np.asarray(value)[:n_entries],
        histogram_bin=np.asarray(histogram_bin)[:n_entries],
    )


@jax.jit
def _take(
    features: Float[Array, "rows d_sae"], flat: Int[Array, " n"]
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Return the features at places of the flat array, and their bins between EDGES."""
    value = features.ravel()[flat]
    # Without a loop over the edges, this is a single pass over the values.
    n_reached = sum((value >= edge).astype(jnp.int32) for edge in _EDGES_32[1:-1])
    return value, n_reached
