"""Sparse autoencoders in and out: `python -m convert sae PATH --to KIND --out PATH`.

Ours is minSAE's form, f = relu(x W_enc + b_enc), x̂ = f W_dec + b_dec, for raw activations. SAELens can say the same;
by default it takes the decoder's bias from x first, as dictionary_learning always does: f = relu((x - b_dec) W_enc +
b), so that b = b_enc + b_dec W_enc.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from convert.checkpoint import (
    HALVES,
    Tensors,
    load_json,
    load_safetensors,
    load_torch,
    save_torch,
    shown,
    to_numpy,
)
from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import WEIGHTS, check_params, load_sae, save_member

Kind = Literal["member", "minsae", "saelens", "dictionary_learning"]
# minSAE's and dictionary_learning's key, ours, whether it is transposed
LINEARS = (
    ("encoder.weight", "W_enc", True),
    ("encoder.bias", "b_enc", False),
    ("decoder.weight", "W_dec", True),
    ("decoder.bias", "b_dec", False),
)
SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
TRAINED = "ae.pt"  # what dictionary_learning's trainers leave in a folder

RELU = KINDS["relu"]


@dataclass(frozen=True)
class Autoencoder:
    params: Tensors  # ours
    config: dict[str, Any]  # a member's config.json, as far as the source knows it


def read_member(path: Path) -> Autoencoder:
    sae = load_sae(path)
    return Autoencoder({k: np.asarray(v) for k, v in sae.params.items()}, sae.config)


def write_member(path: Path, sae: Autoencoder) -> None:
    d_model, d_sae = sae.params["W_enc"].shape
    save_member(path, sae.params, sae.config | {"d_model": d_model, "d_sae": d_sae})


def read_minsae(path: Path) -> Autoencoder:
    return _read_linears(path, [theirs for theirs, _, _ in LINEARS], "minSAE")


def read_dictionary_learning(path: Path) -> Autoencoder:
    sae = _read_linears(
        path, ["bias", *(theirs for theirs, _, _ in LINEARS[:3])], "dictionary_learning"
    )
    return dataclasses.replace(sae, params=_shifted(sae.params, -1))


def _read_linears(path: Path, keys: list[str], library: str) -> Autoencoder:
    """A flat state dict of torch, or a trainer's folder with one; strict on names, shapes and dtype."""
    path = path / TRAINED if path.is_dir() else path
    state = load_torch(path)
    if not isinstance(state, dict) or set(state) != set(keys):
        held = (
            ", ".join(str(k)[:40] for k in list(state)[:6])
            if isinstance(state, dict)
            else type(state).__name__
        )
        raise UserError(
            f"{path} is no autoencoder of {library}: it must hold {', '.join(keys)}, not {held}"
        )
    tensors = to_numpy(state, path)
    if any(t.dtype != np.float32 for t in tensors.values()):
        raise UserError(f"{path} must be float32 throughout")
    tensors = {"decoder.bias" if k == "bias" else k: t for k, t in tensors.items()}
    params = {
        ours: np.ascontiguousarray(tensors[theirs].T if t else tensors[theirs])
        for theirs, ours, t in LINEARS
    }
    check_params(RELU, params, str(path))
    return Autoencoder(params, {"format_version": 1, "kind": "relu", "source_file": path.name})


def write_minsae(path: Path, sae: Autoencoder) -> None:
    _write_torch(
        path, {theirs: sae.params[ours].T if t else sae.params[ours] for theirs, ours, t in LINEARS}
    )


def write_dictionary_learning(path: Path, sae: Autoencoder) -> None:
    params = _shifted(sae.params, +1)
    state = {theirs: params[ours].T if t else params[ours] for theirs, ours, t in LINEARS[:3]}
    _write_torch(path, {"bias": params["b_dec"], **state})


def _write_torch(path: Path, state: Tensors) -> None:
    import torch

    save_torch(path, {k: torch.from_numpy(np.array(t, order="C")) for k, t in state.items()})


def _shifted(params: Tensors, sign: int) -> Tensors:
    """b_enc with b_dec W_enc added or taken away, rounded once."""
    shift = params["b_dec"].astype(np.float64) @ params["W_enc"]
    with np.errstate(over="ignore"):
        shifted = params | {"b_enc": (params["b_enc"] + sign * shift).astype(np.float32)}
    check_params(RELU, shifted, "the autoencoder, with the decoder's bias moved")
    return shifted


