"""The recommended member, by made-up measures."""

import numpy as np
import pytest

from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation.event_results import (
    EventEvaluation,
    EventSummary,
    FeatureEvents,
    ResampledAUCs,
)
from minsae_jax.evaluation.loss_recovered import LossRecovered
from minsae_jax.evaluation.recommend import dominating, member_warnings, recommend
from minsae_jax.evaluation.results import (
    DecoderCosines,
    DensityHistogram,
    MemberEvaluation,
    PCAEvaluation,
    TokenMeasures,
)
from minsae_jax.evaluation.stability import Stability

D_MODEL = 128
NOTHING = np.zeros((0, 0))
NO_FEATURES = FeatureEvents(
    kinds=(),
    val_auc=NOTHING,
    auc=NOTHING,
    recall=NOTHING,
    precision=NOTHING,
    examples=np.zeros(0, int),
    base_rate=np.zeros(0),
    is_pure=NOTHING > 0,
)
NO_AUCS = ResampledAUCs(NOTHING, np.zeros(1, int), "", "")


def make_stability(share):
    """Return matches of 100 features with one other seed, of which a share reappears."""
    cosine = (np.arange(100) < 100 * share)[None].astype(np.float32)
    return Stability(
        others=("other",),
        is_live=np.ones(100, bool),
        match=np.zeros((1, 100), int),
        decoder_cosine=cosine,
        encoder_cosine=cosine,
        chance=np.zeros(100),
    )


def summary(pure):
    return EventSummary(
        auc=Estimate(0.9),
        recall=Estimate(0.5),
        precision=0.5,
        token_auc=0.5,
        probe_auc=Estimate(0.9),
        pure_features=pure,
        tpp=Estimate(0.0),
        probe_recovered=Estimate(1.0),
    )


def member(
    name,
    bits,
    recovered,
    *,
    l0=8.0,
    fvu=0.05,
    reach=0.01,
    stability=None,
    pure=None,
    status="finished",
    twins=0.0,
    inactive=0.0,
):
    tokens = TokenMeasures(fvu, 1 - fvu, l0, 1.0, 0.0, 0.9, 0.9, inactive, DensityHistogram([], []))
    loss = None
    if recovered is not None:
        limits = Interval(recovered - reach, recovered + reach)
        loss = LossRecovered(0.1, Estimate(recovered, limits), recovered, 0.1, 0.2, 0.3)
    events = None
    if pure is not None:
        events = EventEvaluation({}, summary(pure), NO_FEATURES, NO_AUCS)
    cosines = DecoderCosines(0.1, 0.1, twins)
    return MemberEvaluation(
        member=name,
        hyper={"kind": "relu"},
        status=status,
        tokens=tokens,
        decoder=cosines,
        description_bits=float(bits),
        stability=None if stability is None else make_stability(stability),
        weighted_stability=stability,
        loss=loss,
        event_evaluation=events,
    )


def pca(k, fvu):
    return PCAEvaluation(
        k=k,
        fvu=fvu,
        explained_variance=1 - fvu,
        description_bits=100.0,
        loss=None,
        event_evaluation=None,
    )


def test_the_shortest_description_among_those_that_reach_95_percent():
    dense = member("dense", 600, 0.99)
    enough = member("enough", 60, 0.955)
    nearly = member("nearly", 40, 0.945)  # its interval reaches 95 %
    result = recommend([dense, nearly, enough], [], D_MODEL)
    assert result.member == "enough"
    assert result.interval == pytest.approx((0.945, 0.965))
    assert result.runners_up == ("dense",)
    assert (
        "enough (95.5 % recovered, interval 94.5 % to 96.5 %) has the shortest description"
        in result.reason
    )
    assert "60 bits per token (L0 8.0), of the 2 that recover 95 % of the loss" in result.reason


