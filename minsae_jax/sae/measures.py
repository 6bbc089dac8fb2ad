"""Metrics of all members of a sweep on held-out tokens.

For tokens x with mean x̄, reconstructions x̂, residuals r = x̂ - x with mean r̄, features f, and ⟨·⟩
the mean over tokens:

    fvu                 Σ‖r‖² / Σ‖x - x̄‖², the fraction of variance unexplained
    explained_variance  1 - Σ‖r - r̄‖² / Σ‖x - x̄‖²; more than 1 - fvu if x̂ is off by a constant
    l0                  ⟨number of i with f_i > 0⟩
    l1                  ⟨penalty of the kind, without λ⟩; ReLU: Σ_i f_i ‖W_dec,i‖₂
    cosine              ⟨x·x̂ / (‖x‖ ‖x̂‖)⟩, 0 where either is 0
    norm_ratio          ⟨‖x̂‖ / ‖x‖⟩ over the tokens with ‖x‖ > 0
    dense_fraction      share of features with density > DENSE_THRESHOLD
    density             share of tokens with f_i > 0, for each feature

All but l1 are the same in any unit of x.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    fetch_late,
    map_first_axis,
    put_batch,
    replicated,
    sum_devices,
    tile_batch,
)
from minsae_jax.sae.kinds import Params, SAEKind

DENSE_THRESHOLD = 0.1  # share of tokens
Numbers = Array | np.ndarray


@dataclass(frozen=True)
class Measures:
    """Metrics of every member of a group; see the module's docstring."""

    fvu: Float[np.ndarray, " members"]
    explained_variance: Float[np.ndarray, " members"]
    l0: Float[np.ndarray, " members"]
    l1: Float[np.ndarray, " members"]
    cosine: Float[np.ndarray, " members"]
    norm_ratio: Float[np.ndarray, " members"]
    density: Float[np.ndarray, "members d_sae"]

    @property
    def dense_fraction(self) -> Float[np.ndarray, " members"]:
        return (self.density > DENSE_THRESHOLD).mean(1)


class TokenSums(NamedTuple):
    """Sums over the tokens of a batch."""

    tokens: Float[Numbers, ""]
    x: Float[Numbers, " d_model"]
    m2: Float[Numbers, ""]  # Σ‖x - mean of the batch‖²
    nonzero: Float[Numbers, ""]  # tokens with ‖x‖ > 0


class MemberSums(NamedTuple):
    """Sums over the tokens of a batch for one member."""

    residual: Float[Numbers, ""]  # Σ‖r‖²
    r: Float[Numbers, " d_model"]
    l1: Float[Numbers, ""]
    cosine: Float[Numbers, ""]
    norm_ratio: Float[Numbers, ""]
    active: Int[Numbers, " d_sae"]


def measure(
    mesh: Mesh,
    kinds: Sequence[SAEKind],
    groups: Sequence[Params],
    batches: Iterable[np.ndarray],
    scale: float = 1.0,
) -> list[Measures]:
    """Return the metrics of groups of members on scale * x.

    groups: for each kind parameters with a leading member axis, split over `sweep`. batches:
    [tokens, d_model], none with more tokens than the first. Sums over batches are float64.
    """
    n_features = max(
        math.prod(params["W_dec"].shape[:-1]) // mesh.shape[SWEEP] for params in groups
    )

    def run_batches() -> Iterator[tuple[TokenSums, list[MemberSums]]]:
        tiling = None
        for x in batches:
            if tiling is None:
                # All are padded to the shape of the first, so that there is one compilation.
                tiling = tile_batch(mesh, len(x), n_features)
            rows = put_batch(mesh, x, tiling[0] * tiling[1])
            run = batch_program(mesh, tuple(kinds), tiling[0])
            yield run(list(groups), rows, np.float32(scale), np.int32(len(x)))

    token_total: TokenSums | None = None
    member_totals: list[MemberSums] = []
    for sums in fetch_late(run_batches()):
        token_sums, member_sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        if token_total is None:
            token_total = token_sums
            member_totals = member_sums
        else:
            token_total = _merge(token_total, token_sums)
            member_totals = jax.tree.map(np.add, member_totals, member_sums)
    assert token_total, "there are no tokens"
    return [_means(token_total, sums) for sums in member_totals]


def _merge(a: TokenSums, b: TokenSums) -> TokenSums:
    """Merge the sums of two sets of tokens (Chan, Golub & LeVeque 1983)."""
    shift = b.x / b.tokens - a.x / a.tokens
    between = np.square(shift).sum() * a.tokens * b.tokens / (a.tokens + b.tokens)
    return TokenSums(
        tokens=a.tokens + b.tokens,
        x=a.x + b.x,
        m2=a.m2 + b.m2 + between,
        nonzero=a.nonzero + b.nonzero,
    )


