"""The table for the terminal, and evaluation.json, evaluation.csv and evaluation.png."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence

from minsae_jax.checksums import update_checksums
from minsae_jax.estimates import Estimate
from minsae_jax.evaluation.associations import Associations
from minsae_jax.evaluation.control import RANDOM
from minsae_jax.evaluation.event_results import EventScore
from minsae_jax.evaluation.figure import draw_evaluation
from minsae_jax.evaluation.label_tests import LEVEL
from minsae_jax.evaluation.pca import COMPONENTS, RAW
from minsae_jax.evaluation.results import Evaluated, Evaluation
from minsae_jax.files import atomic_write
from minsae_jax.monitor import table, wrap
from minsae_jax.sae.hyper import SYMBOLS

FEW_PATIENTS = 3
LISTED = 3  # categories of a label
PCA_NOTE = """\
pca: principal components of fewer than three val patients, since there is no
train store. Where the test patients differ from them, PCA looks worse than it
is."""
EVENTS_NOTE = """\
Means over the kinds of events, of the best feature for each, chosen on
{val} and measured on {test}.
AUC: a span with an event against one without. Token AUC and precision: single
tokens, of which few are in an event. pure: features whose strongest tokens
nearly all touch one kind. TPP: drop of the AUC of a kind's probe when five
features are ablated, less the mean drop of the other kinds' probes. [ ]: 95 %
intervals over {units}."""
OF_PATIENTS = "patients"
OF_RECORDINGS = (
    "the recordings of the only test patient, which do not say\nhow other patients differ"
)
CONTROL_HINT = """\
Features of an untrained encoder reach high AUCs too: compare them (--control)."""
SPANS_NOTE = """\
ties: other features that could be the best one for all patients; with it they
contain that feature with 95 % confidence. recall: at 90 % precision among
spans. 5-probe: logistic regression on the best five features."""
NO_TIES_NOTE = """\
ties "-": not known, since fewer than three val patients have such events."""
TOKENS_NOTE = """\
Of the same features. chance: the precision of random tokens."""
GAINS_NOTE = """\
gain: AUC of the SAE's best feature less that of the best principal component or
raw dimension, on the same patients."""
CONTROL_NOTE = """\
random: {member}, trained on the encoder with random weights."""
LABELS_HINT = """\
Train patients can be tested too, since SAEs are trained without labels: extract
--split all, then evaluate --store (docs/labels.md)."""
STABILITY_NOTE = """\
stability: share of the features that other seeds find again. weighted: by their
part in x̂."""


def summary(evaluation: Evaluation) -> str:
    """Return the members as tables, the events of the selected member, and the recommendation.

    There are several tables, since one would be wider than 80 columns.
    """
    recommendation = evaluation.recommendation
    parts = [_members_table(evaluation)]
    train, val = evaluation.inputs.train, evaluation.inputs.val
    is_few = val is not None and len(set(val.patients)) < FEW_PATIENTS
    if evaluation.pca and train is None and is_few:
        parts.append(PCA_NOTE)
    if any(member.stability is not None for member in evaluation.members):
        parts += [f"stability over seeds:\n{_stability_table(evaluation)}", STABILITY_NOTE]
    if evaluation.baselines:
        assert val is not None  # on which features were chosen
        n_test = len(set(evaluation.inputs.test.patients))
        note = EVENTS_NOTE.format(
            val=_count(len(set(val.patients)), "val patient"),
            test=_count(n_test, "test patient"),
            units=OF_RECORDINGS if n_test == 1 else OF_PATIENTS,
        )
        parts += [f"labelled events:\n{_events_table(evaluation)}", note]
        if evaluation.control is None:
            parts[-1] += f"\n{CONTROL_HINT}"
        title = f"{evaluation.selected} by kind of event"
        scores = list(_scores(evaluation))
        parts += [f"{title}, spans:\n{_spans_table(scores)}", SPANS_NOTE]
        if any(score.n_ties is None for _, _, score in scores):
            parts[-1] += f"\n{NO_TIES_NOTE}"
        parts += [f"{title}, tokens:\n{_tokens_table(scores)}", TOKENS_NOTE]
        of_baselines = {"over PCA": COMPONENTS, "over raw": RAW}
        parts += [
            f"{title}, gain over baselines:\n{_gains_table(evaluation, of_baselines)}",
            GAINS_NOTE,
        ]
        if evaluation.control is not None:
            of_control = _gains_table(evaluation, {"over random": RANDOM})
            note = CONTROL_NOTE.format(member=evaluation.selected)
            parts += [f"{title}, gain over the control:\n{of_control}", note]
    associations = evaluation.associations
    if associations is not None and associations.labels:
        parts += _labels_parts(evaluation, associations)
    verdict = [f"recommended: {recommendation.member}", f"reason: {recommendation.reason}"]
    if recommendation.runners_up:
        verdict.append(f"runners-up: {'; '.join(recommendation.runners_up)}")
    if sentence := as_good(evaluation):
        verdict.append(f"events: {sentence}")
    verdict.append(f"rule: {evaluation.rule}")
    for member, warnings in recommendation.warnings.items():
        verdict.append(f"warning: {member}: {'; '.join(warnings)}")
    parts.append("\n".join(map(wrap, verdict)))
    return "\n\n".join(parts)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _members_table(evaluation: Evaluation) -> str:
    columns = ["member", "L0", "FVU", "bits", "never active"]
    has_loss = evaluation.substitution is not None
    if has_loss:
        columns.append("loss recovered")
    rows = []
    for member in evaluation.members:
        row = [
            member.member,
            f"{member.tokens.l0:.1f}",
            f"{member.tokens.fvu:.4f}",
            f"{member.description_bits:.0f}",
            f"{member.tokens.never_active_fraction:.1%}",
        ]
        if has_loss:
            row.append(_loss_cell(member))
        rows.append(row)
    for pca in evaluation.pca:
        row = [pca.name, f"{pca.k:.1f}", f"{pca.fvu:.4f}", f"{pca.description_bits:.0f}", ""]
        if has_loss:
            row.append(_loss_cell(pca))
        rows.append(row)
    return table(columns, rows)


def _stability_table(evaluation: Evaluation) -> str:
    rows = []
    for member in evaluation.members:
        if member.stability is not None and member.weighted_stability is not None:
            weighted = _number(member.weighted_stability, ".0%", "undefined")
            rows.append([member.member, f"{member.stability.share():.1%}", weighted])
    return table(["member", "stability", "weighted"], rows)


def _loss_cell(evaluated: Evaluated) -> str:
    return (
        "" if evaluated.loss is None else _cell(evaluated.loss.loss_recovered, ".1%", "undefined")
    )


def _cell(measure: Estimate, digits: str, undefined: str = "") -> str:
    """Return a measure, with its interval in brackets if it has one."""
    value = _number(measure.value, digits, undefined)
    if measure.interval is None:
        return value
    low, high = measure.interval
    return f"{value} [{low:z{digits}}, {high:z{digits}}]"


def _number(value: float, digits: str, undefined: str = "") -> str:
    # z: no minus sign in front of 0.000
    return undefined if math.isnan(value) else f"{value:z{digits}}"


def _events_table(evaluation: Evaluation) -> str:
    summaries = {member.member: member.event_summary for member in evaluation.members}
    summaries |= {pca.name: pca.event_summary for pca in evaluation.pca}
    baselines = evaluation.baseline_events
    if baselines:
        summaries["principal components"] = baselines[COMPONENTS].summary
        summaries["raw dimensions"] = baselines[RAW].summary
    if RANDOM in baselines:
        summaries["random encoder"] = baselines[RANDOM].summary
    rows = []
    for name, means in summaries.items():
        if means is None:
            continue
        row = [
            name,
            _cell(means.auc, ".3f"),
            _number(means.token_auc, ".3f"),
            _number(means.precision, ".1%"),
            str(means.pure_features),
            _number(means.tpp.value, ".2f"),  # undefined with a single kind of events
        ]
        rows.append(row)
    return table(["features of", "AUC", "token AUC", "precision", "pure", "TPP"], rows)


def _scores(evaluation: Evaluation) -> Iterator[tuple[str, str, EventScore]]:
    """Yield the scores of each kind: the kind in the first row only, whose features, the score."""
    scores = evaluation.find(evaluation.selected).events or {}
    for kind, score in scores.items():
        baseline = evaluation.baselines[kind]
        yield kind, "SAE", score
        yield "", "PCA", baseline[COMPONENTS]
        yield "", "raw", baseline[RAW]
        if RANDOM in baseline:
            yield "", RANDOM, baseline[RANDOM]


def _spans_table(scores: Sequence[tuple[str, str, EventScore]]) -> str:
    rows = []
    for kind, of, score in scores:
        row = [
            kind,
            str(score.test_events) if kind else "",
            of,
            str(score.feature),
            _cell(score.auc, ".3f"),
            "-" if score.n_ties is None else str(score.n_ties - 1),
            f"{score.recall.value:.1%}",
            f"{score.probe_auc.value:.3f}",
        ]
        rows.append(row)
    return table(["event", "n", "of", "feature", "AUC", "ties", "recall", "5-probe"], rows)


def _tokens_table(scores: Sequence[tuple[str, str, EventScore]]) -> str:
    rows = []
    for kind, of, score in scores:
        row = [
            kind,
            of,
            _number(score.token_auc, ".3f"),
            _number(score.precision.value, ".0%"),
            f"{score.token_base_rate:.1%}",
            str(score.pure_features),
        ]
        rows.append(row)
    return table(["event", "of", "token AUC", "precision", "chance", "pure"], rows)


def _gains_table(evaluation: Evaluation, columns: Mapping[str, str]) -> str:
    """Return the gains over some of the baselines; columns: their names by title."""
    gains = [evaluation.gains[name] for name in columns.values()]
    rows = [
        [kind, *(_cell(gain.auc_gain[kind], ".3f") for gain in gains)]
        for kind in evaluation.baselines
    ]
    rows.append(["mean", *(_cell(gain.mean_auc_gain, ".3f") for gain in gains)])
    return table(["event", *columns], rows)


def as_good(evaluation: Evaluation) -> str:
    """Return which other features may detect events as well as the selected member; "" if none."""
    names = {
        COMPONENTS: "the best principal component",
        RAW: "the best raw dimension",
        RANDOM: "its control",
    }
    others = []
    for name, gain in evaluation.gains.items():
        ends = gain.mean_auc_gain.interval
        if ends is None or ends.low <= 0:
            size = _cell(gain.mean_auc_gain, ".3f")
            others.append(f"{names[name]} (mean gain in AUC {size})")
    if not others:
        return ""
    return f"{evaluation.selected} does not clearly detect them better than {' or '.join(others)}"


def _labels_parts(evaluation: Evaluation, associations: Associations) -> list[str]:
    """Return the table of the labels, then what was left out of it."""
    rows = []
    notes = []
    for association in associations.labels:
        label = association.label
        test = association.test
        found = "not tested"
        if test is not None:
            found = f"{len(test.significant())} of {test.n_tested}"
        rows.append([label.name, str(len(label.patients)), found, label.describe(LISTED)])
        if association.test_note:
            notes.append(wrap(f"{label.name}: {association.test_note}"))
    columns = ["label", "patients", f"q < {LEVEL}", "values"]
    parts = [f"features of {evaluation.selected} by label:\n{table(columns, rows)}"]
    manifest = evaluation.inputs.test.store.require_manifest()
    if notes and manifest.data.get("split") != "all":
        notes.append(LABELS_HINT)
    if notes:
        parts.append("\n".join(notes))
    return parts


def write_files(evaluation: Evaluation) -> None:
    """Write evaluation.json, evaluation.csv and evaluation.png into the output folder."""
    out = evaluation.inputs.out
    with atomic_write(out / "evaluation.json") as temporary:
        text = json.dumps(evaluation.to_record(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n")
    rows = [member.to_row() for member in evaluation.members]
    rows += [components.to_row() for components in evaluation.pca]
    # Member, hyper-parameters in their order, measures
    names = list(dict.fromkeys(name for row in rows for name in row))
    hyper = [name for name in SYMBOLS if name in names]
    measures = [name for name in names if name not in SYMBOLS and name != "member"]
    with (
        atomic_write(out / "evaluation.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ["member", *hyper, *measures])
        writer.writeheader()
        writer.writerows(rows)
    draw_evaluation(out / "evaluation.png", evaluation)
    update_checksums(out, ["evaluation.json", "evaluation.csv", "evaluation.png"])
