"""ReLU with an L1 penalty: x̂ = relu(x W_enc + b_enc) W_dec + b_dec.

    loss = recon_weight * mse + λ * l1,    l1 = mean over tokens of Σ_i f_i ‖W_dec,i‖₂

(Anthropic's April 2024 update, used by Templeton et al. 2024; minSAE differs in the mse alone.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minsae_jax.sae.kinds.base import (
    Batch,
    BatchContext,
    BatchMetrics,
    Hyper,
    Objective,
    Params,
    SAEKind,
)
from minsae_jax.sae.kinds.products import (
    count_active,
    encoder_gradient,
    kept,
    kept_product,
    product,
    together,
    written,
)


class ReLUSums(NamedTuple):
    """Sums over tokens. Gradients lack the part that reaches W_dec through its norm."""

    gradients: Params  # of loss * tokens
    residual: Float[Array, ""]  # Σ over tokens and d_model of (x̂ - x)²
    features: Float[Array, " d_sae"]
    active: Int[Array, " d_sae"]  # tokens on which each feature is active


@dataclass(frozen=True)
class ReLU(SAEKind):
    name = "relu"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec")
    independent = True

    @property
    def sparsity_name(self) -> str:
        return "lambda_sparsity"

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

    def encode_features(
        self, params: Params, x: Float[Array, "*tokens d_model"], indices: Int[Array, " n"]
    ) -> Float[Array, "*tokens n"]:
        w_enc = params["W_enc"][:, indices]
        b_enc = params["b_enc"][indices]
        return self.encode({"W_enc": w_enc, "b_enc": b_enc}, x)

    def penalty(
        self, params: Params, features: Float[Array, "tokens d_sae"]
    ) -> Float[Array, " tokens"]:
        return features @ jnp.linalg.norm(params["W_dec"], axis=1)

    def penalty_weight(self, hyper: Hyper) -> Float[Array, ""]:
        return hyper["lambda_sparsity"]

    def batch_sums(
        self,
        params: Params,
        batch: Batch,
        hyper: Hyper,
        objective: Objective,
        context: BatchContext,
    ) -> ReLUSums:
        """Return sums over this device's tokens, with the gradient written by hand."""
        weights = _prepare(params, self.penalty_weight(hyper), objective, batch.x.shape[-1])

        def add_tile(sums: ReLUSums, tile: Batch) -> tuple[ReLUSums, None]:
            return jax.tree.map(jnp.add, sums, _tile_sums(weights, tile, objective)), None

        d_sae, d_model = params["W_dec"].shape
        zero_gradients = {
            "W_enc": jnp.zeros((d_sae, d_model)),  # transposed until all tiles are added
            "b_enc": jnp.zeros(d_sae),
            "W_dec": jnp.zeros((d_sae, d_model)),
            "b_dec": jnp.zeros(d_model),
        }
        start = ReLUSums(
            zero_gradients, jnp.zeros(()), jnp.zeros(d_sae), jnp.zeros(d_sae, jnp.int32)
        )
        sums, _ = jax.lax.scan(add_tile, start, batch)
        gradients = sums.gradients | {"W_enc": sums.gradients["W_enc"].T}
        return sums._replace(gradients=gradients)

    def gradients(
        self, params: Params, sums: ReLUSums, n_tokens: int, hyper: Hyper, objective: Objective
    ) -> tuple[Params, BatchMetrics]:
        """Return the gradient of the mean loss and the metrics, from sums over all tokens."""
        penalty_weight = self.penalty_weight(hyper)
        w_dec = params["W_dec"]
        norms = jnp.linalg.norm(w_dec, axis=1)
        gradients = jax.tree.map(lambda g: g / n_tokens, sums.gradients)
        # d(Σ_i f_i ‖W_i‖)/dW_i = f_i W_i / ‖W_i‖, and 0 for a row of zeros.
        directions = jnp.where(norms[:, None] > 0, w_dec / norms[:, None], 0)
        mean_features = sums.features / n_tokens
        gradients["W_dec"] += penalty_weight * mean_features[:, None] * directions

        mse = objective.mse_factor(w_dec.shape[1]) * sums.residual / n_tokens
        l1 = (sums.features * norms).sum() / n_tokens
        loss = objective.recon_weight * mse + penalty_weight * l1
        l0 = sums.active.astype(jnp.float32).sum() / n_tokens
        return gradients, BatchMetrics(loss, mse, l1, l0, sums.residual, sums.active)


