"""`minsae evaluate`: measure the members of a run on held-out recordings and recommend one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.events import (
    EventScore,
    both_signs,
    covered_tokens,
    draw_spans,
    gather,
    principal_components,
    read_events,
    score_kind,
    token_auc,
)
from minsae_jax.evaluation.inputs import EvaluationInputs, Member, open_inputs
from minsae_jax.evaluation.loss_recovered import (
    SubstitutionErrors,
    loss_recovered,
    substitution_errors,
)
from minsae_jax.evaluation.pca import PCA_K, fit_pca, pca_autoencoder
from minsae_jax.evaluation.results import (
    Baseline,
    DecoderCosines,
    DensityHistogram,
    Evaluation,
    LossRecovered,
    MemberEvaluation,
    PCAEvaluation,
    TokenMeasures,
)
from minsae_jax.evaluation.stability import seed_stability
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import make_mesh, members_sharding
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.measures import Measures, measure
from minsae_jax.sae.member import SparseAutoencoder

BATCH_SEQUENCES = 64
ScoresByKind = dict[str, EventScore]
COSINE_ROWS = 1024  # decoder rows compared with all others at a time
DENSITY_EDGES = np.arange(-7, 0.51, 0.5)  # log10
MIN_RECOVERED = 0.95
MIN_EXPLAINED = 0.85
RULE = (
    "the member with the fewest active features among those that recover at least "
    f"{MIN_RECOVERED:.0%} of the loss (without a pretrain head: explain at least "
    f"{MIN_EXPLAINED:.0%} of the variance); if there is none, the one that comes closest"
)
RULE_ONE_MEMBER = "the member set by --member"


def evaluate(
    settings: EvaluateConfig,
    encoder: BaseEncoder | None,
    train_config: TrainConfig | None = None,
) -> Evaluation:
    """Evaluate the members of a run, and write evaluation.json, .csv and .png into it.

    Without an encoder, or if it declares no reconstruction, loss recovered is not measured.
    train_config: settings of the run, read from it unless passed. Raises UserError if run, stores,
    encoder and recordings do not belong together.
    """
    inputs = open_inputs(settings, encoder, train_config)
    pca = _pca_members(inputs)
    all_members = [*inputs.members, *pca]
    measured = _measure_tokens(inputs.test, all_members)
    errors = _substitute(settings, inputs, all_members, measured.mean)
    events, baselines = _score_events(settings, inputs)
    stability = seed_stability(inputs.members, measured.is_live)
    agreement = {name: result.share() for name, result in stability.items()}
    members = []
    for i, member in enumerate(inputs.members):
        evaluated = MemberEvaluation(
            member=member.name,
            hyper=member.hyper,
            status=member.sae.config.get("status"),
            tokens=measured.tokens[member.name],
            decoder=_decoder_cosines(member.sae),
            agreement=agreement.get(member.name),
            loss=None if errors is None else _loss_recovered(errors, i),
            events=None if events is None else events[i],
        )
        members.append(evaluated)
    pca_evaluations = []
    for i, member in enumerate(pca, start=len(members)):
        tokens = measured.tokens[member.name]
        pca_evaluation = PCAEvaluation(
            k=member.sae.config["k"],
            fvu=tokens.fvu,
            explained_variance=tokens.explained_variance,
            loss=None if errors is None else _loss_recovered(errors, i),
        )
        pca_evaluations.append(pca_evaluation)
    evaluation = Evaluation(
        inputs=inputs,
        members=tuple(members),
        pca=tuple(pca_evaluations),
        recommended=recommend(members),
        rule=RULE_ONE_MEMBER if settings.member else RULE,
        substitution=errors,
        mask_ratio=settings.mask_ratio,
        baselines=baselines,
    )
    evaluation.write()
    return evaluation


def recommend(members: Sequence[MemberEvaluation]) -> str:
    """Return the name of the member that RULE chooses; a diverged one only if all diverged."""
    candidates = [m for m in members if m.status != "diverged"] or list(members)

    def quality(member: MemberEvaluation) -> float:
        if member.loss is not None:
            return member.loss.loss_recovered
        return member.tokens.explained_variance

    threshold = MIN_EXPLAINED if candidates[0].loss is None else MIN_RECOVERED
    sufficient = [m for m in candidates if quality(m) >= threshold]
    if sufficient:
        return min(sufficient, key=lambda m: m.tokens.l0).member
    return max(candidates, key=quality).member


def _pca_members(inputs: EvaluationInputs) -> list[Member]:
    """Return an autoencoder for each k of PCA_K, from the tokens of the val patients.

    There are none without a val store.
    """
    if inputs.val is None:
        return []
    tokens = (x.reshape(-1, x.shape[-1]) for _, x in inputs.val.batches(BATCH_SEQUENCES))
    pca = fit_pca(tokens)
    ks = [k for k in PCA_K if k <= len(pca.mean)]
    return [Member(f"pca,k={k}", pca_autoencoder(pca, k)) for k in ks]


class MeasuredTokens(NamedTuple):
    """Measures over all test tokens, by member's name."""

    tokens: dict[str, TokenMeasures]
    # Whether each feature is active on at least one token
    is_live: dict[str, Bool[np.ndarray, " d_sae"]]
    # The mean activation
    mean: Float[np.ndarray, " d_model"]


