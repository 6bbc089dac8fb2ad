"""The results of an evaluation, and the files and the table that are made of them."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from minsae_jax.evaluation.events import EventScore
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.loss_recovered import SubstitutionErrors
from minsae_jax.files import atomic_write
from minsae_jax.monitor import table
from minsae_jax.sae.hyper import SYMBOLS, Hyper
from minsae_jax.sae.plots import PCA, ParetoPoint, draw_pareto
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
    # Share of features active on no test token
    dead_fraction: float
    log10_density: DensityHistogram


@dataclass(frozen=True)
class DecoderCosines:
    """Largest cosine of each decoder row with any other row (near 1 means duplicates)."""

    mean: float
    median: float
    # Share of rows with a cosine above 0.9
    over_0_9: float


@dataclass(frozen=True)
class LossRecovered:
    """The pretraining task on a member's x̂."""

    masked_error: float
    # 1: nothing is lost; 0: as bad as mean-ablation
    loss_recovered: float
    loss_recovered_of_zero_ablation: float


@dataclass(frozen=True)
class PCAEvaluation:
    """The evaluation of the k principal components of largest magnitude of every token."""

    k: int
    fvu: float
    explained_variance: float
    # None if the encoder declares no reconstruction
    loss: LossRecovered | None

    @property
    def name(self) -> str:
        return f"pca,k={self.k}"

    def to_record(self) -> JsonObject:
        """Return the entry in evaluation.json."""
        record: JsonObject = {"k": self.k, "fvu": self.fvu}
        record["explained_variance"] = self.explained_variance
        if self.loss is not None:
            record |= asdict(self.loss)
        return record

    def to_row(self) -> JsonObject:
        """Return the row in evaluation.csv."""
        return {"member": self.name, "kind": PCA, "l0": self.k} | self.to_record()


@dataclass(frozen=True)
class Baseline:
    """AUC of the best feature that is not of an SAE, for one kind of events."""

    # Best of the dimensions of the activations
    raw_auc: float
    # Best of their principal components
    pca_auc: float


