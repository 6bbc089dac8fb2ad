"""Features as arrays and a table."""

import numpy as np

from minsae_jax.report.features import COLUMNS, load_features


def test_load_features(trained):
    member = trained.run / "members/lambda=1"
    store = trained.stores.with_name("store_test")
    features = load_features(
        member, store, trained.recordings, trained.encoder, layer=-1, w=1, top=4
    )
    rows = features.table()
    assert len(rows) == 64
    assert tuple(rows[0]) == COLUMNS
    density = [row["density"] for row in rows]
    assert density == sorted(density, reverse=True)
    assert features.activity.top.activation.shape == (64, 4)
    best = rows[0]["id"]
    strongest = features.describe(best).examples[0].activation
    assert rows[0]["max"] == features.activity.top.activation[best, 0] == strongest
    share = features.activity.active[best] / features.activity.n_tokens
    np.testing.assert_allclose(rows[0]["density"], share)
