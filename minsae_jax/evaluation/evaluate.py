"""`minsae evaluate`: measure the members of a run on held-out recordings and recommend one.

Measures of an earlier evaluation are reused if their inputs have not changed; see
`minsae_jax.evaluation.saved`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.control import RANDOM, read_control
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.event_measures import gain_over
from minsae_jax.evaluation.event_results import EventEvaluation
from minsae_jax.evaluation.feature_measures import FeatureResult, measure_features, source_of
from minsae_jax.evaluation.inputs import EvaluationInputs, open_inputs
from minsae_jax.evaluation.loss_recovered import (
    LossRecovered,
    SubstitutionErrors,
    substitution_errors,
    summarise,
)
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.pca import (
    COMPONENTS,
    PCA,
    PCA_K,
    PCA_TOKENS,
    RAW,
    fit_pca,
    pca_autoencoder,
    raw_autoencoder,
)
from minsae_jax.evaluation.recommend import RULE, recommend
from minsae_jax.evaluation.recordings import check_unchanged
from minsae_jax.evaluation.results import Evaluation, MemberEvaluation, PCAEvaluation
from minsae_jax.evaluation.saved import (
    Keys,
    discard_unfinished,
    load_part,
    make_key,
    save_part,
    saved_or_measured,
)
from minsae_jax.evaluation.stability import Stability, seed_stability
from minsae_jax.evaluation.summary import write_files
from minsae_jax.evaluation.token_measures import TokenResult, decoder_cosines, measure_tokens
from minsae_jax.files import sha256_of
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import sample_batches
from minsae_jax.sae.member import WEIGHTS


def evaluate(
    settings: EvaluateConfig,
    encoder: BaseEncoder | None,
    train_config: TrainConfig | None = None,
) -> Evaluation:
    """Evaluate members, and write evaluation.json, .csv and .png into --out, by default the run.

    With --member, only that one is measured; others stay in the evaluation if their saved measures
    are still valid. Without an encoder, or if it declares no reconstruction, loss recovered is not
    measured. train_config: settings of the run, read from it unless passed. Raises UserError if
    run, stores, encoder and recordings do not belong together.
    """
    inputs = open_inputs(
        settings, encoder, train_config, settings.member, settings.out, settings.compare_with
    )
    with inputs.locked():
        return _evaluate(settings, inputs)


def _evaluate(settings: EvaluateConfig, inputs: EvaluationInputs) -> Evaluation:
    """Evaluate the members of a run on locked inputs."""
    controls = _read_control(settings, inputs)
    check_unchanged(inputs.test)
    discard_unfinished(inputs.out)
    pca = _fit_pca(inputs)
    components = _pca_members(pca)
    baselines = _baselines(pca, inputs)
    members = inputs.members
    _check_names(members, [*components, *baselines])
    keys = _keys(settings, inputs, [*members, *components, *baselines])
    if settings.member is not None:
        # The others stay if nothing has to be measured.
        members = tuple(
            m for m in members if m.name == settings.member or _is_saved(inputs, m.name, keys)
        )
    measured = [*members, *components]
    tokens = measure_tokens(inputs, measured, keys)
    errors = _substitute(settings, inputs, measured, keys, tokens)
    features = measure_features(settings, inputs, [*measured, *baselines], keys, tokens)
    losses = {}
    for name, of_one in errors.items():
        losses[name] = summarise(of_one, inputs.test.recordings, settings.seed)
    is_live = {name: result.density > 0 for name, result in tokens.items()}
    stability = seed_stability(members, is_live)
    evaluations = []
    for member in members:
        name = member.name
        evaluated = _evaluate_member(
            member, tokens[name], features[name], losses.get(name), stability.get(name)
        )
        evaluations.append(evaluated)
    pca_evaluations = []
    for member in components:
        name = member.name
        pca_evaluation = PCAEvaluation(
            k=member.sae.config["k"],
            fvu=tokens[name].measures.fvu,
            explained_variance=tokens[name].measures.explained_variance,
            description_bits=features[name].description_bits,
            loss=losses.get(name),
            event_evaluation=features[name].events,
        )
        pca_evaluations.append(pca_evaluation)
    baseline_events = {}
    for member in baselines:
        events = features[member.name].events
        if events is not None:
            baseline_events[member.name] = events
    recommendation = recommend(evaluations, pca_evaluations, inputs.test.store.d_model)
    selected = settings.member or recommendation.member
    events = features[selected].events
    if selected in controls:
        baseline_events[RANDOM] = controls[selected]
    gains = {}
    if events is not None:
        gains = {name: gain_over(others, events) for name, others in baseline_events.items()}
    evaluation = Evaluation(
        inputs=inputs,
        members=tuple(evaluations),
        pca=tuple(pca_evaluations),
        recommendation=recommendation,
        rule=RULE,
        selected=selected,
        substitution=next(iter(errors.values()), None),
        mask_ratio=settings.mask_ratio,
        baseline_events=baseline_events,
        gains=gains,
        control=settings.control,
    )
    write_files(evaluation)
    return evaluation


def _read_control(settings: EvaluateConfig, inputs: EvaluationInputs) -> dict[str, EventEvaluation]:
    """Return the control of each member that can be selected, by name; empty without --control.

    It is read before anything is measured, which can take hours.
    """
    if settings.control is None:
        return {}
    if inputs.events is None:
        raise UserError("--control requires labelled events of val and test patients (events.csv)")
    members = [m for m in inputs.members if settings.member in (None, m.name)]
    encoder = inputs.test.store.require_manifest().encoder
    return read_control(Path(settings.control), members, source_of(settings, inputs), encoder)


def _baselines(pca: PCA | None, inputs: EvaluationInputs) -> list[Member]:
    """Return all raw dimensions and all principal components; none without events."""
    if pca is None or inputs.events is None:
        return []
    components = pca_autoencoder(pca, len(pca.mean))
    return [Member(RAW, raw_autoencoder(pca.mean)), Member(COMPONENTS, components)]


def _check_names(members: Sequence[Member], baselines: Sequence[Member]) -> None:
    """Raise UserError if a member is called like a baseline, whose measures it would replace."""
    reserved = {baseline.name for baseline in baselines}
    for member in members:
        if member.name in reserved:
            raise UserError(f"{member.name} is the name of a baseline; rename {member.folder}")


def _evaluate_member(
    member: Member,
    tokens: TokenResult,
    features: FeatureResult,
    loss: LossRecovered | None,
    stability: Stability | None,
) -> MemberEvaluation:
    weighted = None if stability is None else stability.share(weights=features.contribution)
    return MemberEvaluation(
        member=member.name,
        hyper=member.hyper,
        status=member.sae.config.get("status"),
        tokens=tokens.measures,
        decoder=decoder_cosines(member.sae),
        description_bits=features.description_bits,
        stability=stability,
        weighted_stability=weighted,
        loss=loss,
        event_evaluation=features.events,
    )


def _keys(
    settings: EvaluateConfig, inputs: EvaluationInputs, members: Sequence[Member]
) -> dict[str, Keys]:
    """Return the checksums of the inputs of each member's measures, by name."""
    val = None if inputs.val is None else _fingerprint(inputs.val)
    components = None if inputs.pca_store is None else [inputs.pca_store.fingerprint, PCA_TOKENS]
    test = _fingerprint(inputs.test)
    encoder = None if inputs.encoder is None else inputs.encoder.fingerprint
    windows = [settings.substitution_windows, settings.mask_ratio, settings.seed]
    events = [sha256_of(path) for path in inputs.event_files]
    keys = {}
    for member in members:
        # Baselines have no files, since they are made from a store.
        source = components if member.folder is None else sha256_of(member.folder / WEIGHTS)
        about = [source, member.sae.config.get("kind", "relu"), member.sae.d_sae]
        keys[member.name] = Keys(
            tokens=make_key("tokens", about, test),
            loss=make_key("loss", about, [test, encoder, *windows]),
            features=make_key("features", about, [test, val, events, settings.seed]),
        )
    return keys


