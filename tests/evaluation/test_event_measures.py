"""Measures of events on planted activations, where the truth is known, and by brute force."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu, norm, t

from minsae_jax import SparseAutoencoder
from minsae_jax.evaluation.bootstrap import Resamples, draw_weights
from minsae_jax.evaluation.event_measures import (
    EventKind,
    choose_features,
    gain_over,
    probe_recovered,
    score_events,
)
from minsae_jax.evaluation.events import Span, SpanActivations
from minsae_jax.evaluation.linear_probe import fit_probe
from minsae_jax.evaluation.pca import raw_autoencoder
from minsae_jax.evaluation.token_pass import read_features
from tests.evaluation.planted import CHANNELS, TOKENS, make_places, write_planted

D_MODEL = 16
N_RECORDINGS = 8


def pairs_auc(is_event, scores):
    scores = np.asarray(scores)
    u = mannwhitneyu(scores[is_event], scores[~is_event]).statistic
    return u / (is_event.sum() * (~is_event).sum())


def planted_spans(direction, seed, strength=4.5, n=80):
    """Noise, with the direction added to one token of each event."""
    rng = np.random.default_rng(seed)
    spans = SpanActivations([], [])
    for i in range(n):
        x = rng.normal(size=(rng.integers(2, 6), D_MODEL)).astype(np.float32)
        is_event = i % 2 == 0
        x[0] += strength * is_event * direction
        spans.spans.append(Span(i // 2 % N_RECORDINGS, 0, 10, (0,), is_event))
        spans.activations.append(x)
    return spans


@pytest.fixture(scope="module")
def directions():
    """Two orthogonal directions, one for each kind of events."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(D_MODEL, D_MODEL)))
    return q.T.astype(np.float32)


@pytest.fixture(scope="module")
def kinds(directions):
    resamples = Resamples(draw_weights(N_RECORDINGS, seed=0), np.arange(N_RECORDINGS))
    nowhere = np.zeros((CHANNELS, TOKENS), bool)
    made = []
    for i, name in enumerate(("first", "second")):
        kind = EventKind(
            name=name,
            events=[],
            val=planted_spans(directions[i], 10 + i),
            test=planted_spans(directions[i], 20 + i),
            val_resamples=resamples,
            test_resamples=resamples.with_original(),
            touched=nowhere,
            covered=nowhere,
            base_rate=0.0,
        )
        made.append(kind)
    return made


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    """The scores of an autoencoder on spans; no feature is active on the tokens of the store."""
    places = make_places(1, 1)
    x = np.zeros((CHANNELS, TOKENS, D_MODEL))
    test = write_planted(tmp_path_factory.mktemp("store"), x, places)

    def score(sae, kinds):
        chosen = [choose_features(sae, kind) for kind in kinds]
        best = [int(of_kind.best[0]) for of_kind in chosen]
        tokens = read_features(test, {"sae": sae}, {"sae": best}, np.ones(1, bool))
        return score_events(sae, kinds, chosen, tokens["sae"], test, "source")

    return score


def autoencoder(directions):
    """An autoencoder with x̂ = x in an orthogonal basis of positive and negative parts."""
    both = np.concatenate([directions, -directions]).T
    zeros = np.zeros(both.shape[1])
    params = {"W_enc": both, "b_enc": zeros, "W_dec": both.T, "b_dec": np.zeros(D_MODEL)}
    return SparseAutoencoder(params)


def span_maxima(sae, spans):
    return np.stack([np.asarray(sae.encode(x)).max(0) for x in spans.activations])


def test_planted_features_are_found_and_pure_in_effect(directions, kinds, score):
    measures = score(autoencoder(directions), kinds)
    first, second = measures.scores.values()
    assert (first.feature, second.feature) == (0, 1)
    for found in (first, second):
        assert found.val_events == found.test_events == 40
        assert found.auc.value > 0.95
        assert found.recall.value > 0.8
        assert found.n_ties == 1
        # x̂ = x, so that nothing is lost.
        assert found.x_hat_probe_auc.value == pytest.approx(found.x_probe_auc, abs=1e-3)
        # Without the planted features the probe is at chance; the other one is not touched.
        assert found.x_hat_probe_auc.value - found.ablation_drop.value == pytest.approx(
            0.5, abs=0.15
        )
        assert abs(found.ablation_drop_others.value) < 0.05


def test_raw_dimensions_mix_the_kinds(directions, kinds, score):
    """Orthogonal directions that are not the axes: each dimension has a part of both."""
    planted = score(autoencoder(directions), kinds)
    raw = score(raw_autoencoder(np.zeros(D_MODEL)), kinds)
    for of_planted, of_raw in zip(planted.scores.values(), raw.scores.values(), strict=True):
        assert of_raw.auc.value < of_planted.auc.value - 0.05
        assert of_raw.recall.value < of_planted.recall.value


