"""Conversion of results to JSON, for the files of evaluation, steering and report."""

import base64
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, no_type_check

import numpy as np


@no_type_check  # run-time checks of each number take longer than all else in tests
def to_json(value: Any, rounded: Callable[[float], float] = float) -> Any:
    """Return a value in JSON types: dataclasses as objects, arrays as lists, NaN as null.

    rounded: applied to all finite floats. Infinities are null too, and int8 arrays are their bytes
    in base64.

    >>> to_json({"trace": np.array([1, -1], np.int8), "interval": (0.25, np.nan)})
    {'trace': 'Af8=', 'interval': [0.25, None]}
    """
    # Nearly all values are numbers, and so they are first.
    if isinstance(value, float):
        return rounded(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name), rounded) for field in fields(value)}
    match value:
        case dict():
            return {str(key): to_json(item, rounded) for key, item in value.items()}
        case np.ndarray() if value.dtype == np.int8:
            return base64.b64encode(value.tobytes()).decode()
        case np.ndarray() | np.generic():
            return to_json(value.tolist(), rounded)
        case _:
            return [to_json(item, rounded) for item in value]
