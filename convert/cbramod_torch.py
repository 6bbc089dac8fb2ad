"""CBraMod in plain torch functions on a state dict, independent of the Flax model it verifies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minsae_jax.encoder.cbramod.architecture import (
    NORM_GROUPS,
    STEM_PADDING,
    STEM_STRIDE,
    Architecture,
)

StateDict = dict[str, Tensor]


def forward(a: Architecture, state: StateDict, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Return the output of every layer, [B, C, P, d_model], and the patches of the head.

    x: windows [B, seq_len, C] in µV / 100.
    """
    z = _embed(a, state, x.transpose(1, 2).unflatten(2, (-1, a.patch_len)))
    hidden = []
    for i in range(a.n_layers):
        z = _layer(a, state, f"encoder.layers.{i}", z)
        hidden.append(z)
    return hidden, _linear(state, "proj_out.0", z) if a.has_head else None


def _embed(a: Architecture, state: StateDict, x: Tensor) -> Tensor:
    """Return the tokens of patches [B, C, P, patch_len]."""
    name = "patch_embedding"
    # An image with one row for each patch: no convolution crosses rows.
    z = x.flatten(1, 2).unsqueeze(1)
    for i, stride, padding in ((0, STEM_STRIDE, STEM_PADDING), (3, 1, 1), (6, 1, 1)):
        weight = state[f"{name}.proj_in.{i}.weight"]
        bias = state[f"{name}.proj_in.{i}.bias"]
        z = F.conv2d(z, weight, bias, stride=(1, stride), padding=(0, padding))
        norm = f"{name}.proj_in.{i + 1}"
        z = F.group_norm(z, NORM_GROUPS, state[f"{norm}.weight"], state[f"{norm}.bias"])
        z = F.gelu(z)
    z = z.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
    amplitudes = torch.fft.rfft(x).abs() / a.patch_len
    z = z + _linear(state, f"{name}.spectral_proj.0", amplitudes)
    place = F.conv2d(
        z.permute(0, 3, 1, 2),
        state[f"{name}.positional_encoding.0.weight"],
        state[f"{name}.positional_encoding.0.bias"],
        padding="same",
        groups=a.d_model,
    )
    return z + place.permute(0, 2, 3, 1)


def _layer(a: Architecture, state: StateDict, name: str, z: Tensor) -> Tensor:
    normed = _norm(a, state, f"{name}.norm1", z)
    over_channels, over_time = normed.chunk(2, dim=-1)
    over_channels = _attention(a, state, f"{name}.self_attn_s", over_channels.transpose(1, 2))
    over_time = _attention(a, state, f"{name}.self_attn_t", over_time)
    z = z + torch.cat([over_channels.transpose(1, 2), over_time], -1)
    normed = _norm(a, state, f"{name}.norm2", z)
    inner = F.gelu(_linear(state, f"{name}.linear1", normed))
    return z + _linear(state, f"{name}.linear2", inner)


def _attention(a: Architecture, state: StateDict, name: str, z: Tensor) -> Tensor:
    projected = F.linear(z, state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"])
    heads = projected.unflatten(-1, (3, a.n_heads // 2, -1))
    queries, keys, values = heads.movedim(-3, 0).transpose(-2, -3)
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    mixed = scores.softmax(-1) @ values
    merged_heads = mixed.transpose(-2, -3).flatten(-2)
    return _linear(state, f"{name}.out_proj", merged_heads)


def _linear(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(a: Architecture, state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (a.d_model,), state[f"{name}.weight"], state[f"{name}.bias"])
