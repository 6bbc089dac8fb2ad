"""Cards of planted features: padded patches, tokens over all channels, and few or unplaced ones."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minsae_jax import TokenGrid
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.context import Context
from minsae_jax.report.describe import FeatureCard, describe_all
from minsae_jax.report.examples import collect
from minsae_jax.report.excerpts import shown_samples
from minsae_jax.report.spectra import segment_samples
from tests.evaluation.planted import Places, true_autoencoder, write_planted

SEQ_LEN = 200
N_WINDOWS = 12
N_RECORDINGS = 4
REST = 30  # samples after the last window


def places_of(channels: list[int]) -> Places:
    names = tuple(f"p{i:03d}_s001_t000_preprocessed.npy" for i in range(N_RECORDINGS))
    axes = np.meshgrid(range(N_RECORDINGS), range(N_WINDOWS), channels, indexing="ij")
    return Places(names, *(axis.reshape(-1) for axis in axes))


def plant(folder: Path, activations: np.ndarray, tokens: TokenGrid, places: Places) -> Dataset:
    """Write a store, and recordings of noise."""
    dataset = write_planted(folder, activations, places, tokens=tokens, seq_len=SEQ_LEN)
    rng = np.random.default_rng(0)
    for name in dataset.recordings:
        eeg = rng.normal(size=(N_WINDOWS * SEQ_LEN + REST, 19))
        # Without the fast half of the noise, which would have an artefact hint.
        eeg = (eeg + np.roll(eeg, 1, axis=0) + np.roll(eeg, 2, axis=0)) / 2
        np.save(dataset.folder / name, eeg.astype(np.float32))
    return dataset


def cards_of(dataset: Dataset, d_sae: int, w: int = 1) -> list[FeatureCard]:
    sae = true_autoencoder(np.eye(d_sae, dtype=np.float32))
    activity = collect(dataset, sae, n_samples=shown_samples(dataset, w))
    return list(describe_all(Context(dataset, sae, activity, None, w)))


def test_a_padded_patch_ends_with_its_window(tmp_path):
    """Windows of 200 samples, patches of 30 with a stride of 20; the last has 20 of its own."""
    places = places_of([0, 1])
    rng = np.random.default_rng(0)
    activations = np.zeros((len(places.window), 10, 2))
    activations[:, 9, 0] = rng.uniform(1, 2, len(places.window))
    dataset = plant(tmp_path, activations, TokenGrid.patches(10, 30, stride=20), places)
    card, _ = cards_of(dataset, 2)
    assert len(card.examples) > 8
    for example in card.examples:
        start, stop = (round(second * 100) for second in example.patch)
        assert start % SEQ_LEN == 180
        assert stop == start + 20


@pytest.mark.parametrize("n_cls", [0, 1])
def test_examples_do_not_show_the_same_seconds_at_the_ends_of_recordings(tmp_path, n_cls):
    """All tokens are active, and 410 samples are shown of windows of 200."""
    places = places_of([-1])
    rng = np.random.default_rng(0)
    d_sae = 40
    activations = rng.exponential(size=(len(places.window), 10 + n_cls, d_sae))
    dataset = plant(tmp_path, activations, TokenGrid.patches(10, 20, n_cls=n_cls), places)
    for card in cards_of(dataset, d_sae, w=10):
        top = [example for example in card.examples if example.group == "top"]
        assert len(top) == 3 * N_RECORDINGS
        for a, b in combinations(top, 2):
            if a.recording == b.recording:
                assert abs(a.start - b.start) >= len(a.trace) / 100 - 1e-9


def test_hints_of_tokens_over_all_channels_are_of_the_channel_that_is_shown(tmp_path):
    """A blink on two of 19 channels is in every example."""
    places = places_of([-1])
    activations = np.zeros((len(places.window), 11, 3))
    patch = np.arange(len(places.window)) % 10
    activations[np.arange(len(patch)), 1 + patch, 0] = 1
    # On CLS tokens only, and on two tokens.
    activations[:, 0, 1] = 1
    activations[[3, 30], 5, 2] = 1
    dataset = plant(tmp_path, activations, TokenGrid.patches(10, 20, n_cls=1), places)
    for i, name in enumerate(dataset.recordings):
        eeg = np.load(dataset.folder / name)
        for window in range(N_WINDOWS):
            at = window * SEQ_LEN + 20 * patch[i * N_WINDOWS + window]
            eeg[at : at + 20, :2] += 12 * np.hanning(20)[:, None]
        np.save(dataset.folder / name, eeg)
    blink, cls, few = cards_of(dataset, 3)
    assert blink.channel in ("FP1", "FP2")
    assert blink.artefacts["beyond 5 SD"] == blink.artefacts_top["beyond 5 SD"] == 1
    assert blink.artefact == blink.artefact_top == 1
    assert cls.cls == 1
    assert not cls.channel_ratio.any()
    assert cls.channel == ""
    # Too few for a sample, which is not a share of 0.
    assert np.isnan(few.artefact)
    assert few.artefact_top == np.mean([bool(example.hints) for example in few.examples[:2]])


def test_tokens_over_all_channels_name_no_region(tmp_path):
    """A window has a token for each of 19 channels, and one over all of them."""
    places = places_of([-1])
    channel = np.append(np.arange(19), -1)
    tokens = TokenGrid(channel, np.zeros(20, int), np.full(20, SEQ_LEN - 1))
    o1 = CHANNELS.index("O1")
    activations = np.zeros((len(places.window), 20, 2))
    activations[:, -1] = 1
    activations[5, o1, 0] = 1
    activations[:, o1, 1] = 1
    once, often = cards_of(plant(tmp_path, activations, tokens, places), 2)
    # A single token on a channel is chance, however many others are active.
    assert once.suggestion.startswith("widespread")
    assert often.suggestion.startswith("posterior")
    assert often.support == pytest.approx(0.5, abs=0.15)


def test_the_spectrum_of_a_long_patch_is_that_of_the_patch(tmp_path):
    """Every window of 10 s has alpha in one patch of 1 s, where the feature is active."""
    places = places_of([0])
    rng = np.random.default_rng(0)
    patch = rng.integers(10, size=len(places.window))
    activations = np.zeros((len(patch), 10, 1))
    activations[np.arange(len(patch)), patch, 0] = rng.uniform(1, 2, len(patch))
    grid = TokenGrid.patches(10, 100)
    dataset = write_planted(tmp_path, activations, places, tokens=grid, seq_len=1000)
    for i, name in enumerate(dataset.recordings):
        eeg = rng.normal(size=(N_WINDOWS * 1000, 19))
        for window in range(N_WINDOWS):
            at = 1000 * window + 100 * patch[i * N_WINDOWS + window]
            eeg[at : at + 100, 0] += 2 * np.sin(2 * np.pi * 10 * np.arange(100) / 100)
        np.save(dataset.folder / name, eeg.astype(np.float32))
    (card,) = cards_of(dataset, 1, w=10)
    assert card.band == "alpha"
    is_peak = (card.spectrum.hz >= 9.5) & (card.spectrum.hz <= 10.5)
    assert card.spectrum.ratio[is_peak].max() > 3


@pytest.mark.parametrize(
    ("patch_len", "of_spectrum", "shown"),
    [(10, 210, 210), (50, 210, 600), (100, 100, 600), (300, 300, 900)],
)
def test_samples_around_a_patch(tmp_path, patch_len, of_spectrum, shown):
    """At 100 Hz; w is 10 patches to either side."""
    grid = TokenGrid.patches(1200 // patch_len, patch_len)
    places = places_of([0])
    activations = np.zeros((len(places.window), grid.n_tokens, 1))
    dataset = write_planted(tmp_path, activations, places, tokens=grid, seq_len=1200)
    assert segment_samples(dataset, w=10) == of_spectrum
    assert shown_samples(dataset, w=10) == shown
    assert shown_samples(dataset, w=10, context_seconds=21.0) == 2100
    assert shown_samples(dataset, w=0) == patch_len
