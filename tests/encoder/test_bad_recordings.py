"""Recordings that cannot be used, are shifted, or change during extraction."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.activations import writer
from minsae_jax.activations.store import open_store
from minsae_jax.eeg.recordings import open_windows
from minsae_jax.encoder.config import ExtractConfig
from tests.encoder.extraction import extract


def config(root, **changes):
    return ExtractConfig(root_path=str(root), checkpoint_path="encoder", **changes)


def spoil(root, names):
    """Make one recording unusable in each way; returns file name -> reason in the message."""
    reasons = {}

    def save(name, change, reason):
        np.save(root / name, change(np.load(root / name)))
        reasons[name] = reason

    def set_nan(x):
        x[70, 3] = np.nan
        return x

    save(names[0], lambda x: x[:, :18], "has 18 channels")
    save(names[1], set_nan, "NaN or infinity at sample 70")
    save(names[2], lambda x: x[:, 0], "has 1 channels")
    save(names[3], lambda x: (x * 100).astype(np.int16), "must be floating-point")
    save(names[4], lambda x: x[:-7], "file_lengths_map.csv says")
    (root / names[5]).write_bytes((root / names[5]).read_bytes()[:-40])
    (root / names[6]).write_bytes(b"")
    reasons |= {names[5]: "cannot be read", names[6]: "cannot be read"}
    lengths = (root / "file_lengths_map.csv").read_text().splitlines()
    listed = [line for line in lengths if not line.startswith(names[7])]
    (root / "file_lengths_map.csv").write_text(
        "\n".join([*listed, "demo9999_s001_t000_preprocessed.npy,9000"]) + "\n"
    )
    return reasons | {
        names[7]: "has no row for it",
        "demo9999_s001_t000_preprocessed.npy": "there is no such file",
    }


def test_bad_recordings_are_listed_or_skipped(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    settings = replace(settings, root_path=str(root))
    names = open_windows(root, "all", 42, 1000, 100, 19).files
    reasons = spoil(root, names)
    with pytest.raises(UserError) as e:
        extract(encoder, settings, "train", "val", "test")
    for name, reason in reasons.items():
        (message,) = [part for part in str(e.value).split("; ") if name in part]
        assert reason in message
    assert "--on_bad_recording skip" in str(e.value)
    assert not (tmp_path / "store").exists()

    skipping = replace(settings, on_bad_recording="skip")
    with pytest.warns(
        UserWarning, match=r"left out of split all: .* and 6 more; the manifest names them all"
    ):
        extract(encoder, skipping, "all")
    store = open_store(tmp_path / "store" / "l-1")
    assert store.manifest.data["skipped"].keys() == reasons.keys()
    good = [n for n in names if n not in reasons]
    with np.load(tmp_path / "store/l-1/provenance.npz") as origin:
        assert origin["recordings"].tolist() == good
    x = np.load(root / good[0])[None, :1000]
    np.testing.assert_allclose(
        store.read(0, 0, 11), np.asarray(encoder.activations(x))[0, 0], atol=1e-5
    )

    for name in good:
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="split test is empty: none of its recordings can be used"):
        extract(encoder, replace(skipping, out=str(tmp_path / "other")), "test")


def test_skipped_recordings_are_replaced_by_others(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    first, *others = open_windows(root, "train", 42, 1000, 100, 19).files
    eeg = np.load(root / first)
    eeg[5] = np.nan
    np.save(root / first, eeg)
    few = replace(settings, root_path=str(root), on_bad_recording="skip", max_batches=1)
    with pytest.warns(UserWarning, match="left out of split train"):
        extract(encoder, few, "train")
    store = open_store(tmp_path / "store" / "l-1")
    assert store.manifest.data["n_windows"] == 4
    with np.load(tmp_path / "store/l-1/provenance.npz") as origin:
        assert origin["recordings"][0] == others[0]


def test_recording_shorter_than_a_window_is_not_counted(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    windows = open_windows(root, "train", 42, 1000, 100, 19)
    short = windows.files[0]
    np.save(root / short, np.load(root / short)[:999])
    lengths = root / "file_lengths_map.csv"
    lengths.write_text(lengths.read_text().replace(f"{short},{windows.lengths[0]}", f"{short},999"))
    (store,) = extract(encoder, replace(settings, root_path=str(root)), "train")
    assert store.n_windows == len(windows) - windows.counts[0]
    assert store.n_recordings == len(windows.files) - 1
    patients = {file.split("_")[0] for file in windows.files[1:]}
    assert store.n_patients == len(patients)


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x[:1500]])
def test_recording_that_changes_during_extraction_is_refused(
    encoder, settings, demo_folder, tmp_path, monkeypatch, change
):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    name = open_windows(root, "train", 42, 1000, 100, 19).files[-1]
    write = writer.StoreWriter.write

    def changing(self, number, pieces):
        if number == 0:
            np.save(root / name, change(np.load(root / name)))
        write(self, number, pieces)

    monkeypatch.setattr(writer.StoreWriter, "write", changing)
    with pytest.raises(UserError, match=f"recording {name} has changed since the start"):
        extract(encoder, replace(settings, root_path=str(root), batch_size=1), "train")
    assert not (tmp_path / "store/l-1/provenance.npz").exists()


def test_shifted_channels_are_marked_with_a_warning(encoder, settings, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    name = open_windows(root, "val", 42, 1000, 100, 19).files[0]
    eeg = np.load(root / name)
    eeg[:, -1] = 0
    np.save(root / name, eeg)
    with pytest.warns(UserWarning, match=f"all zero in {name}"):
        extract(encoder, replace(settings, root_path=str(root)), "val")
    with np.load(tmp_path / "store/l-1/provenance.npz") as origin:
        assert origin["recordings"][origin["shifted"]].tolist() == [name]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_all_recordings_are_checked_before_anything_is_written(
    encoder, demo_folder, tmp_path, monkeypatch, value
):
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(demo_folder, tmp_path / "data")
    names = [open_windows(root, "test", 42, 1000, 100, 19).files[i] for i in (0, -1)]
    for name in names:
        eeg = np.load(root / name)
        eeg[5, 3] = value
        np.save(root / name, eeg)
    with pytest.raises(UserError) as e:
        extract(encoder, config(root), "train", "test")
    assert "contains NaN or infinity at sample 5" in str(e.value)
    assert all(name in str(e.value) for name in names)
    assert not (tmp_path / "embeddings").exists()


def test_nan_activations_are_not_stored(encoder, demo_folder, tmp_path):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    for name in open_windows(root, "val", 42, 1000, 100, 19).files:
        np.save(root / name, np.load(root / name) * 1e25)
    with (
        pytest.warns(UserWarning, match="the unit is probably wrong"),
        pytest.raises(UserError, match="the encoder returned NaN or infinity in float32"),
    ):
        extract(encoder, config(root, out=str(tmp_path / "store")), "val")
    assert [p.name for p in (tmp_path / "store/l-1").iterdir()] == ["manifest.json"]
