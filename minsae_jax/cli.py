"""Command lines of `minsae_jax` and `convert`: flags from settings classes, one-line errors."""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minsae_jax.errors import Stopped, UserError, brief
from minsae_jax.settings import (
    Settings,
    Values,
    did_you_mean,
    from_dict,
    load_values,
    missing_settings,
)


@dataclass(frozen=True)
class Flag:
    """How a setting is given on the command line, beside its type: `Annotated[str, Flag(...)]`.

    positional: by its place instead of a name. bare: the value of a flag that is given without one.
    """

    positional: bool = False
    bare: str | None = None


@dataclass(frozen=True)
class Verb:
    """A verb of a command line; the docstring of `run` is its help."""

    settings: type
    run: Callable[[Any], None]

    @property
    def help(self) -> str:
        return inspect.getdoc(self.run) or ""


def run(main: Callable[[list[str]], None], args: list[str] | None = None) -> None:
    """Call `main` with the arguments and exit: 0 on success, 2 after an error, 130 on Ctrl-C.

    Errors that a user can fix (UserError, OSError, too little memory) are printed as one line;
    `--debug` adds the traceback. Warnings are one line each.
    """
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # some terminals cannot print λ
    warnings.showwarning = _print_warning
    try:
        main([argument for argument in args if argument != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        message = _user_message(e)
        if debug:
            traceback.print_exc()
        elif message is None:
            raise
        print(f"error: {message or brief(e)}", file=sys.stderr)
        sys.exit(2)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _user_message(error: Exception) -> str | None:
    """Return what to tell a user, or None if the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}"
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's status code
        advice = "try a smaller --batch_size, --feature_dim_factor or sweep"
        return f"out of memory ({brief(error, 150)}); {advice}"
    return None


def call_verb(
    verbs: Mapping[str, Verb], args: list[str], prog: str, about: str, has_config: bool = True
) -> None:
    """Call the verb named by the first argument with its settings.

    has_config: a YAML file with a section for each verb can be given by --config. Raises UserError
    on an unknown verb or invalid flags; ends the process after the verb's --help.
    """
    if not args or args[0] in ("-h", "--help"):
        print(_overview(verbs, prog, about))
        return
    name = args[0]
    if name not in verbs:
        hint = did_you_mean(name, verbs) or f"; choose from {', '.join(verbs)}"
        raise UserError(f"unknown verb {name!r}{hint} (see {prog} --help)")
    verb = verbs[name]
    sections = {each: verbs[each].settings for each in verbs} if has_config else {}
    verb.run(parse(verb.settings, args[1:], f"{prog} {name}", verb.help, sections, name))


def _overview(verbs: Mapping[str, Verb], prog: str, about: str) -> str:
    width = max(map(len, verbs))
    lines = [f"  {name:{width}}  {verb.help.splitlines()[0]}" for name, verb in verbs.items()]
    return "\n".join([f"usage: {prog} VERB [flags]", "", about.strip(), "", "verbs:", *lines])


def parse(
    cls: type[Settings],
    args: Sequence[str],
    prog: str,
    about: str = "",
    sections: Mapping[str, type] | None = None,
    section: str = "",
) -> Settings:
    """Return the settings given by flags over those of a --config file over the defaults.

    sections: the settings class of each section of the --config file; without any there is no such
    flag. `-` and `_` are the same in the names of flags. Raises UserError on unknown, invalid or
    missing flags; ends the process after --help.
    """
    # `run` has taken --debug out already; it is there for the help.
    parser = _make_parser(cls, prog, about, bool(sections), dict.fromkeys(hints_of(cls), ""))
    namespace, unknown = parser.parse_known_args([_normalised(argument) for argument in args])
    flags = vars(namespace)
    wants_help = flags.pop("help", False)
    paths = flags.pop("config", [])
    if len(paths) > 1:
        raise UserError("--config takes one file")
    content = load_values(paths[0], sections) if sections and paths else {}
    from_file = content.get(section, {})
    if wants_help:
        texts = _texts_with_defaults(cls, from_file, Path(*paths).name)
        print(_make_parser(cls, prog, about, bool(sections), texts).format_help(), end="")
        sys.exit(0)
    if unknown:
        raise UserError(_unknown_argument(unknown[0].strip(), cls, prog))
    values = from_file | _read_flags(cls, flags)
    missing = missing_settings(cls, values)
    if missing:
        names = " and ".join(_written(cls, name) for name in missing)
        where = f" (as a flag or in section {section} of --config)" if sections else ""
        raise UserError(f"{prog} requires {names}{where}")
    return from_dict(cls, values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Raise what argparse would print with its usage before exiting."""
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


def _make_parser(
    cls: type, prog: str, about: str, has_config: bool, texts: Mapping[str, str]
) -> _Parser:
    """Return a parser of flags as text, grouped by topic. texts: the help of every setting."""
    parser = _Parser(
        prog,
        description=about,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    hints = hints_of(cls)
    groups: dict[str, Any] = {}
    positionals = ""
    for name, title in topics(cls).items():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = [f"--{name}"]
        options = _argument(hints[name])
        if _flag_of(hints[name]).positional:
            names = [name]
            options = {"nargs": "?", "metavar": name.upper()}
            positionals += f" {name.upper()}"
        elif options.get("action") is _Switch:
            names.append(f"--no_{name}")
        groups[title].add_argument(*names, help=texts[name].replace("%", "%%"), **options)
    parser.usage = f"{prog}{positionals} [flags]"
    general = parser.add_argument_group("general")
    if has_config:
        text = "YAML file with a section for each verb; flags override it"
        general.add_argument("--config", metavar="FILE", action="append", help=text)
    general.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    general.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def hints_of(cls: type) -> dict[str, Any]:
    """Return the type of every setting, with its Range and Flag."""
    return get_type_hints(cls, include_extras=True)


def _argument(hint: Any) -> dict[str, Any]:
    """Return argparse's options for a setting of this type. Types are checked by `from_dict`."""
    kind = _plain_type(hint)
    bare = _flag_of(hint).bare
    if kind is bool:
        return {"action": _Switch, "nargs": 0}
    if bare is not None:
        return {"nargs": "?", "const": bare, "metavar": _metavar(kind)}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": _metavar(get_args(kind)[0])}
    return {"metavar": _metavar(kind)}


def _flag_of(hint: Any) -> Flag:
    extras = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Flag)]
    return extras[0] if extras else Flag()


def _plain_type(hint: Any) -> Any:
    """Return the type without Annotated and None."""
    if hasattr(hint, "__metadata__"):
        return _plain_type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        if len(parts) == 1:
            return _plain_type(parts[0])
    return hint


def _metavar(kind: Any) -> str:
    kind = _plain_type(kind)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(_metavar(part).strip("{}") for part in get_args(kind))
    return {int: "INT", float: "FLOAT", str: "TEXT"}[kind]


def _normalised(argument: str) -> str:
    """Write `--num-steps` as `--num_steps`, and ` -1e-3` so that argparse takes it as a value."""
    if argument.startswith("--"):
        name, equals, value = argument[2:].partition("=")
        return "--" + name.replace("-", "_") + equals + value
    return f" {argument}" if re.match(r"-[.\d]", argument) else argument


def _read_flags(cls: type, flags: Values) -> Values:
    """Return the words of each flag as plain values, as a YAML file would give them."""
    hints = hints_of(cls)
    values: Values = {}
    for name, words in flags.items():
        kind = _plain_type(hints[name])
        if isinstance(words, bool):
            values[name] = words
        elif isinstance(words, list):
            values[name] = [_read_word(word, get_args(kind)[0]) for word in words]
        else:
            values[name] = _read_word(words, kind)
    return values


def _read_word(word: str, kind: Any) -> int | float | str:
    """Return a number if the type allows one and the word is one, else the word."""
    word = word[1:] if word.startswith(" -") else word
    kind = _plain_type(kind)
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if int in kinds or float in kinds:
        with contextlib.suppress(ValueError):
            return int(word)
        with contextlib.suppress(ValueError):
            return float(word)
    return word


def _unknown_argument(argument: str, cls: type, prog: str) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r} (see {prog} --help)"
    name = argument.partition("=")[0]
    flags = [f"--{field.name}" for field in dataclasses.fields(cls)]
    return f"unknown flag {name}{did_you_mean(name, flags)} (see {prog} --help)"


