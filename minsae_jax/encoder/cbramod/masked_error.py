"""CBraMod with a layer's output replaced by substitutes: its output and pretraining error."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minsae_jax.encoder.base import Downstream
from minsae_jax.encoder.cbramod.model import CBraMod, patches
from minsae_jax.encoder.masked_error import Substitute, map_variants


def downstream(
    model: CBraMod, x: Float[Array, "seq_len C"], substitute: Substitute, layer: int
) -> Downstream:
    """Return the outputs for one window."""
    a = model.architecture

    def finish(last: Float[Array, "1 C P d_model"]) -> tuple[Array, Array | None]:
        tokens = last.reshape(1, -1, a.d_model)
        if not a.has_head:
            return tokens, None
        return tokens, model.reconstruct(last).reshape(1, -1, a.patch_len)

    embedded = model.embedding(patches(a, x[None]))
    hidden, outputs = map_variants(model, embedded, layer, substitute, finish)
    return Downstream(hidden[None], *outputs)


def window_errors(
    model: CBraMod,
    x: Float[Array, "seq_len C"],
    mask: Bool[Array, "C P"],
    substitute: Substitute,
    layer: int,
) -> Float[Array, " variants"]:
    """Return the error of one window for every variant, in (µV / 100)².

    Masked patches are replaced as in pretraining, by the embedding's mask. The layer's output for
    all tokens of the window is replaced by each of its substitutes in turn, and the remaining
    layers and the head run. Targets are the original patches.
    """
    target = patches(model.architecture, x[None])

    def error(last: Float[Array, "1 C P d_model"]) -> Float[Array, ""]:
        squared = jnp.square(model.reconstruct(last) - target).mean(-1)[0]
        return jnp.where(mask, squared, 0).sum() / mask.sum(dtype=jnp.float32)

    embedded = model.embedding(target, mask[None])
    _, errors = map_variants(model, embedded, layer, substitute, error)
    return errors
