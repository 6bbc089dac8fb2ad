"""Flags made from a settings class, by argparse.

argparse only splits the words and prints the help. The words become plain values, as a YAML file
contains them, and `settings.from_dict` checks both.
"""

import argparse
import contextlib
import dataclasses
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minsae_jax.cli.help_text import texts_with_defaults, topics
from minsae_jax.errors import UserError, brief
from minsae_jax.settings import (
    Settings,
    Values,
    did_you_mean,
    from_dict,
    load_values,
    missing_settings,
    shown,
)


@dataclass(frozen=True)
class Flag:
    """How a setting is given on the command line, next to its type: `Annotated[str, Flag(...)]`.

    positional: by its place instead of a name. bare: the value of a flag that is given without one.
    alias: another name of the flag.
    """

    positional: bool = False
    bare: str | None = None
    alias: str | None = None


@dataclass(frozen=True)
class Argument:
    """A setting on the command line. types: int, float, bool, str or Literal of each value."""

    name: str
    types: list[Any]
    has_many: bool
    flag: Flag

    @property
    def written(self) -> str:
        return self.name.upper() if self.flag.positional else f"--{self.name}"

    @property
    def metavar(self) -> str:
        """Return INT, {a,b} or the like for one value."""
        # A single Literal is a choice in braces; with other types its words are just joined.
        words = []
        for kind in self.types:
            if get_origin(kind) is Literal:
                words.append(",".join(get_args(kind)))
            else:
                words.append({int: "INT", float: "FLOAT", str: "TEXT"}[kind])
        if len(words) == 1 and get_origin(self.types[0]) is Literal:
            return "{" + words[0] + "}"
        return "|".join(words)

    def add_to(self, group: Any, text: str) -> None:
        """Add the argument to a parser's group, with its help."""
        text = text.replace("%", "%%")  # argparse formats the help with %
        names = [self.written]
        if self.flag.alias:
            names.append(f"--{self.flag.alias}")
        if self.flag.positional:
            # Optional for argparse, since `parse` reports all missing settings together.
            nargs = "*" if self.has_many else "?"
            group.add_argument(self.name, nargs=nargs, metavar=self.written, help=text)
        elif self.types == [bool]:
            names.append(f"--no_{self.name}")
            group.add_argument(*names, dest=self.name, nargs=0, action=_Switch, help=text)
        elif self.flag.bare is not None:
            bare = self.flag.bare
            group.add_argument(*names, nargs="?", const=bare, metavar=self.metavar, help=text)
        elif self.has_many:
            group.add_argument(*names, nargs="+", metavar=self.metavar, action=_Values, help=text)
        else:
            group.add_argument(*names, metavar=self.metavar, help=text)

    def read(self, words: Any) -> Any:
        """Return the words that argparse has stored as a plain value or a list of them."""
        if isinstance(words, bool):
            return words
        if isinstance(words, list):
            return [self._read_word(word) for word in words]
        return self._read_word(words)

    def _read_word(self, word: str) -> int | float | str:
        word = re.sub(r"^ (?=-)", "", word)  # see _normalised
        if int in self.types or float in self.types:
            with contextlib.suppress(ValueError):
                return int(word)
            with contextlib.suppress(ValueError):
                return float(word)
        return word


def arguments_of(cls: type) -> list[Argument]:
    """Return the command-line arguments of a settings class."""
    types_of = get_type_hints(cls)
    extras_of = get_type_hints(cls, include_extras=True)
    arguments = []
    for field in dataclasses.fields(cls):
        hint = types_of[field.name]
        has_many = get_origin(hint) is tuple
        extras = getattr(extras_of[field.name], "__metadata__", ())
        flags = [extra for extra in extras if isinstance(extra, Flag)]
        arguments.append(Argument(field.name, _value_types(hint), has_many, *flags or [Flag()]))
    return arguments


def _value_types(hint: Any) -> list[Any]:
    """Return the types of one value: of `tuple[int | Literal["all"], ...]`, int and the Literal."""
    if get_origin(hint) in (tuple, Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _value_types(part)]
    # None and the dots of a tuple are not written on a command line.
    if hint in (type(None), Ellipsis):
        return []
    return [hint]


