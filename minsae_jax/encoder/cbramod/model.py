"""CBraMod (Wang et al. 2025, arXiv 2412.07236) in evaluation mode: no dropout.

A window is a grid of patches, channels x time. Every patch becomes one token, and every layer mixes
tokens along both axes of the grid: one half of their dimensions along the channels, the other half
along time.

Shapes: B windows, C channels, P patches of a channel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from minsae_jax.encoder.attention import attend
from minsae_jax.encoder.cbramod.architecture import (
    NORM_GROUPS,
    STEM_PADDING,
    STEM_STRIDE,
    Architecture,
)
from minsae_jax.encoder.linear import Dtype

# torch's default is the exact GELU, JAX's the tanh approximation.
gelu = partial(jax.nn.gelu, approximate=False)


def patches(a: Architecture, x: Float[Array, "B seq_len C"]) -> Float[Array, "B C P patch_len"]:
    """Cut windows into patches, which neither overlap nor leave samples out."""
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], a.n_patches, a.patch_len)


class Stem(nnx.Module):
    """Three convolutions over the samples of a patch, each with a group norm and GELU.

    The norms share their statistics between all patches of a window.
    """

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        width = a.stem_width
        narrow = partial(nnx.Conv, width, width, (3,), padding=1, rngs=rngs)
        first = nnx.Conv(
            1, width, (a.stem_kernel,), strides=STEM_STRIDE, padding=STEM_PADDING, rngs=rngs
        )
        self.convolutions = nnx.List([first, narrow(), narrow()])
        # Flax's fast variance, E[x²] - E[x]², loses digits in float32.
        norm = partial(
            nnx.GroupNorm, width, NORM_GROUPS, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.norms = nnx.List([norm(), norm(), norm()])

    def __call__(self, x: Float[Array, "B C P patch_len"]) -> Float[Array, "B C P d_model"]:
        """Return the features of every patch, the convolutions' channels outermost."""
        z = x.reshape(len(x), -1, x.shape[3], 1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            z = gelu(norm(convolution(z)))
        return z.swapaxes(2, 3).reshape(*x.shape[:3], -1)


class Embedding(nnx.Module):
    """The sum of three views of a patch: its shape, its amplitude spectrum and its place.

    The place is a convolution over the grid of tokens, so that it depends on their neighbours
    instead of on names of channels.
    """

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        # Replaces masked patches; zeros in the published weights, since it is not trained.
        self.mask = nnx.Param(jnp.zeros(a.patch_len))
        self.stem = Stem(a, rngs=rngs)
        self.spectrum = nnx.Linear(a.n_frequencies, a.d_model, rngs=rngs)
        # 19 channels x 7 patches, one filter per dimension.
        self.position = nnx.Conv(
            a.d_model,
            a.d_model,
            (19, 7),
            padding="SAME",
            feature_group_count=a.d_model,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B C P patch_len"], masked: Bool[Array, "B C P"] | None = None
    ) -> Float[Array, "B C P d_model"]:
        """Return the tokens of patches, where `masked` ones are replaced."""
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask[None, None, None], x)
        amplitudes = jnp.abs(jnp.fft.rfft(x, norm="forward"))
        z = self.stem(x) + self.spectrum(amplitudes)
        return z + self.position(z)


class Attention(nnx.Module):
    """Multi-head self-attention of one half of the dimensions."""

    def __init__(self, width: int, n_heads: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.n_heads = n_heads
        self.queries_keys_values = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Num[Array, "B N T width"]) -> Num[Array, "B N T width"]:
        """Return the output for every sequence of T tokens."""
        sequences = x.reshape(-1, *x.shape[2:])
        projected = self.queries_keys_values(sequences)
        heads = projected.reshape(*sequences.shape[:2], 3 * self.n_heads, -1).swapaxes(1, 2)
        queries, keys, values = jnp.split(heads, 3, axis=1)
        mixed = attend(queries * queries.shape[-1] ** -0.5, keys, values)
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


class Layer(nnx.Module):
    """Criss-cross attention and a feed-forward branch, each added to the residual stream.

    Stream and norms are float32; the branches compute in `dtype`.
    """

    def __init__(self, a: Architecture, dtype: Dtype, *, rngs: nnx.Rngs):
        norm = partial(nnx.LayerNorm, a.d_model, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        half = partial(Attention, a.d_model // 2, a.n_heads // 2, dtype, rngs=rngs)
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.norm_attention = norm()
        self.over_channels = half()
        self.over_time = half()
        self.norm_ff = norm()
        self.ff_in = linear(a.d_model, a.d_ff)
        self.ff_out = linear(a.d_ff, a.d_model)

    def __call__(self, x: Float[Array, "B C P d_model"]) -> Float[Array, "B C P d_model"]:
        first, second = jnp.split(self.norm_attention(x), 2, axis=-1)
        over_channels = self.over_channels(first.swapaxes(1, 2)).swapaxes(1, 2)
        branch = jnp.concatenate([over_channels, self.over_time(second)], axis=-1)
        x = x + branch.astype(x.dtype)
        branch = self.ff_out(gelu(self.ff_in(self.norm_ff(x))))
        return x + branch.astype(x.dtype)


class CBraMod(nnx.Module):
    """The whole model: embedding, layers and the head that reconstructs patches.

    `dtype` (float32 or bfloat16) is the precision of the products in the layers; parameters,
    residual stream, embedding and head are float32.
    """

    def __init__(self, a: Architecture, dtype: Dtype = jnp.float32, *, rngs: nnx.Rngs):
        self.architecture = a
        self.embedding = Embedding(a, rngs=rngs)
        self.layers = nnx.List([Layer(a, dtype, rngs=rngs) for _ in range(a.n_layers)])
        self.head = nnx.Linear(a.d_model, a.patch_len, rngs=rngs) if a.has_head else None

    def __call__(self, x: Float[Array, "B seq_len C"]) -> Float[Array, "B C P _"]:
        """Return the patches as the head reconstructs them, or the last layer without a head."""
        (z,) = self.hidden(x, (self.architecture.n_layers - 1,))
        return self.reconstruct(z)

    def reconstruct(self, z: Float[Array, "B C P d_model"]) -> Float[Array, "B C P _"]:
        """Return the head's patches for the output of the last layer; z itself without a head."""
        return z if self.head is None else self.head(z)

    def hidden(
        self, x: Float[Array, "B seq_len C"], layers: tuple[int, ...]
    ) -> tuple[Float[Array, "B C P d_model"], ...]:
        """Return the outputs of the requested layers (indices from 0), computed in one pass.

        Windows are in µV / 100 at 200 Hz.
        """
        z = self.embedding(patches(self.architecture, x))
        outputs = {}
        for i in range(max(layers) + 1):
            z = self.layers[i](z)
            outputs[i] = z
        return tuple(outputs[i] for i in layers)

    def run_from(
        self, z: Float[Array, "B C P d_model"], first: int, end: int, earlier: tuple[()] = ()
    ) -> tuple[Float[Array, "B C P d_model"], tuple[()]]:
        """Run the layers first to end - 1 on the output of the layer before them.

        Returns the stream, and (): layers hand on nothing else.
        """
        for layer in self.layers[first:end]:
            z = layer(z)
        return z, earlier
