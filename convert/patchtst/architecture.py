"""Resolution of a PatchTST's architecture from its weights and stated settings.

Every setting of `Architecture` takes the value of the first source that has it:

1. the program's fixed behaviour (the official supervised program only);
2. the state dict, for settings that shapes and keys determine (`inferred.py`);
3. flags, the YAML, then the checkpoint's own config (`stated.py`);
4. the program's default.

A stated setting (3) must agree with the state dict (2); a contradiction is an error, not a choice.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, Program, SourceModel, check_size
from convert.patchtst.inferred import infer_settings
from convert.patchtst.stated import (
    FIELD_TYPES,
    REQUIRED,
    Setting,
    Settings,
    parse_setting,
    read_settings,
    spelling,
)
from convert.torch_files import Tensors
from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.errors import UserError
from minsae_jax.settings import JsonObject, read_yaml

# Settings that a program's code fixes and its configuration leaves out.
DEFAULTS: dict[Program, JsonObject] = {
    "gpatchtst": {"pre_norm": False},
    "supervised": {
        "pre_norm": False,
        "activation": "gelu",
        "res_attention": True,
        "revin_eps": 1e-5,
        "scaler": "mean_sd",
    },
    "transformers": {},
}
# The reference ignores these two settings and follows the state dict.
IGNORED_BY_REFERENCE = ("norm", "use_cls_token")


def read_source(
    checkpoint: Checkpoint,
    yaml: Mapping[str, Any],
    yaml_file: str,
    flags: Mapping[str, Any],
    program: Program | None,
    without_head: bool,
) -> SourceModel:
    """Return a checkpoint with its architecture, of which every setting is resolved.

    yaml_file: path of the YAML for messages, "" without one. For the rest see
    `encoder.read_source`. Raises UserError that names every missing setting, or both values of
    every contradiction.
    """
    if program is not None:
        if checkpoint.program == "transformers":
            raise UserError(
                f"{checkpoint.path.parent} is a folder of transformers; leave out --program"
            )
        checkpoint = dataclasses.replace(checkpoint, program=program)
    if without_head:
        tensors = {k: t for k, t in checkpoint.tensors.items() if not k.startswith("head.")}
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
        flags = {**flags, "head_type": "none"}
    return _resolved(checkpoint, yaml, yaml_file, flags)


def _resolved(
    checkpoint: Checkpoint, yaml: Mapping[str, Any], yaml_file: str, flags: Mapping[str, Any]
) -> SourceModel:
    if checkpoint.program == "transformers":
        # huggingface.py has translated the names already.
        from_config = {n: parse_setting(n, v, "config.json") for n, v in checkpoint.config.items()}
    else:
        from_config = read_settings(checkpoint.config, "checkpoint's config")
    from_yaml = read_settings(yaml, "YAML", yaml_file)
    from_flags = read_settings(flags, "flags")
    stated = from_config | from_yaml | from_flags
    inferred = infer_settings(checkpoint, stated)
    messages = (
        _yaml_overrides(from_config, from_yaml, from_flags),
        _check_agreement(stated, inferred, "state dict"),
    )
    defaults = DEFAULTS[checkpoint.program]
    settings = {name: Setting(value, "program's default") for name, value in defaults.items()}
    # The right operand of | precedes the left one, here and above.
    settings |= stated | inferred
    if checkpoint.program == "supervised":
        settings |= _supervised_settings(settings, checkpoint.tensors)
    _check_complete(settings, checkpoint, yaml_file)

    settings = {name: settings[name] for name in FIELD_TYPES if name in settings}
    architecture = Architecture(**{name: s.value for name, s in settings.items()})
    _check_sizes(architecture, checkpoint)
    return SourceModel(
        checkpoint,
        architecture,
        sources={name: setting.source for name, setting in settings.items()},
        warnings=tuple(message for message in messages if message),
    )


def check_yaml(architecture: Architecture, path: str | Path) -> None:
    """Raise UserError with both values if a YAML file contradicts a converted encoder."""
    where = "converted encoder"
    actual = dataclasses.asdict(architecture)
    settings = {name: Setting(value, where) for name, value in actual.items()}
    from_yaml = read_settings(read_yaml(path), "YAML", str(path))
    message = _check_agreement(from_yaml, settings, where)
    if message:
        warnings.warn(message, stacklevel=2)


def _yaml_overrides(from_config: Settings, from_yaml: Settings, from_flags: Settings) -> str:
    """Return a warning that lists settings of the config which the YAML overrides, or ""."""
    overridden = []
    place = ""
    for name, setting in from_yaml.items():
        if name not in from_config or name in from_flags or name in IGNORED_BY_REFERENCE:
            continue
        before = from_config[name].value
        if setting.value != before:
            overridden.append(f"{spelling(name)} ({setting.value!r}, not {before!r})")
            place = setting.place
    if not overridden:
        return ""
    listed = ", ".join(overridden)
    return f"the {place} disagrees with the checkpoint's own config and precedes it: {listed}"


def _check_agreement(stated: Settings, actual: Settings, where: str) -> str:
    """Raise UserError if stated settings differ from the actual ones, which are those of `where`.

    Returns a warning on differences that the reference ignores too, or "".
    """
    final = stated | actual
    ignored = []
    contradictions = []
    for name, setting in stated.items():
        actual_value = final[name].value
        if setting.value == actual_value or _is_irrelevant(name, actual, final):
            continue
        difference = (
            f"{spelling(name)} is {setting.value} in the {setting.place}, "
            f"but {actual_value} in the {where}"
        )
        if name in IGNORED_BY_REFERENCE:
            ignored.append(difference)
        else:
            contradictions.append(difference)
    if contradictions:
        raise UserError("; ".join(contradictions))
    if not ignored:
        return ""
    return f"{'; '.join(ignored)}: the {where} decides, as in the reference"


def _is_irrelevant(name: str, actual: Settings, final: Settings) -> bool:
    """Return whether a difference in this setting has no effect."""
    if name == "target_dim":
        # These heads have no such setting; YAMLs contain a 0.
        return "head_type" in final and final["head_type"].value in ("pretrain", "none")
    if name == "revin_affine" and not actual[name].value:
        # Without RevIN no affine weights are missing.
        return "revin" not in final or not final["revin"].value
    return False


def _supervised_settings(settings: Settings, tensors: Tensors) -> Settings:
    """Return the fixed behaviour of the official supervised program.

    It cuts leftover samples at the end, has a prediction head only, and denormalises its output if
    RevIN is on. It may also repeat the last sample for one stride (`padding_patch`), which shows in
    one additional position.
    """
    values = {name: setting.value for name, setting in settings.items()}
    fixed: JsonObject = {"leftover": "end"}
    if "seq_len" in values and "stride" in values:
        n_patches = (values["seq_len"] - values["patch_len"]) // values["stride"] + 1
        is_padded = len(tensors["backbone.W_pos"]) == n_patches + 1
        fixed["end_padding"] = values["stride"] if is_padded else 0
    if values["revin_affine"]:
        fixed["revin"] = True
    if values.get("head_type") != "none":
        fixed["head_type"] = "prediction"
        fixed["denormalize"] = fixed.get("revin", values.get("revin", False))
    for name in ("revin", "head_type"):
        if name in fixed and name in values and values[name] != fixed[name]:
            raise UserError(
                f"{name} is {values[name]} in the {settings[name].place}, but {fixed[name]} in a "
                "model of the official supervised program, which this seems to be; if it is not, "
                "use --program gpatchtst"
            )
    return {name: Setting(value, "official supervised program") for name, value in fixed.items()}


def _check_complete(settings: Settings, checkpoint: Checkpoint, yaml_file: str) -> None:
    missing = [name for name in REQUIRED if name not in settings]
    if missing:
        listed = ", ".join(spelling(name) for name in missing)
        yaml = f"YAML {yaml_file}".rstrip()
        raise UserError(
            f"neither the {yaml} nor the config in {checkpoint.path.name} contains {listed}; pass "
            f"--{missing[0]} and so on, or add them to a YAML for --config_path"
        )


def _check_sizes(a: Architecture, checkpoint: Checkpoint) -> None:
    n_patches = len(checkpoint.tensors["backbone.W_pos"]) - a.use_cls_token
    # The number of positions is the one size that ties seq_len and stride to the weights.
    if a.seq_len < a.patch_len or a.n_patches != n_patches:
        message = (
            f"seq_len {a.seq_len}, patch_length {a.patch_len} and stride {a.stride} make "
            f"{max(a.n_patches, 0)} patches, but the state dict has positions for {n_patches}"
        )
        if checkpoint.program != "supervised" and a.n_patches + 1 == n_patches:
            message += (
                "; the official supervised program adds one by padding: for its models use "
                "--program supervised"
            )
        raise UserError(message)
    numbers = a.n_vars * max(a.seq_len, n_patches * max(a.d_model, a.d_ff))
    check_size(a.n_layers, a.seq_len, a.n_vars, numbers)
    if a.d_model % a.n_heads:
        raise UserError(f"num_heads {a.n_heads} does not divide d_model {a.d_model}")
