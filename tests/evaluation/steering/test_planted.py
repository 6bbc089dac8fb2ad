"""Steering on the demo, whose events are planted: the alpha feature acts on alpha."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from convert.encoder import convert_encoder
from minsae_jax.eeg.synthetic import DemoConfig, write_demo
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.extract import extract
from minsae_jax.evaluation.config import EvaluateConfig, parse_bands
from minsae_jax.evaluation.events import draw_spans, gather, span_maxima
from minsae_jax.evaluation.inputs import open_inputs
from minsae_jax.evaluation.steering.steer import steer_best
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train

DEMO = Path(__file__).parents[3] / "configs/demo"
SCALES = (0.0, 2.0, 5.0)
BANDS = parse_bands(EvaluateConfig.bands)


@pytest.fixture(scope="module")
def best(tmp_path_factory, optimized):
    """Steering of the best feature of alpha: kind -> Steering."""
    folder = tmp_path_factory.mktemp("planted")
    root_path = str(folder / "tuhab_preprocessed")
    write_demo(DemoConfig(root_path=root_path, patients=16, minutes=2.0))
    encoder, _ = convert_encoder(DEMO / "encoder.pth", DEMO / "encoder.yaml")
    store = str(folder / "store")
    splits = ("train", "val", "test")
    extract(encoder, ExtractConfig(root_path=root_path, split=splits, out=store, batch_size=32))
    train_settings = TrainConfig(
        store=store,
        run_dir=str(folder / "run"),
        kind=("matryoshka",),
        lambda_sparsity=(),
        k=(4.0,),
        feature_dim_factor=(2.0,),
        lr=(1e-2,),
        num_steps=400,
        batch_size=512,
        eval_every=0,
        mesh="1x1",
    )
    train(train_settings, encoder.fingerprint)
    settings = EvaluateConfig(run=str(folder / "run"), root_path=root_path)
    inputs = open_inputs(settings, encoder)
    (member,) = inputs.members
    # On test patients: the nine alpha events of val patients are too few to choose a feature by.
    spans = gather(inputs.test, draw_spans(inputs.test, inputs.events.test["alpha"], seed=0))
    maxima = span_maxima(member.sae, spans)
    u = mannwhitneyu(maxima[spans.is_event], maxima[~spans.is_event]).statistic
    yield steer_best(inputs, member, {"alpha": int(u.argmax())}, SCALES, bands=BANDS)
    shutil.rmtree(folder)  # 0.3 GB


def power_by_band(steering, power):
    """Return the integral of a power spectral density over each band."""
    powers = {}
    for band in BANDS:
        is_inside = (steering.hz >= band.low) & (steering.hz < band.high)
        powers[band.name] = power[is_inside].sum() * steering.hz[1]
    return powers


@pytest.mark.slow
def test_alpha_feature_scales_the_alpha_band(best):
    steering = best["alpha"]
    ratios = [effect.reconstruction.band_ratio["alpha"] for effect in steering.effects]
    assert ratios[0] < 1 < ratios[1] < ratios[2]
    untouched = steering.untouched.reconstruction.power
    for effect in steering.effects:
        change = effect.reconstruction.power - untouched
        changes = power_by_band(steering, np.abs(change))
        assert max(changes, key=changes.__getitem__) == "alpha"


@pytest.mark.slow
def test_alpha_feature_moves_the_alpha_probe_most(best):
    steering = best["alpha"]
    untouched = {reading.kind: reading for reading in steering.untouched.probes}
    assert untouched["alpha"].auc > 0.9
    for effect in steering.effects:
        (alpha,) = (reading for reading in effect.probes if reading.kind == "alpha")
        assert (alpha.change > 0) == (effect.scale > 1)
        assert effect.selectivity(steering.target) > 1


@pytest.mark.slow
def test_alpha_is_at_the_back_of_the_head(best):
    rms = dict(
        zip(best["alpha"].channels, best["alpha"].effects[1].reconstruction.rms, strict=True)
    )
    largest = sorted(rms, key=rms.__getitem__)[-2:]
    assert set(largest) == {"O1", "O2"}
