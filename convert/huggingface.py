"""PatchTST of Hugging Face `transformers`: a folder with config.json and model.safetensors or pytorch_model.bin.

The tensors get gPatchTST's names, and config.json becomes the settings of `Architecture`, so that all that follows is
the same for every source. Masking, which transformers does in evaluation too, is left out.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import (
    Checkpoint,
    Tensors,
    checkpoint_of,
    load_json,
    load_safetensors,
    load_torch,
    sha256_of,
    shown,
    to_numpy,
)  # fmt: skip
from minsae_jax.errors import UserError

_LAYER, _OURS = r"encoder\.layers\.(\d+)", r"backbone.encoder.layers.\1"
# transformers' name (a pattern, without `model.`) -> gPatchTST's
NAMES = (
    (r"encoder\.embedder\.input_embedding\.(.*)", r"backbone.W_P.\1"),
    (r"encoder\.positional_encoder\.position_enc", "backbone.W_pos"),
    (r"encoder\.positional_encoder\.cls_token", "backbone.cls_token"),
    (rf"{_LAYER}\.self_attn\.q_proj\.(\w+)", rf"{_OURS}.self_attn.W_Q.\2"),
    (rf"{_LAYER}\.self_attn\.k_proj\.(\w+)", rf"{_OURS}.self_attn.W_K.\2"),
    (rf"{_LAYER}\.self_attn\.v_proj\.(\w+)", rf"{_OURS}.self_attn.W_V.\2"),
    (rf"{_LAYER}\.self_attn\.out_proj\.(\w+)", rf"{_OURS}.self_attn.to_out.0.\2"),
    (rf"{_LAYER}\.norm_sublayer1\.(\w+)", rf"{_OURS}.norm_attn.\2"),
    (rf"{_LAYER}\.norm_sublayer1\.batchnorm\.(\w+)", rf"{_OURS}.norm_attn.1.\2"),
    (rf"{_LAYER}\.norm_sublayer3\.(\w+)", rf"{_OURS}.norm_ffn.\2"),
    (rf"{_LAYER}\.norm_sublayer3\.batchnorm\.(\w+)", rf"{_OURS}.norm_ffn.1.\2"),
    (rf"{_LAYER}\.ff\.(\d)\.(\w+)", rf"{_OURS}.ff.\2.\3"),
    (r"head\.(?:linear|projection)\.(weight|bias)", r"head.linear.\1"),
)
HEADS = {
    "PatchTSTModel": "none",
    "PatchTSTForPretraining": "pretrain",
    "PatchTSTForPrediction": "prediction",
    "PatchTSTForClassification": "classification",
}
WITHOUT_HEAD = "convert it with --without_head, for its activations alone"
# config.json's key -> ours, and transformers' default
PLAIN = {
    "num_input_channels": ("n_vars", 1),
    "context_length": ("seq_len", 32),
    "patch_length": ("patch_len", 1),
    "patch_stride": ("stride", 1),
    "num_hidden_layers": ("n_layers", 3),
    "d_model": ("d_model", 128),
    "num_attention_heads": ("n_heads", 4),
    "ffn_dim": ("d_ff", 512),
    "activation_function": ("activation", "gelu"),
    "share_embedding": ("shared_embedding", True),
    "use_cls_token": ("use_cls_token", False),
    "pre_norm": ("pre_norm", True),
    "norm_eps": ("norm_eps", 1e-5),
}
SCALERS = {"std": ("mean_sd", 1e-5), "mean": ("mean_abs", 1e-10), True: ("mean_abs", 1e-10)}


def load_huggingface(folder: Path, without_head: bool) -> Checkpoint:
    """The model in a folder. Raises UserError on one that cannot be converted, with the reason."""
    config = load_json(folder / "config.json")
    if config.get("model_type", "patchtst") != "patchtst":
        raise UserError(
            f"{folder} holds a model of type {shown(config['model_type'])}, not a patchtst"
        )
    path, tensors = _weights(folder)
    settings = _settings(config, _head_type(config, tensors, without_head))
    renamed = _renamed(tensors, without_head)
    _complete(renamed, settings, has_bias=config.get("bias", True) is not False)
    return checkpoint_of(path, sha256_of(path), "transformers", renamed, settings)


def _weights(folder: Path) -> tuple[Path, Tensors]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        return safe, load_safetensors(safe)
    if pickled.is_file():
        return pickled, to_numpy(load_torch(pickled), pickled)
    raise UserError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin beside its config.json"
    )


def _head_type(config: dict[str, Any], tensors: Tensors, without_head: bool) -> str:
    """Raises UserError on heads that gPatchTST's Head cannot stand for."""
    heads = {k for k in tensors if k.startswith("head.")}
    if without_head or not heads:
        return "none"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        name = (
            "PatchTSTForPretraining" if "head.linear.weight" in heads else "PatchTSTForPrediction"
        )
    reason = None
    if name not in HEADS:
        reason = f"is a {shown(name)}"
    elif any("projection.proj" in k or "projections.0.proj" in k for k in heads):
        reason = (
            f"predicts a distribution ({shown(config.get('distribution_output', 'student_t'))})"
        )
    elif any(".projections." in k for k in heads):
        reason = "has a head for each channel (share_projection false), with which transformers' own forward fails,"
    if reason:
        raise UserError(f"the model {reason}, which is not supported: {WITHOUT_HEAD}")
    return HEADS[name]


