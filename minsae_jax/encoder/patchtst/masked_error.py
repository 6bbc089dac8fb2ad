"""What becomes of the pretraining task when something else stands in the place of a layer's output."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder.converted import split_model
from minsae_jax.encoder.patchtst.model import Architecture, PatchTST, patches
from minsae_jax.parallel.mesh import map_members, shard_over_batch

Substitutes = Callable[[Any, Float[Array, "T d_model"]], Float[Array, "variants T d_model"]]


def masked_errors(
    mesh: Mesh, a: Architecture, layer: int, revin: bool, substitutes: Substitutes
) -> Callable[[Any, Any, Any], Float[Array, "B variants"]]:
    """The jitted (encoder's parameters, substitutes' parameters, (windows, masks)) -> errors of every window.

    A window's masked patches are set to 0, as in pretraining; the layer's output for each channel is replaced by each
    of its substitutes, and the layers after it and the pretrain head are run on. The error is the mean over masked
    patches, channels and samples of (output - patch)², both normalised as the encoder's input is.
    """
    graph, _ = split_model(a)

    def on_one_device(params: Any, rows: tuple[Array, Array]) -> Array:
        encoder_params, own_params = params
        model = nnx.merge(graph, encoder_params)
        with jax.default_matmul_precision("highest"):
            return map_members(
                lambda x, mask: _of_window(model, own_params, x, mask, layer, revin, substitutes),
                *rows,
            )

    run = jax.jit(shard_over_batch(mesh, on_one_device))
    return lambda params, own_params, rows: run((params, own_params), rows)


def _of_window(
    model: PatchTST, own_params: Any, x: Float[Array, "time n_vars"], mask: Bool[Array, " n_patches"], layer: int,
    revin: bool, substitutes: Substitutes,
) -> Float[Array, " variants"]:  # fmt: skip
    a = model.architecture
    target = patches(
        a, model.revin(x[None]) if revin else x[None]
    )  # [1, n_patches, n_vars, patch_len]
    embedded = model.embed(jnp.where(mask[None, :, None, None], 0, target))[0]

    def of_channel(
        z: Float[Array, "T d_model"], target: Float[Array, "n_patches patch_len"]
    ) -> Array:
        hidden, queries_keys = model.run_from(z[None], 0, layer + 1)

        def error(substitute: Float[Array, "T d_model"]) -> Float[Array, ""]:
            last, _ = model.run_from(substitute[None], layer + 1, a.n_layers, queries_keys)
            output = model.head(last[None])[0, :, 0]  # of a model of one channel
            return jnp.where(mask, jnp.square(output - target).mean(1), 0).sum() / mask.sum(
                dtype=jnp.float32
            )

        return jax.lax.map(error, substitutes(own_params, hidden[0]))

    return map_members(of_channel, embedded, target[0].swapaxes(0, 1)).mean(0)
