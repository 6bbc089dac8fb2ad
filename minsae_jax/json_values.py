"""Conversion of results to JSON, for the files of evaluation, steering and report."""

import base64
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, no_type_check

import numpy as np

from minsae_jax.estimates import Estimate


@no_type_check  # run-time checks of each number take longer than all else in tests
def to_json(value: Any, rounded: Callable[[float], float] = float) -> Any:
    """Return a value in JSON types: dataclasses as objects, arrays as lists, NaN as null.

    rounded: applied to all finite floats. Infinities are null too, and int8 arrays are their bytes
    in base64. An estimate is two entries, with its interval as NAME_interval.

    >>> from minsae_jax.estimates import Interval
    >>> to_json({"trace": np.array([1, -1], np.int8), "auc": Estimate(0.5, Interval(0.25, 1.0))})
    {'trace': 'Af8=', 'auc': 0.5, 'auc_interval': [0.25, 1.0]}
    """
    # Nearly all values are numbers, and so they are first.
    if isinstance(value, float):
        return rounded(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    match value:
        case dict():
            return _to_object(value, rounded)
        case np.ndarray() if value.dtype == np.int8:
            return base64.b64encode(value.tobytes()).decode()
        case np.ndarray() | np.generic():
            return to_json(value.tolist(), rounded)
        case _:
            return [to_json(item, rounded) for item in value]


@no_type_check
def _to_object(content: dict, rounded: Callable[[float], float]) -> dict[str, Any]:
    converted = {}
    for key, item in content.items():
        if isinstance(item, Estimate):
            converted[str(key)] = to_json(item.value, rounded)
            converted[f"{key}_interval"] = to_json(item.interval, rounded)
        else:
            converted[str(key)] = to_json(item, rounded)
    return converted