def _settings(config: dict[str, Any], head_type: str) -> dict[str, Any]:
    """What config.json says, in the names of Architecture."""
    if config.get("channel_attention"):
        raise UserError(
            "channel_attention is on: channels attend to each other, while here every channel is a sequence of its own"
        )
    if config.get("positional_encoding_type", "sincos") not in ("sincos", "random"):
        raise UserError(
            f"positional_encoding_type {shown(config['positional_encoding_type'])} is not known"
        )
    settings = {ours: config.get(theirs, default) for theirs, (ours, default) in PLAIN.items()}
    norms = {"batchnorm": "BatchNorm", "layernorm": "LayerNorm"}
    norm, scaling = config.get("norm_type", "batchnorm"), config.get("scaling", "std")
    if not isinstance(norm, str) or norm not in norms:
        raise UserError(f"norm_type must be batchnorm or layernorm, but is {shown(norm)}")
    if not isinstance(scaling, (str, bool, type(None))) or (scaling and scaling not in SCALERS):
        raise UserError(f"scaling must be std, mean or null, but is {shown(scaling)}")
    if config.get("scaling_dim", 1) != 1 or config.get("keepdim", True) is not True:
        raise UserError(
            "its scaler works along another axis than time (scaling_dim, keepdim), which is not supported"
        )
    scaler, eps = SCALERS.get(scaling or "std", ("mean_sd", 1e-5))
    pooling = config.get("pooling_type", "mean")
    if pooling not in ("mean", "max", None):
        raise UserError(f"pooling_type must be mean, max or null, but is {shown(pooling)}")
    if head_type == "classification" and not pooling and not settings["use_cls_token"]:
        raise UserError(f"pooling_type null has no meaning for classification: {WITHOUT_HEAD}")
    has_pooling = head_type in ("prediction", "classification")
    return settings | {
        "norm": norms[norm],
        "norm_stream": False,
        "res_attention": False,
        "pos_dim": settings["d_model"],
        "head_type": head_type,
        "individual_head": False,
        "pooling": ("cls" if settings["use_cls_token"] else pooling or "gpatchtst")
        if has_pooling
        else "gpatchtst",
        "revin": bool(scaling),
        "revin_affine": False,
        "revin_eps": config.get("minimum_scale", eps),
        "scaler": scaler,
        "denormalize": bool(scaling) and head_type == "prediction",
    }


def _renamed(tensors: Tensors, without_head: bool) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        if without_head and name.startswith("head."):
            continue
        found = (
            (re.fullmatch(pattern, name.removeprefix("model.")), ours) for pattern, ours in NAMES
        )
        renamed[next((match.expand(ours) for match, ours in found if match), name)] = tensor
    return renamed


def _complete(tensors: Tensors, settings: dict[str, Any], has_bias: bool) -> None:
    """Add what transformers does not store, and bring what it stores in another shape or order to gPatchTST's."""
    cls_token = tensors.get("backbone.cls_token")
    if cls_token is not None:
        tensors["backbone.cls_token"] = cls_token.reshape(1, 1, -1)
    d_model, heads, d_ff = (settings[name] for name in ("d_model", "n_heads", "d_ff"))
    if (
        not all(type(n) is int and 0 < n < 1 << 20 for n in (d_model, heads, d_ff))
        or d_model % heads
    ):
        raise UserError(
            "d_model, num_attention_heads and ffn_dim must be whole numbers above 0, the second dividing the first, "
            f"but are {shown(d_model)}, {shown(heads)} and {shown(d_ff)}"
        )
    for layer in [
        k.removesuffix(".self_attn.W_Q.weight")
        for k in tensors
        if k.endswith(".self_attn.W_Q.weight")
    ]:
        tensors[f"{layer}.self_attn.sdp_attn.scale"] = np.asarray(
            (d_model // heads) ** -0.5, np.float32
        )
        if not has_bias:
            tensors |= {
                f"{layer}.ff.0.bias": np.zeros(d_ff, np.float32),
                f"{layer}.ff.3.bias": np.zeros(d_model, np.float32),
            }
    weight = tensors.get("head.linear.weight")
    reads_all = settings["head_type"] == "prediction" and settings["pooling"] == "gpatchtst"
    if reads_all and weight is not None and weight.ndim == 2 and weight.shape[1] % d_model == 0:
        by_patch = weight.reshape(len(weight), -1, d_model)  # gPatchTST has the patches innermost
        tensors["head.linear.weight"] = np.ascontiguousarray(by_patch.swapaxes(1, 2)).reshape(
            weight.shape
        )
