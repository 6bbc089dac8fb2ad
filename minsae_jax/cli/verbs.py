"""Verbs of a command line, each with its settings class and function."""

import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minsae_jax.cli.flags import parse
from minsae_jax.errors import UserError
from minsae_jax.settings import did_you_mean, shown


@dataclass(frozen=True)
class Verb:
    """A verb of a command line; the docstring of `run` is its help."""

    settings: type
    run: Callable[[Any], None]

    @property
    def help(self) -> str:
        return inspect.getdoc(self.run) or ""


def parse_verb(
    verbs: Mapping[str, Verb], args: list[str], prog: str, about: str, has_config: bool = True
) -> tuple[Callable[[Any], None], Any]:
    """Return the function of the verb named by the first argument, and its settings.

    has_config: a YAML file with a section for each verb can be given by --config. Raises UserError
    on an unknown verb or invalid flags; ends the process after --help.
    """
    if not args or args[0] in ("-h", "--help"):
        print(_overview(verbs, prog, about))
        sys.exit(0)
    name = args[0]
    if name not in verbs:
        hint = did_you_mean(name, verbs) or f"; choose from {', '.join(verbs)}"
        raise UserError(f"unknown verb {shown(name)}{hint} (see {prog} --help)")
    verb = verbs[name]
    sections: dict[str, type] = {}
    if has_config:
        sections = {each: verbs[each].settings for each in verbs}
    settings: Any = parse(verb.settings, args[1:], f"{prog} {name}", verb.help, sections, name)
    return verb.run, settings


def _overview(verbs: Mapping[str, Verb], prog: str, about: str) -> str:
    width = max(map(len, verbs))
    columns = shutil.get_terminal_size().columns - 2  # as argparse does
    lines = []
    for name, verb in verbs.items():
        text = f"  {name:{width}}  {verb.help.splitlines()[0]}"
        lines.append(textwrap.fill(text, columns, subsequent_indent=" " * (width + 4)))
    return "\n".join([f"usage: {prog} VERB [flags]", "", about.strip(), "", "verbs:", *lines])
