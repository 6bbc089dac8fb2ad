"""Feature cards: everything the report shows about a feature, as typed arrays and numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.evaluation.associations import LabelledFeature
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.event_results import FeatureScore
from minsae_jax.monitor import progress
from minsae_jax.report.activations import ExampleActivations, measure_examples
from minsae_jax.report.context import SPECTRA_SEED, Context
from minsae_jax.report.entries import EDGES
from minsae_jax.report.excerpts import Example, cut_example
from minsae_jax.report.findings import Explained, SeedStability
from minsae_jax.report.naming import Label, fits_region, region, suggest_name
from minsae_jax.report.neighbours import coactive_features, nearest_features
from minsae_jax.report.spectra import (
    BROADBAND_RATIO,
    HINTS,
    SampleSpectra,
    Spectrum,
    band_ratio,
    channel_power_ratio,
    dominant_band,
    measure_spectrum,
)

LISTED_PATIENTS = 12
DETECTS = 0.8  # least AUC of a feature that detects a kind of event


@dataclass(frozen=True)
class Histogram:
    """Active tokens by activation, without the empty bins at both ends."""

    edges: Float[np.ndarray, " edges"]
    counts: Int[np.ndarray, " bins"]


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """A feature in the table of all features."""

    id: int
    # Share of tokens with the feature active
    density: float
    # Mean and largest activation when active
    mean: float
    max: float
    # Channel on which the feature is most active; "" if unknown
    channel: str
    # Dominant frequency band; "" if unknown
    band: str = ""
    # Number of patients with any activation
    patients: int
    # Largest share of sampled examples with an artefact hint, and of the strongest examples; NaN if
    # unknown
    artefact: float = np.nan
    artefact_top: float = np.nan
    # The user's label, from labels.csv
    label: str
    # Suggested label
    suggestion: str = ""
    # Share of sampled examples on a channel of the suggested region and with more power than usual
    # in the suggested band; NaN if it names neither
    support: float = np.nan
    # None if no other member differs in the seed only
    stability: SeedStability | None = None
    # By AUC, the best first; empty without labelled events
    events: Sequence[FeatureScore] = ()

    @property
    def seeds(self) -> int | None:
        """Number of seeds in which the feature is found."""
        return None if self.stability is None else self.stability.found

    @property
    def detected(self) -> list[FeatureScore]:
        """The scores with an AUC of at least DETECTS, the best first."""
        scores = [score for score in self.events if score.auc >= DETECTS]
        return sorted(scores, key=lambda score: -score.auc)

    @property
    def detects(self) -> list[str]:
        """The kinds of events that the feature detects, the best first."""
        return [score.kind for score in self.detected]

    @property
    def best_event(self) -> FeatureScore | None:
        """The kind of event that the feature detects best; None if it detects none."""
        return next(iter(self.detected), None)

    @property
    def event(self) -> str:
        """The kind of event that the feature detects best; "" if it detects none."""
        best = self.best_event
        return "" if best is None else best.kind

    @property
    def event_auc(self) -> float | None:
        """AUC for `event`."""
        best = self.best_event
        return None if best is None else best.auc


@dataclass(frozen=True, kw_only=True)
class FeatureCard(FeatureRow):
    """One feature as the report shows it; field names are the keys of its data file."""

    # Share of the active tokens that the first patient has
    patient_share: float
    # Share of the active tokens that are CLS tokens
    cls: float
    # The user's note, from labels.csv
    note: str
    examples: list[Example]
    histogram: Histogram
    # Mean activation on each channel over the mean on all channels; for tokens over all channels,
    # power of each channel during active tokens over its base rate
    channel_ratio: Float[np.ndarray, " n_vars"]
    spectrum: Spectrum | None
    # Share of the active tokens by start in the window; empty if starts are not evenly spaced
    position: Float[np.ndarray, " n_patches"]
    # Share of the active tokens by patient, largest first
    patient_list: list[tuple[str, float]]
    # Features by cosine of decoder rows
    nearest: list[tuple[int, float]]
    # Features by Jaccard index of active tokens
    coactive: list[tuple[int, float]]
    # Samples that a unit of the feature adds to a patch, by the encoder's head if there is one;
    # exact after the last layer only, since layers between the SAE and the head are skipped
    waveform: Float[np.ndarray, " patch_len"] | None
    # Share of sampled examples with each artefact hint, and of the strongest examples
    artefacts: dict[str, float]
    artefacts_top: dict[str, float]
    # Share of the variance by position, channel, recording and patient
    explained: Explained | None = None
    # By q, the smallest first; empty without labels of recordings
    labels: Sequence[LabelledFeature] = ()

    def __repr__(self) -> str:
        # Without the EEG of the examples, which a notebook would print in full.
        name = self.label or self.suggestion or "no label"
        return f"{type(self).__name__}({self.id}, {name}, {len(self.examples)} examples)"


def describe(context: Context, feature: int) -> FeatureCard:
    """Return the card of one feature."""
    return next(describe_all(context, [feature]))


def describe_all(context: Context, features: Sequence[int] | None = None) -> Iterator[FeatureCard]:
    """Yield the cards of features by number, by default of all; the store is read once for them."""
    features = sorted(range(context.sae.d_sae) if features is None else features)
    shown = []
    for feature in features:
        chosen = context.examples_of(feature)
        shown += [(feature, one.sequence, one.token) for one in chosen]
    of_example, sequence, token = np.array(shown, np.int64).reshape(-1, 3).T
    measured = measure_examples(
        context.dataset, context.sae, context.w, of_example, sequence, token
    )
    nearest = nearest_features(context.sae.unit_directions, features)
    coactive = coactive_features(context.activity.together, features)
    with_examples = set(of_example.tolist())
    with progress("describe features", len(features), "features", delay=2.0) as bar:
        for feature, near, together in zip(features, nearest, coactive, strict=True):
            activations = ExampleActivations([], [])
            if feature in with_examples:
                activations = next(measured)
            yield _describe(context, feature, activations, near, together)
            bar.advance(1)


def feature_row(context: Context, feature: int) -> FeatureRow:
    """Return the parts of a feature's card that do not require EEG."""
    activity = context.activity
    ratio = np.zeros(0)
    if context.dataset.has_channels:
        ratio = _channel_ratio(context, feature)
    return FeatureRow(
        id=feature,
        density=float(activity.density[feature]),
        mean=float(activity.mean[feature]),
        max=float(activity.largest[feature]),
        channel=_top_channel(context.dataset, ratio),
        patients=len(_patient_shares(context, feature)),
        label=context.labels.get(feature, Label()).label,
        stability=context.findings.stability_of(feature),
        events=context.findings.events_of(feature),
    )


