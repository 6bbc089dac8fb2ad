"""Features as arrays and tables."""

import csv
import io

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.report.features import COLUMNS, load_features


def test_load_features(trained):
    member = trained.run / "members/lambda=1"
    store = trained.stores.with_name("store_test")
    features = load_features(
        member, store, trained.recordings, trained.encoder, layer=-1, w=1, top=4
    )
    rows = features.table()
    n_tokens = features.activity.n_tokens
    assert repr(features) == f"Features(64 features, {n_tokens} tokens)"  # no arrays, in a notebook
    assert len(rows) == 64
    assert tuple(rows[0]) == COLUMNS
    density = [row["density"] for row in rows]
    assert density == sorted(density, reverse=True)
    assert features.activity.top.activation.shape == (64, 4)
    best = rows[0]["id"]
    examples = features.describe(best).examples
    described = f"FeatureCard({best}, {rows[0]['suggestion']}, {len(examples)} examples)"
    assert repr(features.describe(best)) == described
    strongest = examples[0].activation
    assert rows[0]["max"] == features.activity.top.activation[best, 0] == strongest
    share = features.activity.active[best] / features.activity.n_tokens
    np.testing.assert_allclose(rows[0]["density"], share)
    table = features.examples_table(best)
    assert [row["activation"] for row in table] == [example.activation for example in examples]
    for row, example in zip(table, examples, strict=True):
        if example.patch:
            assert (row["start"], row["stop"]) == example.patch
        assert all(event.kind in row["events"] for event in example.events)
        assert row["other_features"].count(";") == max(0, len(example.other_features) - 1)
    for unknown in (-1, 64):
        with pytest.raises(UserError, match="it has the features 0 to 63"):
            features.examples_table(unknown)
    # As CSV and back.
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)
    read = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [float(row["activation"]) for row in read] == [row["activation"] for row in table]
    assert {row["recording"] for row in read} <= set(features.context.dataset.recordings)
