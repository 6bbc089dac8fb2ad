"""Checks of types at run time: without jaxtyping's wrapper where there is no shape to compare.

The import hook of jaxtyping wraps every function. A call of the wrapper binds arguments to the
signature and checks them twice, which takes 15 µs, and short functions are called a million times.
Only functions with annotated arrays have use for it; others are left to beartype alone, which
checks the same in 1 µs.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

with_shapes = jaxtyping.jaxtyped
# The same error, a TypeError, which readers of damaged files report as such.
without_shapes = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install() -> None:
    """Replace the decorator that the hook adds; must come before the package is imported."""
    jaxtyping.jaxtyped = decorate


def decorate(fn: Any = None, *, typechecker: Callable) -> Any:
    """Return what the hook decorates with its checks added."""
    if fn is None:
        return partial(decorate, typechecker=typechecker)
    if inspect.isfunction(fn) and not _may_have_shapes(fn):
        return without_shapes(fn)
    return with_shapes(fn, typechecker=typechecker)


def _may_have_shapes(fn: Callable) -> bool:
    """Return whether an annotation contains a type of jaxtyping, or a name not known here."""
    try:
        hints = get_type_hints(fn)
    except Exception:  # names that are imported for type checkers only
        return True
    return any(_has_shape(hint) for hint in hints.values())


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list):  # arguments of a Callable
        return any(_has_shape(each) for each in hint)
    if inspect.isclass(hint) and hint.__module__.startswith("jaxtyping"):
        return True
    return any(_has_shape(each) for each in get_args(hint))
