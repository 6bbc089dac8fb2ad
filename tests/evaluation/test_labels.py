"""labels.csv: its types, its missing values and its errors."""

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.evaluation.labels import read_labels

RECORDINGS = (
    "a_s001_t000_preprocessed.npy",
    "a_s001_t001_preprocessed.npy",
    "b_s001_t000_preprocessed.npy",
    "c_s001_t000_preprocessed.npy",
)


@pytest.fixture
def folder(tmp_path):
    rows = "".join(f"{name},100\n" for name in RECORDINGS)
    (tmp_path / "file_lengths_map.csv").write_text(f"filename,time_len\n{rows}")
    return tmp_path


def read(folder, text, recordings=RECORDINGS):
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return {label.name: label for label in read_labels(folder, recordings)}


def test_no_file_is_no_labels(folder):
    assert read_labels(folder, RECORDINGS) == ()


def test_types_and_missing_values(folder):
    labels = read(
        folder,
        "\ufeffpatient,age,sex,epilepsy,responder,dose,group\n"
        "a,30,f,1,Yes,0,x\n"
        "b,n/a,m,0,no,0.5,2\n"
        "c,50.5,,1,NA,nan,3\n"
        "train,60,m,0,no,2,3\n",
    )
    age = labels["age"]
    assert age.is_number
    assert age.patients == ("a", "c")
    assert age.values.tolist() == [30, 50.5]
    assert labels["sex"].categories == ("f", "m")
    assert labels["sex"].patients == ("a", "b")
    # 0 and 1 alone are two categories; so are yes and no in any case.
    assert labels["epilepsy"].categories == ("0", "1")
    assert labels["epilepsy"].category.tolist() == [1, 0, 1]
    assert labels["responder"].categories == ("no", "yes")
    assert labels["responder"].category.tolist() == [1, 0]
    assert labels["dose"].is_number
    # One value that is not a number makes categories.
    assert labels["group"].categories == ("2", "3", "x")


def test_0_and_1_with_decimals_are_the_same_two_categories(folder):
    """pandas writes a column of whole numbers with empty cells as 1.0 and 0.0."""
    label = read(folder, "patient,epilepsy,seizures\na,1.0,2.0\nb,,1.0\nc,0.0,0.0\ntrain,1,0\n")
    assert label["epilepsy"].categories == ("0", "1")
    assert label["epilepsy"].patients == ("a", "c")
    assert label["epilepsy"].category.tolist() == [1, 0]
    assert label["seizures"].is_number


def test_values_that_look_like_mistakes_are_reported(folder):
    ages = "".join(f"train{i},{30 + i},a,yes\n" for i in range(4))
    text = f"patient,age,group,epilepsy\na,61 y,A,Yes\n{ages}"
    with pytest.warns(UserWarning, match="labels.csv: ") as caught:
        labels = read(folder, text)
    assert [str(each.message).removeprefix(f"{folder / 'labels.csv'}: ") for each in caught] == [
        "age is read as categories and not as a number, because of '61 y'; leave a cell empty if "
        "the value is missing",
        "group has categories that differ in upper and lower case only, and are not the same: "
        "'A', 'a'",
    ]
    assert labels["age"].categories == ("30", "31", "32", "33", "61 y")
    assert labels["group"].categories == ("A", "a")
    assert labels["epilepsy"].categories == ("yes",)


def test_type_does_not_depend_on_the_recordings(folder):
    text = "patient,group\na,2\nb,3\nc,x\n"
    label = read(folder, text, RECORDINGS[:3])["group"]
    assert label.categories == ("2", "3", "x")
    assert label.patients == ("a", "b")


def test_rows_of_recordings_come_before_those_of_patients(folder):
    labels = read(
        folder,
        "recording,patient,dose,drug\n"
        "a_s001_t000_preprocessed.npy,a,10,none\n"
        "a_s001_t001,a,20,AED\n"
        ",b,5,AED\n"
        "c_s001_t000.npy,c,7,none\n",
    )
    # A patient's number is the mean of its recordings.
    assert labels["dose"].patients == ("a", "b", "c")
    assert labels["dose"].values.tolist() == [15, 5, 7]
    # Patients of several categories are left out and counted.
    assert labels["drug"].patients == ("b", "c")
    assert labels["drug"].categories == ("AED", "none")
    assert labels["drug"].n_ambiguous == 1


def test_description(folder):
    text = "patient,age,sex,epilepsy\na,30,f,\nb,40.5,m,\nc,60,f,\n"
    labels = read(folder, text)
    assert labels["age"].describe(1) == "30 to 60, median 40.5"
    assert labels["sex"].describe(2) == "f 2, m 1"
    assert labels["sex"].describe(1) == "f 2, and 1 more"
    assert labels["epilepsy"].describe(1) == "none"


def test_column_without_values(folder):
    label = read(folder, "patient,age\na,\nb,n/a\n")["age"]
    assert label.patients == ()
    assert len(label.values) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("feature,label,note\n3,spindle,\n", "requires a column recording or patient"),
        ("", "requires a column recording or patient, got none"),
        ("patient\na\n", "has no column of labels besides patient"),
        ("patient,age,age\na,1,2\n", "a different name for every column"),
        ("patient,age\n", "has no rows"),
        ("patient,age\na,30,40\n", "row 2: expected 2 values"),
        ("patient,age\na\n", "row 2: expected 2 values"),
        ("patient,age\n,30\n", "row 2 has neither a recording nor a patient"),
        ("patient,age\na,30\na,40\n", "row 3: a second row for the patient a"),
        ("patient,age\nz,30\n", "no row for any recording in its folder; .* named like a_s001"),
    ],
)
def test_invalid_file_is_an_error(folder, text, message):
    with pytest.raises(UserError, match=message):
        read(folder, text)


def test_file_in_latin_1_is_an_error(folder):
    (folder / "labels.csv").write_bytes("patient,site\na,Genève\n".encode("latin-1"))
    message = r"labels\.csv cannot be read as CSV: its encoding must be UTF-8, got the byte 0xe8$"
    with pytest.raises(UserError, match=message):
        read_labels(folder, [])


def test_selected_categories_are_numbered_anew(folder):
    label = read(folder, "patient,group\na,x\nb,y\nc,z\n")["group"].only(["x", "z"])
    assert label.patients == ("a", "c")
    assert label.category.tolist() == [0, 1]
    assert label.values.dtype == np.float64