def _measure_tokens(test: Dataset, members: Sequence[Member]) -> MeasuredTokens:
    """Measure all members in one pass over the store."""
    groups = _group_by_shape(members)
    # The parameters of each group are stacked along a member axis, which lies along the mesh's
    # `sweep` axis, so that one pass over the store measures all members.
    params = []
    for group in groups:
        leaves = [member.sae.params for member in group]
        params.append(jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves))
    kinds = [group[0].sae.kind for group in groups]
    mesh = make_mesh(*map(len, groups))
    params = jax.device_put(params, members_sharding(mesh))
    total = np.zeros(test.store.d_model)
    batches = _test_batches(test, total)
    tokens = {}
    is_live = {}
    for group, measures in zip(groups, measure(mesh, kinds, params, batches), strict=True):
        for i, member in enumerate(group):
            tokens[member.name] = _token_measures(measures, i)
            is_live[member.name] = measures.density[i] > 0
    mean = (total / test.store.total_tokens).astype(np.float32)
    return MeasuredTokens(tokens, is_live, mean)


def _group_by_shape(members: Sequence[Member]) -> list[list[Member]]:
    """Return members of equal kind and size together, since their parameters are stacked."""
    groups: dict[tuple[int, str], list[Member]] = {}
    for member in members:
        key = (member.sae.d_sae, member.sae.config.get("kind", "relu"))
        groups.setdefault(key, []).append(member)
    return [groups[key] for key in sorted(groups)]


def _test_batches(
    test: Dataset,
    total: Float[np.ndarray, " d_model"],
) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """Yield all tokens of the test store, adding each to `total`."""
    n_sequences = len(test.recording)
    with progress("measure", n_sequences, "sequences", delay=2.0) as bar:
        for start in range(0, n_sequences, BATCH_SEQUENCES):
            x = test.read(start, min(start + BATCH_SEQUENCES, n_sequences))
            bar.advance(len(x))
            total += x.sum((0, 1), dtype=np.float64)
            yield x.reshape(-1, x.shape[-1])


def _token_measures(measures: Measures, i: int) -> TokenMeasures:
    """Return the measures of member i of a group."""
    density = measures.density[i]
    log10_density = np.log10(density[density > 0])
    counts, _ = np.histogram(log10_density, DENSITY_EDGES)
    return TokenMeasures(
        fvu=float(measures.fvu[i]),
        explained_variance=float(measures.explained_variance[i]),
        l0=float(measures.l0[i]),
        l1=float(measures.l1[i]),
        dense_fraction=float(measures.dense_fraction[i]),
        cosine=float(measures.cosine[i]),
        norm_ratio=float(measures.norm_ratio[i]),
        dead_fraction=float((density == 0).mean()),
        log10_density=DensityHistogram(DENSITY_EDGES.tolist(), counts.tolist()),
    )


