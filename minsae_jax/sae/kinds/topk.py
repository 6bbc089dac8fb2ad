"""TopK: of every token's positive pre-activations the k largest are its features (Gao et al. 2024).

    x̂ = TopK(relu(x W_enc + b_enc)) W_dec + b_dec,    loss = mse + AuxK

Decoder rows have norm 1. Where fewer than k pre-activations are positive, fewer features are
active. The same rule applies in training and afterwards.

On CPU, where d_sae is far above k, only the encoder's product is over all features. x̂ and the
gradients of both maps are computed from the rows of the active ones.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import on_cpu
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.kinds.base import Batch, BatchContext, HyperArrays, Objective, Params
from minsae_jax.sae.kinds.linear import Activated, LinearSAE, LinearSums, Vectors
from minsae_jax.sae.kinds.products import Weights, product
from minsae_jax.sae.kinds.select import keep_largest

# Tokens that `encode` selects from at once on CPU, or fewer: features of over 4 MB do not fit the
# cache.
ENCODE_TILE = 256
LEAST_TILE = 64
TILE_FEATURES = 2**20


def encode_tile_tokens(d_sae: int) -> int:
    """Return how many tokens `encode` selects from at once on CPU, a divisor of ENCODE_TILE."""
    tile = ENCODE_TILE
    while tile > LEAST_TILE and tile * d_sae > TILE_FEATURES:
        tile //= 2
    return tile


@dataclass(frozen=True)
class TopK(LinearSAE):
    """k_max: at least every member's k, if known; needed for the products of active rows only."""

    k_max: int | None = None

    # Of d_sae to k_max, from which on rows are taken. Measured at k 32: loss and gradients take 0.8
    # of the dense time at a ratio of 32, 0.4 at 128 and 0.2 at 512.
    min_ratio: ClassVar[int] = 64
    name = "topk"
    sparsity_name = "k"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec", "k")
    starts_at_median = True
    unit_decoder = True
    selects = True

    @property
    def settings(self) -> dict[str, Any]:
        # k_max is about speed only.
        return {}

    def for_run(self, config: TrainConfig, d_model: int) -> "TopK":
        fractions = [k for k in config.k if k % 1]
        if fractions:
            raise UserError(f"--kind topk requires whole numbers of --k, got {fractions[0]:g}")
        return TopK(k_max=math.ceil(max(config.k)))

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(d_model, d_sae) | {"k": ()}

    def with_hyper(self, params: Params, hyper: HyperArrays) -> Params:
        return params | {"k": hyper["k"]}

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        def encode_tile(x: Float[Array, "tile d_model"]) -> Float[Array, "tile d_sae"]:
            features = jax.nn.relu(self.pre_activations(params, x))
            return keep_largest(features.T, params["k"]).T

        tokens = x.reshape(-1, x.shape[-1])
        n_tokens = len(tokens)
        d_sae = params["W_enc"].shape[1]
        tile = encode_tile_tokens(d_sae) if on_cpu() else max(n_tokens, 1)
        padded = jnp.pad(tokens, ((0, -n_tokens % tile), (0, 0)))
        features = jax.lax.map(encode_tile, padded.reshape(-1, tile, x.shape[-1]))
        return features.reshape(-1, d_sae)[:n_tokens].reshape(*x.shape[:-1], d_sae)

    def activate(
        self,
        pre: Float[Array, "d_sae tile"],
        vectors: Vectors,
        hyper: HyperArrays,
        context: BatchContext,
    ) -> Activated:
        return Activated(keep_largest(pre, hyper["k"]))

    def add_tile(
        self,
        sums: LinearSums,
        weights: Weights,
        vectors: Vectors,
        tile: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> tuple[LinearSums, Float[Array, "d_model tile"]]:
        d_sae = len(weights.w_dec)
        k_max = d_sae if self.k_max is None else self.k_max
        is_sparse = d_sae >= self.min_ratio * k_max
        is_rounded = objective.factors != "float32"
        # Accelerators have fast products, and their order of scattered sums is not fixed.
        if is_sparse and not is_rounded and on_cpu():
            return _add_tile_by_rows(sums, weights, tile, hyper["k"], k_max, objective)
        return super().add_tile(sums, weights, vectors, tile, hyper, objective, context)


def _add_tile_by_rows(
    sums: LinearSums,
    weights: Weights,
    tile: Batch,
    k: Float[Array, ""],
    k_max: int,
    objective: Objective,
) -> tuple[LinearSums, Float[Array, "d_model tile"]]:
    """Return the same as `LinearSAE.add_tile`, from the rows of the active features alone.

    A suffix says the layout: B tokens of the tile, F features, K active features of each token, D
    d_model.
    """
    x_BxD = tile.x
    mask = jnp.ones(len(x_BxD)) if tile.is_token is None else tile.is_token
    pre_BxF = product(x_BxD, weights.w_enc_T.T) + weights.b_enc[None]
    largest_BxK, indices = jax.lax.top_k(pre_BxF, k_max)
    is_selected = jnp.arange(k_max, dtype=jnp.float32) < k
    f_BxK = jnp.where(is_selected[None], jax.nn.relu(largest_BxK), 0) * mask[:, None]
    rows_BxKxD = weights.w_dec[indices]
    x_hat_BxD = jnp.einsum("bk,bkd->bd", f_BxK, rows_BxKxD) + weights.b_dec[None]
    error_BxD = (x_hat_BxD - x_BxD) * mask[:, None]
    # dloss/dx̂ and, where a feature is active, dloss/dpre
    x_hat_gradient_BxD = 2 * objective.error_weight(x_BxD.shape[1]) * error_BxD
    backward_BxK = jnp.einsum("bkd,bd->bk", rows_BxKxD, x_hat_gradient_BxD)
    pre_gradient_BxK = jnp.where(f_BxK > 0, backward_BxK, 0)
    before = sums.gradients
    enc_rows = pre_gradient_BxK[:, :, None] * x_BxD[:, None]
    dec_rows = f_BxK[:, :, None] * x_hat_gradient_BxD[:, None]
    gradients = {
        "W_enc": before["W_enc"].at[indices].add(enc_rows),
        "b_enc": before["b_enc"].at[indices].add(pre_gradient_BxK),
        "W_dec": before["W_dec"].at[indices].add(dec_rows),
        "b_dec": before["b_dec"] + x_hat_gradient_BxD.sum(0),
    }
    residual = jnp.square(error_BxD).sum()
    added = sums._replace(
        gradients=gradients,
        reconstruction=sums.reconstruction + residual,
        residual=sums.residual + residual,
        active=sums.active.at[indices].add((f_BxK > 0).astype(jnp.int32)),
    )
    return added, error_BxD.T
