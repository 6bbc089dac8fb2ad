"""Settings of a PatchTST that follow from the tensors of its state dict."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, count_distinct, tensor_of
from convert.patchtst.stated import Setting, Settings
from convert.torch_files import Tensors
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject

LAYER = "backbone.encoder.layers.0"
# Relative error of a squared attention scale that was stored in half precision.
SCALE_ROUNDING = {"float16": 2e-3, "bfloat16": 1e-2}


def infer_settings(checkpoint: Checkpoint, stated: Settings) -> Settings:
    """Return every setting that the tensors determine.

    `stated` is needed for the head, whose shape alone is ambiguous. Raises UserError if tensors are
    missing or contradict each other.
    """
    tensors = checkpoint.tensors
    has_individual_embeddings = "backbone.W_P.0.weight" in tensors
    first_embedding = "W_P.0" if has_individual_embeddings else "W_P"
    d_model, patch_len = tensor_of(tensors, f"backbone.{first_embedding}.weight", 2).shape
    position = tensor_of(tensors, "backbone.W_pos", 2)
    # One learnt number per position, or one per position and dimension.
    if position.shape[1] not in (1, d_model):
        raise UserError(
            f"backbone.W_pos is {list(position.shape)}, but must be 1 or d_model ({d_model}) wide"
        )
    inferred = {
        "d_model": d_model,
        "patch_len": patch_len,
        "shared_embedding": not has_individual_embeddings,
        "use_cls_token": "backbone.cls_token" in tensors,
        "pos_dim": position.shape[1],
        "n_layers": count_distinct(tensors, r"backbone\.encoder\.layers\.(\d+)\..*"),
        "d_ff": tensor_of(tensors, f"{LAYER}.ff.0.weight", 2).shape[0],
        "norm": "BatchNorm" if f"{LAYER}.norm_attn.1.running_mean" in tensors else "LayerNorm",
        "revin_affine": "revin.affine_weight" in tensors,
        "individual_head": "head.linears.0.weight" in tensors,
        "n_heads": _n_heads(checkpoint, d_model),
        "n_vars": _n_channels(tensors),
    }
    inferred = {name: value for name, value in inferred.items() if value is not None}
    inferred |= _head_settings(tensors, inferred, len(position), stated)
    return {name: Setting(value, "state dict") for name, value in inferred.items()}


def _n_heads(checkpoint: Checkpoint, d_model: int) -> int | None:
    """Return the number of heads, or None if the attention scale was trained."""
    # An untrained scale is (d_model / n_heads)^-1/2, so n_heads = scale² d_model.
    key = f"{LAYER}.self_attn.sdp_attn.scale"
    heads = float(tensor_of(checkpoint.tensors, key, 0)) ** 2 * d_model
    rounding = SCALE_ROUNDING.get(checkpoint.dtypes.get(key, ""), 0.0)
    if not math.isfinite(heads) or abs(heads - round(heads)) >= 1e-3 + rounding * heads:
        return None
    # Another scale was trained; the number of heads must then be stated.
    if round(heads) == 0 or d_model % round(heads) != 0:
        return None
    return round(heads)


def _n_channels(tensors: Tensors) -> int | None:
    """Return the number of channels, or None if every tensor is shared between channels."""
    counts = {
        "embeddings": count_distinct(tensors, r"backbone\.W_P\.(\d+)\.weight"),
        "heads": count_distinct(tensors, r"head\.linears\.(\d+)\.weight"),
    }
    if "revin.affine_weight" in tensors:
        counts["RevIN weights"] = tensor_of(tensors, "revin.affine_weight", 1).size
    counts = {part: count for part, count in counts.items() if count > 0}
    if not counts:
        return None
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {part}" for part, count in counts.items())
        raise UserError(f"the state dict contradicts itself on the number of channels: {listed}")
    return next(iter(counts.values()))


def _head_settings(
    tensors: Tensors, inferred: Mapping[str, Any], n_tokens: int, stated: Settings
) -> JsonObject:
    """Return the number of outputs of the head, and its kind if only one kind has its shape."""
    requested = stated.get("head_type")
    if not any(key.startswith("head.") for key in tensors):
        if requested and requested.value != "none":
            raise UserError(
                f"the head is {requested.value!r} in the {requested.place}, but the state dict "
                "has none; use --without_head"
            )
        return {"head_type": "none", "target_dim": 0}
    first_linear = "head.linears.0" if inferred["individual_head"] else "head.linear"
    weight = tensor_of(tensors, f"{first_linear}.weight", 2)
    kinds = _kinds_that_fit(weight, inferred, n_tokens, stated)
    shape = list(weight.shape)
    if requested and requested.value not in kinds:
        fitting = " or ".join(kinds) or "no known head"
        raise UserError(
            f"the head is {requested.value!r} in the {requested.place}, but its weights "
            f"{shape} fit {fitting}"
        )
    if not kinds:
        raise UserError(f"the head's weights {shape} fit no known head; use --without_head")
    settings: JsonObject = {"target_dim": len(weight)}
    if len(kinds) == 1:
        settings["head_type"] = kinds[0]
    return settings


def _kinds_that_fit(
    weight: np.ndarray, inferred: Mapping[str, Any], n_tokens: int, stated: Settings
) -> list[str]:
    n_outputs, n_inputs = weight.shape
    d_model = inferred["d_model"]
    kinds = []
    is_pretrain = n_inputs == d_model and n_outputs == inferred["patch_len"]
    if is_pretrain and not inferred["individual_head"]:
        kinds.append("pretrain")
    pooling = stated["pooling"].value if "pooling" in stated else "gpatchtst"
    # gPatchTST flattens all tokens of a channel unless a CLS token summarises them.
    reads_all_tokens = pooling == "gpatchtst" and not inferred["use_cls_token"]
    if n_inputs == d_model * (n_tokens if reads_all_tokens else 1):
        kinds.append("prediction")
    # Regression and classification have the same weights: one token of every channel.
    n_vars = inferred.get("n_vars")
    if n_vars is None and "n_vars" in stated:
        n_vars = stated["n_vars"].value
    fits_any_number = n_vars is None and n_inputs % d_model == 0
    if fits_any_number or n_inputs == d_model * (n_vars or 0):
        kinds += ["regression", "classification"]
    return kinds
