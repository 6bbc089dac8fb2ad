"""Sequences of a store, and the EEG behind them."""

import shutil

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.evaluation.dataset import open_dataset


def test_sequences_are_read_across_shards(trained):
    dataset = trained.dataset("test")
    assert len(dataset.store.tokens_per_shard) > 1
    everything = dataset.read(0, len(dataset.recording))
    assert everything.shape == (len(dataset.recording), dataset.n_tokens, 128)
    for start, stop in ((0, 1), (70, 90), (len(everything) - 5, len(everything))):
        np.testing.assert_array_equal(dataset.read(start, stop), everything[start:stop])


def test_batches_are_in_order_and_of_one_recording(trained):
    dataset = trained.dataset("test")
    next_sequence = 0
    for first, x in dataset.batches(7):
        assert first == next_sequence
        assert len(set(dataset.recording[first : first + len(x)].tolist())) == 1
        next_sequence += len(x)
    assert next_sequence == len(dataset.recording)


def test_sequences_and_windows_of_each_recording(trained):
    dataset = trained.dataset("test")
    places = set(zip(dataset.recording.tolist(), dataset.window.tolist(), strict=True))
    assert [tuple(place) for place in dataset.windows.tolist()] == sorted(places)
    for recording in range(len(dataset.recordings)):
        first, stop = dataset.sequences_of(recording)
        expected = np.flatnonzero(dataset.recording == recording)
        assert list(range(first, stop)) == expected.tolist()


def test_window_is_cut_from_the_recording(trained):
    dataset = trained.dataset("test")
    eeg = load_recording(trained.recordings / dataset.recordings[1])
    np.testing.assert_array_equal(dataset.window_of(1, 1), eeg[1000:2000])
    sequence = dataset.sequences_of(1)[0]
    window = int(dataset.window[sequence])
    starts = dataset.first_samples(np.array([sequence] * 3), np.array([0, 1, 4]))
    assert starts.tolist() == [1000 * window, 1000 * window, 1000 * window + 300]


def test_store_without_provenance_is_an_error(trained, tmp_path):
    source = trained.stores.with_name("store_test")
    shutil.copytree(source, tmp_path / "store")
    (manifest,) = (tmp_path / "store").rglob("manifest.json")
    manifest.unlink()
    with pytest.raises(UserError, match="has no manifest with the source of its tokens"):
        open_dataset(tmp_path / "store", -1, trained.encoder, trained.recordings)