def _describe(
    context: Context,
    feature: int,
    activations: ExampleActivations,
    nearest: list[tuple[int, float]],
    coactive: list[tuple[int, float]],
) -> FeatureCard:
    activity = context.activity
    dataset = context.dataset
    n_active = max(1, int(activity.active[feature]))
    is_alive = bool(activity.active[feature])
    channel_ratio = _channel_ratio(context, feature)
    top_channel = int(np.argmax(channel_ratio))
    sample = measure_spectrum(
        dataset, context.base, activity.random, feature, SPECTRA_SEED, top_channel
    )
    spectrum = None if sample is None else sample.spectrum
    artefacts = {} if sample is None else sample.artefacts
    band = dominant_band(context.bands, sample)
    shares = _patient_shares(context, feature)
    by_position = activity.by_token[feature] / n_active
    is_located = dataset.tokens.first >= 0
    examples = []
    chosen = context.examples_of(feature)
    for token, around, others in zip(chosen, activations.around, activations.others, strict=True):
        example = cut_example(
            dataset,
            token,
            around,
            others,
            context.events,
            context.w,
            context.n_samples,
            top_channel,
        )
        examples.append(example)
    strongest = [example.hints for example in examples if example.group == "top"]
    artefacts_top = {}
    if strongest:
        for hint in HINTS:
            artefacts_top[hint] = float(np.mean([hint in hints for hints in strongest]))
    suggestion = ""
    support = np.nan
    if is_alive:
        suggestion, support = _suggest(context, feature, channel_ratio, band, sample)
    waveform = None
    if context.encoder is not None:
        waveform = context.encoder.waveform(context.sae.decoder_directions[feature])
    row = replace(
        feature_row(context, feature),
        channel=_top_channel(dataset, channel_ratio),
        band=band,
        artefact=float(max(artefacts.values(), default=np.nan)),
        artefact_top=float(max(artefacts_top.values(), default=np.nan)),
        suggestion=suggestion,
        support=support,
    )
    return FeatureCard(
        **vars(row),
        patient_share=float(shares[0][1]) if shares else 0.0,
        cls=float(by_position[~is_located].sum()),
        note=context.labels.get(feature, Label()).note,
        examples=examples,
        histogram=_histogram(activity.histogram[feature]),
        channel_ratio=channel_ratio,
        spectrum=spectrum,
        position=_by_start(dataset, by_position),
        patient_list=shares[:LISTED_PATIENTS],
        nearest=nearest,
        coactive=coactive,
        waveform=waveform,
        artefacts=artefacts,
        artefacts_top=artefacts_top,
        explained=context.findings.explained_of(feature),
        labels=context.findings.labels_of(feature),
    )


