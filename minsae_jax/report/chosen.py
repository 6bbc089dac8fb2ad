"""Selection of the tokens of a feature that are shown as examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from minsae_jax.report.context import Context
from minsae_jax.report.excerpts import ChosenToken, shown_samples

RANDOM_EXAMPLES = 6


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens that `choose_tokens` returns for several features, as arrays."""

    feature: Int[np.ndarray, " n"]
    sequence: Int[np.ndarray, " n"]
    token: Int[np.ndarray, " n"]


def choose_all(context: Context, features: Sequence[int]) -> ChosenTokens:
    """Return the tokens of several features to show as examples."""
    counts = []
    places: list[tuple[int, int]] = []
    for feature in features:
        chosen = choose_tokens(context, feature)
        counts.append(len(chosen))
        places.extend((one.sequence, one.token) for one in chosen)
    sequence, token = np.array(places, np.int64).reshape(-1, 2).T
    return ChosenTokens(np.repeat(np.asarray(features), counts), sequence, token)


def choose_tokens(context: Context, feature: int) -> list[ChosenToken]:
    """Return the tokens of a feature to show as examples."""
    activity = context.activity
    quantiles = context.quantiles
    n_quantiles = quantiles.token.shape[1]
    n_random = min(RANDOM_EXAMPLES, activity.random.token.shape[1])
    top_ranks = _without_duplicates(context, feature)
    ranked = [("top", activity.candidates, rank) for rank in top_ranks]
    ranked += [(f"q{rank + 1}", quantiles, rank) for rank in range(n_quantiles)]
    ranked += [("random", activity.random, rank) for rank in range(n_random)]
    with_montage = set(top_ranks[: context.montage_examples])
    chosen = []
    for group, tokens, rank in ranked:
        token = int(tokens.token[feature, rank])
        if token < 0:
            continue
        one = ChosenToken(
            group=group,
            sequence=int(tokens.sequence[feature, rank]),
            token=token,
            activation=float(tokens.activation[feature, rank]),
            has_montage=group == "top" and rank in with_montage,
        )
        chosen.append(one)
    return chosen


def _without_duplicates(context: Context, feature: int) -> list[int]:
    """Return the ranks of the top examples among the candidates, without overlaps.

    A candidate that overlaps a stronger example is left out. Examples overlap if `w` patches around
    them share samples of the same channel.
    """
    dataset = context.dataset
    top = context.activity.candidates
    count = context.activity.top.token.shape[1]
    ranks = np.flatnonzero(top.token[feature] >= 0)
    sequence = top.sequence[feature, ranks]
    token = top.token[feature, ranks]
    recording = dataset.recording[sequence]
    channel = dataset.channels_of(sequence, token)
    begin = dataset.first_samples(sequence, token)
    # A CLS token is of its whole window.
    is_patch = dataset.tokens.first[token] >= 0
    length = np.where(is_patch, shown_samples(dataset, context.w), dataset.seq_len)
    selected: list[int] = []
    for i in range(len(ranks)):
        if len(selected) == count:
            break
        is_same = (recording[selected] == recording[i]) & (channel[selected] == channel[i])
        distance = np.abs(begin[selected] - begin[i])
        is_close = distance < np.minimum(length[selected], length[i])
        if not (is_same & is_close).any():
            selected.append(i)
    return ranks[selected].tolist()
