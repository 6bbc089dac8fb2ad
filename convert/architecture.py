"""The architecture of a PatchTST: from the state dict where that tells it, else from the settings that come with it."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from convert.checkpoint import Checkpoint, Program, Tensors, shown
from minsae_jax.encoder.patchtst.model import Architecture
from minsae_jax.errors import UserError

# our name -> the names that settings use for it: gPatchTST's YAML, its code, the official programs
SPELLINGS = {
    "patch_len": ("patch_length", "patch_len"),
    "n_layers": ("num_layers", "n_layers", "e_layers"),
    "n_heads": ("num_heads", "n_heads"),
    "n_vars": ("n_vars", "num_variates", "enc_in", "c_in"),
    "activation": ("activation", "act"),
    "revin_affine": ("revin_affine", "affine"),
    "individual_head": ("individual_head", "individual"),
}
# What a program's code fixes and its settings leave out.
DEFAULTS: dict[Program, dict[str, Any]] = {
    "gpatchtst": {"pre_norm": False},
    "supervised": {
        "pre_norm": False, "activation": "gelu", "res_attention": True, "revin_eps": 1e-5, "scaler": "mean_sd",
    },
    "transformers": {},
}  # fmt: skip
MOST_LAYERS, MOST_NUMBERS = 64, 1 << 26  # a window's samples, or one layer's numbers for it
PADDED = ": the official supervised program adds one by padding, if it is of that say --program supervised"
FOLLOWS_STATE_DICT = ("norm", "use_cls_token")  # the reference ignores these two settings
HINTS = get_type_hints(Architecture)
REQUIRED = [f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING]


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str  # "flags", "YAML", "checkpoint's config" and so on


def read_architecture(
    checkpoint: Checkpoint, yaml: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[Architecture, dict[str, str], tuple[str, ...]]:
    """The architecture, where each setting came from, and what is worth a warning. Flags precede the YAML, and that the
    checkpoint's own config.

    Raises UserError naming every setting that nothing gives and both values of every size that disagrees.
    """
    given, disagreement = _merge_settings(checkpoint, yaml, flags)
    told = _from_state_dict(checkpoint, given)
    ignored = _compare(told, given)
    default = {n: Setting(v, "program's default") for n, v in DEFAULTS[checkpoint.program].items()}
    settings = default | given | {n: Setting(v, "state dict") for n, v in told.items()}
    if checkpoint.program == "supervised":
        fixed = _supervised(settings, checkpoint.tensors)
        settings |= {n: Setting(v, "program's own way") for n, v in fixed.items()}
    missing = [spelling(n) for n in REQUIRED if n not in settings]
    if missing:
        raise UserError(
            f"neither the YAML nor the config in {checkpoint.path.name} gives {', '.join(missing)}: "
            f"say --{next(n for n in REQUIRED if n not in settings)} and so on, or add it to a YAML and name that with "
            "--config_path"
        )
    settings = {n: settings[n] for n in HINTS if n in settings}
    architecture = Architecture(**{n: s.value for n, s in settings.items()})
    _check_sizes(architecture, checkpoint)
    return (
        architecture,
        {n: s.source for n, s in settings.items()},
        tuple(filter(None, (disagreement, ignored))),
    )


def _merge_settings(
    checkpoint: Checkpoint | None, yaml: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[dict[str, Setting], str]:
    """Our names to settings, each source preceding the ones before it; and in words where the YAML and the checkpoint's
    own config disagree."""
    config: Mapping[str, Any] = checkpoint.config if checkpoint else {}
    if checkpoint and checkpoint.program == "transformers":
        own = {n: Setting(v, "config.json") for n, v in config.items()}
    else:
        own = {n: Setting(v, "checkpoint's config") for n, v in _flat(config).items()}
    ours = {n: Setting(v, "YAML") for n, v in _flat(yaml).items()}
    said = {n: Setting(v, "flags") for n, v in _flat(flags).items()}
    for settings in (own, ours, said):
        settings.update({n: Setting(_checked(n, s), s.source) for n, s in settings.items()})
    both = [
        n
        for n in ours
        if n in own and ours[n].value != own[n].value and n not in FOLLOWS_STATE_DICT
    ]
    disagreement = ", ".join(
        f"{spelling(n)} ({ours[n].value!r}, not {own[n].value!r})" for n in both if n not in said
    )
    if disagreement:
        disagreement = (
            f"the YAML disagrees with the checkpoint's own config and precedes it: {disagreement}"
        )
    return own | ours | said, disagreement


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values that we know, from the sections `model` and `data` or from the top level."""
    sections = [
        s for s in (settings.get("model"), settings.get("data"), settings) if isinstance(s, Mapping)
    ]
    found: dict[str, Any] = {}
    for name in REQUIRED:
        for section in sections:
            for spelling in SPELLINGS.get(name, (name,)):
                if section.get(spelling) is not None:
                    found.setdefault(name, section[spelling])
    last = next((s["subtract_last"] for s in sections if s.get("subtract_last") is not None), None)
    if last is not None:
        if type(last) not in (bool, int) or last not in (0, 1):
            raise UserError(f"subtract_last must be true or false, but is {shown(last)}")
        found["scaler"] = "last_sd" if last else "mean_sd"
    return found


