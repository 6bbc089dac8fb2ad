"""The pages of kinds of events: how well features detect them, and steering with the best one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.control import RANDOM
from minsae_jax.evaluation.event_results import EventScore, EventSummary, FeatureScore
from minsae_jax.evaluation.results import Evaluation
from minsae_jax.evaluation.steering.results import Steering

RANKED = 50  # features in the table of an event


@dataclass(frozen=True)
class SteeringEffect:
    """Changes when the activations of a feature are multiplied by `scale`."""

    scale: float
    # By kind of event: mean change of its probe's logit on its events, in SD
    changes: Mapping[str, float]
    # |change| of the target over the largest |change| of another kind
    selectivity: float | None = None
    # Change of a reconstructed patch, mean over tokens with the feature active
    waveform: Float[np.ndarray, " patch_len"] | None = None
    # By band: power of the reconstruction over that of the untouched one
    band_ratio: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SteeringResult:
    """Steering with the best feature of a kind of event."""

    feature: int
    # Of the waveform
    unit: str
    n_tokens: int
    # Tokens with the feature active
    n_affected: int
    effects: Sequence[SteeringEffect]


@dataclass(frozen=True)
class EventPage:
    """One kind of event: its row in the overview, and its page."""

    kind: str
    # Of the member's features ("sae") and of the baselines' ("raw", "pca", with --control "random")
    scores: Mapping[str, EventScore]
    # Those that are active, by AUC on val, the best first
    features: Sequence[FeatureScore] = ()
    steering: SteeringResult | None = None
    # AUC of the best feature less that of the control's
    auc_gain: Estimate | None = None


def event_pages(evaluation: Evaluation, steering: Mapping[str, Steering]) -> list[EventPage]:
    """Return a page for each kind of event of the selected member.

    steering: with the best feature of each kind; may be empty.
    """
    events = evaluation.find(evaluation.selected).event_evaluation
    if events is None:
        return []
    pages = []
    over_control = evaluation.gains.get(RANDOM)
    for i, (kind, score) in enumerate(events.scores.items()):
        order = np.argsort(-events.features.val_auc[i], kind="stable")
        # Features that are never active have an AUC of 0.5, above that of many others.
        is_listed = events.features.examples[order] > 0
        is_listed |= order == score.feature
        order = order[is_listed][:RANKED]
        page = EventPage(
            kind=kind,
            scores={"sae": score} | evaluation.baselines[kind],
            features=[events.features.score(kind, feature) for feature in order.tolist()],
            steering=_steering_result(steering[kind]) if kind in steering else None,
            auc_gain=None if over_control is None else over_control.auc_gain[kind],
        )
        pages.append(page)
    return pages


def event_means(evaluation: Evaluation) -> dict[str, EventSummary] | None:
    """Return the means over kinds of event, with the keys of `EventPage.scores`."""
    selected = evaluation.find(evaluation.selected).event_evaluation
    if selected is None:
        return None
    baselines = {name: events.summary for name, events in evaluation.baseline_events.items()}
    return {"sae": selected.summary} | baselines


def _steering_result(steering: Steering) -> SteeringResult:
    effects = []
    for effect in steering.effects:
        output = effect.reconstruction
        selectivity = None if steering.target is None else effect.selectivity(steering.target)
        of_scale = SteeringEffect(
            scale=effect.scale,
            changes={reading.kind: reading.change for reading in effect.probes},
            selectivity=selectivity,
            waveform=None if output is None else output.waveform,
            band_ratio={} if output is None else output.band_ratio,
        )
        effects.append(of_scale)
    return SteeringResult(
        feature=steering.features[0],
        unit=steering.unit,
        n_tokens=steering.n_tokens,
        n_affected=steering.n_affected,
        effects=effects,
    )
