"""PatchTST in plain torch functions on a state dict, independent of the Flax model it verifies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minsae_jax.encoder.patchtst.architecture import Architecture

StateDict = dict[str, Tensor]


def forward(
    a: Architecture, state: StateDict, x: Tensor, n_layers: int | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Return the output of every layer, [B, n_vars, T, d_model], and the output of the head.

    x: windows [B, seq_len, n_vars] in SD. n_layers: run only the first layers, and no head.
    """
    centre, scale = _statistics(a, x)
    if a.revin:
        x = (x - centre) / scale
        if a.revin_affine:
            x = x * state["revin.affine_weight"] + state["revin.affine_bias"]
    z = _embed(a, state, x)
    # The first layer has no earlier scores to add: this 0 broadcasts.
    scores = torch.zeros((), device=x.device)
    hidden = []
    for i in range(a.n_layers if n_layers is None else n_layers):
        z, scores = _layer(a, state, f"backbone.encoder.layers.{i}", z, scores)
        hidden.append(z.unflatten(0, (-1, a.n_vars)))
    if n_layers is not None:
        return hidden, None
    output = _head(a, state, hidden[-1])
    if a.denormalize:
        if a.revin_affine:
            # eps² as in the reference, see `RevIN.denormalize`.
            weight = state["revin.affine_weight"] + a.revin_eps**2
            output = (output - state["revin.affine_bias"]) / weight
        output = output * scale + centre
    return hidden, output


def _statistics(a: Architecture, x: Tensor) -> tuple[Tensor, Tensor]:
    if a.scaler == "mean_abs":
        return torch.zeros(()), x.abs().mean(1, keepdim=True).clamp(min=a.revin_eps)
    scale = (x.var(1, keepdim=True, unbiased=False) + a.revin_eps).sqrt()
    centre = x[:, -1:] if a.scaler == "last_sd" else x.mean(1, keepdim=True)
    return centre, scale


def _embed(a: Architecture, state: StateDict, x: Tensor) -> Tensor:
    if a.end_padding:
        padding = x[:, -1:].expand(-1, a.end_padding, -1)
        x = torch.cat([x, padding], 1)
    if a.leftover == "start":
        # gPatchTST drops the samples that fill no patch at the start of the window.
        x = x[:, (x.shape[1] - a.patch_len) % a.stride :]
    x = x.unfold(1, a.patch_len, a.stride)
    names = [f"backbone.W_P.{i}" for i in range(a.n_vars)]
    if a.shared_embedding:
        names = ["backbone.W_P"] * a.n_vars
    channels = [_linear(state, name, x[:, :, i]) for i, name in enumerate(names)]
    # Every channel becomes a sequence: [B * n_vars, T, d_model].
    z = torch.stack(channels, 1).flatten(0, 1)
    if a.use_cls_token:
        cls_token = state["backbone.cls_token"].expand(len(z), -1, -1)
        z = torch.cat([cls_token, z], 1)
    return z + state["backbone.W_pos"]


def _layer(
    a: Architecture, state: StateDict, name: str, z: Tensor, earlier: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the stream after a layer and its scores; `earlier` are those of the layer before."""
    if not a.pre_norm:
        branch, scores = _attention(a, state, name, z, earlier)
        z = _norm(a, state, f"{name}.norm_attn", z + branch)
        branch = _feed_forward(a, state, name, z)
        return _norm(a, state, f"{name}.norm_ffn", z + branch), scores
    normed = _norm(a, state, f"{name}.norm_attn", z)
    branch, scores = _attention(a, state, name, normed, earlier)
    stream = normed if a.norm_stream else z
    z = stream + branch
    normed = _norm(a, state, f"{name}.norm_ffn", z)
    branch = _feed_forward(a, state, name, normed)
    stream = normed if a.norm_stream else z
    return stream + branch, scores


def _attention(
    a: Architecture, state: StateDict, name: str, z: Tensor, earlier: Tensor
) -> tuple[Tensor, Tensor]:
    name = f"{name}.self_attn"

    def heads(part: str) -> Tensor:
        projected = _linear(state, f"{name}.{part}", z)
        return projected.unflatten(2, (a.n_heads, -1)).transpose(1, 2)

    # Written as RealFormer defines it: score matrices are added, not queries concatenated.
    scores = heads("W_Q") @ heads("W_K").transpose(2, 3) * state[f"{name}.sdp_attn.scale"]
    if a.res_attention:
        scores = scores + earlier
    mixed = scores.softmax(-1) @ heads("W_V")
    merged_heads = mixed.transpose(1, 2).flatten(2)
    return _linear(state, f"{name}.to_out.0", merged_heads), scores


def _feed_forward(a: Architecture, state: StateDict, name: str, z: Tensor) -> Tensor:
    activation = F.relu if a.activation == "relu" else F.gelu
    inner = activation(_linear(state, f"{name}.ff.0", z))
    return _linear(state, f"{name}.ff.3", inner)


def _linear(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(a: Architecture, state: StateDict, name: str, x: Tensor) -> Tensor:
    if a.norm == "LayerNorm":
        weight = state[f"{name}.weight"]
        return F.layer_norm(x, (a.d_model,), weight, state[f"{name}.bias"], a.norm_eps)
    # torch normalises axis 1, which must be d_model.
    normed = F.batch_norm(
        x.transpose(1, 2),
        state[f"{name}.1.running_mean"],
        state[f"{name}.1.running_var"],
        state[f"{name}.1.weight"],
        state[f"{name}.1.bias"],
        eps=a.norm_eps,
    )
    return normed.transpose(1, 2)


def _head(a: Architecture, state: StateDict, z: Tensor) -> Tensor:
    if a.head_type == "none":
        return z
    if a.head_type == "pretrain":
        return _linear(state, "head.linear", z[:, :, int(a.use_cls_token) :]).transpose(1, 2)
    pooled = _pool(a, z)
    if a.head_type != "prediction":
        return _linear(state, "head.linear", pooled.flatten(1))
    if a.use_cls_token and a.pooling == "gpatchtst":
        return pooled.transpose(1, 2)
    outputs = []
    for i in range(a.n_vars):
        name = f"head.linears.{i}" if a.individual_head else "head.linear"
        outputs.append(_linear(state, name, pooled[:, i]))
    return torch.stack(outputs, 2)


def _pool(a: Architecture, z: Tensor) -> Tensor:
    if a.pooling == "mean":
        return z.mean(2)
    if a.pooling == "max":
        return z.amax(2)
    if a.use_cls_token:
        return z[:, :, 0]
    # gPatchTST without a CLS token: all tokens, or the last one.
    if a.head_type == "prediction":
        return z.transpose(2, 3).flatten(2)
    return z[:, :, -1]