def _decoder_cosines(sae: SparseAutoencoder) -> DecoderCosines:
    rows = sae.unit_directions
    largest = np.full(len(rows), -1.0)
    # In blocks, since [d_sae, d_sae] may not fit into memory.
    for start in range(0, len(rows), COSINE_ROWS):
        cosine = rows[start : start + COSINE_ROWS] @ rows.T
        in_block = np.arange(len(cosine))
        cosine[in_block, start + in_block] = -1  # each row with itself
        largest[start : start + COSINE_ROWS] = cosine.max(axis=1)
    return DecoderCosines(
        mean=float(largest.mean()),
        median=float(np.median(largest)),
        over_0_9=float((largest > 0.9).mean()),
    )


def _substitute(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    mean: Float[np.ndarray, " d_model"],
) -> SubstitutionErrors | None:
    """Return the pretraining errors on the members' x̂, or None if there is no such task."""
    if inputs.encoder is None or inputs.encoder.reconstruction is None:
        return None
    return substitution_errors(
        inputs.encoder,
        inputs.test,
        inputs.layer,
        [member.sae for member in members],
        mean,
        settings.substitution_windows,
        settings.mask_ratio,
        settings.seed,
    )


def _loss_recovered(errors: SubstitutionErrors, i: int) -> LossRecovered:
    """Return the result of member i."""
    error = errors.members[i]
    return LossRecovered(
        masked_error=error,
        loss_recovered=loss_recovered(errors.mean_ablation, error, errors.untouched),
        loss_recovered_of_zero_ablation=loss_recovered(
            errors.zero_ablation, error, errors.untouched
        ),
    )


def _score_events(
    settings: EvaluateConfig, inputs: EvaluationInputs
) -> tuple[list[ScoresByKind] | None, Mapping[str, Baseline]]:
    """Return every member's scores by kind of event, and baselines by kind.

    Without labelled events the scores are None. Kinds with too few spans are left out.
    """
    test = inputs.test
    val = inputs.val
    if val is None or not inputs.has_events:
        return None, {}
    events_by_kind = read_events(test.folder)
    baselines = {}
    covered = []
    scores: list[ScoresByKind] = [{} for _ in inputs.members]
    with progress("score events", len(events_by_kind), "kinds", delay=2.0) as bar:
        for kind, events in sorted(events_by_kind.items()):
            # Features are chosen on val patients and scored on test patients, so that the best of
            # many features does not win by chance.
            val_spans = gather(val, draw_spans(val, events, settings.seed))
            test_spans = gather(test, draw_spans(test, events, settings.seed))
            if not (val_spans.has_both and test_spans.has_both):
                continue
            components = principal_components(val_spans.activations)
            baselines[kind] = Baseline(
                raw_auc=score_kind(val_spans, test_spans, both_signs).auc,
                pca_auc=score_kind(val_spans, test_spans, components).auc,
            )
            covered.append(covered_tokens(test, events))
            for member, member_scores in zip(inputs.members, scores, strict=True):
                encode = partial(_encode_numpy, member.sae)
                member_scores[kind] = score_kind(val_spans, test_spans, encode)
            bar.advance(1)
    with progress("score tokens", len(scores), "members", delay=2.0) as bar:
        for member, member_scores in zip(inputs.members, scores, strict=True):
            features = [score.feature for score in member_scores.values()]
            aucs = token_auc(test, covered, member.sae, features)
            for kind, auc in zip(list(member_scores), aucs, strict=True):
                member_scores[kind] = replace(member_scores[kind], token_auc=auc)
            bar.advance(1)
    return scores, baselines


def _encode_numpy(sae: SparseAutoencoder, x: np.ndarray) -> np.ndarray:
    return np.asarray(sae.encode(x))
