"""Probes on the last layer against spans that are read one by one from the store."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.events import LabelledEvent, draw_spans, read_events, tokens_of
from minsae_jax.evaluation.inputs import SplitEvents, open_inputs
from minsae_jax.evaluation.steering.edit import SteeredEncoder
from minsae_jax.evaluation.steering.probes import (
    find_target,
    make_probes,
    read_probes,
    read_spans,
)
from minsae_jax.evaluation.steering.steer import steer_best

FEATURES = [2, 17, 41]


@pytest.fixture(scope="module")
def inputs(trained):
    settings = EvaluateConfig(
        run=str(trained.run), root_path=str(trained.recordings), member="lambda=0.1"
    )
    return open_inputs(settings, trained.encoder)


@pytest.fixture(scope="module")
def steered(inputs):
    return SteeredEncoder(inputs.encoder, inputs.test, inputs.layer, inputs.members[0].sae)


@pytest.fixture(scope="module")
def probes(inputs, steered):
    return make_probes(inputs, steered, FEATURES, seed=0)


@pytest.fixture(scope="module")
def values(steered, probes):
    return read_spans(steered, probes.test, FEATURES, np.array([[0.0, 1, 1], [3, 1, 1]]))


def spans_of(dataset, kind):
    """Return the drawn spans of a kind, each with the activations of its tokens."""
    everything = dataset.read(0, len(dataset.recording))
    spans = []
    for span in draw_spans(dataset, read_events(dataset.folder)[kind], 0):
        sequences, tokens = tokens_of(dataset, span)
        x = np.stack([everything[s, t] for s, t in zip(sequences, tokens, strict=True)])
        spans.append((span.is_event, x))
    return spans


def test_spans_are_read_by_means_and_maxima_of_their_tokens(inputs, steered, probes, values):
    """The steered layer is the last, so that the store has the activations."""
    sae = inputs.members[0].sae
    for probe in probes.probes:
        of_kind = probe.of_kind
        spans = spans_of(inputs.test, probe.kind)
        assert len(spans) == of_kind.sum() > 1
        for i, (is_event, x) in zip(np.flatnonzero(of_kind), spans, strict=True):
            assert probes.test.is_event[i] == is_event
            f = np.asarray(sae.encode(x))[:, FEATURES]
            np.testing.assert_allclose(values.last[i, 0], x.mean(0), atol=1e-5)
            np.testing.assert_allclose(values.strongest[i], f.max(0), atol=1e-4)
            for variant, scale in ((1, 0), (2, 3)):
                written = (scale - 1) * f[:, :1] @ sae.decoder_directions[FEATURES[:1]]
                expected = (x + written).mean(0)
                np.testing.assert_allclose(values.last[i, variant], expected, atol=1e-5)


def test_readings_match_their_definitions(probes, values):
    readings = read_probes(probes, values)
    assert len(readings) == 3
    for number, probe in enumerate(probes.probes):
        of_kind = probe.of_kind
        is_event = probes.test.is_event[of_kind]
        # The probe is affine: its weights are its logits of the unit vectors, less its bias.
        bias = probe.logits(np.zeros((1, 128)))
        weights = probe.logits(np.eye(128)) - bias
        logits = values.last[of_kind].astype(np.float64) @ weights + bias
        for variant in range(3):
            reading = readings[variant][number]
            of_variant = logits[:, variant]
            u = mannwhitneyu(of_variant[is_event], of_variant[~is_event]).statistic
            change = (of_variant - logits[:, 0])[is_event].mean() / logits[:, 0].std()
            assert reading.kind == probe.kind
            assert reading.auc == pytest.approx(u / is_event.sum() / (~is_event).sum())
            assert reading.positive_rate == (of_variant[is_event] > 0).mean()
            assert reading.change == pytest.approx(change, abs=1e-9)
        # After the last layer a change is linear in the scale: 3 - 1 is -2 times 0 - 1.
        expected = pytest.approx(-2 * readings[1][number].change, abs=1e-4)
        assert readings[2][number].change == expected
        assert readings[0][number].change == 0


def test_probes_are_fitted_on_val_patients(inputs, probes):
    for probe in probes.probes:
        spans = spans_of(inputs.val, probe.kind)
        is_event = np.array([is_event for is_event, _ in spans])
        logits = probe.logits(np.stack([x.mean(0) for _, x in spans]))
        # Few spans in 128 dimensions can be separated.
        assert ((logits > 0) == is_event).mean() > 0.9
        f = np.stack([np.asarray(inputs.members[0].sae.encode(x)).max(0) for _, x in spans])
        for feature, auc in probe.val_aucs.items():
            events, others = f[is_event, feature], f[~is_event, feature]
            u = mannwhitneyu(events, others).statistic
            assert auc == pytest.approx(u / len(events) / len(others), abs=1e-3)


def test_target_has_the_largest_auc_on_val(probes, values):
    target = find_target(probes, FEATURES, values)
    aucs = {(p.kind, f): auc for p in probes.probes for f, auc in p.val_aucs.items()}
    assert aucs[target.kind, target.feature] == target.val_auc == max(aucs.values())
    kind = probes.probes[-1].kind
    chosen = find_target(probes, FEATURES, values, (kind, 17))
    assert (chosen.kind, chosen.feature, chosen.val_auc) == (kind, 17, aucs[kind, 17])


def test_kinds_without_spans_are_named_in_a_warning(inputs, steered):
    """In the val recordings one kind is missing."""
    val, test = inputs.events
    missing, *others = sorted(val)
    changed = replace(inputs, events=SplitEvents(val | {missing: []}, test))
    match = rf"^kinds of events without a probe: {missing} \(val\)[^;]*; of these patients"
    with pytest.warns(UserWarning, match=match):
        probes = make_probes(changed, steered, FEATURES, 0)
    assert {probe.kind for probe in probes.probes} <= set(others)
    # `evaluate` warns of them itself; a warning would be an error here.
    steered_kinds = steer_best(changed, inputs.members[0], {others[0]: 0}, windows=1)
    assert missing not in steered_kinds


def test_without_any_span_there_are_no_probes(inputs, steered):
    """The only event fills its recording, so that there is no place without it."""
    events = {"blob": [LabelledEvent(inputs.test.recordings[0], 0, 5000, (0,))]}
    changed = replace(inputs, events=SplitEvents(events, events))
    with pytest.warns(UserWarning, match=r"without a probe: blob \(val and test\)"):
        assert make_probes(changed, steered, FEATURES, 0) is None


def test_without_a_val_store_there_are_no_probes(inputs, steered):
    assert make_probes(replace(inputs, val=None, events=None), steered, FEATURES, 0) is None


def test_val_windows_are_not_read_from_the_folder_of_the_test_recordings(inputs, probes, tmp_path):
    """It has other recordings of the same names, as those of a second study can."""
    for name in inputs.test.recordings:
        shutil.copy(inputs.test.folder / name, tmp_path)
    for name in inputs.val.recordings:
        recording = np.load(inputs.val.folder / name)
        np.save(tmp_path / name, recording[::-1])
    test = replace(inputs.test, folder=tmp_path)
    steered = SteeredEncoder(inputs.encoder, test, inputs.layer, inputs.members[0].sae)
    of_two_folders = make_probes(replace(inputs, test=test), steered, FEATURES, seed=0)
    for probe, expected in zip(of_two_folders.probes, probes.probes, strict=True):
        assert probe.val_aucs == expected.val_aucs
