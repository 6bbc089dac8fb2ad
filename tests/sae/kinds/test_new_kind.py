"""A kind that only this file knows goes through the whole pipeline.

It adds what a new kind adds: a line in KINDS and a line in SPARSITY_SETTINGS.
"""

import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.sae import convert_sae
from minsae_jax import EvaluateConfig, TrainConfig, UserError, evaluate, load_sae, train
from minsae_jax.sae import config
from minsae_jax.sae.kinds import KINDS, SAEKind
from tests.interrupt import train_until
from tests.report.reading import read_cards


@dataclass(frozen=True)
class Squared(SAEKind):
    """f = gain * relu(z)² with a trained gain for each feature, and an L1 penalty."""

    name = "squared"
    param_names = ("W_enc", "b_enc", "W_dec", "b_dec", "gain")

    @property
    def sparsity_name(self):
        return "lambda_sparsity"

    def shapes(self, d_model, d_sae):
        return super().shapes(d_model, d_sae) | {"gain": (d_sae,)}

    def complete_init(self, params, median):
        return params | {"gain": jnp.ones(params["b_enc"].shape)}

    def encode(self, params, x):
        pre = x @ params["W_enc"]
        pre = pre + jnp.broadcast_to(params["b_enc"], pre.shape)
        return jnp.broadcast_to(params["gain"], pre.shape) * jnp.square(jax.nn.relu(pre))

    def penalty(self, params, features):
        return jnp.abs(features) @ jnp.linalg.norm(params["W_dec"], axis=1)

    def penalty_weight(self, hyper):
        return hyper["lambda_sparsity"]


@pytest.fixture
def new_kind(monkeypatch):
    monkeypatch.setitem(KINDS, "squared", Squared())
    monkeypatch.setitem(config.SPARSITY_SETTINGS, "squared", ("lambda_sparsity",))


class Centred(Squared):
    """Encodes x - b_dec."""

    independent = True

    def encode(self, params, x):
        return super().encode(params, x - jnp.broadcast_to(params["b_dec"], x.shape))


def test_some_features_of_as_many_as_d_model():
    d_sae = d_model = 3
    rng = np.random.default_rng(0)
    shapes = Centred().shapes(d_model, d_sae)
    params = {name: jnp.array(rng.normal(size=shapes[name]), jnp.float32) for name in shapes}
    x = jnp.array(rng.normal(size=(5, d_model)), jnp.float32)
    indices = jnp.array([2, 0])
    some = Centred().encode_features(params, x, indices)
    np.testing.assert_allclose(some, Centred().encode(params, x)[:, indices], rtol=1e-6)


def csv_and_weights(run):
    paths = [path for path in run.rglob("*") if path.suffix in (".csv", ".safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


@pytest.fixture
def settings(new_kind, trained, tmp_path):
    return TrainConfig(
        store=str(trained.stores),
        checkpoint_path=str(trained.encoder_folder),
        run_dir=str(tmp_path / "run"),
        kind=("squared",),
        lambda_sparsity=(0.1,),
        lr=(3e-3,),
        feature_dim_factor=(0.25,),
        num_steps=60,
        batch_size=256,
        eval_window=16,
        eval_every=30,
        checkpoint_every=20,
        mesh="1x1",
    )


def test_new_kind_trains_and_is_loaded(settings, trained):
    (squared,) = train(settings).members
    assert squared.name == "squared,lambda=0.1"
    assert squared.held_out["fvu"] < 0.9
    assert np.abs(load_file(squared.folder / "sae.safetensors")["gain"] - 1).max() > 0.01
    sae = load_sae(squared.folder)
    x = trained.dataset("test").read(0, 40).reshape(-1, 128)
    p = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    features = p["gain"] * np.maximum(x @ p["W_enc"] + p["b_enc"], 0) ** 2
    np.testing.assert_allclose(sae.encode(x), features, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_new_kind_goes_through_the_pipeline(
    settings, trained, tmp_path, one_device, without_figure
):
    run = train(settings)
    resumed = replace(settings, run_dir=str(tmp_path / "resumed"))
    train_until(resumed, 33)
    train(resumed)
    expected = csv_and_weights(tmp_path / "run")
    assert len(expected) == 5
    assert csv_and_weights(tmp_path / "resumed") == expected

    (squared,) = run.members
    evaluation = evaluate(
        EvaluateConfig(
            run=str(run.folder),
            root_path=str(trained.recordings),
            substitution_windows=2,
            member=squared.name,
            top=2,
        )
    )
    (of_squared,) = evaluation.members
    assert of_squared.hyper["kind"] == "squared"
    assert 0 < of_squared.tokens.fvu < 0.9
    assert len(read_cards(run.folder / "report")) == 32

    convert_sae(squared.folder, "member", tmp_path / "copy")
    again = load_file(tmp_path / "copy/sae.safetensors")
    for name, value in load_file(squared.folder / "sae.safetensors").items():
        np.testing.assert_array_equal(again[name], value)
    assert json.loads((tmp_path / "copy/config.json").read_text())["kind"] == "squared"
    with pytest.raises(UserError, match="SAELens has no architecture for kind squared"):
        convert_sae(squared.folder, "saelens", tmp_path / "out")
    with pytest.raises(UserError, match="dictionary_learning has no class for kind squared"):
        convert_sae(squared.folder, "dictionary_learning", tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))
