"""PatchTST (Nie et al. 2023) as gPatchTST, the official program and `transformers` have it, in evaluation mode: there
is no dropout and no masking here.

Every channel of a window is a sequence of its own; a sequence's tokens are its patches, after a CLS token if there is
one. Shapes: B windows, T tokens, N = B * n_vars sequences, row b * n_vars + channel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from minsae_jax.encoder.patchtst.revin import RevIN, Scaler
from minsae_jax.errors import UserError
from minsae_jax.parallel.mesh import has_fused_attention, on_cpu

Dtype = Any  # jnp.float32 or jnp.bfloat16


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
    head_type: Literal["pretrain", "prediction", "regression", "classification", "none"]
    target_dim: int  # outputs of the head; the pretrain head's is patch_len
    individual_head: bool  # prediction head with a linear map for each channel
    revin: bool
    revin_affine: bool
    revin_eps: float
    # What other programs than gPatchTST do differently.
    scaler: Scaler = "mean_sd"
    end_padding: int = 0  # samples that repeat the window's last one
    leftover: Literal["start", "end"] = "start"  # where samples that fill no patch are dropped
    norm_stream: bool = True  # pre_norm normalises the stream itself, not only each branch's input
    norm_eps: float = 1e-5
    pooling: Literal["gpatchtst", "cls", "mean", "max"] = (
        "gpatchtst"  # what the head reads of a channel's tokens
    )
    denormalize: bool = (
        False  # the prediction head's output is taken back to the window's own mean and SD
    )

    @property
    def n_patches(self) -> int:
        return (self.seq_len + self.end_padding - self.patch_len) // self.stride + 1

    @property
    def first_sample(self) -> int:
        """Where in the window the first patch begins; patch p begins p strides later."""
        left = self.seq_len + self.end_padding - self.patch_len - self.stride * (self.n_patches - 1)
        return left if self.leftover == "start" else 0

    @property
    def n_tokens(self) -> int:
        return self.n_patches + self.use_cls_token


def patches(
    a: Architecture, x: Float[Array, "batch seq_len n_vars"]
) -> Float[Array, "batch n_patches n_vars patch_len"]:
    """Cut windows into patches."""
    x = jnp.pad(x, ((0, 0), (0, a.end_padding), (0, 0)), mode="edge")
    starts = a.first_sample + a.stride * jnp.arange(a.n_patches)
    return x[:, starts[:, None] + jnp.arange(a.patch_len)[None, :]].swapaxes(2, 3)


class Attention(nnx.Module):
    """Multi-head self-attention, with the scores of earlier layers added to its own (RealFormer, He et al. 2020).

    The sum of the layers' scores is one product of their concatenated queries and keys, so these are what is handed
    on, and no score matrix outlives its layer.
    """

    def __init__(self, d_model: int, n_heads: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.n_heads = n_heads
        linear = partial(nnx.Linear, d_model, d_model, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))
        self.scale = nnx.Param(jnp.array((d_model // n_heads) ** -0.5))

    def __call__(self, x: Float[Array, "N T d_model"], earlier: tuple[Array, Array] | None = None):
        """Returns the branch's output and (queries, keys) [N, heads, T, dims] of this layer after the earlier ones."""
        query, key, value = (
            linear(x).reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query = query * self.scale[...].astype(query.dtype)
        if earlier is not None:
            query, key = (
                jnp.concatenate([earlier[0], query], -1),
                jnp.concatenate([earlier[1], key], -1),
            )
        return self.out(attend(query, key, value).swapaxes(1, 2).reshape(x.shape)), (query, key)


def attend(
    query: Num[Array, "N heads T dims"],
    key: Num[Array, "N heads T dims"],
    value: Num[Array, "N heads T d_head"],
) -> Num[Array, "N heads T d_head"]:
    """softmax(query keyᵀ) value, scores and sums in float32 whatever the inputs."""
    if query.dtype == jnp.bfloat16 and has_fused_attention(query.shape[-1]):
        return _fused_attention(query, key, value)
    scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(
        value.dtype
    )  # dividing d_head numbers, not T


def _fused_attention(query: Array, key: Array, value: Array) -> Array:
    """cuDNN's flash attention, which wants [N, T, heads, dims] and values as wide as keys."""
    d_head = value.shape[-1]
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, key.shape[-1] - d_head)))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")
    return mixed.swapaxes(1, 2)[..., :d_head]


