"""dictionary_learning in and out: PyTorch state dicts, and the folder of a trainer.

A trainer's folder has the state dict in `ae.pt`, and `config.json`, which names its class. minSAE's
state dict is that of the class AutoEncoderNew.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.autoencoder import (
    Autoencoder,
    matryoshka_prefixes,
    member_config,
    new_config,
    shares_from_prefixes,
    shift_bias,
    topk_k,
    whole_k,
)
from convert.torch_files import Tensors, load_torch, save_torch, to_numpy
from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, flush, make_folder
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import check_params
from minsae_jax.settings import JsonObject, read_json, shown

STATE_FILE = "ae.pt"
CONFIG_FILE = "config.json"
# torch.nn.Linear stores [outputs, inputs]; W_enc is [d_model, d_sae], W_dec [d_sae, d_model].
TRANSPOSED = ("encoder.weight", "decoder.weight")
INTEGERS = ("k", "group_sizes")


@dataclass(frozen=True)
class DictClass:
    """A class of dictionary_learning.

    names: keys of its state dict and the parameters in a member. settings: further keys, which are
    no parameters there. subtracts_bias: whether it encodes x - b_dec.
    """

    kind: str
    names: dict[str, str]
    settings: tuple[str, ...] = ()
    subtracts_bias: bool = True

    @property
    def keys(self) -> set[str]:
        return {*self.names, *self.settings}


_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
CLASSES = {
    "AutoEncoder": DictClass("relu", {"bias": "b_dec"} | _LINEAR),
    "AutoEncoderTopK": DictClass(
        "topk", _LINEAR | {"b_dec": "b_dec", "k": "k"}, settings=("threshold",)
    ),
    "BatchTopKSAE": DictClass(
        "batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, settings=("k",)
    ),
    "MatryoshkaBatchTopKSAE": DictClass("matryoshka", _PLAIN, settings=("k", "group_sizes")),
    "JumpReluAutoEncoder": DictClass("jumprelu", _PLAIN, subtracts_bias=False),
    "GatedAutoEncoder": DictClass(
        "gated",
        {
            "decoder_bias": "b_dec",
            "encoder.weight": "W_enc",
            "r_mag": "r_mag",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
            "decoder.weight": "W_dec",
        },
    ),
}
MINSAE = DictClass("relu", _LINEAR | {"decoder.bias": "b_dec"}, subtracts_bias=False)
# Keys that minSAE does not have.
KEYS = {key for c in CLASSES.values() for key in c.keys} - MINSAE.keys


def read_minsae(path: Path) -> Autoencoder:
    """Read a state dict of the PyTorch minSAE."""
    path = _state_file(path)
    state = load_torch(path)
    if not isinstance(state, dict) or set(state) != MINSAE.keys:
        raise _wrong_keys(path, state, "minSAE", [MINSAE])
    params = _read_params(to_numpy(state, path), MINSAE, path)
    return Autoencoder(params, new_config(path, MINSAE.kind))


def write_minsae(path: Path, sae: Autoencoder) -> None:
    """Write a state dict of the PyTorch minSAE. Raises UserError unless the kind is ReLU."""
    if sae.kind != MINSAE.kind:
        raise UserError(f"minSAE's format contains ReLU autoencoders only, got kind {sae.kind}")
    _save(path, _to_state(sae.params, MINSAE))


def read_dictionary_learning(path: Path) -> Autoencoder:
    """Read a state dict of dictionary_learning, or the folder of a trainer.

    Raises UserError if it is of no known class, or has a threshold that was never set.
    """
    path = _state_file(path)
    state = load_torch(path)
    config = _trainer_config(path)
    dict_class = _class_of(state, config, path)
    tensors = to_numpy(state, path)
    params = _read_params(tensors, dict_class, path)
    kind = dict_class.kind
    if kind in ("batchtopk", "matryoshka") and params["threshold"] < 0:
        raise UserError(
            f"{path} has threshold {params['threshold']:g}: training was too short to set it, and "
            "dictionary_learning would use it as a ReLU autoencoder"
        )
    if dict_class.subtracts_bias:
        params = shift_bias(kind, params, -1)
    exported = member_config(config.get("minsae_jax"), (kind,))
    if exported is not None:
        return Autoencoder(params, exported)
    settings: JsonObject = {}
    if "k" in dict_class.settings:
        settings["k"] = whole_k(_integers(tensors["k"], "k", path), str(path))
    if "group_sizes" in dict_class.settings:
        d_sae = len(params["W_dec"])
        prefixes = np.cumsum(_integers(tensors["group_sizes"], "group_sizes", path)).tolist()
        if sorted({0, *prefixes}) != [0, *prefixes] or prefixes[-1] != d_sae:
            raise UserError(f"{path} has group_sizes that do not add up to d_sae {d_sae}")
        settings["shares"] = shares_from_prefixes(prefixes, d_sae)
    return Autoencoder(params, new_config(path, kind, **settings))


def write_dictionary_learning(path: Path, sae: Autoencoder) -> None:
    """Write a state dict of dictionary_learning, and for the name ae.pt also config.json.

    Raises UserError if dictionary_learning does not have the kind, or if only config.json shows the
    class, so that the file must be named ae.pt.
    """
    matches = [name for name, c in CLASSES.items() if c.kind == sae.kind]
    if not matches:
        raise UserError(f"dictionary_learning has no class for kind {sae.kind}")
    class_name = matches[0]
    dict_class = CLASSES[class_name]
    params = sae.params
    if dict_class.subtracts_bias:
        params = shift_bias(sae.kind, params, +1)
    state = _to_state(params, dict_class)
    d_model, d_sae = params["W_enc"].shape
    trainer: JsonObject = {
        "dict_class": class_name,
        "activation_dim": d_model,
        "dict_size": d_sae,
        "layer": sae.config.get("layer"),
        "lm_name": "",
    }
    if sae.kind == "topk":
        trainer["k"] = topk_k(sae)
        # The value before training sets it; TopK does not use it to encode.
        state["threshold"] = np.array(-1, np.float32)
    if "k" in dict_class.settings:
        trainer["k"] = _batch_k(sae)
    if "group_sizes" in dict_class.settings:
        trainer["group_sizes"] = np.diff(matryoshka_prefixes(sae), prepend=0).tolist()
        state["group_sizes"] = np.array(trainer["group_sizes"], np.int64)
    if "k" in trainer:
        state["k"] = np.array(trainer["k"], np.int32)
    if path.name == STATE_FILE:
        config = {"trainer": trainer, "buffer": {}, "minsae_jax": sae.config}
        _write_config(path, config)
    elif len(_candidates(state)) > 1:
        raise UserError(
            f"{path} must be named {STATE_FILE}: the class {class_name} can only be read from the "
            f"{CONFIG_FILE} that is written with it"
        )
    _save(path, state)


def _state_file(path: Path) -> Path:
    return path / STATE_FILE if path.is_dir() else path


def _trainer_config(path: Path) -> JsonObject:
    """Return config.json of a trainer's folder; {} if there is none."""
    config_path = path.with_name(CONFIG_FILE)
    if path.name != STATE_FILE or not config_path.is_file():
        return {}
    return read_json(config_path)


