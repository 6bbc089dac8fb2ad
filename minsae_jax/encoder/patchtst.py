"""PatchTST (Nie et al. 2023) as gPatchTST trains it on EEG, in evaluation mode: there is no dropout here.

Every channel of a window is a sequence of its own; a sequence's tokens are its patches, after a CLS token if there is
one. Shapes: B windows, T tokens, N = B * n_vars sequences, row b * n_vars + channel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minsae_jax import sharding
from minsae_jax.config import UserError
from minsae_jax.encoder.revin import RevIN


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the encoder; lengths in samples."""

    n_vars: int
    seq_len: int
    patch_len: int
    stride: int
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    activation: Literal["relu", "gelu"]
    norm: Literal["BatchNorm", "LayerNorm"]
    pre_norm: bool
    res_attention: bool
    shared_embedding: bool
    use_cls_token: bool
    pos_dim: int  # d_model, or 1: one learnt number a position, the same for every dimension
    head_type: Literal["pretrain", "prediction", "regression", "classification"]
    target_dim: int  # outputs of the head; the pretrain head's is patch_len
    individual_head: bool  # prediction head with a linear map for each channel
    revin: bool
    revin_affine: bool
    revin_eps: float

    @property
    def n_patches(self) -> int:
        return (self.seq_len - self.patch_len) // self.stride + 1

    @property
    def n_tokens(self) -> int:
        return self.n_patches + self.use_cls_token


def patches(
    x: Float[Array, "batch time n_vars"], patch_len: int, stride: int
) -> Float[Array, "batch n_patches n_vars {patch_len}"]:
    """Cut windows into patches that end with the window: what does not fill a patch is dropped at its start."""
    n_patches = (x.shape[1] - patch_len) // stride + 1
    first = x.shape[1] - patch_len - stride * (n_patches - 1)
    samples = first + stride * jnp.arange(n_patches)[:, None] + jnp.arange(patch_len)[None, :]
    return x[:, samples].swapaxes(2, 3)


