"""What the command lines of `minsae_jax` and `convert` share: flags from a dataclass, and errors in one sentence."""

import contextlib
import inspect
import io
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from minsae_jax.errors import Stopped, UserError, brief

Settings = TypeVar("Settings")


_registry = ConstructorRegistry()


@_registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A number, text or choice that may also be left out: shown and read like one that may not."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (Union, types.UnionType) or len(kinds) != 1:
        return None
    kind = kinds[0]
    is_choice = get_origin(kind) is Literal
    if not is_choice and kind not in (int, float, str):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(get_args(kind)) + "}"
        if is_choice
        else "TEXT"
        if kind is str
        else kind.__name__.upper(),
        choices=get_args(kind) if is_choice else None,
        instance_from_str=lambda words: words[0] if is_choice else kind(words[0]),
        is_instance=lambda value: (
            value is None or (value in get_args(kind) if is_choice else isinstance(value, kind))
        ),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def parse(
    cls: type[Settings], args: list[str], prog: str, default: Settings | None = None, also: str = ""
) -> Settings:
    """The dataclass filled from flags; raises UserError on flags that do not fit, ends the process after --help, which
    shows `also` below the class's docstring."""
    stderr = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    about = f"{inspect.getdoc(cls)}\n{also}".strip()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                cls,
                args=args,
                prog=prog,
                use_underscores=True,
                default=start,
                description=about,
                registry=_registry,
            )
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(f"{_sentence(stderr.getvalue())}; see {prog} --help") from None


def _sentence(box: str) -> str:
    """The first paragraph in the box that tyro draws around an error, and the flag that it suggests."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]  # the first is a title
    paragraphs = [" ".join(group) for is_rule, group in groupby(lines, key=_is_rule) if not is_rule]
    problem = paragraphs[0].partition("  Got errors:")[0].strip().rstrip(".")
    suggestion = re.search(r"Perhaps you meant: .*?(--\w+)", " ".join(lines))
    return problem + (f" (did you mean {suggestion[1]}?)" if suggestion else "")


def _is_rule(line: str) -> bool:
    return re.search("[─-]{8}", line) is not None


def run(main: Callable[[list[str]], None], args: list[str] | None = None) -> None:
    """Call main and end the process with 0, with 2 after one sentence for what a user can put right (the disk's state
    too), or with 130 when interrupted. `--debug` shows the traceback; warnings are a line each."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a λ on a terminal without it is no reason to stop
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main([a for a in args if a != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as e:
        if "--debug" in args:
            traceback.print_exc()
        place = f": {e.filename}" if isinstance(e, OSError) and e.filename else ""
        print(
            f"error: {e.strerror or e}{place}" if isinstance(e, OSError) else f"error: {e}",
            file=sys.stderr,
        )
        sys.exit(2)
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e) or "--debug" in args:
            raise
        print(
            f"error: out of memory ({brief(e, 150)}): try a smaller --batch_size, "
            "--feature_dim_factor or sweep",
            file=sys.stderr,
        )
        sys.exit(2)
