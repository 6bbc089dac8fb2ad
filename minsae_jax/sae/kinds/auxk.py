"""AuxK: dead features learn to reconstruct the residual (Gao et al. 2024, section A.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minsae_jax.parallel.mesh import materialize, sum_devices
from minsae_jax.sae.kinds.base import Batch, BatchContext, Objective, Params
from minsae_jax.sae.kinds.products import (
    Weights,
    encoder_gradient,
    pre_activations,
    product,
    project_back,
    store_features,
    zero_gradients,
)
from minsae_jax.sae.kinds.select import keep_largest

# In a loss whose mse is divided by the variance of x. Here the mse is not, and that variance is
# about E‖x‖² = d_model, by the input scale.
RELATIVE_WEIGHT = 1 / 32


def aux_sums(
    params: Params,
    weights: Weights,
    batch: Batch,
    errors: Float[Array, "tiles d_model tile"],
    objective: Objective,
    context: BatchContext,
) -> tuple[Params, Float[Array, ""]]:
    """Return AuxK's gradients and loss, times tokens: dead features reconstruct the residual.

        d_model / 32 * Σ‖e - ê‖² / Σ‖e - mean e‖²,    e = x - x̂ (not differentiated)

    ê = Σ_i a_i W_dec,i over the d_model / 2 largest activations a of dead features (Gao et al.
    2024, as dictionary_learning computes it). Computed only if there are dead features.
    """
    d_model = errors.shape[1]
    n_aux = max(d_model // 2, 1)
    mask = jnp.ones(batch.x.shape[:2]) if batch.is_token is None else batch.is_token
    total, n_tokens = sum_devices((errors.sum((0, 2)), mask.sum()))
    mean = total / n_tokens
    deviation = (errors - mean[None, :, None]) * mask[:, None]
    variance = sum_devices(jnp.square(deviation).sum())
    # In the unit of sums, loss * tokens.
    weight = RELATIVE_WEIGHT * d_model
    factor = jnp.where(variance > 0, weight * n_tokens / variance, 0)
    round_factor = objective.round_factor
    # With this bias, features that are not dead are inactive.
    dead_weights = weights._replace(b_enc=jnp.where(context.is_dead, weights.b_enc, -jnp.inf))

    def add_tile(
        sums: tuple[Params, Array], tile: tuple[Array, Array, Array]
    ) -> tuple[tuple[Params, Array], None]:
        x_BxD, error_DxB, mask = tile
        pre_FxB = pre_activations(dead_weights, x_BxD, objective)
        f_FxB = keep_largest(pre_FxB, jnp.float32(n_aux)) * mask[None]
        f_FxB = store_features(f_FxB, objective)
        rounded_f_FxB = round_factor(f_FxB)
        # ê - e, where e = -error_DxB
        difference_DxB = materialize(product(weights.w_dec_T, rounded_f_FxB)) + error_DxB
        rounded_DxB = round_factor(difference_DxB)
        backward_FxB = project_back(weights.w_dec, rounded_DxB)
        # So that one pass over both computes the gradient and its sum.
        f_FxB, backward_FxB = materialize((f_FxB, backward_FxB))
        pre_gradient_FxB = jnp.where(f_FxB > 0, 2 * backward_FxB.astype(jnp.float32), 0)
        gradients = {
            "W_enc": encoder_gradient(round_factor(pre_gradient_FxB), round_factor(x_BxD)),
            "b_enc": pre_gradient_FxB.sum(1),
            "W_dec": 2 * product(rounded_f_FxB, rounded_DxB.T),
            "b_dec": jnp.zeros_like(weights.b_dec),
        }
        tile_sums = (gradients, jnp.square(difference_DxB).sum())
        return jax.tree.map(jnp.add, sums, tile_sums), None

    start = (zero_gradients(params), jnp.zeros(()))

    def with_dead() -> tuple[Params, Array]:
        return jax.lax.scan(add_tile, start, (batch.x, errors, mask))[0]

    sums = jax.lax.cond(context.any_dead, with_dead, lambda: start)
    return jax.tree.map(lambda a: factor * a, sums)
