"""The pretraining error with a layer's output replaced."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.stats import binom, norm, t

from convert.encoder import convert_encoder
from minsae_jax import SparseAutoencoder
from minsae_jax.encoder.base import DEFAULT_OPTIONS
from minsae_jax.encoder.native import bind
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.evaluation.bootstrap import draw_weights
from minsae_jax.evaluation.loss_recovered import (
    SubstitutionErrors,
    loss_recovered,
    substitution_errors,
    summarise,
)
from minsae_jax.parallel.mesh import make_mesh
from tests.conftest import FIXTURES


def identity(d_model):
    """An autoencoder with x̂ = x."""
    both = np.concatenate([np.eye(d_model), -np.eye(d_model)], axis=1)
    return SparseAutoencoder(
        {"W_enc": both, "b_enc": np.zeros(2 * d_model), "W_dec": both.T, "b_dec": np.zeros(d_model)}
    )


def constant(d_model, value):
    zeros = np.zeros((d_model, 4))
    return SparseAutoencoder(
        {"W_enc": zeros, "b_enc": np.zeros(4), "W_dec": zeros.T, "b_dec": value}
    )


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_loss_recovered_is_1_for_identity_and_0_for_ablation(trained, layer):
    """x̂ = x, mean or 0 has the error of untouched activations, mean- or zero-ablation."""
    dataset = trained.dataset("test")
    mean = dataset.read(0, 200).mean((0, 1))
    saes = [identity(128), constant(128, mean), constant(128, np.zeros(128))]
    all_errors = substitution_errors(trained.encoder, dataset, layer, saes, mean, 6, 0.4)
    errors = all_errors[0]
    untouched = errors.untouched
    by_mean = errors.mean_ablation
    assert errors.windows == len(errors.recording) == 6
    on_identity, on_mean, on_zero = (each.by_window[3].mean() for each in all_errors)
    assert on_identity == pytest.approx(untouched, rel=1e-5)
    assert on_mean == by_mean
    assert on_zero == errors.zero_ablation
    assert loss_recovered(by_mean, untouched, untouched) == 1
    assert loss_recovered(by_mean, float(on_mean), untouched) == 0
    assert loss_recovered(by_mean, float(on_identity), untouched) == pytest.approx(1, abs=1e-3)
    assert untouched < by_mean


@pytest.mark.parametrize("ablated", [0.9, 1.0])
def test_loss_recovered_is_undefined_where_ablation_does_not_raise_the_error(ablated):
    """Otherwise the SAE with the largest error would recover most."""
    assert np.isnan(loss_recovered(ablated, substituted=1.5, untouched=1.0))
    untouched = np.array([0.9, 1.1])
    by_window = np.stack([untouched, untouched - 1 + ablated, untouched + 2, untouched + 0.5])
    names = ["p1_s001_t000.npy", "p2_s001_t000.npy"]
    result = summarise(SubstitutionErrors(by_window, np.array([0, 1])), names, seed=0)
    assert np.isnan(result.loss_recovered.value)
    assert result.loss_recovered.interval is None
    assert result.masked_error == pytest.approx(1.5)
    assert result.loss_recovered_of_zero_ablation == pytest.approx(0.75)


def test_resamples_in_which_ablation_lowers_the_error_are_left_out():
    """The SAE loses a tenth of each window; mean-ablation gains in those of one patient."""
    untouched = np.ones(6)
    ablated = np.array([2, 2, 2, 2, 2, -1.5])
    member = np.full(6, 1.1)
    names = [f"p{i}_s001_t000.npy" for i in range(6)]
    errors = SubstitutionErrors(np.stack([untouched, ablated, ablated, member]), np.arange(6))
    low, high = summarise(errors, names, seed=0).loss_recovered.interval
    # What remains after the loss of 0.6 is between 0 and all of it.
    n_lowered = draw_weights(6, seed=0)[:, 5]
    raised = 6 - 3.5 * n_lowered
    recovered = 1 - 0.6 / raised[raised > 0]
    assert (raised < 0).sum() > 50
    assert recovered.min() <= low <= high <= recovered.max() < 1


def test_interval_is_over_patients():
    """Mean-ablation adds 1 to the error of each window; so does the SAE for one patient in four."""
    untouched = np.linspace(1, 2, 80)
    # Sixteen patients with two recordings, and five windows of each patient
    recording = np.repeat(np.arange(32), [2, 3] * 16)
    names = [f"p{i // 2}_s001_t{i % 2:03d}_preprocessed.npy" for i in range(32)]
    lost = recording // 2 % 4 == 0
    errors = SubstitutionErrors(
        np.stack([untouched, untouched + 1, untouched + 2, untouched + lost]), recording
    )
    result = summarise(errors, names, seed=0)
    assert result.loss_recovered.value == pytest.approx(0.75)
    assert result.untouched_error == pytest.approx(1.5)
    assert result.mean_ablation_error == pytest.approx(2.5)
    assert result.zero_ablation_error == pytest.approx(3.5)
    # The number of lost patients among 16 is binomial.
    outside = norm.cdf(np.sqrt(16 / 15) * t.ppf(0.025, 15))
    lost_patients = binom.ppf([1 - outside, outside], 16, 0.25)
    assert result.loss_recovered.interval == pytest.approx(tuple(1 - lost_patients / 16), abs=1e-9)
    one_patient = replace(errors, recording=np.zeros(80, int))
    assert summarise(one_patient, names, seed=0).loss_recovered.interval is None


@pytest.mark.parametrize(
    "name", ["tuhab_patch_100", "revin_affine_gelu_overlap", "layernorm_prenorm"]
)
def test_untouched_error_is_that_of_the_whole_model(name):
    """Masked patches, embedding, all layers and head, as the model itself runs them."""
    yaml = FIXTURES / name / "config.yaml"
    encoder, _ = convert_encoder(FIXTURES / name / "checkpoint.pth", yaml)
    a = encoder.architecture
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, a.seq_len, a.n_vars)).astype(np.float32)
    masks = rng.random((8, a.n_patches)) < 0.4
    masks[:, 0] = True
    run = encoder.reconstruction.masked_errors(
        make_mesh(), 0, DEFAULT_OPTIONS, lambda params, z: z[None]
    )
    errors = np.asarray(run(encoder.params, {}, (x, masks)))
    assert errors.shape == (8, 1)

    @jax.jit
    def residual(params, window, mask):
        model = bind(PatchTST, a, params)
        target = patches(a, model.revin(window) if a.revin else window)
        z = model.embed(jax.numpy.where(mask[None, :, None, None], 0, target))
        (last,) = model.run_layers(z.reshape(-1, *z.shape[2:]), (a.n_layers - 1,))
        return model.head(last.reshape(z.shape)) - target

    for i in range(8):
        difference = np.asarray(residual(encoder.params, x[i : i + 1], masks[i]))
        expected = np.square(difference)[0, masks[i]].mean()
        assert errors[i, 0] == pytest.approx(float(expected), rel=1e-4)
