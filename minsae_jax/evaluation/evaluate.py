"""`minsae evaluate`: measure the members of a run on held-out recordings and recommend one.

Measures of an earlier evaluation are used again where nothing changed that they depend on; see
`minsae_jax.evaluation.saved`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.agreement import seed_agreement
from minsae_jax.evaluation.bootstrap import Interval, draw_weights
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.description_length import description_length
from minsae_jax.evaluation.event_measures import (
    EventKind,
    EventScore,
    SpanMeasures,
    make_kind,
    measure_spans,
)
from minsae_jax.evaluation.events import (
    EVENTS_CSV,
    draw_spans,
    event_share,
    gather,
    read_events,
)
from minsae_jax.evaluation.inputs import EvaluationInputs, Member, open_inputs
from minsae_jax.evaluation.loss_recovered import (
    SubstitutionErrors,
    substitution_errors,
    summarise,
)
from minsae_jax.evaluation.pca import PCA, PCA_K, fit_pca, pca_autoencoder, raw_autoencoder
from minsae_jax.evaluation.recommend import RULE, recommend
from minsae_jax.evaluation.results import (
    DecoderCosines,
    DensityHistogram,
    Evaluation,
    EventEvaluation,
    EventSummary,
    FeatureEvents,
    MemberEvaluation,
    PCAEvaluation,
    TokenMeasures,
    summarise_events,
)
from minsae_jax.evaluation.saved import Arrays, load_part, make_key, save_part
from minsae_jax.evaluation.token_pass import FeatureTokens, read_features, token_aucs
from minsae_jax.files import sha256_of
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import make_mesh, members_sharding
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.measures import Measures, measure
from minsae_jax.sae.member import WEIGHTS, SparseAutoencoder
from minsae_jax.settings import JsonObject

T = TypeVar("T")
BATCH_SEQUENCES = 64
COSINE_ROWS = 1024  # decoder rows compared with all others at a time
DENSITY_EDGES = np.arange(-7, 0.51, 0.5)  # log10
# Names of the baselines in saved files; no member and no PCA of k components is called so.
RAW = "raw"
COMPONENTS = "pca"


def evaluate(
    settings: EvaluateConfig,
    encoder: BaseEncoder | None,
    train_config: TrainConfig | None = None,
) -> Evaluation:
    """Evaluate the members of a run, and write evaluation.json, .csv and .png into it.

    With --member, only that one is measured; of the others, those stay in the evaluation whose
    saved measures still hold. Without an encoder, or if it declares no reconstruction, loss
    recovered is not measured. train_config: settings of the run, read from it unless passed. Raises
    UserError if run, stores, encoder and recordings do not belong together.
    """
    inputs = open_inputs(settings, encoder, train_config)
    pca = _fit_pca(inputs)
    components = _pca_members(pca)
    sources = _Sources(settings, inputs)
    keys = sources.keys([*inputs.members, *components])
    members = inputs.members
    if settings.member is not None:
        # The others stay if nothing has to be measured.
        members = tuple(
            m for m in members if m.name == settings.member or sources.is_saved(keys[m.name])
        )
    measured = [*members, *components]
    tokens = _measure_tokens(inputs, measured, keys)
    errors = _substitute(settings, inputs, measured, keys, tokens)
    baselines = []
    if pca is not None and inputs.has_events:
        everything = pca_autoencoder(pca, len(pca.mean))
        baselines = [Member(RAW, raw_autoencoder(pca.mean)), Member(COMPONENTS, everything)]
        keys |= sources.keys(baselines)
    features = _measure_features(settings, inputs, [*measured, *baselines], keys, tokens)
    agreement = seed_agreement(members, {name: t.density > 0 for name, t in tokens.items()})
    evaluations = []
    for member in members:
        evaluated = MemberEvaluation(
            member=member.name,
            hyper=member.hyper,
            status=member.sae.config.get("status"),
            tokens=tokens[member.name].measures,
            decoder=_decoder_cosines(member.sae),
            description_bits=features[member.name].description_bits,
            agreement=agreement.get(member.name),
            loss=None if errors is None else summarise(errors[member.name], settings.seed),
            event_evaluation=features[member.name].events,
        )
        evaluations.append(evaluated)
    pca_evaluations = []
    for member in components:
        measures = tokens[member.name].measures
        pca_evaluation = PCAEvaluation(
            k=member.sae.config["k"],
            fvu=measures.fvu,
            explained_variance=measures.explained_variance,
            description_bits=features[member.name].description_bits,
            loss=None if errors is None else summarise(errors[member.name], settings.seed),
            event_evaluation=features[member.name].events,
        )
        pca_evaluations.append(pca_evaluation)
    recommendation = recommend(evaluations, pca_evaluations, inputs.test.store.d_model)
    evaluation = Evaluation(
        inputs=inputs,
        members=tuple(evaluations),
        pca=tuple(pca_evaluations),
        recommendation=recommendation,
        rule=RULE,
        selected=settings.member or recommendation.member,
        substitution=None if errors is None else next(iter(errors.values())),
        mask_ratio=settings.mask_ratio,
        raw_events=features[RAW].events if baselines else None,
        pca_events=features[COMPONENTS].events if baselines else None,
    )
    evaluation.write()
    return evaluation


class _Keys(NamedTuple):
    """Name of an autoencoder, and the checksums of what its measures depend on."""

    name: str
    tokens: str
    loss: str
    features: str


class _Sources:
    """Checksums of the inputs of an evaluation."""

    def __init__(self, settings: EvaluateConfig, inputs: EvaluationInputs):
        self.run = inputs.run
        self.has_loss = inputs.encoder is not None and inputs.encoder.reconstruction is not None
        val = None if inputs.val is None else _fingerprint(inputs.val)
        test = _fingerprint(inputs.test)
        encoder = None if inputs.encoder is None else inputs.encoder.fingerprint
        windows = [settings.substitution_windows, settings.mask_ratio, settings.seed]
        events = sha256_of(inputs.test.folder / EVENTS_CSV) if inputs.has_events else None
        self.tokens = [test]
        self.loss = [test, encoder, *windows]
        self.features = [test, val, events, settings.seed]
        self.val = val

    def keys(self, members: Sequence[Member]) -> dict[str, _Keys]:
        """Return the keys of members, by name; those without a file are made from the val store."""
        keys = {}
        for member in members:
            weights = self.run / "members" / member.name / WEIGHTS
            source = sha256_of(weights) if weights.is_file() else self.val
            about = [source, member.sae.config.get("kind", "relu"), member.sae.d_sae]
            keys[member.name] = _Keys(
                member.name,
                make_key("tokens", about, self.tokens),
                make_key("loss", about, self.loss),
                make_key("features", about, self.features),
            )
        return keys

    def is_saved(self, keys: _Keys) -> bool:
        """Whether all measures of a member are saved."""
        parts = ["tokens", "features"]
        if self.has_loss:
            parts.append("loss")
        return all(load_part(self.run, keys.name, p, getattr(keys, p)) is not None for p in parts)


def _fingerprint(dataset: Dataset) -> str:
    return dataset.store.require_manifest().fingerprint


def _saved_or_measured(
    run: Path,
    part: str,
    members: Sequence[Member],
    keys: Mapping[str, _Keys],
    measure_missing: Callable[[list[Member]], Mapping[str, T]],
    to_arrays: Callable[[T], Arrays],
    from_arrays: Callable[[Arrays], T],
) -> dict[str, T]:
    """Return a part of the results of all members; what is not saved is measured and saved."""
    results = {}
    missing = []
    for member in members:
        saved = load_part(run, member.name, part, getattr(keys[member.name], part))
        if saved is None:
            missing.append(member)
        else:
            results[member.name] = from_arrays(saved)
    if missing:
        for name, result in measure_missing(missing).items():
            save_part(run, name, part, getattr(keys[name], part), to_arrays(result))
            results[name] = result
    return {member.name: results[member.name] for member in members}


def _fit_pca(inputs: EvaluationInputs) -> PCA | None:
    """Return the components of the tokens of the val patients, or None without a val store."""
    if inputs.val is None:
        return None
    key = make_key("pca", _fingerprint(inputs.val))
    saved = load_part(inputs.run, COMPONENTS, "fit", key)
    if saved is not None:
        return PCA(saved["mean"], saved["directions"])
    pca = fit_pca(x.reshape(-1, x.shape[-1]) for _, x in inputs.val.batches(BATCH_SEQUENCES))
    save_part(inputs.run, COMPONENTS, "fit", key, pca._asdict())
    return pca


def _pca_members(pca: PCA | None) -> list[Member]:
    """Return an autoencoder for each k of PCA_K."""
    if pca is None:
        return []
    ks = [k for k in PCA_K if k <= len(pca.mean)]
    return [Member(f"pca,k={k}", pca_autoencoder(pca, k)) for k in ks]


class TokenResult(NamedTuple):
    """Measures of one autoencoder over all test tokens, in one pass over the store."""

    measures: TokenMeasures
    # Share of tokens with each feature active
    density: Float[np.ndarray, " d_sae"]
    # Mean and summed variance of the activations themselves
    mean: Float[np.ndarray, " d_model"]
    variance: float

    def to_arrays(self) -> Arrays:
        record = json.dumps(asdict(self.measures))
        return self._asdict() | {"measures": np.array(record)}


def _token_result(saved: Arrays) -> TokenResult:
    record = json.loads(str(saved["measures"]))
    histogram = DensityHistogram(**record.pop("log10_density"))
    measures = TokenMeasures(**record, log10_density=histogram)
    return TokenResult(measures, saved["density"], saved["mean"], float(saved["variance"]))


def _measure_tokens(
    inputs: EvaluationInputs, members: Sequence[Member], keys: Mapping[str, _Keys]
) -> dict[str, TokenResult]:
    return _saved_or_measured(
        inputs.run,
        "tokens",
        members,
        keys,
        lambda missing: _pass_over_tokens(inputs.test, missing),
        TokenResult.to_arrays,
        _token_result,
    )


def _pass_over_tokens(test: Dataset, members: Sequence[Member]) -> dict[str, TokenResult]:
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
    totals = np.zeros((2, test.store.d_model))
    batches = _test_batches(test, totals)
    results = {}
    measured = measure(mesh, kinds, params, batches)
    mean, mean_square = totals / test.store.total_tokens
    variance = float((mean_square - mean**2).sum())
    for group, measures in zip(groups, measured, strict=True):
        for i, member in enumerate(group):
            results[member.name] = TokenResult(
                _token_measures(measures, i),
                measures.density[i],
                mean.astype(np.float32),
                variance,
            )
    return results


def _group_by_shape(members: Sequence[Member]) -> list[list[Member]]:
    """Return members of equal kind and size together, since their parameters are stacked."""
    groups: dict[tuple[int, str], list[Member]] = {}
    for member in members:
        key = (member.sae.d_sae, member.sae.config.get("kind", "relu"))
        groups.setdefault(key, []).append(member)
    return [groups[key] for key in sorted(groups)]


def _test_batches(
    test: Dataset,
    totals: Float[np.ndarray, "2 d_model"],
) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """Yield all tokens of the test store, adding each and its square to `totals`."""
    n_sequences = len(test.recording)
    with progress("measure", n_sequences, "sequences", delay=2.0) as bar:
        for start in range(0, n_sequences, BATCH_SEQUENCES):
            x = test.read(start, min(start + BATCH_SEQUENCES, n_sequences))
            bar.advance(len(x))
            tokens = x.reshape(-1, x.shape[-1])
            totals[0] += tokens.sum(0, dtype=np.float64)
            totals[1] += np.square(tokens).sum(0, dtype=np.float64)
            yield tokens


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
        never_active_fraction=float((density == 0).mean()),
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
    keys: Mapping[str, _Keys],
    tokens: Mapping[str, TokenResult],
) -> dict[str, SubstitutionErrors] | None:
    """Return the pretraining errors on each member's x̂, or None if there is no such task."""
    encoder = inputs.encoder
    if encoder is None or encoder.reconstruction is None:
        return None

    def measure_missing(missing: list[Member]) -> dict[str, SubstitutionErrors]:
        errors = substitution_errors(
            encoder,
            inputs.test,
            inputs.layer,
            [member.sae for member in missing],
            tokens[missing[0].name].mean,
            settings.substitution_windows,
            settings.mask_ratio,
            settings.seed,
        )
        return {member.name: errors.of_member(i) for i, member in enumerate(missing)}

    return _saved_or_measured(
        inputs.run,
        "loss",
        members,
        keys,
        measure_missing,
        lambda errors: {"by_window": errors.by_window},
        lambda saved: SubstitutionErrors(saved["by_window"]),
    )


