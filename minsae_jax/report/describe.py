"""A feature as a person looks at it: its examples in the EEG, and what sets their context apart.

`describe` gives one feature as plain arrays and numbers, which the report shows; `Context` holds what all features of
an autoencoder share.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.montage import BANDS, CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import SAMPLING_RATE
from minsae_jax.encoder.converted import Encoder
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset, seconds
from minsae_jax.report.examples import EDGES, Activity, Tokens
from minsae_jax.sae.member import SparseAutoencoder

Bands = tuple[tuple[str, float, float], ...]
TRACE_STEP = 0.1  # SD a step of an int8 trace
BEYOND, FLAT, FAST = 5.0, 0.05, 25.0  # SD; SD; Hz
FAST_SHARE = 0.3  # of the power between 1 and 45 Hz
WITH_OTHERS, RANDOM_SHOWN = 8, 6  # examples with all channels; random examples
BASE_SEGMENTS, RESAMPLED = 300, 200  # segments a channel for the base rate; bootstrap samples
NEAREST = 8


@dataclass(frozen=True)
class Context:
    """What is computed once for all features; w: patches shown to either side of an example."""

    dataset: Dataset
    sae: SparseAutoencoder
    activity: Activity
    encoder: Encoder
    w: int
    bands: Bands
    hz: Float[np.ndarray, " n_hz"]  # of spectra
    base: Float[
        np.ndarray, "n_vars n_hz"
    ]  # relative power of each channel's segments, wherever they are
    cosine: Float[np.ndarray, "d_sae d_sae"] | None  # of decoder rows
    labels: dict[int, tuple[str, str]]  # label and note
    quantiles: Tokens
    seed: int = 0

    @property
    def span(self) -> int:
        """Samples of a segment whose spectrum is taken."""
        a = self.dataset.architecture
        return min(a.seq_len, 2 * self.w * a.stride + a.patch_len)


def make_context(
    dataset: Dataset, sae: SparseAutoencoder, activity: Activity, encoder: Encoder, w: int = 10, bands: Bands = BANDS,
    labels: dict[int, tuple[str, str]] | None = None,
) -> Context:  # fmt: skip
    rows = np.asarray(sae.params["W_dec"])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = rows @ rows.T if len(rows) <= 16_384 else None
    context = Context(
        dataset, sae, activity, encoder, w, bands, np.zeros(0, np.float32), np.zeros((0, 0), np.float32), cosine,
        labels or {}, activity.quantiles(),
    )  # fmt: skip
    hz = np.fft.rfftfreq(context.span, 1 / SAMPLING_RATE)
    shown = (hz >= 0.9) & (hz <= 45)
    return replace(context, hz=hz[shown], base=_base(context, shown))


def describe_all(context: Context) -> Iterator[dict[str, Any]]:
    for feature in range(context.sae.d_sae):
        yield describe(context, feature)


def describe(context: Context, feature: int) -> dict[str, Any]:
    """Everything about one feature; see report/write.py for the fields."""
    activity, dataset = context.activity, context.dataset
    is_cls = dataset.architecture.use_cls_token
    by_patient = _by_patient(dataset, activity.by_recording[feature])
    shares = sorted(
        ((name, n / max(1, activity.active[feature])) for name, n in by_patient.items() if n),
        key=_largest,
    )
    ratio = _channel_ratio(activity, feature)
    spectrum, artefacts = _spectrum(context, feature)
    band = dominant_band(context, spectrum)
    label, note = context.labels.get(feature, ("", ""))
    has_activity = bool(activity.active[feature])
    return {
        "id": feature,
        "density": float(activity.density[feature]),
        "mean": float(activity.mean[feature]),
        "max": float(activity.largest[feature]),
        "channel": CHANNELS[int(np.argmax(ratio))]
        if has_activity and len(ratio) == len(CHANNELS)
        else "",
        "band": band,
        "patients": len(shares),
        "patient_share": float(shares[0][1]) if shares else 0.0,
        "artefact": float(max(artefacts.values(), default=0.0)),
        "cls": float(activity.by_token[feature, 0] / max(1, activity.active[feature]))
        if is_cls
        else 0.0,
        "label": label,
        "note": note,
        "suggestion": suggestion(context, ratio, band) if has_activity else "",
        "examples": _examples(context, feature),
        "histogram": _histogram(activity.histogram[feature]),
        "channel_ratio": ratio,
        "spectrum": spectrum,
        "position": activity.by_token[feature, int(is_cls) :] / max(1, activity.active[feature]),
        "patient_list": shares[:12],
        "nearest": _nearest(context, feature),
        "coactive": _coactive(activity, feature),
        "waveform": _waveform(context, feature),
        "artefacts": artefacts,
    }


def _largest(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]


def _by_patient(dataset: Dataset, counts: np.ndarray) -> dict[str, int]:
    found: dict[str, int] = {}
    for patient, count in zip(dataset.patients, counts.tolist(), strict=True):
        found[patient] = found.get(patient, 0) + count
    return found


def _channel_ratio(activity: Activity, feature: int) -> Float[np.ndarray, " n_vars"]:
    """How much more active than on average the feature is on each channel."""
    rate = activity.by_channel[feature] / np.maximum(activity.channel_tokens, 1)
    overall = activity.by_channel[feature].sum() / max(1, activity.channel_tokens.sum())
    return rate / overall if overall else np.zeros_like(rate)


def _histogram(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Without the empty bins at both ends."""
    some = np.flatnonzero(counts)
    first, last = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, 0)
    return {"edges": EDGES[first : last + 1] if last else EDGES[:0], "counts": counts[first:last]}


