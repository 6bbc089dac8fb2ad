"""Report data other than features: recommendation, members, events and labels.

The scripts in assets/ read these records, in which records of the evaluation are as they are. Names
of fields are the keys in index_data.js, where an estimate has two: `auc` and `auc_interval`. Most
fields have a default, since a part without data is not shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minsae_jax.evaluation.associations import Associations
from minsae_jax.evaluation.event_results import EventSummary
from minsae_jax.evaluation.label_tests import LEVEL
from minsae_jax.evaluation.loss_recovered import LossRecovered
from minsae_jax.evaluation.results import (
    DecoderCosines,
    Evaluation,
    MemberEvaluation,
    PCAEvaluation,
    Recommendation,
    TokenMeasures,
)
from minsae_jax.evaluation.steering.results import Steering
from minsae_jax.evaluation.summary import as_good
from minsae_jax.report.event_pages import EventPage, event_means, event_pages
from minsae_jax.report.label_pages import LabelPage, label_page
from minsae_jax.sae.figures import PCA
from minsae_jax.sae.hyper import SPARSITY, SYMBOLS, Hyper, sparsity, value_text, varied_names


@dataclass(frozen=True)
class MemberRow:
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
    # Bits per token
    description_bits: float
    loss: LossRecovered | None = None
    # Means over kinds of event
    events: EventSummary | None = None
    # Share of the live features found again with other seeds
    stability: float | None = None
    tokens: TokenMeasures | None = None
    decoder: DecoderCosines | None = None


@dataclass(frozen=True)
class Pages:
    """All pages."""

    recommendation: Recommendation | None = None
    # By which members are ranked
    rule: str = ""
    # Which baselines the selected member is not clearly better than; empty if none
    as_good: str = ""
    members: Sequence[MemberRow] = ()
    events: Sequence[EventPage] = ()
    # Means over the kinds of event, with the keys of `EventPage.scores`
    event_means: Mapping[str, EventSummary] | None = None
    labels: Sequence[LabelPage] = ()
    # Number of seeds in which features can be found; None with one seed
    n_seeds: int | None = None


def make_pages(
    evaluation: Evaluation, associations: Associations, steering: Mapping[str, Steering]
) -> Pages:
    """Return the report's data other than the features of the selected member.

    steering: with the best feature of each kind of event, by kind; may be empty.
    """
    stability = evaluation.find(evaluation.selected).stability
    has_seeds = "seed" in varied_names(member.hyper for member in evaluation.members)
    runs = {m.name: str(m.folder and m.folder.parent) for m in evaluation.inputs.members}
    members = []
    for member in evaluation.members:
        line = ",".join(value_text(v) for k, v in member.hyper.items() if k not in SPARSITY)
        if evaluation.inputs.is_one_run:
            setting = _setting(member.hyper, has_seeds)
        else:
            # Settings can be equal in several runs, or unknown.
            setting = member.member
            line = f"{line},{runs[member.member]}"
        members.append(_member_row(member, setting, line))
    return Pages(
        recommendation=evaluation.recommendation,
        rule=evaluation.rule,
        as_good=as_good(evaluation),
        members=members + [_pca_row(pca) for pca in evaluation.pca],
        events=event_pages(evaluation, steering),
        event_means=event_means(evaluation),
        labels=[label_page(each, associations) for each in associations.labels],
        n_seeds=None if stability is None else stability.n_seeds,
    )


def _setting(hyper: Hyper, has_seeds: bool) -> str:
    setting = sparsity(hyper)
    texts = [] if setting is None else [f"{SYMBOLS[setting[0]]} = {value_text(setting[1])}"]
    if has_seeds:
        texts.append(f"seed {hyper['seed']}")
    return ", ".join(texts)


def _member_row(member: MemberEvaluation, setting: str, line: str) -> MemberRow:
    return MemberRow(
        name=member.member,
        kind=str(member.hyper.get("kind", "relu")),
        setting=setting,
        line=line,
        l0=member.tokens.l0,
        fvu=member.fvu,
        description_bits=member.description_bits,
        loss=member.loss,
        events=member.event_summary,
        stability=None if member.stability is None else member.stability.share(),
        tokens=member.tokens,
        decoder=member.decoder,
    )


def _pca_row(pca: PCAEvaluation) -> MemberRow:
    return MemberRow(
        name=pca.name,
        kind=PCA,
        setting=f"k = {pca.k}",
        line="",
        l0=float(pca.k),
        fvu=pca.fvu,
        description_bits=pca.description_bits,
        loss=pca.loss,
        events=pca.event_summary,
    )


def shown_features(pages: Pages) -> Sequence[int]:
    """Return the distinct features on the pages of events and labels, which need pages too."""
    features = []
    for event in pages.events:
        features += [event.scores["sae"].feature, *(row.feature for row in event.features)]
    for label in pages.labels:
        features += [row.feature for row in label.features if row.q < LEVEL]
    return list(dict.fromkeys(features))