class FeatureResult(NamedTuple):
    """One autoencoder's description length, and its features against events if there are any."""

    description_bits: float
    events: EventEvaluation | None

    def to_arrays(self) -> Arrays:
        arrays = {"description_bits": np.array(self.description_bits)}
        if self.events is None:
            return arrays
        scores = {kind: asdict(score) for kind, score in self.events.scores.items()}
        record = {"scores": scores, "summary": asdict(self.events.summary)}
        return arrays | {"record": np.array(json.dumps(record))} | vars(self.events.features)


def _feature_result(saved: Arrays) -> FeatureResult:
    bits = float(saved["description_bits"])
    if "record" not in saved:
        return FeatureResult(bits, None)
    record = json.loads(str(saved["record"]))
    scores = {kind: _score(score) for kind, score in record["scores"].items()}
    summary = EventSummary(**_with_intervals(record["summary"]))
    features = FeatureEvents(
        kinds=tuple(scores),
        val_auc=saved["val_auc"],
        auc=saved["auc"],
        recall=saved["recall"],
        precision=saved["precision"],
        examples=saved["examples"],
        base_rate=saved["base_rate"],
    )
    return FeatureResult(bits, EventEvaluation(scores, summary, features))


def _score(record: JsonObject) -> EventScore:
    record = _with_intervals(record)
    for name in ("ties", "ties_auc", "best_five"):
        record[name] = tuple(record[name])
    return EventScore(**record)


