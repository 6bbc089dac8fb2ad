"""Features of an SAE on one recording, which need not be in any store: `encode_recording`.

The windows are those of `extract`, consecutive from the recording's start, and the last ones, which
`extract` may leave out. Only active entries are kept: the features of all tokens are never in
memory at once.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_array

from minsae_jax.activations.manifest import read_manifest
from minsae_jax.eeg.description import TUH, read_description
from minsae_jax.encoder.base import BaseEncoder, ComputeOptions, check_recordings
from minsae_jax.encoder.compute import Activations
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import TokenPlaces
from minsae_jax.evaluation.inputs import check_encoder
from minsae_jax.evaluation.recordings import open_finite_recording
from minsae_jax.monitor import progress
from minsae_jax.report.entries import active_entries
from minsae_jax.report.examples import batch_tokens
from minsae_jax.report.excerpts import channel_name
from minsae_jax.sae.member import SparseAutoencoder, check_features

BATCH_WINDOWS = 16


@dataclass(frozen=True)
class EncodedRecording:
    """Features of an SAE on the tokens of a recording, which are in order of their windows.

    CLS tokens, which have no time, are left out.
    """

    recording: str
    # Name of the EEG file that it was made from ("" if unknown), and seconds cut off at its start
    source: str
    source_start: float
    # In Hz
    sampling_rate: float
    # Names of the recording's columns
    channels: tuple[str, ...]
    # First sample of each token in the recording, and the one after the last
    start: Int[np.ndarray, " tokens"]
    stop: Int[np.ndarray, " tokens"]
    # Column of the recording; -1 for a token over all channels
    channel: Int[np.ndarray, " tokens"]
    # Sparse float32 [tokens, d_sae]; features that were not requested are 0
    activations: csc_array

    def at(
        self, feature: int, seconds: Float[np.ndarray, " times"]
    ) -> Float[np.ndarray, "times channels"]:
        """Return a feature's activation on each channel at times of the source file.

        seconds: such as `raw.times` of MNE. Where tokens overlap it is the largest activation, and
        0 where there is no token. Tokens over all channels count for each of them.
        """
        at_sample = np.zeros((int(self.stop.max()), len(self.channels)), np.float32)
        of_feature = self.activations[:, [feature]].tocoo()
        for token, activation in zip(of_feature.row, of_feature.data, strict=True):
            columns = slice(None)
            if self.channel[token] >= 0:
                columns = self.channel[token]
            place = at_sample[self.start[token] : self.stop[token], columns]
            np.maximum(place, activation, out=place)
        # As floats, times such as 0.29 are a little too small: 0.29 * 100 < 29.
        samples = (np.asarray(seconds) - self.source_start) * self.sampling_rate + 1e-6
        sample = np.floor(samples).astype(int)
        is_inside = (sample >= 0) & (sample < len(at_sample))
        activations = np.zeros((len(sample), len(self.channels)), np.float32)
        activations[is_inside] = at_sample[sample[is_inside]]
        return activations


@dataclass(frozen=True)
class FeatureTotals:
    """Activity of all features over the tokens of a recording, without CLS tokens."""

    n_tokens: int
    # Number of active tokens
    active: Int[np.ndarray, " d_sae"]
    # Sum of activations
    total: Float[np.ndarray, " d_sae"]


class Entries(NamedTuple):
    """Activations that are not 0."""

    # Index of the token, without CLS tokens
    token: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


class RecordingEncoder:
    """Runs a recording through an encoder's layer and an SAE.

    Raises UserError if member, encoder, layer and recording do not belong together, or if the
    recording is shorter than a window or contains NaN.
    """

    def __init__(
        self,
        encoder: BaseEncoder,
        sae: SparseAutoencoder,
        recording: str | Path,
        layer: int | None,
        allow_mismatch: bool,
        force_revin: bool,
    ):
        self.layer = _layer_index(encoder, sae, layer)
        self.sae = sae
        self.places = open_places(encoder, Path(recording), allow_mismatch)
        options = ComputeOptions(force_revin=force_revin or _had_revin(sae))
        self._compute = Activations(encoder, (self.layer,), options=options)
        # Index of each token of a sequence among those with samples, -1 for CLS tokens.
        grid = self.places.tokens
        self._located_index = np.full(grid.n_tokens, -1, np.int32)
        self._located_index[grid.located] = np.arange(len(grid.located))

    @property
    def n_tokens(self) -> int:
        """Tokens of the recording, without CLS tokens."""
        return len(self.places.recording) * len(self.places.tokens.located)

    def totals(self) -> FeatureTotals:
        """Return the activity of all features."""
        d_sae = self.sae.d_sae
        active = np.zeros(d_sae, np.int64)
        total = np.zeros(d_sae)
        for entries in self._entries("measure features"):
            active += np.bincount(entries.feature, minlength=d_sae)
            total += np.bincount(entries.feature, entries.value, d_sae)
        return FeatureTotals(self.n_tokens, active, total)

    def encode(self, features: Collection[int] | None = None) -> EncodedRecording:
        """Return the activations of some features, or of all, on every token."""
        is_requested = np.full(self.sae.d_sae, features is None)
        if features is not None:
            check_features(self.sae, features)
            is_requested[list(features)] = True
        parts = []
        for entries in self._entries("encode"):
            requested = np.flatnonzero(is_requested[entries.feature])
            parts.append([array[requested] for array in entries])
        token, feature, value = map(np.concatenate, zip(*parts, strict=True))
        places = self.places
        located = places.tokens.located
        sequence = np.repeat(np.arange(len(places.recording)), len(located))
        of_token = np.tile(located, len(places.recording))
        start = places.first_samples(sequence, of_token)
        shape = (self.n_tokens, self.sae.d_sae)
        source, source_start = places.description.origin(places.recordings[0])
        return EncodedRecording(
            recording=places.recordings[0],
            source=source,
            source_start=source_start,
            sampling_rate=places.sampling_rate,
            channels=tuple(channel_name(places, 0, i) for i in range(places.n_vars)),
            start=start,
            stop=start + places.lengths(of_token),
            channel=places.channels_of(sequence, of_token),
            activations=csc_array((value, (token, feature)), shape),
        )

    def _entries(self, title: str) -> Iterator[Entries]:
        """Yield the active entries of successive tokens."""
        places = self.places
        n_windows = int(places.window[-1]) + 1
        n_located = len(places.tokens.located)
        per_window = len(places.recording) // n_windows
        with progress(f"{title} {places.recordings[0]}", n_windows, "windows", delay=2.0) as bar:
            for first in range(0, n_windows, BATCH_WINDOWS):
                stop = min(first + BATCH_WINDOWS, n_windows)
                x = self._layer_output(first, stop)
                sequences = min(max(1, batch_tokens(self.sae) // places.n_tokens), len(x))
                for i in range(0, len(x), sequences):
                    active = active_entries(self.sae, x[i : i + sequences], sequences)
                    sequence, position = np.divmod(active.row, places.n_tokens)
                    located = self._located_index[position]
                    token = (first * per_window + i + sequence) * n_located + located
                    with_time = np.flatnonzero(located >= 0)
                    yield Entries(
                        token[with_time], active.feature[with_time], active.value[with_time]
                    )
                bar.advance(stop - first)

    def _layer_output(
        self, first: int, stop: int
    ) -> Float[np.ndarray, "sequences n_tokens d_model"]:
        """Return the layer's output for windows first:stop."""
        windows = np.stack([self.places.window_of(0, window) for window in range(first, stop)])
        (output,) = self._compute.start(windows.astype(np.float32, copy=False), BATCH_WINDOWS)
        x = np.concatenate(self._compute.fetch(output, stop - first))
        if not np.isfinite(x).all():
            raise UserError(
                f"the encoder returned NaN or infinity for {self.places.recordings[0]}; check that "
                "the recording is in the unit of the encoder"
            )
        return x


