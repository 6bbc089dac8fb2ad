"""The demo's planted label, from recordings to q: who has more spindles is found, age is not."""

import pytest

import minsae_jax as ms
from convert.encoder import convert_encoder
from minsae_jax.evaluation.dataset import open_dataset
from minsae_jax.evaluation.events import auc, draw_spans, gather, read_events, span_maxima
from minsae_jax.evaluation.label_tests import compare_labels
from minsae_jax.evaluation.labels import read_labels
from minsae_jax.evaluation.pooling import by_patient, pool
from tests.conftest import FIXTURES


@pytest.mark.slow
def test_more_spindles_are_found_by_features_of_spindles(tmp_path):
    root_path = str(tmp_path / "tuhab_preprocessed")
    ms.write_demo(ms.DemoConfig(root_path=root_path, patients=60, minutes=3.0, labels=True))
    encoder, _ = convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")
    store = str(tmp_path / "store")
    extract_config = ms.ExtractConfig(
        root_path=root_path, checkpoint_path="unused", batch_size=8, out=store, split=("all",)
    )
    ms.extract(encoder, extract_config)
    train_config = ms.TrainConfig(
        store=store,
        run_dir=str(tmp_path / "run"),
        kind=("batchtopk",),
        k=(8.0,),
        feature_dim_factor=(2.0,),
        lr=(3e-3,),
        num_steps=400,
        batch_size=1024,
        eval_every=0,
    )
    ms.train(train_config, encoder)
    sae = ms.load_sae(next((tmp_path / "run/members").iterdir()))
    dataset = open_dataset(store, -1, encoder, root_path)
    pooled = pool(dataset, sae)
    labels = read_labels(dataset.folder, pooled.recordings)
    values = by_patient(pooled.recordings, pooled.active)
    tests = {result.label: result.test for result in compare_labels(values, labels)}
    aucs = {}
    for kind, events in read_events(dataset.folder).items():
        spans = gather(dataset, draw_spans(dataset, events, 0))
        scores = span_maxima(sae, spans)
        aucs[kind] = auc(scores, spans.is_event)
    found = tests["more_spindles"].significant()
    assert len(found) > 0
    assert len(tests["age"].significant()) == len(tests["sex"].significant()) == 0
    # The clearest feature is one of spindles, and the others detect them better than features do.
    clearest = found[0]
    assert tests["more_spindles"].effect[clearest] > 0.8
    assert max(aucs, key=lambda kind: aucs[kind][clearest]) == "spindle"
    assert aucs["spindle"][found].mean() > aucs["spindle"].mean()
