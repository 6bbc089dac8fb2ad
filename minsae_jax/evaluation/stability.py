"""Stability: which features of a member reappear in members trained from another seed.

The features of two members are matched one to one so that the sum of the cosines of their decoder
directions is largest (an assignment problem, solved exactly by the Jonker-Volgenant algorithm). A
feature reappears if the cosine to its match is above 0.7, the threshold of Paulo & Belrose 2025
(arXiv 2501.16615); its stability is the number of seeds in which it does, as in arXiv 2606.12138.
The cosine of the encoder directions of a match is reported too. It does not count, since the part
of an encoder direction along which activations hardly vary is arbitrary. Dead features are left
out, and so are matches of negative cosine.

Candidates of each feature are its CANDIDATES most similar features of the other member, and those
that have it among theirs: memory grows as d_sae, not as d_sae². On random directions, where
competition is hardest, the mean cosine is that of the full problem to seven digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from minsae_jax.evaluation.members import Member
from minsae_jax.sae.member import unit_rows

MIN_COSINE = 0.7
CANDIDATES = 32
BLOCK_ROWS = 1024  # features compared with all others at a time


@dataclass(frozen=True)
class Stability:
    """The matches of one member's features in the members that differ from it in the seed only.

    Cosines are 0 where a live feature has no match, and NaN for dead features.
    """

    # Names of the other members
    others: tuple[str, ...]
    is_live: Bool[np.ndarray, " d_sae"]
    # Index of the feature in the other member, -1 without a match
    match: Int[np.ndarray, "others d_sae"]
    decoder_cosine: Float[np.ndarray, "others d_sae"]
    encoder_cosine: Float[np.ndarray, "others d_sae"]
    # Cosines to the best one-to-one matches among random directions; see `random_directions`
    chance: Float[np.ndarray, " n"]

    @property
    def n_seeds(self) -> int:
        """Number of seeds, this member's included."""
        return len(self.others) + 1

    def share(self, weights: Float[np.ndarray, " d_sae"] | None = None) -> float:
        """Return the share of live features that reappear, averaged over the other seeds.

        weights: of features, such as their mean activation times the norm of their decoder row,
        which gives the share of the reconstruction that reappears; equal by default. NaN if those
        of all live features are 0.
        """
        reappears = self.decoder_cosine[:, self.is_live] > MIN_COSINE
        live_weights = None if weights is None else weights[self.is_live]
        if live_weights is not None and not live_weights.any():
            return float("nan")
        return float(np.average(reappears.mean(axis=0), weights=live_weights))

    def share_by_chance(self) -> float:
        """Return the share of features that random directions match."""
        return float((self.chance > MIN_COSINE).mean())


def seed_stability(
    members: Sequence[Member], is_live: Mapping[str, Bool[np.ndarray, " d_sae"]]
) -> dict[str, Stability]:
    """Return the stability of every member with a partner that differs in the seed only.

    Partners are of the same run. Members without a live feature are left out, and so are settings
    with several members of one seed, such as edited copies of a member, which differ in something
    else. Random directions are drawn once for each setting, always the same. is_live: by member's
    name.
    """
    by_setting: dict[tuple, list[Member]] = {}
    for member in members:
        if is_live[member.name].any() and "seed" in member.hyper:
            setting = tuple(item for item in member.hyper.items() if item[0] != "seed")
            # Other settings of two runs can differ.
            run = member.folder and member.folder.parent
            by_setting.setdefault((run, *setting), []).append(member)
    stability: dict[str, Stability] = {}
    for partners in by_setting.values():
        seeds = {member.hyper["seed"] for member in partners}
        if len(seeds) == len(partners) > 1:
            stability |= _setting_stability(partners, is_live)
    return stability


