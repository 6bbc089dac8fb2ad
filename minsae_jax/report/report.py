"""The report of one member: its evaluation, and every feature with the EEG that activates it."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from minsae_jax.evaluation.associations import Associations, measure_associations
from minsae_jax.evaluation.config import EvaluateConfig, parse_bands
from minsae_jax.evaluation.members import Member, training_of
from minsae_jax.evaluation.results import Evaluation, MemberEvaluation
from minsae_jax.evaluation.steering.edit import can_steer
from minsae_jax.evaluation.steering.results import Steering
from minsae_jax.evaluation.steering.steer import steer_best
from minsae_jax.monitor import percent
from minsae_jax.report.budget import choose_features, plan_pages
from minsae_jax.report.context import Context
from minsae_jax.report.describe import describe_all, feature_row
from minsae_jax.report.examples import collect
from minsae_jax.report.excerpts import shown_samples
from minsae_jax.report.findings import make_findings
from minsae_jax.report.folder import ReportMeta, read_member, write_pages
from minsae_jax.report.montages import bipolar_chains
from minsae_jax.report.naming import LABELS_CSV, read_feature_labels
from minsae_jax.report.pages import Pages, make_pages, shown_features


def write_report(settings: EvaluateConfig, evaluation: Evaluation) -> Associations:
    """Write report/ of the recommended member, or of --member.

    Returns the associations of its features with labels. Raises UserError if labels.csv is invalid
    or report/ contains other files and no report.
    """
    inputs = evaluation.inputs
    member = next(m for m in inputs.members if m.name == evaluation.selected)
    folder = inputs.out / "report"
    before = read_member(folder)
    labels = read_feature_labels(folder / LABELS_CSV, member.sae.d_sae, member.name, before)
    n_samples = shown_samples(inputs.test, settings.w, settings.context_seconds)
    activity = collect(
        inputs.test,
        member.sae,
        settings.top,
        settings.per_recording,
        seed=settings.seed,
        n_samples=n_samples,
    )
    n_active = int((activity.active > 0).sum())
    budget = plan_pages(inputs.test, n_samples, settings.top, n_active, settings.report_features)
    associations = measure_associations(inputs, member, settings.pooling, settings.seed)
    steering = _steer(settings, evaluation, member)
    pages = make_pages(evaluation, associations, steering)
    context = Context(
        inputs.test,
        member.sae,
        activity,
        inputs.encoder,
        settings.w,
        parse_bands(settings.bands),
        labels,
        context_seconds=settings.context_seconds,
        montage_examples=budget.montage_examples,
        findings=make_findings(evaluation, associations),
    )
    chosen = choose_features(
        member.sae, activity, [*labels, *shown_features(pages)], budget.n_features
    )
    rule = ""
    if len(chosen) == n_active and settings.report_features is None:
        # The inactive ones too: their pages are short.
        chosen = list(range(member.sae.d_sae))
    else:
        rule = (
            f"Pages were written for {len(chosen):,} features: named ones, those in the tables of "
            "events and labels, and those with the largest sum of activations times decoder norm. "
            "Set --report_features for more."
        )
    others = sorted(set(range(member.sae.d_sae)) - set(chosen))
    write_pages(
        folder,
        _make_meta(settings, evaluation, member, pages, rule),
        describe_all(context, chosen),
        (feature_row(context, feature) for feature in others),
    )
    return associations


def _steer(settings: EvaluateConfig, evaluation: Evaluation, member: Member) -> dict[str, Steering]:
    """Steer the best feature of each kind of event, if the encoder can run from a layer on."""
    scores = evaluation.find(member.name).events or {}
    features = {kind: score.feature for kind, score in scores.items()}
    inputs = evaluation.inputs
    if not features or inputs.encoder is None or not can_steer(inputs.encoder, inputs.layer):
        return {}
    return steer_best(
        inputs, member, features, bands=parse_bands(settings.bands), seed=settings.seed
    )


def _make_meta(
    settings: EvaluateConfig,
    evaluation: Evaluation,
    member: Member,
    pages: Pages,
    pages_rule: str,
) -> ReportMeta:
    inputs = evaluation.inputs
    encoder = inputs.encoder
    test = inputs.test
    manifest = test.store.require_manifest()
    grid = test.tokens
    assert member.folder is not None  # only baselines have no files
    training = training_of(member.folder)
    # The encoder that `view` finds without a flag
    encoder_path = None if training is None else training.encoder_path
    sampling_rate = test.sampling_rate
    names = test.channel_names
    positions = test.positions
    return ReportMeta(
        title=f"{inputs.name}: {member.name}",
        member=member.name,
        member_folder=str(member.folder.resolve()),
        run=str(inputs.source),
        encoder=manifest.encoder[:12],
        layer=manifest.layer,
        created_with=f"minsae_jax {version('minsae_jax')}",
        n_tokens=test.store.total_tokens,
        n_windows=len(test.windows),
        n_recordings=len(test.recordings),
        n_patients=len(set(test.patients)),
        split=manifest.data.get("split", "test"),
        sampling_rate=int(sampling_rate) if sampling_rate.is_integer() else sampling_rate,
        patch_seconds=grid.mean_step / sampling_rate,
        n_patches=len(grid.starts),
        has_cls=len(grid.located) < grid.n_tokens,
        channels=names or [str(i) for i in range(test.n_vars)],
        positions=np.zeros((0, 2)) if positions is None else positions,
        bipolar=[] if names is None else bipolar_chains(names),
        channel_tokens=test.has_channels,
        bands=parse_bands(settings.bands),
        summary=_summary_rows(evaluation.find(member.name), member),
        pages=pages,
        pages_rule=pages_rule,
        # The head, which makes the waveform, reads the last layer.
        waveform_exact=encoder is not None and inputs.layer == encoder.spec.layers[-1],
        waveform_unit="SD of the window" if manifest.data["revin"] else test.description.unit,
        shifted_recordings=int(test.shifted.sum()),
        recordings=str(test.folder.resolve()),
        encoder_flags=_encoder_flags(settings),
        view_in_python=settings.checkpoint_path is None and encoder_path is None,
    )


def _encoder_flags(settings: EvaluateConfig) -> list[str]:
    """Return the flags by which `view` loads the encoder, if it is not that of the run's config."""
    flags = []
    if settings.checkpoint_path is not None:
        flags += ["--checkpoint_path", str(Path(settings.checkpoint_path).resolve())]
    if settings.config_path is not None:
        flags += ["--config_path", str(Path(settings.config_path).resolve())]
    return flags


def _summary_rows(evaluated: MemberEvaluation, member: Member) -> list[tuple[str, str]]:
    tokens = evaluated.tokens
    rows = [
        ("features", f"{member.sae.d_sae:,}"),
        ("active per token (L0)", f"{tokens.l0:.1f}"),
        ("variance unexplained (FVU)", f"{tokens.fvu:.3f}"),
        ("never active on these tokens", percent(tokens.never_active_fraction, 1)),
        ("active on over 10 % of tokens", percent(tokens.dense_fraction, 1)),
    ]
    if evaluated.loss is not None:
        recovered = evaluated.loss.loss_recovered.value
        text = "undefined" if np.isnan(recovered) else percent(recovered, 1)
        rows.append(("loss recovered", text))
    return rows
