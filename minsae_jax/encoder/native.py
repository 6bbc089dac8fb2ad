"""Encoders of families of Flax models, whose weights are converted once.

A model is a class of nnx modules that is made by `model_type(architecture, dtype, rngs=…)`. Its
call returns the output of the head.
"""

from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from minsae_jax.encoder.base import BaseEncoder, Params, Precision, fingerprint_of

Model = TypeVar("Model", bound=nnx.Module)


class NativeEncoder(BaseEncoder):
    """A Flax encoder: an architecture (a frozen dataclass) and its parameters.

    Derived classes set `architecture_type`, `model_type` and `spec`, and define `function`.
    `fingerprint` is the SHA-256 of the architecture and all parameters.
    """

    architecture_type: type
    model_type: Any

    def __init__(self, architecture: Any, params: Params):
        self.architecture = architecture
        self.params = params
        self.fingerprint = fingerprint_of(architecture, params)

    def __call__(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"]
    ) -> Float[Array, "..."]:
        """Return the output of the head, in full float32 (no TF32 on GPU).

        The model's class lists the shapes. Raises UserError if the windows do not fit.
        """
        x = self.checked(past_values)
        return _forward(self.model_type, self.architecture, self.params, x)

    @classmethod
    def abstract_params(cls, architecture: Any) -> Params:
        """Return shapes and dtypes of the parameters; nothing is allocated."""
        _, params = _abstract_model(cls.model_type, architecture, "float32")
        return params


def bind(
    model_type: type[Model], architecture: Any, params: Params, precision: Precision = "float32"
) -> Model:
    """Return the model with the given parameters, whose methods are then pure functions of them.

    Nothing is copied. Under jit: `jax.jit(lambda params, x: bind(PatchTST, a, params)(x))`.
    """
    graph, _ = _abstract_model(model_type, architecture, precision)
    return nnx.merge(graph, params)


# Cached, since every trace of a jitted function calls `bind`.
@lru_cache(64)
def _abstract_model(
    model_type: Any, architecture: Any, precision: Precision
) -> tuple[nnx.GraphDef, Params]:
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    # Shapes only: real initial values would be thrown away.
    model = nnx.eval_shape(lambda: model_type(architecture, dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


@partial(jax.jit, static_argnums=(0, 1))
def _forward(model_type: type[Any], architecture: Any, params: Params, x: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return bind(model_type, architecture, params)(x)
