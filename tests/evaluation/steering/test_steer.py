"""`minsae steer` on the small run: files, choice of windows, and one line for every mistake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minsae_jax as ms
from minsae_jax import UserError
from minsae_jax.evaluation.config import EvaluateConfig, parse_bands
from minsae_jax.evaluation.inputs import open_inputs
from minsae_jax.evaluation.steering.figure import draw
from minsae_jax.evaluation.steering.steer import steer_best
from minsae_jax.sae.member import load_sae, save_member

MEMBER = "lambda=0.1"
DEAD = 5


@pytest.fixture(scope="module")
def config(trained, tmp_path_factory):
    """Settings for a copy of the run, whose recommended member has one dead feature."""
    run = tmp_path_factory.mktemp("steer") / "run"
    shutil.copytree(trained.run, run)
    folder = run / "members" / MEMBER
    sae = load_sae(folder)
    bias = np.array(sae.params["b_enc"])
    bias[DEAD] = -1e6
    save_member(folder, sae.params | {"b_enc": bias}, sae.config)
    (run / "evaluation.json").write_text(json.dumps({"recommended": MEMBER}))
    return ms.SteerConfig(
        run=str(run),
        root_path=str(trained.recordings),
        feature=(17,),
        scale=(0.0, 1.0, 3.0),
        windows=3,
    )


@pytest.fixture(scope="module")
def steering(trained, config):
    return ms.steer(config, trained.encoder)


def test_windows_are_those_where_the_feature_is_strongest(trained, config, steering):
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording))
    strongest = np.asarray(trained.sae(MEMBER).encode(x))[..., 17].max(1)
    by_window = {}
    for recording, window, value in zip(dataset.recording, dataset.window, strongest, strict=True):
        place = (dataset.recordings[recording], int(window))
        by_window[place] = max(by_window.get(place, 0), float(value))
    ranked = sorted(by_window, key=by_window.__getitem__, reverse=True)
    expected = []
    for place in ranked:
        if [other[0] for other in expected].count(place[0]) < 2:
            expected.append(place)
    assert [(place.recording, place.window) for place in steering.windows] == expected[:3]


def test_waveform_is_that_of_the_feature_after_the_last_layer(trained, steering):
    """change = (scale - 1) mean(f) waveform(W_dec), with f over the affected tokens."""
    sae = trained.sae(MEMBER)
    waveform = trained.encoder.waveform(sae.decoder_directions[17])
    dataset = trained.dataset("test")
    active = []
    for place in steering.windows:
        recording = dataset.recordings.index(place.recording)
        is_here = (dataset.recording == recording) & (dataset.window == place.window)
        x = np.concatenate([dataset.read(int(i), int(i) + 1) for i in np.flatnonzero(is_here)])
        f = np.asarray(sae.encode(x[:, dataset.tokens.located]))[..., 17]
        active.append(f[f > 0])
    mean = np.concatenate(active).mean()
    for effect in steering.effects:
        expected = (effect.scale - 1) * mean * waveform
        np.testing.assert_allclose(effect.reconstruction.waveform, expected, atol=1e-5)


def test_scale_1_changes_nothing(steering):
    effect = steering.effects[1]
    assert effect.scale == 1
    assert effect.last_layer == effect.last_layer_elsewhere == 0
    assert not effect.reconstruction.rms.any()
    assert set(effect.reconstruction.band_ratio.values()) == {1.0}
    assert effect.probes == steering.untouched.probes
    assert all(reading.change == 0 for reading in effect.probes)
    assert effect.selectivity(steering.target) is None


def test_selectivity_compares_the_target_with_the_largest_other(steering):
    for effect in (steering.effects[0], steering.effects[2]):
        changes = {reading.kind: abs(reading.change) for reading in effect.probes}
        target = changes.pop(steering.target.kind)
        assert effect.selectivity(steering.target) == target / max(changes.values())


def test_files_contain_the_result_and_are_the_same_again(trained, config, steering):
    folder = Path(config.run) / "steering" / MEMBER / "f00017"
    assert steering.folder == folder
    names = {"steering.json", "steering.png", "steering.svg"}
    assert {path.name for path in folder.iterdir()} == names
    first = {name: (folder / name).read_bytes() for name in names}
    content = json.loads(first["steering.json"])
    assert content["features"] == [17]
    assert content["target"]["kind"] == steering.target.kind
    assert [effect["scale"] for effect in content["effects"]] == [0, 1, 3]
    reading = content["effects"][2]["probes"][0]
    assert reading["change"] == pytest.approx(steering.effects[2].probes[0].change, rel=1e-5)
    rms = content["effects"][0]["reconstruction"]["rms"]
    np.testing.assert_allclose(rms, steering.effects[0].reconstruction.rms, rtol=1e-5)
    with Image.open(folder / "steering.png") as image:
        assert image.width > 1000
    ms.steer(config, trained.encoder)
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_several_features_of_a_named_window_are_scaled_together(trained, config):
    """The change of both is the sum of the changes of each, since the head is linear."""
    name = trained.dataset("val").recordings[0]
    chosen = replace(config, recording=name, window=(1,), scale=(0.0,))
    both = ms.steer(replace(chosen, feature=(17, 41)), trained.encoder)
    assert both.folder.name == "f00017+f00041"
    assert [(place.recording, place.window) for place in both.windows] == [(name, 1)]
    sae = trained.sae(MEMBER)
    (example, *_) = both.examples
    change = example.traces[1] - example.traces[0]
    x = trained.encoder.activations(
        np.load(trained.recordings / name)[None, 1000:2000].astype(np.float32)
    )
    located = trained.dataset("test").tokens.located
    f = np.asarray(sae.encode(x))[0, example.channel][located]
    expected = 0
    for feature in (17, 41):
        waveform = trained.encoder.waveform(sae.decoder_directions[feature])
        expected = expected - (f[:, [feature]] * waveform).reshape(-1)
    stretch = expected[example.first : example.first + len(change)]
    np.testing.assert_allclose(change, stretch, atol=1e-5)


def test_windows_of_a_recording_are_its_strongest(trained, config):
    name = trained.dataset("test").recordings[0]
    steering = ms.steer(replace(config, recording=name, windows=1), trained.encoder)
    (place,) = steering.windows
    data = np.load(trained.recordings / name).astype(np.float32)
    n_windows = len(data) // 1000
    x = trained.encoder.activations(data[: n_windows * 1000].reshape(n_windows, 1000, -1))
    strongest = np.asarray(trained.sae(MEMBER).encode(x))[..., 17].max((1, 2))
    assert (place.recording, place.window) == (name, int(strongest.argmax()))


def test_best_features_are_steered_as_one_by_one(trained, config, steering):
    settings = EvaluateConfig(run=config.run, root_path=config.root_path, member=MEMBER)
    inputs = open_inputs(settings, trained.encoder)
    kinds = [reading.kind for reading in steering.untouched.probes]
    features = dict.fromkeys(kinds, 41) | {steering.target.kind: 17, "unknown": 2}
    best = steer_best(
        inputs, inputs.members[0], features, config.scale, 3, parse_bands(settings.bands)
    )
    assert sorted(best) == kinds
    for kind, result in best.items():
        assert result.target.kind == kind
        assert result.features == (features[kind],)
    same = best[steering.target.kind]
    assert same.target == steering.target
    assert same.windows == steering.windows
    for effect, expected in zip(same.effects, steering.effects, strict=True):
        np.testing.assert_array_equal(effect.reconstruction.rms, expected.reconstruction.rms)
        for reading, other in zip(effect.probes, expected.probes, strict=True):
            assert reading.change == pytest.approx(other.change, abs=1e-4)
            assert reading.auc == pytest.approx(other.auc)
    assert steer_best(inputs, inputs.members[0], {kinds[0]: DEAD}) == {}


def test_folder_of_the_same_features_is_the_same(steering):
    assert replace(steering, features=(41, 17)).folder.name == "f00017+f00041"
    many = [replace(steering, features=tuple(range(first, first + 100))) for first in (0, 1)]
    assert many[0].folder != many[1].folder
    assert all(len(result.folder.name) < 200 for result in many)
    assert replace(many[0], features=many[0].features[::-1]).folder == many[0].folder


def test_figure_of_many_features_and_channels_without_places(steering, tmp_path):
    result = replace(steering, features=tuple(range(40)), positions=None, unit="100 uV")
    draw(result, tmp_path)
    svg = (tmp_path / "steering.svg").read_text(encoding="utf-8")
    assert f"7, 8, 9, and 30 more scaled at layer {steering.layer}" in svg
    assert "(100 uV)²/Hz" in svg
    assert all(f"<!-- {name} -->" in svg for name in steering.channels)


def test_summary_has_a_column_for_each_scale(steering):
    title, *lines = steering.summary().splitlines()
    assert title.split() == ["scale", "0", "1", "3"]
    last_layer = [f"{effect.last_layer:.3f}" for effect in steering.effects]
    assert lines[0].split() == ["last", "layer", *last_layer]
    alpha = [f"×{effect.reconstruction.band_ratio['alpha']:.2f}" for effect in steering.effects]
    assert ["output", "alpha", *alpha] in [line.split() for line in lines]
    for i, reading in enumerate(steering.untouched.probes):
        changes = [f"{effect.probes[i].change:+.2f}" for effect in steering.effects]
        assert ["probe", reading.kind, *changes] in [line.split() for line in lines]
    assert f"target: {steering.target.kind}, which feature 17" in steering.summary()


def test_repr_is_one_short_line(config, steering):
    assert repr(steering) == f"Steering({config.run}, {MEMBER}, features 17)"


def test_summary_is_80_columns_wide(steering, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, steering.summary().splitlines())) <= 80


def test_figure_without_reconstruction_or_probes(steering, tmp_path):
    bare = [replace(effect, reconstruction=None, probes=()) for effect in steering.effects]
    untouched = replace(steering.untouched, reconstruction=None, probes=())
    result = replace(
        steering, examples=(), r=None, target=None, untouched=untouched, effects=tuple(bare)
    )
    draw(result, tmp_path)
    assert (tmp_path / "steering.png").is_file()
    assert "output" not in result.summary()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": (64,)}, "there is no feature 64: lambda=0.1 has the features 0 to 63"),
        ({"feature": (DEAD,)}, "feature 5 is not active on any token of the test patients"),
        ({"feature": (17, DEAD)}, "feature 5 is not active"),
        ({"member": "lambda=3"}, "unknown member lambda=3"),
        ({"recording": "nowhere.npy"}, "there is no recording nowhere.npy in"),
        ({"run": "nowhere"}, "nowhere does not contain a run"),
    ],
)
def test_mistake_is_one_line(trained, config, changes, message):
    with pytest.raises(UserError) as e:
        ms.steer(replace(config, **changes), trained.encoder)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_windows_must_exist_and_contain_the_feature(trained, config):
    name = trained.dataset("test").recordings[0]
    with pytest.raises(UserError, match="there is no window 99: "):
        ms.steer(replace(config, recording=name, window=(99,)), trained.encoder)
    with pytest.raises(UserError, match="feature 5 is not active on the chosen windows of"):
        ms.steer(replace(config, recording=name, feature=(DEAD,)), trained.encoder)


def test_recording_must_be_finite(trained, config, tmp_path):
    """Also one that no store is of."""
    recordings = shutil.copytree(trained.recordings, tmp_path / "recordings")
    eeg = np.load(recordings / trained.dataset("test").recordings[0])
    eeg[30, 2] = np.nan
    np.save(recordings / "other_s001_t000_preprocessed.npy", eeg)
    other = replace(config, root_path=str(recordings), recording="other_s001_t000_preprocessed.npy")
    with pytest.raises(UserError, match=r"other_.* contains NaN or infinity at sample 30"):
        ms.steer(other, trained.encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": ()}, "--feature requires"),
        ({"feature": (-1,)}, "--feature must be at least 0"),
        ({"feature": (3, 3)}, "--feature contains duplicate values"),
        ({"scale": (float("nan"),)}, "--scale must be finite"),
        ({"scale": ()}, "--scale requires"),
        ({"window": (1,)}, "--window requires --recording"),
        ({"bands": ("alpha",)}, "--bands must be"),
    ],
)
def test_invalid_settings(config, changes, message):
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


def test_recommended_member_requires_an_evaluation(trained, config, tmp_path):
    (tmp_path / "config.yaml").write_bytes((trained.run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match=r"has no evaluation.json; set --member"):
        ms.steer(replace(config, run=str(tmp_path)), trained.encoder)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="does not name a recommended member"):
        ms.steer(replace(config, run=str(tmp_path)), trained.encoder)
    (tmp_path / "evaluation.json").write_text("damaged")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        ms.steer(replace(config, run=str(tmp_path)), trained.encoder)
