"""Agreement between seeds in cases that can be counted by hand."""

import numpy as np

from minsae_jax import SparseAutoencoder
from minsae_jax.evaluation.agreement import seed_agreement
from minsae_jax.evaluation.inputs import Member


def make_member(name, decoder, seed, k=2.0):
    decoder = np.asarray(decoder, np.float32)
    d_sae, d_model = decoder.shape
    params = {"W_enc": decoder.T, "b_enc": np.zeros(d_sae), "W_dec": decoder}
    params |= {"b_dec": np.zeros(d_model), "k": np.float32(k)}
    config = {"kind": "topk", "k": k, "seed": seed, "d_sae": d_sae}
    return Member(name, SparseAutoencoder(params, config))


def test_share_of_live_features_found_again():
    x, y, z = np.eye(3)
    members = [
        make_member("a", [x, y, z], 0),
        make_member("b", [5 * x, -y, x + y], 1),
        make_member("c", [x, y, z], 0, k=3.0),
    ]
    all_live = {name: np.ones(3, bool) for name in "abc"}
    # x of a is a row of b and the other way round; nothing else is, since y and -y are opposite.
    assert seed_agreement(members, all_live) == {"a": 1 / 3, "b": 1 / 3}
    # Dead features neither count nor match: 2 of a.
    live = all_live | {"a": np.array([True, False, False])}
    assert seed_agreement(members, live)["b"] == np.mean([1, 1 / 3])
    none_live = all_live | {"a": np.zeros(3, bool)}
    assert seed_agreement(members, none_live) == {}
    assert seed_agreement(members[:1], all_live) == {}


def test_average_over_ordered_pairs_of_three_seeds():
    x, y, z = np.eye(3)
    members = [
        make_member("a", [x, y], 0),
        make_member("b", [x, z], 1),
        make_member("c", [x, x], 2),
    ]
    live = {name: np.ones(2, bool) for name in "abc"}
    # Shares of a in b, a in c, b in a, b in c, c in a, c in b
    expected = np.mean([1 / 2, 1 / 2, 1 / 2, 1 / 2, 1, 1])
    assert seed_agreement(members, live) == dict.fromkeys("abc", expected)