class _Weights(NamedTuple):
    """Values shared by all tiles: factors of products, biases, constants of the gradient."""

    w_dec: Float[Array, "d_sae d_model"]
    # Transposed here, before the loop over tiles: XLA for CPU does it again for every tile, which
    # costs 10 % of a step.
    w_enc_T: Float[Array, "d_sae d_model"]
    w_dec_T: Float[Array, "d_model d_sae"]
    b_enc: Float[Array, " d_sae"]
    b_dec: Float[Array, " d_model"]
    dloss_factor: float  # dloss/dx̂ = dloss_factor * (x̂ - x)
    penalty: Float[Array, " d_sae"]  # dloss/df_i through the penalty: λ ‖W_dec,i‖


def _prepare(
    params: Params, penalty_weight: Float[Array, ""], objective: Objective, d_model: int
) -> _Weights:
    w_dec = objective.round_factor(params["W_dec"])
    return _Weights(
        w_dec=w_dec,
        w_enc_T=objective.round_factor(params["W_enc"]).T,
        w_dec_T=w_dec.T,
        b_enc=params["b_enc"],
        b_dec=params["b_dec"],
        dloss_factor=2 * objective.recon_weight * objective.mse_factor(d_model),
        penalty=penalty_weight * jnp.linalg.norm(params["W_dec"], axis=1),
    )


def _tile_sums(weights: _Weights, tile: Batch, objective: Objective) -> ReLUSums:
    """Return the sums of one tile.

    A suffix says the layout: F features, B tokens of the tile, D d_model. Features lie in
    [d_sae, tile]: on CPU every product is then one of two contiguous matrices, which saves a
    quarter of the time, and on accelerators sums over tokens are sums over contiguous numbers.
    """
    round_factor = objective.round_factor
    x_BxD = round_factor(tile.x)
    f_FxB = jax.nn.relu(product(weights.w_enc_T, x_BxD.T) + weights.b_enc[:, None])
    if tile.is_token is not None:
        f_FxB = f_FxB * tile.is_token[None]
    f_FxB = kept(f_FxB, objective)
    rounded_f_FxB = round_factor(f_FxB)
    x_hat_DxB = written(product(weights.w_dec_T, rounded_f_FxB)) + weights.b_dec[:, None]
    error_DxB = x_hat_DxB - tile.x.T
    if tile.is_token is not None:
        error_DxB = error_DxB * tile.is_token[None]
    rounded_error_DxB = round_factor(error_DxB)
    backward_FxB = kept_product(weights.w_dec, rounded_error_DxB)
    # So that one pass over both computes the gradient and all sums.
    f_FxB, backward_FxB = together(f_FxB, backward_FxB)
    # dloss/dpre: error through the decoder plus penalty, where the feature is active.
    backward_FxB = weights.dloss_factor * backward_FxB.astype(jnp.float32)
    pre_gradient_FxB = jnp.where(f_FxB > 0, backward_FxB + weights.penalty[:, None], 0)
    gradients = {
        "W_enc": encoder_gradient(round_factor(pre_gradient_FxB), x_BxD),
        "b_enc": pre_gradient_FxB.sum(1),
        "W_dec": weights.dloss_factor * product(rounded_f_FxB, rounded_error_DxB.T),
        "b_dec": weights.dloss_factor * error_DxB.sum(1),
    }
    return ReLUSums(
        gradients,
        residual=jnp.square(error_DxB).sum(),
        features=f_FxB.sum(1, dtype=jnp.float32),
        active=count_active(f_FxB),
    )
