"""Measures of every feature of the members of a run: description length and events."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from minsae_jax.errors import join_some
from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation.bootstrap import draw_patients
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.description_length import description_length
from minsae_jax.evaluation.event_measures import (
    ChosenFeatures,
    EventKind,
    choose_features,
    score_events,
)
from minsae_jax.evaluation.event_results import (
    EventEvaluation,
    EventScore,
    EventSummary,
    FeatureEvents,
    ResampledAUCs,
)
from minsae_jax.evaluation.events import WITHOUT_SPANS, draw_spans, event_share, gather
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.saved import Arrays, Keys, make_key, saved_or_measured
from minsae_jax.evaluation.token_measures import TokenResult
from minsae_jax.evaluation.token_pass import read_features
from minsae_jax.files import sha256_of
from minsae_jax.json_values import to_json
from minsae_jax.monitor import progress
from minsae_jax.settings import JsonObject

MAX_EVENTS = 5000  # of each kind in spans, which bounds the memory
# Activations of chosen features on all labelled test tokens that are in memory at once (4 GB).
# Members beyond that need another pass over the test store.
MAX_TOKEN_VALUES = 2**30
Measures = TypeVar("Measures", EventScore, EventSummary)


class FeatureResult(NamedTuple):
    """One autoencoder's description length, and its features against events if there are any."""

    description_bits: float
    # Mean over all tokens of f_i ‖W_dec,i‖
    contribution: Float[np.ndarray, " d_sae"]
    events: EventEvaluation | None
    # Kinds of events without spans, and in brackets for which patients
    left_out: tuple[str, ...]

    def to_arrays(self) -> Arrays:
        arrays = {
            "description_bits": np.array(self.description_bits),
            "contribution": self.contribution,
            "left_out": np.array(json.dumps(self.left_out)),
        }
        if self.events is None:
            return arrays
        record = to_json({"scores": self.events.scores, "summary": self.events.summary})
        arrays["record"] = np.array(json.dumps(record))
        resampled = self.events.resampled._asdict()
        return arrays | vars(self.events.features) | {k: np.array(v) for k, v in resampled.items()}

    @classmethod
    def from_arrays(cls, saved: Arrays) -> "FeatureResult":
        bits = float(saved["description_bits"])
        left_out = tuple(json.loads(str(saved["left_out"])))
        if "record" not in saved:
            return cls(bits, saved["contribution"], None, left_out)
        record = json.loads(str(saved["record"]))
        scores = {kind: _from_json(EventScore, score) for kind, score in record["scores"].items()}
        summary = _from_json(EventSummary, record["summary"])
        names = [field.name for field in fields(FeatureEvents) if field.name != "kinds"]
        features = FeatureEvents(tuple(scores), **{name: saved[name] for name in names})
        resampled = ResampledAUCs(
            saved["aucs"], saved["n_patients"], str(saved["source"]), str(saved["encoder"])
        )
        events = EventEvaluation(scores, summary, features, resampled)
        return cls(bits, saved["contribution"], events, left_out)


def _from_json(measures: type[Measures], record: JsonObject) -> Measures:
    """Return measures that `to_json` converted: null is NaN in them, and a list a tuple."""
    values = {}
    for field in fields(measures):
        value = record[field.name]
        if value is None and field.type in (float, Estimate):
            value = math.nan
        if field.type is Estimate:
            ends = record[f"{field.name}_interval"]
            value = Estimate(value, None if ends is None else Interval(*ends))
        elif isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    return measures(**values)


def measure_features(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    keys: Mapping[str, Keys],
    tokens: Mapping[str, TokenResult],
) -> dict[str, FeatureResult]:
    """Return the measures of all members, by name; saved ones are not measured again.

    Warns of kinds of events that are not evaluated, also if all measures are saved.
    """
    variance = next(iter(tokens.values())).variance
    results = saved_or_measured(
        inputs.out,
        "features",
        members,
        keys,
        lambda missing: _score_features(settings, inputs, missing, variance),
        FeatureResult.to_arrays,
        FeatureResult.from_arrays,
    )
    # The same for all members
    left_out = next(iter(results.values())).left_out
    if left_out:
        warnings.warn(
            f"kinds of events that are not evaluated: {join_some(left_out)}; {WITHOUT_SPANS}",
            stacklevel=2,
        )
    return results


