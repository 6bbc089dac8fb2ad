"""Settings of a PatchTST as YAMLs, flags and checkpoints state them, by field of `Architecture`.

Programs spell the same setting differently, nest it in sections, and write numbers as text. Here
every stated value becomes a `Setting`: a checked value and the source that stated it.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minsae_jax.encoder.patchtst.architecture import Architecture
from minsae_jax.errors import UserError
from minsae_jax.settings import shown

# Field of Architecture -> its spellings in gPatchTST's YAML, its code, and the official programs.
SPELLINGS = {
    "patch_len": ("patch_length", "patch_len"),
    "n_layers": ("num_layers", "n_layers", "e_layers"),
    "n_heads": ("num_heads", "n_heads"),
    "n_vars": ("n_vars", "num_variates", "enc_in", "c_in"),
    "activation": ("activation", "act"),
    "revin_affine": ("revin_affine", "affine"),
    "individual_head": ("individual_head", "individual"),
}
FIELD_TYPES = get_type_hints(Architecture)
REQUIRED = [field.name for field in fields(Architecture) if field.default is MISSING]


@dataclass(frozen=True)
class Setting:
    """A value and the source that it came from, such as "flags", "YAML" or "state dict"."""

    value: Any
    source: str
    file: str = ""  # of a YAML

    @property
    def place(self) -> str:
        """Return the source as messages name it."""
        return f"{self.source} {self.file}".rstrip()


Settings = dict[str, Setting]  # by field of Architecture


def spelling(name: str) -> str:
    """Return gPatchTST's name of a field.

    >>> spelling("n_layers"), spelling("stride")
    ('num_layers', 'stride')
    """
    return SPELLINGS.get(name, (name,))[0]


def read_settings(mapping: Mapping[str, Any], source: str, file: str = "") -> Settings:
    """Return the known settings in the sections `model` and `data`, or at the top level.

    Unknown keys are ignored, since a YAML also configures training. file: the YAML, for messages.
    Raises UserError if a value has the wrong type or range.
    """
    candidates = (mapping.get("model"), mapping.get("data"), mapping)
    sections = [section for section in candidates if isinstance(section, Mapping)]
    settings = {}
    for name in REQUIRED:
        value = _first_value(sections, SPELLINGS.get(name, (name,)))
        if value is not None:
            settings[name] = parse_setting(name, value, source, file)
    subtract_last = _first_value(sections, ("subtract_last",))
    if subtract_last is not None:
        is_on = _parse_bool(subtract_last)
        if is_on is None:
            where = f" in {file}" if file else ""
            raise UserError(
                f"subtract_last{where} must be true or false, got {shown(subtract_last)}"
            )
        settings["scaler"] = Setting("last_sd" if is_on else "mean_sd", source, file)
    return settings


def _first_value(sections: list[Mapping[str, Any]], names: tuple[str, ...]) -> Any:
    """Return the first value that is not None; the sections precede one another in their order."""
    for section in sections:
        for name in names:
            if section.get(name) is not None:
                return section[name]
    return None


def parse_setting(name: str, value: object, source: str, file: str = "") -> Setting:
    """Return a setting whose value has the type of its field. Raises UserError if it cannot."""
    field_type = FIELD_TYPES[name]
    parsed: str | bool | int | float | None
    if get_origin(field_type) is Literal:
        parsed = _parse_choice(value, get_args(field_type))
        expected = " or ".join(get_args(field_type))
    elif field_type is bool:
        parsed = _parse_bool(value)
        expected = "true or false"
    elif field_type is int:
        parsed = _parse_int(value, smallest=0 if name == "target_dim" else 1)
        expected = "a whole number above 0 and below 2^31"
    else:
        parsed = _parse_float(value)
        expected = "a number above 0"
    setting = Setting(parsed, source, file)
    if parsed is None:
        raise UserError(
            f"{spelling(name)} must be {expected}, but the {setting.place} contains {shown(value)}"
        )
    return setting


def _parse_choice(value: object, choices: tuple[str, ...]) -> str | None:
    if not isinstance(value, str):
        return None
    for choice in choices:
        if choice.lower() == value.lower():
            return choice
    return None


def _parse_bool(value: object) -> bool | None:
    # The official programs have flags 0 and 1.
    if type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    return None


def _parse_int(value: object, smallest: int) -> int | None:
    if type(value) is int and smallest <= value < 2**31:
        return value
    return None


def _parse_float(value: object) -> float | None:
    # PyYAML reads 1e-5 as text, and a checkpoint's config may contain such text.
    if type(value) not in (int, float, str):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None
    if 1e-30 <= number < math.inf:
        return number
    return None
