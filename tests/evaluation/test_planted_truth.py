"""Planted truth: a sweep trained on known sparse codes, and labels with known effects."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind

import minsae_jax as ms
from minsae_jax import SparseAutoencoder
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.inputs import Member, open_members
from minsae_jax.evaluation.label_tests import compare_labels
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.pooling import Pooled, by_patient, pool
from minsae_jax.evaluation.stability import match_directions, seed_stability, unit_rows
from minsae_jax.evaluation.variance import variance_shares
from tests.evaluation.planted import (
    draw_codes,
    draw_dictionary,
    make_places,
    true_autoencoder,
    write_planted,
)

N_TRUE = 48
D_MODEL = 32


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
def planted(tmp_path_factory):
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
        kind=("topk",),
        k=(4.0,),
        seed=(0, 1, 2),
        feature_dim_factor=(2.0,),
        lr=(3e-3,),
        num_steps=1500,
        batch_size=512,
        eval_every=0,
    )
    ms.train(config)
    members = open_members(folder / "run", None)
    return Planted(members, dictionary, test, codes.reshape(-1, N_TRUE))


def test_sweep_recovers_the_dictionary(planted):
    """Matched decoder rows point along the true ones, and are active where the codes are."""
    x = planted.test.read(0, len(planted.test.recording)).reshape(-1, D_MODEL)
    for member in planted.members:
        match = match_directions(planted.dictionary, member.sae.unit_directions)
        cosine = (planted.dictionary * member.sae.unit_directions[match]).sum(1)
        assert cosine.mean() > 0.95
        # A true code is found if it is more than a tenth of its mean.
        active = np.asarray(member.sae.encode(x))[:, match] > 0.1
        is_true = planted.codes > 0.1
        n_both = (active & is_true).sum()
        f1 = 2 * n_both / (active.sum() + is_true.sum())
        print(member.name, "cosine", cosine.mean(), "f1", f1)
        assert f1 > 0.95


def test_true_features_are_those_that_reappear(planted):
    is_live = {member.name: planted.is_live(member.sae) for member in planted.members}
    stability = seed_stability(planted.members, is_live)
    for member in planted.members:
        result = stability[member.name]
        n_seeds = result.seeds_with()
        match = match_directions(planted.dictionary, member.sae.unit_directions)
        is_true = np.zeros(member.sae.d_sae, bool)
        is_true[match] = True
        stable = n_seeds == 3
        f1 = 2 * (stable & is_true).sum() / (stable.sum() + is_true.sum())
        print(
            member.name,
            "stable",
            stable.sum(),
            "live",
            is_live[member.name].sum(),
            "f1",
            f1,
            "similarity",
            result.similarity[:, is_true].mean(),
            "chance",
            result.chance.mean(),
        )
        assert f1 > 0.95
        assert result.similarity[:, is_true].mean() > 0.95
        assert result.share_by_chance() < 0.05
