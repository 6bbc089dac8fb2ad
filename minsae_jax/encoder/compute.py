"""Activations of some layers, computed on this process's devices or by a host function."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float

from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    BaseEncoder,
    ComputeOptions,
    HiddenFunction,
    Params,
    Precision,
)
from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import (
    DATA,
    fetch_batch,
    make_local_mesh,
    put_batch,
    replicated,
    shard_over_batch,
    start_fetch,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Of one layer: on the devices, or of a host function.
Output = jax.Array | np.ndarray


class Activations:
    """Computes the outputs of some layers, batch by batch.

    Every device computes its own windows. float32 precision is full float32, without TF32. A host
    function is never called by two threads at once, as models of PyTorch with hooks require. Raises
    UserError if the encoder cannot compute with the options.
    """

    def __init__(
        self,
        encoder: BaseEncoder,
        layers: tuple[int, ...],
        dtype: str = "float32",
        options: ComputeOptions = DEFAULT_OPTIONS,
    ):
        encoder.check_options(options)
        self.spec = encoder.spec
        self.dtype = DTYPES[dtype]
        self.runs_on_host = encoder.runs_on_host
        self._function = encoder.function(layers, options)
        self._params = encoder.params
        self._host_lock = Lock()
        if not self.runs_on_host:
            self._mesh = make_local_mesh()
            self._params = jax.device_put(encoder.params, replicated(self._mesh))
            self._function = sharded(self._mesh, self._function, dtype, options.precision)

    def start(
        self, x: Float[np.ndarray, "windows seq_len n_vars"], padded_windows: int
    ) -> tuple[Output, ...]:
        """Start computing a batch and return the outputs of the layers, for `fetch`.

        Devices compute, and copy the outputs to the host, while this returns at once. x: float32;
        padded_windows: size of the largest batch, to which all are padded, so that there is one
        compilation.
        """
        if self.runs_on_host:
            # `train --live` reads ahead in two threads.
            with self._host_lock:
                outputs = self._function(self._params, x)
            _check_lengths(outputs, len(x))
            return tuple(np.asarray(z).astype(self.dtype, copy=False) for z in outputs)
        windows_per_device = -(-padded_windows // self._mesh.shape[DATA])
        padded = put_batch(self._mesh, x, windows_per_device)
        outputs = self._function(self._params, padded)
        _check_lengths(outputs, len(padded))
        return tuple(start_fetch(z) for z in outputs)

    def fetch(self, output: Output, n_windows: int) -> list[np.ndarray]:
        """Wait for an output and return its first windows on the host.

        Returns pieces of [sequences, n_tokens, d_model], one for each device, in order.
        """
        parts = fetch_batch(output, n_windows) if isinstance(output, jax.Array) else [output]
        sequence_shape = (self.spec.tokens.n_tokens, self.spec.d_model)
        return [part.reshape(-1, *sequence_shape) for part in parts]


def _check_lengths(outputs: Sequence[Any], n_windows: int) -> None:
    for z in outputs:
        if len(z) != n_windows:
            raise UserError(f"the function returned {len(z)} windows for {n_windows}")


@lru_cache(8)
def sharded(
    mesh: jax.sharding.Mesh, function: HiddenFunction, dtype: str, precision: Precision
) -> Callable[[Params, Any], tuple[jax.Array, ...]]:
    """Return the compiled (params, windows) -> outputs of the layers, in `dtype`.

    The cache makes all splits share one compilation.
    """
    matmul_precision = "highest" if precision == "float32" else "default"

    def on_one_device(params: Params, past_values: jax.Array) -> tuple[jax.Array, ...]:
        with jax.default_matmul_precision(matmul_precision):
            outputs = function(params, past_values)
        return tuple(z.astype(DTYPES[dtype]) for z in outputs)

    return jax.jit(shard_over_batch(mesh, on_one_device))