def _suggest(
    context: Context,
    feature: int,
    channel_ratio: Float[np.ndarray, " n_vars"],
    band: str,
    sample: SampleSpectra | None,
) -> tuple[str, float]:
    """Return the suggested name of an active feature, and `FeatureCard.support` for it."""
    dataset = context.dataset
    relative = channel_ratio
    n_active = None
    if dataset.has_channels:
        n_active = _active_on_channels(context, feature)
    elif channel_ratio.any():
        # Ratios of power: where it rises most, even if it rises everywhere.
        relative = channel_ratio / channel_ratio.mean()
    positions = dataset.positions if channel_ratio.any() else None
    name = suggest_name(context.bands, relative, band, positions, n_active)
    place = "" if positions is None else region(relative, positions, n_active)
    limits = {known.name: known for known in context.bands}
    has_place = place not in ("", "widespread")
    if sample is None or not (has_place or band in limits):
        return name, np.nan
    random = context.activity.random
    is_example = random.token[feature] >= 0
    fits = np.ones(int(is_example.sum()), bool)
    if has_place:
        assert positions is not None
        sequences = random.sequence[feature, is_example]
        tokens = random.token[feature, is_example]
        channels = dataset.channels_of(sequences, tokens)
        fits &= fits_region(place, channels, positions)
        if dataset.has_channels:
            # The region is that of tokens of single channels: others are not in it.
            fits &= channels >= 0
    if band in limits:
        ratios = band_ratio(sample.spectrum.hz, sample.ratios, limits[band])
        fits &= ratios > BROADBAND_RATIO
    return name, float(fits.mean())


def _active_on_channels(context: Context, feature: int) -> int:
    """Return the number of active tokens of single channels, of which the region is named.

    Those in recordings with shifted columns are left out by their share of all active tokens.
    """
    dataset = context.dataset
    activity = context.activity
    has_channel = (dataset.tokens.channel >= 0) | bool((dataset.channel >= 0).any())
    on_channels = activity.by_token[feature, has_channel].sum()
    unshifted = activity.by_recording[feature, ~dataset.shifted].sum()
    return round(on_channels * unshifted / max(1, int(activity.active[feature])))


def _patient_shares(context: Context, feature: int) -> list[tuple[str, float]]:
    """Return (patient, share of the active tokens), largest first, without zeros."""
    activity = context.activity
    patients = context.dataset.patients
    by_recording = activity.by_recording[feature]
    counts: dict[str, int] = {}
    for recording in np.flatnonzero(by_recording).tolist():
        patient = patients[recording]
        counts[patient] = counts.get(patient, 0) + int(by_recording[recording])
    n_active = int(activity.active[feature])
    shares = [(patient, count / n_active) for patient, count in counts.items()]
    return sorted(shares, key=lambda item: (-item[1], item[0]))


def _channel_ratio(context: Context, feature: int) -> Float[np.ndarray, " n_vars"]:
    """Return `FeatureCard.channel_ratio`."""
    activity = context.activity
    if not context.dataset.has_channels:
        return channel_power_ratio(context.dataset, context.base, activity.random, feature)
    by_channel = activity.by_channel[feature]
    rate = by_channel / np.maximum(activity.channel_tokens, 1)
    overall = by_channel.sum() / max(1, activity.channel_tokens.sum())
    return rate / overall if overall else np.zeros_like(rate)


def _top_channel(dataset: Dataset, ratio: Float[np.ndarray, " n_vars"]) -> str:
    """Return the name of the channel with the largest ratio, or "" if name or ratios are unknown.

    No ratio is known if all tokens are CLS tokens or in recordings with shifted columns.
    """
    names = dataset.channel_names
    return "" if names is None or not ratio.any() else names[int(np.argmax(ratio))]


def _by_start(
    dataset: Dataset, by_position: Float[np.ndarray, " n_tokens"]
) -> Float[np.ndarray, " n_starts"]:
    """Return the sum over the tokens of each start, or nothing if starts are unevenly spaced."""
    grid = dataset.tokens
    if grid.step is None:
        return np.zeros(0)
    located = grid.located
    return np.bincount(grid.slot[located], by_position[located], len(grid.starts))


def _histogram(counts: Int[np.ndarray, " bins"]) -> Histogram:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return Histogram(EDGES[:0], counts[:0])
    first = int(filled[0])
    stop = int(filled[-1]) + 1
    return Histogram(EDGES[first : stop + 1], counts[first:stop])
