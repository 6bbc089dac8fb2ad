"""Stability between seeds: counted by hand, against the dense assignment, and on planted truth."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from minsae_jax import SparseAutoencoder
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.stability import (
    MIN_COSINE,
    match_directions,
    matched_cosines,
    random_directions,
    seed_stability,
)
from minsae_jax.sae.member import unit_rows


def make_member(name, decoder, seed, k=2.0, encoder=None, folder=None):
    decoder = np.asarray(decoder, np.float32)
    encoder = decoder if encoder is None else np.asarray(encoder, np.float32)
    d_sae, d_model = decoder.shape
    params = {"W_enc": encoder.T, "b_enc": np.zeros(d_sae), "W_dec": decoder}
    params |= {"b_dec": np.zeros(d_model), "k": np.float32(k)}
    config = {"kind": "topk", "k": k, "seed": seed, "d_sae": d_sae}
    return Member(name, SparseAutoencoder(params, config), folder)


def test_share_of_live_features_that_reappear():
    x, y, z = np.eye(3)
    members = [
        make_member("a", [x, y, z], 0),
        make_member("b", [5 * x, -y, x + y], 1),
        make_member("c", [x, y, z], 0, k=3.0),
    ]
    all_live = {name: np.ones(3, bool) for name in "abc"}
    stability = seed_stability(members, all_live)
    assert set(stability) == {"a", "b"}  # c has no partner
    # x is in both; y matches x + y at cos 45° = 0.707; y and -y are opposite.
    assert stability["a"].match.tolist() == [[0, 2, -1]]
    assert stability["b"].match.tolist() == [[0, -1, 1]]
    np.testing.assert_allclose(stability["a"].decoder_cosine, [[1, np.sqrt(0.5), 0]], atol=1e-6)
    assert stability["a"].share() == stability["b"].share() == pytest.approx(2 / 3)


def test_only_members_of_one_run_with_a_known_seed_are_partners():
    """Other settings of two runs, and of two imported SAEs, can differ too."""
    x, y, _ = np.eye(3)
    of_a, of_b = Path("a/members/m"), Path("b/members/m")
    members = [
        make_member("a0", [x, y], 0, folder=of_a),
        make_member("a1", [y, x], 1, folder=of_a),
        make_member("b2", [x, y], 2, folder=of_b),
        make_member("no seed", [x, y], None, folder=of_a),
        make_member("no seed either", [x, y], None, folder=of_a),
    ]
    stability = seed_stability(members, {member.name: np.ones(2, bool) for member in members})
    assert {name: one.others for name, one in stability.items()} == {"a0": ("a1",), "a1": ("a0",)}


def test_copies_of_a_member_are_not_other_seeds():
    x, y, _ = np.eye(3)
    folder = Path("imported/m")
    members = [
        make_member("original", [x, y], 0, folder=folder),
        make_member("copy", [x, y], 0, folder=folder),
    ]
    assert seed_stability(members, {member.name: np.ones(2, bool) for member in members}) == {}


def test_dead_features_neither_count_nor_match():
    x, y, z = np.eye(3)
    members = [make_member("a", [x, y, z], 0), make_member("b", [z, x, y], 1)]
    is_live = {"a": np.array([True, True, False]), "b": np.array([True, True, False])}
    stability = seed_stability(members, is_live)
    assert stability["a"].match.tolist() == [[1, -1, -1]]
    assert stability["a"].share() == 0.5
    assert np.isnan(stability["a"].decoder_cosine[0, 2])
    # A member without any live feature has no stability, and nor has its only partner.
    assert seed_stability(members, is_live | {"a": np.zeros(3, bool)}) == {}


def test_weights_of_zero_have_no_share():
    """Of a member whose decoder is 0, whose features add nothing to x̂."""
    x, y = np.eye(2)
    members = [make_member("a", [x, y], 0), make_member("b", [x, y], 1)]
    stability = seed_stability(members, {"a": np.ones(2, bool), "b": np.ones(2, bool)})
    assert np.isnan(stability["a"].share(weights=np.zeros(2)))
    assert stability["a"].share(weights=np.array([0, 1.0])) == 1


def test_one_feature_is_not_the_match_of_two():
    x, y = np.eye(2)
    members = [make_member("a", [x, x], 0), make_member("b", [x, y], 1)]
    stability = seed_stability(members, {"a": np.ones(2, bool), "b": np.ones(2, bool)})
    assert stability["a"].share() == 0.5


def test_encoder_is_reported_and_does_not_decide():
    x, y = np.eye(2)
    members = [
        make_member("a", [x, y], 0),
        make_member("b", [y, x], 1, encoder=[y, 2 * y]),
    ]
    stability = seed_stability(members, {"a": np.ones(2, bool), "b": np.ones(2, bool)})["a"]
    assert stability.match.tolist() == [[1, 0]]
    np.testing.assert_allclose(stability.decoder_cosine, [[1, 1]], atol=1e-6)
    np.testing.assert_allclose(stability.encoder_cosine, [[0, 1]], atol=1e-6)


def test_share_by_weight():
    x, y = np.eye(2)
    members = [make_member("a", [x, y], 0), make_member("b", [x, -y], 1)]
    stability = seed_stability(members, {"a": np.ones(2, bool), "b": np.ones(2, bool)})["a"]
    assert stability.share() == 0.5
    assert stability.share(weights=np.array([3.0, 1.0])) == 0.75


@pytest.mark.parametrize("is_random", [False, True])
def test_matching_by_candidates_is_the_dense_assignment(is_random):
    rng = np.random.default_rng(3)
    a = unit_rows(rng.normal(size=(500, 24)))
    noise = rng.normal(size=a.shape)
    b = unit_rows(noise if is_random else a + 0.15 * noise)[rng.permutation(500)[:400]]
    match = match_directions(a, b)
    matched = match[match >= 0]
    assert len(set(matched.tolist())) == len(matched)
    cosine = np.maximum(a @ b.T, 0)
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    total = cosine[match >= 0, matched].sum()
    assert total == pytest.approx(cosine[rows, columns].sum(), rel=1e-6)


def planted_members(n_features=256, d_model=64, noise=0.1, shared=192):
    """Three seeds in random order: `shared` features of a dictionary, others drawn for each."""
    rng = np.random.default_rng(0)
    truth = unit_rows(rng.normal(size=(shared, d_model)))
    members = []
    for seed in range(3):
        own = rng.normal(size=(n_features - shared, d_model))
        rows = np.concatenate([truth, unit_rows(own)])
        noisy = rows + noise / np.sqrt(d_model) * rng.normal(size=rows.shape)
        order = rng.permutation(n_features)
        members.append((make_member(f"seed={seed}", noisy[order], seed), order < shared))
    return members


def test_planted_features_are_separated_from_those_of_one_seed():
    planted = planted_members()
    all_live = {member.name: np.ones(256, bool) for member, _ in planted}
    stability = seed_stability([member for member, _ in planted], all_live)
    for member, is_shared in planted:
        result = stability[member.name]
        assert result.n_seeds == 3
        n_others = (result.decoder_cosine > MIN_COSINE).sum(axis=0)
        assert (n_others[is_shared] == 2).all()
        assert (n_others[~is_shared] == 0).all()
        assert result.share() == pytest.approx(192 / 256)
        assert result.decoder_cosine[:, is_shared].mean() > 0.95
        assert result.share_by_chance() == 0


def test_random_directions_have_the_second_moments_of_the_features():
    rng = np.random.default_rng(1)
    # Features in a subspace of 3 of 32 dimensions, where chance is high.
    decoder = rng.normal(size=(2000, 3)) @ rng.normal(size=(3, 32))
    directions = unit_rows(decoder)
    random = random_directions(directions, rng)
    np.testing.assert_allclose(np.linalg.norm(random, axis=1), 1, rtol=1e-5)
    moments = directions.T @ directions / len(directions)
    np.testing.assert_allclose(random.T @ random / len(random), moments, atol=0.03)
    members = [make_member(f"{i}", rng.permutation(decoder), i) for i in range(2)]
    stability = seed_stability(members, {str(i): np.ones(2000, bool) for i in range(2)})["0"]
    assert stability.share() == 1
    # Any direction is near some other: the control shows that the share means little here.
    assert stability.share_by_chance() > 0.9


def test_random_directions_have_the_mean_of_the_features():
    """All features are near one direction: any other set of such features matches."""
    rng = np.random.default_rng(2)
    mean = np.sqrt(0.8) * np.eye(32)[0]
    sets = [unit_rows(mean + np.sqrt(0.2 / 32) * rng.normal(size=(300, 32))) for _ in range(2)]
    random = random_directions(sets[0], rng)
    np.testing.assert_allclose(random.mean(0), sets[0].mean(0), atol=0.05)
    for other in (sets[1], random):
        cosines = matched_cosines(sets[0], other, match_directions(sets[0], other))
        assert (cosines > 0.7).mean() == 1
