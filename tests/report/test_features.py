"""Features as arrays and a table."""

import numpy as np

from minsae_jax.report.features import COLUMNS, load_features


def test_load_features(trained):
    member, store = trained.run / "members/lambda=1", trained.stores.with_name("store_test")
    found = load_features(member, store, trained.recordings, trained.encoder, layer=-1, w=1, top=4)
    rows = found.table()
    assert len(rows) == 64
    assert tuple(rows[0]) == COLUMNS
    density = [row["density"] for row in rows]
    assert density == sorted(density, reverse=True)
    assert found.activity.top.activation.shape == (64, 4)
    best = rows[0]["id"]
    assert (
        rows[0]["max"]
        == found.activity.top.activation[best, 0]
        == found.describe(best)["examples"][0]["activation"]
    )
    np.testing.assert_allclose(
        rows[0]["density"], found.activity.active[best] / found.activity.n_tokens
    )
