"""Rows of zeros at the end of batches, so that many lengths share few compiled programs."""

import numpy as np
from jaxtyping import Shaped


def pad_rows(x: Shaped[np.ndarray, "rows ..."], n_rows: int) -> Shaped[np.ndarray, "n_rows ..."]:
    """Return x with zeros after its last row; x itself if it has n_rows already."""
    if len(x) == n_rows:
        return x
    zeros = np.zeros((n_rows - len(x), *x.shape[1:]), x.dtype)
    return np.concatenate([x, zeros])


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n.

    >>> [power_of_two(n) for n in (0, 1, 5, 8)]
    [1, 1, 8, 8]
    """
    return 1 << max(n - 1, 0).bit_length()