def test_every_feature_by_brute_force(directions, kinds, score):
    sae = autoencoder(directions)
    measures = score(sae, kinds)
    for i, kind in enumerate(kinds):
        for spans, aucs in (
            (kind.val, measures.features.val_auc[i]),
            (kind.test, measures.features.auc[i]),
        ):
            maxima = span_maxima(sae, spans)
            expected = [pairs_auc(spans.is_event, column) for column in maxima.T]
            np.testing.assert_allclose(aucs, expected, atol=1e-6)
        val, test = span_maxima(sae, kind.val), span_maxima(sae, kind.test)
        five = list(measures.scores[kind.name].best_five)
        assert set(five) == set(np.argsort(-measures.features.val_auc[i], kind="stable")[:5])
        mean, sd = val[:, five].mean(0), val[:, five].std(0)
        z = np.insert((val[:, five] - mean) / sd, 0, 1, axis=1)
        sign = np.where(kind.val.is_event, -1, 1)
        weights = minimize(
            lambda w, z=z, sign=sign: (
                np.log1p(np.exp(sign * (z @ w))).mean() + 5e-4 * (w[1:] ** 2).sum()
            ),
            np.zeros(6),
        ).x
        logits = (test[:, five] - mean) / sd @ weights[1:]
        expected = pairs_auc(kind.test.is_event, logits)
        assert measures.scores[kind.name].probe_auc.value == pytest.approx(expected, abs=2e-3)


def relevant_features(sae, kind):
    """The five features that raise the probe on events more than on others, in val."""
    tokens = np.concatenate(kind.val.activations)
    is_event = np.repeat(kind.val.is_event, [len(x) for x in kind.val.activations])
    f = np.asarray(sae.encode(tokens))
    difference = f[is_event].mean(0) - f[~is_event].mean(0)
    return np.argsort(-difference * (sae.decoder_directions @ kind.probe.weights))[:5]


def probe_scores(sae, kind, ablated):
    """The largest logit of the kind's probe on x̂ in each test span, with features set to 0."""
    scores = []
    for x in kind.test.activations:
        f = np.array(sae.encode(x))
        f[:, ablated] = 0
        scores.append(kind.probe(np.asarray(sae.decode(f))).max())
    return np.array(scores)


def test_ablation_runs_the_probe_without_the_features(directions, kinds, score):
    """The drops against an autoencoder in which the features are set to 0."""
    sae = autoencoder(directions)
    measures = score(sae, kinds)
    for i, kind in enumerate(kinds):
        features = relevant_features(sae, kind)

        def drop(of, features=features):
            complete, without = probe_scores(sae, of, []), probe_scores(sae, of, features)
            return pairs_auc(of.test.is_event, complete) - pairs_auc(of.test.is_event, without)

        assert measures.scores[kind.name].ablation_drop.value == pytest.approx(drop(kind), abs=2e-3)
        of_other = drop(kinds[1 - i])
        assert measures.scores[kind.name].ablation_drop_others.value == pytest.approx(
            of_other, abs=2e-3
        )


def test_spans_without_other_features_are_equal_after_an_ablation(directions, kinds, score):
    """All features are among the five that are ablated: the AUC is 0.5, not of rounding errors."""
    rng = np.random.default_rng(0)
    five = rng.normal(size=(5, D_MODEL)) + np.repeat(directions[:1], 5, axis=0)
    params = {"W_enc": five.T, "b_enc": np.zeros(5), "W_dec": five, "b_dec": np.ones(D_MODEL)}
    measures = score(SparseAutoencoder(params), kinds)
    for found in measures.scores.values():
        expected = found.x_hat_probe_auc.value - 0.5
        assert found.ablation_drop.value == pytest.approx(expected, abs=1e-9)
        assert found.ablation_drop_others.value != 0


def test_copies_of_a_feature_are_ties(directions, kinds, score):
    sae = autoencoder(directions)
    params = {name: np.array(value) for name, value in sae.params.items()}
    # Feature 7 becomes a copy of feature 0, and each has half of the decoder direction.
    params["W_enc"][:, 7] = params["W_enc"][:, 0]
    measures = score(SparseAutoencoder(params), kinds)
    first = measures.scores["first"]
    assert first.n_ties == 2
    assert first.ties == (0, 7)
    assert first.ties_auc == (first.auc.value, first.auc.value)


