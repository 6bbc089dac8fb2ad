"""PatchTST's conversion tables, and the files of gPatchTST that are written."""

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from convert.checkpoint import HALVES, Checkpoint
from convert.patchtst.stated import spelling
from convert.rules import Rule, fill, linear_rules, norm_rules
from convert.torch_files import Tensors, save_torch
from minsae_jax.encoder.base import Params, parameter_path
from minsae_jax.encoder.converted import EncoderSource
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject

if TYPE_CHECKING:
    import torch

BATCHES_TRACKED = "num_batches_tracked"  # BatchNorm's counter, which nothing reads
PROGRAM_NAMES = {
    "gpatchtst": "gPatchTST",
    "supervised": "the official supervised program",
    "transformers": "transformers",
}


def rules(a: Architecture) -> list[Rule]:
    """Return the conversion table of an architecture; every key and path is in one rule."""
    layer = "backbone.encoder.layers.#"
    embedding = linear_rules("backbone.W_P.#", "embeddings/#")
    if a.shared_embedding:
        embedding = linear_rules("backbone.W_P", "embeddings/0")
    head = linear_rules("head.linear", "head/linears/0")
    if a.individual_head:
        head = linear_rules("head.linears.#", "head/linears/#")
    return [
        Rule("revin.affine_weight", "revin/affine_weight"),
        Rule("revin.affine_bias", "revin/affine_bias"),
        Rule("backbone.W_pos", "position"),
        Rule("backbone.cls_token", "cls_token", np.ravel, lambda t: t.reshape(1, 1, -1)),
        *embedding,
        *linear_rules(f"{layer}.self_attn.W_Q", "layers/#/attention/query"),
        *linear_rules(f"{layer}.self_attn.W_K", "layers/#/attention/key"),
        *linear_rules(f"{layer}.self_attn.W_V", "layers/#/attention/value"),
        Rule(f"{layer}.self_attn.sdp_attn.scale", "layers/#/attention/scale"),
        *linear_rules(f"{layer}.self_attn.to_out.0", "layers/#/attention/out"),
        *_norm(a, f"{layer}.norm_attn", "layers/#/norm_attention"),
        *linear_rules(f"{layer}.ff.0", "layers/#/ff_in"),
        *linear_rules(f"{layer}.ff.3", "layers/#/ff_out"),
        *_norm(a, f"{layer}.norm_ffn", "layers/#/norm_ff"),
        *head,
    ]


def _norm(a: Architecture, key: str, path: str) -> list[Rule]:
    if a.norm == "LayerNorm":
        return norm_rules(key, path)
    # BatchNorm with its running statistics, wrapped in transpositions: hence the ".1".
    return [
        Rule(f"{key}.1.weight", f"{path}/scale"),
        Rule(f"{key}.1.bias", f"{path}/bias"),
        Rule(f"{key}.1.running_mean", f"{path}/mean"),
        Rule(f"{key}.1.running_var", f"{path}/var"),
    ]


def to_flax(a: Architecture, tensors: Tensors) -> Params:
    """Return the Flax model's parameters.

    Raises one UserError with everything that does not fit; see `rules.fill`.
    """
    counters = set()
    if a.norm == "BatchNorm":
        counters = {key for key in tensors if key.endswith(f".1.{BATCHES_TRACKED}")}
    broken = [key for key in counters if tensors[key].ndim or not np.isfinite(tensors[key])]
    complaints = [f"{key} is not a number" for key in sorted(broken)]
    weights = {key: tensor for key, tensor in tensors.items() if key not in counters}
    return fill(PatchTSTEncoder.abstract_params(a), rules(a), weights, complaints)


