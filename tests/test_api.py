"""The Python API: public names, and functions that join encoder and SAE."""

import subprocess
import sys
from pathlib import Path

import pytest

import minsae_jax as ms
from convert.encoder import convert_encoder
from minsae_jax import api
from tests.conftest import FIXTURES

CHECKPOINT = FIXTURES / "tuhab_patch_100/checkpoint.pth"
LIGHT = """
import sys
import minsae_jax.__main__

heavy = {"jax", "flax", "orbax", "grain", "optax", "scipy", "matplotlib", "tensorboard", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""

# In processes of their own: the type checks of the tests would refuse these first.
WRONG_SETTINGS = """
import minsae_jax as ms

for verb, arguments in {"train": [{}], "extract": [None, {}], "plot": ["runs/demo"]}.items():
    try:
        getattr(ms, verb)(*arguments)
    except ms.UserError as error:
        print(error)
"""

WRONG_VALUES = """
import minsae_jax as ms
from minsae_jax.__main__ import VERBS
from minsae_jax.settings import missing_settings

for name, verb in VERBS.items():
    wrong = dict.fromkeys(missing_settings(verb.settings, {}) or ["seed"], object())
    try:
        verb.settings(**wrong)
    except ms.UserError:
        continue
    print(name)
"""


@pytest.fixture(scope="module")
def encoder():
    return ms.load_encoder(CHECKPOINT)


def test_public_names_can_be_imported():
    for name in ms.__all__:
        assert getattr(ms, name).__doc__, name
    assert set(ms.__all__) <= set(dir(ms))
    assert ms.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = ms.load_everything


def test_settings_and_help_do_not_import_jax():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_settings_of_another_class_are_refused():
    command = [sys.executable, "-c", WRONG_SETTINGS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "expected minsae_jax.TrainConfig(...), got settings of type dict",
        "expected minsae_jax.ExtractConfig(...), got settings of type dict",
        "expected minsae_jax.PlotConfig(...), got settings of type str",
    ]


def test_settings_of_every_verb_refuse_values_of_another_type():
    command = [sys.executable, "-c", WRONG_VALUES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == ""


def test_pytorch_encoder_is_converted_in_memory(encoder):
    converted, _ = convert_encoder(CHECKPOINT)
    assert encoder.fingerprint == converted.fingerprint


def test_missing_encoder_is_named(tmp_path):
    for name in ("nowhere", "nowhere.pth"):
        with pytest.raises(ms.UserError, match=name):
            ms.load_encoder(tmp_path / name)


def test_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(ms.UserError, match=f"there is no encoder at {tmp_path}; convert one with"):
        ms.load_encoder(tmp_path)


@pytest.mark.parametrize("live", [False, True])
def test_extract_and_train(encoder, demo_folder, tmp_path, live):
    recordings = {"root_path": str(demo_folder), "checkpoint_path": str(CHECKPOINT)}
    store = str(tmp_path / "store")
    if live:
        data = recordings | {"live": True, "live_batch_size": 2}
    else:
        data = {"store": store, "checkpoint_path": str(CHECKPOINT)}
        ms.extract(encoder, ms.ExtractConfig(**recordings, batch_size=2, max_batches=2, out=store))
    run = str(tmp_path / "run")
    train_settings = ms.TrainConfig(
        **data,
        run_dir=run,
        lambda_sparsity=(1.0,),
        feature_dim_factor=(0.5,),
        num_steps=3,
        batch_size=64,
        scale_tokens=500,
        eval_every=0,
        mesh="1x1",
    )
    ms.train(train_settings)
    sae = ms.load_sae(f"{run}/members/lambda=1")
    assert sae.config["encoder_fingerprint"] == encoder.fingerprint


def test_another_encoder_is_loaded_without_the_settings_of_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("old.pth").touch()
    loaded = []
    monkeypatch.setattr(api, "load_encoder", lambda *paths: loaded.append(paths))
    trained = ms.TrainConfig(checkpoint_path="old.pth", config_path="old.yaml")
    for changes in ({}, {"config_path": "new.yaml"}, {"checkpoint_path": "new"}):
        api._encoder_of(ms.EvaluateConfig(run="run", root_path="eeg", **changes), trained)
    assert loaded == [("old.pth", "old.yaml"), ("old.pth", "new.yaml"), ("new", None)]
    Path("old.pth").unlink()
    with pytest.raises(ms.UserError, match=r"old\.pth does not exist; if it was moved"):
        api._encoder_of(ms.EvaluateConfig(run="run", root_path="eeg"), trained)


def test_store_of_another_encoder_is_refused(encoder, demo_folder, tmp_path):
    config = ms.ExtractConfig(
        root_path=str(demo_folder),
        checkpoint_path=str(CHECKPOINT),
        batch_size=2,
        max_batches=1,
        out=str(tmp_path / "store"),
    )
    ms.extract(encoder, config)
    other = str(FIXTURES / "tuhab_patch_10/checkpoint.pth")
    run = tmp_path / "run"
    with pytest.raises(ms.UserError, match=r"(another|other) encoder"):
        ms.train(ms.TrainConfig(store=config.out, checkpoint_path=other, run_dir=str(run)))
    assert not run.exists()
