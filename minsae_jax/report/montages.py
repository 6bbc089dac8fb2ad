"""The longitudinal bipolar montage of EEG readers, as pairs of a data set's channels."""

from collections.abc import Sequence
from itertools import pairwise

from minsae_jax.eeg.montage import canonical

# The "double banana": chains from front to back, from the left temple to the right one.
MIDLINE = ("FZ", "CZ", "PZ")
CHAINS = (
    ("FP1", "F7", "T7", "P7", "O1"),
    ("FP1", "F3", "C3", "P3", "O1"),
    MIDLINE,
    ("FP2", "F4", "C4", "P4", "O2"),
    ("FP2", "F8", "T8", "P8", "O2"),
)

Chain = list[tuple[int, int]]


def bipolar_chains(channels: Sequence[str]) -> list[Chain]:
    """Return the chains of the longitudinal bipolar montage as pairs (column, next column).

    The midline is left out if one of its channels is missing; there are no chains if another
    channel is.

    >>> bipolar_chains(["Fp1", "F3", "C3", "P3", "O1"])
    []
    """
    column = {canonical(name): i for i, name in enumerate(channels)}
    chains = []
    for names in CHAINS:
        if all(name in column for name in names):
            chains.append(list(pairwise([column[name] for name in names])))
        elif names is not MIDLINE:
            return []
    return chains