# Examples.


def _eeg(dataset: Dataset, sequence: int) -> Float[np.ndarray, "seq_len n_vars"]:
    """The window of a sequence, all channels."""
    return dataset.window_of(int(dataset.recording[sequence]), int(dataset.window[sequence]))


def _examples(context: Context, feature: int) -> list[dict[str, Any]]:
    activity, found = context.activity, []
    for group, tokens, shown in (("top", activity.top, None), ("q", context.quantiles, None),
                                 ("random", activity.random, RANDOM_SHOWN)):  # fmt: skip
        for rank in range(tokens.token.shape[1])[:shown]:
            if tokens.token[feature, rank] >= 0:
                place = (int(tokens.sequence[feature, rank]), int(tokens.token[feature, rank]))
                with_others = group == "top" and rank < WITH_OTHERS
                name = f"q{rank + 1}" if group == "q" else group
                found.append(
                    {"group": name, "activation": float(tokens.activation[feature, rank])}
                    | _example(context, feature, *place, with_others)
                )
    return found


def _example(
    context: Context, feature: int, sequence: int, token: int, with_others: bool
) -> dict[str, Any]:
    """w patches to either side, clipped at the window's edges; of a CLS token the whole window."""
    dataset, a = context.dataset, context.dataset.architecture
    patch = token - int(a.use_cls_token)
    first, last = (max(0, patch - context.w), min(a.n_patches - 1, patch + context.w))
    if patch < 0:
        first, last = 0, a.n_patches - 1
    begin, end = a.first_sample + first * a.stride, a.first_sample + last * a.stride + a.patch_len
    channel, window = int(dataset.channel[sequence]), int(dataset.window[sequence]) * a.seq_len
    eeg = np.asarray(_eeg(dataset, sequence)[begin : min(end, a.seq_len)], np.float32)
    x = dataset.read(sequence, sequence + 1)[0, int(a.use_cls_token) :][first : last + 1]
    firing = window + a.first_sample + patch * a.stride
    recording = int(dataset.recording[sequence])
    return {
        "recording": dataset.recordings[recording],
        "patient": dataset.patients[recording],
        "channel": _name(context, recording, channel),
        "start": seconds(window + begin),
        "patch": None if patch < 0 else [seconds(firing), seconds(firing + a.patch_len)],
        "trace": as_steps(eeg[:, channel]),
        "others": as_steps(eeg[::2].T) if with_others else None,
        "strip": _one_feature(context.sae, feature, x),
        "strip_start": seconds(window + begin),
        "hints": [name for name, is_so in hints(eeg[:, channel]).items() if is_so],
    }


def _name(context: Context, recording: int, channel: int) -> str:
    """Of a channel, where the recording's columns stand for what they are called."""
    has_names = (
        context.dataset.architecture.n_vars == len(CHANNELS)
        and not context.dataset.shifted[recording]
    )
    return CHANNELS[channel] if has_names else f"column {channel + 1}"


