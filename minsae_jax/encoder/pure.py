"""Flax models as functions of their parameters, for use under jax.jit.

A model is a class of nnx modules that is made by `model_type(architecture, dtype, rngs=…)`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minsae_jax.encoder.base import Params, Precision, Substitutes
from minsae_jax.parallel.mesh import map_members, shard_over_batch

Model = TypeVar("Model", bound=nnx.Module)
Substitute = Callable[[Array], Array]  # tokens of a sequence -> those of every variant


def bind(
    model_type: type[Model], architecture: Any, params: Params, precision: Precision = "float32"
) -> Model:
    """Return the model with the given parameters, whose methods are then pure functions of them.

    Nothing is copied.
    """
    graph, _ = _abstract_model(model_type, architecture, precision)
    return nnx.merge(graph, params)


def abstract_params(model_type: type[nnx.Module], architecture: Any) -> Params:
    """Return shapes and dtypes of the parameters; nothing is allocated."""
    _, params = _abstract_model(model_type, architecture, "float32")
    return params


# Cached, since every trace of a jitted function calls `bind`.
@lru_cache(64)
def _abstract_model(
    model_type: Callable[..., nnx.Module], architecture: Any, precision: Precision
) -> tuple[nnx.GraphDef, Params]:
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    # Shapes only: real initial values would be thrown away.
    model = nnx.eval_shape(lambda: model_type(architecture, dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def masked_errors(
    mesh: Mesh,
    window_errors: Callable[[Params, Array, Array, Substitute], Array],
    substitutes: Substitutes,
) -> Callable[[Any, Any, Any], Float[Array, "batch variants"]]:
    """Return the jitted function of `Reconstruction.masked_errors`.

    window_errors: (params, window, mask, substitute) -> the error of the window for every variant.
    """

    def on_one_device(params: Any, rows: tuple[Array, Array]) -> Array:
        encoder_params, substitute_params = params

        def substitute(z: Float[Array, "T d_model"]) -> Float[Array, "variants T d_model"]:
            return substitutes(substitute_params, z)

        def error_of_window(x: Array, mask: Array) -> Array:
            return window_errors(encoder_params, x, mask, substitute)

        with jax.default_matmul_precision("highest"):
            return map_members(error_of_window, *rows)

    run = jax.jit(shard_over_batch(mesh, on_one_device))
    return lambda params, substitute_params, rows: run((params, substitute_params), rows)
