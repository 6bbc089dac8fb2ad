"""The results of an evaluation, with their entries in evaluation.json and evaluation.csv."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass

from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation.associations import Associations
from minsae_jax.evaluation.event_results import EventEvaluation, EventScore, EventSummary, Gain
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.loss_recovered import LossRecovered, SubstitutionErrors
from minsae_jax.evaluation.stability import Stability
from minsae_jax.json_values import to_json
from minsae_jax.sae.figures import PCA
from minsae_jax.sae.hyper import Hyper
from minsae_jax.settings import JsonObject


@dataclass(frozen=True)
class DensityHistogram:
    """Number of features by log10 density, the share of tokens with the feature active."""

    edges: list[float]
    # Number of features between edges; never active ones are left out
    features: list[int]


@dataclass(frozen=True)
class TokenMeasures:
    """Measures of one member over all test tokens; see `minsae_jax.sae.measures`."""

    fvu: float
    explained_variance: float
    l0: float
    l1: float
    dense_fraction: float
    cosine: float
    norm_ratio: float
    # Share of features active on no test token. In training, dead means something else: not active
    # on the last --dead_after tokens.
    never_active_fraction: float
    log10_density: DensityHistogram


@dataclass(frozen=True)
class DecoderCosines:
    """Largest cosine of each decoder row with any other row (near 1 means duplicates)."""

    mean: float
    median: float
    # Share of rows with a cosine above 0.9
    over_0_9: float


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What is measured of members and of principal components alike."""

    # See `description_length`
    description_bits: float
    # None if the encoder declares no reconstruction
    loss: LossRecovered | None
    # None if there is no events.csv
    event_evaluation: EventEvaluation | None

    @property
    def event_summary(self) -> EventSummary | None:
        """Means over the kinds of events."""
        return None if self.event_evaluation is None else self.event_evaluation.summary

    def to_record(self) -> JsonObject:
        """Return the entry in evaluation.json, for `to_json`."""
        record: JsonObject = {"description_bits": self.description_bits}
        if self.loss is not None:
            record |= vars(self.loss)
        if self.event_evaluation is not None:
            record["event_summary"] = self.event_evaluation.summary
            record["events"] = self.event_evaluation.scores
        return record

    def to_row(self) -> JsonObject:
        """Return the row in evaluation.csv, whose cells cannot contain records or intervals."""
        row = {}
        for name, value in self.to_record().items():
            if isinstance(value, Estimate):
                row[name] = value.value
            elif not is_dataclass(value) and not isinstance(value, dict):
                row[name] = value
        if self.loss is not None:  # the ends of its interval are after all values
            row |= _cells("loss_recovered", self.loss.loss_recovered)
        if self.event_evaluation is not None:
            for name, value in vars(self.event_evaluation.summary).items():
                row |= _cells(f"events_{name}", value)
            for kind, score in self.event_evaluation.scores.items():
                row |= {f"{kind}_{name}": cell for name, cell in _score_cells(score).items()}
        return row


@dataclass(frozen=True, kw_only=True)
class PCAEvaluation(Evaluated):
    """The evaluation of the k principal components of largest magnitude of every token."""

    k: int
    fvu: float
    explained_variance: float

    @property
    def name(self) -> str:
        return f"pca,k={self.k}"

    def to_record(self) -> JsonObject:
        record: JsonObject = {"k": self.k, "fvu": self.fvu}
        record["explained_variance"] = self.explained_variance
        return record | super().to_record()

    def to_row(self) -> JsonObject:
        return {"member": self.name, "kind": PCA, "l0": self.k} | super().to_row()


@dataclass(frozen=True, kw_only=True)
class MemberEvaluation(Evaluated):
    """The evaluation of one member."""

    member: str
    hyper: Hyper
    # "finished" or "diverged"
    status: str | None
    tokens: TokenMeasures
    decoder: DecoderCosines
    # Both None with one seed; weights are f_i ‖W_dec,i‖, the features' parts in x̂
    stability: Stability | None
    weighted_stability: float | None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.member}, L0 {self.tokens.l0:.1f}, FVU {self.fvu:.4f})"

    @property
    def fvu(self) -> float:
        return self.tokens.fvu

    @property
    def events(self) -> Mapping[str, EventScore] | None:
        """Scores by kind of event."""
        return None if self.event_evaluation is None else self.event_evaluation.scores

    def to_record(self) -> JsonObject:
        record: JsonObject = {"member": self.member, **self.hyper, "status": self.status}
        record |= vars(self.tokens)
        record["decoder_cosine_mean"] = self.decoder.mean
        record["decoder_cosine_median"] = self.decoder.median
        record["decoder_cosine_over_0.9"] = self.decoder.over_0_9
        if self.stability is not None:
            record["stability"] = self.stability.share()
            record["weighted_stability"] = self.weighted_stability
            record["stability_by_chance"] = self.stability.share_by_chance()
        return record | super().to_record()


