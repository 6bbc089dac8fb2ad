"""The encoder with a layer's output replaced by substitutes: its output and pretraining error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder import pure
from minsae_jax.encoder.base import Downstream, FunctionFrom, Params, Substitutes
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.encoder.patchtst.pure import bind
from minsae_jax.parallel.mesh import map_members


def function_from(
    a: Architecture, layer: int, revin: bool, substitutes: Substitutes
) -> FunctionFrom:
    """Return the function that `BaseEncoder.function_from` describes.

    With RevIN, patches are reconstructed in the unit of the normalised windows.
    """

    def run(params: Params, substitute_params: Any, x: Float[Array, "B seq_len C"]) -> Downstream:
        model = bind(a, params)

        def substitute(z: Float[Array, "T d_model"]) -> Float[Array, "variants T d_model"]:
            return substitutes(substitute_params, z)

        def finish(last: Float[Array, "T d_model"]) -> tuple[Array, Array | None]:
            if a.head_type != "pretrain":
                return last, None
            return last, _reconstruct(model, last)

        def run_channel(z: Float[Array, "T d_model"]) -> tuple[Array, Any]:
            return _map_variants(model, z, layer, substitute, finish)

        def run_window(x: Float[Array, "seq_len C"]) -> Downstream:
            embedded = model.embed(patches(a, _normalized(model, x, revin)))[0]
            hidden, outputs = map_members(run_channel, embedded)
            # Variants before channels.
            last, reconstructed = jax.tree.map(lambda array: array.swapaxes(0, 1), outputs)
            return Downstream(hidden, last, reconstructed)

        return map_members(run_window, x)

    return run


def masked_errors(
    mesh: Mesh, a: Architecture, layer: int, revin: bool, substitutes: Substitutes
) -> Callable[[Any, Any, Any], Float[Array, "B variants"]]:
    """Return the jitted (params, substitutes' params, (windows, masks)) -> error of every window.

    Masked patches of a window are set to 0, as in pretraining. The layer's output for each channel
    is replaced by each of its substitutes, then the remaining layers and the pretrain head run. The
    error is the mean over masked patches, channels and samples of (output - patch)²; both are
    normalised like the encoder's input.
    """

    def window_errors(params: Params, x: Array, mask: Array, substitute: pure.Substitute) -> Array:
        return _window_errors(bind(a, params), x, mask, layer, revin, substitute)

    return pure.masked_errors(mesh, window_errors, substitutes)


def _window_errors(
    model: PatchTST,
    x: Float[Array, "time n_vars"],
    mask: Bool[Array, " n_patches"],
    layer: int,
    revin: bool,
    substitute: Callable[[Array], Array],
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant, averaged over channels."""
    # [1, n_patches, n_vars, patch_len]
    target = patches(model.architecture, _normalized(model, x, revin))
    embedded = model.embed(jnp.where(mask[None, :, None, None], 0, target))[0]

    def channel_errors(
        z: Float[Array, "T d_model"], target: Float[Array, "n_patches patch_len"]
    ) -> Float[Array, " variants"]:
        def error(last: Float[Array, "T d_model"]) -> Float[Array, ""]:
            squared = jnp.square(_reconstruct(model, last) - target).mean(1)
            return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

        _, errors = _map_variants(model, z, layer, substitute, error)
        return errors

    return map_members(channel_errors, embedded, target[0].swapaxes(0, 1)).mean(0)


def _normalized(
    model: PatchTST, x: Float[Array, "seq_len n_vars"], revin: bool
) -> Float[Array, "1 seq_len n_vars"]:
    return model.revin(x[None]) if revin else x[None]


def _reconstruct(
    model: PatchTST, last: Float[Array, "T d_model"]
) -> Float[Array, "n_patches patch_len"]:
    """Return the pretrain head's patches of one channel, as those of a model with one channel."""
    return model.head(last[None, None])[0, :, 0]


def _map_variants(
    model: PatchTST,
    z: Float[Array, "T d_model"],
    layer: int,
    substitute: Callable[[Array], Array],
    finish: Callable[[Array], Any],
) -> tuple[Float[Array, "T d_model"], Any]:
    """Return a layer's output for one channel, and finish(last layer) for each of its substitutes.

    z: the embedded channel. The results of `finish` are stacked along a leading axis.
    """
    # Once per channel: all substitutes have these layers in common.
    hidden, queries_keys = model.run_from(z[None], 0, layer + 1)

    def run(tokens: Float[Array, "T d_model"]) -> Any:
        # Queries and keys of the earlier layers are those of the original activations: only the
        # residual stream is replaced.
        n_layers = model.architecture.n_layers
        last, _ = model.run_from(tokens[None], layer + 1, n_layers, queries_keys)
        return finish(last[0])

    # One variant after the other, so that memory does not grow with their number.
    return hidden[0], jax.lax.map(run, substitute(hidden[0]))