def encode_recording(
    encoder: BaseEncoder,
    sae: SparseAutoencoder,
    recording: str | Path,
    features: Collection[int] | None = None,
    layer: int | None = None,
    *,
    allow_mismatch: bool = False,
    force_revin: bool = False,
) -> EncodedRecording:
    """Return the features of an SAE on all tokens of a recording, with their times and channels.

    recording: a .npy file of [time, channels], described by a dataset.json in its folder, or else
    in SD at 100 Hz. features: those to keep; all if None, which takes 8 bytes for each active
    feature of each token. layer: that of the SAE's config.json if None, or else the last.
    allow_mismatch, force_revin: as for `extract`. Samples after the last whole window are not
    encoded.

    Raises UserError if encoder, SAE, layer and recording do not belong together, if there is no
    such feature, or if the recording is shorter than a window or contains NaN.

        encoded = ms.encode_recording(encoder, sae, "mine.npy", [647, 598])
        of_647 = encoded.activations[:, [647]].toarray()[:, 0]  # [tokens]
        seconds = encoded.start / encoded.sampling_rate
    """
    runner = RecordingEncoder(encoder, sae, recording, layer, allow_mismatch, force_revin)
    return runner.encode(features)


def open_places(encoder: BaseEncoder, path: Path, allow_mismatch: bool = False) -> TokenPlaces:
    """Return a recording with the places of an encoder's tokens in it, all samples checked."""
    spec = encoder.spec
    if path.suffix != ".npy":
        raise UserError(f"{path} is not a recording (.npy); `minsae prepare` makes them from EEG")
    if not path.exists():
        raise UserError(f"there is no recording {path}")
    eeg = open_finite_recording(path)
    if eeg.shape[1] != spec.n_vars:
        raise UserError(
            f"{path} has {eeg.shape[1]} channels, but the encoder expects {spec.n_vars}"
        )
    description = read_description(path.parent)
    check_recordings(spec, description, allow_mismatch)
    n_windows = len(eeg) // spec.seq_len
    if n_windows == 0:
        raise UserError(
            f"{path} has {len(eeg):,} samples, which is less than a window of the encoder "
            f"({spec.seq_len:,})"
        )
    channels = np.array([-1])
    if spec.per_channel:
        channels = np.arange(spec.n_vars)
    # As `extract` does: in recordings without a description, missing electrodes shift columns.
    is_shifted = description is TUH and spec.n_vars > 1 and not eeg[:, -1].any()
    return TokenPlaces(
        tokens=spec.tokens,
        seq_len=spec.seq_len,
        n_vars=spec.n_vars,
        description=description,
        folder=path.parent,
        recordings=(path.name,),
        shifted=np.array([is_shifted]),
        recording=np.zeros(n_windows * len(channels), int),
        window=np.repeat(np.arange(n_windows), len(channels)),
        channel=np.tile(channels, n_windows),
    )


def _layer_index(encoder: BaseEncoder, sae: SparseAutoencoder, layer: int | None) -> int:
    """Return the layer's number. Raises UserError if the SAE is of another encoder or layer."""
    check_encoder(sae, encoder, "the SAE")
    recorded = sae.config.get("layer")
    if layer is None:
        layer = -1 if recorded is None else recorded
    index = encoder.spec.layer_index(layer)
    if recorded is not None and index != encoder.spec.layer_index(recorded):
        raise UserError(f"the SAE was trained on layer {recorded}, not on {layer}")
    return index


def _had_revin(sae: SparseAutoencoder) -> bool:
    """Return whether RevIN was applied to the windows that the SAE was trained on."""
    recorded = sae.config.get("revin")
    if recorded is not None:
        return bool(recorded)
    # Members of earlier versions only name their store, which may have been moved.
    store = sae.config.get("store")
    manifest = read_manifest(Path(store)) if store else None
    return manifest is not None and bool(manifest.data.get("revin"))
