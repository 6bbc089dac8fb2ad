"""Texts of --help that come from a settings class: topics, explanations and defaults."""

import ast
import dataclasses
import inspect
import re
import textwrap
from itertools import pairwise
from typing import Any

from minsae_jax.settings import Values


def topics(cls: type) -> dict[str, str]:
    """Return the topic of every setting: `heading` of the base class that defines it."""
    titles = {}
    for field in dataclasses.fields(cls):
        # The last class in the order of method resolution, since others may change the default.
        owner = [c for c in cls.__mro__ if field.name in inspect.get_annotations(c)][-1]
        titles[field.name] = vars(owner).get("heading", "Settings")
    return titles


def help_texts(cls: type) -> dict[str, str]:
    """Return the help of every setting: the string below it in its class."""
    texts: dict[str, str] = {}
    # Subclasses last: their texts replace those of their bases.
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            texts |= _strings_below_fields(owner)
    return {field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}


def _strings_below_fields(cls: type) -> dict[str, str]:
    # Python drops these strings, so they are read from the source.
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in pairwise(definition.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def texts_with_defaults(cls: type, from_file: Values, file_name: str) -> dict[str, str]:
    """Return the help of every setting with its value if no flag is given.

    from_file: values of the --config file. A default that depends on other settings is part of the
    text: "(default: …)".
    """
    help_of = help_texts(cls)
    texts = {}
    for field in dataclasses.fields(cls):
        text = help_of[field.name].removesuffix(".")
        if field.name in from_file:
            text = re.sub(r"\s*\(default: [^()]*\)", "", text)
            text += f" ({file_name}: {_shown(from_file[field.name])})"
        elif field.default is dataclasses.MISSING:
            text += " (required)"
        elif "(default: " not in text and field.default not in (None, ()):
            text += f" (default: {_shown(field.default)})"
        texts[field.name] = text
    return texts


def _shown(value: Any) -> str:
    """Write a value as it is given in a flag or in YAML."""
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if " " in str(value):
        return f'"{value}"'
    return str(value)
