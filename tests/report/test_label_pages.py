"""Pages of labels, made from a labels.csv."""

import numpy as np

from minsae_jax.evaluation.associations import measure_associations
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.members import Member
from minsae_jax.report.label_pages import label_page
from tests.evaluation.planted import (
    draw_codes,
    draw_dictionary,
    make_places,
    true_autoencoder,
    write_planted,
)


def page_of(folder, dictionary, dataset, name):
    """Return the page of a label of a store without val patients."""
    member = Member("planted", true_autoencoder(dictionary))
    inputs = EvaluationInputs(folder, folder, None, (member,), dataset, None, None, None)
    associations = measure_associations(inputs, member, "mean", seed=0)
    pages = {label.label.name: label_page(label, associations) for label in associations.labels}
    return pages[name]


def test_patients_and_recordings_are_those_that_are_tested(tmp_path):
    """Patients have one or two recordings in turn; p006 has a rare drug, p007 and p008 none."""
    rng = np.random.default_rng(0)
    dictionary = np.eye(4, 8)
    places = make_places(9, 2)
    codes = draw_codes(rng, places, 4)
    # A feature that is never active is not tested.
    codes[..., 3] = 0
    dataset = write_planted(tmp_path, codes @ dictionary, places)
    rows = [f"p{i:03d},{drug}" for i, drug in enumerate([*"aaabbbc", "n/a", ""])]
    (dataset.folder / "labels.csv").write_text("\n".join(["patient,drug", *rows]))
    page = page_of(tmp_path, dictionary, dataset, "drug")
    assert (page.patients, page.recordings, len(dataset.recordings)) == (6, 9, 13)
    assert page.n_tested == 3


def test_pages_of_labels_without_values_and_of_ambiguous_patients(tmp_path):
    """`empty` has no value at all, `other` none of these patients; p001 has two recordings."""
    rng = np.random.default_rng(0)
    dictionary = draw_dictionary(rng, 4, 8)
    places = make_places(3, 2)
    dataset = write_planted(tmp_path, draw_codes(rng, places, 4) @ dictionary, places)
    names = dataset.recordings
    lengths = dataset.folder / "file_lengths_map.csv"
    lengths.write_text(f"{lengths.read_text()}p009_s001_t000.npy,9\n")
    rows = [f"{name},,,{drug}" for name, drug in zip(names, "abca", strict=True)]
    text = "\n".join(["recording,empty,other,drug", *rows, "p009_s001_t000.npy,,7.5,a"])
    (dataset.folder / "labels.csv").write_text(text)
    for name in ("empty", "other"):
        page = page_of(tmp_path, dictionary, dataset, name)
        assert (page.patients, page.recordings, page.values) == (0, 0, "none")
        assert page.notes[0] == "not tested: patients with a value: 0, at least 3 needed"
    drug = page_of(tmp_path, dictionary, dataset, "drug")
    assert drug.values == "a 2, b 0, c 0"
    assert sum("several categories" in note for note in drug.notes) == 1