def _is_saved(inputs: EvaluationInputs, name: str, keys: Mapping[str, Keys]) -> bool:
    """Whether all measures of a member are saved."""
    parts = keys[name]._asdict()
    if inputs.encoder is None or inputs.encoder.reconstruction is None:
        del parts["loss"]
    return all(load_part(inputs.out, name, part, key) is not None for part, key in parts.items())


def _fingerprint(dataset: Dataset) -> list[str]:
    """Return checksums of a store and of the places of its tokens.

    An imported store can be written again with other places, such as corrected recordings, and the
    same activations.
    """
    return [dataset.store.require_manifest().fingerprint, dataset.places_sha256()]


def _fit_pca(inputs: EvaluationInputs) -> PCA | None:
    """Return the components of up to PCA_TOKENS tokens, or None without a store for them."""
    store = inputs.pca_store
    if store is None:
        return None
    key = make_key("pca", PCA_TOKENS, store.fingerprint)
    saved = load_part(inputs.out, COMPONENTS, "fit", key)
    if saved is not None:
        return PCA(saved["mean"], saved["directions"])
    pca = fit_pca(sample_batches(store, PCA_TOKENS))
    save_part(inputs.out, COMPONENTS, "fit", key, pca._asdict())
    return pca


def _pca_members(pca: PCA | None) -> list[Member]:
    """Return an autoencoder for each k of PCA_K."""
    if pca is None:
        return []
    ks = [k for k in PCA_K if k <= len(pca.mean)]
    return [Member(f"pca,k={k}", pca_autoencoder(pca, k)) for k in ks]


def _substitute(
    settings: EvaluateConfig,
    inputs: EvaluationInputs,
    members: Sequence[Member],
    keys: Mapping[str, Keys],
    tokens: Mapping[str, TokenResult],
) -> dict[str, SubstitutionErrors]:
    """Return the pretraining errors on each member's x̂, by name; empty without such a task."""
    encoder = inputs.encoder
    if encoder is None or encoder.reconstruction is None:
        return {}

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
        return dict(zip([member.name for member in missing], errors, strict=True))

    return saved_or_measured(
        inputs.out,
        "loss",
        members,
        keys,
        measure_missing,
        vars,
        lambda saved: SubstitutionErrors(**saved),
    )