def _with_intervals(record: JsonObject) -> JsonObject:
    """Return a record whose intervals are not lists any more."""
    restored = dict(record)
    for name, value in record.items():
        if name.endswith("_interval") and value is not None:
            restored[name] = Interval(*value)
    return restored


def _measure_features(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    keys: Mapping[str, _Keys],
    tokens: Mapping[str, TokenResult],
) -> dict[str, FeatureResult]:
    variance = next(iter(tokens.values())).variance
    return _saved_or_measured(
        inputs.run,
        "features",
        members,
        keys,
        lambda missing: _score_features(settings, inputs, missing, variance),
        FeatureResult.to_arrays,
        _feature_result,
    )


def _score_features(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    variance: float,
) -> dict[str, FeatureResult]:
    """Score the features of all members: on the spans of events, then over all test tokens."""
    test = inputs.test
    kinds = _event_kinds(settings, inputs)
    test_weights = draw_weights(len(test.recordings), settings.seed)
    spans: dict[str, SpanMeasures] = {}
    if kinds:
        assert inputs.val is not None  # events require it
        val_weights = draw_weights(len(inputs.val.recordings), settings.seed)
        with progress("score events", len(members), "members", delay=2.0) as bar:
            for member in members:
                spans[member.name] = measure_spans(member.sae, kinds, val_weights, test_weights)
                bar.advance(1)
    chosen: dict[str, list[int]] = {member.name: [] for member in members}
    for name, measures in spans.items():
        chosen[name] = [score.feature for score in measures.scores]
    read = read_features(test, {member.name: member.sae for member in members}, chosen)
    results = {}
    for name, features in read.items():
        events = None
        if kinds:
            events = _score_tokens(test, kinds, spans[name], features, test_weights)
        bits = description_length(
            features.active,
            features.mean,
            features.mean_square,
            test.store.total_tokens,
            variance,
        )
        results[name] = FeatureResult(bits, events)
    return results


