"""Checkpoints of encoders: float32 tensors under gPatchTST's names, and the program's settings."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.torch_files import Tensors, load_torch, to_numpy
from minsae_jax.errors import UserError, join_some
from minsae_jax.files import sha256_of
from minsae_jax.settings import JsonObject, shown

Program = Literal["gpatchtst", "supervised", "transformers", "cbramod"]
Form = Literal["checkpoint", "state dict"]
HALVES = ("float16", "bfloat16")
ROUNDED = (*HALVES, "float64")  # dtypes that are converted to float32
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model")
# Ends of the key that every PatchTST has once
EMBEDDINGS = ("backbone.W_P.weight", "backbone.W_P.0.weight")
# Prefixes of every key, from DataParallel, torch.compile and a wrapping module.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# A damaged setting must not take all memory.
MAX_LAYERS = 64
MAX_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """The content of an encoder's checkpoint.

    tensors: float32, under gPatchTST's names; RevIN's weights start with `revin.`. config: the
    settings in the checkpoint, {} if it has none. form: a checkpoint as gPatchTST's training saves
    it, or a bare state dict. dtypes: original dtypes of the tensors that were converted.
    """

    path: Path
    sha256: str
    program: Program
    tensors: Tensors
    config: JsonObject
    form: Form = "state dict"
    dtypes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint with its architecture, ready to be converted.

    architecture: of the checkpoint's family. sources: setting -> where its value came from.
    warnings: to show once it is converted.
    """

    checkpoint: Checkpoint
    architecture: Any
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a .pth of gPatchTST or of the official PatchTST.

    It may be a checkpoint of gPatchTST's training, a bare state dict, or one under `model`,
    `state_dict` or any other name, with the prefixes of wrapping modules. Warns about weights that
    are left out.
    """
    path = Path(path)
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a checkpoint")
    key = _state_dict_key(content, path)
    state = content if key is None else content[key]
    tensors, prefixes = without_prefixes(to_numpy(state, path))
    if any(name.startswith("model_trend.") for name in tensors):
        raise UserError(
            f"{path} decomposes its input for two PatchTSTs (model_trend, model_res), "
            "which is not supported"
        )
    tensors = _only_model(tensors, path)
    config = {}
    if key is not None:
        # gPatchTST saves RevIN's weights in a separate state dict.
        revin = content.get("revin_state_dict")
        if revin:
            weights, _ = without_prefixes(to_numpy(revin, path, "revin_state_dict"))
            tensors |= {f"revin.{name}": tensor for name, tensor in weights.items()}
        if isinstance(content.get("config"), dict):
            config = content["config"]
    # The official supervised program names its RevIN `revin_layer`. Without RevIN its models are
    # recognised by the prefix of a bare state dict and the shape of their head.
    program: Program = "gpatchtst"
    if any(name.startswith("revin_layer.") for name in tensors):
        program = "supervised"
        tensors = {name.replace("revin_layer.", "revin."): t for name, t in tensors.items()}
    elif key is None and "model." in prefixes and _reads_all_patches(tensors):
        program = "supervised"
    form: Form = "checkpoint" if key == "model_state_dict" else "state dict"
    return make_checkpoint(path, program, tensors, config, form)


def _state_dict_key(content: JsonObject, path: Path) -> str | None:
    """Return the entry that is the model's state dict; None if the content itself is one."""
    named = [key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)]
    of_tensors = [key for key, value in content.items() if _is_state_dict(value)]
    others = [key for key in of_tensors if key not in (*named[:1], "revin_state_dict")]
    if not named and len(others) > 1:
        raise UserError(
            f"{path} contains several state dicts ({_listed(others)}); save one of them alone"
        )
    if named and others:
        warnings.warn(
            f"{path.name} also contains {_listed(others)}; only {named[0]} is converted",
            stacklevel=4,
        )
    return next(iter((*named, *others)), None)


