"""The entries of each feature with the largest keys, merged batch by batch on the host."""

import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.report.entries import EncodedBatch, largest_tokens


class LargestByFeature:
    """The `size` entries of each feature with the largest keys; the earlier position if equal.

    Entries are flat arrays sorted by feature, then by falling key.
    """

    def __init__(self, d_sae: int, size: int):
        self.d_sae = d_sae
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Remove all entries."""
        self.feature = np.zeros(0, np.int64)
        self.position = np.zeros(0, np.int64)
        self.key = np.zeros(0)
        self.activation = np.zeros(0, np.float32)
        # The smallest key of each feature that is full. Keys that do not exceed it are dropped
        # before anything is sorted, which is nearly all of them after a few batches.
        self.threshold = np.full(self.d_sae, -np.inf)

    def add(
        self,
        feature: Int[np.ndarray, " n"],
        key: Float[np.ndarray, " n"],
        position: Int[np.ndarray, " n"],
        activation: Float[np.ndarray, " n"],
        above: Float[np.ndarray, " d_sae"] | None = None,
    ) -> None:
        """Add entries; positions are later than all earlier ones.

        above: for each feature, a second threshold that keys must exceed.
        """
        threshold = self.threshold if above is None else np.maximum(self.threshold, above)
        # Not >=: of equal keys the earlier position wins, and that one is already here.
        candidates = np.flatnonzero(key > threshold[feature])
        if not len(candidates):
            return
        feature = np.concatenate([self.feature, feature[candidates]])
        key = np.concatenate([self.key, key[candidates]])
        position = np.concatenate([self.position, position[candidates]])
        activation = np.concatenate([self.activation, activation[candidates]])

        # By feature, then falling key, then position: lexsort takes the main key last.
        order = np.lexsort((position, -key, feature))
        rank = self._ranks(feature[order])
        order = order[rank < self.size]
        self.feature = feature[order]
        self.key = key[order]
        self.position = position[order]
        self.activation = activation[order]
        is_last = self._ranks(self.feature) == self.size - 1
        self.threshold[self.feature[is_last]] = self.key[is_last]

    def _ranks(
        self,
        feature: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """Return each entry's place among those of its feature; `feature` is sorted."""
        starts = np.searchsorted(feature, np.arange(self.d_sae))
        return np.arange(len(feature)) - starts[feature]

    def to_table(self) -> tuple[Int[np.ndarray, "d_sae size"], Float[np.ndarray, "d_sae size"]]:
        """Return positions and activations; the position is -1 if a feature has fewer entries."""
        rank = self._ranks(self.feature)
        position = np.full((self.d_sae, self.size), -1, np.int64)
        position[self.feature, rank] = self.position
        activation = np.zeros((self.d_sae, self.size), np.float32)
        activation[self.feature, rank] = self.activation
        return position, activation


class StrongestExamples:
    """The largest activations of each feature, at most per_recording of them from one recording.

    Batches come in the order of the recordings. The best of the current recording are merged into
    the best of all once the recording ends.
    """

    def __init__(self, d_sae: int, top: int, per_recording: int):
        # More than `top` from one recording are never needed.
        self.count = min(top, per_recording)
        self.best = LargestByFeature(d_sae, top)
        self.in_recording = LargestByFeature(d_sae, self.count)
        self.recording = -1

    def add(self, batch: EncodedBatch, recording: Int[np.ndarray, " sequences"]) -> None:
        """Add a batch; recording: of each of its sequences, in order."""
        for one in np.unique(recording).tolist():
            if one != self.recording:
                self._merge()
                self.recording = one
            values, rows = largest_tokens(batch, recording == one, self.count)
            self._add_table(values, rows, batch.first * batch.n_tokens)

    def _add_table(
        self, values: Float[Array, "d_sae n"], rows: Int[Array, "d_sae n"], first_position: int
    ) -> None:
        value = np.asarray(values)
        feature, rank = np.nonzero(value)
        activation = value[feature, rank]
        self.in_recording.add(
            feature,
            activation.astype(np.float64),
            first_position + np.asarray(rows)[feature, rank].astype(np.int64),
            activation,
            # Entries that cannot enter the best of all are dropped here already.
            above=self.best.threshold,
        )

    def _merge(self) -> None:
        current = self.in_recording
        self.best.add(current.feature, current.key, current.position, current.activation)
        current.clear()

    def finish(self) -> LargestByFeature:
        """Return the best of all recordings."""
        self._merge()
        return self.best
