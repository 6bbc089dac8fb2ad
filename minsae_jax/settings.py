"""Settings dataclasses, and strict reading of YAML files.

A file given by `--config` has one section for each verb, whose keys are the flags:

    extract:
      root_path: tuhab_preprocessed
    train:
      lambda_sparsity: [2, 5, 10]
"""

import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from minsae_jax.errors import UserError, brief
from minsae_jax.files import regular_file
from minsae_jax.strict_yaml import load_yaml

Settings = TypeVar("Settings")
JsonObject = dict[str, Any]  # content of a JSON file: any keys and values
Values = dict[str, Any]  # settings as YAML has them: name -> number, text, bool, None or list

FLOAT32_LIMIT = 1e38  # just below the largest float32
MAX_SHOWN = 80  # characters of a value in a message
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
MAX_YAML_BYTES = 50_000  # PyYAML reads some texts at 50 kB per second

# Names in papers and other programs, and what the settings are called here.
NAMES_ELSEWHERE = {
    "d_sae": "feature_dim_factor",
    "expansion_factor": "feature_dim_factor",
    "l1_coefficient": "lambda_sparsity",
    "l0": "target_l0",
    "learning_rate": "lr",
    "steps": "num_steps",
    "dtype": "precision",
    "data": "root_path",
}


@dataclass(frozen=True)
class Range:
    """Allowed values of a setting, next to its type: `lr: Annotated[float, Range(above=0)]`.

    For a setting with several values the range applies to each. None is always allowed; infinity
    and NaN never are.
    """

    min: int | float = -math.inf
    max: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf

    def contains(self, value: int | float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        """Return the limits in words.

        >>> str(Range(min=0, below=1))
        'at least 0 and below 1'
        """
        limits = {
            "at least": self.min,
            "above": self.above,
            "at most": self.max,
            "below": self.below,
        }
        words = [f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit)]
        return " and ".join(words) or "finite"


Positive = Range(above=0)
NonNegative = Range(min=0)
AtLeastOne = Range(min=1)
UnitInterval = Range(min=0, max=1)
Seed = Range(min=0, max=2**32 - 1)


def check_settings(settings: Any) -> None:
    """Convert the values of new settings to their types, and check their ranges.

    From Python, values can be numbers and arrays of NumPy, paths, lists and ranges. Raises
    UserError naming the first setting with a value of another type or out of its Range. A single
    value is refused where there can be several: with `split="train"`, each letter would be read as
    a split.
    """
    hints = get_type_hints(type(settings))
    annotated = get_type_hints(type(settings), include_extras=True)
    for name in [field.name for field in dataclasses.fields(settings)]:
        values = _plain(getattr(settings, name))
        # `_coerce` would take it, as in YAML and on the command line.
        is_single = get_origin(hints[name]) is tuple and isinstance(values, str | int | float)
        require(not is_single, f"{name} must be a tuple such as ({values!r},), got {values!r}")
        values = _coerce(values, hints[name], name)
        object.__setattr__(settings, name, values)  # the class is frozen
        if not isinstance(values, tuple):
            values = (values,)
        numbers = [value for value in values if isinstance(value, int | float)]
        for allowed in _ranges(annotated[name]):
            for number in numbers:
                require(abs(number) < FLOAT32_LIMIT, f"--{name} must be finite, got {number}")
                require(allowed.contains(number), f"--{name} must be {allowed}, got {number}")


def _plain(value: Any) -> Any:
    """Return a value as YAML has it: numbers of Python, text instead of paths, and lists."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | range):
        return [_plain(each) for each in value]
    return value


def _ranges(hint: Any) -> list[Range]:
    """Return the ranges anywhere in a type hint, as in `Annotated[int, AtLeastOne] | None`."""
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    for part in get_args(hint):
        ranges += _ranges(part)
    return ranges


def check_no_duplicates(settings: Any, *names: str) -> None:
    """Raise UserError if a setting with several values contains one of them twice."""
    for name in names:
        values = getattr(settings, name)
        is_unique = len(set(values)) == len(values)
        require(is_unique, f"--{name} contains duplicate values: {' '.join(map(str, values))}")


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition is true."""
    if not condition:
        raise UserError(message)


def read_yaml(path: str | Path) -> Values:
    """Return the mapping in a YAML file. Raises UserError if there is none."""
    try:
        n_bytes = regular_file(path).stat().st_size
    except FileNotFoundError:
        raise UserError(f"file {path} does not exist") from None
    require(
        n_bytes <= MAX_YAML_BYTES, f"{path} is too large for a YAML of settings: {n_bytes:,} bytes"
    )
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except Exception as e:  # PyYAML's constructors raise all kinds of errors on invalid values
        raise UserError(f"{path} is not valid YAML: {brief(e, 300)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a YAML mapping")
    return content


def read_json(path: Path) -> JsonObject:
    """Return the mapping in a JSON file. Raises UserError if there is none."""
    try:
        content = json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON ({brief(e, 150)})") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON mapping")
    return content


