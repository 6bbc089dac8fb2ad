"""PatchTST in plain torch functions on a state dict, sharing nothing with the Flax model that is held against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minsae_jax.encoder.patchtst import Architecture

StateDict = dict[str, Tensor]


def forward(a: Architecture, state: StateDict, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Output of every layer, [B, n_vars, T, d_model], and of the head, for windows [B, seq_len, n_vars]."""
    if a.revin:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + a.revin_eps).sqrt()
        if a.revin_affine:
            x = x * state["revin.affine_weight"] + state["revin.affine_bias"]
    x = x[:, a.seq_len - a.patch_len - a.stride * (a.n_patches - 1) :].unfold(1, a.patch_len, a.stride)
    names = ["backbone.W_P"] * a.n_vars if a.shared_embedding else [f"backbone.W_P.{i}" for i in range(a.n_vars)]
    z = torch.stack([_linear(state, name, x[:, :, i]) for i, name in enumerate(names)], 1).flatten(0, 1)
    if a.use_cls_token:
        z = torch.cat([state["backbone.cls_token"].expand(len(z), -1, -1), z], 1)
    z = z + state["backbone.W_pos"]
    scores, hidden = torch.zeros(()), []
    for i in range(a.n_layers):
        z, scores = _layer(a, state, f"backbone.encoder.layers.{i}", z, scores)
        hidden.append(z.unflatten(0, (-1, a.n_vars)))
    return hidden, _head(a, state, hidden[-1])


def _layer(a: Architecture, state: StateDict, name: str, z: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    attention = f"{name}.self_attn"
    if a.pre_norm:
        z = _norm(a, state, f"{name}.norm_attn", z)
    q, k, v = (
        _linear(state, f"{attention}.{n}", z).unflatten(2, (a.n_heads, -1)).transpose(1, 2)
        for n in ("W_Q", "W_K", "W_V")
    )
    scores = q @ k.transpose(2, 3) * state[f"{attention}.sdp_attn.scale"]
    if a.res_attention:
        scores = scores + earlier
    z = z + _linear(state, f"{attention}.to_out.0", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    z = _norm(a, state, f"{name}.norm_ffn" if a.pre_norm else f"{name}.norm_attn", z)
    activation = F.relu if a.activation == "relu" else F.gelu
    z = z + _linear(state, f"{name}.ff.3", activation(_linear(state, f"{name}.ff.0", z)))
    return z if a.pre_norm else _norm(a, state, f"{name}.norm_ffn", z), scores


def _linear(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(a: Architecture, state: StateDict, name: str, x: Tensor) -> Tensor:
    if a.norm == "LayerNorm":
        return F.layer_norm(x, (a.d_model,), state[f"{name}.weight"], state[f"{name}.bias"])
    mean, var, weight, bias = (state[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x.transpose(1, 2), mean, var, weight, bias).transpose(1, 2)


def _head(a: Architecture, state: StateDict, z: Tensor) -> Tensor:
    if a.head_type == "pretrain":
        return _linear(state, "head.linear", z[:, :, int(a.use_cls_token) :]).transpose(1, 2)
    if a.head_type == "prediction" and a.use_cls_token:
        return z[:, :, 0].transpose(1, 2)
    if a.head_type == "prediction":
        flat = z.transpose(2, 3).flatten(2)
        names = [f"head.linears.{i}" if a.individual_head else "head.linear" for i in range(a.n_vars)]
        return torch.stack([_linear(state, name, flat[:, i]) for i, name in enumerate(names)], 2)
    return _linear(state, "head.linear", z[:, :, 0 if a.use_cls_token else -1].flatten(1))