def _setting_stability(
    members: Sequence[Member], is_live: Mapping[str, Bool[np.ndarray, " d_sae"]]
) -> dict[str, Stability]:
    """Return the stability of the members of one setting; each pair is matched once."""
    live = [np.flatnonzero(is_live[member.name]) for member in members]
    directions = []
    encoders = []
    for member, features in zip(members, live, strict=True):
        directions.append(member.sae.unit_directions[features])
        encoder_rows = np.asarray(member.sae.params["W_enc"]).T
        encoders.append(unit_rows(encoder_rows[features]))
    matches = {}
    for a, b in combinations(range(len(members)), 2):
        a_to_b = match_directions(directions[a], directions[b])
        # One to one, so that the matches of b are the inverse.
        b_to_a = np.full(len(directions[b]), -1)
        is_matched = a_to_b >= 0
        b_to_a[a_to_b[is_matched]] = np.flatnonzero(is_matched)
        matches[a, b] = a_to_b
        matches[b, a] = b_to_a
    # Random directions take the place of another seed: how many features would reappear by chance.
    random = random_directions(directions[1], np.random.default_rng(0))
    chance = matched_cosines(directions[0], random, match_directions(directions[0], random))
    stability = {}
    for a, member in enumerate(members):
        others = [b for b in range(len(members)) if b != a]
        shape = (len(others), member.sae.d_sae)
        match = np.full(shape, -1)
        encoder = np.full(shape, np.nan, np.float32)
        decoder = np.full(shape, np.nan, np.float32)
        of_a = live[a]
        for row, b in enumerate(others):
            a_to_b = matches[a, b]
            # From places among the live features of b to numbers of features
            match[row, of_a] = np.where(a_to_b >= 0, live[b][a_to_b], -1)
            decoder[row, of_a] = matched_cosines(directions[a], directions[b], a_to_b)
            encoder[row, of_a] = matched_cosines(encoders[a], encoders[b], a_to_b)
        stability[member.name] = Stability(
            others=tuple(members[b].name for b in others),
            is_live=is_live[member.name],
            match=match,
            decoder_cosine=decoder,
            encoder_cosine=encoder,
            chance=chance,
        )
    return stability


def random_directions(
    directions: Float[np.ndarray, "n d"], rng: np.random.Generator
) -> Float[np.ndarray, "n d"]:
    """Return as many random unit vectors, normal with the mean and covariance of unit vectors.

    They lie in the subspace, and around the direction, that the features prefer, so that a match
    with them is chance.
    """
    mean = directions.mean(axis=0)
    # With X - mean = U S V', the covariance is V S² V' / n: normal numbers times S V' / √n have it.
    _, scale, basis = np.linalg.svd(directions - mean, full_matrices=False)
    normal = rng.standard_normal((len(directions), len(scale)), np.float32)
    scale = scale / np.float32(np.sqrt(len(directions)))
    return unit_rows(mean + normal * scale @ basis)


def matched_cosines(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], match: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Return the product of each row of a with its match in b; 0 where there is none."""
    return np.where(match >= 0, (a * b[match]).sum(axis=1), 0)


def match_directions(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Int[np.ndarray, " n"]:
    """Return for each unit vector of a its match in b, or -1: one to one, largest sum of cosines.

    Only candidates with a positive cosine can match; see the module's docstring.

    >>> match_directions(np.eye(2), np.array([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]])).tolist()
    [1, 0]
    """
    n = len(a)
    m = len(b)
    rows, columns = _candidates(a, b)
    columns_of_b, rows_of_b = _candidates(b, a)
    # As single numbers, of which those in both sets are counted once
    pairs = np.concatenate([rows * m + columns, rows_of_b * m + columns_of_b])
    rows, columns = np.divmod(np.unique(pairs), m)
    cosine = _row_products(a, b, rows, columns)
    is_positive = cosine > 0
    # A vector may also stay without a match, as if matched with one more column at cosine 0. The
    # solver needs positive costs, and a match for every row.
    alone = np.arange(n)
    cost = np.concatenate([2 - cosine[is_positive], np.full(n, 2.0)])
    rows = np.concatenate([rows[is_positive], alone])
    columns = np.concatenate([columns[is_positive], m + alone])
    graph = csr_array((cost, (rows, columns)), shape=(n, m + n))
    matched_rows, matched = min_weight_full_bipartite_matching(graph)
    match = np.empty(n, np.int64)
    match[matched_rows] = np.where(matched < m, matched, -1)
    return match


def _candidates(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Return rows of a and their most similar rows of b."""
    n_candidates = min(CANDIDATES, len(b))
    columns = []
    for start in range(0, len(a), BLOCK_ROWS):
        cosine = a[start : start + BLOCK_ROWS] @ b.T
        largest = np.argpartition(cosine, -n_candidates, axis=1)[:, -n_candidates:]
        columns.append(largest)
    rows = np.repeat(np.arange(len(a)), n_candidates)
    return rows, np.concatenate(columns).reshape(-1)


def _row_products(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    rows: Int[np.ndarray, " pairs"],
    columns: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """Return the product of each pair of rows, in blocks."""
    products = np.empty(len(rows))
    block = BLOCK_ROWS * CANDIDATES
    for start in range(0, len(rows), block):
        pairs = slice(start, start + block)
        products[pairs] = (a[rows[pairs]] * b[columns[pairs]]).sum(axis=1)
    return products