def test_members_that_pca_dominates_come_last():
    dominated = member("dominated", 30, 0.99, l0=8.0, fvu=0.05)
    better = member("better", 50, 0.99, l0=4.0, fvu=0.04)
    components = [pca(4, 0.07), pca(8, 0.03)]
    assert dominating(dominated, components).k == 8
    assert dominating(better, components) is None
    result = recommend([dominated, better], components, D_MODEL)
    assert result.member == "better"
    assert result.reason.endswith(
        "is the only member that recovers 95 % of the loss and that PCA does not dominate"
    )
    assert result.warnings == {"dominated": ("8 principal components explain more variance",)}
    third = member("third", 70, 0.99, l0=4.0, fvu=0.04)
    of_three = recommend([dominated, better, third], components, D_MODEL)
    assert of_three.reason.endswith(
        "of the 2 that recover 95 % of the loss and that PCA does not dominate"
    )
    alone = recommend([dominated], components, D_MODEL)
    assert alone.member == "dominated"
    assert alone.reason.endswith("that recovers 95 % of the loss, yet PCA dominates it")
    also_dominated = member("also_dominated", 60, 0.99, l0=8.0, fvu=0.05)
    both = recommend([dominated, also_dominated], components, D_MODEL)
    assert both.member == "dominated"
    assert "of the 2 that recover 95 % of the loss, all of them dominated by PCA" in both.reason


def test_equal_lengths_are_decided_by_stability_then_purity():
    shortest = member("shortest", 100, 0.99, stability=0.3, pure=9)
    stable = member("stable", 103, 0.99, stability=0.8, pure=2)
    pure = member("pure", 104, 0.99, stability=0.8, pure=5)
    longer = member("longer", 110, 0.99, stability=1.0, pure=20)
    result = recommend([shortest, stable, pure, longer], [], D_MODEL)
    assert result.member == "pure"
    assert result.runners_up == ("stable", "shortest", "longer")
    assert "of the 3 within 5 % of the shortest, it has the most pure features" in result.reason
    by_stability = recommend([shortest, stable], [], D_MODEL)
    assert by_stability.member == "stable"
    assert by_stability.reason.endswith("it has the most stable features")
    as_stable = member("as_stable", 103, 0.99, stability=0.3, pure=9)
    by_length = recommend([as_stable, shortest], [], D_MODEL)
    assert by_length.member == "shortest"
    assert " has the shortest description, 100 bits per token" in by_length.reason
    assert by_length.reason.endswith(
        "no other within 5 % of it has more stable or more pure features"
    )


def test_no_member_reaches_the_threshold():
    result = recommend([member("a", 10, 0.5), member("b", 900, 0.8)], [], D_MODEL)
    assert result.member == "b"
    assert result.reason.startswith("no member reaches 95 % of loss recovered; b (80.0 %")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_an_undefined_measure_is_the_worst(order):
    members = [member("nan", 10, np.nan), member("a", 10, 0.5), member("b", 900, 0.8)]
    assert recommend([members[i] for i in order], [], D_MODEL).member == "b"


def test_diverged_members_are_recommended_only_if_all_are():
    diverged = member("diverged", 10, 0.99, status="diverged")
    assert recommend([diverged, member("b", 90, 0.99)], [], D_MODEL).member == "b"
    result = recommend([diverged], [], D_MODEL)
    assert result.member == "diverged"
    assert result.warnings == {"diverged": ("training diverged",)}


def test_without_a_head_the_explained_variance_decides():
    a = member("a", 50, None, fvu=0.2)
    b = member("b", 90, None, fvu=0.1)
    result = recommend([a, b], [], D_MODEL)
    assert result.member == "b"
    assert result.interval is None
    assert "explains 85 % of the variance" in result.reason


def test_where_loss_recovered_is_undefined_the_explained_variance_decides():
    a = member("a", 50, np.nan, fvu=0.2)
    b = member("b", 90, np.nan, fvu=0.1)
    result = recommend([a, b], [], D_MODEL)
    assert result.member == "b"
    assert result.interval is None
    assert "explains 85 % of the variance" in result.reason


def test_warnings():
    bad = member("bad", 10, 0.99, l0=109.0, fvu=0.015, twins=0.77, inactive=0.29)
    assert member_warnings(bad, [pca(32, 0.005)], D_MODEL) == (
        "32 principal components explain more variance",
        "77 % of the features have a twin (decoder cosine above 0.9)",
        "L0 109 is more than half of the 128 dimensions",
        "29 % of the features are never active",
    )
    assert member_warnings(member("good", 10, 0.99), [pca(4, 0.07)], D_MODEL) == ()
