"""SAELens in and out: a folder with cfg.json and sae_weights.safetensors.

SAELens has no BatchTopK after training: it and Matryoshka are exported as JumpReLU with one
threshold for all features. The folders of its training code are read too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from convert.autoencoder import (
    Autoencoder,
    fold_decoder_norm,
    member_config,
    new_config,
    shares_from_prefixes,
    shift_bias,
    topk_k,
    whole_k,
)
from convert.checkpoint import HALVES
from convert.torch_files import Tensors, load_safetensors
from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, flush, make_folder
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import check_params
from minsae_jax.settings import JsonObject, read_json, shown

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
# Without a version of 6 or more, SAELens drops metadata that it does not know.
VERSION = "6.54.12"
# Architecture -> kinds that are exported as it. The first is the kind without our metadata.
ARCHITECTURES = {
    "standard": ("relu",),
    "topk": ("topk",),
    "jumprelu": ("jumprelu", "batchtopk", "matryoshka"),
    "gated": ("gated",),
}
# Of folders that its training code saved, with the threshold in `topk_threshold`.
TRAINING_ARCHITECTURES = {"batchtopk": ("batchtopk",), "matryoshka_batchtopk": ("matryoshka",)}
# Other values of cfg.json that a member can represent; the first is SAELens's default.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("relu",),
    "activation_fn_str": ("relu",),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "finetuning_scaling_factor": (False, None),
}


def read_saelens(path: Path) -> Autoencoder:
    """Read an SAE of SAELens.

    Raises UserError if a member cannot represent it: another architecture, inputs that are
    normalised or reshaped, activations that were scaled after training.
    """
    cfg = read_json(path / CONFIG)
    tensors = load_safetensors(path / WEIGHTS)
    kinds = _kinds_of(cfg, path)
    _check_supported(cfg, path)
    is_training = cfg.get("architecture") in TRAINING_ARCHITECTURES
    subtracts_bias = _flag(cfg, "apply_b_dec_to_input", True, path)
    rescales = _flag(cfg, "rescale_acts_by_decoder_norm", is_training, path)
    halves = {name for name, tensor in tensors.items() if str(tensor.dtype) in HALVES}
    params = tensors | {name: tensors[name].astype(np.float32) for name in halves}

    metadata = cfg.get("metadata")
    exported = metadata.get("minsae_jax") if isinstance(metadata, dict) else None
    config = member_config(exported, kinds)
    kind = config["kind"] if config else kinds[0]
    if kind == "topk":
        params["k"] = np.array(whole_k(cfg.get("k"), str(path)), np.float32)
    if is_training and "topk_threshold" in params:
        params["threshold"] = params.pop("topk_threshold").astype(np.float32)
    elif kind in ("batchtopk", "matryoshka"):
        threshold = _single_threshold(params)
        if threshold is None:  # edited since it was exported
            config = None
            kind = "jumprelu"
        else:
            params["threshold"] = threshold
    check_params(KINDS[kind], params, str(path / WEIGHTS))
    if subtracts_bias:
        params = shift_bias(kind, params, -1)
    if rescales and kind in ("topk", "batchtopk", "matryoshka"):
        params = fold_decoder_norm(kind, params)
    if config is None:
        settings = _training_settings(cfg, path, len(params["W_dec"])) if is_training else {}
        config = new_config(path, kind, **settings)
    return Autoencoder(params, config)


def _kinds_of(cfg: JsonObject, path: Path) -> tuple[str, ...]:
    """Return the kinds that an architecture can be. Raises UserError if it is unknown."""
    known = ARCHITECTURES | TRAINING_ARCHITECTURES
    architecture = cfg.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in known:
        raise UserError(
            f"{path} has architecture {shown(architecture)}; only {', '.join(known)} can be "
            "converted"
        )
    return known[architecture]


def _check_supported(cfg: JsonObject, path: Path) -> None:
    """Raise UserError on settings that a member cannot represent."""
    for key, supported in SUPPORTED.items():
        value = cfg.get(key, supported[0])
        # Compared with `is`, since 0 == False and 1 == True.
        if not any(value is s or (isinstance(value, str) and value == s) for s in supported):
            raise UserError(
                f"{path} has {key} {shown(value)}; only {shown(supported[0])} can be converted"
            )


def _flag(cfg: JsonObject, key: str, default: bool, path: Path) -> bool:
    value = cfg.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path} has {key} {shown(value)}, expected true or false")
    return value


def _single_threshold(params: Tensors) -> np.ndarray | None:
    """Return the threshold of all features, or None if they differ."""
    thresholds = params.get("threshold", np.zeros(0))
    if thresholds.ndim != 1 or not thresholds.size or (thresholds != thresholds[0]).any():
        return None
    return thresholds[0].reshape(())


def _training_settings(cfg: JsonObject, path: Path, d_sae: int) -> JsonObject:
    """Return k and, for Matryoshka, the prefixes of a folder of the training code."""
    k = cfg.get("k")
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k <= d_sae:
        raise UserError(f"{path} has k {shown(k)}, expected a number from 0 to {d_sae}")
    if cfg["architecture"] != "matryoshka_batchtopk":
        return {"k": k}
    widths = cfg.get("matryoshka_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        raise UserError(f"{path} has matryoshka_widths {shown(widths)}, expected integers")
    prefixes = sorted({*widths, d_sae})
    if prefixes[0] < 1 or prefixes[-1] > d_sae:
        raise UserError(f"{path} has matryoshka_widths {shown(widths)} beyond d_sae {d_sae}")
    return {"k": k, "shares": shares_from_prefixes(prefixes, d_sae)}


def write_saelens(path: Path, sae: Autoencoder) -> None:
    """Write an SAE of SAELens. Raises UserError if SAELens does not have its kind."""
    matches = [name for name, kinds in ARCHITECTURES.items() if sae.kind in kinds]
    if not matches:
        raise UserError(f"SAELens has no architecture for kind {sae.kind}")
    architecture = matches[0]
    d_in, d_sae = sae.params["W_enc"].shape
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    tensors = {name: sae.params[name] for name in KINDS[sae.kind].param_names}
    if architecture == "topk":
        cfg |= {"k": topk_k(sae), "rescale_acts_by_decoder_norm": False}
        del tensors["k"]
    if architecture == "jumprelu":
        tensors["threshold"] = np.broadcast_to(tensors["threshold"], d_sae)
    cfg["metadata"] = {"sae_lens_version": VERSION, "minsae_jax": sae.config}
    make_folder(path)
    # Context managers exit in reverse: the config is renamed last, and without it there is no SAE.
    with atomic_write(path / CONFIG) as config, atomic_write(path / WEIGHTS) as weights:
        config.write_text(json.dumps(cfg, indent=2) + "\n")
        contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
        weights.write_bytes(save(contiguous))
        (path / CONFIG).unlink(missing_ok=True)
        flush([path])
