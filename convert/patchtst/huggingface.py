"""PatchTST of Hugging Face `transformers`: config.json and model.safetensors or pytorch_model.bin.

Tensors get gPatchTST's names and config.json becomes settings of `Architecture`, so that all later
steps are the same for every source. Masking, which transformers also applies in evaluation, is left
out.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.cbramod import is_cbramod
from convert.checkpoint import Checkpoint, make_checkpoint
from convert.torch_files import Tensors, load_safetensors, load_torch, to_numpy
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject, read_json, shown

_SOURCE_LAYER = r"encoder\.layers\.(\d+)"
_LAYER = r"backbone.encoder.layers.\1"
# transformers' name (a pattern, without `model.`) -> gPatchTST's name
NAMES = (
    (r"encoder\.embedder\.input_embedding\.(.*)", r"backbone.W_P.\1"),
    (r"encoder\.positional_encoder\.position_enc", "backbone.W_pos"),
    (r"encoder\.positional_encoder\.cls_token", "backbone.cls_token"),
    (rf"{_SOURCE_LAYER}\.self_attn\.q_proj\.(\w+)", rf"{_LAYER}.self_attn.W_Q.\2"),
    (rf"{_SOURCE_LAYER}\.self_attn\.k_proj\.(\w+)", rf"{_LAYER}.self_attn.W_K.\2"),
    (rf"{_SOURCE_LAYER}\.self_attn\.v_proj\.(\w+)", rf"{_LAYER}.self_attn.W_V.\2"),
    (rf"{_SOURCE_LAYER}\.self_attn\.out_proj\.(\w+)", rf"{_LAYER}.self_attn.to_out.0.\2"),
    # norm_sublayer2 belongs to channel attention, which `_check_supported` refuses.
    (rf"{_SOURCE_LAYER}\.norm_sublayer1\.(\w+)", rf"{_LAYER}.norm_attn.\2"),
    (rf"{_SOURCE_LAYER}\.norm_sublayer1\.batchnorm\.(\w+)", rf"{_LAYER}.norm_attn.1.\2"),
    (rf"{_SOURCE_LAYER}\.norm_sublayer3\.(\w+)", rf"{_LAYER}.norm_ffn.\2"),
    (rf"{_SOURCE_LAYER}\.norm_sublayer3\.batchnorm\.(\w+)", rf"{_LAYER}.norm_ffn.1.\2"),
    (rf"{_SOURCE_LAYER}\.ff\.(\d)\.(\w+)", rf"{_LAYER}.ff.\2.\3"),
    (r"head\.(?:linear|projection)\.(weight|bias)", r"head.linear.\1"),
)
HEADS = {
    "PatchTSTModel": "none",
    "PatchTSTForPretraining": "pretrain",
    "PatchTSTForPrediction": "prediction",
    "PatchTSTForClassification": "classification",
}
USE_WITHOUT_HEAD = "convert it with --without_head to extract activations only"
# Key of config.json -> field of Architecture, and transformers' default
PLAIN_SETTINGS = {
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
NORMS = {"batchnorm": "BatchNorm", "layernorm": "LayerNorm"}
# `scaling` -> scaler, and the default of its minimum_scale
SCALERS = {"std": ("mean_sd", 1e-5), "mean": ("mean_abs", 1e-10), True: ("mean_abs", 1e-10)}


def load_huggingface(folder: Path, without_head: bool) -> Checkpoint:
    """Read the model in a folder. Raises UserError with the reason if it cannot be converted."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no config.json in {folder}, so that it is not a folder of transformers or "
            "Braindecode"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type", "patchtst") != "patchtst":
        raise UserError(
            f"{folder} contains a model of type {shown(config['model_type'])}, not a patchtst"
        )
    path, tensors = _read_weights(folder)
    # A folder of Braindecode has files of the same names.
    if is_cbramod(tensors):
        return make_checkpoint(path, "cbramod", tensors, config, form="checkpoint")
    settings = _read_settings(config, _head_type(config, tensors, without_head))
    renamed = {}
    for name, tensor in tensors.items():
        if not (without_head and name.startswith("head.")):
            renamed[_gpatchtst_name(name)] = tensor
    completed = _complete(renamed, settings, has_bias=config.get("bias", True) is not False)
    return make_checkpoint(path, "transformers", completed, settings, form="checkpoint")


def _read_weights(folder: Path) -> tuple[Path, Tensors]:
    safetensors = folder / "model.safetensors"
    if safetensors.is_file():
        return safetensors, load_safetensors(safetensors)
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file():
        return pickled, to_numpy(load_torch(pickled), pickled)
    raise UserError(
        f"{folder} contains neither model.safetensors nor pytorch_model.bin, only config.json"
    )


def _head_type(config: JsonObject, tensors: Tensors, without_head: bool) -> str:
    """Return the head_type. Raises UserError on heads that `patchtst.model.Head` does not have."""
    head_keys = {key for key in tensors if key.startswith("head.")}
    if without_head or not head_keys:
        return "none"
    name = _model_class(config, head_keys)
    if name not in HEADS:
        reason = f"is a {shown(name)}"
    elif any("projection.proj" in key or "projections.0.proj" in key for key in head_keys):
        distribution = shown(config.get("distribution_output", "student_t"))
        reason = f"predicts a distribution ({distribution})"
    elif any(".projections." in key for key in head_keys):
        reason = (
            "has a head for each channel (share_projection false), with which transformers' own "
            "forward fails,"
        )
    else:
        return HEADS[name]
    raise UserError(f"the model {reason}, which is not supported; {USE_WITHOUT_HEAD}")


