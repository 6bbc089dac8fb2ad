"""Measures of autoencoders on tokens that they were not trained on, all members side by side.

Over tokens x with mean x̄, reconstructions x̂, residuals r = x̂ - x with mean r̄, features f, and ⟨·⟩ the mean over tokens:

    fvu                 Σ‖r‖² / Σ‖x - x̄‖²        the share of variance that is not explained
    explained_variance  1 - Σ‖r - r̄‖² / Σ‖x - x̄‖²        more than 1 - fvu where x̂ is off by a constant
    l0                  ⟨number of i with f_i > 0⟩
    l1                  ⟨Σ_i f_i ‖W_dec_i‖₂⟩
    cosine              ⟨x·x̂ / (‖x‖ ‖x̂‖)⟩, 0 where either is 0
    norm_ratio          ⟨‖x̂‖ / ‖x‖⟩ over the tokens with ‖x‖ > 0
    dense_fraction      share of features with density > DENSE; a feature's density is the share of tokens with f_i > 0

All but l1 are the same in any unit of x.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minsae_jax.parallel.mesh import (
    DATA,
    SWEEP,
    map_members,
    put_batch,
    replicated,
    shard_over_members_and_batch,
    tile_batch,
)
from minsae_jax.sae import member as model
from minsae_jax.sae.member import Params

DENSE = 0.1  # of the tokens
Numbers = Array | np.ndarray


@dataclass(frozen=True)
class Measures:
    """Of every member of a group; see above."""

    fvu: Float[np.ndarray, " members"]
    explained_variance: Float[np.ndarray, " members"]
    l0: Float[np.ndarray, " members"]
    l1: Float[np.ndarray, " members"]
    cosine: Float[np.ndarray, " members"]
    norm_ratio: Float[np.ndarray, " members"]
    density: Float[np.ndarray, "members d_sae"]

    @property
    def dense_fraction(self) -> Float[np.ndarray, " members"]:
        return (self.density > DENSE).mean(1)


class TokenSums(NamedTuple):
    """Of the tokens of a batch."""

    tokens: Float[Numbers, ""]
    x: Float[Numbers, " d_model"]
    m2: Float[Numbers, ""]  # Σ‖x - mean of the batch‖²
    nonzero: Float[Numbers, ""]  # tokens with ‖x‖ > 0


class MemberSums(NamedTuple):
    """Of one member on the tokens of a batch."""

    residual: Float[Numbers, ""]  # Σ‖r‖²
    r: Float[Numbers, " d_model"]
    l1: Float[Numbers, ""]
    cosine: Float[Numbers, ""]
    norm_ratio: Float[Numbers, ""]
    active: Int[Numbers, " d_sae"]


def measure(
    mesh: Mesh, groups: list[Params], batches: Iterable[np.ndarray], scale: float = 1.0
) -> list[Measures]:
    """Measures on scale * x of groups of members, whose parameters have a leading member axis that lies along `sweep`.

    Batches are [tokens, d_model], none of more tokens than the first. Sums are added up over batches in float64.
    """
    total: tuple[TokenSums, list[MemberSums]] | None = None
    features = max(g["b_enc"].size // mesh.shape[SWEEP] for g in groups)
    pieces = None
    for x in batches:
        pieces = pieces or tile_batch(
            mesh, len(x), features
        )  # of the first: the others are no longer
        rows = put_batch(mesh, x, pieces[0] * pieces[1])
        sums = _batch(mesh, pieces[0])(groups, rows, np.float32(scale), np.int32(len(x)))
        here = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(sums))
        total = (
            (_merged(total[0], here[0]), jax.tree.map(np.add, total[1], here[1])) if total else here
        )
    assert total, "there are no tokens"
    tokens, members = total
    return [_measures(tokens, sums) for sums in members]


def _merged(a: TokenSums, b: TokenSums) -> TokenSums:
    """Two batches as one (Chan et al. 1983)."""
    shift = b.x / b.tokens - a.x / a.tokens
    between = np.square(shift).sum() * a.tokens * b.tokens / (a.tokens + b.tokens)
    return TokenSums(a.tokens + b.tokens, a.x + b.x, a.m2 + b.m2 + between, a.nonzero + b.nonzero)


def _measures(tokens: TokenSums, sums: MemberSums) -> Measures:
    residual, r, l1, cosine, norm_ratio, active = map(np.asarray, sums)
    n, variance = float(tokens.tokens), float(tokens.m2) or np.nan
    return Measures(
        fvu=residual / variance,
        explained_variance=1 - (residual - np.square(r).sum(-1) / n) / variance,
        l0=active.sum(-1) / n,
        l1=l1 / n,
        cosine=cosine / n,
        norm_ratio=norm_ratio / (float(tokens.nonzero) or np.nan),
        density=active / n,
    )


@lru_cache
def _batch(mesh: Mesh, pieces: int):
    """The jitted (groups, rows, scale, tokens) -> (TokenSums, [MemberSums]), of which the first `tokens` rows count."""

    def on_one_device(groups: list[Params], rows: tuple[Array, Array]):
        x, is_token = rows
        cut, mask = x.reshape(pieces, -1, x.shape[1]), is_token.reshape(pieces, -1)
        members = [map_members(lambda p: _member_sums(p, cut, mask), group) for group in groups]
        n, sum_x = jax.lax.psum((is_token.sum(), x.sum(0)), DATA)  # padding is 0
        m2 = (jnp.square(x - sum_x[None] / n).sum(1) * is_token).sum()
        nonzero = (jnp.square(x).sum(1) > 0).sum(dtype=jnp.float32)
        members, m2, nonzero = jax.lax.psum((members, m2, nonzero), DATA)
        return members, TokenSums(n, sum_x, m2, nonzero)

    def run(
        groups: list[Params], x: Array, scale: Array, tokens: Array
    ) -> tuple[TokenSums, list[MemberSums]]:
        rows = (x.astype(jnp.float32) * scale, (jnp.arange(len(x)) < tokens).astype(jnp.float32))
        with jax.default_matmul_precision("highest"):
            members, of_tokens = shard_over_members_and_batch(mesh, on_one_device)(groups, rows)
        return of_tokens, members

    return jax.jit(run, out_shardings=replicated(mesh))


def _member_sums(
    params: Params, x: Float[Array, "pieces piece d_model"], is_token: Float[Array, "pieces piece"]
) -> MemberSums:
    norm_dec = jnp.linalg.norm(params["W_dec"], axis=1)

    def add(sums: MemberSums, piece: tuple[Array, Array]) -> tuple[MemberSums, None]:
        x, mask = piece
        f = model.encode(params, x) * mask[:, None]
        x_hat = model.decode(params, f)
        r = (x_hat - x) * mask[:, None]
        norm, norm_hat = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(x_hat, axis=1)
        product = norm * norm_hat
        cosine = jnp.where(product > 0, (x * x_hat).sum(1) / product, 0) * mask
        ratio = jnp.where(norm > 0, norm_hat / norm, 0) * mask
        active = (f > 0).sum(0, dtype=jnp.int32)
        here = MemberSums(
            jnp.square(r).sum(), r.sum(0), (f @ norm_dec).sum(), cosine.sum(), ratio.sum(), active
        )
        return jax.tree.map(jnp.add, sums, here), None

    d_sae, d_model = params["W_dec"].shape
    zero, none = jnp.zeros(()), jnp.zeros(d_sae, jnp.int32)
    return jax.lax.scan(
        add, MemberSums(zero, jnp.zeros(d_model), zero, zero, zero, none), (x, is_token)
    )[0]