def as_steps(eeg: Float[np.ndarray, "*n"]) -> np.ndarray:
    """EEG in SD as int8 steps of TRACE_STEP, clipped at 12.7 SD."""
    return np.clip(np.rint(eeg / TRACE_STEP), -127, 127).astype(np.int8)


def _one_feature(
    sae: SparseAutoencoder, feature: int, x: Float[np.ndarray, "n d_model"]
) -> np.ndarray:
    w, b = _encoder_column(sae, feature)
    return np.maximum(x @ w + b, 0)


def _encoder_column(sae: SparseAutoencoder, feature: int) -> tuple[np.ndarray, float]:
    return np.asarray(sae.params["W_enc"][:, feature]), float(sae.params["b_enc"][feature])


def hints(eeg: Float[np.ndarray, " time"]) -> dict[str, bool]:
    """What often is no brain activity."""
    power = np.abs(np.fft.rfft(eeg - eeg.mean())) ** 2
    hz = np.fft.rfftfreq(len(eeg), 1 / SAMPLING_RATE)
    slow, fast = power[(hz >= 1) & (hz < FAST)].sum(), power[(hz >= FAST) & (hz <= 45)].sum()
    return {
        f"beyond {BEYOND:g} SD": bool(np.abs(eeg).max() > BEYOND),
        "flat": bool(eeg.std() < FLAT),
        f"over {FAST:g} Hz": bool(fast > FAST_SHARE * (slow + fast)),
    }


# Spectra.