def _checked(name: str, setting: Setting) -> Any:
    """The setting's value, of the type that the architecture wants."""
    value, hint = setting.value, HINTS[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        value = next(
            (c for c in choices if isinstance(value, str) and c.lower() == value.lower()), value
        )
    elif (
        hint is bool and type(value) is int and value in (0, 1)
    ):  # as the official programs' flags have it
        value = bool(value)
    elif hint is float and type(value) in (
        int,
        str,
    ):  # PyYAML reads 1e-5 as text, and so may the checkpoint's config
        with contextlib.suppress(ValueError):
            value = float(value)
    lowest, highest = 0 if name == "target_dim" else 1e-30, 2**31 if hint is int else math.inf
    fits = (
        any(value is c for c in choices)
        if choices
        else type(value) is hint and (hint is bool or lowest <= value < highest)
    )
    if not fits:
        words = {
            int: "a whole number above 0 and below 2^31",
            bool: "true or false",
            float: "a number above 0",
        }
        wanted = " or ".join(choices) or words[hint]
        raise UserError(
            f"{spelling(name)} must be {wanted}, but the {setting.source} says {shown(setting.value)}"
        )
    return value


def spelling(name: str) -> str:
    """gPatchTST's name for one of ours."""
    return SPELLINGS.get(name, (name,))[0]


def _from_state_dict(checkpoint: Checkpoint, given: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting that the tensors tell."""
    tensors = checkpoint.tensors
    layer = "backbone.encoder.layers.0"
    individual = "backbone.W_P.0.weight" in tensors
    embedding = _tensor(
        tensors, "backbone.W_P.0.weight" if individual else "backbone.W_P.weight", 2
    )
    d_model, patch_len = embedding.shape
    position = _tensor(tensors, "backbone.W_pos", 2)
    if position.shape[1] not in (1, d_model):
        raise UserError(
            f"backbone.W_pos is {list(position.shape)}, but must be 1 or d_model ({d_model}) wide"
        )
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
    scale = f"{layer}.self_attn.sdp_attn.scale"
    heads = float(_tensor(tensors, scale, 0)) ** 2 * d_model
    rounding = {"float16": 2e-3, "bfloat16": 1e-2}.get(
        checkpoint.dtypes.get(scale, ""), 0.0
    )  # of the scale's square
    if (
        math.isfinite(heads)
        and abs(heads - round(heads)) < 1e-3 + rounding * heads
        and round(heads) > 0
    ):
        told |= {"n_heads": round(heads)} if d_model % round(heads) == 0 else {}
    # else the scale was trained, and tells nothing
    counts = {
        "embeddings": _count(tensors, r"backbone\.W_P\.(\d+)\.weight"),
        "heads": _count(tensors, r"head\.linears\.(\d+)\.weight"),
        "RevIN weights": _tensor(tensors, "revin.affine_weight", 1).size
        if told["revin_affine"]
        else 0,
    }
    counts = {what: n for what, n in counts.items() if n}
    if counts:
        told["n_vars"] = max(counts.values())
        if min(counts.values()) < told["n_vars"]:
            said = ", ".join(f"{n} {what}" for what, n in counts.items())
            raise UserError(
                f"the state dict disagrees with itself on the number of channels: {said}"
            )
    return told | _head(tensors, told, position.shape[0], given)


def _head(
    tensors: Tensors, told: Mapping[str, Any], n_tokens: int, given: Mapping[str, Setting]
) -> dict[str, Any]:
    """The head's kind, as far as its shape tells, and its number of outputs."""
    asked = given.get("head_type")
    if not any(k.startswith("head.") for k in tensors):
        if asked and asked.value != "none":
            raise UserError(
                f"the head is {asked.value!r} in the {asked.source}, but the state dict has none: say --without_head"
            )
        return {"head_type": "none", "target_dim": 0}
    weight = _tensor(
        tensors, "head.linears.0.weight" if told["individual_head"] else "head.linear.weight", 2
    )
    n_out, n_in = weight.shape
    d_model, cls = told["d_model"], told["use_cls_token"]
    n_vars = told.get("n_vars", given["n_vars"].value if "n_vars" in given else None)
    reads_all = not cls and ("pooling" not in given or given["pooling"].value == "gpatchtst")
    fits = {
        "pretrain": n_in == d_model and n_out == told["patch_len"] and not told["individual_head"],
        "prediction": n_in == d_model * (n_tokens if reads_all else 1),
        "regression": n_in == d_model * n_vars if isinstance(n_vars, int) else n_in % d_model == 0,
    }
    fits["classification"] = fits["regression"]
    kinds = [kind for kind, fit in fits.items() if fit]
    if not kinds or (asked and asked.value not in kinds):
        raise UserError(
            f"the head is {asked.value!r} in the {asked.source}, but its weights {list(weight.shape)} fit "
            f"{' or '.join(kinds) or 'no head that is known'}"
            if asked
            else f"the head's weights {list(weight.shape)} fit no head that is known: say --without_head"
        )
    return {"target_dim": n_out} | ({"head_type": kinds[0]} if len(kinds) == 1 else {})


def _supervised(settings: Mapping[str, Setting], tensors: Tensors) -> dict[str, Any]:
    """What the official supervised program does in its own way: it repeats the last sample for a stride where its
    positions tell so, leaves out samples at the end, has one kind of head, and takes its output back by RevIN."""
    values = {n: s.value for n, s in settings.items()}
    fixed: dict[str, Any] = {"leftover": "end"}
    if "seq_len" in values and "stride" in values:
        n_patches = (values["seq_len"] - values["patch_len"]) // values["stride"] + 1
        fixed["end_padding"] = values["stride"] * (len(tensors["backbone.W_pos"]) == n_patches + 1)
    if values["revin_affine"]:
        fixed["revin"] = True
    if values.get("head_type") != "none":
        fixed |= {"head_type": "prediction", "denormalize": (values | fixed).get("revin", False)}
    for name in ("revin", "head_type"):
        if name in fixed and values.get(name, fixed[name]) != fixed[name]:
            raise UserError(
                f"{name} is {values[name]} in the {settings[name].source}, but {fixed[name]} in a model of the "
                "official supervised program, as this seems to be: if it is not, say --program gpatchtst"
            )
    return fixed


def check_yaml(architecture: Architecture, yaml: Mapping[str, Any]) -> None:
    """Refuse a YAML that describes another encoder than a converted one; raises UserError with both values."""
    ignored = _compare(
        dataclasses.asdict(architecture), _merge_settings(None, yaml, {})[0], "converted encoder"
    )
    if ignored:
        warnings.warn(ignored, stacklevel=2)


def _compare(told: dict[str, Any], given: Mapping[str, Setting], teller: str = "state dict") -> str:
    """Settings that the state dict tells too: words on those that the reference ignores, an error for sizes."""
    ignored: list[str] = []
    wrong: list[str] = []
    values = {n: s.value for n, s in given.items()} | told
    for name, setting in given.items():
        if setting.value == values[name]:
            continue
        if name == "target_dim" and values.get("head_type") in ("pretrain", "none"):
            continue  # these heads have none; YAMLs say 0
        if name == "revin_affine" and not told[name] and not values.get("revin"):
            continue  # nothing is normalised, so nothing is missing
        said = f"{spelling(name)} is {setting.value} in the {setting.source}, but {told[name]} in the {teller}"
        (ignored if name in FOLLOWS_STATE_DICT else wrong).append(said)
    if wrong:
        raise UserError("; ".join(wrong))
    return f"{'; '.join(ignored)}: the {teller} decides, as in the reference" if ignored else ""


def _check_sizes(a: Architecture, checkpoint: Checkpoint) -> None:
    n_patches = len(checkpoint.tensors["backbone.W_pos"]) - a.use_cls_token
    if a.seq_len < a.patch_len or a.n_patches != n_patches:
        raise UserError(
            f"seq_len {a.seq_len}, patch_length {a.patch_len} and stride {a.stride} make {max(a.n_patches, 0)} "
            f"patches, but the state dict has positions for {n_patches}"
            + ("" if checkpoint.program == "supervised" or a.n_patches + 1 != n_patches else PADDED)
        )
    numbers = a.n_vars * max(a.seq_len, n_patches * max(a.d_model, a.d_ff))
    if a.n_layers > MOST_LAYERS or numbers > MOST_NUMBERS:
        raise UserError(
            f"{a.n_layers} layers on windows of {a.seq_len} samples x {a.n_vars} channels are beyond what can be run: "
            f"at most {MOST_LAYERS} layers, and {MOST_NUMBERS:,} numbers a window"
        )
    if a.d_model % a.n_heads:
        raise UserError(f"num_heads {a.n_heads} does not divide d_model {a.d_model}")


def _tensor(tensors: Tensors, key: str, ndim: int) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"the state dict has no {key}: it is no PatchTST that can be converted")
    tensor = tensors[key]
    if tensor.ndim != ndim or tensor.dtype != np.float32 or 0 in tensor.shape:
        raise UserError(
            f"{key} must be floating-point of {ndim} dimensions, but is {tensor.dtype}{list(tensor.shape)}"
        )
    return tensor


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers the keys have at one place."""
    return len({m[1] for k in tensors if (m := re.fullmatch(pattern, k))})
