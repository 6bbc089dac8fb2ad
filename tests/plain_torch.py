"""PatchTST in plain torch functions on a state dict, written for the tests, and random state dicts to run it on."""

import torch
import torch.nn.functional as F

from minsae_jax.encoder.patchtst import Architecture


def random_state_dict(a: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a gPatchTST checkpoint of this architecture, none of them trivial."""
    g = torch.Generator().manual_seed(seed)
    state = {"backbone.W_pos": 0.3 * torch.randn(a.n_tokens, a.pos_dim, generator=g)}

    def linear(name, n_in, n_out):
        state[f"{name}.weight"] = torch.randn(n_out, n_in, generator=g) / n_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(n_out, generator=g)

    def norm(name):
        name += ".1" if a.norm == "BatchNorm" else ""
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(a.d_model, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(a.d_model, generator=g)
        if a.norm == "BatchNorm":
            state[f"{name}.running_mean"] = 0.3 * torch.randn(a.d_model, generator=g)
            state[f"{name}.running_var"] = 2 + 2 * torch.rand(a.d_model, generator=g)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for name in ["W_P"] if a.shared_embedding else [f"W_P.{i}" for i in range(a.n_vars)]:
        linear(f"backbone.{name}", a.patch_len, a.d_model)
    if a.use_cls_token:
        state["backbone.cls_token"] = torch.randn(1, 1, a.d_model, generator=g)
    for i in range(a.n_layers):
        layer = f"backbone.encoder.layers.{i}"
        for name in ("W_Q", "W_K", "W_V", "to_out.0"):
            linear(f"{layer}.self_attn.{name}", a.d_model, a.d_model)
        state[f"{layer}.self_attn.sdp_attn.scale"] = torch.tensor((a.d_model // a.n_heads) ** -0.5)
        norm(f"{layer}.norm_attn")
        linear(f"{layer}.ff.0", a.d_model, a.d_ff)
        linear(f"{layer}.ff.3", a.d_ff, a.d_model)
        norm(f"{layer}.norm_ffn")
    n_in = {
        "pretrain": a.d_model,
        "prediction": a.d_model * (1 if a.use_cls_token else a.n_patches),
    }.get(a.head_type, a.n_vars * a.d_model)
    for name in [f"linears.{i}" for i in range(a.n_vars)] if a.individual_head else ["linear"]:
        linear(f"head.{name}", n_in, a.target_dim)
    return state


def forward(
    a: Architecture, state: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of all layers [B, n_vars, T, d_model], and the head's output."""
    if a.revin:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + a.revin_eps).sqrt()
    x = x[:, a.seq_len - a.patch_len - a.stride * (a.n_patches - 1) :].unfold(1, a.patch_len, a.stride)

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, value):
        if a.norm == "LayerNorm":
            return F.layer_norm(value, (a.d_model,), state[f"{name}.weight"], state[f"{name}.bias"])
        s = [state[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(value.transpose(1, 2), *s).transpose(1, 2)

    names = ["backbone.W_P"] * a.n_vars if a.shared_embedding else [f"backbone.W_P.{i}" for i in range(a.n_vars)]
    z = torch.stack([linear(name, x[:, :, i]) for i, name in enumerate(names)], 1).flatten(0, 1)
    if a.use_cls_token:
        z = torch.cat([state["backbone.cls_token"].expand(len(z), -1, -1), z], 1)
    z = z + state["backbone.W_pos"]
    scores, hidden = 0, []
    for i in range(a.n_layers):
        layer = f"backbone.encoder.layers.{i}"
        if a.pre_norm:
            z = norm(f"{layer}.norm_attn", z)
        q, k, v = (
            linear(f"{layer}.self_attn.{n}", z).unflatten(2, (a.n_heads, -1)).transpose(1, 2)
            for n in ("W_Q", "W_K", "W_V")
        )
        own = q @ k.transpose(2, 3) * state[f"{layer}.self_attn.sdp_attn.scale"]
        scores = own + scores if a.res_attention else own
        z = z + linear(f"{layer}.self_attn.to_out.0", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        z = norm(f"{layer}.norm_ffn" if a.pre_norm else f"{layer}.norm_attn", z)
        activation = F.relu if a.activation == "relu" else F.gelu
        z = z + linear(f"{layer}.ff.3", activation(linear(f"{layer}.ff.0", z)))
        if not a.pre_norm:
            z = norm(f"{layer}.norm_ffn", z)
        hidden.append(z.unflatten(0, (-1, a.n_vars)))
    return hidden, _head(a, state, hidden[-1], linear)


def _head(a, state, z, linear):
    if a.head_type == "pretrain":
        return linear("head.linear", z[:, :, int(a.use_cls_token) :]).transpose(1, 2)
    if a.head_type == "prediction" and a.use_cls_token:
        return z[:, :, 0].transpose(1, 2)
    if a.head_type == "prediction":
        flat = z.transpose(2, 3).flatten(2)
        names = [f"head.linears.{i}" if a.individual_head else "head.linear" for i in range(a.n_vars)]
        return torch.stack([linear(name, flat[:, i]) for i, name in enumerate(names)], 2)
    return linear("head.linear", z[:, :, 0 if a.use_cls_token else -1].flatten(1))
