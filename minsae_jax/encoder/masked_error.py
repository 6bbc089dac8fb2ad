"""Flax models with a layer's output replaced by substitutes: outputs and pretraining error.

Each family defines both for one window, in its module `masked_error`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder.base import ComputeOptions, Downstream, FunctionFrom, Params, Substitutes
from minsae_jax.encoder.native import NativeEncoder, bind
from minsae_jax.parallel.mesh import map_first_axis, shard_over_batch

Substitute = Callable[[Array], Array]  # tokens of a sequence -> those of every variant


@dataclass(frozen=True)
class MaskedReconstruction:
    """The pretraining task of an encoder whose head reconstructs masked patches.

    window_errors: (model, window, mask, substitute, layer) -> errors [variants].
    """

    encoder: NativeEncoder
    mask_shape: tuple[int, ...]  # of one window
    window_errors: Callable[..., Array]

    def draw_mask(self, ratio: float, rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
        """Return which patches of one window are masked: a share `ratio`, at least one."""
        n = math.prod(self.mask_shape)
        mask = np.zeros(n, bool)
        mask[rng.permutation(n)[: max(1, int(n * ratio))]] = True
        return mask.reshape(self.mask_shape)

    def masked_errors(
        self, mesh: Mesh, layer: int, options: ComputeOptions, substitutes: Substitutes
    ) -> Callable[[Any, Any, Any], Float[Array, "batch variants"]]:
        """Return the jitted function that `Reconstruction.masked_errors` describes."""
        architecture = self.encoder.with_options(options)

        def on_one_device(params: Any, rows: tuple[Array, Array]) -> Array:
            encoder_params, substitute_params = params
            substitute = partial(substitutes, substitute_params)

            def errors_of_window(x: Array, mask: Array) -> Array:
                model = bind(self.encoder.model_type, architecture, encoder_params)
                return self.window_errors(model, x, mask, substitute, layer)

            with jax.default_matmul_precision("highest"):
                return map_first_axis(errors_of_window, *rows)

        run = jax.jit(shard_over_batch(mesh, on_one_device))
        return lambda params, substitute_params, rows: run((params, substitute_params), rows)


def function_from(
    model_type: type[Any],
    architecture: Any,
    run_window: Callable[[Any, Array, Substitute], Downstream],
    substitutes: Substitutes,
) -> FunctionFrom:
    """Return the function that `BaseEncoder.function_from` describes, in float32.

    run_window: (model, window [seq_len, n_vars], substitute) -> its outputs.
    """

    def run(
        params: Params, substitute_params: Any, x: Float[Array, "B seq_len n_vars"]
    ) -> Downstream:
        model = bind(model_type, architecture, params)
        substitute = partial(substitutes, substitute_params)
        return map_first_axis(lambda window: run_window(model, window, substitute), x)

    return run


def map_variants(
    model: Any,
    z: Float[Array, "1 *sequence d_model"],
    layer: int,
    substitute: Substitute,
    finish: Callable[[Array], Any],
) -> tuple[Float[Array, "T d_model"], Any]:
    """Return a layer's output for one sequence, and finish(last layer) for each of its substitutes.

    z: the embedded sequence, whose shape `finish` gets too. The results of `finish` are stacked
    along a leading axis.
    """
    # Once per sequence: all substitutes have these layers in common.
    hidden, earlier = model.run_from(z, 0, layer + 1)
    hidden_tokens = hidden.reshape(-1, hidden.shape[-1])

    def run(tokens: Float[Array, "T d_model"]) -> Any:
        # `earlier`, such as PatchTST's queries and keys, is that of the original activations: only
        # the residual stream is replaced.
        n_layers = model.architecture.n_layers
        last, _ = model.run_from(tokens.reshape(hidden.shape), layer + 1, n_layers, earlier)
        return finish(last)

    # One variant after the other, so that memory does not grow with their number.
    return hidden_tokens, jax.lax.map(run, substitute(hidden_tokens))
