"""The entries of each feature with the largest keys, merged batch by batch on the host."""

import numpy as np
from jaxtyping import Bool, Float, Int

from minsae_jax.evaluation.dataset import TokenPlaces
from minsae_jax.report.entries import ActiveEntries

MERGE = 1 << 17  # entries: at least so many wait for a merge


# An active entry with the key by which it is chosen
ENTRY = np.dtype(
    [
        ("feature", np.int32),
        ("key", np.float64),
        ("position", np.int64),
        ("activation", np.float32),
    ]
)


class LargestByFeature:
    """The `size` entries of each feature with the largest keys; the earlier position if equal.

    window: of every sequence, which has n_tokens positions; of the entries of a feature in one
    window, only that with the largest key counts.
    New entries wait until they are many, since each merge sorts all entries.
    """

    def __init__(
        self,
        d_sae: int,
        size: int,
        window: Int[np.ndarray, " sequences"] | None = None,
        n_tokens: int = 1,
    ):
        self.d_sae = d_sae
        self.size = size
        self.window = window
        self.n_tokens = n_tokens
        self.clear()

    def clear(self) -> None:
        """Remove all entries."""
        # Sorted by feature, then by decreasing key.
        self._entries = np.zeros(0, ENTRY)
        self._waiting: list[np.ndarray] = []
        # The smallest key of each feature that is full. Keys that do not exceed it are dropped
        # before anything is sorted, which is nearly all of them after a few merges.
        self.threshold = np.full(self.d_sae, -np.inf)

    def add(
        self,
        feature: Int[np.ndarray, " n"],
        key: Float[np.ndarray, " n"],
        position: Int[np.ndarray, " n"],
        activation: Float[np.ndarray, " n"],
        above: Float[np.ndarray, " d_sae"] | None = None,
    ) -> None:
        """Add entries; of equal keys of a feature, earlier positions come first.

        above: for each feature, a second threshold that keys must exceed.
        """
        # In parts, so that the first of them raise the thresholds for the others.
        for first in range(0, len(feature), MERGE):
            part = slice(first, first + MERGE)
            threshold = self.threshold if above is None else np.maximum(self.threshold, above)
            # Not >=: of equal keys the earlier position wins, and that one is already here.
            exceeds = key[part] > threshold[feature[part]]
            candidates = first + np.flatnonzero(exceeds)
            if not len(candidates):
                continue
            entries = np.empty(len(candidates), ENTRY)
            entries["feature"] = feature[candidates]
            entries["key"] = key[candidates]
            entries["position"] = position[candidates]
            entries["activation"] = activation[candidates]
            self._waiting.append(entries)
            if sum(map(len, self._waiting)) > max(MERGE, len(self._entries) // 2):
                self.merged()

    def merged(self) -> np.ndarray:
        """Return the entries with the largest keys, sorted by feature, then by decreasing key."""
        entries = np.concatenate([self._entries, *self._waiting])
        self._waiting = []
        # lexsort takes the main key last.
        order = np.lexsort((entries["position"], -entries["key"], entries["feature"]))
        if self.window is not None:
            window = self.window[entries["position"] // self.n_tokens]
            group = window * self.d_sae + entries["feature"]
            _, first = np.unique(group[order], return_index=True)
            order = order[np.sort(first)]
        rank = self._ranks(entries["feature"][order])
        entries = entries[order[rank < self.size]]
        is_last = self._ranks(entries["feature"]) == self.size - 1
        last = entries[is_last]
        self.threshold[last["feature"]] = last["key"]
        self._entries = entries
        return entries

    def _ranks(self, feature: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return each entry's place among those of its feature; `feature` is sorted."""
        starts = np.searchsorted(feature, np.arange(self.d_sae))
        return np.arange(len(feature)) - starts[feature]

    def to_table(self) -> tuple[Int[np.ndarray, "d_sae size"], Float[np.ndarray, "d_sae size"]]:
        """Return positions and activations; the position is -1 if a feature has fewer entries."""
        entries = self.merged()
        place = (entries["feature"], self._ranks(entries["feature"]))
        position = np.full((self.d_sae, self.size), -1, np.int64)
        position[place] = entries["position"]
        activation = np.zeros((self.d_sae, self.size), np.float32)
        activation[place] = entries["activation"]
        return position, activation


def shown_span(
    dataset: TokenPlaces,
    recording: int,
    sequence: Int[np.ndarray, " n"],
    token: Int[np.ndarray, " n"],
    n_samples: int,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return (first sample, the one after the last) of the EEG shown with tokens of a recording.

    n_samples: around a patch; a CLS token is shown with its whole window. The stretch is moved to
    lie inside the recording, so that all have the same length.
    """
    grid = dataset.tokens
    is_patch = grid.first[token] >= 0
    length = np.where(is_patch, n_samples, max(n_samples, dataset.seq_len))
    around = (grid.first[token] + grid.last[token] + 1 - n_samples) // 2
    begin = dataset.window[sequence].astype(np.int64) * dataset.seq_len
    begin = begin + np.where(is_patch, around, 0)
    available = dataset.recording_length(recording)
    begin = np.clip(begin, 0, np.maximum(available - length, 0))
    return begin, np.minimum(begin + length, available)


class StrongestExamples:
    """The strongest tokens of each feature, at most per_recording of them from one recording.

    Of those that would show the same seconds, the strongest: one of each window, and none whose
    EEG, see `shown_span`, overlaps that of a stronger example. Batches come in the order of the
    recordings. The best of the current recording are merged into the best of all once it ends.
    """

    def __init__(
        self, dataset: TokenPlaces, d_sae: int, top: int, per_recording: int, n_samples: int
    ):
        self.dataset = dataset
        self.n_samples = n_samples
        self.best = LargestByFeature(d_sae, top)
        # More than `top` from one recording are never needed.
        self.size = min(top, per_recording)
        # The EEG of an example can overlap that of the strongest tokens of so many other windows.
        # If it is n windows long, they are up to n before and 1.5 n after a CLS token.
        n_near = 3 * -(-n_samples // dataset.seq_len)
        candidates = self.size * (1 + n_near)
        window = dataset.window.astype(np.int64)
        self.in_recording = LargestByFeature(d_sae, candidates, window, dataset.n_tokens)
        self.recording = -1

    def add(
        self,
        first_position: int,
        recording: Int[np.ndarray, " rows"],
        entries: ActiveEntries,
    ) -> None:
        """Add a batch; first_position: of its first row. recording: of each row, in order."""
        of_entry = recording[entries.row]
        for one in np.unique(recording).tolist():
            if one != self.recording:
                self._merge()
                self.recording = one
            index = np.flatnonzero(of_entry == one)
            activation = entries.value[index]
            self.in_recording.add(
                feature=entries.feature[index],
                key=activation,
                position=first_position + entries.row[index].astype(np.int64),
                activation=activation,
                # Entries that cannot enter the best of all are dropped here already.
                above=self.best.threshold,
            )

    def _merge(self) -> None:
        best = self.in_recording.merged()
        best = best[self._is_example(best)]
        self.best.add(best["feature"], best["key"], best["position"], best["activation"])
        self.in_recording.clear()

    def _is_example(self, entries: np.ndarray) -> Bool[np.ndarray, " n"]:
        """Return which entries of a recording, sorted as by `merged`, are examples."""
        is_example = np.zeros(len(entries), bool)
        if not len(entries):
            return is_example
        places = np.divmod(entries["position"], self.dataset.n_tokens)
        begin, stop = shown_span(self.dataset, self.recording, *places, self.n_samples)
        d_sae = self.best.d_sae
        n_examples = np.zeros(d_sae, np.int64)
        # Of the EEG of the examples
        begins = np.zeros((d_sae, self.size), np.int64)
        stops = np.zeros((d_sae, self.size), np.int64)
        starts = np.searchsorted(entries["feature"], np.arange(d_sae + 1))
        counts = np.diff(starts)
        for place in range(counts.max(initial=0)):
            feature = np.flatnonzero((counts > place) & (n_examples < self.size))
            index = starts[feature] + place
            is_before = stop[index, None] <= begins[feature]
            is_after = begin[index, None] >= stops[feature]
            is_apart = (is_before | is_after).all(axis=1)
            feature, index = feature[is_apart], index[is_apart]
            begins[feature, n_examples[feature]] = begin[index]
            stops[feature, n_examples[feature]] = stop[index]
            n_examples[feature] += 1
            is_example[index] = True
        return is_example

    def finish(self) -> LargestByFeature:
        """Return the best of all recordings."""
        self._merge()
        return self.best
