"""CBraMod's pretraining task: to reconstruct masked patches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import ComputeOptions, Params, Substitutes
from minsae_jax.encoder.cbramod.architecture import Architecture
from minsae_jax.encoder.cbramod.model import CBraMod, patches
from minsae_jax.encoder.cbramod.pure import bind


class PatchReconstruction:
    """Mean squared error of the head on masked patches, in (µV / 100)²."""

    def __init__(self, architecture: Architecture):
        self.architecture = architecture

    def draw_mask(
        self, ratio: float, rng: np.random.Generator
    ) -> Bool[np.ndarray, "n_vars n_patches"]:
        """Return which patches are masked: a share `ratio` of all channels' patches."""
        a = self.architecture
        n = a.n_vars * a.n_patches
        mask = np.zeros(n, bool)
        mask[rng.permutation(n)[: max(1, int(n * ratio))]] = True
        return mask.reshape(a.n_vars, a.n_patches)

    def masked_errors(
        self, mesh: Mesh, layer: int, options: ComputeOptions, substitutes: Substitutes
    ) -> Callable[[Any, Any, Any], Float[Array, "batch variants"]]:
        """Return the jitted (params, substitutes' params, (windows, masks)) -> errors.

        Masked patches are replaced as in pretraining, by the embedding's mask. The layer's output
        for all tokens of a window is replaced by each of its substitutes in turn, and the remaining
        layers and the head run. Targets are the original patches.
        """
        a = self.architecture

        def window_errors(
            params: Params, x: Array, mask: Array, substitute: pure.Substitute
        ) -> Array:
            return _window_errors(bind(a, params), x, mask, layer, substitute)

        return pure.masked_errors(mesh, window_errors, substitutes)


def _window_errors(
    model: CBraMod,
    x: Float[Array, "seq_len C"],
    mask: Bool[Array, "C P"],
    layer: int,
    substitute: Callable[[Array], Array],
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant."""
    n_layers = model.architecture.n_layers
    target = patches(model.architecture, x[None])
    # Once per window: all substitutes have these layers in common.
    hidden = model.run_from(model.embedding(target, mask[None]), 0, layer + 1)

    def error(tokens: Float[Array, "T d_model"]) -> Float[Array, ""]:
        last = model.run_from(tokens.reshape(hidden.shape), layer + 1, n_layers)
        output = model.reconstruct(last)
        squared = jnp.square(output - target).mean(-1)[0]
        return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

    # One variant after the other, so that memory does not grow with their number.
    return jax.lax.map(error, substitute(hidden.reshape(-1, hidden.shape[-1])))
