"""Initial weights, the folded scale, and the files of a member."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minsae_jax import UserError, load_sae
from minsae_jax.sae.kinds import KINDS, JumpReLU, Matryoshka
from minsae_jax.sae.member import SparseAutoencoder, save_member

RELU = KINDS["relu"]


def test_tied_start():
    p = RELU.init_tied(jax.random.key(0), 16, 64, decoder_norm=0.1)
    np.testing.assert_allclose(jnp.linalg.norm(p["W_dec"], axis=1), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(p["W_enc"], p["W_dec"].T)
    assert not p["b_enc"].any()
    assert not p["b_dec"].any()
    assert abs(float((p["W_dec"][0] @ p["W_dec"][1]) / 0.01)) < 0.9  # directions of their own


def test_torch_start():
    p = RELU.init_torch(jax.random.key(0), 64, 256)
    for name, bound in (("W_enc", 1 / 8), ("b_enc", 1 / 8), ("W_dec", 1 / 16), ("b_dec", 1 / 16)):
        values = np.asarray(p[name])
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.95 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_folded_scale_reconstructs_raw_activations():
    scaled = RELU.init_torch(jax.random.key(0), 8, 20)
    raw = RELU.fold_scale(scaled, 3.0)
    x = jax.random.normal(jax.random.key(1), (5, 8))
    features = RELU.encode(scaled, 3 * x)
    np.testing.assert_allclose(RELU.encode(raw, x), features, atol=1e-5)
    np.testing.assert_allclose(
        RELU.decode(raw, features), RELU.decode(scaled, features) / 3, atol=1e-6
    )
    assert np.abs(RELU.decode(raw, features) - RELU.decode(scaled, features)).max() > 0.01
    for name, value in RELU.fold_scale(raw, 1 / 3).items():
        np.testing.assert_allclose(value, scaled[name], atol=1e-6)


@pytest.mark.parametrize("n_zero", [0, 6, 12])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_threshold_of_a_normalized_decoder_does_not_count_rows_of_zeros(kind, n_zero):
    kind = KINDS[kind]
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in kind.shapes(4, 12).items()}
    params["threshold"] = np.array(0.7, np.float32)
    norms = np.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    params["W_dec"] *= 5 / norms
    params["W_dec"][:n_zero] = 0
    params = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(rng.normal(size=(50, 4)).astype(np.float32))
    normalized = kind.normalize_decoder(params)
    features = kind.encode(params, x)
    np.testing.assert_allclose(
        kind.decode(normalized, kind.encode(normalized, x)),
        kind.decode(params, features),
        atol=1e-4,
    )
    of_others = np.asarray(kind.encode(normalized, x))[:, n_zero:]
    np.testing.assert_allclose(of_others, 5 * features[:, n_zero:], rtol=1e-4, atol=1e-5)


def test_feature_that_does_not_exist_is_refused():
    params = {k: np.asarray(v) for k, v in RELU.init_torch(jax.random.key(0), 8, 20).items()}
    sae = SparseAutoencoder(params)
    x = np.ones((3, 8), np.float32)
    for feature in (20, -1):
        with pytest.raises(UserError, match=rf"no feature {feature}: it has the features 0 to 19"):
            sae.encode_features(x, [0, feature])


def test_member_files(tmp_path):
    params = {k: np.asarray(v) for k, v in RELU.init_torch(jax.random.key(0), 8, 20).items()}
    save_member(tmp_path / "m", params, {"layer": -1})
    held = load_file(tmp_path / "m" / "sae.safetensors")
    assert {k: v.shape for k, v in held.items()} == RELU.shapes(8, 20)
    sae = load_sae(tmp_path / "m")
    assert sae.config == {"layer": -1}
    assert (sae.d_model, sae.d_sae) == (8, 20)
    for name, value in params.items():
        np.testing.assert_array_equal(sae.params[name], value)
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    assert sae.encode(x).shape == (2, 3, 20)
    assert sae.decode(sae.encode(x)).shape == (2, 3, 8)
    assert sae.encode_features(x, []).shape == (2, 3, 0)
    some = sae.encode_features(x, [3, 0])
    np.testing.assert_allclose(some, sae.encode(x)[..., np.array([3, 0])], atol=1e-6)
    np.testing.assert_allclose(sae(x), sae.decode(sae.encode(x)))
    with pytest.raises(UserError, match="last axis must have 8"):
        sae.encode(x[..., :7])
    header = (tmp_path / "m" / "sae.safetensors").read_bytes()
    assert set(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])) == set(
        held
    )  # no metadata


def test_settings_of_the_kind_are_loaded(tmp_path):
    jumprelu = JumpReLU(mode="target_l0", bandwidth=0.5)
    params = jumprelu.complete_init(jumprelu.init_tied(jax.random.key(0), 4, 8, 1.0), None)
    config = {"kind": "jumprelu", **jumprelu.settings}
    save_member(tmp_path / "jumprelu", params, config)
    assert load_sae(tmp_path / "jumprelu").kind == jumprelu
    save_member(tmp_path / "unknown", params, config | {"mode": "cosh"})
    with pytest.raises(UserError, match="mode must be one of tanh, step, target_l0"):
        load_sae(tmp_path / "unknown")
    matryoshka = Matryoshka(shares=(0.5, 1.0))
    params = matryoshka.complete_init(matryoshka.init_tied(jax.random.key(0), 4, 8, 1.0), None)
    save_member(tmp_path / "matryoshka", params, {"kind": "matryoshka", "shares": [0.5, 1]})
    assert load_sae(tmp_path / "matryoshka").kind == matryoshka


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer", "last"), ("encoder_fingerprint", 5), ("store", [1]), ("k", "8"), ("revin", 1)],
)
def test_entries_of_another_type_are_refused(tmp_path, name, value):
    params = RELU.init_torch(jax.random.key(0), 8, 20)
    save_member(tmp_path, params, {"kind": "relu", name: None})
    assert load_sae(tmp_path).config == {"kind": "relu", name: None}
    save_member(tmp_path, params, {"kind": "relu", name: value})
    with pytest.raises(UserError, match=rf"config\.json has an invalid {name}: "):
        load_sae(tmp_path)


def test_wrong_members(tmp_path):
    params = {k: np.asarray(v) for k, v in RELU.init_torch(jax.random.key(0), 8, 20).items()}
    (tmp_path / "sparse_autoencoder_final.pt").touch()
    with pytest.raises(UserError, match="is a file; convert it with `python -m convert sae"):
        load_sae(tmp_path / "sparse_autoencoder_final.pt")
    with pytest.raises(UserError, match=r"has no sae\.safetensors"):
        load_sae(tmp_path)
    save_file(params | {"more": np.zeros(2, np.float32)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="must contain exactly W_enc, b_enc, W_dec, b_dec"):
        load_sae(tmp_path)
    save_file(
        params | {"W_dec": np.ascontiguousarray(params["W_dec"].T)}, tmp_path / "sae.safetensors"
    )
    with pytest.raises(UserError, match="inconsistent shapes"):
        load_sae(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load_sae(tmp_path)
