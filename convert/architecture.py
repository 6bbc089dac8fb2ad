"""The architecture of a PatchTST: from the state dict where that tells it, else from the settings that come with it."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convert.checkpoint import Checkpoint, Tensors
from minsae_jax.config import UserError
from minsae_jax.encoder.patchtst import Architecture

# our name -> the names that settings use for it
SPELLINGS = {
    "patch_len": ("patch_length", "patch_len"),
    "n_layers": ("num_layers", "n_layers"),
    "n_heads": ("num_heads", "n_heads"),
    "n_vars": ("n_vars", "num_variates"),
}
DEFAULTS = {"pre_norm": False}
FOLLOWS_STATE_DICT = ("norm", "use_cls_token")  # the reference ignores these two settings


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str  # "YAML" or "checkpoint's config"


def read_architecture(checkpoint: Checkpoint, yaml: Mapping[str, Any]) -> tuple[Architecture, dict[str, str]]:
    """The architecture, and where each setting came from.

    Raises UserError naming every setting that nothing gives and both values of every size that disagrees.
    """
    given, disagreement = _merge_settings(yaml, checkpoint.config)
    told = _from_state_dict(checkpoint.tensors, given)
    _compare(told, given)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in get_type_hints(Architecture):
        if name in told:
            values[name], sources[name] = told[name], "state dict"
        elif name in given:
            values[name], sources[name] = given[name].value, given[name].source
        elif name in DEFAULTS:
            values[name], sources[name] = DEFAULTS[name], "default"
    missing = [_spelling(n) for n in get_type_hints(Architecture) if n not in values]
    if missing:
        raise UserError(
            f"neither the YAML nor the config in {checkpoint.path.name} gives {', '.join(missing)}: "
            "add it to a YAML and name that with --config_path"
        )
    architecture = Architecture(**values)
    _check_sizes(architecture, checkpoint.tensors)
    if disagreement:
        warnings.warn(
            f"the YAML disagrees with the checkpoint's own config and precedes it: {disagreement}", stacklevel=2
        )
    return architecture, sources


def _merge_settings(yaml: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Setting], str]:
    """Our names to settings, the YAML preceding the checkpoint's config; and in words where those two disagree."""
    ours = {n: Setting(v, "YAML") for n, v in _flat(yaml).items()}
    theirs = {n: Setting(v, "checkpoint's config") for n, v in _flat(config).items()}
    for settings in (theirs, ours):
        settings.update({n: Setting(_checked(n, s), s.source) for n, s in settings.items()})
    both = [n for n in ours if n in theirs and ours[n].value != theirs[n].value and n not in FOLLOWS_STATE_DICT]
    disagreement = ", ".join(f"{_spelling(n)} ({ours[n].value!r}, not {theirs[n].value!r})" for n in both)
    return theirs | ours, disagreement


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values that we know, from the sections `model` and `data` or from the top level."""
    sections = [settings.get("model"), settings.get("data"), settings]
    found: dict[str, Any] = {}
    for name in get_type_hints(Architecture):
        for section in sections:
            for spelling in SPELLINGS.get(name, (name,)):
                if isinstance(section, Mapping) and section.get(spelling) is not None:
                    found.setdefault(name, section[spelling])
    return found


def _checked(name: str, setting: Setting) -> Any:
    """The setting's value, of the type that the architecture wants."""
    value, hint = setting.value, get_type_hints(Architecture)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        value = next((c for c in choices if c.lower() == str(value).lower()), value)
    elif hint is float and type(value) in (int, str):  # PyYAML reads 1e-5 as text, and so may the checkpoint's config
        with contextlib.suppress(ValueError):
            value = float(value)
    lowest = 0 if name == "target_dim" else 1e-30
    fits = value in choices if choices else type(value) is hint and (hint is bool or lowest <= value < math.inf)
    if not fits:
        words = {int: "a whole number above 0", bool: "true or false", float: "a number above 0"}
        wanted = " or ".join(choices) or words[hint]
        raise UserError(f"{_spelling(name)} must be {wanted}, but the {setting.source} says {setting.value!r}")
    return value


def _spelling(name: str) -> str:
    return SPELLINGS.get(name, (name,))[0]


