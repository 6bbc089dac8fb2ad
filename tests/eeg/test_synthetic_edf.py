"""The demo in EDF is the demo: events and signals survive annotations and 16 bits."""

import csv
from pathlib import Path

import numpy as np

from minsae_jax import DemoConfig, PrepareConfig, prepare, write_demo
from minsae_jax.eeg.synthetic_signals import recording


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_prepared_edf_files_have_the_planted_events_and_signals(tmp_path):
    config = DemoConfig(root_path=str(tmp_path / "edf"), patients=10, minutes=0.5, edf=True)
    written = write_demo(config)
    assert written.n_recordings == 15
    assert not write_demo(config).is_new
    source = str(tmp_path / "edf")
    prepare(PrepareConfig(source=(source,), out=str(tmp_path / "out"), reference=("none",)))
    planted = rows(tmp_path / "edf/events.csv")
    expected = [[row[0].replace(".edf", "_preprocessed.npy"), *row[1:]] for row in planted]
    assert sorted(rows(tmp_path / "out/events.csv")) == sorted(expected)
    prepared = np.load(tmp_path / "out/demo0003_s001_t001_preprocessed.npy")
    eeg, _ = recording([0, 3, 1], len(prepared))
    np.testing.assert_allclose(prepared, eeg, atol=1e-3)
