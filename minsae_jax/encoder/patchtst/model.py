"""PatchTST (Nie et al. 2023) in evaluation mode: no dropout and no masking.

One model covers gPatchTST, the official programs and `transformers`. Every channel of a window is
an independent sequence, whose tokens are its patches, after a CLS token if the encoder has one.

Shapes: B windows, T tokens, N = B * n_vars sequences, in the order b * n_vars + channel.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from minsae_jax.encoder.linear import Dtype, linear
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.attention import Attention, QueriesKeys
from minsae_jax.encoder.patchtst.revin import RevIN
from minsae_jax.parallel.mesh import on_cpu

Norm = Callable[[Array], Array]


def patches(
    a: Architecture, x: Float[Array, "batch seq_len n_vars"]
) -> Float[Array, "batch n_patches n_vars patch_len"]:
    """Cut windows into patches."""
    x = jnp.pad(x, ((0, 0), (0, a.end_padding), (0, 0)), mode="edge")
    # One gather of all patches: sample index = start of the patch + position within it.
    starts = a.first_sample + a.stride * jnp.arange(a.n_patches)
    samples = starts[:, None] + jnp.arange(a.patch_len)[None, :]
    return x[:, samples].swapaxes(2, 3)


class Layer(nnx.Module):
    """An attention branch and a feed-forward branch, each added to the residual stream.

    The stream is normalised after each sum, or before each branch (`pre_norm`). Stream and norms
    are float32; the branches compute in `dtype`.
    """

    def __init__(self, a: Architecture, dtype: Dtype, *, rngs: nnx.Rngs):
        # BatchNorm with running averages is one multiplication and one addition, which XLA fuses
        # into the pass that adds the branch: folding it into the linear maps would save nothing.
        batch_norm = partial(nnx.BatchNorm, use_running_average=True, epsilon=a.norm_eps)
        # Flax's fast variance, E[x²] - E[x]², loses digits in float32.
        layer_norm = partial(nnx.LayerNorm, epsilon=a.norm_eps, use_fast_variance=False)
        norm = batch_norm if a.norm == "BatchNorm" else layer_norm
        dense = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        # torch's default is the exact GELU, JAX's the tanh approximation.
        exact_gelu = partial(jax.nn.gelu, approximate=False)
        self.pre_norm = a.pre_norm
        self.norm_stream = a.norm_stream
        self.res_attention = a.res_attention
        self.activation = jax.nn.relu if a.activation == "relu" else exact_gelu
        n_summed = a.n_layers if a.res_attention else 1
        self.attention = Attention(a.d_model, a.n_heads, n_summed, dtype, rngs=rngs)
        self.norm_attention = norm(a.d_model, rngs=rngs)
        self.norm_ff = norm(a.d_model, rngs=rngs)
        self.ff_in = dense(a.d_model, a.d_ff)
        self.ff_out = dense(a.d_ff, a.d_model)

    def __call__(
        self, x: Float[Array, "N T d_model"], earlier: tuple[QueriesKeys, ...] = ()
    ) -> tuple[Float[Array, "N T d_model"], tuple[QueriesKeys, ...]]:
        """Return the stream after this layer, and queries and keys for the next layer."""
        x, branch_input = self._before_branch(self.norm_attention, x)
        branch, queries_keys = self.attention(branch_input, earlier if self.res_attention else ())
        x = self._after_branch(self.norm_attention, x + branch.astype(x.dtype))

        x, branch_input = self._before_branch(self.norm_ff, x)
        branch = linear(self.ff_out, linear(self.ff_in, branch_input, self.activation))
        x = self._after_branch(self.norm_ff, x + branch.astype(x.dtype))
        return x, queries_keys

    def _before_branch(self, norm: Norm, x: Array) -> tuple[Array, Array]:
        """Return the stream and the input of the branch."""
        if not self.pre_norm:
            return x, x
        normalized = norm(x)
        # gPatchTST adds the branch to the normalised stream; transformers to the stream itself.
        if self.norm_stream:
            return normalized, normalized
        return x, normalized

    def _after_branch(self, norm: Norm, x: Array) -> Array:
        return x if self.pre_norm else norm(x)


class Head(nnx.Module):
    """The head of the PyTorch programs, on the output of the last layer."""

    def __init__(self, a: Architecture, *, rngs: nnx.Rngs):
        self.kind = a.head_type
        self.use_cls_token = a.use_cls_token
        self.pooling = a.pooling
        reads_all_patches = a.pooling == "gpatchtst" and not a.use_cls_token
        n_inputs = {
            "none": 0,
            "pretrain": a.d_model,
            "prediction": a.d_model * (a.n_patches if reads_all_patches else 1),
            "regression": a.n_vars * a.d_model,
            "classification": a.n_vars * a.d_model,
        }[a.head_type]
        n_linear = 1
        if a.head_type == "none":
            n_linear = 0
        elif a.individual_head:
            n_linear = a.n_vars
        linears = [nnx.Linear(n_inputs, a.target_dim, rngs=rngs) for _ in range(n_linear)]
        self.linears = nnx.List(linears)

    def __call__(self, z: Float[Array, "B n_vars T d_model"]) -> Array:
        """Return the output of the head, whose shape depends on its kind.

        pretrain: [B, n_patches, n_vars, patch_len]. prediction: [B, target_dim, n_vars], but
        [B, d_model, n_vars] for gPatchTST with a CLS token, which skips its linear map. regression
        and classification: [B, target_dim]. none: z.
        """
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
        per_channel = [layer(pooled[:, i]) for i, layer in enumerate(self.linears)]
        return jnp.stack(per_channel, axis=-1)

    def _pool(self, z: Float[Array, "B n_vars T d_model"]) -> Float[Array, "B n_vars n_inputs"]:
        """Return the input of the linear map for each channel.

        gPatchTST reads the CLS token if there is one; without it, all tokens for a prediction
        (d_model outermost) and the last token for the other kinds.
        """
        if self.pooling == "mean":
            return z.mean(2)
        if self.pooling == "max":
            return z.max(2)
        if self.use_cls_token:
            return z[:, :, 0]
        if self.kind == "prediction":
            return z.swapaxes(2, 3).reshape(*z.shape[:2], -1)
        return z[:, :, -1]


class PatchTST(nnx.Module):
    """The whole model: RevIN, patch embedding, layers and head.

    `dtype` (float32 or bfloat16) is the precision of the products in the layers; parameters,
    residual stream, embedding and head are float32. `PatchTSTEncoder` in patchtst/encoder.py wraps
    this model for everyday use.
    """

    def __init__(self, a: Architecture, dtype: Dtype = jnp.float32, *, rngs: nnx.Rngs):
        self.architecture = a
        self.revin = RevIN(a.n_vars, a.revin_eps, a.revin_affine, a.scaler)
        n_embeddings = 1 if a.shared_embedding else a.n_vars
        embeddings = [nnx.Linear(a.patch_len, a.d_model, rngs=rngs) for _ in range(n_embeddings)]
        self.embeddings = nnx.List(embeddings)
        self.cls_token = nnx.Param(jnp.zeros(a.d_model)) if a.use_cls_token else None
        self.position = nnx.Param(jnp.zeros((a.n_tokens, a.pos_dim)))
        self.layers = nnx.List([Layer(a, dtype, rngs=rngs) for _ in range(a.n_layers)])
        self.head = Head(a, rngs=rngs)

    def __call__(self, past_values: Float[Array, "B seq_len n_vars"]) -> Array:
        """Return the output of the head; `Head.__call__` lists its shapes."""
        (z,) = self.hidden(past_values, (self.architecture.n_layers - 1,))
        output = self.head(z)
        if self.architecture.denormalize:
            output = self.revin.denormalize(output, past_values)
        return output

    def normalized(
        self, past_values: Float[Array, "B seq_len n_vars"]
    ) -> Float[Array, "B seq_len n_vars"]:
        """Return windows as the patches are cut from them: after RevIN, if the model has it."""
        return self.revin(past_values) if self.architecture.revin else past_values

    def hidden(
        self, past_values: Float[Array, "B seq_len n_vars"], layers: tuple[int, ...]
    ) -> tuple[Float[Array, "B n_vars T d_model"], ...]:
        """Return the outputs of the requested layers (indices from 0), computed in one pass.

        Windows are in SD.
        """
        x = self.normalized(past_values)
        if on_cpu():
            return self._hidden_one_by_one(x, layers)
        x = self.embed(patches(self.architecture, x))
        outputs = self.run_layers(x.reshape(-1, *x.shape[2:]), layers)
        # Back from sequences to [B, n_vars, T, d_model].
        return tuple(z.reshape(x.shape) for z in outputs)

    def _hidden_one_by_one(
        self, x: Float[Array, "B seq_len n_vars"], layers: tuple[int, ...]
    ) -> tuple[Float[Array, "B n_vars T d_model"], ...]:
        """Run one sequence at a time, so that everything it needs stays in the CPU's cache."""

        def run_sequence(tokens: Float[Array, "T d_model"]) -> tuple[Array, ...]:
            return tuple(z[0] for z in self.run_layers(tokens[None], layers))

        def run_window(window: Float[Array, "seq_len n_vars"]) -> tuple[Array, ...]:
            embedded = self.embed(patches(self.architecture, window[None]))[0]
            return jax.lax.map(run_sequence, embedded)

        return jax.lax.map(run_window, x)

    def embed(
        self, x: Float[Array, "B n_patches n_vars patch_len"]
    ) -> Float[Array, "B n_vars T d_model"]:
        """Apply a linear map to each patch, prepend the CLS token and add the positions."""
        x = x.swapaxes(1, 2)
        if len(self.embeddings) == 1:
            z = self.embeddings[0](x)
        else:
            per_channel = [layer(x[:, i]) for i, layer in enumerate(self.embeddings)]
            z = jnp.stack(per_channel, axis=1)
        # A position of width 1 is added to every dimension.
        position = self.position[...]
        if self.cls_token is not None:
            # The CLS token is added with its position to zeros, which XLA pads in the pass that
            # adds the positions.
            z = jnp.pad(z, ((0, 0), (0, 0), (1, 0), (0, 0)))
            cls_token = self.cls_token[...][None]
            position = position + jnp.pad(cls_token, ((0, len(position) - 1), (0, 0)))
        return z + position[None, None]

    def run_layers(
        self, x: Float[Array, "N T d_model"], layers: tuple[int, ...]
    ) -> tuple[Float[Array, "N T d_model"], ...]:
        """Return the outputs of the requested layers; the layers after the last one do not run."""
        earlier: tuple[QueriesKeys, ...] = ()
        outputs = {}
        for i in range(max(layers) + 1):
            x, earlier = self.layers[i](x, earlier)
            outputs[i] = x
        return tuple(outputs[i] for i in layers)

    def run_from(
        self,
        x: Float[Array, "N T d_model"],
        first: int,
        end: int,
        earlier: tuple[QueriesKeys, ...] = (),
    ) -> tuple[Float[Array, "N T d_model"], tuple[QueriesKeys, ...]]:
        """Run the layers first to end - 1 on the output of the layer before them.

        earlier: queries and keys of the layers before. Returns the stream, and queries and keys
        for the layer after.
        """
        for layer in self.layers[first:end]:
            x, earlier = layer(x, earlier)
        return x, earlier
