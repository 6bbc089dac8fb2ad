"""Recordings and settings that `prepare` refuses, corrects or leaves out."""

import mne
import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS
from tests.eeg.eeg_files import NEW_NAMES, load, make_raw, run, write_file


def with_samples(change) -> mne.io.RawArray:
    raw = make_raw()
    change(raw._data)
    return raw


def clip(data: np.ndarray) -> None:
    np.clip(data[5], np.quantile(data[5], 0.05), None, out=data[5])


def scaled(factor: float):
    def change(data: np.ndarray) -> None:
        data *= factor

    return change


def with_nan(data: np.ndarray) -> None:
    data[3, 77] = np.nan


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (scaled(1e-6), {}, "its unit is probably wrong"),
        (scaled(1e6), {}, "its unit is probably wrong"),
        (with_nan, {}, "contains NaN or infinity"),
        (scaled(1), {"min_duration": 30.0}, "is too short: 20 s instead of --min_duration 30"),
        (scaled(1), {"max_duration": 15.0}, "is too long: 20 s"),
        (scaled(1), {"crop": 11.0}, "is too short: 0 s"),
        (scaled(1), {"channels": ("Fz", "AFz"), "on_missing": "error"}, "lacks AFz"),
        (
            scaled(1),
            {"channels": ("Fz", "AFz")},
            "has 1 usable channels of 2, too few for --max_interpolated 0.2",
        ),
        (
            scaled(1),
            {"channels": ("standard_1020",)},
            r"missing, flat or bad are (\w+, ){10}and \d\d more; other channels",
        ),
        (
            scaled(1),
            {"channels": ("standrd_1020",)},
            r"missing, flat or bad are standrd_1020; did you mean 'standard_1020'\?; other",
        ),
        (
            scaled(1),
            {"channels": ("tuhh",), "on_missing": "error"},
            r"lacks tuhh; did you mean 'tuh'\?",
        ),
        (
            scaled(1),
            {"reference": ("avrage",)},
            "has no reference channel AVRAGE; --reference takes average, none, or channels",
        ),
        (scaled(1), {"reference": ("M1",)}, "has no reference channel M1"),
        (scaled(1), {"sampling_rate": 500.0, "h_freq": 200.0}, "is too low for --h_freq 200"),
        (scaled(1), {"sampling_rate": 500.0, "notch": (180.0,)}, "is too low for --notch 180"),
    ],
)
def test_unusable_recording_is_named_and_nothing_is_written(tmp_path, change, settings, message):
    path = write_file(with_samples(change), tmp_path / "a_raw.fif")
    with pytest.raises(UserError, match=message) as e:
        run(path, tmp_path / "out", **settings)
    assert str(path) in str(e.value)
    assert not (tmp_path / "out").exists()


def test_electrode_with_two_channels_of_one_name_is_refused(tmp_path):
    path = write_file(make_raw(), tmp_path / "a.edf")
    content = bytearray(path.read_bytes())
    # Labels have 16 characters each: the second channel gets the name of the first.
    content[256 + 16 : 256 + 32] = content[256 : 256 + 16]
    path.write_bytes(content)
    with pytest.raises(UserError, match="has several channels of one electrode: Fp1-0, Fp1-1"):
        run(path, tmp_path / "out")
    settings = {"channels": ("F7", "Fz", "Cz")}
    assert len(run(path, tmp_path / "others", **settings).records) == 1


def test_file_of_constant_channels_has_flat_ones_and_no_wrong_unit(tmp_path):
    """Their SD, as NumPy computes it, is 1e-16 µV."""
    path = write_file(make_raw(), tmp_path / "a.edf")
    content = path.read_bytes()
    n_header = int(content[184:192])
    n_samples = (len(content) - n_header) // 2
    path.write_bytes(content[:n_header] + b"\x07\x01" * n_samples)
    with pytest.raises(UserError, match="has 0 usable channels of 19"):
        run(path, tmp_path / "out")


def test_wrong_unit_is_corrected_by_scale(tmp_path):
    good = write_file(make_raw(), tmp_path / "a_raw.fif")
    wrong = write_file(with_samples(scaled(1e6)), tmp_path / "b_raw.fif")
    run(good, tmp_path / "good")
    run(wrong, tmp_path / "out", scale=1e-6)
    np.testing.assert_allclose(load(tmp_path / "out"), load(tmp_path / "good"), atol=1e-5)


def test_channel_that_is_the_reference_is_found(tmp_path):
    path = write_file(make_raw(), tmp_path / "a_raw.fif")
    prepared = run(path, tmp_path / "cz", reference=("Cz",))
    assert prepared.findings()[0] == (
        "channels all zero, since they are the reference: CZ (in a-raw_s001_t000_preprocessed.npy)"
    )
    assert not load(tmp_path / "cz")[:, CHANNELS.index("CZ")].any()
    for reference in (("C3", "C4"), ("average",)):
        prepared = run(path, tmp_path / reference[0], reference=reference)
        assert not any("all zero" in finding for finding in prepared.findings())