class Layer(nnx.Module):
    """Attention and feed-forward branch, normalised after each sum, or before each branch (`pre_norm`).

    The stream and its normalisation are float32; the branches compute in `dtype`. BatchNorm is a multiplication and an
    addition, which XLA puts into the pass that adds the branch: folding it into the linear maps would save nothing.
    """

    def __init__(self, a: Architecture, dtype: Dtype, *, rngs: nnx.Rngs):
        batch_norm = partial(nnx.BatchNorm, use_running_average=True, epsilon=a.norm_eps)
        layer_norm = partial(nnx.LayerNorm, epsilon=a.norm_eps, use_fast_variance=False)
        norm = batch_norm if a.norm == "BatchNorm" else layer_norm
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.pre_norm, self.norm_stream, self.res_attention = (
            a.pre_norm,
            a.norm_stream,
            a.res_attention,
        )
        self.activation = (
            jax.nn.relu if a.activation == "relu" else partial(jax.nn.gelu, approximate=False)
        )
        self.attention = Attention(a.d_model, a.n_heads, dtype, rngs=rngs)
        self.norm_attention, self.norm_ff = norm(a.d_model, rngs=rngs), norm(a.d_model, rngs=rngs)
        self.ff_in, self.ff_out = linear(a.d_model, a.d_ff), linear(a.d_ff, a.d_model)

    def __call__(self, x: Float[Array, "N T d_model"], earlier: tuple[Array, Array] | None = None):
        x, y = self._before(self.norm_attention, x)
        branch, queries_keys = self.attention(y, earlier if self.res_attention else None)
        x, y = self._before(
            self.norm_ff, self._after(self.norm_attention, x + branch.astype(x.dtype))
        )
        branch = self.ff_out(self.activation(self.ff_in(y)))
        return self._after(self.norm_ff, x + branch.astype(x.dtype)), queries_keys

    def _before(self, norm: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
        """The stream and the branch's input."""
        y = norm(x) if self.pre_norm else x
        return y if self.norm_stream else x, y

    def _after(self, norm: Callable[[Array], Array], x: Array) -> Array:
        return x if self.pre_norm else norm(x)


class Head(nnx.Module):
    """What the programs' heads give from the last layer's output, before it is denormalised."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.kind, self.use_cls_token, self.pooling = a.head_type, a.use_cls_token, a.pooling
        reads_all = a.pooling == "gpatchtst" and not a.use_cls_token
        n_in = {
            "none": 0,
            "pretrain": a.d_model,
            "prediction": a.d_model * (a.n_patches if reads_all else 1),
            "regression": a.n_vars * a.d_model,
            "classification": a.n_vars * a.d_model,
        }[a.head_type]
        n_linear = 0 if a.head_type == "none" else a.n_vars if a.individual_head else 1
        self.linears = nnx.List(
            [nnx.Linear(n_in, a.target_dim, rngs=rngs) for _ in range(n_linear)]
        )

    def __call__(self, z: Float[Array, "B n_vars T d_model"]) -> Array:
        """pretrain: [B, n_patches, n_vars, patch_len]; prediction: [B, target_dim, n_vars], but gPatchTST leaves its
        linear map out where there is a CLS token: [B, d_model, n_vars]; regression, classification: [B, target_dim];
        none: z itself."""
        if self.kind == "none":
            return z
        if self.kind == "pretrain":
            return self.linears[0](z[:, :, int(self.use_cls_token) :]).swapaxes(1, 2)
        pooled = self._pool(z)
        if self.kind != "prediction":
            return self.linears[0](pooled.reshape(len(z), -1))
        if self.use_cls_token and self.pooling == "gpatchtst":
            return pooled.swapaxes(1, 2)
        if len(self.linears) == 1:
            return self.linears[0](pooled).swapaxes(1, 2)
        return jnp.stack([linear(pooled[:, i]) for i, linear in enumerate(self.linears)], axis=-1)

    def _pool(self, z: Float[Array, "B n_vars T d_model"]) -> Float[Array, "B n_vars n_in"]:
        """What the head reads of each channel. gPatchTST: the CLS token, or else all tokens for a prediction (d_model
        outermost), the last one for the other kinds."""
        if self.pooling == "mean":
            return z.mean(2)
        if self.pooling == "max":
            return z.max(2)
        if self.use_cls_token:
            return z[:, :, 0]
        return (
            z.swapaxes(2, 3).reshape(*z.shape[:2], -1) if self.kind == "prediction" else z[:, :, -1]
        )


class PatchTST(nnx.Module):
    """The whole model; `Encoder` in converted.py is the same under jit, for everyday use.

    `dtype` is what the layers' products are computed in, float32 or bfloat16; parameters, stream, embedding and head
    stay in float32.
    """

    def __init__(self, a: Architecture, dtype: Dtype = jnp.float32, *, rngs: nnx.Rngs):
        self.architecture = a
        self.revin = RevIN(a.n_vars, a.revin_eps, a.revin_affine, a.scaler)
        n_embeddings = 1 if a.shared_embedding else a.n_vars
        self.embeddings = nnx.List(
            [nnx.Linear(a.patch_len, a.d_model, rngs=rngs) for _ in range(n_embeddings)]
        )
        self.cls_token = nnx.Param(jnp.zeros(a.d_model)) if a.use_cls_token else None
        self.position = nnx.Param(jnp.zeros((a.n_tokens, a.pos_dim)))
        self.layers = nnx.List([Layer(a, dtype, rngs=rngs) for _ in range(a.n_layers)])
        self.head = Head(a, rngs=rngs)

    def embed(
        self, x: Float[Array, "B n_patches n_vars patch_len"]
    ) -> Float[Array, "B n_vars T d_model"]:
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

    def run_layers(
        self, x: Float[Array, "N T d_model"], layers: tuple[int, ...]
    ) -> tuple[Array, ...]:
        """Outputs of the layers asked for, for sequences that know nothing of each other; those after are not run."""
        queries_keys, outputs = None, {}
        for i in range(max(layers) + 1):
            outputs[i], queries_keys = x, queries_keys = self.run_from(x, i, i + 1, queries_keys)
        return tuple(outputs[i] for i in layers)

    def run_from(
        self,
        x: Float[Array, "N T d_model"],
        first: int,
        end: int,
        earlier: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "N T d_model"], tuple[Array, Array] | None]:
        """Layers first to end - 1 on the output of the one before; and the queries and keys to hand on."""
        for layer in self.layers[first:end]:
            x, earlier = layer(x, earlier)
        return x, earlier

    def hidden(
        self,
        past_values: Float[Array, "B seq_len n_vars"],
        layers: tuple[int, ...],
        force_revin: bool = False,
    ) -> tuple[Float[Array, "B n_vars T d_model"], ...]:
        """Outputs of the layers asked for, in one pass.

        On CPU the sequences go through the layers one at a time, so that all they need stays in the cache.
        """
        a = self.architecture
        x = self.revin(past_values) if a.revin or force_revin else past_values
        if on_cpu():

            def run_sequence(x: Array) -> tuple[Array, ...]:
                return tuple(z[0] for z in self.run_layers(x[None], layers))

            return jax.lax.map(
                lambda x: jax.lax.map(run_sequence, self.embed(patches(a, x[None]))[0]), x
            )
        x = self.embed(patches(a, x))
        outputs = self.run_layers(x.reshape(-1, *x.shape[2:]), layers)
        return tuple(z.reshape(x.shape) for z in outputs)

    def __call__(self, past_values: Float[Array, "B seq_len n_vars"]) -> Array:
        (z,) = self.hidden(past_values, (self.architecture.n_layers - 1,))
        output = self.head(z)
        return (
            self.revin.denormalize(output, past_values) if self.architecture.denormalize else output
        )


def layer_index(layer: int, n_layers: int) -> int:
    """The layer's number, where negative ones count from the end.

    >>> layer_index(0, 3), layer_index(-1, 3)
    (0, 2)
    """
    if not -n_layers <= layer < n_layers:
        raise UserError(
            f"there is no layer {layer}: this encoder has {n_layers} layers, {-n_layers} to {n_layers - 1}"
        )
    return layer % n_layers
