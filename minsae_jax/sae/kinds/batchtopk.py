"""BatchTopK: the k * tokens largest pre-activations of a batch are its features.

Tokens may thus have different numbers of features, k on average (Bussmann, Leask & Nanda 2024). The
selection is over the whole batch, whatever its tiles and devices. After training there is no batch:
features are the pre-activations above `threshold`, a moving average of the thresholds of the steps.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.parallel.mesh import DATA, sum_devices
from minsae_jax.sae.kinds.base import Batch, BatchContext, HyperArrays, Objective, Params
from minsae_jax.sae.kinds.linear import Activated, LinearSAE, Vectors
from minsae_jax.sae.kinds.products import pre_activations, round_weights
from minsae_jax.sae.kinds.select import kth_largest_of_batch

# Share of the newest step in the threshold, a moving average over about 100 steps.
THRESHOLD_RATE = 0.01
# Weight of the first step's threshold, (1 - rate)^(steps - 1), when the average has settled.
# Thresholds fall fast in the first steps.
SETTLED_WEIGHT = 0.01


@dataclass(frozen=True)
class BatchTopK(LinearSAE):
    name = "batchtopk"
    sparsity_name = "k"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    independent = True
    starts_at_median = True
    unit_decoder = True
    selects = True
    has_data_dependent_loop = True
    settling_steps = 1 + math.ceil(math.log(SETTLED_WEIGHT) / math.log(1 - THRESHOLD_RATE))

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(d_model, d_sae) | {"threshold": ()}

    def complete_init(self, params: Params, median: Float[Array, " d_model"] | None) -> Params:
        return super().complete_init(params, median) | {"threshold": jnp.zeros(())}

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = self.pre_activations(params, x)
        return jnp.where(pre > params["threshold"], jax.nn.relu(pre), 0)

    def batch_context(
        self,
        params: Params,
        batch: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> BatchContext:
        """Return the context with the threshold that k * tokens pre-activations reach.

        Pre-activations of all tiles are in memory at once.
        """
        weights = round_weights(params, objective)

        def encode_tile(tile: Batch) -> Float[Array, "d_sae tile"]:
            return tile.masked(pre_activations(weights, tile.x, objective))

        pre = jax.lax.map(encode_tile, batch)
        if batch.is_token is None:
            n_tiles, tile_tokens, _ = batch.x.shape
            n_tokens = jnp.float32(n_tiles * tile_tokens * jax.lax.axis_size(DATA))
        else:
            n_tokens = sum_devices(batch.is_token.sum())
        threshold = kth_largest_of_batch(
            pre,
            k=jnp.floor(hyper["k"] * n_tokens).astype(jnp.int32),
            guess=params["threshold"],
        )
        return context._replace(threshold=threshold, pre=pre)

    def activate(
        self,
        pre: Float[Array, "d_sae tile"],
        vectors: Vectors,
        hyper: HyperArrays,
        context: BatchContext,
    ) -> Activated:
        assert context.threshold is not None
        return Activated(jnp.where(pre >= context.threshold, pre, 0))

    def normalize_decoder(self, params: Params) -> Params:
        # The threshold is one number for all features: exact where all rows have the same norm.
        norms = jnp.linalg.norm(params["W_dec"], axis=1)
        # Features of rows of zeros are never active afterwards.
        norms = norms[norms > 0]
        mean_norm = norms.mean() if norms.size else 1.0
        normalized = super().normalize_decoder(params)
        return normalized | {"threshold": params["threshold"] * mean_norm}

    def finish_update(self, params: Params, context: BatchContext) -> Params:
        params = super().finish_update(params, context)
        before = params["threshold"]
        threshold = jnp.asarray(context.threshold)
        # The first step has no average to add to.
        rate = jnp.where(before > 0, THRESHOLD_RATE, 1.0)
        return params | {"threshold": before + rate * (threshold - before)}