def read_saelens(path: Path) -> Autoencoder:
    """A standard (ReLU) SAE of SAELens. Raises UserError on what has no form here: other architectures, inputs that are
    normalised or reshaped, activations scaled after training."""
    cfg, tensors = load_json(path / SAELENS_CONFIG), load_safetensors(path / SAELENS_WEIGHTS)
    wanted = {
        "architecture": ("standard",),
        "activation_fn": ("relu",),
        "activation_fn_str": ("relu",),
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
        "finetuning_scaling_factor": (False, None),
    }
    for key, fits in wanted.items():
        value = cfg.get(key, fits[0])
        if not any(value is f or (isinstance(value, str) and value == f) for f in fits):
            raise UserError(
                f"{path} has {key} {shown(value)}: only {shown(fits[0])} can be converted"
            )
    takes_bias_first = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(takes_bias_first, bool):
        raise UserError(
            f"{path} has apply_b_dec_to_input {shown(takes_bias_first)}, not true or false"
        )
    params = {k: t.astype(np.float32) if str(t.dtype) in HALVES else t for k, t in tensors.items()}
    check_params(RELU, params, str(path / SAELENS_WEIGHTS))
    if takes_bias_first:
        params = _shifted(params, -1)
    metadata = cfg.get("metadata")
    ours = metadata.get("minsae_jax") if isinstance(metadata, dict) else None
    if not isinstance(ours, dict) or (ours.get("format_version"), ours.get("kind")) != (1, "relu"):
        ours = {"format_version": 1, "kind": "relu", "source_file": path.name}
    return Autoencoder(params, ours)


def write_saelens(path: Path, sae: Autoencoder) -> None:
    d_in, d_sae = sae.params["W_enc"].shape
    cfg = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"minsae_jax": sae.config},
    }
    path.mkdir(parents=True, exist_ok=True)
    # The config is renamed last: without it there is no SAE.
    with (
        atomic_write(path / SAELENS_CONFIG) as config,
        atomic_write(path / SAELENS_WEIGHTS) as weights,
    ):
        config.write_text(json.dumps(cfg, indent=2) + "\n")
        weights.write_bytes(
            save({name: np.array(sae.params[name], order="C") for name in RELU.param_names})
        )
        (path / SAELENS_CONFIG).unlink(missing_ok=True)


READ: dict[Kind, Callable[[Path], Autoencoder]] = {
    "member": read_member,
    "minsae": read_minsae,
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary_learning,
}
WRITE: dict[Kind, Callable[[Path, Autoencoder], None]] = {
    "member": write_member,
    "minsae": write_minsae,
    "saelens": write_saelens,
    "dictionary_learning": write_dictionary_learning,
}
FOLDERS = ("member", "saelens")


def kind_of(path: Path) -> Kind:
    """What is there, by its content. Raises UserError where it is nothing known."""
    if not path.exists():
        raise UserError(f"there is no autoencoder {path}")
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return "member"
        if (path / SAELENS_CONFIG).is_file():
            return "saelens"
        if not (path / TRAINED).is_file():
            raise UserError(
                f"there is no {WEIGHTS}, {SAELENS_CONFIG} or {TRAINED} in {path}: it holds no autoencoder"
            )
        path = path / TRAINED
    state = load_torch(path)
    return "dictionary_learning" if isinstance(state, dict) and "bias" in state else "minsae"


def convert_sae(path: str | Path, to: Kind, out: str | Path) -> str:
    """Read any kind and write any kind; returns what to tell."""
    path, out = Path(path), Path(out).absolute()
    kind = kind_of(path)
    sae = READ[kind](path)
    _refuse_other(out, to)
    WRITE[to](out, sae)
    d_model, d_sae = sae.params["W_enc"].shape
    return (
        f"autoencoder of d_model {d_model}, d_sae {d_sae}, read as {kind}, written as {to} to {out}"
    )


def _refuse_other(out: Path, to: Kind) -> None:
    """What is there is replaced only if it is an autoencoder of the same kind."""
    if out.exists() and not (out.is_dir() and to in FOLDERS and not any(out.iterdir())):
        wanted = "a folder" if to in FOLDERS else "a file"
        try:
            if out.is_dir() == (to in FOLDERS):
                READ[to](out)
                return
        except UserError:
            pass
        raise UserError(
            f"{out} exists and is no such autoencoder: this writes {wanted}, name another"
        )
