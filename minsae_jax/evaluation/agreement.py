"""Agreement between seeds: how many features are found again from other initial weights."""

from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
from jaxtyping import Bool, Float

from minsae_jax.evaluation.inputs import Member

MIN_COSINE = 0.9
BLOCK_ROWS = 1024  # features compared with all others at a time


def seed_agreement(
    members: Sequence[Member], is_live: Mapping[str, Bool[np.ndarray, " d_sae"]]
) -> dict[str, float]:
    """Return the agreement of each member with those that differ from it in the seed only.

    It is the share of live features whose decoder direction has a cosine above 0.9 with that of a
    live feature of another seed, averaged over ordered pairs of seeds, and so the same for all
    members of a setting. Members without such a partner are left out, and so are all members of a
    setting where one has no live feature. is_live: by member's name.
    """
    by_setting: dict[tuple, list[Member]] = {}
    for member in members:
        setting = tuple(item for item in member.hyper.items() if item[0] != "seed")
        by_setting.setdefault(setting, []).append(member)
    agreement = {}
    for seeds in by_setting.values():
        directions = [member.sae.unit_directions[is_live[member.name]] for member in seeds]
        if len(seeds) < 2 or not all(map(len, directions)):
            continue
        shares = [matched_share(a, b) for a, b in permutations(directions, 2)]
        for member in seeds:
            agreement[member.name] = float(np.mean(shares))
    return agreement


def matched_share(
    directions: Float[np.ndarray, "n d_model"], others: Float[np.ndarray, "m d_model"]
) -> float:
    """Return the share of unit vectors that have a cosine above 0.9 with one of the others.

    >>> matched_share(np.eye(3), np.array([[1.0, 0, 0], [0, -1, 0]]))
    0.3333333333333333
    """
    n_matched = 0
    # In blocks, since [n, m] may not fit into memory.
    for start in range(0, len(directions), BLOCK_ROWS):
        cosines = directions[start : start + BLOCK_ROWS] @ others.T
        n_matched += int((cosines.max(axis=1) > MIN_COSINE).sum())
    return n_matched / len(directions)
