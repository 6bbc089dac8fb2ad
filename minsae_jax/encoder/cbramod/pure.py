"""The model as a function of its parameters, for use under jax.jit."""

from functools import lru_cache

import jax.numpy as jnp
from flax import nnx

from minsae_jax.encoder.base import Params, Precision
from minsae_jax.encoder.cbramod.architecture import Architecture
from minsae_jax.encoder.cbramod.model import CBraMod


def bind(architecture: Architecture, params: Params, precision: Precision = "float32") -> CBraMod:
    """Return the model with the given parameters, whose methods are then pure functions of them."""
    graph, _ = _abstract_model(architecture, precision)
    return nnx.merge(graph, params)


def abstract_params(architecture: Architecture) -> Params:
    """Return shapes and dtypes of the parameters; nothing is allocated."""
    _, params = _abstract_model(architecture, "float32")
    return params


# Cached, since every trace of a jitted function calls `bind`.
@lru_cache(64)
def _abstract_model(
    architecture: Architecture, precision: Precision
) -> tuple[nnx.GraphDef, Params]:
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    # Shapes only: real initial values would be thrown away.
    model = nnx.eval_shape(lambda: CBraMod(architecture, dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