def state_dict(a: Architecture, params: Params) -> Tensors:
    """Return gPatchTST's state dict, the inverse of `to_flax`.

    BatchNorm's counters are missing; RevIN's weights start with `revin.`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {parameter_path(keys): np.asarray(leaf) for keys, leaf in leaves}
    tensors = {}
    for rule in rules(a):
        for path, array in arrays.items():
            key = rule.key_of(path)
            if key is not None:
                tensors[key] = np.array(rule.to_torch(array), order="C")
    return tensors


def describe(a: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Return the first lines of the summary of a conversion."""
    head = "no head" if a.head_type == "none" else f"{a.head_type} head"
    cls_token = ", and CLS" if a.use_cls_token else ""
    return [
        f"PatchTST of {PROGRAM_NAMES[checkpoint.program]} from {checkpoint.path.name}: "
        f"{a.n_layers} layers, d_model {a.d_model}, {a.n_heads} heads, d_ff {a.d_ff}, {a.norm}, "
        f"{a.activation}, {head}",
        f"windows of {a.seq_len} samples x {a.n_vars} channels -> {a.n_tokens} tokens per channel "
        f"({a.n_patches} patches of {a.patch_len}, stride {a.stride}{cls_token}), "
        f"RevIN {'on' if a.revin else 'off'}",
    ]


def write_pytorch(path: Path, encoder: NativeEncoder, source: EncoderSource) -> None:
    """Write gPatchTST's checkpoint of an encoder, or its bare state dict if the source was one.

    A checkpoint contains model_state_dict, revin_state_dict (None without affine weights) and
    config, so that it can be converted again without a YAML. Raises UserError if the file exists,
    or if gPatchTST cannot run the encoder.
    """
    if not isinstance(encoder, PatchTSTEncoder):
        raise UserError("only PatchTST encoders can be written for PyTorch")
    if path.exists():
        raise UserError(
            f"{path} exists, and a checkpoint is never overwritten; choose another --out"
        )
    a = encoder.architecture
    _check_runs_in_gpatchtst(a)
    tensors = _torch_tensors(state_dict(a, encoder.params), source)
    if source.source_form == "state dict":
        save_torch(path, tensors)
        return
    prefix = "revin."
    revin = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    content = {
        "model_state_dict": {k: t for k, t in tensors.items() if not k.startswith(prefix)},
        "revin_state_dict": revin or None,
        "config": settings_of(a),
    }
    save_torch(path, content)


def _torch_tensors(arrays: Tensors, source: EncoderSource) -> "dict[str, torch.Tensor]":
    """Return torch tensors with the source's dtypes and counters.

    Raises UserError if these do not fit: config.json can be edited.
    """
    import torch

    valid_dtypes = all(
        key in arrays and name in HALVES for key, name in source.source_dtypes.items()
    )
    valid_counters = all(
        key.endswith(f".1.{BATCHES_TRACKED}") and type(count) is int and abs(count) < 2**63
        for key, count in source.batches_tracked.items()
    )
    if not valid_dtypes or not valid_counters:
        raise UserError(
            "the encoder's config.json is damaged (source_dtypes, batches_tracked); "
            "convert the encoder again"
        )
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    for key, name in source.source_dtypes.items():
        tensors[key] = tensors[key].to(getattr(torch, name))
    for key, count in source.batches_tracked.items():
        tensors[key] = torch.tensor(count)
    return tensors


def _check_runs_in_gpatchtst(a: Architecture) -> None:
    """Raise UserError if the encoder needs options that only other programs have."""
    # gPatchTST has only the defaults of the optional fields. Other values are harmless where they
    # have no effect, so those are allowed.
    defaults = {f.name: f.default for f in fields(a) if f.default is not MISSING}
    allowed = replace(a, **defaults)
    if not a.revin:
        allowed = replace(allowed, scaler=a.scaler)
    if not a.pre_norm:
        allowed = replace(allowed, norm_stream=a.norm_stream)
    if a.first_sample == allowed.first_sample:
        allowed = replace(allowed, leftover=a.leftover)
    if a.head_type == "none":
        raise UserError("gPatchTST has no such encoder (no head), so it cannot be written for it")
    if a != allowed:
        names = [field.name for field in fields(a)]
        differing = [name for name in names if getattr(a, name) != getattr(allowed, name)]
        raise UserError(
            f"gPatchTST cannot run this encoder ({', '.join(differing)}), so it was not written"
        )


def settings_of(a: Architecture) -> dict[str, JsonObject]:
    """Return the settings in the sections and spellings of gPatchTST's YAML."""
    names = [field.name for field in fields(a) if field.default is MISSING]
    model = {spelling(name): getattr(a, name) for name in names}
    return {"data": {"n_vars": model.pop("n_vars")}, "model": model}