class Attention(nnx.Module):
    """Multi-head self-attention, with the scores of earlier layers added to its own (RealFormer, He et al. 2020).

    The sum of the layers' scores is one product of their concatenated queries and keys, so these are what is handed
    on, and no score matrix outlives its layer.
    """

    def __init__(self, d_model: int, n_heads: int, *, rngs: nnx.Rngs):
        self.n_heads = n_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(d_model, d_model, rngs=rngs) for _ in range(4))
        self.scale = nnx.Param(jnp.array((d_model // n_heads) ** -0.5))

    def __call__(self, x: Float[Array, "N T d_model"], earlier: tuple[Array, Array] | None = None):
        """Returns the branch's output and (queries, keys) [N, T, heads, dims] of this layer after the earlier ones."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.n_heads, -1) for linear in (self.query, self.key, self.value)
        )
        query = query * self.scale[...]
        if earlier is not None:
            query, key = jnp.concatenate([earlier[0], query], -1), jnp.concatenate([earlier[1], key], -1)
        weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", query, key), axis=-1)
        mixed = jnp.einsum("nhts,nshd->nthd", weights, value)
        return self.out(mixed.reshape(x.shape)), (query, key)


class Layer(nnx.Module):
    """Attention and feed-forward branch. `pre_norm` normalises the stream itself before each branch, as gPatchTST's
    does (a usual pre-norm normalises the branch's input alone)."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        batch_norm = partial(nnx.BatchNorm, use_running_average=True, epsilon=1e-5)
        layer_norm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)
        norm = batch_norm if a.norm == "BatchNorm" else layer_norm
        self.pre_norm, self.res_attention = a.pre_norm, a.res_attention
        self.activation = jax.nn.relu if a.activation == "relu" else partial(jax.nn.gelu, approximate=False)
        self.attention = Attention(a.d_model, a.n_heads, rngs=rngs)
        self.norm_attention, self.norm_ff = norm(a.d_model, rngs=rngs), norm(a.d_model, rngs=rngs)
        self.ff_in, self.ff_out = nnx.Linear(a.d_model, a.d_ff, rngs=rngs), nnx.Linear(a.d_ff, a.d_model, rngs=rngs)

    def __call__(self, x: Float[Array, "N T d_model"], earlier: tuple[Array, Array] | None = None):
        if self.pre_norm:
            x = self.norm_attention(x)
        branch, queries_keys = self.attention(x, earlier if self.res_attention else None)
        x = x + branch
        x = self.norm_ff(x) if self.pre_norm else self.norm_attention(x)
        x = x + self.ff_out(self.activation(self.ff_in(x)))
        return x if self.pre_norm else self.norm_ff(x), queries_keys


class Head(nnx.Module):
    """The reference's four heads. Nothing is denormalised."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.kind, self.use_cls_token = a.head_type, a.use_cls_token
        n_in = {
            "pretrain": a.d_model,
            "prediction": a.d_model * (1 if a.use_cls_token else a.n_patches),
            "regression": a.n_vars * a.d_model,
            "classification": a.n_vars * a.d_model,
        }[a.head_type]
        n_linear = a.n_vars if a.individual_head else 1
        self.linears = nnx.List([nnx.Linear(n_in, a.target_dim, rngs=rngs) for _ in range(n_linear)])

    def __call__(self, z: Float[Array, "B n_vars T d_model"]) -> Array:
        """pretrain: [B, n_patches, n_vars, patch_len]; prediction: [B, target_dim, n_vars], but with a CLS token the
        reference leaves its linear map out: [B, d_model, n_vars]; regression, classification: [B, target_dim]."""
        if self.kind == "pretrain":
            return self.linears[0](z[:, :, int(self.use_cls_token) :]).swapaxes(1, 2)
        if self.kind == "prediction":
            if self.use_cls_token:
                return z[:, :, 0].swapaxes(1, 2)
            flat = z.swapaxes(2, 3).reshape(*z.shape[:2], -1)
            if len(self.linears) == 1:
                return self.linears[0](flat).swapaxes(1, 2)
            return jnp.stack([linear(flat[:, i]) for i, linear in enumerate(self.linears)], axis=-1)
        return self.linears[0](z[:, :, 0 if self.use_cls_token else -1].reshape(len(z), -1))


class PatchTST(nnx.Module):
    """The whole model; `Encoder` in converted.py is the same under jit, for everyday use."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.architecture = a
        self.revin = RevIN(a.n_vars, a.revin_eps, a.revin_affine)
        n_embeddings = 1 if a.shared_embedding else a.n_vars
        self.embeddings = nnx.List([nnx.Linear(a.patch_len, a.d_model, rngs=rngs) for _ in range(n_embeddings)])
        self.cls_token = nnx.Param(jnp.zeros(a.d_model)) if a.use_cls_token else None
        self.position = nnx.Param(jnp.zeros((a.n_tokens, a.pos_dim)))
        self.layers = nnx.List([Layer(a, rngs=rngs) for _ in range(a.n_layers)])
        self.head = Head(a, rngs=rngs)

    def embed(self, x: Float[Array, "B n_patches n_vars patch_len"]) -> Float[Array, "B n_vars T d_model"]:
        """Linear map of each patch, CLS token in front, positions added."""
        x = x.swapaxes(1, 2)
        if len(self.embeddings) == 1:
            z = self.embeddings[0](x)
        else:
            z = jnp.stack([linear(x[:, i]) for i, linear in enumerate(self.embeddings)], axis=1)
        if self.cls_token is not None:
            cls_token = jnp.broadcast_to(self.cls_token[...], (*z.shape[:2], 1, z.shape[3]))
            z = jnp.concatenate([cls_token, z], axis=2)
        return z + self.position[None, None]

    def run_layers(self, x: Float[Array, "N T d_model"], n_layers: int) -> Float[Array, "N T d_model"]:
        """The first n_layers layers, for sequences that know nothing of each other."""
        queries_keys = None
        for layer in self.layers[:n_layers]:
            x, queries_keys = layer(x, queries_keys)
        return x

    def hidden(
        self, past_values: Float[Array, "B seq_len n_vars"], n_layers: int, force_revin: bool = False
    ) -> Float[Array, "B n_vars T d_model"]:
        """Output of layer n_layers - 1; later layers are not run.

        On CPU the sequences go through the layers one at a time, so that all they need stays in the cache.
        """
        a = self.architecture
        x = self.revin(past_values) if a.revin or force_revin else past_values
        x = self.embed(patches(x, a.patch_len, a.stride))
        sequences = x.reshape(-1, *x.shape[2:])
        if sharding.on_cpu():
            z = jax.lax.map(lambda s: self.run_layers(s[None], n_layers)[0], sequences)
        else:
            z = self.run_layers(sequences, n_layers)
        return z.reshape(x.shape)

    def __call__(self, past_values: Float[Array, "B seq_len n_vars"]) -> Array:
        return self.head(self.hidden(past_values, self.architecture.n_layers))


def layer_count(layer: int, n_layers: int) -> int:
    """How many layers have to run for the output of `layer`, which may count from the end.

    >>> layer_count(0, 3), layer_count(-1, 3)
    (1, 3)
    """
    if not -n_layers <= layer < n_layers:
        raise UserError(f"there is no layer {layer}: this encoder has {n_layers} layers, {-n_layers} to {n_layers - 1}")
    return layer % n_layers + 1
