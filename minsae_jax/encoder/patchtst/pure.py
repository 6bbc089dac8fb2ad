"""The model as a function of its parameters, for use under jax.jit."""

from functools import lru_cache

import jax

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import ComputeOptions, HiddenFunction, Params, Precision
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.model import PatchTST


def bind(architecture: Architecture, params: Params, precision: Precision = "float32") -> PatchTST:
    """Return the model with the given parameters, whose methods are then pure functions of them.

    Nothing is copied. Under jit: `jax.jit(lambda params, x: bind(a, params).hidden(x, (0,)))`.
    """
    return pure.bind(PatchTST, architecture, params, precision)


@lru_cache(8)
def hidden_function(
    architecture: Architecture, layers: tuple[int, ...], options: ComputeOptions
) -> HiddenFunction:
    """Return (params, windows) -> outputs of the layers, as `BaseEncoder.function` describes it."""

    def hidden(params: Params, past_values: jax.Array) -> tuple[jax.Array, ...]:
        model = bind(architecture, params, options.precision)
        return model.hidden(past_values, layers, options.force_revin)

    return hidden


def abstract_params(architecture: Architecture) -> Params:
    """Return shapes and dtypes of the parameters; nothing is allocated."""
    return pure.abstract_params(PatchTST, architecture)
