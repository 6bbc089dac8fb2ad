"""Stores of planted activations: sparse codes through a random dictionary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minsae_jax import SparseAutoencoder, TokenGrid, write_store
from minsae_jax.evaluation.dataset import Dataset, open_dataset

CHANNELS = 2
TOKENS = 4  # per sequence, of 10 samples each
SEQ_LEN = 40
GRID = TokenGrid.patches(TOKENS, SEQ_LEN // TOKENS)
SAMPLING_RATE = 100  # Hz, that of recordings without a description


@dataclass(frozen=True)
class Places:
    """Where the sequences of a store are from."""

    recordings: tuple[str, ...]
    recording: np.ndarray
    window: np.ndarray
    channel: np.ndarray

    @property
    def patient(self) -> np.ndarray:
        """Number of the patient of each sequence."""
        of_recording = [int(name[1:4]) for name in self.recordings]
        return np.array(of_recording)[self.recording]


def make_places(n_patients: int, n_windows: int, first_patient: int = 0) -> Places:
    """Return sequences of CHANNELS channels; patients have one or two recordings in turn."""
    recordings = []
    for patient in range(first_patient, first_patient + n_patients):
        name = f"p{patient:03d}_s001_t"
        recordings += [f"{name}{i:03d}_preprocessed.npy" for i in range(1 + patient % 2)]
    grid = np.meshgrid(range(len(recordings)), range(n_windows), range(CHANNELS), indexing="ij")
    return Places(tuple(recordings), *(axis.reshape(-1) for axis in grid))


def draw_codes(rng: np.random.Generator, places: Places, n_features: int) -> np.ndarray:
    """Return sparse codes [sequences, TOKENS, features]: each is active on 5 % of the tokens.

    Active codes are 0.5 and more, so that they differ from noise.
    """
    shape = (len(places.recording), TOKENS, n_features)
    return (0.5 + rng.exponential(size=shape)) * (rng.random(shape) < 0.05)


def draw_dictionary(rng: np.random.Generator, n_features: int, d_model: int) -> np.ndarray:
    rows = rng.normal(size=(n_features, d_model))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_planted(
    folder: Path,
    activations: np.ndarray,
    places: Places,
    split: str = "test",
    tokens: TokenGrid = GRID,
    seq_len: int = SEQ_LEN,
) -> Dataset:
    """Write recordings of zeros and a store, and open them."""
    recordings = folder / "recordings"
    recordings.mkdir(exist_ok=True)
    for name in places.recordings:
        np.save(recordings / name, np.zeros((SEQ_LEN, 19), np.float32))
    rows = "".join(f"{name},{SEQ_LEN}\n" for name in places.recordings)
    (recordings / "file_lengths_map.csv").write_text(f"filename,time_len\n{rows}")
    store = write_store(
        folder / "store",
        activations.astype(np.float32),
        encoder="planted",
        tokens=tokens,
        seq_len=seq_len,
        recordings=places.recordings,
        recording=places.recording,
        window=places.window,
        channel=places.channel,
        split=split,
    )
    return open_dataset(store.folder, None, None, recordings)


def true_autoencoder(dictionary: np.ndarray) -> SparseAutoencoder:
    """Return a ReLU autoencoder whose features are the codes, for an orthonormal dictionary."""
    n_features, d_model = dictionary.shape
    params = {"W_enc": dictionary.T, "b_enc": np.zeros(n_features), "W_dec": dictionary}
    return SparseAutoencoder(params | {"b_dec": np.zeros(d_model)})