def test_clipped_channel_is_found(tmp_path):
    path = write_file(with_samples(clip), tmp_path / "a_raw.fif")
    assert run(path, tmp_path / "out").findings() == [
        "channels clipped: F4 (in a-raw_s001_t000_preprocessed.npy)"
    ]


def test_bad_recordings_and_copies_can_be_skipped(tmp_path):
    good = write_file(make_raw(), tmp_path / "eeg/a.edf")
    (tmp_path / "eeg/b.edf").write_bytes(good.read_bytes())
    (tmp_path / "eeg/c.edf").write_bytes(good.read_bytes()[:100])
    with pytest.raises(UserError, match=r"b.edf is a copy of \S*a.edf; recording \S*c.edf cannot"):
        run(tmp_path / "eeg", tmp_path / "out")
    assert not (tmp_path / "out/file_lengths_map.csv").exists()
    prepared = run(tmp_path / "eeg", tmp_path / "out", on_bad_recording="skip")
    assert [record.name for record in prepared.records] == ["a_s001_t000_preprocessed.npy"]
    assert prepared.n_new == 0  # it was prepared in the first run
    assert [each.source.path.name for each in prepared.rejected] == ["b.edf", "c.edf"]
    assert "left out" in prepared.summary()


def test_error_names_the_first_of_many_bad_recordings(tmp_path):
    for number, seconds in enumerate([11, 12, 12, 12, 12, 12, 13, 14, 15]):
        raw = make_raw(seed=number, seconds=seconds)
        write_file(raw, tmp_path / f"{number}_raw.fif")
    write_file(make_raw(), tmp_path / "good_raw.fif")
    reasons = (
        "0_raw.fif is too short: 11 s .*; .*1_raw.fif is too short: 12 s .*; .*6_raw.fif .* 13 s"
    )
    with pytest.raises(UserError, match=f"{reasons} .*; and 2 more: repair") as e:
        run(tmp_path, tmp_path / "out", min_duration=20.0)
    assert "4_raw.fif, and 1 more); " in str(e.value)
    prepared = run(tmp_path, tmp_path / "out", min_duration=20.0, on_bad_recording="skip")
    assert sum(line.startswith("left out: ") for line in prepared.findings()) == 9


def test_recording_with_missing_channels_is_skipped(tmp_path):
    write_file(make_raw(), tmp_path / "eeg/a.edf")
    write_file(make_raw(NEW_NAMES[1:], seed=1), tmp_path / "eeg/b.edf")
    prepared = run(tmp_path / "eeg", tmp_path / "out", on_missing="skip")
    assert len(prepared.records) == 1
    assert [each.reason for each in prepared.rejected] == ["lacks FP1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ("tuhh",), "montage": "x"}, "MNE has no montage 'x'"),
        ({"montage": "standard_1050"}, r"'standard_1050'; did you mean 'standard_1005'\?"),
        ({"channels": ("T3", "T7")}, "one electrode twice: T3 and T7"),
        ({"channels": ("Fz", " ")}, "--channels contains an empty name"),
        ({"reference": ("average", "M1")}, "--reference average cannot be combined"),
        ({"l_freq": 60.0}, "--l_freq must be below"),
        ({"h_freq": 60.0}, "--h_freq must be at most half of --sampling_rate, 50"),
        ({"patient_pattern": "("}, "is not a regular expression"),
        ({"patient_pattern": "x"}, "must contain the group"),
        ({"labels": "no.csv"}, "no.csv"),
    ],
)
def test_invalid_setting_is_one_line(tmp_path, settings, message):
    path = write_file(make_raw(), tmp_path / "a.edf")
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["labels.csv", "participants.tsv"])
def test_table_of_labels_in_latin_1_is_named(tmp_path, name):
    root = tmp_path / "study"
    path = write_file(make_raw(), root / "sub-01/eeg/sub-01_task-rest_eeg.edf")
    (root / "dataset_description.json").write_text("{}")
    table = "participant_id,site\nsub-01,M\xfcnchen\n"
    if name == "participants.tsv":
        table = table.replace(",", "\t")
    (root / name).write_bytes(table.encode("latin-1"))
    settings = {"labels": str(root / name)} if name == "labels.csv" else {}
    message = rf"{name} \(its encoding must be UTF-8, got the byte 0xfc\)$"
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", **settings)


def test_missing_file_of_labels_is_named(tmp_path):
    path = write_file(make_raw(), tmp_path / "a_raw.fif")
    with pytest.raises(UserError, match=r"^--labels no.csv does not exist$"):
        run(path, tmp_path / "out", labels="no.csv")