def _means(token_sums: TokenSums, sums: MemberSums) -> Measures:
    n_tokens = float(token_sums.tokens)
    # NaN where a measure is undefined: all tokens are 0, or all are equal.
    n_nonzero = float(token_sums.nonzero) or np.nan
    variance = float(token_sums.m2) or np.nan
    # Σ‖r - r̄‖² = Σ‖r‖² - ‖Σr‖² / n
    centred_residual = sums.residual - np.square(sums.r).sum(-1) / n_tokens
    active = np.asarray(sums.active)
    return Measures(
        fvu=np.asarray(sums.residual / variance),
        explained_variance=np.asarray(1 - centred_residual / variance),
        l0=active.sum(-1) / n_tokens,
        l1=np.asarray(sums.l1 / n_tokens),
        cosine=np.asarray(sums.cosine / n_tokens),
        norm_ratio=np.asarray(sums.norm_ratio / n_nonzero),
        density=active / n_tokens,
    )


@lru_cache
def batch_program(mesh: Mesh, kinds: tuple[SAEKind, ...], n_tiles: int) -> Callable:
    """Return the jitted (groups, rows, scale, n_tokens) -> (TokenSums, [MemberSums]).

    The first n_tokens of the rows are tokens.
    """

    def on_one_device(
        groups: list[Params], x: Array, is_token: Array
    ) -> tuple[TokenSums, list[MemberSums]]:
        tiles = x.reshape(n_tiles, -1, x.shape[1])
        mask = is_token.reshape(n_tiles, -1)
        members = []
        for kind, group in zip(kinds, groups, strict=True):
            members.append(map_first_axis(partial(_member_sums, kind, tiles, mask), group))
        # Padding is 0, so that it does not count in the sum of x.
        n_tokens, sum_x = sum_devices((is_token.sum(), x.sum(0)))
        # But x - mean is not 0 on padding, so it is masked.
        m2 = (jnp.square(x - sum_x[None] / n_tokens).sum(1) * is_token).sum()
        nonzero = (jnp.square(x).sum(1) > 0).sum(dtype=jnp.float32)
        m2, nonzero, members = sum_devices((m2, nonzero, members))
        return TokenSums(n_tokens, sum_x, m2, nonzero), members

    def run(
        groups: list[Params], x: Array, scale: Array, n_tokens: Array
    ) -> tuple[TokenSums, list[MemberSums]]:
        is_token = (jnp.arange(len(x)) < n_tokens).astype(jnp.float32)
        sums = jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(P(SWEEP), P(DATA), P(DATA)),
            out_specs=(P(), P(SWEEP)),
            check_vma=False,
        )
        with jax.default_matmul_precision("highest"):
            return sums(groups, x.astype(jnp.float32) * scale, is_token)

    return jax.jit(run, out_shardings=replicated(mesh))


def _member_sums(
    kind: SAEKind,
    x: Float[Array, "tiles tile d_model"],
    is_token: Float[Array, "tiles tile"],
    params: Params,
) -> MemberSums:
    def add_tile(sums: MemberSums, tile: tuple[Array, Array]) -> tuple[MemberSums, None]:
        x, mask = tile
        # Biases can activate features on padding.
        features = kind.encode(params, x) * mask[:, None]
        x_hat = kind.decode(params, features)
        r = (x_hat - x) * mask[:, None]
        norm = jnp.linalg.norm(x, axis=1)
        norm_hat = jnp.linalg.norm(x_hat, axis=1)
        norm_product = norm * norm_hat
        cosine = jnp.where(norm_product > 0, (x * x_hat).sum(1) / norm_product, 0) * mask
        norm_ratio = jnp.where(norm > 0, norm_hat / norm, 0) * mask
        tile_sums = MemberSums(
            residual=jnp.square(r).sum(),
            r=r.sum(0),
            l1=kind.penalty(params, features).sum(),
            cosine=cosine.sum(),
            norm_ratio=norm_ratio.sum(),
            active=(features > 0).sum(0, dtype=jnp.int32),
        )
        return jax.tree.map(jnp.add, sums, tile_sums), None

    d_sae, d_model = params["W_dec"].shape
    zero = jnp.zeros(())
    start = MemberSums(
        residual=zero,
        r=jnp.zeros(d_model),
        l1=zero,
        cosine=zero,
        norm_ratio=zero,
        active=jnp.zeros(d_sae, jnp.int32),
    )
    return jax.lax.scan(add_tile, start, (x, is_token))[0]
