"""A feature as it is shown: examples cut from the EEG, spectra, regions, names."""

from dataclasses import replace

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.report.describe import (
    as_steps,
    describe,
    dominant_band,
    hints,
    make_context,
    read_labels,
    region,
    relative_power,
    suggestion,
)
from minsae_jax.report.examples import collect


@pytest.fixture(scope="module")
def context(trained):
    dataset, sae = trained.dataset("test"), trained.sae()
    return make_context(
        dataset, sae, collect(dataset, sae), trained.encoder, w=2, labels={3: ("mine", "a note")}
    )


@pytest.fixture(scope="module")
def feature(context):
    return int(np.argmax(context.activity.active))


def test_examples_are_cut_from_the_recordings(trained, context, feature):
    told = describe(context, feature)
    groups = [e["group"] for e in told["examples"]]
    assert groups.count("top") > 3
    assert {f"q{i}" for i in range(1, 11)} <= set(groups)
    assert groups.count("random") == 6
    clipped = 0
    for example in told["examples"]:
        eeg = np.asarray(load_recording(trained.recordings / example["recording"]))
        start = round(example["start"] * 100)
        trace = eeg[start : start + len(example["trace"]), CHANNELS.index(example["channel"])]
        np.testing.assert_allclose(example["trace"] / 10, np.clip(trace, -12.7, 12.7), atol=0.051)
        assert start // 1000 == (start + len(trace) - 1) // 1000  # never over the window's edge
        assert len(example["strip"]) * 100 == len(trace)
        if example["patch"]:
            at = round(example["patch"][0] - example["start"])
            assert example["strip"][at] == pytest.approx(example["activation"], rel=1e-3)
            wanted = range(round(example["patch"][0]) - 2, round(example["patch"][0]) + 3)
            assert len(trace) == 100 * len(
                [p for p in wanted if p // 10 == start // 1000 and p >= 0]
            )
            clipped += len(trace) < 500
        if example["others"] is not None:
            assert example["others"].shape == (19, -(-len(trace) // 2))
    assert clipped


def test_fields(context, feature):
    told = describe(context, feature)
    assert told["density"] == pytest.approx(context.activity.density[feature])
    assert sum(told["histogram"]["counts"]) == context.activity.active[feature]
    assert len(told["histogram"]["edges"]) == len(told["histogram"]["counts"]) + 1
    assert sum(share for _, share in told["patient_list"]) == pytest.approx(1)
    assert (
        told["patient_share"]
        == told["patient_list"][0][1]
        == max(share for _, share in told["patient_list"])
    )
    assert told["position"].sum() + told["cls"] == pytest.approx(1)
    spectrum = told["spectrum"]
    assert (spectrum["low"] <= spectrum["high"]).all()
    assert (
        (spectrum["low"] < spectrum["ratio"]) & (spectrum["ratio"] < spectrum["high"])
    ).mean() > 0.9
    assert describe(context, 3)["label"] == "mine"
    kernel = np.asarray(context.encoder.params["head"]["linears"][0]["kernel"])
    np.testing.assert_allclose(
        told["waveform"], np.asarray(context.sae.params["W_dec"][feature]) @ kernel, rtol=1e-5
    )
    rows = np.asarray(context.sae.params["W_dec"])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest, cosine = told["nearest"][0]
    others = np.delete(rows @ rows[feature], feature)
    assert cosine == pytest.approx(others.max(), rel=1e-5)
    assert rows[nearest] @ rows[feature] == pytest.approx(cosine, rel=1e-5)


def test_a_dead_feature(context):
    active = context.activity.active.copy()
    active[7] = 0
    told = describe(replace(context, activity=replace(context.activity, active=active)), 7)
    assert (told["density"], told["suggestion"], told["channel"]) == (0, "", "")


def test_spectrum_of_a_rhythm(context):
    """Segments of 10 Hz against a flat base rate."""
    t = np.arange(500) / 100
    rng = np.random.default_rng(0)
    segments = np.sin(2 * np.pi * 10 * t + rng.uniform(0, 6, size=(20, 1))) + 0.1 * rng.normal(
        size=(20, 500)
    )
    hz = np.fft.rfftfreq(500, 0.01)
    shown = (hz >= 0.9) & (hz <= 45)
    power = relative_power(segments, shown)
    np.testing.assert_allclose(power.sum(1), 1)
    assert abs(hz[shown][power.mean(0).argmax()] - 10) < 0.3
    spectrum = {"hz": hz[shown], "ratio": power.mean(0) * shown.sum()}
    assert dominant_band(context, spectrum) == "alpha"
    assert dominant_band(context, spectrum | {"ratio": np.ones(shown.sum())}) == "broadband"
    back = np.where(POSITIONS[:, 1] < -0.5, 4.0, 0.3)
    assert suggestion(context, back, "alpha") == "posterior alpha, 8–13 Hz"
    assert suggestion(context, np.ones(19), "broadband") == "widespread broadband"


@pytest.mark.parametrize(
    ("channels", "name"),
    [(("O1", "O2", "PZ"), "posterior"), (("FP1", "FP2"), "frontal"), (("T4",), "right temporal"),
     (("T3", "T3"), "left temporal"), (("CZ",), "central"), (("F3", "FP1", "F7"), "left frontal"), ((), "widespread")],
)  # fmt: skip
def test_regions(channels, name):
    assert (
        region(np.array([5.0 if c in channels else 0.5 if channels else 1.0 for c in CHANNELS]))
        == name
    )


def test_hints():
    rng = np.random.default_rng(0)
    slow = np.sin(2 * np.pi * 3 * np.arange(200) / 100)
    assert not any(hints(slow).values())
    assert hints(slow + 6 * (np.arange(200) == 100))["beyond 5 SD"]
    assert hints(np.zeros(200))["flat"]
    assert hints(np.diff(rng.normal(size=201)))["over 25 Hz"]


def test_steps():
    np.testing.assert_array_equal(
        as_steps(np.array([0.0, 0.14, -1.26, 99, -99])), [0, 1, -13, 127, -127]
    )


def test_labels(tmp_path):
    assert read_labels(tmp_path / "labels.csv") == {}
    (tmp_path / "labels.csv").write_text('feature,label,note\n12,alpha,\n7,"eyes, closed",sure\n')
    assert read_labels(tmp_path / "labels.csv") == {12: ("alpha", ""), 7: ("eyes, closed", "sure")}
    (tmp_path / "labels.csv").write_text("feature,name\nx,y\n")
    with pytest.raises(UserError, match="must have the columns feature, label and note"):
        read_labels(tmp_path / "labels.csv")