def _written(cls: type, name: str) -> str:
    return name.upper() if _flag_of(hints_of(cls)[name]).positional else f"--{name}"


def topics(cls: type) -> dict[str, str]:
    """Return the topic of every setting: the docstring of the base class that defines it."""
    titles = {}
    for field in dataclasses.fields(cls):
        owners = [c for c in cls.__mro__ if field.name in inspect.get_annotations(c)]
        title = "settings" if owners[-1] is cls else inspect.getdoc(owners[-1]) or "settings"
        titles[field.name] = title.splitlines()[0].rstrip(".")
    return titles


def help_texts(cls: type) -> dict[str, str]:
    """Return the help of every setting: the string below it in its class."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            texts |= _strings_below_fields(owner)
    return {field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}


def _strings_below_fields(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    statements = definition.body if isinstance(definition, ast.ClassDef) else []
    texts = {}
    for field, below in pairwise(statements):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _texts_with_defaults(cls: type, from_file: Values, file_name: str) -> dict[str, str]:
    """Return the help of every setting, with the one value that it has without its flag."""
    texts = help_texts(cls)
    for field in dataclasses.fields(cls):
        text = texts[field.name] = texts[field.name].removesuffix(".")
        if field.name in from_file:
            text = re.sub(r"\s*\(default: [^()]*\)", "", text)
            texts[field.name] = f"{text} ({file_name}: {_shown_default(from_file[field.name])})"
        elif field.default is dataclasses.MISSING:
            texts[field.name] = f"{text} (required)"
        elif "(default: " not in text and field.default not in (None, ()):
            texts[field.name] = f"{text} (default: {_shown_default(field.default)})"
    return texts


def _shown_default(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown_default, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