def _score_features(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    variance: float,
) -> dict[str, FeatureResult]:
    """Score the features of all members: on the spans of events, then over all test tokens."""
    test = inputs.test
    n_tokens = test.store.total_tokens
    is_labelled = _labelled_recordings(inputs)
    kinds, left_out = _event_kinds(settings, inputs, is_labelled)
    source = source_of(settings, inputs)
    chosen: dict[str, list[ChosenFeatures]] = {}
    with progress("choose features", len(members), "members", delay=2.0) as bar:
        for member in members:
            chosen[member.name] = [choose_features(member.sae, kind) for kind in kinds]
            bar.advance(1)
    values_of_member = (
        len(kinds) * int(is_labelled[test.recording].sum()) * len(test.tokens.located)
    )
    members_at_once = max(1, MAX_TOKEN_VALUES // max(values_of_member, 1))
    results = {}
    for first in range(0, len(members), members_at_once):
        saes = {member.name: member.sae for member in members[first : first + members_at_once]}
        best = {name: [int(of_kind.best[0]) for of_kind in chosen[name]] for name in saes}
        tokens = read_features(test, saes, best, is_labelled)
        with progress("score events", len(saes), "members", delay=2.0) as bar:
            for name, sae in saes.items():
                of_sae = tokens[name]
                bits = description_length(
                    of_sae.active, of_sae.mean, of_sae.mean_square, n_tokens, variance
                )
                contribution = of_sae.mean * of_sae.active / n_tokens
                events = None
                if kinds:
                    events = score_events(sae, kinds, chosen[name], of_sae, test, source)
                results[name] = FeatureResult(bits, contribution, events, left_out)
                bar.advance(1)
    return results


def source_of(settings: EvaluateConfig, inputs: EvaluationInputs) -> str:
    """Return the checksum of everything that AUCs of two encoders must share to be compared."""
    places = [
        None if dataset is None else dataset.places_sha256()
        for dataset in (inputs.test, inputs.val)
    ]
    events = [sha256_of(path) for path in inputs.event_files]
    origin = inputs.test.store.origin
    return make_key("resamples", places, events, settings.seed, origin.layer_index, origin.revin)


def _labelled_recordings(inputs: EvaluationInputs) -> Bool[np.ndarray, " recordings"]:
    """Return which test recordings have labelled events; all if there are no events."""
    names = inputs.test.recordings
    if inputs.events is None:
        return np.ones(len(names), bool)
    labelled = {event.recording for events in inputs.events.test.values() for event in events}
    return np.array([name in labelled for name in names])


def _event_kinds(
    settings: EvaluateConfig, inputs: EvaluationInputs, is_labelled: Bool[np.ndarray, " recordings"]
) -> tuple[list[EventKind], tuple[str, ...]]:
    """Return the kinds of events with spans in val and test, by name; and the others.

    Of the others, the names and for which patients there are no spans.
    """
    test = inputs.test
    val = inputs.val
    if val is None or inputs.events is None:
        return [], ()
    kinds = []
    left_out = []
    val_events, test_events = inputs.events
    val_resamples = draw_patients(val.recordings, settings.seed)
    test_resamples = draw_patients(test.recordings, settings.seed).with_original()
    for name, events in sorted(test_events.items()):
        # Features are chosen on val patients and scored on test patients, so that the best of
        # many features does not win by chance.
        val_spans = gather(val, draw_spans(val, val_events[name], settings.seed, MAX_EVENTS))
        test_spans = gather(test, draw_spans(test, events, settings.seed, MAX_EVENTS))
        without = [
            split
            for split, spans in (("val", val_spans), ("test", test_spans))
            if len(spans.is_event) == 0
        ]
        if without:
            left_out.append(f"{name} ({' and '.join(without)})")
            continue
        share = event_share(test, events)
        of_labelled = share[is_labelled[test.recording]]
        kind = EventKind(
            name=name,
            events=events,
            val=val_spans,
            test=test_spans,
            val_resamples=val_resamples,
            test_resamples=test_resamples,
            touched=share > 0,
            covered=of_labelled >= 0.5,
            base_rate=float((of_labelled > 0).mean()),
        )
        kinds.append(kind)
    return kinds, tuple(left_out)