@dataclass(frozen=True)
class MemberEvaluation:
    """The evaluation of one member."""

    member: str
    hyper: Hyper
    # "finished" or "diverged"
    status: str | None
    tokens: TokenMeasures
    decoder: DecoderCosines
    # Share of live features found again with other seeds; None with one seed
    agreement: float | None
    # None if the encoder declares no reconstruction
    loss: LossRecovered | None
    # Scores by kind of event; None if there is no events.csv
    events: Mapping[str, EventScore] | None

    def to_record(self) -> JsonObject:
        """Return the member's entry in evaluation.json."""
        record: JsonObject = {"member": self.member, **self.hyper, "status": self.status}
        record |= asdict(self.tokens)
        record["decoder_cosine_mean"] = self.decoder.mean
        record["decoder_cosine_median"] = self.decoder.median
        record["decoder_cosine_over_0.9"] = self.decoder.over_0_9
        if self.agreement is not None:
            record["agreement"] = self.agreement
        if self.loss is not None:
            record |= asdict(self.loss)
        if self.events is not None:
            record["events"] = {kind: asdict(score) for kind, score in self.events.items()}
        return record

    def to_row(self) -> JsonObject:
        """Return the member's row in evaluation.csv."""
        record = self.to_record()
        # A cell of a CSV cannot contain a histogram.
        row = {name: value for name, value in record.items() if not isinstance(value, dict)}
        for kind, score in (self.events or {}).items():
            row[f"{kind}_feature"] = score.feature
            row[f"{kind}_auc"] = score.auc
            row[f"{kind}_probe_auc"] = score.probe_auc
            row[f"{kind}_token_auc"] = score.token_auc
        return row


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of the members of a run."""

    inputs: EvaluationInputs
    members: tuple[MemberEvaluation, ...]
    # Empty without a store of the val patients
    pca: tuple[PCAEvaluation, ...]
    # Name of the recommended member
    recommended: str
    # How it was chosen
    rule: str
    # None if the encoder declares no reconstruction
    substitution: SubstitutionErrors | None
    mask_ratio: float
    # Baselines by kind of event
    baselines: Mapping[str, Baseline]

    def find(self, name: str) -> MemberEvaluation:
        """Return the evaluation of the member called `name`."""
        return next(member for member in self.members if member.member == name)

    def summary(self) -> str:
        """Return the members as a table for the terminal, and the recommended member."""
        lines = [_summary_table(self)]
        if self.baselines:
            lines.append(
                "Columns of events: AUC of the best single feature, chosen on val patients, scored "
                "on test patients."
            )
        lines.append(f"recommended: {self.recommended}")
        lines.append(f"rule: {self.rule}")
        return "\n".join(lines)

    def to_record(self) -> JsonObject:
        """Return the content of evaluation.json."""
        store = self.inputs.test.store
        return {
            "rule": self.rule,
            "run": str(self.inputs.run),
            "store": str(store.folder),
            "tokens": store.total_tokens,
            "substitution": self._substitution_record(),
            "recommended": self.recommended,
            "baselines": {kind: asdict(b) for kind, b in self.baselines.items()},
            "members": [member.to_record() for member in self.members],
            "pca": [components.to_record() for components in self.pca],
        }

    def _substitution_record(self) -> JsonObject | str:
        if self.substitution is None:
            encoder = self.inputs.encoder
            reason = "no encoder was given" if encoder is None else encoder.reconstruction_note
            return f"not measured: {reason}"
        record = self.substitution._asdict()
        del record["members"]  # each is in its member's entry
        return record | {"mask_ratio": self.mask_ratio}

    def write(self) -> None:
        """Write evaluation.json, evaluation.csv and evaluation.png into the run."""
        run = self.inputs.run
        with atomic_write(run / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(self.to_record(), indent=2) + "\n")
        rows = [member.to_row() for member in self.members]
        rows += [components.to_row() for components in self.pca]
        with (
            atomic_write(run / "evaluation.csv") as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, _column_names(rows))
            writer.writeheader()
            writer.writerows(rows)
        members = [ParetoPoint(m.hyper, m.tokens.l0, m.tokens.fvu) for m in self.members]
        pca = [ParetoPoint({"kind": PCA, "k": p.k}, float(p.k), p.fvu) for p in self.pca]
        title = f"{run.resolve().name} on test patients"
        draw_pareto(run / "evaluation.png", [*members, *pca], title)


def _column_names(rows: Iterable[JsonObject]) -> list[str]:
    """Return the names in any of the rows: member, hyper-parameters in their order, measures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    hyper = [name for name in SYMBOLS if name in names]
    measures = [name for name in names if name not in SYMBOLS and name != "member"]
    return ["member", *hyper, *measures]


def _summary_table(evaluation: Evaluation) -> str:
    kinds = list(evaluation.baselines)
    has_loss = evaluation.substitution is not None
    columns = ["member", "L0", "FVU", "dead"]
    if has_loss:
        columns.append("recovered")
    has_agreement = any(member.agreement is not None for member in evaluation.members)
    if has_agreement:
        columns.append("agreement")
    n_measures = len(columns) - 1
    columns += kinds
    rows = []
    for member in evaluation.members:
        tokens = member.tokens
        row = [
            member.member,
            f"{tokens.l0:.1f}",
            f"{tokens.fvu:.4f}",
            f"{tokens.dead_fraction:.1%}",
        ]
        if member.loss is not None:
            row.append(f"{member.loss.loss_recovered:.1%}")
        if has_agreement:
            row.append("" if member.agreement is None else f"{member.agreement:.1%}")
        if member.events is not None:
            row += [f"{member.events[kind].auc:.3f}" for kind in kinds]
        rows.append(row)
    for pca in evaluation.pca:
        row = [pca.name, f"{pca.k:.1f}", f"{pca.fvu:.4f}", ""]
        if pca.loss is not None:
            row.append(f"{pca.loss.loss_recovered:.1%}")
        rows.append(row + [""] * (len(columns) - len(row)))
    if kinds:
        blank = [""] * n_measures
        baselines = [evaluation.baselines[kind] for kind in kinds]
        rows.append(["raw dimension", *blank, *(f"{b.raw_auc:.3f}" for b in baselines)])
        rows.append(["principal component", *blank, *(f"{b.pca_auc:.3f}" for b in baselines)])
    return table(columns, rows)
