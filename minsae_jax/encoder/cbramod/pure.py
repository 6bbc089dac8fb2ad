"""The model as a function of its parameters, for use under jax.jit."""

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import Params, Precision
from minsae_jax.encoder.cbramod.architecture import Architecture
from minsae_jax.encoder.cbramod.model import CBraMod


def bind(architecture: Architecture, params: Params, precision: Precision = "float32") -> CBraMod:
    """Return the model with the given parameters, whose methods are then pure functions of them."""
    return pure.bind(CBraMod, architecture, params, precision)


def abstract_params(architecture: Architecture) -> Params:
    """Return shapes and dtypes of the parameters; nothing is allocated."""
    return pure.abstract_params(CBraMod, architecture)
