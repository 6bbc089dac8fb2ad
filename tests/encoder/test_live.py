"""Training without a store: the same activations, curves and results after an interruption."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import minsae_jax as ms
from convert.encoder import convert_encoder
from minsae_jax import UserError
from minsae_jax.activations import stream
from minsae_jax.eeg.recordings import open_windows
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.extract import extract
from minsae_jax.encoder.live import open_live
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train
from tests.chunks import read_chunks
from tests.conftest import FIXTURES
from tests.interrupt import train_until

# Every test runs an encoder, which takes longer than optimizing it.
pytestmark = pytest.mark.usefixtures("optimized", "shared_programs")

CHECKPOINT = FIXTURES / "tuhab_patch_100/checkpoint.pth"


@pytest.fixture(scope="module")
def encoder():
    return convert_encoder(CHECKPOINT)[0]


@pytest.fixture
def settings(demo_folder, tmp_path):
    return TrainConfig(
        live=True,
        root_path=str(demo_folder),
        checkpoint_path=str(CHECKPOINT),
        live_batch_size=4,
        run_dir=str(tmp_path / "run"),
        lambda_sparsity=(0.1, 3.0),
        lr=(3e-3,),
        num_steps=40,
        feature_dim_factor=(2.0,),
        batch_size=500,
        eval_window=10,
        checkpoint_every=10,
        mesh="1x1",
    )


@pytest.fixture
def few_mixed():
    """Shuffle buffers of four windows, so that an epoch has several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHUFFLE_BUFFER_TOKENS", 4 * 19 * 11)
        yield


def open_source(encoder, settings):
    config = ExtractConfig(
        root_path=settings.root_path,
        split=(settings.split,),
        split_seed=settings.split_seed,
        cache_layer=(settings.cache_layer,),
        batch_size=settings.live_batch_size,
        on_bad_recording=settings.on_bad_recording,
    )
    return open_live(encoder, config)


def run(encoder, settings):
    return train(settings, encoder.fingerprint, partial(open_source, encoder, settings))


def stored(encoder, settings, tmp_path):
    config = ExtractConfig(
        root_path=settings.root_path,
        checkpoint_path="encoder",
        batch_size=4,
        out=str(tmp_path / "store"),
    )
    (store,) = extract(encoder, config)
    return store


def test_live_tokens_equal_those_of_a_store(encoder, settings, tmp_path, few_mixed):
    store, source = stored(encoder, settings, tmp_path), open_source(encoder, settings)
    assert isinstance(source, stream.Source)
    assert isinstance(store, stream.Source)
    assert source.tokens_per_shard == store.tokens_per_shard
    assert (sum(source.tokens_per_shard), source.d_model) == (store.total_tokens, store.d_model)
    assert source.origin == store.origin
    assert source.recordings() == store.recordings() != set()
    whole = np.concatenate([store.read(i) for i in range(len(store.shards))])
    np.testing.assert_allclose(
        np.concatenate([source.read(i) for i in range(len(store.shards))]), whole, atol=1e-5
    )
    for start, stop in ((0, 209), (5, 400), (700, 836)):
        np.testing.assert_allclose(source.read(0, start, stop), whole[start:stop], atol=1e-5)
    windows = whole.reshape(source.n_chunks, source.tokens_per_chunk, -1)
    for chunks in ([0], [5, 0, 2], [source.n_chunks - 1, 1]):
        np.testing.assert_allclose(
            read_chunks(source, chunks), windows[chunks].reshape(-1, 128), atol=1e-5
        )


