"""ReLU with an L1 penalty: x̂ = relu(x W_enc + b_enc) W_dec + b_dec.

    loss = recon_weight * mse + λ * l1,    l1 = mean over tokens of Σ_i f_i ‖W_dec,i‖₂

(Anthropic's April 2024 update, used by Templeton et al. 2024; minSAE differs in the mse alone.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minsae_jax.sae.kinds.base import Batch, BatchMetrics, Hyper, Objective, Params, SAEKind


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
    sparsity_name = "lambda_sparsity"

    def shapes(self, d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        return {
            "W_enc": (d_model, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_model),
            "b_dec": (d_model,),
        }

    def init_tied(
        self, key: Key[Array, ""], d_model: int, d_sae: int, decoder_norm: float
    ) -> Params:
        rows = jax.random.normal(key, (d_sae, d_model))
        w_dec = decoder_norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        b_enc = jnp.zeros(d_sae)
        b_dec = jnp.zeros(d_model)
        return {"W_enc": w_dec.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}

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

    def decode(
        self, params: Params, features: Float[Array, "*tokens d_sae"]
    ) -> Float[Array, "*tokens d_model"]:
        x_hat = features @ params["W_dec"]
        return x_hat + jnp.broadcast_to(params["b_dec"], x_hat.shape)

    def penalty(
        self, params: Params, features: Float[Array, "tokens d_sae"]
    ) -> Float[Array, " tokens"]:
        return features @ jnp.linalg.norm(params["W_dec"], axis=1)

    def penalty_weight(self, hyper: Hyper) -> Float[Array, ""]:
        return hyper["lambda_sparsity"]

    def fold_scale(self, params: Params, scale: float) -> Params:
        return {
            "W_enc": params["W_enc"] * scale,
            "b_enc": params["b_enc"],
            "W_dec": params["W_dec"] / scale,
            "b_dec": params["b_dec"] / scale,
        }

    def batch_sums(
        self, params: Params, batch: Batch, hyper: Hyper, objective: Objective
    ) -> ReLUSums:
        """Return sums over this device's tokens, with the gradient written by hand.

        Within a tile features are [d_sae, tile] (suffix FxB: features by tokens of the tile), so
        that every product is one of two contiguous matrices and only blocks of d_model x tile are
        transposed. On CPU that saves a quarter of the time of the same products in [tile, d_sae].
        """
        round_factor = objective.round_factor
        w_enc_FxD = round_factor(params["W_enc"].T)
        w_dec_FxD = round_factor(params["W_dec"])
        b_enc = params["b_enc"][:, None]
        b_dec = params["b_dec"][:, None]
        error_factor = 2 * objective.recon_weight * objective.mse_factor(batch.x.shape[-1])
        norms = jnp.linalg.norm(params["W_dec"], axis=1)
        penalty_gradient = (self.penalty_weight(hyper) * norms)[:, None]

        def add_tile(sums: ReLUSums, tile: Batch) -> tuple[ReLUSums, None]:
            x_BxD = round_factor(tile.x)
            f_FxB = jax.nn.relu(product(w_enc_FxD, x_BxD.T) + b_enc)
            if tile.is_token is not None:
                f_FxB = f_FxB * tile.is_token[None]
            f_rounded_FxB = round_factor(f_FxB)
            error_DxB = product(w_dec_FxD.T, f_rounded_FxB) + b_dec - tile.x.T
            if tile.is_token is not None:
                error_DxB = error_DxB * tile.is_token[None]
            error_rounded_DxB = round_factor(error_DxB)
            # dloss/dpre: error through the decoder plus penalty, where the feature is active.
            active_FxB = f_FxB > 0
            backward_FxB = error_factor * product(w_dec_FxD, error_rounded_DxB)
            pre_gradient_FxB = jnp.where(active_FxB, backward_FxB + penalty_gradient, 0)
            gradients = {
                "W_enc": product(round_factor(pre_gradient_FxB), x_BxD),  # [d_sae, d_model] so far
                "b_enc": pre_gradient_FxB.sum(1),
                "W_dec": error_factor * product(f_rounded_FxB, error_rounded_DxB.T),
                "b_dec": error_factor * error_DxB.sum(1),
            }
            tile_sums = ReLUSums(
                gradients,
                residual=jnp.square(error_DxB).sum(),
                features=f_FxB.sum(1),
                active=active_FxB.sum(1, dtype=jnp.int32),
            )
            return jax.tree.map(jnp.add, sums, tile_sums), None

        d_sae, d_model = w_dec_FxD.shape
        zero_gradients = {
            "W_enc": jnp.zeros((d_sae, d_model)),
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


def product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Return a matrix product, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
