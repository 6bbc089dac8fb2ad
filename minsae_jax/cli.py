"""What the command lines of `minsae_jax` and `convert` share: flags from a dataclass, and errors in one sentence."""

import contextlib
import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import TypeVar

import tyro

from minsae_jax.config import UserError

Settings = TypeVar("Settings")


def parse(cls: type[Settings], args: list[str], prog: str, default: Settings | None = None) -> Settings:
    """The dataclass filled from flags; raises UserError on flags that do not fit, ends the process after --help."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            missing = tyro.MISSING_NONPROP if default is None else default
            return tyro.cli(cls, args=args, prog=prog, use_underscores=True, default=missing)
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
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main([a for a in args if a != "--debug"])
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as e:
        if "--debug" in args:
            traceback.print_exc()
        place = f": {e.filename}" if isinstance(e, OSError) and e.filename else ""
        print(f"error: {e.strerror or e}{place}" if isinstance(e, OSError) else f"error: {e}", file=sys.stderr)
        sys.exit(2)