def test_every_token_comes_once_per_epoch(encoder, settings, few_mixed):
    source = open_source(encoder, settings)
    batches = stream.shuffled_tokens(source, 11, 0)
    epochs = [
        np.concatenate([next(batches) for _ in range(sum(source.tokens_per_shard) // 11)])
        for _ in range(2)
    ]
    whole = read_chunks(source, range(source.n_chunks))
    # Each dimension by itself: rounding may exchange rows that are sorted by one of them.
    for epoch in epochs:
        np.testing.assert_allclose(np.sort(epoch, axis=0), np.sort(whole, axis=0), atol=1e-5)
    assert (np.abs(epochs[0] - epochs[1]).max(1) > 1e-3).mean() > 0.9


@pytest.mark.slow
def test_curves_equal_those_from_a_store(encoder, settings, tmp_path):
    # The recipe minsae reads shards in order, which live and stored activations share.
    store = stored(encoder, settings, tmp_path)
    common = {"recipe": "minsae", "batch_size": None, "lr": (1e-3,), "num_steps": 20}
    run(encoder, replace(settings, **common))
    from_store = TrainConfig(
        recipe="minsae",
        store=str(store.folder.parent),
        lambda_sparsity=(0.1, 3.0),
        lr=(1e-3,),
        num_steps=20,
        feature_dim_factor=(2.0,),
        eval_window=10,
        mesh="1x1",
        run_dir=str(tmp_path / "other"),
    )
    train(from_store)
    for member in ("lambda=0.1", "lambda=3"):
        live, stored_run = (
            np.genfromtxt(
                tmp_path / name / "members" / member / "metrics.csv", delimiter=",", names=True
            )
            for name in ("run", "other")
        )
        assert len(live) == 2
        for name in ("tokens", "loss", "mse", "l1"):
            np.testing.assert_allclose(live[name], stored_run[name], rtol=1e-4)
        np.testing.assert_allclose(live["l0"], stored_run["l0"], rtol=2e-3)


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_bytes(encoder, settings, tmp_path, few_mixed):
    """Of other recordings it is not resumed."""
    run(encoder, settings)
    other = replace(settings, run_dir=str(tmp_path / "other"))
    train_until(other, 27, encoder.fingerprint, partial(open_source, encoder, other))
    open_test = partial(open_source, encoder, replace(other, split="test"))
    with pytest.raises(UserError, match="has changed since"):
        train(other, encoder.fingerprint, open_test)
    run(encoder, other)
    paths = [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".csv", ".safetensors")]
    assert len(paths) == 2 * 3 + 1
    for path in paths:
        same = tmp_path / "other" / path.relative_to(tmp_path / "run")
        assert path.read_bytes() == same.read_bytes()
    assert not list(tmp_path.rglob("b*.npy"))
    for path in (tmp_path / "other/members").glob("*/config.json"):
        config = json.loads(path.read_text())
        assert config["encoder_fingerprint"] == encoder.fingerprint
        assert config["revin"] is False


def test_source_says_whether_revin_is_applied(encoder, demo_folder):
    config = ExtractConfig(root_path=str(demo_folder), split=("test",))
    assert open_live(encoder, config).origin.revin is False
    assert open_live(encoder, replace(config, force_revin=True)).origin.revin is True


def test_held_out_store_without_revin_is_refused(settings, trained):
    settings = replace(settings, force_revin=True, val_store=f"{trained.stores}_val")
    with pytest.raises(UserError, match=r"--val_store .* was extracted with another --force_revin"):
        ms.train(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root_path": None}, "--live requires --root_path"),
        ({"live": False}, "--root_path requires --live"),
        ({"live": False, "root_path": None}, "--live_batch_size requires --live"),
        ({"live_batch_size": 0}, "--live_batch_size must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, change, message):
    with pytest.raises(UserError, match=message):
        replace(settings, **change)


def test_live_training_without_an_encoder_is_refused(settings):
    with pytest.raises(UserError, match="--live requires --checkpoint_path or --model"):
        ms.train(replace(settings, checkpoint_path=None))


def test_skipped_recordings_are_in_the_warning_and_the_config(
    encoder, settings, demo_folder, tmp_path
):
    root = shutil.copytree(demo_folder, tmp_path / "data")
    files = open_windows(root, "train", 42, 1000, 100, 19).files
    (root / files[0]).write_bytes(b"")
    eeg = np.load(root / files[1])
    eeg[:, -1] = 0
    np.save(root / files[1], eeg)
    skipping = replace(
        settings, root_path=str(root), on_bad_recording="skip", num_steps=2, lambda_sparsity=(1.0,)
    )
    with (
        pytest.warns(UserWarning, match=f"left out of split train: {files[0]}"),
        pytest.warns(UserWarning, match=f"last channel all zero in {files[1]}"),
    ):
        run(encoder, skipping)
    config = json.loads((tmp_path / "run/members/lambda=1/config.json").read_text())
    assert list(config["skipped_recordings"]) == [files[0]]
