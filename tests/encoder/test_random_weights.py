"""The control with random weights: what stays of an encoder, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minsae_jax as ms
from convert.__main__ import main
from convert.encoder import convert_encoder
from minsae_jax.encoder.converted import load_encoder, load_source
from minsae_jax.encoder.random_weights import with_random_weights
from minsae_jax.errors import UserError
from tests.conftest import FIXTURES

AVERAGES = ("mean", "var")  # of BatchNorm


@pytest.fixture(scope="module")
def windows(encoder):
    """EEG with a mean and a variance that differ from those of the encoder's training."""
    shape = (3, encoder.spec.seq_len, encoder.spec.n_vars)
    return 2 + 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def random(encoder, windows):
    return with_random_weights(encoder, windows)


def test_parameters_are_permuted(encoder, random):
    before = dict(jax.tree_util.tree_leaves_with_path(encoder.params))
    after = dict(jax.tree_util.tree_leaves_with_path(random.params))
    missing = before.keys() - after.keys()
    assert {path[0].key for path in missing} == {"head"}
    changed = 0
    for path, parameter in after.items():
        if path[-1].key in AVERAGES:
            continue
        np.testing.assert_array_equal(np.sort(parameter, None), np.sort(before[path], None))
        if len(np.unique(parameter)) > 1:
            changed += 1
            assert not np.array_equal(parameter, before[path]), path
    assert changed > 10 * encoder.architecture.n_layers


@pytest.mark.parametrize("layer", [0, -1])
def test_outputs_of_layers_have_the_mean_and_sd_of_their_batch_norm(random, windows, layer):
    """Independent of how the averages are set: BatchNorm's output has its bias and scale."""
    z = np.asarray(random.activations(windows, layer), np.float64)
    norm = random.params["layers"][range(random.architecture.n_layers)[layer]]["norm_ff"]
    np.testing.assert_allclose(z.mean((0, 1, 2)), norm["bias"], atol=1e-4)
    np.testing.assert_allclose(z.std((0, 1, 2)), np.abs(norm["scale"]), atol=1e-3)


def test_variance_is_exact_where_the_mean_is_large(encoder, windows):
    params = jax.tree.map(np.asarray, encoder.params)
    bias = params["layers"][0]["ff_out"]["bias"]
    params["layers"][0]["ff_out"]["bias"] = bias + np.float32(3000)
    random = with_random_weights(type(encoder)(encoder.architecture, params), windows)
    z = np.asarray(random.activations(windows, 0), np.float64)
    scale = random.params["layers"][0]["norm_ff"]["scale"]
    np.testing.assert_allclose(z.std((0, 1, 2)), np.abs(scale), rtol=1e-3)


def test_the_seed_decides(encoder, random, windows):
    assert with_random_weights(encoder, windows).fingerprint == random.fingerprint
    other = with_random_weights(encoder, windows, seed=1)
    assert len({e.fingerprint for e in (encoder, random, other)}) == 3


@pytest.mark.parametrize("name", ["layernorm_prenorm/checkpoint.pth", "cbramod"])
def test_layer_norm_needs_no_recordings(name):
    encoder = convert_encoder(FIXTURES / name).encoder
    random = with_random_weights(encoder)
    shape = (1, encoder.spec.seq_len, encoder.spec.n_vars)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert np.isfinite(random.activations(x)).all()
    assert random.reconstruction is None
    assert str(random.spec) == str(encoder.spec)


def test_batch_norm_requires_windows(encoder):
    with pytest.raises(UserError, match="BatchNorm requires windows"):
        with_random_weights(encoder)


def test_the_command_writes_an_encoder(trained, tmp_path, capsys):
    source = str(trained.encoder_folder)
    out = str(tmp_path / "random")
    with pytest.raises(UserError, match="averages require --root_path"):
        main(["randomize", source, "--out", out])
    given = ["--root_path", str(trained.recordings)]
    with pytest.raises(UserError, match="--out must be another folder"):
        main(["randomize", source, "--out", f"{source}/../encoder", *given])
    with pytest.raises(UserError, match="--seed must be"):
        main(["randomize", source, "--out", out, "--seed", "-1", *given])
    main(["randomize", source, "--out", out, "--seed", "3", *given])
    random = load_encoder(out)
    assert random.fingerprint[:12] in capsys.readouterr().out
    weights = load_source(out).sources["weights"]
    assert weights == f"permutation of {trained.encoder.fingerprint[:12]} with seed 3"
    config = ms.ExtractConfig(root_path=str(trained.recordings), out=str(tmp_path / "store"))
    (store,) = ms.extract(random, config)
    assert store.n_windows > 0


def test_recordings_with_nan_are_an_error(trained, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for path in trained.recordings.iterdir():
        if path.suffix == ".npy":
            x = np.load(path)
            x[:] = np.nan
            np.save(folder / path.name, x)
        elif path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    args = ["randomize", str(trained.encoder_folder), "--out", str(tmp_path / "random")]
    with pytest.raises(UserError, match="contain NaN or infinity"):
        main([*args, "--root_path", str(folder)])
    assert not (tmp_path / "random").exists()
