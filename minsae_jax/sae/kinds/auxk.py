"""AuxK: dead features learn to reconstruct the residual (Gao et al. 2024, section A.2)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
# Shares of the features to which the products are limited, if no more of them are dead.
SHARES = (1 / 16, 1 / 4)
# Products with fewer rows take hardly less time.
LEAST_ROWS = 64


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
    2024, as dictionary_learning computes it). Nothing is computed if no feature is dead. If few
    are, it is from their rows of the weights: from all rows, AuxK would double the time of a step.
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
    b_enc = jnp.where(context.is_dead, weights.b_enc, -jnp.inf)
    d_sae = len(b_enc)
    zeros = zero_gradients(params)

    def sums_from_rows(n_rows: int) -> tuple[Params, Array]:
        """Return the sums, if at most n_rows features are dead."""
        rows: Int[Array, " rows"] | slice = slice(None)
        if n_rows < d_sae:
            rows = jnp.argsort(~context.is_dead)[:n_rows]
        of_rows = Weights(
            w_enc_T=weights.w_enc_T[rows],
            w_dec=weights.w_dec[rows],
            w_dec_T=weights.w_dec_T[:, rows],
            b_enc=b_enc[rows],
            b_dec=weights.b_dec,
        )

        def add_tile(
            sums: tuple[Params, Array], tile: tuple[Array, Array, Array]
        ) -> tuple[tuple[Params, Array], None]:
            x_BxD, error_DxB, mask = tile
            pre_FxB = pre_activations(of_rows, x_BxD, objective)
            f_FxB = keep_largest(pre_FxB, jnp.float32(n_aux)) * mask[None]
            f_FxB = store_features(f_FxB, objective)
            rounded_f_FxB = round_factor(f_FxB)
            # ê - e, where e = -error_DxB
            difference_DxB = materialize(product(of_rows.w_dec_T, rounded_f_FxB)) + error_DxB
            rounded_DxB = round_factor(difference_DxB)
            backward_FxB = project_back(of_rows.w_dec, rounded_DxB)
            # So that one pass over both computes the gradient and its sum.
            f_FxB, backward_FxB = materialize((f_FxB, backward_FxB))
            pre_gradient_FxB = jnp.where(f_FxB > 0, 2 * backward_FxB.astype(jnp.float32), 0)
            gradients = {
                "W_enc": encoder_gradient(round_factor(pre_gradient_FxB), round_factor(x_BxD)),
                "b_enc": pre_gradient_FxB.sum(1),
                "W_dec": 2 * product(rounded_f_FxB, rounded_DxB.T),
            }
            tile_sums = (gradients, jnp.square(difference_DxB).sum())
            return jax.tree.map(jnp.add, sums, tile_sums), None

        start = {name: zeros[name][rows] for name in ("W_enc", "b_enc", "W_dec")}
        gradients, loss = jax.lax.scan(add_tile, (start, jnp.zeros(())), (batch.x, errors, mask))[0]
        # With --deterministic, XLA for GPU needs 11 more launches for rows that may repeat.
        of_all = {
            name: zeros[name].at[rows].set(gradient, unique_indices=True)
            for name, gradient in gradients.items()
        }
        return zeros | of_all, loss

    # The first size that all dead features fit into, or all rows.
    sizes = sorted({max(int(share * d_sae), LEAST_ROWS) for share in SHARES})
    sizes = [size for size in sizes if size < d_sae]
    branches = [partial(sums_from_rows, size) for size in (*sizes, d_sae)]
    branch = (context.n_dead > jnp.array([0, *sizes])).sum()
    sums = jax.lax.switch(branch, [lambda: (zeros, jnp.zeros(())), *branches])
    return jax.tree.map(lambda a: factor * a, sums)
