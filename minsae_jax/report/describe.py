"""The card of a feature: all that the report shows of it, as typed arrays and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int8

from minsae_jax.eeg.montage import BANDS, CHANNELS
from minsae_jax.encoder.converted import Encoder
from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.dataset import Dataset, seconds
from minsae_jax.report.examples import EDGES, Activity, Tokens
from minsae_jax.report.naming import Label, suggest_name
from minsae_jax.report.spectra import (
    BaseSpectra,
    Spectrum,
    artefact_hints,
    dominant_band,
    measure_base_spectra,
    measure_spectrum,
    window_eeg,
)
from minsae_jax.sae.member import SparseAutoencoder

DEFAULT_BANDS = tuple(Band(*band) for band in BANDS)
TRACE_STEP = 0.1  # SD per unit of an int8 trace
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
    encoder: Encoder
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
class Example:
    """EEG around one token of a feature."""

    # "top", "random", or "q1" … "q10" for tenths of the activations
    group: str
    activation: float
    recording: str
    patient: str
    channel: str
    # Start of the trace in the recording [s]
    start: float
    # Start and end of the active patch [s]; None for a CLS token
    patch: tuple[float, float] | None
    # EEG of the token's channel, in units of TRACE_STEP SD
    trace: Int8[np.ndarray, " samples"]
    # EEG of all channels, every 2nd sample
    others: Int8[np.ndarray, "channels half_samples"] | None
    # Activation of the feature on each patch shown, and the start of the first [s]
    strip: Float[np.ndarray, " patches"]
    strip_start: float
    # Artefact hints
    hints: list[str]


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
    # Mean activation on each channel over the mean on all channels
    channel_ratio: Float[np.ndarray, " n_vars"]
    spectrum: Spectrum | None
    # Share of the active tokens by patch
    position: Float[np.ndarray, " n_patches"]
    # Share of the active tokens by patient, largest first
    patient_list: list[tuple[str, float]]
    # Features by cosine of decoder rows
    nearest: list[tuple[int, float]]
    # Features by Jaccard index of active tokens
    coactive: list[tuple[int, float]]
    # Samples that a unit of the feature adds to a patch, by the pretrain head
    waveform: Float[np.ndarray, " patch_len"] | None
    # Share of examples with each artefact hint
    artefacts: dict[str, float]


def make_context(
    dataset: Dataset,
    sae: SparseAutoencoder,
    activity: Activity,
    encoder: Encoder,
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
        base=measure_base_spectra(dataset, w, seed),
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
    channel_ratio = _channel_ratio(activity, feature)
    shares = _patient_shares(dataset, activity.by_recording[feature], n_active)
    by_position = activity.by_token[feature] / n_active
    label = context.labels.get(feature, Label())
    return FeatureCard(
        id=feature,
        density=float(activity.density[feature]),
        mean=float(activity.mean[feature]),
        max=float(activity.largest[feature]),
        channel=_top_channel(channel_ratio) if is_alive else "",
        band=band,
        patients=len(shares),
        patient_share=float(shares[0][1]) if shares else 0.0,
        artefact=float(max(artefacts.values(), default=0.0)),
        cls=float(by_position[0]) if dataset.architecture.use_cls_token else 0.0,
        label=label.label,
        note=label.note,
        suggestion=suggest_name(context.bands, channel_ratio, band) if is_alive else "",
        examples=_make_examples(context, feature),
        histogram=_histogram(activity.histogram[feature]),
        channel_ratio=channel_ratio,
        spectrum=spectrum,
        position=by_position[dataset.patch_tokens],
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


def _channel_ratio(activity: Activity, feature: int) -> Float[np.ndarray, " n_vars"]:
    """Return the mean activation on each channel over the mean on all channels."""
    by_channel = activity.by_channel[feature]
    rate = by_channel / np.maximum(activity.channel_tokens, 1)
    overall = by_channel.sum() / max(1, activity.channel_tokens.sum())
    return rate / overall if overall else np.zeros_like(rate)


def _top_channel(channel_ratio: Float[np.ndarray, " n_vars"]) -> str:
    """Return the name of the channel with the largest ratio, or "" without channel names."""
    if len(channel_ratio) != len(CHANNELS):
        return ""
    return CHANNELS[int(np.argmax(channel_ratio))]


def _histogram(counts: Int[np.ndarray, " bins"]) -> Histogram:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return Histogram(EDGES[:0], counts[:0])
    first = int(filled[0])
    stop = int(filled[-1]) + 1
    return Histogram(EDGES[first : stop + 1], counts[first:stop])


@dataclass(frozen=True)
class _Place:
    """A token chosen as an example, and the patches shown around it."""

    group: str
    sequence: int
    # Patch of the token; -1 for a CLS token
    patch: int
    activation: float
    has_montage: bool
    # First and last patch shown
    first: int
    last: int


def _choose_places(context: Context, feature: int) -> list[_Place]:
    activity = context.activity
    quantiles = context.quantiles
    n_quantiles = quantiles.token.shape[1]
    n_random = min(RANDOM_EXAMPLES, activity.random.token.shape[1])
    n_top = activity.top.token.shape[1]
    chosen = [("top", activity.top, rank) for rank in range(n_top)]
    chosen += [(f"q{rank + 1}", quantiles, rank) for rank in range(n_quantiles)]
    chosen += [("random", activity.random, rank) for rank in range(n_random)]
    a = context.dataset.architecture
    places = []
    for group, tokens, rank in chosen:
        token = int(tokens.token[feature, rank])
        if token < 0:
            continue
        patch = token - int(a.use_cls_token)
        # A CLS token is shown with its whole window, a patch with w others to either side.
        first = 0
        last = a.n_patches - 1
        if patch >= 0:
            first = max(first, patch - context.w)
            last = min(last, patch + context.w)
        place = _Place(
            group=group,
            sequence=int(tokens.sequence[feature, rank]),
            patch=patch,
            activation=float(tokens.activation[feature, rank]),
            has_montage=group == "top" and rank < MONTAGE_EXAMPLES,
            first=first,
            last=last,
        )
        places.append(place)
    return places


def _make_examples(context: Context, feature: int) -> list[Example]:
    places = _choose_places(context, feature)
    if not places:
        return []
    dataset = context.dataset
    activations = []
    for place in places:
        x = dataset.read(place.sequence, place.sequence + 1)[0, dataset.patch_tokens]
        activations.append(x[place.first : place.last + 1])
    values = context.sae.encode_features(np.concatenate(activations), [feature])
    ends = np.cumsum([len(x) for x in activations])
    strips = np.split(values[:, 0], ends[:-1])
    return [_make_example(dataset, *pair) for pair in zip(places, strips, strict=True)]


def _make_example(
    dataset: Dataset,
    place: _Place,
    strip: Float[np.ndarray, " patches"],
) -> Example:
    a = dataset.architecture
    recording = int(dataset.recording[place.sequence])
    channel = int(dataset.channel[place.sequence])
    # Samples of the window that are shown, and of the recording before it.
    begin = a.first_sample + place.first * a.stride
    last_begin = a.first_sample + place.last * a.stride
    end = min(last_begin + a.patch_len, a.seq_len)
    offset = int(dataset.window[place.sequence]) * a.seq_len
    eeg = np.asarray(window_eeg(dataset, place.sequence)[begin:end], np.float32)
    patch = None
    if place.patch >= 0:
        patch_begin = offset + a.first_sample + place.patch * a.stride
        patch = (seconds(patch_begin), seconds(patch_begin + a.patch_len))
    hints = artefact_hints(eeg[:, channel])
    return Example(
        group=place.group,
        activation=place.activation,
        recording=dataset.recordings[recording],
        patient=dataset.patients[recording],
        channel=_channel_name(dataset, recording, channel),
        start=seconds(offset + begin),
        patch=patch,
        trace=to_int8(eeg[:, channel]),
        others=to_int8(eeg[::2].T) if place.has_montage else None,
        strip=strip,
        strip_start=seconds(offset + begin),
        hints=[name for name, is_present in hints.items() if is_present],
    )


def _channel_name(dataset: Dataset, recording: int, channel: int) -> str:
    """Return the channel's name, or its column if names are unknown or may be wrong."""
    has_names = dataset.architecture.n_vars == len(CHANNELS) and not dataset.shifted[recording]
    return CHANNELS[channel] if has_names else f"column {channel + 1}"


def to_int8(eeg: Float[np.ndarray, "*n"]) -> Int8[np.ndarray, "*n"]:
    """Return EEG in SD as multiples of TRACE_STEP, clipped at 12.7 SD."""
    return np.clip(np.rint(eeg / TRACE_STEP), -127, 127).astype(np.int8)


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


def _waveform(context: Context, feature: int) -> Float[np.ndarray, " patch_len"] | None:
    """Return the samples that a unit of the feature adds to a patch, by the pretrain head.

    None if the encoder has another head. Exact after the last layer only, since layers between
    the SAE and the head are skipped.
    """
    if context.encoder.architecture.head_type != "pretrain":
        return None
    kernel = np.asarray(context.encoder.params["head"]["linears"][0]["kernel"])
    return context.directions[feature] @ kernel
