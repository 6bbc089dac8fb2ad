"""Pure features: nearly all of their strongest tokens touch one kind of event, and not by chance.

Tokens are not independent: the channels of a window show one burst, and so do neighbouring tokens.
Chance is therefore measured by shifting the tokens of each recording in time, all of them by one
random number of samples and around its end (the toroidal shift of Lotwick & Silverman 1982,
"Methods for Analysing Spatial Processes of Several Types of Points"). Tokens and events keep their
channels, lengths and distances, and a recording its rate of events, but the two are unrelated.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.events import LabelledEvent, events_by_recording, windows_end
from minsae_jax.evaluation.token_pass import FeatureTokens

PURE = 0.9  # precision above chance of a pure feature
PURE_EXAMPLES = 16  # and its least number of strongest tokens
PURE_BY_CHANCE = 0.001  # largest probability that shifted tokens are as precise
N_SHIFTS = 2000


def pure_features(
    dataset: Dataset,
    events: Sequence[LabelledEvent],
    features: FeatureTokens,
    precision: Float[np.ndarray, " d_sae"],
    base_rate: float,
) -> Bool[np.ndarray, " d_sae"]:
    """Return which features are pure for the events of one kind.

    That is a precision of 90 % above chance, (precision - base rate) / (1 - base rate), among at
    least 16 strongest tokens, which shifted tokens reach with a probability below 0.1 %. precision,
    base_rate: see `EventScore`.
    """
    above_chance = (precision - base_rate) / max(1 - base_rate, 1e-12)
    examples = features.examples
    is_pure = (above_chance >= PURE) & (examples >= PURE_EXAMPLES)
    if not is_pure.any():
        return is_pure
    shifted = ShiftedTokens(dataset, events)
    for feature in np.flatnonzero(is_pure):
        n_tokens = examples[feature]
        sequence = features.sequence[feature, :n_tokens]
        token = dataset.tokens.located[features.token[feature, :n_tokens]]
        n_inside = np.rint(precision[feature] * n_tokens)
        n_as_many = (shifted.count_inside(sequence, token) >= n_inside).sum()
        # The tokens as they are count as one more shift.
        is_pure[feature] = (n_as_many + 1) / (N_SHIFTS + 1) < PURE_BY_CHANCE
    return is_pure


class ShiftedTokens:
    """Tokens of a dataset that are shifted in time, and the events of one kind."""

    def __init__(self, dataset: Dataset, events: Sequence[LabelledEvent]):
        self.dataset = dataset
        self.events = events_by_recording(events)
        self._events_on = cache(self._read_events)
        self.shifts_of = cache(self._draw_shifts)

    def count_inside(
        self, sequence: Int[np.ndarray, " n"], token: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " shifts"]:
        """Return the number of tokens that touch an event on their channel, for each shift."""
        dataset = self.dataset
        begin = dataset.first_samples(sequence, token)
        length = dataset.lengths(token)
        places = np.stack([dataset.recording[sequence], dataset.channels_of(sequence, token)])
        distinct, place = np.unique(places, axis=1, return_inverse=True)
        n_inside = np.zeros(N_SHIFTS, np.int64)
        for i, (recording, channel) in enumerate(distinct.T.tolist()):
            is_there = place == i
            end = windows_end(dataset, recording)
            shifted = (begin[is_there, None] + self.shifts_of(recording)) % end
            start, latest_stop = self._events_on(recording, channel)
            n_before_stop = np.searchsorted(start, shifted + length[is_there, None])
            n_inside += (latest_stop[n_before_stop] > shifted).sum(axis=0)
        return n_inside

    def _read_events(
        self, recording: int, channel: int
    ) -> tuple[Int[np.ndarray, " events"], Int[np.ndarray, " counts"]]:
        """Return the events on a channel, or on any for -1, and once more after the end.

        They are their starts in order, and the largest stop of the first i of them (0 for i = 0).
        """
        end = windows_end(self.dataset, recording)
        in_recording = self.events.get(self.dataset.recordings[recording], [])
        times = [
            (event.start, min(event.stop, end))
            for event in in_recording
            if event.start < end and (channel == -1 or channel in event.channels)
        ]
        start, stop = np.array(sorted(times), np.int64).reshape(-1, 2).T
        start = np.concatenate([start, start + end])
        stop = np.concatenate([stop, stop + end])
        return start, np.maximum.accumulate(np.insert(stop, 0, 0))

    def _draw_shifts(self, recording: int) -> Int[np.ndarray, " shifts"]:
        """Return random numbers of samples, always the same for a recording."""
        end = windows_end(self.dataset, recording)
        return np.random.default_rng(recording).integers(0, end, N_SHIFTS)
