"""The card of a feature: all that the report shows of it, as typed arrays and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.eeg.montage import BANDS
from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.report.examples import EDGES, Activity, Tokens
from minsae_jax.report.excerpts import ChosenToken, Example, cut_examples
from minsae_jax.report.naming import Label, suggest_name
from minsae_jax.report.pages import (
    DetectedEvent,
    DetectedLabel,
    Explained,
    SeedStability,
    best_event,
)
from minsae_jax.report.spectra import (
    BaseSpectra,
    Spectrum,
    channel_power_ratio,
    dominant_band,
    measure_base_spectra,
    measure_spectrum,
)
from minsae_jax.sae.member import SparseAutoencoder

DEFAULT_BANDS = tuple(Band(*band) for band in BANDS)
MONTAGE_EXAMPLES = 8  # top examples with all channels
RANDOM_EXAMPLES = 6
LISTED_PATIENTS = 12
NEIGHBOURS = 8
MAX_COSINE_FEATURES = 16_384  # above it, no nearest features: all cosines are in memory


@dataclass(frozen=True)
class Context:
    """Data that all feature cards share."""

    dataset: Dataset
    sae: SparseAutoencoder
    activity: Activity
    # None if only the store is at hand
    encoder: BaseEncoder | None
    # Patches shown before and after an example's patch
    w: int
    bands: Sequence[Band]
    base: BaseSpectra
    # Decoder rows, and their cosines
    directions: Float[np.ndarray, "d_sae d_model"]
    cosine: Float[np.ndarray, "d_sae d_sae"] | None
    labels: Mapping[int, Label]
    quantiles: Tokens
    seed: int


@dataclass(frozen=True)
class Histogram:
    """Active tokens by activation, without the empty bins at both ends."""

    edges: Float[np.ndarray, " edges"]
    counts: Int[np.ndarray, " bins"]


@dataclass(frozen=True)
class FeatureCard:
    """One feature as the report shows it; field names are the keys of its data file."""

    id: int
    # Share of tokens with the feature active
    density: float
    # Mean and largest activation when active
    mean: float
    max: float
    # Channel on which the feature is most active; "" if unknown
    channel: str
    # Dominant frequency band; "" if unknown
    band: str
    # Number of patients with any activation
    patients: int
    # Share of the active tokens that the first patient has
    patient_share: float
    # Largest of `artefacts`
    artefact: float
    # Share of the active tokens that are CLS tokens
    cls: float
    # The user's label and note, from labels.csv
    label: str
    note: str
    # Suggested label
    suggestion: str
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
    # Samples that a unit of the feature adds to a patch, by the encoder's head
    waveform: Float[np.ndarray, " patch_len"] | None
    # Share of examples with each artefact hint
    artefacts: dict[str, float]
    # None if no other member differs in the seed only
    stability: SeedStability | None = None
    # Share of the variance by position, channel, recording and patient
    explained: Explained | None = None
    # By AUC, the best first; empty without labelled events
    events: Sequence[DetectedEvent] = ()
    # By q, the smallest first; empty without labels of recordings
    labels: Sequence[DetectedLabel] = ()

    @property
    def seeds(self) -> int | None:
        """Number of seeds in which the feature is found."""
        return None if self.stability is None else self.stability.found

    @property
    def event(self) -> str:
        """The kind of event that the feature detects best; "" if it detects none."""
        best = best_event(self.events)
        return "" if best is None else best.kind

    @property
    def event_auc(self) -> float | None:
        """AUC for `event`."""
        best = best_event(self.events)
        return None if best is None else best.auc


def make_context(
    dataset: Dataset,
    sae: SparseAutoencoder,
    activity: Activity,
    encoder: BaseEncoder | None,
    w: int = 10,
    bands: Sequence[Band] = DEFAULT_BANDS,
    labels: Mapping[int, Label] | None = None,
    seed: int = 0,
) -> Context:
    """Compute the data that all cards share; w: patches before and after an example's patch."""
    cosine = None
    if sae.d_sae <= MAX_COSINE_FEATURES:
        rows = sae.unit_directions
        cosine = rows @ rows.T
    return Context(
        dataset=dataset,
        sae=sae,
        activity=activity,
        encoder=encoder,
        w=w,
        bands=bands,
        base=measure_base_spectra(dataset, w, seed, bands),
        directions=sae.decoder_directions,
        cosine=cosine,
        labels=labels or {},
        quantiles=activity.quantiles(),
        seed=seed,
    )


def describe_all(context: Context) -> Iterator[FeatureCard]:
    """Yield the card of every feature."""
    for feature in range(context.sae.d_sae):
        yield describe(context, feature)


