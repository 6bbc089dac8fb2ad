"""Encoders of families of Flax models, whose weights are converted once.

A model is a class of nnx modules that is made by `model_type(architecture, dtype, rngs=…)`. Its
call returns the output of the head, and `hidden(windows, layers)` the outputs of layers.
"""

from abc import abstractmethod
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    BaseEncoder,
    ComputeOptions,
    HiddenFunction,
    Params,
    Precision,
    fingerprint_of,
)

Model = TypeVar("Model", bound=nnx.Module)


class NativeEncoder(BaseEncoder):
    """A Flax encoder: an architecture (a frozen dataclass) and its parameters.

    Derived classes set `architecture_type`, `model_type` and `spec`, and define `without_head`.
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

    def function(
        self, layers: tuple[int, ...], options: ComputeOptions = DEFAULT_OPTIONS
    ) -> HiddenFunction:
        architecture = self.with_options(options)
        return hidden_function(self.model_type, architecture, layers, options.precision)

    def with_options(self, options: ComputeOptions) -> Any:
        """Return the architecture, changed as the options say; the parameters stay the same."""
        return self.architecture

    @abstractmethod
    def without_head(self) -> Any:
        """Return the architecture without the head; its parameters are a subset of these."""

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
    # Shapes only: real initial values would be thrown away. Parameters have 32 bits also where a
    # program's default is 64.
    with jax.enable_x64(False):
        model = nnx.eval_shape(lambda: model_type(architecture, dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


# Cached, so that equal arguments share one compilation.
@lru_cache(32)
def hidden_function(
    model_type: Any, architecture: Any, layers: tuple[int, ...], precision: Precision
) -> HiddenFunction:
    """Return (params, windows) -> outputs of the layers, as `BaseEncoder.function` describes it."""

    def hidden(params: Params, x: Array) -> tuple[Array, ...]:
        return bind(model_type, architecture, params, precision).hidden(x, layers)

    return hidden


@partial(jax.jit, static_argnums=(0, 1))
def _forward(model_type: type[Any], architecture: Any, params: Params, x: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return bind(model_type, architecture, params)(x)
