"""Which files `prepare` finds, how it names their recordings, and what it takes from BIDS."""

import csv
import errno
import json
import os
import random
from pathlib import Path

import mne
import numpy as np
import pytest
from mne_bids import get_bids_path_from_fname

from minsae_jax import PrepareConfig, UserError
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.eeg.prepare.bids import bids_sidecar, read_table
from minsae_jax.eeg.prepare.errors import BadRecordingError
from minsae_jax.eeg.prepare.sources import find_sources
from tests.eeg.eeg_files import NEW_NAMES, load, make_raw, run, write_file
from tests.samples import sample

DAMAGES = 50  # all files of a dataset in all ways
MUTATIONS = sample(50, 200)


def names_of(folder: Path, *files: str, source: str = ".", **settings) -> dict[str, str]:
    """Return the recording name of each file, made from empty files."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    config = PrepareConfig(source=(str(folder / source),), out="out", **settings)
    return {
        each.path.relative_to(folder).as_posix(): each.name.removesuffix("_preprocessed.npy")
        for each in find_sources(config)
    }


def test_names_of_the_tuh_corpus_are_kept(tmp_path):
    names = names_of(tmp_path, "01/aaaaabgf_s001_t000.edf", "aaaaabgf_s002_t003.edf", "notes.txt")
    assert names == {
        "01/aaaaabgf_s001_t000.edf": "aaaaabgf_s001_t000",
        "aaaaabgf_s002_t003.edf": "aaaaabgf_s002_t003",
    }


def test_files_of_other_names_are_a_patient_each(tmp_path):
    names = names_of(tmp_path, "b 1.edf", "a.vhdr", "a.eeg", "a.vmrk", ".hidden.edf")
    assert names == {"a.vhdr": "a_s001_t000", "b 1.edf": "b-1_s001_t000"}


def test_later_parts_of_split_fif_files_are_no_recordings(tmp_path):
    """Other files with such names are."""
    split = ("x_raw.fif", "x_raw-1.fif", "sub-1_split-01_eeg.fif", "sub-1_split-02_eeg.fif")
    others = ("a-1.fif", "b-02.fif", "sub-2_split-01_eeg.edf", "sub-2_split-02_eeg.edf")
    assert set(names_of(tmp_path, *split, *others)) == {split[0], split[2], *others}


def test_files_behind_links_to_folders_are_found_once(tmp_path):
    """Patients on another disk; a link back to the top has no end."""
    (tmp_path / "disk/p2").mkdir(parents=True)
    (tmp_path / "disk/p2/b.edf").touch()
    study = tmp_path / "study"
    (study / "p3").mkdir(parents=True)
    links = {"all": study, "p2": tmp_path / "disk/p2", "a_p2": study / "p2", "a_p3": study / "p3"}
    for link, target in links.items():
        (study / link).symlink_to(target)
    names = names_of(tmp_path, "study/p1/a.edf", "study/p3/c.edf", source="study")
    assert list(names) == ["study/a_p2/b.edf", "study/p1/a.edf", "study/p3/c.edf"]


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """The user who runs the tests may be allowed to read everything."""
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "p2":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="p2"):
        names_of(tmp_path, "p1/a.edf", "p2/b.edf")


def test_files_of_the_same_name_get_patients_from_the_pattern_of_the_message(tmp_path):
    files = ("p1/night.edf", "p2/night.edf")
    with pytest.raises(UserError) as error:
        names_of(tmp_path, *files)
    _, pattern, _ = str(error.value).split("'")
    names = names_of(tmp_path, patient_pattern=pattern)
    assert names == {"p1/night.edf": "p1_s001_t000", "p2/night.edf": "p2_s001_t000"}


def test_pattern_names_patient_session_and_token(tmp_path):
    files = ("p7/night1_a.edf", "p7/night1_b.edf", "p7/night2_a.edf", "p8/night1_a.edf")
    pattern = r"(?P<patient>p\d)/night(?P<session>\d)_"
    assert list(names_of(tmp_path, *files, patient_pattern=pattern).values()) == [
        "p7_s001_t000",
        "p7_s001_t001",
        "p7_s002_t000",
        "p8_s001_t000",
    ]
    with pytest.raises(UserError, match=r"--patient_pattern does not match \S*night1_a.edf"):
        names_of(tmp_path, patient_pattern="(?P<patient>nobody)")


def test_bids_entities_name_recordings(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    base = "sub-01/ses-pre/eeg/sub-01_ses-pre_task-rest_run-"
    names = names_of(
        tmp_path,
        f"{base}1_eeg.edf",
        f"{base}2_eeg.edf",
        "sub-01/ses-post/eeg/sub-01_ses-post_task-rest_eeg.set",
        "sub-02/eeg/sub-02_task-rest_eeg.vhdr",
        "derivatives/sub-01/eeg/sub-01_eeg.edf",
        "sub-02/meg/sub-02_meg.fif",
    )
    assert names == {
        f"{base}1_eeg.edf": "01_s002_t000",
        f"{base}2_eeg.edf": "01_s002_t001",
        "sub-01/ses-post/eeg/sub-01_ses-post_task-rest_eeg.set": "01_s001_t000",
        "sub-02/eeg/sub-02_task-rest_eeg.vhdr": "02_s001_t000",
    }


def test_patients_of_one_name_in_two_bids_datasets_are_refused(tmp_path):
    """They were one patient, with the labels of the first."""
    for dataset in ("a", "b"):
        write_file(make_raw(), tmp_path / dataset / "sub-01/eeg/sub-01_task-rest_eeg.edf")
        (tmp_path / dataset / "dataset_description.json").write_text("{}")
    for source in ([tmp_path], [tmp_path / "a", tmp_path / "b"]):
        with pytest.raises(
            UserError, match=r"datasets .*a and .*b both have a patient 01; prepare"
        ):
            run(source, tmp_path / "out")
    pattern = r"(?P<patient>[^/]+/sub-[^_/]+)/eeg/[^/]+$"
    prepared = run(tmp_path, tmp_path / "out", patient_pattern=pattern, on_bad_recording="skip")
    assert [record.patient for record in prepared.records] == ["a-sub-01"]  # b's is a copy
    assert len(run(tmp_path / "a", tmp_path / "one").records) == 1


def test_glob_matches_and_hashes_hide_names(tmp_path):
    names = names_of(tmp_path, "a/x1.edf", "b/x2.edf", "b/y.edf", source="*/x*")
    assert list(names) == ["a/x1.edf", "b/x2.edf"]
    hashed = names_of(tmp_path, source="*/x*", hash_patients=True)
    assert all(len(name.split("_")[0]) == 12 for name in hashed.values())
    assert len(set(hashed.values())) == 2


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ((), "nothing", "there is no file, folder or match of"),
        (("a.txt",), ".", "there is no EEG file in"),
        (("a.txt",), "*.txt", "matches no EEG file"),
        (("a b.edf", "a-b.edf"), ".", "patients 'a b' and 'a-b' would both be a-b"),
    ],
)
def test_unusable_source_is_one_line(tmp_path, files, source, message):
    with pytest.raises(UserError, match=message):
        names_of(tmp_path, *files, source=source)


def write_bids(root: Path) -> Path:
    """Write a BIDS dataset of two patients with events, a bad channel and labels."""
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    (root / "participants.tsv").write_text(
        "participant_id\tage\tpathology\nsub-01\t34\tn/a\nsub-02\t61\tepilepsy\n"
    )
    for patient in ("01", "02"):
        stem = root / f"sub-{patient}/eeg/sub-{patient}_task-rest"
        write_file(make_raw(seed=int(patient)), stem.with_name(f"{stem.name}_eeg.bdf"))
        stem.with_name(f"{stem.name}_events.tsv").write_text(
            "onset\tduration\ttrial_type\n1.5\t2.0\tseizure\n4\tn/a\tblink\n5\t1\tn/a\n"
        )
        status = "\n".join(
            f"{name}\tEEG\tuV\t{'bad' if name == 'C3' else 'good'}" for name in NEW_NAMES
        )
        stem.with_name(f"{stem.name}_channels.tsv").write_text(
            f"name\ttype\tunits\tstatus\n{status}"
        )
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tables_of_bids(tmp_path):
    prepared = run(write_bids(tmp_path / "bids"), tmp_path / "out")
    assert [record.description.bad_channels for record in prepared.records] == [("C3",), ("C3",)]
    events = rows_of(tmp_path / "out/events.csv")
    assert [(row["recording"][:2], row["event"], row["start"], row["stop"]) for row in events] == [
        ("01", "seizure", "150", "350"),
        ("01", "blink", "400", "500"),
        ("02", "seizure", "150", "350"),
        ("02", "blink", "400", "500"),
    ]
    assert rows_of(tmp_path / "out/labels.csv") == [
        {
            "recording": "01_s001_t000_preprocessed.npy",
            "patient": "01",
            "age": "34",
            "pathology": "",
        },
        {
            "recording": "02_s001_t000_preprocessed.npy",
            "patient": "02",
            "age": "61",
            "pathology": "epilepsy",
        },
    ]


def test_channels_of_other_types_are_interpolated_where_an_electrode_is(tmp_path):
    """As MNE does with Fp1 marked as bad. HEOG is no electrode, and is used if it is named."""
    names = (*NEW_NAMES, "HEOG", "M1")
    path = write_file(make_raw(names), tmp_path / "sub-01/eeg/sub-01_task-rest_eeg.bdf")
    types = {"Fp1": "EOG", "HEOG": "EOG", "M1": "misc", "Fp2": "n/a"}
    rows = "".join(f"{name}\t{types.get(name, 'EEG')}\tuV\n" for name in names)
    (path.parent / "sub-01_channels.tsv").write_text(f"name\ttype\tunits\n{rows}")
    prepared = run(path, tmp_path / "out", normalize="uV", sampling_rate=256.0)
    assert prepared.records[0].description.bad_channels == ("FP1",)
    assert "channels of another type than EEG: FP1 (in 01_s001" in "\n".join(prepared.findings())
    raw = mne.io.read_raw(path, preload=True, verbose="ERROR").pick(list(NEW_NAMES))
    raw.set_montage("colin27_1005", verbose="ERROR")
    raw.info["bads"] = ["Fp1"]
    raw.interpolate_bads(verbose="ERROR").set_eeg_reference("average", verbose="ERROR")
    expected = raw.get_data(units="uV")
    np.testing.assert_allclose(load(tmp_path / "out").T, expected, rtol=1e-6, atol=1e-4)
    settings = {"channels": ("HEOG", "Cz"), "reference": ("M1",), "normalize": "uV"}
    prepared = run(path, tmp_path / "eog", **settings)
    assert prepared.records[0].description.bad_channels == ()


@pytest.mark.parametrize(
    ("table", "kinds"),
    [
        ("onset\tduration\teventType\tchannels\n1\t2\tsz_foc\tall\n", ["sz_foc"]),
        ("onset\tduration\ttrial_type\tvalue\n1\t2\tn/a\t7\n2\t1\tgo\t8\n", ["7", "go"]),
        ("onset\tduration\tvalue\teventType\n1\t2\t7\tbckg\n", ["bckg"]),
        ("onset\tduration\ttrial_type\n0\t0\tNew Segment/\n2\t1\tboundary\n", []),
        ("onset\tduration\tsample\n1\t2\t256\n", ["spike", "blink", "end"]),  # of the file
        ("onset\tduration\tsample\n", []),
    ],
)
def test_kinds_of_events_in_bids(tmp_path, table, kinds):
    path = write_file(make_raw(), tmp_path / "sub-01/eeg/sub-01_task-rest_eeg.bdf")
    (path.parent / "sub-01_task-rest_events.tsv").write_text(table)
    (record,) = run(path, tmp_path / "out").records
    assert [event.kind for event in record.events] == kinds


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('onset\tduration\tvalue\n1\t1\t"a\n2\t1\tb\n', "must end with one"),
        ('onset\tduration\tvalue\n1\t1\t"a\n2\t1\t"b\n', "must end with one"),
        ("onset\tduration\tvalue\tvalue\n1\t1\ta\tb\n", "has the column value twice"),
    ],
)
def test_table_of_which_a_part_would_be_lost_is_refused(tmp_path, table, message):
    path = tmp_path / "events.tsv"
    path.write_text(table)
    with pytest.raises(BadRecordingError, match=rf"invalid table: events.tsv .*{message}"):
        read_table(path, ("onset",))
    path.write_text('onset\tvalue\n1\t"a\tb"\n2\t5" tall\n')
    assert [row["value"] for row in read_table(path, ())] == ["a\tb", '5" tall']


@pytest.mark.parametrize(
    ("column", "cell", "channels"),
    [
        ("channel", "Fz|Cz", "FZ CZ"),  # as in the specification
        ("channel", "F,1|Fz", "FZ"),
        ("channels", "Fp1,T7", "FP1 T3"),  # as in SzCORE
        ("channels", "fz; CZ", "FZ CZ"),
        ("channel", "n/a", "all"),
        ("channels", "all", "all"),
        ("channel", "Fz-Cz", "all"),
        ("channel", "ECG", None),
        ("other", "Fz", "all"),
    ],
)
def test_channels_of_events_in_bids(tmp_path, column, cell, channels):
    """Events of channels that are not prepared are left out, as those in files are."""
    raw = make_raw((*NEW_NAMES, "ECG"))
    path = write_file(raw, tmp_path / "sub-01/eeg/sub-01_task-rest_eeg.bdf")
    table = path.parent / "sub-01_task-rest_events.tsv"
    table.write_text(f"onset\tduration\ttrial_type\t{column}\n1\t2\tspike\t{cell}\n")
    (record,) = run(path, tmp_path / "out").records
    expected = {"all": [CHANNELS], None: []}.get(channels)
    if expected is None:
        expected = [tuple(channels.split())]
    assert [event.channels for event in record.events] == expected


def test_folder_of_bids_datasets_is_read_without_derivatives(tmp_path):
    root = write_bids(tmp_path / "data/bids")
    for folder in ("derivatives/clean/sub-01/eeg", "sourcedata/sub-01"):
        write_file(make_raw(seed=9), root / folder / "sub-01_task-rest_desc-clean_eeg.bdf")
    assert len(run(tmp_path / "data", tmp_path / "out").records) == 2
    assert len(run(root / "derivatives", tmp_path / "derived").records) == 1


def test_labels_of_bids_do_not_depend_on_the_source_or_the_pattern(tmp_path):
    """participants.tsv may have a column `patient`, such as 1 for patients and 0 for controls."""
    root = write_bids(tmp_path / "bids")
    table = "participant_id\tpatient\tage\nsub-01\t1\t34\nsub-02\t1\t61\n"
    (root / "participants.tsv").write_text(table)
    run(root, tmp_path / "root")
    run(root / "sub-02", tmp_path / "folder")
    run(root, tmp_path / "pattern", patient_pattern=r"(?P<patient>sub-\d+)")
    for out, ages in (("root", ["34", "61"]), ("folder", ["61"]), ("pattern", ["34", "61"])):
        assert [row["age"] for row in rows_of(tmp_path / out / "labels.csv")] == ages


def test_labels_of_bids_files_by_name(tmp_path):
    root = write_bids(tmp_path / "bids")
    labels = tmp_path / "labels.csv"
    labels.write_text("recording,sleep\nsub-01_task-rest_eeg.bdf,7\nsub-02_task-rest_eeg,8\n")
    run(root, tmp_path / "out", labels=str(labels))
    assert [row["sleep"] for row in rows_of(tmp_path / "out/labels.csv")] == ["7", "8"]


def test_recordings_without_a_row_of_labels_are_reported(tmp_path):
    root = write_bids(tmp_path / "bids")
    (root / "participants.tsv").write_text("participant_id\tage\nSUB-01\t34\nsub-02 \t61\n")
    line = "recordings without a row in the table of labels: 0{}_s001_t000_preprocessed.npy"
    prepared = run(root, tmp_path / "out")
    assert any(finding.startswith(line.format(1)) for finding in prepared.findings())
    assert not (tmp_path / "out/labels.csv").exists()
    labels = tmp_path / "labels.csv"
    labels.write_text("patient,sleep\n01,7\n")
    assert line.format(2) in run(root, tmp_path / "out", labels=str(labels)).findings()


def test_recordings_without_events_are_reported_if_others_have_some(tmp_path):
    root = write_bids(tmp_path / "bids")
    first, second = sorted(root.rglob("*_events.tsv"))
    line = "recordings without events (1): 02_s001_t000_preprocessed.npy"
    assert not any("without events" in each for each in run(root, tmp_path / "both").findings())
    second.write_text("onset\tduration\ttrial_type\n")
    assert line in run(root, tmp_path / "one").findings()
    first.write_text("onset\tduration\ttrial_type\n")
    assert not any("without events" in each for each in run(root, tmp_path / "none").findings())


def test_copies_with_another_header_are_found(tmp_path):
    """Their patients, who are one person, could be in train and test."""
    path = write_file(make_raw(), tmp_path / "eeg/smith.edf")
    content = bytearray(path.read_bytes())
    content[8:11] = b"ID7"
    (tmp_path / "eeg/p007.edf").write_bytes(content)
    with pytest.raises(UserError, match=r"smith.edf is a copy of \S*p007.edf"):
        run(tmp_path / "eeg", tmp_path / "out")
    assert not (tmp_path / "out/file_lengths_map.csv").exists()
    for _ in range(2):
        prepared = run(tmp_path / "eeg", tmp_path / "out", on_bad_recording="skip")
        assert [record.name for record in prepared.records] == ["p007_s001_t000_preprocessed.npy"]
        assert_is_complete(tmp_path / "out")


def test_new_file_that_changes_numbers_does_not_inherit_a_recording(tmp_path):
    """Files of one name, size and time, as archives contain them, in folders of a patient."""

    def add(folder: str, seed: int) -> np.ndarray:
        path = write_file(make_raw(seed=seed), tmp_path / f"eeg/p1/{folder}/night.edf")
        os.utime(path, (1e9, 1e9))
        run(path, tmp_path / f"alone{seed}")
        return load(tmp_path / f"alone{seed}")

    pattern = {"patient_pattern": r"(?P<patient>p\d)/"}
    expected = [add("b", 1), add("c", 2)]
    run(tmp_path / "eeg", tmp_path / "out", **pattern)
    expected.insert(0, add("a", 3))
    run(tmp_path / "eeg", tmp_path / "out", **pattern)
    for token, recording in enumerate(expected):
        path = tmp_path / f"out/p1_s001_t{token:03d}_preprocessed.npy"
        np.testing.assert_array_equal(np.load(path), recording)


def test_files_that_count_as_a_patient_are_reported(tmp_path):
    for night in (1, 2):
        write_file(make_raw(seed=night), tmp_path / f"eeg/p1_night{night}.edf")
    finding, *_ = run(tmp_path / "eeg", tmp_path / "out").findings()
    assert finding.startswith(
        "files that count as a patient each: p1_night1.edf, p1_night2.edf; if a patient has"
    )
    pattern = {"patient_pattern": r"(?P<patient>p\d)_"}
    assert run(tmp_path / "eeg", tmp_path / "patients", **pattern).findings() == []


def test_tables_of_bids_are_inherited(tmp_path):
    """As mne-bids finds them: from the nearest folder, if all parts of the name match."""
    root = write_bids(tmp_path / "bids")
    for table in root.rglob("*_events.tsv"):
        table.unlink()
    for table in root.rglob("*_channels.tsv"):
        table.unlink()
    eeg = root / "sub-02/eeg"
    write_file(make_raw(seed=3), eeg / "sub-02_task-rest_run-2_eeg.bdf")
    (eeg / "sub-02_task-rest_eeg.bdf").rename(eeg / "sub-02_task-rest_run-1_eeg.bdf")
    event = "onset\tduration\ttrial_type\n1\t1\t"
    (root / "task-rest_events.tsv").write_text(f"{event}root")
    (root / "task-sleep_events.tsv").write_text(f"{event}other task")
    (root / "sub-02/sub-02_events.tsv").write_text(f"{event}patient")
    (eeg / "sub-02_task-rest_run-2_events.tsv").write_text(f"{event}run")
    (root / "task-rest_channels.tsv").write_text("name\tstatus\nC3\tbad\n")
    (eeg / "sub-02_channels.tsv").write_text("name\tstatus\nP4\tbad\n")
    prepared = run(root, tmp_path / "out")
    found = [
        (record.name[:12], record.events[0].kind, *record.description.bad_channels)
        for record in prepared.records
    ]
    assert found == [
        ("01_s001_t000", "root", "C3"),
        ("02_s001_t000", "patient", "P4"),
        ("02_s001_t001", "run", "P4"),
    ]
    for name in ("01_task-rest", "02_task-rest_run-1", "02_task-rest_run-2"):
        path = next(root.rglob(f"sub-{name}_eeg.bdf"))
        for suffix in ("events", "channels"):
            expected = get_bids_path_from_fname(path).find_matching_sidecar(suffix, ".tsv")
            assert bids_sidecar(path, suffix) == Path(expected)
    # A change of an inherited table prepares its recordings again, and no others.
    (root / "task-rest_events.tsv").write_text(f"{event}changed!")
    prepared = run(root, tmp_path / "out")
    assert prepared.n_new == 1
    assert prepared.records[0].events[0].kind == "changed!"


def test_patients_of_a_table_of_recordings_are_hashed(tmp_path):
    for seed, patient in enumerate(("smith", "jones")):
        write_file(make_raw(seed=seed), tmp_path / f"in/{patient}_s001_t000.edf")
    table = "recording,patient,age\nsmith_s001_t000,smith,20\njones_s001_t000,jones,30\n"
    (tmp_path / "table.csv").write_text(table)
    labels = str(tmp_path / "table.csv")
    run(tmp_path / "in", tmp_path / "out", labels=labels, hash_patients=True)
    rows = rows_of(tmp_path / "out/labels.csv")
    assert {row["age"] for row in rows} == {"20", "30"}
    assert all(row["patient"] == row["recording"].split("_")[0] for row in rows)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"smith" not in path.read_bytes(), path


def test_labels_of_recordings(tmp_path):
    write_file(make_raw(), tmp_path / "eeg/a.edf")
    write_file(make_raw(seed=1), tmp_path / "eeg/b.edf")
    labels = tmp_path / "labels.csv"
    labels.write_text("recording,sex\nb.edf,f\n")
    run(tmp_path / "eeg", tmp_path / "out", labels=str(labels), hash_patients=True)
    (row,) = rows_of(tmp_path / "out/labels.csv")
    assert row["sex"] == "f"
    assert row["recording"].startswith(row["patient"])
    assert not row["patient"].startswith("b")
    labels.write_text("recording,sex\nc.edf,f\n")
    with pytest.raises(UserError, match=r"no row for .*; the first is a.edf, its patient is a;"):
        run(tmp_path / "eeg", tmp_path / "out", labels=str(labels), hash_patients=True)
    labels.write_text("patient;sex\na;f\n")
    with pytest.raises(UserError, match=r"got patient;sex; columns are separated by commas"):
        run(tmp_path / "eeg", tmp_path / "out", labels=str(labels), hash_patients=True)
    labels.write_text("Patient ID,sex\na,f\n")
    with pytest.raises(UserError, match=r"requires a column recording .*, got Patient ID, sex$"):
        run(tmp_path / "eeg", tmp_path / "out", labels=str(labels), hash_patients=True)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """Also in a table of labels, where night1.edf would be all of them."""
    eeg, labels = tmp_path / "eeg", tmp_path / "labels.csv"
    write_file(make_raw(), eeg / "p1/night1.edf")
    settings = {"patient_pattern": "(?P<patient>[^/]+)/[^/]+$", "labels": str(labels)}
    labels.write_text("recording,age\nnight1.edf,30\n")
    assert sources_of(run(eeg, tmp_path / "out", **settings)) == ["night1.edf"]
    write_file(make_raw(seed=1), eeg / "p2/night1.edf")
    write_file(make_raw(seed=2), eeg / "p2/night2.edf")
    with pytest.raises(UserError, match=r"no row for any .*; the first is p1/night1.edf, its"):
        run(eeg, tmp_path / "out", **settings)
    labels.write_text("recording,age\np1/night1.edf,30\np2/night1,40\nnight2.edf,50\n")
    prepared = run(eeg, tmp_path / "out", **settings)
    assert prepared.n_new == 2
    assert sources_of(prepared) == ["p1/night1.edf", "p2/night1.edf", "night2.edf"]
    assert [row["age"] for row in rows_of(tmp_path / "out/labels.csv")] == ["30", "40", "50"]
    hashed = sources_of(run(eeg, tmp_path / "hashed", **settings, hash_patients=True))
    assert len({source for source in hashed if len(source) == 12 + len(".edf")}) == 3


def sources_of(prepared):
    """Return the sources in dataset.json, after a check that it has those of the result."""
    recordings = json.loads((prepared.folder / "dataset.json").read_text())["recordings"]
    sources = [recordings[record.name]["source"] for record in prepared.records]
    assert sources == [record.description.source for record in prepared.records]
    return sources


def damage(root: Path, seed: int) -> Path:
    """Damage one file of a dataset so that bytes are missing, replaced, added or all gone."""
    rng = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = files[seed % len(files)]
    content = bytearray(path.read_bytes())
    kind = seed // len(files) % 5
    if kind == 0:
        content = content[: rng.randrange(max(len(content) // 4, 1))]
    elif kind == 1:
        for _ in range(20):
            content[rng.randrange(min(len(content), 400))] = rng.randrange(256)
    elif kind == 2:
        content = bytearray(rng.randbytes(300))
    elif kind == 3:
        content = bytearray()
    if kind == 4:
        path.unlink()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.slow
def test_damaged_bids_folders(tmp_path, capfd):
    """Each is refused in one line and leaves nothing, or gives a complete folder."""
    refusals = []
    seeds = range(0, DAMAGES, DAMAGES // sample(16, DAMAGES))
    for seed in seeds:
        root = write_bids(tmp_path / f"bids{seed}")
        path = damage(root, seed)
        out = tmp_path / f"out{seed}"
        try:
            run(root, out)
        except UserError as e:
            refusals.append(str(e))
            assert not (out / "file_lengths_map.csv").exists(), path
            assert not (out / "dataset.json").exists()
            assert not list(out.rglob("*.tmp"))
        else:
            assert_is_complete(out)
    assert len(seeds) // 3 < len(refusals) < len(seeds)
    assert not any("\n" in message for message in refusals)
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("prepare ") for line in lines)  # the progress


def assert_is_complete(folder: Path) -> None:
    described = json.loads((folder / "dataset.json").read_text())["recordings"]
    lengths = {
        row["filename"]: int(row["time_len"]) for row in rows_of(folder / "file_lengths_map.csv")
    }
    assert described.keys() == lengths.keys()
    assert {path.name for path in folder.glob("*.npy")} == set(lengths)
    for name, length in lengths.items():
        recording = np.load(folder / name)
        assert recording.shape == (length, 19)
        assert np.isfinite(recording).all()


@pytest.mark.slow
def test_mutated_edf_headers(tmp_path, capfd):
    """Each is refused in one line and leaves nothing, or gives a complete folder."""
    whole = write_file(make_raw(), tmp_path / "whole.edf").read_bytes()
    n_header = 256 * (1 + 20)  # of the file, 19 channels and the annotations
    refusals = []
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 10))):
            start = rng.randrange(n_header)
            replaced = rng.choice((b"9" * 8, b"-1      ", b"\x00" * 8, b"abc", b" " * 8, b"0" * 8))
            content[start : start + len(replaced)] = replaced
        path = tmp_path / "mutated.edf"
        path.write_bytes(content)
        out = tmp_path / f"out{seed}"
        try:
            run(path, out)
        except UserError as e:
            refusals.append(str(e))
            assert not out.exists()
        else:
            assert_is_complete(out)
    assert MUTATIONS // 10 < len(refusals) < MUTATIONS
    assert not any("\n" in message for message in refusals)
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("prepare ") for line in lines)  # the progress