def load_values(path: str | Path, sections: Mapping[str, type]) -> dict[str, Values]:
    """Return the values in every section of a YAML file.

    Raises UserError on unknown sections, unknown keys and invalid values in any section. Required
    settings may be missing, since flags can add them.
    """
    content = read_yaml(path)
    _refuse_unknown(content, sections, f"{path}: unknown section")
    for name, section in content.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: section {name} must contain settings, got {shown(section)}")
        try:
            typed = _typed(sections[name], section)
            if not missing_settings(sections[name], section):
                # Creating the settings runs the checks in __post_init__.
                sections[name](**typed)
        except UserError as e:
            raise UserError(f"{path}, section {name}: {e}") from None
    return content


def from_dict(cls: type[Settings], values: Values) -> Settings:
    """Return a settings dataclass made from plain values.

    Raises UserError on unknown or missing settings and on values of another type; whole numbers
    such as 5 and 1e4 are valid as int and float alike.
    """
    typed = _typed(cls, values)
    missing = missing_settings(cls, values)
    require(not missing, f"missing settings: {', '.join(missing)}")
    return cls(**typed)


def to_dict(settings: Any) -> Values:
    """Return plain values that `from_dict` and YAML take."""
    values = dataclasses.asdict(settings)
    for name, value in values.items():
        if isinstance(value, tuple):
            values[name] = list(value)
    return values


def missing_settings(cls: type, values: Values) -> list[str]:
    """Return the names of the required fields of `cls` that have no value."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def did_you_mean(word: object, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint at the most similar known word, or "" if no known word is similar.

    A known word is also similar if it only continues, or if it is our name for what papers or
    other programs name `word`. prefix: of the word in the hint.

    >>> did_you_mean("lamda", ["lr", "lambda_sparsity"])
    "; did you mean 'lambda_sparsity'?"
    """
    if not isinstance(word, str):
        return ""
    known = list(known)
    if NAMES_ELSEWHERE.get(word) in known:
        word = NAMES_ELSEWHERE[word]
    word = word[:50]  # the time grows with the square of the length

    def similarity(candidate: str) -> float:
        # `lambda` is far from `lambda_sparsity` as a whole, but equal to its beginning.
        beginning = candidate[: len(word) + 1]
        return max(difflib.SequenceMatcher(None, word, c).ratio() for c in (candidate, beginning))

    best = max(known, key=similarity, default="")
    # 0.6 is also the cutoff of difflib.get_close_matches.
    if not best or similarity(best) < 0.6:
        return ""
    return f"; did you mean {prefix + best!r}?"


def shown(value: Any) -> str:
    """Return a value from a file or flag for a message, at most MAX_SHOWN characters long."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = 60
    try:
        text = short.repr(value)
    except Exception:  # an integer of over 4,300 digits, a hostile __repr__
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _refuse_unknown(values: Values, known: Iterable[str], what: str) -> None:
    names = list(known)
    for key in values:
        if key not in names:
            raise UserError(f"{what} {shown(key)}{did_you_mean(key, names)}")


def _typed(cls: type, values: Values) -> Values:
    hints = get_type_hints(cls)
    _refuse_unknown(values, hints, "unknown key")
    return {name: _coerce(value, hints[name], name) for name, value in values.items()}


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type `hint`. Raises UserError naming the setting if it is another.

    hint: int, float, bool, str, a Literal of words, alternatives of these such as
    `float | Literal["auto"]`, a tuple of one of these, or also None.
    """
    options = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        options = list(get_args(hint))
    if types.NoneType in options and value is None:
        return None
    options = [option for option in options if option is not types.NoneType]
    if get_origin(options[0]) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        of_one = get_args(options[0])[0]
        for each in values:
            is_text = of_one is str or not isinstance(each, str)
            if not is_text and re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", each):
                numbers = each.split(",")
                raise UserError(
                    f"values of {name} must be separated by spaces ({' '.join(numbers)}) or, in "
                    f"YAML, be a list ([{', '.join(numbers)}]), got {shown(each)}"
                )
        return tuple(_coerce(each, of_one, name) for each in values)
    expected = []
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            words += get_args(option)
            # No subclass of str, such as an enumeration, which YAML cannot write.
            if type(value) is str and value in words:
                return value
            continue
        # `type` instead of isinstance, for which true is an int.
        if option is float and type(value) is int and abs(value) < FLOAT32_LIMIT:
            return float(value)
        if option is int and type(value) is float and value.is_integer():
            return int(value)
        if type(value) is option:
            if option is str and not _can_be_path(value):
                raise UserError(f"{name} contains characters that no path can have: {shown(value)}")
            return value
        expected.append(TYPE_NAMES[option])
    choice = " or ".join([*expected, *words]) if expected else f"one of {', '.join(words)}"
    raise UserError(f"{name} must be {choice}, got {shown(value)}{did_you_mean(value, words)}")


def _can_be_path(text: str) -> bool:
    """Return whether the system takes a text: YAML can contain NUL and half of a character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