def _segment(context: Context, sequence: int, token: int) -> Float[np.ndarray, " span"]:
    """The samples about a token's patch, moved inwards where the window ends."""
    dataset, a = context.dataset, context.dataset.architecture
    patch = token - int(a.use_cls_token)
    centre = a.first_sample + max(0, patch) * a.stride + a.patch_len // 2
    begin = min(max(0, centre - context.span // 2), a.seq_len - context.span)
    return np.asarray(
        _eeg(dataset, sequence)[begin : begin + context.span, int(dataset.channel[sequence])],
        np.float32,
    )


def relative_power(
    segments: Float[np.ndarray, "n span"], shown: np.ndarray
) -> Float[np.ndarray, "n n_hz"]:
    """Hann-windowed periodograms, each divided by its sum over the frequencies shown."""
    x = (segments - segments.mean(1, keepdims=True)) * np.hanning(segments.shape[1])
    power = np.abs(np.fft.rfft(x, axis=1))[:, shown] ** 2
    return power / np.maximum(power.sum(1, keepdims=True), 1e-20)


def _shown(context: Context) -> np.ndarray:
    return np.isin(np.fft.rfftfreq(context.span, 1 / SAMPLING_RATE), context.hz)


def _base(context: Context, shown: np.ndarray) -> Float[np.ndarray, "n_vars n_hz"]:
    """Mean relative power of segments from anywhere, channel by channel."""
    dataset, a, rng = (
        context.dataset,
        context.dataset.architecture,
        np.random.default_rng(context.seed),
    )
    base = np.zeros((a.n_vars, int(shown.sum())), np.float64)
    for channel in range(a.n_vars):
        own = np.flatnonzero(dataset.channel == channel)
        sequences = np.sort(rng.choice(own, min(BASE_SEGMENTS, len(own)), replace=False))
        tokens = rng.integers(int(a.use_cls_token), a.n_tokens, len(sequences))
        segments = [
            _segment(context, int(s), int(t)) for s, t in zip(sequences, tokens, strict=True)
        ]
        base[channel] = relative_power(np.stack(segments), shown).mean(0)
    return base.astype(np.float32)


def _spectrum(
    context: Context, feature: int
) -> tuple[dict[str, np.ndarray] | None, dict[str, float]]:
    """Relative power of the random examples' contexts over that of the same channels anywhere, both weighted by the
    activations, with a 95 % bootstrap band over the examples; and the share of the contexts with each artefact hint."""
    tokens = context.activity.random
    some = np.flatnonzero(tokens.token[feature] >= 0)
    if len(some) < 4:
        return None, {}
    sequences, positions = tokens.sequence[feature, some], tokens.token[feature, some]
    segments = np.stack(
        [_segment(context, int(s), int(t)) for s, t in zip(sequences, positions, strict=True)]
    )
    power = relative_power(segments, _shown(context))
    base = context.base[context.dataset.channel[sequences]]
    rng, weights = np.random.default_rng([context.seed, feature]), tokens.activation[feature, some]
    drawn = rng.multinomial(len(some), np.full(len(some), 1 / len(some)), RESAMPLED) * weights
    low, high = np.quantile(
        (drawn @ power) / np.maximum(drawn @ base, 1e-12), [0.025, 0.975], axis=0
    )
    found = [hints(segment) for segment in segments]
    artefacts = {name: float(np.mean([h[name] for h in found])) for name in found[0]}
    ratio = (weights @ power) / np.maximum(weights @ base, 1e-12)
    return {"hz": context.hz, "ratio": ratio, "low": low, "high": high}, artefacts


def dominant_band(context: Context, spectrum: dict[str, np.ndarray] | None) -> str:
    """The band that stands out most from the base rate, by its mean ratio; broadband where none is 15 % up."""
    if spectrum is None:
        return ""
    hz, ratio = spectrum["hz"], spectrum["ratio"]
    within = {name: (hz >= low) & (hz < high) for name, low, high in context.bands}
    means = {name: float(ratio[some].mean()) for name, some in within.items() if some.any()}
    best = max(means, key=lambda name: means[name], default="")
    return best if best and means[best] > 1.15 else "broadband"


# Names.


def suggestion(context: Context, ratio: Float[np.ndarray, " n_vars"], band: str) -> str:
    """Where and in which band, as a first name for a feature: "posterior alpha, 8–13 Hz"."""
    limits = {name: f"{low:g}–{high:g} Hz" for name, low, high in context.bands}
    where = region(ratio) if len(ratio) == len(CHANNELS) else ""
    words = " ".join(word for word in (where, band) if word)
    return f"{words}, {limits[band]}" if band in limits else words


def region(ratio: Float[np.ndarray, "19"]) -> str:
    """Of the head, where a feature is active more often than elsewhere.

    >>> region(np.where(POSITIONS[:, 1] < -0.5, 4.0, 0.2))
    'posterior'
    """
    excess = np.maximum(ratio - 1, 0)
    if excess.max() < 0.3:
        return "widespread"
    x, y = (excess[:, None] * POSITIONS).sum(0) / excess.sum()
    side = "left " if x < -0.3 else "right " if x > 0.3 else ""
    if abs(x) > 0.6 and abs(y) < 0.5:
        return f"{side}temporal"
    return side + ("frontal" if y > 0.35 else "posterior" if y < -0.35 else "central")


def read_labels(path: Path) -> dict[int, tuple[str, str]]:
    """feature, label, note of labels.csv, where there is one. Raises UserError where it is none."""
    if not path.exists():
        return {}
    labels = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            for row in csv.DictReader(f):
                labels[int(row["feature"])] = (row["label"] or "", row.get("note") or "")
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{path} must have the columns feature, label and note, a row a feature ({e})"
        ) from None
    return labels


# Neighbours.


def _nearest(context: Context, feature: int) -> list[tuple[int, float]]:
    """Features with the most similar decoder rows."""
    if context.cosine is None:
        return []
    own = context.cosine[feature].copy()
    own[feature] = -2
    order = np.argsort(-own, kind="stable")[: min(NEAREST, len(own) - 1)]
    return [(int(i), float(own[i])) for i in order]


def _coactive(activity: Activity, feature: int) -> list[tuple[int, float]]:
    """Features that are active on the same tokens: tokens of both over tokens of either (Jaccard)."""
    if activity.together is None or not activity.together[feature, feature]:
        return []
    both, each = activity.together[feature], np.diag(activity.together)
    jaccard = both / np.maximum(each + each[feature] - both, 1)
    jaccard[feature] = -1
    order = np.argsort(-jaccard, kind="stable")[:NEAREST]
    return [(int(i), float(jaccard[i])) for i in order if jaccard[i] > 0]


def _waveform(context: Context, feature: int) -> Float[np.ndarray, " patch_len"] | None:
    """A unit of the feature through the pretrain head: exact after the last layer, a hint after others."""
    if context.encoder.architecture.head_type != "pretrain":
        return None
    kernel = np.asarray(context.encoder.params["head"]["linears"][0]["kernel"])
    return np.asarray(context.sae.params["W_dec"][feature]) @ kernel