def describe(context: Context, feature: int) -> FeatureCard:
    """Return the card of one feature."""
    activity = context.activity
    dataset = context.dataset
    n_active = max(1, int(activity.active[feature]))
    is_alive = bool(activity.active[feature])
    spectrum, artefacts = measure_spectrum(
        dataset, context.base, activity.random, feature, context.seed
    )
    band = dominant_band(context.bands, spectrum)
    channel_ratio = _channel_ratio(context, feature)
    top_channel = int(np.argmax(channel_ratio))
    shares = _patient_shares(dataset, activity.by_recording[feature], n_active)
    by_position = activity.by_token[feature] / n_active
    is_located = dataset.tokens.first >= 0
    chosen = _choose_tokens(context, feature)
    examples = cut_examples(dataset, context.sae, feature, chosen, context.w, top_channel)
    label = context.labels.get(feature, Label())
    # No ratio is known if all tokens are CLS tokens or in recordings with shifted columns.
    has_ratio = is_alive and bool(channel_ratio.any())
    suggestion = ""
    if is_alive:
        # For tokens over all channels: where power rises most, even if it rises everywhere.
        scale = 1.0 if dataset.has_channels or not has_ratio else channel_ratio.mean()
        positions = dataset.positions if has_ratio else None
        suggestion = suggest_name(context.bands, channel_ratio / scale, band, positions)
    return FeatureCard(
        id=feature,
        density=float(activity.density[feature]),
        mean=float(activity.mean[feature]),
        max=float(activity.largest[feature]),
        channel=_name_of(dataset, top_channel) if has_ratio else "",
        band=band,
        patients=len(shares),
        patient_share=float(shares[0][1]) if shares else 0.0,
        artefact=float(max(artefacts.values(), default=0.0)),
        cls=float(by_position[~is_located].sum()),
        label=label.label,
        note=label.note,
        suggestion=suggestion,
        examples=examples,
        histogram=_histogram(activity.histogram[feature]),
        channel_ratio=channel_ratio,
        spectrum=spectrum,
        position=_by_start(dataset, by_position),
        patient_list=shares[:LISTED_PATIENTS],
        nearest=_nearest(context, feature),
        coactive=_coactive(activity, feature),
        waveform=_waveform(context, feature),
        artefacts=artefacts,
    )


def _patient_shares(
    dataset: Dataset,
    by_recording: Int[np.ndarray, " recordings"],
    n_active: int,
) -> list[tuple[str, float]]:
    """Return (patient, share of the active tokens), largest first, without zeros."""
    counts: dict[str, int] = {}
    for patient, count in zip(dataset.patients, by_recording.tolist(), strict=True):
        counts[patient] = counts.get(patient, 0) + count
    shares = [(patient, count / n_active) for patient, count in counts.items() if count]
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


def _name_of(dataset: Dataset, channel: int) -> str:
    """Return the name of a channel, or "" without channel names."""
    names = dataset.channel_names
    return "" if names is None else names[channel]


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


def _choose_tokens(context: Context, feature: int) -> list[ChosenToken]:
    """Return the tokens of a feature to show as examples."""
    activity = context.activity
    quantiles = context.quantiles
    n_quantiles = quantiles.token.shape[1]
    n_random = min(RANDOM_EXAMPLES, activity.random.token.shape[1])
    n_top = activity.top.token.shape[1]
    ranked = [("top", activity.top, rank) for rank in range(n_top)]
    ranked += [(f"q{rank + 1}", quantiles, rank) for rank in range(n_quantiles)]
    ranked += [("random", activity.random, rank) for rank in range(n_random)]
    chosen = []
    for group, tokens, rank in ranked:
        token = int(tokens.token[feature, rank])
        if token < 0:
            continue
        one = ChosenToken(
            group=group,
            sequence=int(tokens.sequence[feature, rank]),
            token=token,
            activation=float(tokens.activation[feature, rank]),
            has_montage=group == "top" and rank < MONTAGE_EXAMPLES,
        )
        chosen.append(one)
    return chosen


def _nearest(context: Context, feature: int) -> list[tuple[int, float]]:
    """Return the features with the most similar decoder rows."""
    if context.cosine is None:
        return []
    cosine = context.cosine[feature].copy()
    cosine[feature] = -2
    n_others = len(cosine) - 1
    order = np.argsort(-cosine, kind="stable")[: min(NEIGHBOURS, n_others)]
    return [(int(i), float(cosine[i])) for i in order]


def _coactive(activity: Activity, feature: int) -> list[tuple[int, float]]:
    """Return the features most often active together with this one.

    The Jaccard index is tokens with both features active over tokens with either.
    """
    if activity.together is None or not activity.together[feature, feature]:
        return []
    both = activity.together[feature]
    each = np.diag(activity.together)
    either = each + each[feature] - both
    jaccard = both / np.maximum(either, 1)
    jaccard[feature] = -1
    order = np.argsort(-jaccard, kind="stable")[:NEIGHBOURS]
    return [(int(i), float(jaccard[i])) for i in order if jaccard[i] > 0]


def _waveform(context: Context, feature: int) -> Float[np.ndarray, " samples"] | None:
    """Return the samples that a unit of the feature adds to a patch, by the encoder's head.

    None if the encoder has no such head. Exact after the last layer only, since layers between the
    SAE and the head are skipped.
    """
    if context.encoder is None:
        return None
    return context.encoder.waveform(context.directions[feature])