def _score_cells(score: EventScore) -> JsonObject:
    return {
        "feature": score.feature,
        **_cells("auc", score.auc),
        "n_ties": score.n_ties,
        "recall": score.recall.value,
        "precision": _empty_if_nan(score.precision.value),
        "token_auc": _empty_if_nan(score.token_auc),
        **_cells("probe_auc", score.probe_auc),
        "x_hat_probe_auc": score.x_hat_probe_auc.value,
        **_cells("ablation_drop", score.ablation_drop),
        "ablation_drop_others": _empty_if_nan(score.ablation_drop_others.value),
        "pure_features": score.pure_features,
    }


def _cells(name: str, measure: Estimate | int | float) -> JsonObject:
    """Return the cells of a measure: also the ends of an interval, such as auc_low and auc_high."""
    if not isinstance(measure, Estimate):
        return {name: measure}
    low, high = measure.interval or ("", "")
    return {name: measure.value, f"{name}_low": low, f"{name}_high": high}


def _empty_if_nan(value: float) -> float | str:
    return "" if math.isnan(value) else value


@dataclass(frozen=True)
class Recommendation:
    """The member that the rule of `minsae_jax.evaluation.recommend` chooses."""

    member: str
    # Of its loss recovered; None if that was not measured
    interval: Interval | None
    # The next ones by the same rule
    runners_up: tuple[str, ...]
    # One sentence
    reason: str
    # Warnings by member; members without any are left out
    warnings: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of the members of a run."""

    inputs: EvaluationInputs
    members: tuple[MemberEvaluation, ...]
    # Empty without a store of the val patients
    pca: tuple[PCAEvaluation, ...]
    recommendation: Recommendation
    # How it was chosen
    rule: str
    # The member that the report is about: that of --member, else the recommended one
    selected: str
    # None if the encoder declares no reconstruction
    substitution: SubstitutionErrors | None
    mask_ratio: float
    # All raw dimensions ("raw") and all principal components ("pca") as features, which have both
    # signs, and with --control the features of the selected member's control ("random"); empty
    # without labelled events
    baseline_events: Mapping[str, EventEvaluation]
    # Of the selected member over each of `baseline_events`
    gains: Mapping[str, Gain]
    # Folder of --control
    control: str | None = None
    # Of the features of the selected member with labels; None without a report
    associations: Associations | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inputs.run}, {len(self.members)} members)"

    @property
    def recommended(self) -> str:
        """Name of the recommended member."""
        return self.recommendation.member

    @property
    def baselines(self) -> dict[str, dict[str, EventScore]]:
        """Scores of `baseline_events` by kind of event, then by name."""
        by_kind: dict[str, dict[str, EventScore]] = {}
        for name, events in self.baseline_events.items():
            for kind, score in events.scores.items():
                by_kind.setdefault(kind, {})[name] = score
        return by_kind

    def find(self, name: str) -> MemberEvaluation:
        """Return the evaluation of the member called `name`."""
        return next(member for member in self.members if member.member == name)

    def summary(self) -> str:
        """Return the members as a table for the terminal, and the recommended member."""
        from minsae_jax.evaluation.summary import summary

        return summary(self)

    def to_record(self) -> JsonObject:
        """Return the content of evaluation.json."""
        store = self.inputs.test.store
        baselines = {}
        for kind, scores in self.baselines.items():
            aucs = {f"{name}_auc": score.auc.value for name, score in scores.items()}
            baselines[kind] = aucs | scores
        summaries = {name: events.summary for name, events in self.baseline_events.items()}
        record = {
            "rule": self.rule,
            "run": str(self.inputs.run),
            "folders": {member.name: str(member.folder) for member in self.inputs.members},
            "store": str(store.folder),
            "tokens": store.total_tokens,
            "substitution": self._substitution_record(),
            "recommended": self.recommended,
            "recommendation": self.recommendation,
            "baselines": baselines,
            "baseline_summaries": summaries,
            "gains": {name: gain._asdict() for name, gain in self.gains.items()},
            "members": [member.to_record() for member in self.members],
            "pca": [components.to_record() for components in self.pca],
        }
        if self.control is not None:
            record["control"] = self.control
        return to_json(record)

    def _substitution_record(self) -> JsonObject | str:
        errors = self.substitution
        if errors is None:
            encoder = self.inputs.encoder
            reason = "no encoder was given" if encoder is None else encoder.reconstruction_note
            return f"not measured: {reason}"
        return {
            "windows": errors.windows,
            "untouched": errors.untouched,
            "mean_ablation": errors.mean_ablation,
            "zero_ablation": errors.zero_ablation,
            "mask_ratio": self.mask_ratio,
        }
