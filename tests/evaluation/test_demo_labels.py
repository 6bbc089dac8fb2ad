"""The demo's planted label, from recordings to q: who has more spindles is found, age is not.

The same patients without the added spindles show which features these affect: the label may be
found by such features only.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control, wilcoxon

import minsae_jax as ms
from convert.encoder import convert_encoder
from minsae_jax.eeg.recordings import LENGTHS
from minsae_jax.evaluation.bootstrap import SHARE, draw_weights, interval
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.evaluation.events import draw_spans, gather, read_events, span_maxima
from minsae_jax.evaluation.label_tests import compare_labels
from minsae_jax.evaluation.labels import PatientLabel, read_labels
from minsae_jax.evaluation.pooling import PatientValues, by_patient, pool
from minsae_jax.evaluation.ranking import weighted_auc
from tests.conftest import FIXTURES

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Planted:
    """60 patients, half of them with more spindles, and that half without those."""

    sae: ms.SparseAutoencoder
    plain: Dataset
    # Share of active tokens of each patient
    with_label: PatientValues
    without: PatientValues
    labels: tuple[PatientLabel, ...]


def keep_changed(folder, labelled):
    """Remove recordings that are the same in both folders."""
    head, *rows = (folder / LENGTHS).read_text().splitlines(keepends=True)
    changed = []
    for row in rows:
        name, _, _ = row.partition(",")
        if (folder / name).read_bytes() == (labelled / name).read_bytes():
            (folder / name).unlink()
        else:
            changed.append(row)
    (folder / LENGTHS).write_text("".join([head, *changed]))


@pytest.fixture(scope="module")
def planted(tmp_path_factory, optimized):
    folder = tmp_path_factory.mktemp("planted")
    encoder, _ = convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")
    for name in ("labelled", "plain"):
        root_path = str(folder / name / "tuhab_preprocessed")
        demo = ms.DemoConfig(root_path=root_path, patients=60, minutes=3.0)
        ms.write_demo(replace(demo, labels=name == "labelled"))
        if name == "plain":
            keep_changed(Path(root_path), folder / "labelled/tuhab_preprocessed")
        extract_config = ms.ExtractConfig(
            root_path=root_path,
            checkpoint_path="unused",
            batch_size=8,
            out=str(folder / f"store_{name}"),
            split=("all",),
        )
        ms.extract(encoder, extract_config)
    train_config = ms.TrainConfig(
        store=str(folder / "store_labelled"),
        run_dir=str(folder / "run"),
        kind=("batchtopk",),
        k=(8.0,),
        feature_dim_factor=(2.0,),
        lr=(3e-3,),
        num_steps=400,
        batch_size=1024,
        eval_every=0,
        mesh="1x1",
    )
    ms.train(train_config, encoder)
    sae = ms.load_sae(next((folder / "run/members").iterdir()))
    datasets = {}
    values = {}
    for name in ("labelled", "plain"):
        recordings = folder / name / "tuhab_preprocessed"
        datasets[name] = open_dataset(folder / f"store_{name}", -1, encoder, recordings)
        pooled = pool(datasets[name], sae)
        values[name] = by_patient(pooled.recordings, pooled.values("active"))
    labels = read_labels(datasets["labelled"].folder, datasets["labelled"].recordings)
    yield Planted(sae, datasets["plain"], values["labelled"], values["plain"], labels)
    shutil.rmtree(folder)  # 0.5 GB


def test_more_spindles_are_found_by_features_that_respond_to_them(planted):
    tests = {
        result.label: result.test for result in compare_labels(planted.with_label, planted.labels)
    }
    found = tests["more_spindles"].significant()
    assert len(found) >= 3
    assert (tests["more_spindles"].effect[found] > 0.5).all()
    assert len(tests["age"].significant()) == len(tests["sex"].significant()) == 0

    # What the added spindles do to each feature, in patients who differ in nothing else
    rise = planted.with_label.of(planted.without.patients) - planted.without.values
    assert len(rise) == 30
    p = np.ones(rise.shape[1])
    is_changed = np.abs(rise).sum(axis=0) > 0
    p[is_changed] = wilcoxon(rise[:, is_changed], axis=0, zero_method="zsplit").pvalue
    responds = (false_discovery_control(p) < 0.05) & (rise.mean(axis=0) > 0)
    assert responds.mean() < 0.3
    # q < 0.05 allows some others; which ones, rounding in training decides.
    assert (~responds[found]).sum() <= binom.ppf(0.99, len(found), 0.05)

    # And they detect spindles one by one.
    events = read_events(planted.plain.folder)["spindle"]
    spans = gather(planted.plain, draw_spans(planted.plain, events, 0))
    scores = span_maxima(planted.sae, spans)
    n_patients = len(planted.plain.recordings)
    weights = draw_weights(n_patients, seed=0)
    for feature in found[responds[found]]:
        aucs = weighted_auc(scores[:, feature], spans.is_event, spans.recording, weights)
        assert interval(aucs, n_patients, SHARE).low > 0.5


def test_random_labels_are_found_at_the_nominal_rate(planted):
    """Of 100 labels that say nothing, about 5 % may have any feature at q < 0.05."""
    label = next(label for label in planted.labels if label.name == "more_spindles")
    rng = np.random.default_rng(0)
    shuffled = [replace(label, values=rng.permutation(label.values)) for _ in range(100)]
    results = compare_labels(planted.with_label, shuffled)
    n_found = sum(len(result.test.significant()) > 0 for result in results)
    assert n_found <= binom.ppf(0.99, 100, 0.05)
    # Without a correction, 5 % of the tests of features that vary
    p = np.stack([result.test.p for result in results])
    varies = np.ptp(planted.with_label.values, axis=0) > 0
    assert (p[:, varies] < 0.05).mean() == pytest.approx(0.05, abs=0.015)
