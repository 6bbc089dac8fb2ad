"""Associations of features with labels, on planted stores of val and test patients."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax.evaluation.associations import NO_PROBE, measure_associations
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.members import Member
from tests.evaluation.planted import (
    TOKENS,
    draw_codes,
    draw_dictionary,
    make_places,
    true_autoencoder,
    write_planted,
)

N_PATIENTS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs whose val patients are in another folder and have the names of the test patients."""
    rng = np.random.default_rng(0)
    dictionary = draw_dictionary(rng, 4, 8)
    places = make_places(N_PATIENTS, 2)
    datasets = {}
    for split in ("val", "test"):
        folder = tmp_path_factory.mktemp(split)
        datasets[split] = write_planted(folder, draw_codes(rng, places, 4) @ dictionary, places)
    rows = "".join(f"p{i:03d},{i % 2}\n" for i in range(N_PATIENTS))
    (datasets["test"].folder / "labels.csv").write_text(f"patient,group\n{rows}")
    member = Member("planted", true_autoencoder(dictionary))
    folder = tmp_path_factory.mktemp("run")
    return EvaluationInputs(folder, folder, None, (member,), events=None, train=None, **datasets)


def test_labels_are_of_the_patients_in_their_folder(inputs):
    associations = measure_associations(inputs, inputs.members[0], "mean", seed=0)
    (group,) = associations.labels
    assert associations.recordings == inputs.test.recordings
    assert group.test.n_patients == (6, 6)
    values = np.zeros((N_PATIENTS, 4))
    for patient in range(N_PATIENTS):
        names = [name.startswith(f"p{patient:03d}") for name in inputs.test.recordings]
        by_recording = []
        for recording in np.flatnonzero(names).tolist():
            x = inputs.test.read(*inputs.test.sequences_of(recording))
            features = np.asarray(inputs.members[0].sae.encode(x))
            by_recording.append(features.mean((0, 1)))
        values[patient] = np.mean(by_recording, axis=0)
    higher = values[1::2, None] - values[None, ::2]
    expected = (np.sign(higher) / 2 + 0.5).mean((0, 1))
    np.testing.assert_allclose(group.test.effect, expected, atol=1e-9)
    assert group.probe is None
    assert group.notes[-1] == f"no probe: {NO_PROBE}"


def test_val_patients_in_the_test_store_are_counted_once(inputs):
    alone = measure_associations(inputs, inputs.members[0], "mean", seed=0)
    both = measure_associations(replace(inputs, val=inputs.test), inputs.members[0], "mean", seed=0)
    assert both.recordings == alone.recordings
    np.testing.assert_allclose(both.labels[0].test.effect, alone.labels[0].test.effect)


def test_probe_on_raw_dimensions_does_not_depend_on_their_mean(tmp_path):
    """By default it pools the share of active tokens, and these dimensions are never below 0."""
    rng = np.random.default_rng(0)
    datasets = {}
    for split, first_patient in (("val", 0), ("test", 50)):
        places = make_places(N_PATIENTS, 6, first_patient)
        x = rng.normal(size=(len(places.recording), TOKENS, 4)) + 50
        x[..., 0] += places.patient[:, None] % 2
        datasets[split] = write_planted(tmp_path, x, places, split)
    rows = "".join(f"p{i:03d},{i % 2}\n" for i in range(100))
    (datasets["test"].folder / "labels.csv").write_text(f"patient,group\n{rows}")
    sae = true_autoencoder(np.eye(4))
    inputs = EvaluationInputs(
        tmp_path, tmp_path, None, (Member("sae", sae),), events=None, train=None, **datasets
    )
    (group,) = measure_associations(inputs, inputs.members[0], "active", seed=0).labels
    assert group.probe.features.score == 0.5
    assert group.probe.raw.score == 1
    assert 0 in group.probe.raw.features


def test_without_a_file_there_are_no_labels(inputs, tmp_path):
    labels = inputs.test.folder / "labels.csv"
    moved = labels.rename(tmp_path / "labels.csv")
    associations = measure_associations(inputs, inputs.members[0], "mean", seed=0)
    moved.rename(labels)
    assert associations.labels == ()
    assert len(associations.variance.patient) == 4
