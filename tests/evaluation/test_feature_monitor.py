"""Measures of features during training, on the events of the val patients."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minsae_jax import TrainConfig, UserError, load_sae, train
from minsae_jax.evaluation.events import draw_spans, read_events, tokens_of
from minsae_jax.evaluation.feature_monitor import FeatureMonitor
from minsae_jax.sae.snapshot import Snapshot


def test_best_feature_equals_scipys_u_statistic_and_counted_precision(trained):
    val = trained.dataset("val")
    sae = trained.sae()
    monitor = FeatureMonitor(val)
    is_live = np.ones(sae.d_sae, bool)
    measures = monitor([Snapshot("one", sae, is_live)])
    events = read_events(val.folder)
    whole = val.read(0, len(val.recording))
    compared = 0
    for kind in monitor.kinds:
        scores = []
        is_event = []
        for span in draw_spans(val, events[kind], seed=0):
            sequences, tokens = tokens_of(val, span)
            if len(sequences):
                x = whole[sequences, tokens]
                scores.append(np.asarray(sae.encode(x)).max(axis=0))
                is_event.append(span.is_event)
        scores = np.stack(scores)
        is_event = np.array(is_event)
        u = mannwhitneyu(scores[is_event], scores[~is_event]).statistic
        aucs = u / (is_event.sum() * (~is_event).sum())
        assert measures.metrics["one"][f"{kind}_auc"] == pytest.approx(aucs.max())
        strongest = np.argsort(-scores[:, np.argmax(aucs)], kind="stable")[: is_event.sum()]
        precision = measures.metrics["one"][f"{kind}_precision"]
        assert precision == pytest.approx(is_event[strongest].mean())
        compared += 1
    assert compared > 1
    image = measures.images["strongest_spans"]
    assert image.dtype == np.uint8
    assert image.std() > 1


def test_equal_members_of_two_seeds_are_stable(trained):
    sae = trained.sae()
    other = load_sae(trained.run / "members/lambda=1")
    other.config = other.config | {"seed": 1}
    is_live = np.ones(sae.d_sae, bool)
    snapshots = [Snapshot("a", sae, is_live), Snapshot("b", other, is_live)]
    measures = FeatureMonitor(None)(snapshots)
    assert measures.metrics == {"a": {"stability": 1.0}, "b": {"stability": 1.0}}
    assert not measures.images


@pytest.mark.slow
def test_training_writes_them_to_tensorboard(trained, tmp_path):
    config = TrainConfig(
        store=str(trained.stores),
        run_dir=str(tmp_path / "run"),
        events_path=str(trained.recordings),
        seed=(0, 1),
        lambda_sparsity=(1.0,),
        feature_dim_factor=(0.25,),
        lr=(3e-3,),
        num_steps=20,
        batch_size=256,
        eval_every=10,
    )
    train(config)
    folder = tmp_path / "run/members/lambda=1,seed=1"
    board = EventAccumulator(str(folder)).Reload()
    for name in ("stability", "mean_auc", "mean_precision"):
        scalars = board.Scalars(f"features/{name}")
        assert [scalar.step for scalar in scalars] == [10, 20]
        assert all(0 <= scalar.value <= 1 for scalar in scalars)
    images = EventAccumulator(str(tmp_path / "run"), {"images": 0}).Reload()
    assert len(images.Images("strongest_spans")) == 2


def test_folder_without_events_is_refused(trained, tmp_path):
    recordings = tmp_path / "recordings"
    shutil.copytree(trained.recordings, recordings, ignore=shutil.ignore_patterns("events.csv"))
    run = tmp_path / "run"
    config = TrainConfig(store=str(trained.stores), run_dir=str(run), events_path=str(recordings))
    with pytest.raises(UserError, match=r"--events_path .* has no events\.csv"):
        train(config)
    with pytest.raises(UserError, match="--events_path requires a store of val patients"):
        train(replace(config, eval_every=0))
    assert not run.exists()
