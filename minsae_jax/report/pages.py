"""Report data other than features: recommendation, members, events and labels.

report.js reads these records; field names are the keys in its data files. Most fields have a
default, since a part without data is not shown. Intervals are 95 % intervals (low, high), and None
where nothing varies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

Interval = tuple[float, float]
DETECTS = 0.8  # least AUC of a feature that detects a kind of event


# ---- of one feature


@dataclass(frozen=True)
class SeedMatch:
    """The feature that matches this one in a member trained from another seed."""

    member: str
    feature: int
    encoder_cosine: float
    decoder_cosine: float
    # Whether it counts as the same feature
    is_same: bool


@dataclass(frozen=True)
class SeedStability:
    """In how many of the seeds a feature is found, its own included."""

    found: int
    seeds: int
    matches: Sequence[SeedMatch] = ()


@dataclass(frozen=True)
class Explained:
    """eta²: share of a feature's variance over tokens that each grouping explains."""

    position: float
    channel: float
    recording: float
    patient: float
    # The patient with the largest mean activation, and that patient's share of the sum
    top_patient: str = ""
    top_patient_share: float | None = None


@dataclass(frozen=True)
class DetectedEvent:
    """How well one feature detects one kind of event, on test patients."""

    kind: str
    auc: float
    # Share of the events found at a precision of 90 %
    recall: float | None = None
    # Share of the feature's strongest tokens that touch an event
    precision: float | None = None
    val_auc: float | None = None


@dataclass(frozen=True)
class DetectedLabel:
    """The association of one feature with one label; patients are the unit."""

    label: str
    effect: float
    p: float
    # After correction for the number of features
    q: float


def best_event(events: Sequence[DetectedEvent]) -> DetectedEvent | None:
    """Return the kind that a feature detects best, or None if no AUC reaches DETECTS."""
    detected = [event for event in events if event.auc >= DETECTS]
    return max(detected, key=lambda event: event.auc, default=None)


# ---- events


@dataclass(frozen=True)
class Detection:
    """How well features of one set detect one kind of event, on test patients."""

    # Of the best feature, chosen on val patients
    auc: float
    auc_interval: Interval | None = None
    recall: float | None = None
    recall_interval: Interval | None = None
    token_auc: float | None = None
    precision: float | None = None
    # AUC of logistic regressions on the best two and the best five
    probe_2_auc: float | None = None
    probe_2_auc_interval: Interval | None = None
    probe_5_auc: float | None = None
    probe_5_auc_interval: Interval | None = None


@dataclass(frozen=True)
class DetectionBySet:
    """The same measures for features and for their baselines."""

    sae: Detection
    # Raw dimensions of the activations, and their principal components
    raw: Detection | None = None
    pca: Detection | None = None


@dataclass(frozen=True)
class RankedFeature:
    """A row in the table of a kind's features."""

    feature: int
    val_auc: float | None
    auc: float
    recall: float | None = None
    precision: float | None = None
    # Whether its AUC on val is inside the interval of the best
    is_tied: bool = False


@dataclass(frozen=True)
class SteeringEffect:
    """Changes when the activations of a feature are multiplied by `scale`."""

    scale: float
    # By kind of event: mean change of its probe's logit on its own events, in SD
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
    test_events: int
    feature: int
    scores: DetectionBySet
    val_events: int | None = None
    # Share of the test tokens that touch an event
    base_rate: float | None = None
    # Features that could be the best one for all patients, and the range of their AUCs on test;
    # None with fewer than three val patients
    n_ties: int | None = 1
    ties_auc: Interval | None = None
    # Features whose strongest tokens nearly all touch an event of this kind
    pure_features: int | None = None
    # By AUC on val, the best first
    features: Sequence[RankedFeature] = ()
    steering: SteeringResult | None = None


# ---- labels


@dataclass(frozen=True)
class LabelledFeature:
    """A row in the table of a label's features."""

    feature: int
    effect: float
    p: float
    q: float
    # eta² of patients
    patient_share: float | None = None


@dataclass(frozen=True)
class ProbeResult:
    """The score of a probe on test patients, and the scores of probes of permuted labels."""

    score: float
    # Share of permutations that score at least as high
    p: float
    # Mean over permutations, and the middle 95 % of them
    permuted: float
    permuted_interval: Interval | None = None


@dataclass(frozen=True)
class LabelProbe:
    """Probes of one label on pooled values, fitted on val patients."""

    # Such as "AUC", and the score of a probe that knows nothing
    score_name: str
    chance: float
    n_val: int
    n_test: int
    features: ProbeResult
    raw: ProbeResult | None = None


@dataclass(frozen=True)
class LabelPage:
    """One label of recordings or patients: its row in the overview, and its page."""

    name: str
    # "number" or "categories"
    type: str
    patients: int
    # Such as "21 to 83, median 52" or "female 9, male 7"
    values: str
    # Name such as "Spearman's rho", and its definition
    effect_name: str
    n_tested: int
    n_significant: int
    effect_hint: str = ""
    recordings: int | None = None
    # How activations are pooled over a recording
    pooling: str = "mean"
    # By q, the smallest first
    features: Sequence[LabelledFeature] = ()
    probe: LabelProbe | None = None
    # Parts that were left out or not measured, with the reason
    notes: Sequence[str] = ()


# ---- members


@dataclass(frozen=True)
class MemberMeasures:
    """A member of the sweep, or PCA with k components, in the comparison; None: not measured."""

    name: str
    # "pca" for principal components
    kind: str
    # Such as "k = 8"
    setting: str
    # Equal for members of a kind that differ in their sparsity only
    line: str
    l0: float
    fvu: float
    loss_recovered: float | None = None
    loss_recovered_interval: Interval | None = None
    # Share of the features that are never active on the test patients
    never_active: float | None = None
    # Share of the live features found again with other seeds
    stability: float | None = None
    pure_features: int | None = None
    # Mean over kinds of event
    event_auc: float | None = None
    event_auc_interval: Interval | None = None
    # Targeted probe perturbation, mean over kinds of event
    tpp: float | None = None
    tpp_interval: Interval | None = None
    # Share of decoder rows with a cosine above 0.9 with another
    twins: float | None = None
    # Bits per token
    description_bits: float | None = None
    warnings: Sequence[str] = ()
    is_recommended: bool = False


@dataclass(frozen=True)
class RecommendedMember:
    """The recommended member, and why."""

    member: str
    # One sentence, with the interval of the deciding measure
    reason: str
    # By which members are ranked
    rule: str = ""
    runners_up: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Pages:
    """All pages."""

    recommended: RecommendedMember | None = None
    members: Sequence[MemberMeasures] = ()
    events: Sequence[EventPage] = ()
    # Means over the kinds of event
    event_means: DetectionBySet | None = None
    labels: Sequence[LabelPage] = ()
    # Number of seeds in which features can be found; None with one seed
    n_seeds: int | None = None
