"""Files, splits and windows equal those of the reference's data set; invalid data are refused."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg import scan
from minsae_jax.eeg.description import Description, write_description
from minsae_jax.eeg.recordings import WindowShape, load_recording, open_windows
from minsae_jax.eeg.scan import open_recordings, scan_windows, warn_of
from minsae_jax.eeg.splits import read_splits
from tests.conftest import FIXTURES

EXPECTED = json.loads((FIXTURES / "tuh_layout/expected.json").read_text())
SHAPE = WindowShape(EXPECTED["seq_len"], EXPECTED["patch_length"], EXPECTED["n_vars"])


@pytest.fixture
def root(tmp_path):
    return shutil.copytree(FIXTURES / "tuh_layout", tmp_path / "tuh")


@pytest.fixture
def data(root):
    """The folder of the recordings, which has no pickle."""
    return root / "tuhab_preprocessed"


@pytest.mark.parametrize("split", EXPECTED["splits"])
@pytest.mark.parametrize(
    "folder", [".", "tuhab_preprocessed"]
)  # splits from the pickle, or drawn again
def test_splits_and_windows_equal_the_reference(root, split, folder):
    expected = EXPECTED["splits"][split]
    windows = open_windows(root / folder, split, EXPECTED["split_seed"], *SHAPE)
    assert list(windows.files) == expected["files"]
    assert windows.ends.tolist() == expected["cumulative"]
    assert len(windows) == expected["num_sequences"]
    x = windows.read(0, len(windows))
    np.testing.assert_array_equal(
        np.stack([x[:, 0, 0], x[:, -1, -1]], 1), np.float32(expected["first_last"])
    )
    np.testing.assert_array_equal(windows.read(3, 9), x[3:9])
    assert (root / folder / "tuh_patient_splits_seed_42.pkl").exists()


def test_written_splits_equal_the_reference(root, data):
    open_windows(data, "train", 42, *SHAPE)
    written = pickle.loads((data / "tuh_patient_splits_seed_42.pkl").read_bytes())
    reference = pickle.loads((root / "tuh_patient_splits_seed_42.pkl").read_bytes())
    assert written == reference


def test_seed_changes_the_split(data):
    assert (
        open_windows(data, "train", 42, *SHAPE).files
        != open_windows(data, "train", 7, *SHAPE).files
    )
    assert (data / "tuh_patient_splits_seed_7.pkl").exists()


def test_existing_pickle_is_used(data):
    splits = {"train": ["aaaaabgf"], "val": ["aaaaadpi", "gone"], "test": ["aaaaabxw"]}
    (data / "tuh_patient_splits_seed_42.pkl").write_bytes(pickle.dumps(splits))
    with pytest.warns(UserWarning, match="in no split"):
        windows = open_windows(data, "val", 42, *SHAPE)
    assert [f.split("_")[0] for f in windows.files] == ["aaaaadpi"] * 3
    with pytest.warns(UserWarning, match="in no split"):
        everyone = open_windows(data, "all", 42, *SHAPE)
    assert [f.split("_")[0] for f in everyone.files] == ["aaaaabgf", *["aaaaadpi"] * 3, "aaaaabxw"]


def test_all_joins_the_splits(data):
    files = []
    for split in ("train", "val", "test"):
        files += open_windows(data, split, 42, *SHAPE).files
    assert list(open_windows(data, "all", 42, *SHAPE).files) == files


def test_windows_reserve_samples_for_a_target(tmp_path):
    """120,000 samples give 118 windows of 1,000, not 120."""
    np.save(tmp_path / "a_s001_t000_preprocessed.npy", np.zeros(120_000, np.float32))
    (tmp_path / "file_lengths_map.csv").write_text(
        "filename,time_len\na_s001_t000_preprocessed.npy,120000\n"
    )
    windows = open_windows(tmp_path, "test", 42, 1000, 10, 1)  # a single patient is in test
    assert len(windows) == 118
    assert windows.read(117, 118).shape == (1, 1000, 1)  # a 1-D file is one channel


def test_scan_detects_shifted_columns(data):
    name = open_windows(data, "test", 42, *SHAPE).files[1]
    array = np.load(data / name)
    array[:, -1] = 0
    np.save(data / name, array)
    windows = open_windows(data, "test", 42, *SHAPE)
    assert [f for f, scan in scan_windows(windows).items() if scan.shifted] == [name]


def test_replacing_a_bad_recording_does_not_read_the_others_again(data, monkeypatch):
    windows = open_windows(data, "train", 42, *SHAPE)
    first, second = windows.files[:2]
    array = np.load(data / second)
    array[0] = np.nan
    np.save(data / second, array)
    read = []

    def count(path):
        read.append(path.name)
        return load_recording(path)

    monkeypatch.setattr(scan, "load_recording", count)
    n_windows = int(windows.counts[:2].sum())
    (recordings,) = open_recordings(data, ["train"], 42, SHAPE, n_windows, "skip")
    assert len(recordings.windows) == n_windows
    assert recordings.windows.files[0] == first
    assert recordings.skipped.keys() == {second}
    assert sorted(set(read)) == sorted({*recordings.windows.files, second})
    assert len(read) == len(set(read))


def test_checksum_covers_every_sample_of_the_windows(data):
    def digest():
        return open_recordings(data, ["test"], 42, SHAPE)[0].sha256

    windows = open_windows(data, "test", 42, *SHAPE)
    before = digest()
    assert digest() == before
    file = int(np.argmax(windows.counts))
    array = np.load(data / windows.files[file])
    used = int(windows.counts[file]) * EXPECTED["seq_len"]
    for sample in (0, used // 2, used - 1):
        array[sample, 1] += 1e-3
        np.save(data / windows.files[file], array)
        assert digest() != before
        before = digest()
    array[used:] = np.nan  # in no window
    np.save(data / windows.files[file], array)
    assert digest() == before


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_first_keeps_a_prefix_of_the_windows(data, count):
    windows = open_windows(data, "train", 42, *SHAPE)
    first = windows.first(count)
    assert len(first) == count
    assert first.files == windows.files[: len(first.files)]
    np.testing.assert_array_equal(first.read(0, count), windows.read(0, count))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    "content", [{"train": [Hostile()], "val": [], "test": []}, Hostile(), [1], {"train": []}]
)
def test_invalid_pickles_are_refused_and_run_no_code(data, monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    (data / "tuh_patient_splits_seed_42.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"tuh_patient_splits_seed_42\.pkl"):
        open_windows(data, "train", 42, *SHAPE)
    assert not (tmp_path / "hacked").exists()


def test_splits_that_the_system_cannot_read_are_not_called_damaged(tmp_path):
    """The message for a damaged pickle says to remove it."""
    (tmp_path / "splits.pkl").symlink_to(tmp_path / "splits.pkl")
    with pytest.raises(OSError, match="symbolic links"):
        read_splits(tmp_path / "splits.pkl")


def change(data, how):
    """Change one recording of the test split and return its name."""
    name = open_windows(data, "test", 42, *SHAPE).files[0]
    how(data / name, np.load(data / name))
    return name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda p, x: np.save(p, x[:, :2]), "has 2 channels, but the encoder expects 3"),
        (lambda p, x: np.save(p, x[:50]), "has 50 samples, but file_lengths_map.csv says"),
        (lambda p, x: np.save(p, x.astype(int)), "must be floating-point"),
        (lambda p, x: np.save(p, x[None]), "must be floating-point [time, channels]"),
        (lambda p, x: np.save(p, x.astype(object)), "cannot be read"),
        (lambda p, x: p.write_bytes(p.read_bytes()[:-40]), "cannot be read"),
        (lambda p, x: p.write_bytes(b""), "cannot be read"),
        (lambda p, x: p.write_bytes(b"no array"), "cannot be read"),
    ],
)
def test_unusable_recordings_are_refused(data, how, message):
    name = change(data, how)
    with pytest.raises(UserError) as e:
        open_windows(data, "test", 42, *SHAPE)
    assert message in str(e.value)
    assert name in str(e.value)
    open_windows(data, "train", 42, *SHAPE)  # has other patients


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_nan_and_infinity_are_refused(data, value):
    def how(path, x):
        x = x.astype(np.float64)
        x[130, 1] = value
        np.save(path, x)

    name = change(data, how)
    with pytest.raises(UserError, match=rf"{name} contains NaN or infinity at sample 130"):
        open_recordings(data, ["test"], 42, SHAPE)


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("filename,length\nx,5\n", "lacks the column time_len; it has filename, length"),
        ("", "lacks the column filename and time_len"),
        ("filename,time_len\n", "has no row for"),
        (
            "filename,time_len\nx,long\n",
            "line 2: time_len must be a number of samples, but is 'long'",
        ),
        ("filename,time_len\nx,-5\n", "time_len must be a number of samples"),
        ("filename,time_len\nx\n", "time_len must be a number of samples"),
        ("time_len,filename\n77\n", "has a row without a filename"),
        ("time_len,filename\n77,\n", "has a row without a filename"),
    ],
)
def test_invalid_csv_is_refused(data, csv, message):
    (data / "file_lengths_map.csv").write_text(csv)
    with pytest.raises(UserError) as e:
        open_windows(data, "train", 42, *SHAPE)
    assert message in str(e.value)


def test_missing_files_are_refused(tmp_path, data):
    with pytest.raises(UserError, match="there is no folder"):
        open_windows(tmp_path / "nowhere", "train", 42, *SHAPE)
    with pytest.raises(UserError, match=r"there is no file_lengths_map\.csv"):
        open_windows(tmp_path, "train", 42, *SHAPE)
    with pytest.raises(UserError, match="split train is empty"):
        open_windows(data, "train", 42, 100_000, *SHAPE[1:])
    for path in data.glob("*.npy"):
        path.unlink()
    with pytest.raises(UserError, match="there are no recordings"):
        open_windows(data, "train", 42, *SHAPE)


def write_noise(folder, n_patients, scale=1.0, zero_columns=()):
    """Write recordings of 19 channels with an SD of `scale`."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["filename,time_len"]
    for patient in range(n_patients):
        name = f"p{patient:02d}_s001_t000_preprocessed.npy"
        samples = scale * rng.normal(size=(500, 19)).astype(np.float32)
        samples[:, list(zero_columns)] = 0
        np.save(folder / name, samples)
        lines.append(f"{name},500")
    (folder / "file_lengths_map.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_few_patients_are_named_and_drawn_again_when_there_are_more(tmp_path):
    folder = write_noise(tmp_path / "few", 9)
    assert len(open_windows(folder, "train", 42, 100, 0, 19).files) == 6
    with pytest.raises(UserError, match=r"split val has no patients .* \(6 train, 0 val, 3 test\)"):
        open_windows(folder, "val", 42, 100, 0, 19)
    assert not list(folder.glob("*.pkl"))
    write_noise(folder, 10)
    counts = [len(open_windows(folder, s, 42, 100, 0, 19).files) for s in ("train", "val", "test")]
    assert counts == [7, 1, 2]
    assert len(list(folder.glob("*.pkl"))) == 1
    write_noise(folder, 11)
    with pytest.warns(UserWarning, match="p10 of .* is left out; remove that file"):
        open_windows(folder, "train", 42, 100, 0, 19)


@pytest.mark.parametrize("ending", [".npy", "_preprocessed.npy"])
def test_names_without_a_patient_are_one_warning(tmp_path, recwarn, ending):
    folder = write_noise(tmp_path / "data", 12)
    for i in (3, 5):
        old = f"p{i:02d}_s001_t000_preprocessed.npy"
        new = f"night{i}{ending}"
        (folder / old).rename(folder / new)
        lengths = folder / "file_lengths_map.csv"
        lengths.write_text(lengths.read_text().replace(old, new))
    assert len(open_windows(folder, "train", 42, 100, 0, 19).files) == 8  # of 12 patients
    (message,) = [str(warning.message) for warning in recwarn]
    assert message.startswith(f"2 of 12 recordings in {folder}, such as night3{ending}, have no")
    assert "and remove tuh_patient_splits_seed_42.pkl" in message
    open_windows(folder, "test", 42, 100, 0, 19)
    assert {str(warning.message) for warning in recwarn} == {message}


def test_recordings_of_one_patient_are_one_warning(tmp_path, recwarn):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = ["filename,time_len"]
    for i in range(3):
        np.save(folder / f"rec_{i:03d}.npy", np.zeros((200, 19), np.float32))
        rows.append(f"rec_{i:03d}.npy,200")
        (folder / "file_lengths_map.csv").write_text("\n".join(rows) + "\n")
        recwarn.clear()
        assert len(open_windows(folder, "all", 42, 100, 0, 19).files) == i + 1
        messages = [str(warning.message) for warning in recwarn]
        # A single recording is of one patient, whatever its name.
        assert len(messages) == (i > 0)
    assert messages[0].startswith(f"all 3 recordings in {folder} are of one patient, rec, since")
    assert "rename their recordings to <patient>_<recording>.npy" in messages[0]
    with pytest.raises(UserError, match="split train has no patients"):
        open_windows(folder, "train", 42, 100, 0, 19)
    assert {str(warning.message) for warning in recwarn} == set(messages)


def test_empty_split_of_a_pickle_names_the_pickle(tmp_path):
    folder = write_noise(tmp_path / "few", 2)
    splits = {"train": ["p00"], "val": [], "test": ["p01"]}
    (folder / "tuh_patient_splits_seed_42.pkl").write_bytes(pickle.dumps(splits))
    with pytest.raises(UserError, match="then remove tuh_patient_splits"):
        open_windows(folder, "val", 42, 100, 0, 19)


@pytest.mark.parametrize(
    ("unit", "scale", "is_plausible"),
    [
        ("SD", 1.0, True),
        ("SD", 3e-5, False),  # volts
        ("SD", 30.0, False),  # microvolts
        ("uV", 30.0, True),
        ("uV", 3e-5, False),
        ("100 uV", 0.3, True),
        ("100 uV", 3e-7, False),
        ("mV", 0.03, True),
        ("mV", 30.0, False),
    ],
)
def test_amplitude_that_is_impossible_in_the_unit_is_a_warning(
    tmp_path, recwarn, unit, scale, is_plausible
):
    folder = write_noise(tmp_path / "data", 2, scale)
    if unit != "SD":
        names = tuple(f"C{i}" for i in range(19))
        write_description(folder, Description(100.0, names, (None,) * 19, unit))
    (recordings,) = open_recordings(folder, ["all"], 42, WindowShape(100, 0, 19))
    np.testing.assert_allclose(recordings.rms, scale, rtol=0.2)
    warn_of(recordings, "all")
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (0 if is_plausible else 1)
    assert all(f"should be in {unit}, but" in message for message in messages)


def test_channels_of_zeros_are_named(tmp_path, recwarn):
    folder = write_noise(tmp_path / "data", 2, zero_columns=(4, 9, 14))
    (recordings,) = open_recordings(folder, ["all"], 42, WindowShape(100, 0, 19))
    warn_of(recordings, "all")
    (message,) = [str(warning.message) for warning in recwarn]
    assert message.startswith("channels all zero: FZ, CZ, PZ (in p0")


def test_recordings_shorter_than_a_window_are_not_channels_of_zeros(tmp_path, recwarn):
    folder = write_noise(tmp_path / "data", 3)
    short = folder / "p01_s001_t000_preprocessed.npy"
    np.save(short, np.load(short)[:60])
    lengths = folder / "file_lengths_map.csv"
    lengths.write_text(lengths.read_text().replace(f"{short.name},500", f"{short.name},60"))
    (recordings,) = open_recordings(folder, ["all"], 42, WindowShape(100, 0, 19))
    assert sorted(recordings.windows.counts) == [0, 5, 5]
    warn_of(recordings, "all")
    assert not recwarn.list
