"""CBraMod with a layer's output replaced, and its pretraining task: to reconstruct patches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import (
    ComputeOptions,
    Downstream,
    FunctionFrom,
    Params,
    Substitutes,
)
from minsae_jax.encoder.cbramod.architecture import Architecture
from minsae_jax.encoder.cbramod.model import CBraMod, patches
from minsae_jax.encoder.cbramod.pure import bind
from minsae_jax.parallel.mesh import map_members


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


def function_from(a: Architecture, layer: int, substitutes: Substitutes) -> FunctionFrom:
    """Return the function that `BaseEncoder.function_from` describes."""

    def run(params: Params, substitute_params: Any, x: Float[Array, "B seq_len C"]) -> Downstream:
        model = bind(a, params)

        def finish(last: Float[Array, "1 C P d_model"]) -> tuple[Array, Array | None]:
            tokens = last.reshape(1, -1, a.d_model)
            if not a.has_head:
                return tokens, None
            return tokens, model.reconstruct(last).reshape(1, -1, a.patch_len)

        def run_window(x: Float[Array, "seq_len C"]) -> Downstream:
            embedded = model.embedding(patches(a, x[None]))
            hidden, outputs = _map_variants(
                model, embedded, layer, lambda z: substitutes(substitute_params, z), finish
            )
            return Downstream(hidden[None], *outputs)

        return map_members(run_window, x)

    return run


def _window_errors(
    model: CBraMod,
    x: Float[Array, "seq_len C"],
    mask: Bool[Array, "C P"],
    layer: int,
    substitute: Callable[[Array], Array],
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant."""
    target = patches(model.architecture, x[None])

    def error(last: Float[Array, "1 C P d_model"]) -> Float[Array, ""]:
        squared = jnp.square(model.reconstruct(last) - target).mean(-1)[0]
        return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

    embedded = model.embedding(target, mask[None])
    _, errors = _map_variants(model, embedded, layer, substitute, error)
    return errors


def _map_variants(
    model: CBraMod,
    z: Float[Array, "1 C P d_model"],
    layer: int,
    substitute: Callable[[Array], Array],
    finish: Callable[[Array], Any],
) -> tuple[Float[Array, "T d_model"], Any]:
    """Return a layer's output for one window, and finish(last layer) for each of its substitutes.

    z: the embedded window. The results of `finish` are stacked along a leading axis.
    """
    # Once per window: all substitutes have these layers in common.
    hidden = model.run_from(z, 0, layer + 1)
    hidden_tokens = hidden.reshape(-1, hidden.shape[-1])

    def run(tokens: Float[Array, "T d_model"]) -> Any:
        n_layers = model.architecture.n_layers
        return finish(model.run_from(tokens.reshape(hidden.shape), layer + 1, n_layers))

    # One variant after the other, so that memory does not grow with their number.
    return hidden_tokens, jax.lax.map(run, substitute(hidden_tokens))
