"""The k-th largest number, exactly, by counting how many numbers reach a threshold.

Positive float32 numbers have the order of their bits read as integers, so that a search over
integers finds any of them in at most 31 rounds. k may be an array (one for each member), and counts
can be added up over tiles and devices, which sorting does not allow. On CPU this takes half the
time of `jax.lax.top_k` at k 16, and a quarter at k 64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minsae_jax.parallel.mesh import DATA, after, sum_devices

# Bits of the smallest normal float32 number; processors may treat smaller ones as 0.
SMALLEST = 0x00800000
# Numbers counted as one integer with three counts of 10 bits.
CHUNK = 512


def kth_largest(
    largest: Float[Array, "*rows"],
    k: Float[Array, "*rows"],
    count: Callable[[Float[Array, "*rows"]], Float[Array, "*rows"]],
) -> Float[Array, "*rows"]:
    """Return for each row the largest threshold t > 0 that at least k of its numbers reach.

    Of the positive numbers exactly the k largest are >= t, and all that equal the k-th; if fewer
    than k are positive, all of these. largest: of each row. count: from a threshold for each row to
    how many of its numbers are >= it.
    """

    def is_open(bracket: tuple[Array, Array]) -> Bool[Array, ""]:
        low, high = bracket
        return (high - low > 1).any()

    def halve(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        counts = count(_to_float(middle))
        enough = counts >= k
        # With exactly k numbers above it, `middle` separates them as the k-th itself would.
        high = jnp.where(counts == k, middle + 1, jnp.where(enough, high, middle))
        return jnp.where(enough, middle, low), high

    low = jnp.full(largest.shape, SMALLEST, jnp.int32)
    high = jnp.maximum(_to_bits(jnp.maximum(largest, 0)), low) + 1
    low, _ = jax.lax.while_loop(is_open, halve, (low, high))
    return _to_float(low)


def keep_largest(
    features: Float[Array, "d_sae tile"], k: Float[Array, ""]
) -> Float[Array, "d_sae tile"]:
    """Return features with all but the k largest of every token set to 0."""

    def count(threshold: Array) -> Array:
        return jnp.where(fixed >= threshold[None], 1.0, 0.0).sum(0)

    fixed = jax.lax.stop_gradient(features)
    rows = jnp.broadcast_to(k, features.shape[1:])
    threshold = kth_largest(fixed.max(0), rows, count)
    return jnp.where(fixed >= threshold[None], features, 0)


def kth_largest_of_batch(
    pre: Float[Array, "tiles d_sae tile"],
    k: Int[Array, ""],
    guess: Float[Array, ""],
) -> Float[Array, ""]:
    """Return a threshold t > 0 that exactly the k largest of all numbers reach.

    As `kth_largest`, over the numbers of all devices. Every round counts at three thresholds in one
    pass over memory: two close to where log count, interpolated, is that of k, and the middle. A
    good guess saves the first rounds; after them the bracket shrinks to a sixteenth in most.
    """

    class Bracket(NamedTuple):
        low: Array  # bits; at least k numbers reach it
        high: Array  # bits; fewer than k numbers reach it
        n_low: Array  # numbers that reach low
        n_high: Array

    def is_open(bracket: Bracket) -> Array:
        return bracket.high - bracket.low > 1

    def narrow(bracket: Bracket, thresholds: Int[Array, "3"]) -> Bracket:
        thresholds = jnp.clip(thresholds, bracket.low + 1, bracket.high - 1)
        counts = sum_devices(_count_reaching(pre, _to_float(thresholds)))
        enough = counts >= k
        low = jnp.where(enough, thresholds, bracket.low).max()
        high = jnp.where(enough, bracket.high, thresholds).min()
        n_low = jnp.where(enough, counts, bracket.n_low).min()
        n_high = jnp.where(enough, bracket.n_high, counts).max()
        # With exactly k numbers above it, low separates them as the k-th itself would.
        return Bracket(low, jnp.where(n_low == k, low + 1, high), n_low, n_high)

    def search(bracket: Bracket) -> Bracket:
        log_low = jnp.log(bracket.n_low.astype(jnp.float32))
        log_high = jnp.log(jnp.maximum(bracket.n_high.astype(jnp.float32), 0.5))
        share = (log_low - jnp.log(k.astype(jnp.float32))) / (log_low - log_high)
        width = bracket.high - bracket.low
        likely = bracket.low + (share * width.astype(jnp.float32)).astype(jnp.int32)
        margin = jnp.maximum(width // 32, 1)
        middle = bracket.low + width // 2
        return narrow(bracket, jnp.stack([likely - margin, likely + margin, middle]))

    n_numbers = jnp.int32(pre.size * jax.lax.axis_size(DATA))
    top = jax.lax.pmax(after(pre.max(), k), DATA)
    low = jnp.int32(SMALLEST)
    high = jnp.maximum(_to_bits(jnp.maximum(top, 0)), low) + 1
    bracket = Bracket(low, high, n_numbers, jnp.int32(0))
    around = _to_bits(jnp.stack([0.97 * guess, guess, 1.03 * guess]))
    bracket = jax.lax.while_loop(is_open, search, narrow(bracket, around))
    return _to_float(bracket.low)


def _count_reaching(
    pre: Float[Array, "tiles d_sae tile"], thresholds: Float[Array, "3"]
) -> Int[Array, "3"]:
    """Return how many numbers are >= each threshold, in one pass.

    The counts of a chunk take 10 bits each, so that three of them are added as one integer.
    """

    def add_tile(counts: Array, tile: Array) -> tuple[Array, None]:
        # Filled up with 0, which reaches no threshold.
        chunks = jnp.pad(tile.ravel(), (0, -tile.size % CHUNK)).reshape(-1, CHUNK)
        packed = jnp.zeros((), jnp.int32)
        for i in range(3):
            packed = packed + jnp.where(chunks >= thresholds[i], 1 << (10 * i), 0)
        sums = packed.sum(1)
        counts += jnp.stack([((sums >> (10 * i)) & 1023).sum() for i in range(3)])
        return counts, None

    # One tile after the other: XLA for CPU stores `packed`, which then fits the cache.
    return jax.lax.scan(add_tile, jnp.zeros(3, jnp.int32), pre)[0]


def _to_bits(x: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _to_float(bits: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
