"""Planted truth: a sweep trained on known sparse codes, and labels with known effects."""

from dataclasses import dataclass

import numpy as np
import pytest

import minsae_jax as ms
from minsae_jax import SparseAutoencoder
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.label_tests import compare_labels
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.members import Member, open_members
from minsae_jax.evaluation.pooling import Pooled, by_patient, pool
from minsae_jax.evaluation.stability import MIN_COSINE, match_directions, seed_stability
from minsae_jax.evaluation.variance import variance_shares
from tests.evaluation.planted import (
    draw_codes,
    draw_dictionary,
    make_places,
    true_autoencoder,
    write_planted,
)

N_TRUE = 48
D_MODEL = 64


@dataclass(frozen=True)
class Planted:
    """A sweep of three seeds, the dictionary of its tokens, and test tokens with their codes."""

    members: tuple[Member, ...]
    dictionary: np.ndarray
    test: Dataset
    codes: np.ndarray  # [tokens, N_TRUE]

    def is_live(self, sae: SparseAutoencoder) -> np.ndarray:
        x = self.test.read(0, len(self.test.recording))
        return (np.asarray(sae.encode(x)) > 0).any((0, 1))


@pytest.fixture(scope="module")
def planted(tmp_path_factory, optimized):
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    dictionary = draw_dictionary(rng, N_TRUE, D_MODEL)
    train_places = make_places(12, 120)
    write_planted(folder, draw_codes(rng, train_places, N_TRUE) @ dictionary, train_places, "train")
    places = make_places(6, 40, first_patient=100)
    codes = draw_codes(rng, places, N_TRUE)
    test = write_planted(folder, codes @ dictionary, places, "test")
    config = ms.TrainConfig(
        store=str(folder / "store"),
        run_dir=str(folder / "run"),
        kind=("batchtopk",),
        k=(2.4,),
        seed=(0, 1, 2),
        feature_dim_factor=(1.5,),
        lr=(3e-3,),
        num_steps=600,
        batch_size=512,
        eval_every=0,
        mesh="1x1",
    )
    ms.train(config)
    members = open_members([folder / "run"])
    return Planted(members, dictionary, test, codes.reshape(-1, N_TRUE))


@pytest.mark.slow
def test_sweep_recovers_the_dictionary(planted):
    """Matched decoder rows point along the true ones, and are active where the codes are."""
    x = planted.test.read(0, len(planted.test.recording)).reshape(-1, D_MODEL)
    for member in planted.members:
        match = match_directions(planted.dictionary, member.sae.unit_directions)
        cosine = (planted.dictionary * member.sae.unit_directions[match]).sum(1)
        assert cosine.mean() > 0.95
        # In the unit of the codes, of which the smallest is 0.5.
        norms = np.linalg.norm(member.sae.decoder_directions[match], axis=1)
        active = np.asarray(member.sae.encode(x))[:, match] * norms > 0.25
        is_true = planted.codes > 0.25
        n_both = (active & is_true).sum()
        f1 = 2 * n_both / (active.sum() + is_true.sum())
        assert f1 > 0.95


@pytest.mark.slow
def test_true_features_are_those_that_reappear(planted):
    is_live = {member.name: planted.is_live(member.sae) for member in planted.members}
    stability = seed_stability(planted.members, is_live)
    for member in planted.members:
        result = stability[member.name]
        n_others = (result.decoder_cosine > MIN_COSINE).sum(axis=0)
        match = match_directions(planted.dictionary, member.sae.unit_directions)
        is_true = np.zeros(member.sae.d_sae, bool)
        is_true[match] = True
        stable = n_others == 2
        f1 = 2 * (stable & is_true).sum() / (stable.sum() + is_true.sum())
        assert f1 > 0.95
        assert result.decoder_cosine[:, is_true].mean() > 0.95
        assert result.share_by_chance() < 0.05


N_LABEL_FEATURES = 20


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """Forty patients; half of them have more of features 2 and 5, one has feature 9 always on."""
    rng = np.random.default_rng(3)
    places = make_places(40, 20)
    codes = draw_codes(rng, places, N_LABEL_FEATURES)
    has_more = places.patient % 4 < 2
    for feature in (2, 5):
        extra = draw_codes(rng, places, 1)[..., 0]
        codes[has_more, :, feature] += extra[has_more]
    codes[places.patient == 7, :, 9] += 3
    dictionary = np.linalg.qr(rng.normal(size=(32, N_LABEL_FEATURES)))[0].T
    # The codes are sparse, so that a small bias removes the rounding of products.
    sae = true_autoencoder(dictionary)
    sae.params["b_enc"] -= 1e-4
    dataset = write_planted(tmp_path_factory.mktemp("label"), codes @ dictionary, places)
    return pool(dataset, sae)


def label_of(pooled: Pooled, is_second) -> PatientLabel:
    patients = by_patient(pooled.recordings, pooled.mean).patients
    numbers = np.array([int(patient[1:]) for patient in patients])
    return PatientLabel("label", patients, is_second(numbers).astype(float), ("no", "yes"))


@pytest.mark.parametrize("pooling", ["mean", "active"])
def test_planted_label_is_found_by_its_features_only(pooled, pooling):
    label = label_of(pooled, lambda patient: patient % 4 < 2)
    (result,) = compare_labels(by_patient(pooled.recordings, pooled.values(pooling)), [label])
    assert set(result.test.significant().tolist()) == {2, 5}
    assert (result.test.effect[[2, 5]] > 0.8).all()


def test_effect_of_one_patient_is_flagged_and_is_not_a_label_effect(pooled):
    shares = variance_shares(pooled)
    assert np.flatnonzero(shares.patient > 0.3).tolist() == [9]
    assert shares.top_patient[9] == "p007"
    # The patient's tokens would give any label that it has a p of nearly 0.
    for is_second in (lambda patient: patient % 2 == 1, lambda patient: patient < 20):
        for pooling in ("mean", "maximum", "active"):
            values = by_patient(pooled.recordings, pooled.values(pooling))
            (result,) = compare_labels(values, [label_of(pooled, is_second)])
            assert result.test.p[9] > 0.05


def test_random_labels_are_found_at_the_nominal_rate(pooled):
    """One hundred random labels, of which 5 % may have any feature at q < 0.05."""
    rng = np.random.default_rng(4)
    values = by_patient(pooled.recordings, pooled.mean)
    halves = np.arange(40) % 2
    labels = [label_of(pooled, lambda patient: rng.permutation(halves)) for _ in range(100)]
    n_found = sum(len(r.test.significant()) > 0 for r in compare_labels(values, labels))
    assert n_found <= 10