def _from_state_dict(tensors: Tensors, given: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting that the tensors tell."""
    layer = "backbone.encoder.layers.0"
    individual = "backbone.W_P.0.weight" in tensors
    embedding = _tensor(tensors, "backbone.W_P.0.weight" if individual else "backbone.W_P.weight", 2)
    d_model, patch_len = embedding.shape
    position = _tensor(tensors, "backbone.W_pos", 2)
    told = {
        "d_model": d_model,
        "patch_len": patch_len,
        "shared_embedding": not individual,
        "use_cls_token": "backbone.cls_token" in tensors,
        "pos_dim": position.shape[1],
        "n_layers": _count(tensors, r"backbone\.encoder\.layers\.(\d+)\..*"),
        "d_ff": _tensor(tensors, f"{layer}.ff.0.weight", 2).shape[0],
        "norm": "BatchNorm" if f"{layer}.norm_attn.1.running_mean" in tensors else "LayerNorm",
        "revin_affine": "revin.affine_weight" in tensors,
        "individual_head": "head.linears.0.weight" in tensors,
    }
    heads = float(_tensor(tensors, f"{layer}.self_attn.sdp_attn.scale", 0)) ** 2 * d_model
    if math.isfinite(heads) and abs(heads - round(heads)) < 1e-3 and round(heads) > 0 and d_model % round(heads) == 0:
        told["n_heads"] = round(heads)  # else the scale was trained, and tells nothing
    if individual:
        told["n_vars"] = _count(tensors, r"backbone\.W_P\.(\d+)\.weight")
    elif told["revin_affine"]:
        told["n_vars"] = tensors["revin.affine_weight"].size
    return told | _head(tensors, told, position.shape[0], given)


def _head(tensors: Tensors, told: Mapping[str, Any], n_tokens: int, given: Mapping[str, Setting]) -> dict[str, Any]:
    """The head's kind, as far as its shape tells, and its number of outputs."""
    weight = _tensor(tensors, "head.linears.0.weight" if told["individual_head"] else "head.linear.weight", 2)
    n_out, n_in = weight.shape
    d_model, cls = told["d_model"], told["use_cls_token"]
    n_vars = told.get("n_vars", given["n_vars"].value if "n_vars" in given else None)
    fits = {
        "pretrain": n_in == d_model and n_out == told["patch_len"] and not told["individual_head"],
        "prediction": n_in == d_model * (1 if cls else n_tokens),
        "regression": n_in == d_model * n_vars if isinstance(n_vars, int) else n_in % d_model == 0,
    }
    fits["classification"] = fits["regression"]
    kinds = [kind for kind, fit in fits.items() if fit]
    asked = given["head_type"].value if "head_type" in given else None
    if not kinds or (asked is not None and asked not in kinds):
        raise UserError(
            f"the head is {asked!r} in the {given['head_type'].source if asked else 'settings'}, but its weights "
            f"{list(weight.shape)} fit {' or '.join(kinds) or 'no head that is known'}"
        )
    return {"target_dim": n_out} | ({"head_type": kinds[0]} if len(kinds) == 1 else {})


def check_yaml(architecture: Architecture, yaml: Mapping[str, Any]) -> None:
    """Refuse a YAML that describes another encoder than a converted one; raises UserError with both values."""
    _compare(dataclasses.asdict(architecture), _merge_settings(yaml, {})[0], "converted encoder")


def _compare(told: dict[str, Any], given: Mapping[str, Setting], teller: str = "state dict") -> None:
    """Settings that the state dict tells too: a warning for those that the reference ignores, an error for sizes."""
    ignored: list[str] = []
    wrong: list[str] = []
    values = {n: s.value for n, s in given.items()} | told
    for name, setting in given.items():
        if setting.value == values[name]:
            continue
        if name == "target_dim" and values.get("head_type") == "pretrain":
            continue  # the pretrain head has none; YAMLs say 0
        if name == "revin_affine" and not told[name] and not values.get("revin"):
            continue  # nothing is normalised, so nothing is missing
        said = f"{_spelling(name)} is {setting.value} in the {setting.source}, but {told[name]} in the {teller}"
        (ignored if name in FOLLOWS_STATE_DICT else wrong).append(said)
    if wrong:
        raise UserError("; ".join(wrong))
    if ignored:
        warnings.warn(f"{'; '.join(ignored)}: the {teller} decides, as in the reference", stacklevel=2)


def _check_sizes(a: Architecture, tensors: Tensors) -> None:
    n_patches = tensors["backbone.W_pos"].shape[0] - a.use_cls_token
    if a.seq_len < a.patch_len or a.n_patches != n_patches:
        raise UserError(
            f"seq_len {a.seq_len}, patch_length {a.patch_len} and stride {a.stride} make {max(a.n_patches, 0)} "
            f"patches, but the state dict has positions for {n_patches}"
        )
    if a.d_model % a.n_heads:
        raise UserError(f"num_heads {a.n_heads} does not divide d_model {a.d_model}")


def _tensor(tensors: Tensors, key: str, ndim: int):
    if key not in tensors:
        raise UserError(f"the state dict has no {key}: it is no PatchTST that can be converted")
    if tensors[key].ndim != ndim:
        raise UserError(f"{key} must have {ndim} dimensions, but is {list(tensors[key].shape)}")
    return tensors[key]


def _count(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(m[1]) for k in tensors if (m := re.fullmatch(pattern, k))), default=-1)
