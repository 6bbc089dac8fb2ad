"""Odd names and texts of recordings, labels and events reach the data set unchanged."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.recordings import WindowShape, find_windows, open_windows
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import load_encoder
from minsae_jax.encoder.extract import extract
from minsae_jax.evaluation.dataset import open_dataset
from minsae_jax.evaluation.events import read_events
from minsae_jax.evaluation.labels import read_labels

ENDING = "_s001_t000_preprocessed.npy"
ODD = (
    "new\nline",
    "\"double\" 'single'",
    "<script>alert(1)<",
    "--overwrite",
    "$(touch hacked)",
    "%s{0}[*]?",
    "λ🧠",
    "x" * (255 - len(ENDING)),
    " spaces ",
    "b0000.npy",
)


@pytest.fixture
def odd_recordings(demo_folder, tmp_path) -> Path:
    """One short recording of each of ten patients with odd names, and tables that contain them."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    (source, *_) = sorted(demo_folder.glob("*.npy"))
    length = len(np.load(source, mmap_mode="r"))
    tables = {
        "file_lengths_map.csv": [("filename", "time_len")],
        "events.csv": [("recording", "event", "start", "stop", "channels")],
        "labels.csv": [("recording", "group")],
    }
    for patient in ODD:
        name = patient + ENDING
        shutil.copy(source, folder / name)
        tables["file_lengths_map.csv"].append((name, str(length)))
        tables["events.csv"].append((name, patient, "0", "50", "Fp1 O2"))
        tables["labels.csv"].append((name, patient))
    for table, rows in tables.items():
        with (folder / table).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_odd_names_reach_the_data_set(odd_recordings, trained, tmp_path):
    encoder = load_encoder(trained.encoder_folder)
    config = ExtractConfig(
        root_path=str(odd_recordings),
        checkpoint_path=str(trained.encoder_folder),
        out=str(tmp_path / "store"),
        split=("all",),
        batch_size=4,
    )
    (store,) = extract(encoder, config)
    names = {patient + ENDING for patient in ODD}
    dataset = open_dataset(store.folder, None, encoder, odd_recordings)
    assert set(dataset.recordings) == names
    assert set(dataset.patients) == {name.split("_")[0] for name in names}
    events = read_events(odd_recordings)
    assert {event.recording for each in events.values() for event in each} == names
    assert set(events) == set(ODD)
    (label,) = read_labels(odd_recordings, dataset.recordings)
    assert set(label.categories) == {patient.strip() for patient in ODD}
    assert not list(tmp_path.rglob("hacked"))


def test_name_that_is_not_text_is_refused(odd_recordings):
    """A CSV file in UTF-8 cannot list it."""
    name = os.fsdecode(b"caf\xe9") + ENDING
    shutil.copy(next(odd_recordings.glob("*.npy")), odd_recordings / name)
    _, bad = find_windows(odd_recordings, "all", 42, WindowShape(100, 50, 19))
    assert bad == {name: "cannot be used: file_lengths_map.csv has no row for it"}
    with pytest.raises(UserError, match="recording caf"):
        open_windows(odd_recordings, "all", 42, 100, 50, 19)