def parse(
    cls: type[Settings],
    args: Sequence[str],
    prog: str,
    about: str = "",
    sections: Mapping[str, type] | None = None,
    section: str = "",
) -> Settings:
    """Return the settings given by flags over those of a --config file over the defaults.

    sections: the settings class of each section of the --config file; without them the flag does
    not exist. `-` and `_` are the same in the names of flags. Raises UserError on unknown, invalid
    or missing flags; ends the process after --help.
    """
    arguments = {argument.name: argument for argument in arguments_of(cls)}
    # Without help texts, which are parsed from source code and needed for --help only.
    parser = _make_parser(cls, prog, about, bool(sections), dict.fromkeys(arguments, ""))
    namespace, unknown = parser.parse_known_args([_normalised(word) for word in args])
    words = vars(namespace)
    is_help = words.pop("help", False)
    paths = words.pop("config", [])
    if len(paths) > 1:
        raise UserError("--config takes one file")
    from_file: Values = {}
    if sections and paths:
        from_file = load_values(paths[0], sections).get(section, {})
    if is_help:
        texts = texts_with_defaults(cls, from_file, Path(*paths).name)
        print(_make_parser(cls, prog, about, bool(sections), texts).format_help(), end="")
        sys.exit(0)
    if unknown:
        raise UserError(f"{_unknown_argument(unknown[0].strip(), cls)} (see {prog} --help)")
    values = from_file | {name: arguments[name].read(given) for name, given in words.items()}
    missing = [arguments[name].written for name in missing_settings(cls, values)]
    if missing:
        message = f"{prog} requires {' and '.join(missing)}"
        if sections:
            message += f" (as a flag or in section {section} of --config)"
        raise UserError(message)
    try:
        return from_dict(cls, values)
    except UserError as e:
        # The file alone is valid: a flag contradicts it.
        message = str(e)
        named = [name for name in from_file if re.search(rf"--{name}\b", message)]
        not_typed = [name for name in named if name not in words]
        if not_typed:
            message += f" ({paths[0]} sets {' and '.join(not_typed)})"
        raise UserError(message) from None


def _normalised(word: str) -> str:
    """Write --num-steps as --num_steps, and negative numbers so that argparse sees values."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return "--" + name.replace("-", "_") + equals + value
    # Some versions of argparse take -1e-3 for a flag, but not with a space in front.
    return re.sub(r"^(?=-[.\d])", " ", word)


def _unknown_argument(word: str, cls: type) -> str:
    # A second value of a flag that takes one can be a negative number.
    if not word.startswith("-") or re.fullmatch(r"-[.\d].*", word):
        return f"unexpected argument {shown(word)}"
    flag = word.partition("=")[0]
    known = [field.name for field in dataclasses.fields(cls)]
    return f"unknown flag {brief(flag)}{did_you_mean(flag.lstrip('-'), known, prefix='--')}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Raise UserError instead of printing the usage and exiting."""
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Keep numbers such as 5e-5 on one line."""
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Switch(argparse.Action):
    """A setting that is true after `--name` and false after `--no_name`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option).startswith("--no_"))


class _Values(argparse.Action):
    """A setting with several values, of which a second flag replaces the first ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            text = " ".join(values)
            warnings.warn(
                f"{option} is given twice, and only {text} is used; write all values after one",
                stacklevel=2,
            )
        setattr(namespace, self.dest, values)


def _make_parser(
    cls: type, prog: str, about: str, has_config: bool, texts: Mapping[str, str]
) -> _Parser:
    """Return a parser of flags as text, grouped by topic. texts: the help of every setting."""
    # SUPPRESS: flags that are not given are not in the result.
    parser = _Parser(
        prog,
        description=about,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    titles = topics(cls)
    usage = [prog]
    for argument in arguments_of(cls):
        title = titles[argument.name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        argument.add_to(groups[title], texts[argument.name])
        if argument.flag.positional:
            usage.append(argument.written)
    parser.usage = " ".join([*usage, "[flags]"])
    general = parser.add_argument_group("General")
    if has_config:
        text = "YAML file with a section for each verb; flags override it"
        # `append`, so that `parse` sees a second file instead of only the last.
        general.add_argument("--config", metavar="FILE", action="append", help=text)
    general.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    # Only for the help: `process.run` removes this flag before the others are parsed.
    general.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser
