"""Sparse autoencoders in and out: `python -m convert sae PATH --to KIND --out PATH`.

Parameters here are for raw activations: f = relu(x W_enc + b_enc), x̂ = f W_dec + b_dec.
dictionary_learning subtracts the decoder's bias first, f = relu((x - b_dec) W_enc + b), and so does
SAELens by default. Both forms are equal with b = b_enc + b_dec W_enc.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from minsae_jax.settings import JsonObject

Kind = Literal["member", "minsae", "saelens", "dictionary_learning"]


class Linear(NamedTuple):
    """A parameter in minSAE's and dictionary_learning's state dict, and in a member."""

    key: str
    name: str
    is_transposed: bool


LINEARS = (
    Linear("encoder.weight", "W_enc", True),
    Linear("encoder.bias", "b_enc", False),
    Linear("decoder.weight", "W_dec", True),
    Linear("decoder.bias", "b_dec", False),
)
MINSAE_KEYS = [linear.key for linear in LINEARS]
DICTIONARY_LEARNING_BIAS = "bias"  # its key for decoder.bias
SAELENS_CONFIG = "cfg.json"
SAELENS_WEIGHTS = "sae_weights.safetensors"
# Values of cfg.json that a ReLU member can represent; the first is SAELens's default.
SAELENS_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard",),
    "activation_fn": ("relu",),
    "activation_fn_str": ("relu",),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "finetuning_scaling_factor": (False, None),
}
TRAINER_FILE = "ae.pt"  # in the folder of a trainer of dictionary_learning
FOLDER_KINDS = ("member", "saelens")
RELU = KINDS["relu"]


@dataclass(frozen=True)
class Autoencoder:
    """A ReLU autoencoder: parameters under a member's names, and entries of its config.json."""

    params: Tensors
    config: JsonObject


@dataclass(frozen=True)
class ConvertedSae:
    """Result of a conversion."""

    source_kind: Kind
    kind: Kind
    path: Path
    d_model: int
    d_sae: int


def convert_sae(path: str | Path, to: Kind, out: str | Path) -> ConvertedSae:
    """Convert an autoencoder of any kind into any kind.

    Raises UserError if the source is not an autoencoder, cannot be represented, or if `out` exists
    and is not an autoencoder of the requested kind.
    """
    path = Path(path)
    out = Path(out).absolute()
    kind = kind_of(path)
    sae = READERS[kind](path)
    sae_kind = sae.config.get("kind", RELU.name)
    if to != "member" and sae_kind != RELU.name:
        raise UserError(f"{path} is of kind {sae_kind}; only relu can be written as {to} so far")
    _check_replaceable(out, to)
    WRITERS[to](out, sae)
    d_model, d_sae = sae.params["W_enc"].shape
    return ConvertedSae(kind, to, out, d_model, d_sae)


def kind_of(path: Path) -> Kind:
    """Return the kind of an autoencoder, from its content. Raises UserError if it is unknown."""
    if not path.exists():
        raise UserError(f"there is no autoencoder {path}")
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return "member"
        if (path / SAELENS_CONFIG).is_file():
            return "saelens"
        if not (path / TRAINER_FILE).is_file():
            raise UserError(
                f"there is no {WEIGHTS}, {SAELENS_CONFIG} or {TRAINER_FILE} in {path}, so it is "
                "not an autoencoder"
            )
        path = path / TRAINER_FILE
    state = load_torch(path)
    if isinstance(state, dict) and DICTIONARY_LEARNING_BIAS in state:
        return "dictionary_learning"
    return "minsae"


def _check_replaceable(out: Path, to: Kind) -> None:
    """Raise UserError unless `out` is missing, an empty folder, or an autoencoder of this kind."""
    if not out.exists():
        return
    is_folder_kind = to in FOLDER_KINDS
    if out.is_dir() and is_folder_kind and not any(out.iterdir()):
        return
    try:
        if out.is_dir() == is_folder_kind:
            READERS[to](out)
            return
    except UserError:
        pass
    expected = "a folder" if is_folder_kind else "a file"
    raise UserError(
        f"{out} exists and is not an autoencoder of kind {to}; choose another --out, {expected}"
    )


def read_member(path: Path) -> Autoencoder:
    """Read a folder that `minsae train` wrote."""
    sae = load_sae(path)
    params = {name: np.asarray(array) for name, array in sae.params.items()}
    return Autoencoder(params, sae.config)


def write_member(path: Path, sae: Autoencoder) -> None:
    """Write a folder as `minsae train` does."""
    d_model, d_sae = sae.params["W_enc"].shape
    save_member(path, sae.params, sae.config | {"d_model": d_model, "d_sae": d_sae})


def read_minsae(path: Path) -> Autoencoder:
    """Read a state dict of the PyTorch minSAE."""
    return _read_linears(path, MINSAE_KEYS, "minSAE")


def write_minsae(path: Path, sae: Autoencoder) -> None:
    """Write a state dict of the PyTorch minSAE."""
    _write_torch(path, {linear.key: _to_torch(sae.params, linear) for linear in LINEARS})


def read_dictionary_learning(path: Path) -> Autoencoder:
    """Read a state dict of dictionary_learning, or the folder of a trainer."""
    keys = [DICTIONARY_LEARNING_BIAS, *MINSAE_KEYS[:3]]
    sae = _read_linears(path, keys, "dictionary_learning")
    return dataclasses.replace(sae, params=_shift_bias(sae.params, -1))


def write_dictionary_learning(path: Path, sae: Autoencoder) -> None:
    """Write a state dict of dictionary_learning."""
    params = _shift_bias(sae.params, +1)
    # relu((x - b_dec) W_enc + b) = relu(x W_enc + b_enc) requires b = b_enc + b_dec W_enc.
    state = {DICTIONARY_LEARNING_BIAS: params["b_dec"]}
    state |= {linear.key: _to_torch(params, linear) for linear in LINEARS[:3]}
    _write_torch(path, state)


def _read_linears(path: Path, keys: list[str], library: str) -> Autoencoder:
    """Read a flat state dict, or a trainer's folder with one; names and shapes must be exact."""
    if path.is_dir():
        path = path / TRAINER_FILE
    state = load_torch(path)
    if not isinstance(state, dict) or set(state) != set(keys):
        content = type(state).__name__
        if isinstance(state, dict):
            content = ", ".join(str(key)[:40] for key in list(state)[:6])
        raise UserError(
            f"{path} is not an autoencoder of {library}: expected {', '.join(keys)}, got {content}"
        )
    tensors = to_numpy(state, path)
    if any(tensor.dtype != np.float32 for tensor in tensors.values()):
        raise UserError(f"{path} must be float32 throughout")
    if DICTIONARY_LEARNING_BIAS in tensors:
        tensors["decoder.bias"] = tensors.pop(DICTIONARY_LEARNING_BIAS)
    params = {}
    for key, name, is_transposed in LINEARS:
        tensor = tensors[key].T if is_transposed else tensors[key]
        params[name] = np.ascontiguousarray(tensor)
    check_params(RELU, params, str(path))
    return Autoencoder(params, _relu_config(path))


def _to_torch(params: Tensors, linear: Linear) -> np.ndarray:
    return params[linear.name].T if linear.is_transposed else params[linear.name]


def _relu_config(path: Path) -> JsonObject:
    return {"format_version": 1, "kind": "relu", "source_file": path.name}


def _write_torch(path: Path, state: Tensors) -> None:
    import torch

    tensors = {key: torch.from_numpy(np.array(array, order="C")) for key, array in state.items()}
    save_torch(path, tensors)


def _shift_bias(params: Tensors, sign: int) -> Tensors:
    """Return the parameters with sign * b_dec W_enc added to b_enc, rounded to float32 once."""
    # In float64: the product is summed over d_model and added to b_enc before rounding.
    shift = params["b_dec"].astype(np.float64) @ params["W_enc"]
    with np.errstate(over="ignore"):  # check_params reports infinity
        shifted = params | {"b_enc": (params["b_enc"] + sign * shift).astype(np.float32)}
    check_params(RELU, shifted, "the autoencoder with the decoder's bias moved")
    return shifted


def read_saelens(path: Path) -> Autoencoder:
    """Read a standard (ReLU) SAE of SAELens.

    Raises UserError if a member cannot represent it: another architecture, inputs that are
    normalised or reshaped, activations that were scaled after training.
    """
    cfg = load_json(path / SAELENS_CONFIG)
    tensors = load_safetensors(path / SAELENS_WEIGHTS)
    for key, supported in SAELENS_SUPPORTED.items():
        value = cfg.get(key, supported[0])
        # Compared with `is`, since 0 == False and 1 == True.
        if not any(value is s or (isinstance(value, str) and value == s) for s in supported):
            raise UserError(
                f"{path} has {key} {shown(value)}; only {shown(supported[0])} can be converted"
            )
    subtracts_bias = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(subtracts_bias, bool):
        raise UserError(
            f"{path} has apply_b_dec_to_input {shown(subtracts_bias)}, expected true or false"
        )
    halves = {name for name, tensor in tensors.items() if str(tensor.dtype) in HALVES}
    params = tensors | {name: tensors[name].astype(np.float32) for name in halves}
    check_params(RELU, params, str(path / SAELENS_WEIGHTS))
    if subtracts_bias:
        params = _shift_bias(params, -1)
    return Autoencoder(params, _member_config(cfg) or _relu_config(path))


def _member_config(cfg: JsonObject) -> JsonObject | None:
    """Return the member's config.json that `write_saelens` put into the metadata, if valid."""
    metadata = cfg.get("metadata")
    config = metadata.get("minsae_jax") if isinstance(metadata, dict) else None
    if not isinstance(config, dict):
        return None
    if config.get("format_version") != 1 or config.get("kind") != "relu":
        return None
    return config


def write_saelens(path: Path, sae: Autoencoder) -> None:
    """Write a standard SAE of SAELens."""
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
    # Context managers exit in reverse: the config is renamed last, and without it there is no SAE.
    with (
        atomic_write(path / SAELENS_CONFIG) as config,
        atomic_write(path / SAELENS_WEIGHTS) as weights,
    ):
        config.write_text(json.dumps(cfg, indent=2) + "\n")
        weights.write_bytes(
            save({name: np.array(sae.params[name], order="C") for name in RELU.param_names})
        )
        (path / SAELENS_CONFIG).unlink(missing_ok=True)


READERS: dict[Kind, Callable[[Path], Autoencoder]] = {
    "member": read_member,
    "minsae": read_minsae,
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary_learning,
}
WRITERS: dict[Kind, Callable[[Path, Autoencoder], None]] = {
    "member": write_member,
    "minsae": write_minsae,
    "saelens": write_saelens,
    "dictionary_learning": write_dictionary_learning,
}