def _event_kinds(settings: EvaluateConfig, inputs: EvaluationInputs) -> list[EventKind]:
    """Return the kinds of events with spans of both sorts in val and test, by name."""
    test = inputs.test
    val = inputs.val
    if val is None or not inputs.has_events:
        return []
    kinds = []
    for name, events in sorted(read_events(test.folder).items()):
        # Features are chosen on val patients and scored on test patients, so that the best of
        # many features does not win by chance.
        val_spans = gather(val, draw_spans(val, events, settings.seed))
        test_spans = gather(test, draw_spans(test, events, settings.seed))
        if val_spans.has_both and test_spans.has_both:
            kinds.append(make_kind(name, val_spans, test_spans, event_share(test, events)))
    return kinds


def _score_tokens(
    test: Dataset,
    kinds: Sequence[EventKind],
    spans: SpanMeasures,
    features: FeatureTokens,
    weights: Float[np.ndarray, "resamples recordings"],
) -> EventEvaluation:
    """Return the scores on spans with those over tokens."""
    precision = np.stack([features.precision(kind.touched) for kind in kinds])
    base_rate = np.array([kind.base_rate for kind in kinds])
    of_features = FeatureEvents(
        kinds=tuple(kind.name for kind in kinds),
        val_auc=spans.val_auc,
        auc=spans.auc,
        recall=spans.recall,
        precision=precision,
        examples=features.examples,
        base_rate=base_rate,
    )
    n_pure = of_features.is_pure.sum(axis=1)
    aucs = token_aucs(features.chosen, [kind.covered for kind in kinds])
    scores = {}
    for i, (kind, score) in enumerate(zip(kinds, spans.scores, strict=True)):
        best = score.feature
        is_active = features.examples[best] > 0
        scores[kind.name] = replace(
            score,
            token_auc=aucs[i],
            token_base_rate=kind.base_rate,
            precision=float(precision[i, best]) if is_active else None,
            precision_interval=features.precision_interval(
                best, kind.touched, test.recording, weights
            ),
            examples=int(features.examples[best]),
            pure_features=int(n_pure[i]),
        )
    return EventEvaluation(scores, summarise_events(scores, spans, of_features), of_features)