def resampled_aucs(scores, spans):
    """The AUC over pairs of spans, each as often as a resample has both of their recordings."""
    scores = np.asarray(scores)
    events, others = scores[spans.is_event], scores[~spans.is_event]
    wins = (events[:, None] > others) + 0.5 * (events[:, None] == others)
    counts = draw_weights(N_RECORDINGS, seed=0)[:, spans.recording]
    of_events, of_others = counts[:, spans.is_event], counts[:, ~spans.is_event]
    n_pairs = of_events.sum(axis=1) * of_others.sum(axis=1)
    return ((of_events @ wins) * of_others).sum(axis=1) / n_pairs


def expanded_percentiles(values):
    """Hesterberg 2015: t with n - 1 degrees of freedom, as a percentile of the normal."""
    outside = norm.cdf(np.sqrt(N_RECORDINGS / (N_RECORDINGS - 1)) * t.ppf(0.025, N_RECORDINGS - 1))
    return np.percentile(values, [100 * outside, 100 * (1 - outside)])


def limits(values):
    return pytest.approx(tuple(expanded_percentiles(values)), abs=1e-6)


def test_intervals_are_of_resampled_recordings(directions, kinds, score):
    sae = autoencoder(directions)
    maxima = span_maxima(sae, kinds[0].test)[:, 0]
    expected = limits(resampled_aucs(maxima, kinds[0].test))
    assert tuple(score(sae, kinds).scores["first"].auc.interval) == expected


def test_interval_of_the_gain_is_of_differences(directions, kinds, score):
    """Both AUCs of a resample are of the same recordings."""
    sae = autoencoder(directions)
    # Noise on the encoder makes its features worse.
    noise = 0.3 * np.random.default_rng(1).normal(size=directions.shape)
    other = autoencoder((directions + noise).astype(np.float32))
    member, control = score(sae, kinds), score(other, kinds)
    over_control = gain_over(control, member)
    differences = []
    for kind in kinds:
        aucs = []
        for each, scores in ((sae, member), (other, control)):
            best = scores.scores[kind.name].feature
            aucs.append(resampled_aucs(span_maxima(each, kind.test)[:, best], kind.test))
        differences.append(aucs[0] - aucs[1])
        gain = over_control.auc_gain[kind.name]
        assert tuple(gain.interval) == limits(differences[-1])
        low, high = gain.interval
        assert low < gain.value < high
    assert tuple(over_control.mean_auc_gain.interval) == limits(np.mean(differences, axis=0))


def test_interval_of_a_sparse_probe_keeps_the_probe(directions, kinds, score):
    sae = autoencoder(directions)
    found = score(sae, kinds).scores["first"]
    five = list(found.best_five)
    val, test = span_maxima(sae, kinds[0].val), span_maxima(sae, kinds[0].test)
    probe = fit_probe(val[:, five].astype(np.float64), kinds[0].val.is_event)
    aucs = resampled_aucs(probe(test[:, five]), kinds[0].test)
    assert tuple(found.probe_auc.interval) == limits(aucs)
    low, high = found.probe_auc.interval
    assert low < found.probe_auc.value < high


def test_interval_of_targeted_perturbation_is_of_differences(directions, kinds, score):
    """Drop of the own probe less that of the other, in the same resamples; mean over kinds."""
    sae = autoencoder(directions)
    differences = []
    for i, kind in enumerate(kinds):
        features = relevant_features(sae, kind)
        drops = []
        for of in (kind, kinds[1 - i]):
            complete = resampled_aucs(probe_scores(sae, of, []), of.test)
            drops.append(complete - resampled_aucs(probe_scores(sae, of, features), of.test))
        differences.append(drops[0] - drops[1])
    low, high = expanded_percentiles(np.mean(differences, axis=0))
    assert tuple(score(sae, kinds).summary.tpp.interval) == pytest.approx((low, high), abs=2e-3)
    assert high - low > 0.02


def test_probe_recovered_is_undefined_where_the_probe_of_x_is_at_chance():
    """The quotient of an AUC of 0.6 and one of 0.52 would be 5, with an interval of -20 to 30."""
    noise = np.random.default_rng(0).normal(scale=0.03, size=1000)
    x_hat = 0.6 + np.append(0, noise)
    certain = probe_recovered(0.7 + np.append(0, noise), x_hat, 8)
    assert certain.value == pytest.approx(0.5)
    assert certain.interval.low < 0.5 < certain.interval.high
    for x in (0.52, 0.48):
        at_chance = probe_recovered(x + np.append(0, noise), x_hat, 8)
        assert np.isnan(at_chance.value)
        assert at_chance.interval is None
    # Of a single patient, nothing varies.
    assert probe_recovered(np.full(5, 0.7), np.full(5, 0.6), 1).value == pytest.approx(0.5)