def _candidates(state: dict[str, Any]) -> list[str]:
    return [name for name, c in CLASSES.items() if c.keys == set(state)]


def _class_of(state: Any, config: JsonObject, path: Path) -> DictClass:
    candidates = _candidates(state) if isinstance(state, dict) else []
    if not candidates:
        raise _wrong_keys(path, state, "dictionary_learning", list(CLASSES.values()))
    if len(candidates) == 1:
        return CLASSES[candidates[0]]
    trainer = config.get("trainer")
    class_name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if class_name not in candidates:
        raise UserError(
            f"{path} may be of class {' or '.join(candidates)}; it must be named {STATE_FILE}, and "
            f"{CONFIG_FILE} beside it must contain trainer.dict_class, got {shown(class_name)}"
        )
    return CLASSES[class_name]


def _wrong_keys(path: Path, state: Any, library: str, classes: list[DictClass]) -> UserError:
    content = type(state).__name__
    if isinstance(state, dict):
        content = ", ".join(str(key)[:40] for key in list(state)[:6])
    expected = " or ".join(", ".join([*c.names, *c.settings]) for c in classes)
    return UserError(
        f"{path} is not an autoencoder of {library}: expected {expected}, got {content}"
    )


def _read_params(tensors: Tensors, dict_class: DictClass, path: Path) -> Tensors:
    """Return a member's parameters, float32; the encoder's bias is as in the file."""
    floats = {key: tensor for key, tensor in tensors.items() if key not in INTEGERS}
    if any(tensor.dtype != np.float32 for tensor in floats.values()):
        raise UserError(f"{path} must be float32 throughout")
    params = {}
    for key, name in dict_class.names.items():
        tensor = tensors[key]
        if key == "k":
            tensor = np.array(whole_k(_integers(tensor, key, path), str(path)), np.float32)
        elif key in TRANSPOSED:
            tensor = np.ascontiguousarray(tensor.T)
        params[name] = tensor
    check_params(KINDS[dict_class.kind], params, str(path))
    return params


def _integers(tensor: np.ndarray, key: str, path: Path) -> Any:
    """Return a tensor of integers as an int or a list."""
    if tensor.dtype.kind not in "iu" or tensor.ndim != (key == "group_sizes"):
        raise UserError(f"{path} has {key} {shown(tensor)}, expected integers")
    return tensor.tolist()


def _to_state(params: Tensors, dict_class: DictClass) -> Tensors:
    state = {}
    for key, name in dict_class.names.items():
        state[key] = params[name].T if key in TRANSPOSED else params[name]
    return state


def _batch_k(sae: Autoencoder) -> int:
    """Return k of training, which the loaders require; fractions are rounded up."""
    k = sae.config.get("k")
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k <= sae.d_sae:
        raise UserError(
            f"dictionary_learning requires k of kind {sae.kind}, and config.json has k {shown(k)}"
        )
    return math.ceil(k)


def _write_config(path: Path, config: JsonObject) -> None:
    """Write the config.json of a state dict, and remove the old state dict.

    Raises UserError if config.json belongs to something else, such as a training run.
    """
    config_path = path.with_name(CONFIG_FILE)
    if config_path.exists() and not path.exists() and "minsae_jax" not in read_json(config_path):
        raise UserError(
            f"{config_path} exists without {STATE_FILE}; remove it or choose another --out"
        )
    make_folder(path.parent)
    with atomic_write(config_path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        # An old state dict must never be seen with the new config.
        path.unlink(missing_ok=True)
        flush([path.parent])


def _save(path: Path, state: Tensors) -> None:
    import torch

    contiguous = {key: np.array(array, order="C") for key, array in state.items()}
    save_torch(path, {key: torch.from_numpy(array) for key, array in contiguous.items()})
