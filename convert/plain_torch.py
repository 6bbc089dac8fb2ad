"""PatchTST in plain torch functions on a state dict, sharing nothing with the Flax model that is held against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minsae_jax.encoder.patchtst.model import Architecture

StateDict = dict[str, Tensor]


def forward(
    a: Architecture, state: StateDict, x: Tensor, n_layers: int | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Output of every layer, [B, n_vars, T, d_model], and of the head, for windows [B, seq_len, n_vars]; with n_layers,
    of so many layers and no head."""
    centre, scale = _statistics(a, x)
    if a.revin:
        x = (x - centre) / scale
        if a.revin_affine:
            x = x * state["revin.affine_weight"] + state["revin.affine_bias"]
    z = _embed(a, state, x)
    scores, hidden = torch.zeros((), device=x.device), []
    for i in range(a.n_layers if n_layers is None else n_layers):
        z, scores = _layer(a, state, f"backbone.encoder.layers.{i}", z, scores)
        hidden.append(z.unflatten(0, (-1, a.n_vars)))
    if n_layers is not None:
        return hidden, None
    output = _head(a, state, hidden[-1])
    if a.denormalize and a.revin_affine:
        output = (output - state["revin.affine_bias"]) / (
            state["revin.affine_weight"] + a.revin_eps**2
        )
    return hidden, output * scale + centre if a.denormalize else output


def _statistics(a: Architecture, x: Tensor) -> tuple[Tensor, Tensor]:
    if a.scaler == "mean_abs":
        return torch.zeros(()), x.abs().mean(1, keepdim=True).clamp(min=a.revin_eps)
    scale = (x.var(1, keepdim=True, unbiased=False) + a.revin_eps).sqrt()
    return (x[:, -1:] if a.scaler == "last_sd" else x.mean(1, keepdim=True)), scale


def _embed(a: Architecture, state: StateDict, x: Tensor) -> Tensor:
    if a.end_padding:
        x = torch.cat([x, x[:, -1:].expand(-1, a.end_padding, -1)], 1)
    if a.leftover == "start":
        x = x[:, (x.shape[1] - a.patch_len) % a.stride :]
    x = x.unfold(1, a.patch_len, a.stride)
    names = (
        ["backbone.W_P"] * a.n_vars
        if a.shared_embedding
        else [f"backbone.W_P.{i}" for i in range(a.n_vars)]
    )
    z = torch.stack([_linear(state, name, x[:, :, i]) for i, name in enumerate(names)], 1).flatten(
        0, 1
    )
    if a.use_cls_token:
        z = torch.cat([state["backbone.cls_token"].expand(len(z), -1, -1), z], 1)
    return z + state["backbone.W_pos"]


def _layer(
    a: Architecture, state: StateDict, name: str, z: Tensor, earlier: Tensor
) -> tuple[Tensor, Tensor]:
    if not a.pre_norm:
        branch, scores = _attention(a, state, name, z, earlier)
        z = _norm(a, state, f"{name}.norm_attn", z + branch)
        return _norm(a, state, f"{name}.norm_ffn", z + _feed_forward(a, state, name, z)), scores
    normed = _norm(a, state, f"{name}.norm_attn", z)
    branch, scores = _attention(a, state, name, normed, earlier)
    z = (normed if a.norm_stream else z) + branch
    normed = _norm(a, state, f"{name}.norm_ffn", z)
    return (normed if a.norm_stream else z) + _feed_forward(a, state, name, normed), scores


def _attention(
    a: Architecture, state: StateDict, name: str, z: Tensor, earlier: Tensor
) -> tuple[Tensor, Tensor]:
    name = f"{name}.self_attn"
    q, k, v = (
        _linear(state, f"{name}.{n}", z).unflatten(2, (a.n_heads, -1)).transpose(1, 2)
        for n in ("W_Q", "W_K", "W_V")
    )
    scores = q @ k.transpose(2, 3) * state[f"{name}.sdp_attn.scale"]
    if a.res_attention:
        scores = scores + earlier
    return _linear(
        state, f"{name}.to_out.0", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    ), scores


def _feed_forward(a: Architecture, state: StateDict, name: str, z: Tensor) -> Tensor:
    activation = F.relu if a.activation == "relu" else F.gelu
    return _linear(state, f"{name}.ff.3", activation(_linear(state, f"{name}.ff.0", z)))


def _linear(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(a: Architecture, state: StateDict, name: str, x: Tensor) -> Tensor:
    if a.norm == "LayerNorm":
        return F.layer_norm(
            x, (a.d_model,), state[f"{name}.weight"], state[f"{name}.bias"], a.norm_eps
        )
    mean, var, weight, bias = (
        state[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x.transpose(1, 2), mean, var, weight, bias, eps=a.norm_eps).transpose(1, 2)


def _head(a: Architecture, state: StateDict, z: Tensor) -> Tensor:
    if a.head_type == "none":
        return z
    if a.head_type == "pretrain":
        return _linear(state, "head.linear", z[:, :, int(a.use_cls_token) :]).transpose(1, 2)
    if a.pooling == "mean":
        pooled = z.mean(2)
    elif a.pooling == "max":
        pooled = z.amax(2)
    elif a.use_cls_token:
        pooled = z[:, :, 0]
    elif a.head_type == "prediction":
        pooled = z.transpose(2, 3).flatten(2)
    else:
        pooled = z[:, :, -1]
    if a.head_type != "prediction":
        return _linear(state, "head.linear", pooled.flatten(1))
    if a.use_cls_token and a.pooling == "gpatchtst":
        return pooled.transpose(1, 2)
    names = [f"head.linears.{i}" if a.individual_head else "head.linear" for i in range(a.n_vars)]
    return torch.stack([_linear(state, name, pooled[:, i]) for i, name in enumerate(names)], 2)