def _is_state_dict(value: Any) -> bool:
    import torch

    is_dict = isinstance(value, dict) and len(value) > 0
    return is_dict and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _only_model(tensors: Tensors, path: Path) -> Tensors:
    """Return the tensors of the PatchTST in a larger model, without its prefix.

    Raises UserError if there are several. Other models are returned unchanged.
    """
    ends = [(key, end) for key in tensors for end in EMBEDDINGS if key.endswith(end)]
    prefixes = [key.removesuffix(end) for key, end in ends]
    if len(prefixes) > 1:
        raise UserError(
            f"{path} contains several PatchTSTs ({_listed(prefixes)}); save one of them alone"
        )
    if prefixes in ([], [""]):
        return tensors
    prefix = prefixes[0]
    others = [key for key in tensors if not key.startswith(prefix)]
    if others:
        warnings.warn(
            f"only {shown(prefix)} of {path.name} is converted, without {_listed(others)}",
            stacklevel=4,
        )
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _listed(names: Sequence[str]) -> str:
    return join_some([shown(name) for name in names], limit=3)


def make_checkpoint(
    path: Path, program: Program, tensors: Tensors, config: JsonObject, form: Form
) -> Checkpoint:
    """Return a checkpoint with every floating-point tensor in float32."""
    names = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    dtypes = {name: dtype for name, dtype in names.items() if dtype in ROUNDED}
    converted = dict(tensors)
    # Numbers beyond float32 become infinite, which `rules.fill` refuses.
    with np.errstate(over="ignore"):
        converted |= {name: tensors[name].astype(np.float32) for name in dtypes}
    return Checkpoint(
        path=path,
        sha256=sha256_of(path),
        program=program,
        tensors=converted,
        config=config,
        form=form,
        dtypes=dtypes,
    )


def without_prefixes(tensors: Tensors) -> tuple[Tensors, set[str]]:
    """Remove wrappers' prefixes that all keys have; returns the tensors and these prefixes."""
    removed: set[str] = set()
    while True:
        # Wrappers can be nested, as in `module._orig_mod.`.
        shared = [p for p in WRAPPERS if all(key.startswith(p) for key in tensors)]
        if not shared:
            return tensors, removed
        tensors = {key.removeprefix(shared[0]): tensor for key, tensor in tensors.items()}
        removed.add(shared[0])


def _reads_all_patches(tensors: Tensors) -> bool:
    """Return whether the head is the official supervised program's: linear on all patches."""
    head = tensors.get("head.linear.weight", tensors.get("head.linears.0.weight"))
    embedding = tensors.get("backbone.W_P.weight")
    position = tensors.get("backbone.W_pos")
    if head is None or embedding is None or position is None or "backbone.cls_token" in tensors:
        return False
    if not head.ndim == embedding.ndim == position.ndim == 2:
        return False
    # A pretrain head maps d_model to patch_len, the embedding patch_len to d_model.
    is_pretrain_head = head.shape == embedding.T.shape
    return not is_pretrain_head and head.shape[1] == len(embedding) * len(position)


def tensor_of(tensors: Tensors, key: str, ndim: int) -> np.ndarray:
    """Return a tensor. Raises UserError if it is missing or not float32 of `ndim` dimensions."""
    if key not in tensors:
        raise UserError(
            f"the state dict has no {key}, so it is not a PatchTST or CBraMod that can be converted"
        )
    tensor = tensors[key]
    if tensor.ndim != ndim or tensor.dtype != np.float32 or 0 in tensor.shape:
        raise UserError(
            f"{key} must be floating-point with {ndim} dimensions, "
            f"got {tensor.dtype}{list(tensor.shape)}"
        )
    return tensor


def count_distinct(tensors: Tensors, pattern: str) -> int:
    """Return how many different numbers the keys contain at the group of the pattern."""
    matches = (re.fullmatch(pattern, key) for key in tensors)
    return len({match[1] for match in matches if match})


def check_size(n_layers: int, seq_len: int, n_vars: int, numbers: int) -> None:
    """Raise UserError if a model is too large. numbers: of the largest tensor, for one window."""
    if n_layers > MAX_LAYERS or numbers > MAX_NUMBERS:
        raise UserError(
            f"{n_layers} layers on windows of {seq_len} samples x {n_vars} channels are too large: "
            f"at most {MAX_LAYERS} layers and {MAX_NUMBERS:,} numbers per window"
        )