def _model_class(config: JsonObject, head_keys: set[str]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    if "head.linear.weight" in head_keys:
        return "PatchTSTForPretraining"
    return "PatchTSTForPrediction"


def _read_settings(config: JsonObject, head_type: str) -> JsonObject:
    """Return the settings of config.json under the names of `Architecture`."""
    _check_supported(config)
    settings: JsonObject = {}
    for key, (name, default) in PLAIN_SETTINGS.items():
        settings[name] = config.get(key, default)
    scaling = config.get("scaling", "std")
    # Without scaling the scaler has no effect, so any will do.
    scaler, smallest_scale = SCALERS.get(scaling or "std", ("mean_sd", 1e-5))
    return settings | {
        "norm": NORMS[config.get("norm_type", "batchnorm")],
        # Branches are added to the stream itself, and each layer has its own scores.
        "norm_stream": False,
        "res_attention": False,
        "pos_dim": settings["d_model"],
        "head_type": head_type,
        "individual_head": False,
        "pooling": _pooling(config, head_type, settings["use_cls_token"]),
        "revin": bool(scaling),
        "revin_affine": False,
        "revin_eps": config.get("minimum_scale", smallest_scale),
        "scaler": scaler,
        "denormalize": bool(scaling) and head_type == "prediction",
    }


def _check_supported(config: JsonObject) -> None:
    """Raise UserError on options that this package does not have."""
    if config.get("channel_attention"):
        raise UserError(
            "channel_attention is on: channels attend to each other, which is not supported; here "
            "every channel is an independent sequence"
        )
    encoding = config.get("positional_encoding_type", "sincos")
    if encoding not in ("sincos", "random"):
        raise UserError(f"unknown positional_encoding_type {shown(encoding)}")
    norm = config.get("norm_type", "batchnorm")
    if not isinstance(norm, str) or norm not in NORMS:
        raise UserError(f"norm_type must be batchnorm or layernorm, got {shown(norm)}")
    scaling = config.get("scaling", "std")
    is_plain = isinstance(scaling, (str, bool, type(None)))
    if not is_plain or (scaling and scaling not in SCALERS):
        raise UserError(f"scaling must be std, mean or null, got {shown(scaling)}")
    if config.get("scaling_dim", 1) != 1 or config.get("keepdim", True) is not True:
        raise UserError(
            "the scaler works along another axis than time (scaling_dim, keepdim), which is not "
            "supported"
        )


def _pooling(config: JsonObject, head_type: str, use_cls_token: Any) -> str:
    """Return how the head pools tokens; null pooling reads all of them, like gPatchTST."""
    pooling = config.get("pooling_type", "mean")
    if pooling not in ("mean", "max", None):
        raise UserError(f"pooling_type must be mean, max or null, got {shown(pooling)}")
    if head_type == "classification" and not pooling and not use_cls_token:
        raise UserError(f"pooling_type null is not valid for classification; {USE_WITHOUT_HEAD}")
    if head_type not in ("prediction", "classification"):
        return "gpatchtst"
    if use_cls_token:
        return "cls"
    return pooling or "gpatchtst"


def _gpatchtst_name(name: str) -> str:
    for pattern, template in NAMES:
        match = re.fullmatch(pattern, name.removeprefix("model."))
        if match:
            return match.expand(template)
    # `rules.fill` lists unknown keys in its error.
    return name


def _complete(tensors: Tensors, settings: JsonObject, has_bias: bool) -> Tensors:
    """Add tensors that transformers does not store, and reshape those in another shape or order."""
    d_model = settings["d_model"]
    n_heads = settings["n_heads"]
    d_ff = settings["d_ff"]
    sizes = (d_model, n_heads, d_ff)
    if not all(type(n) is int and 0 < n < 1 << 20 for n in sizes) or d_model % n_heads:
        listed = ", ".join(shown(n) for n in sizes)
        raise UserError(
            "d_model, num_attention_heads and ffn_dim must be whole numbers above 0, the second "
            f"dividing the first, got {listed}"
        )
    completed = dict(tensors)
    cls_token = tensors.get("backbone.cls_token")
    if cls_token is not None:
        completed["backbone.cls_token"] = cls_token.reshape(1, 1, -1)
    suffix = ".self_attn.W_Q.weight"
    # transformers computes the attention scale, gPatchTST stores it as a parameter.
    for key in tensors:
        if not key.endswith(suffix):
            continue
        layer = key.removesuffix(suffix)
        scale = np.asarray((d_model // n_heads) ** -0.5, np.float32)
        completed[f"{layer}.self_attn.sdp_attn.scale"] = scale
        if not has_bias:
            completed[f"{layer}.ff.0.bias"] = np.zeros(d_ff, np.float32)
            completed[f"{layer}.ff.3.bias"] = np.zeros(d_model, np.float32)
    weight = tensors.get("head.linear.weight")
    reads_all_tokens = settings["head_type"] == "prediction" and settings["pooling"] == "gpatchtst"
    is_valid = weight is not None and weight.ndim == 2 and weight.shape[1] % d_model == 0
    if reads_all_tokens and weight is not None and is_valid:
        # transformers flattens [patches, d_model], gPatchTST [d_model, patches].
        by_patch = weight.reshape(len(weight), -1, d_model)
        patches_innermost = np.ascontiguousarray(by_patch.swapaxes(1, 2))
        completed["head.linear.weight"] = patches_innermost.reshape(weight.shape)
    return completed
