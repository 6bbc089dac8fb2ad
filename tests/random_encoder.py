"""Random state dicts of gPatchTST, and an architecture to vary."""

import jax
import torch

from minsae_jax.encoder.patchtst.architecture import Architecture

BASE = Architecture(
    n_vars=3,
    seq_len=50,
    patch_len=8,
    stride=6,
    n_layers=2,
    d_model=16,
    n_heads=4,
    d_ff=24,
    activation="relu",
    norm="BatchNorm",
    pre_norm=False,
    res_attention=True,
    shared_embedding=True,
    use_cls_token=True,
    pos_dim=16,
    head_type="pretrain",
    target_dim=8,
    individual_head=False,
    revin=False,
    revin_affine=False,
    revin_eps=1e-5,
)


def random_state_dict(a: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return every tensor of a gPatchTST checkpoint, none of them trivial."""
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


def all_layers(encoder, x) -> tuple[jax.Array, ...]:
    """Return the activations of every layer, computed by one program."""
    run = encoder.function(tuple(range(encoder.architecture.n_layers)))
    return jax.jit(run)(encoder.params, x)
