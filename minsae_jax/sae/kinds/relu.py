"""ReLU with an L1 penalty: x̂ = relu(x W_enc + b_enc) W_dec + b_dec.

    loss = recon_weight * mse + λ * l1,    l1 = mean over tokens of Σ_i f_i ‖W_dec,i‖₂

(Anthropic's April 2024 update, used by Templeton et al. 2024; minSAE differs in the mse alone.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minsae_jax.parallel.mesh import materialize
from minsae_jax.sae.kinds.base import (
    Batch,
    BatchContext,
    BatchMetrics,
    BatchSums,
    HyperArrays,
    Objective,
    Params,
    SAEKind,
)
from minsae_jax.sae.kinds.products import (
    Weights,
    count_active,
    encoder_gradient,
    norm_gradient,
    product,
    project_back,
    round_weights,
    store_features,
    zero_gradients,
)


class ReLUSums(NamedTuple):
    """Sums over tokens, which may be added over tiles and devices."""

    gradients: Params  # of loss * tokens, without the part that reaches W_dec through its norms
    residual: Float[Array, ""]  # Σ over tokens and d_model of (x̂ - x)²
    features: Float[Array, " d_sae"]
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


@dataclass(frozen=True)
class ReLU(SAEKind):
    name = "relu"
    sparsity_name = "lambda_sparsity"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec")
    independent = True

    def init_torch(self, key: Key[Array, ""], d_model: int, d_sae: int) -> Params:
        # torch draws weights and biases from the uniform distribution on ±1/√fan_in.
        fan_in = {"W_enc": d_model, "b_enc": d_model, "W_dec": d_sae, "b_dec": d_sae}
        keys = dict(zip(fan_in, jax.random.split(key, len(fan_in)), strict=True))
        return {
            name: jax.random.uniform(keys[name], shape, minval=-1, maxval=1) / fan_in[name] ** 0.5
            for name, shape in self.shapes(d_model, d_sae).items()
        }

    def encode(
        self, params: Params, x: Float[Array, "*tokens d_model"]
    ) -> Float[Array, "*tokens d_sae"]:
        pre = x @ params["W_enc"]
        return jax.nn.relu(pre + jnp.broadcast_to(params["b_enc"], pre.shape))

    def penalty(
        self, params: Params, features: Float[Array, "tokens d_sae"]
    ) -> Float[Array, " tokens"]:
        return features @ jnp.linalg.norm(params["W_dec"], axis=1)

    def penalty_weight(self, hyper: HyperArrays) -> Float[Array, ""]:
        return hyper["lambda_sparsity"]

    def batch_sums(
        self,
        params: Params,
        batch: Batch,
        hyper: HyperArrays,
        objective: Objective,
        context: BatchContext,
    ) -> ReLUSums:
        """Return sums over this device's tokens, with the gradient written by hand."""
        weights = round_weights(params, objective)
        # dloss/df_i through the penalty, λ ‖W_dec,i‖₂
        penalty = self.penalty_weight(hyper) * jnp.linalg.norm(params["W_dec"], axis=1)

        def add_tile(sums: ReLUSums, tile: Batch) -> tuple[ReLUSums, None]:
            tile_sums = _tile_sums(weights, penalty, tile, objective)
            return jax.tree.map(jnp.add, sums, tile_sums), None

        d_sae = len(weights.w_dec)
        start = ReLUSums(
            gradients=zero_gradients(params),
            residual=jnp.zeros(()),
            features=jnp.zeros(d_sae),
            active=jnp.zeros(d_sae, jnp.int32),
        )
        sums, _ = jax.lax.scan(add_tile, start, batch)
        gradients = sums.gradients | {"W_enc": sums.gradients["W_enc"].T}
        return sums._replace(gradients=gradients)

    def gradients(
        self,
        params: Params,
        sums: ReLUSums,
        n_tokens: int,
        hyper: HyperArrays,
        objective: Objective,
    ) -> tuple[Params, BatchMetrics]:
        w_dec = params["W_dec"]
        penalty = (sums.features * jnp.linalg.norm(w_dec, axis=1)).sum()
        batch_sums = BatchSums(sums.gradients, sums.residual, penalty, sums.active)
        gradients, metrics = super().gradients(params, batch_sums, n_tokens, hyper, objective)
        mean_features = sums.features / n_tokens
        weighted = self.penalty_weight(hyper) * mean_features[:, None]
        gradients["W_dec"] += weighted * norm_gradient(w_dec)
        return gradients, metrics


def _tile_sums(
    weights: Weights, penalty: Float[Array, " d_sae"], tile: Batch, objective: Objective
) -> ReLUSums:
    """Return the sums of one tile.

    A suffix says the layout: F features, B tokens of the tile, D d_model. Features lie in
    [d_sae, tile]: on CPU every product is then one of two contiguous matrices, which saves a
    quarter of the time, and on accelerators sums over tokens are sums over contiguous numbers.
    """
    round_factor = objective.round_factor
    # dloss/dx̂ = error_factor * (x̂ - x)
    error_factor = 2 * objective.error_weight(tile.x.shape[1])
    x_BxD = round_factor(tile.x)
    f_FxB = jax.nn.relu(product(weights.w_enc_T, x_BxD.T) + weights.b_enc[:, None])
    f_FxB = store_features(tile.masked(f_FxB), objective)
    rounded_f_FxB = round_factor(f_FxB)
    x_hat_DxB = materialize(product(weights.w_dec_T, rounded_f_FxB)) + weights.b_dec[:, None]
    error_DxB = tile.masked(x_hat_DxB - tile.x.T)
    # One pass gives both sums over tokens.
    error_sums_D, square_sums_D = materialize((error_DxB.sum(1), jnp.square(error_DxB).sum(1)))
    rounded_error_DxB = round_factor(error_DxB)
    backward_FxB = project_back(weights.w_dec, rounded_error_DxB)
    # So that one pass over both computes the gradient and all sums.
    f_FxB, backward_FxB = materialize((f_FxB, backward_FxB))
    # dloss/dpre: error through the decoder plus penalty, where the feature is active.
    backward_FxB = error_factor * backward_FxB.astype(jnp.float32)
    pre_gradient_FxB = jnp.where(f_FxB > 0, backward_FxB + penalty[:, None], 0)
    gradients = {
        "W_enc": encoder_gradient(round_factor(pre_gradient_FxB), x_BxD),
        "b_enc": pre_gradient_FxB.sum(1),
        "W_dec": error_factor * product(rounded_f_FxB, rounded_error_DxB.T),
        "b_dec": error_factor * error_sums_D,
    }
    return ReLUSums(
        gradients,
        residual=square_sums_D.sum(),
        features=f_FxB.sum(1, dtype=jnp.float32),
        active=count_active(f_FxB),
    )
