"""Settings dataclasses and the strict YAML that they can be read from.

A file given by `--config` has one section for each verb, whose keys are the flags:

    extract:
      root_path: tuhab_preprocessed
    train:
      lambda_sparsity: [2, 5, 10]
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from minsae_jax.errors import UserError, brief

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Range:
    """Allowed values of a setting, beside its type: `lr: Annotated[float, Range(above=0)]`.

    For a setting with several values the range applies to each of them; None is always allowed.
    """

    min: int | float = -math.inf
    max: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf

    def contains(self, value: int | float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        limits = {
            "at least": (self.min, -math.inf),
            "above": (self.above, -math.inf),
            "at most": (self.max, math.inf),
            "below": (self.below, math.inf),
        }
        words = [f"{word} {limit:g}" for word, (limit, unset) in limits.items() if limit != unset]
        return " and ".join(words) or "finite"


FLOAT32_LIMIT = 1e38  # just below the largest float32
Positive = Range(above=0, below=FLOAT32_LIMIT)
NonNegative = Range(min=0, below=FLOAT32_LIMIT)
AtLeastOne = Range(min=1, below=FLOAT32_LIMIT)
Share = Range(min=0, max=1)
Seed = Range(min=0, max=2**32 - 1)


def check_ranges(settings: Any) -> None:
    """Raise UserError naming the first setting whose value is out of its Range."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        for allowed in ranges:
            for v in values:
                require(v is None or allowed.contains(v), f"--{name} must be {allowed}, got {v}")


def check_no_duplicates(settings: Any, *names: str) -> None:
    """Raise UserError if a setting with several values contains one of them twice."""
    for name in names:
        values = getattr(settings, name)
        is_unique = len(set(values)) == len(values)
        require(is_unique, f"--{name} contains duplicate values: {' '.join(map(str, values))}")


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


LARGEST = 1e38  # float32 ends a little above


def require_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(
            value is None or 0 < value < LARGEST,
            f"--{name} must be above 0 and finite, but is {value}",
        )


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.2), and refuses a key given twice, and mappings without end, as a
    few lines of merge keys can make."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 10_000:
            raise yaml.constructor.ConstructorError(
                problem="too large a mapping", problem_mark=node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in keys if isinstance(key, str) and keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"key {twice[0]!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where there is none."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as e:  # PyYAML's constructors raise all kinds on values that are none
        raise UserError(f"{path} cannot be read as YAML: {brief(e, 300)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no YAML mapping")
    return content


def load_sections(path: str | Path, sections: Mapping[str, type]) -> dict[str, Any]:
    """Read the settings of every section of a YAML file. Raises UserError on unknown sections, keys or values."""
    content = read_yaml(path)
    _refuse_unknown(content, list(sections), f"{path}: unknown section")
    settings: dict[str, Any] = {}
    for name, section in content.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: section {name} must hold settings, but is {section!r}")
        try:
            settings[name] = from_dict(sections[name], section)
        except UserError as e:
            raise UserError(f"{path}: {e}, in section {name}") from None
    return settings


def from_dict(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """A settings dataclass from plain values of exactly the right types (a whole number passes as a float)."""
    hints = get_type_hints(cls)
    _refuse_unknown(values, list(hints), "unknown key")
    return cls(**{name: _coerce(value, hints[name], name) for name, value in values.items()})


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values that `from_dict` and YAML take."""
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()
    }


def _refuse_unknown(given: dict[str, Any], known: list[str], what: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(f"{what} {key!r}, did you mean {close[0]!r}?")


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fits = next((a for a in kinds if type(value) is a or value in get_args(a)), kinds[0])
        return _coerce(value, fits, name)
    if origin is tuple:
        return tuple(
            _coerce(v, args[0], name) for v in (value if isinstance(value, list) else [value])
        )
    if origin is Literal:
        if value in args and type(value) is type(args[0]):
            return value
        raise UserError(f"{name} must be one of {', '.join(map(str, args))}, but is {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{name} must be {words[hint]}, but is {value!r}")
    return value
