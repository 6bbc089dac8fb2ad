"""How well single features tell labelled events in the EEG from spans without them.

`events.csv` beside the recordings has recording, event (its kind), start, stop (samples) and channels (separated by
spaces). An event's score is a feature's largest activation over the tokens that it covers on its channels. For every
event there is a span of the same length on the same channels of the same recording that touches no event of its kind.
A kind's best features are chosen by their AUC on the val patients, and scored on the test patients.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.stats import rankdata

from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.sae.member import SparseAutoencoder

EVENTS = "events.csv"
PROBED = 5  # features of a probe
Event = tuple[str, int, int, tuple[int, ...]]  # recording, start, stop, channels
TOKENS = 8192  # that are encoded at a time
Encode = Callable[[np.ndarray], np.ndarray]  # [tokens, d_model] -> [tokens, n]


@dataclass(frozen=True)
class Span:
    recording: int
    start: int  # samples
    stop: int
    channels: tuple[int, ...]
    is_event: bool


def read_events(folder: Path) -> dict[str, list[Event]]:
    """Of every kind: recording, start, stop, channels. Raises UserError where the file is no table of events."""
    events: dict[str, list[Event]] = {}
    with (folder / EVENTS).open(newline="", encoding="utf-8") as f:
        for number, row in enumerate(csv.DictReader(f), start=2):
            try:
                channels = tuple(CHANNELS.index(name.upper()) for name in row["channels"].split())
                event = (row["recording"], int(row["start"]), int(row["stop"]), channels)
                if not (0 <= event[1] < event[2] and channels):
                    raise ValueError("it covers nothing")
                events.setdefault(row["event"], []).append(event)
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise UserError(
                    f"{folder / EVENTS}, line {number}, must hold recording, event, start, stop and channels ({e})"
                ) from None
    return events


def spans_of(dataset: Dataset, events: list[Event], seed: int) -> list[Span]:
    """The events of the dataset's recordings that its windows cover, and as many spans without one."""
    numbers, rng = (
        {name: i for i, name in enumerate(dataset.recordings)},
        np.random.default_rng(seed),
    )
    spans = []
    for recording in range(len(dataset.recordings)):
        own = [event for event in events if numbers.get(event[0]) == recording]
        first, last = dataset.sequences_of(recording)
        end = (
            (int(dataset.window[last - 1]) + 1) * dataset.architecture.seq_len
            if last > first
            else 0
        )
        taken = np.zeros(end + 1, np.int64)  # taken[i]: event samples before sample i
        for _, start, stop, _ in own:
            taken[start + 1 : min(stop, end) + 1] = 1
        taken = np.cumsum(taken)
        for _, start, stop, channels in own:
            if stop > end:
                continue
            spans.append(Span(recording, start, stop, channels, True))
            free = np.flatnonzero(taken[stop - start :] == taken[: end + 1 - (stop - start)])
            if len(free):
                begin = int(rng.choice(free))
                spans.append(Span(recording, begin, begin + stop - start, channels, False))
    return spans


def _patch_tokens(dataset: Dataset) -> np.ndarray:
    """All but the CLS token."""
    return np.arange(int(dataset.architecture.use_cls_token), dataset.architecture.n_tokens)


def tokens_of(dataset: Dataset, span: Span) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Sequences and tokens whose patches a span touches on its channels; no CLS token is one."""
    a = dataset.architecture
    first, last = dataset.sequences_of(span.recording)
    sequences = np.arange(first, last)
    windows = dataset.window[first:last]
    near = (windows >= span.start // a.seq_len) & (windows <= (span.stop - 1) // a.seq_len)
    sequences = sequences[near & np.isin(dataset.channel[first:last], span.channels)]
    sequences, tokens = (
        grid.reshape(-1) for grid in np.meshgrid(sequences, _patch_tokens(dataset), indexing="ij")
    )
    begin = dataset.first_samples(sequences, tokens)
    touched = (begin < span.stop) & (begin + a.patch_len > span.start)
    return sequences[touched], tokens[touched]


def gather(dataset: Dataset, spans: list[Span]) -> tuple[list[Span], list[np.ndarray]]:
    """The spans that touch a token at all, in order of recording, and the activations [tokens, d_model] of each."""
    found, activations = [], []
    for recording in sorted({span.recording for span in spans}):
        first, last = dataset.sequences_of(recording)
        x = dataset.read(first, last)
        for span in spans:
            if span.recording == recording:
                sequences, tokens = tokens_of(dataset, span)
                if len(sequences):
                    found.append(span)
                    activations.append(x[sequences - first, tokens])
    return found, activations


def largest(activations: list[np.ndarray], encode: Encode) -> Float[np.ndarray, "spans n"]:
    """Every span's largest value of each feature."""
    scores, lengths = [], np.array([len(x) for x in activations])
    groups = np.cumsum(lengths) // TOKENS
    for group in np.unique(groups):
        some = np.flatnonzero(groups == group)
        values = encode(np.concatenate([activations[i] for i in some]))
        scores.append(np.maximum.reduceat(values, np.cumsum(lengths[some]) - lengths[some], axis=0))
    return np.concatenate(scores)


def auc(
    scores: Float[np.ndarray, "n features"], is_event: np.ndarray
) -> Float[np.ndarray, " features"]:
    """Of every column: the chance that an event's score is above that of a span without, ties counting half.

    >>> auc(np.array([[1.0], [2.0], [2.0], [3.0]]), np.array([False, False, True, True])).tolist()
    [0.875]
    """
    ranks = rankdata(scores, axis=0)
    n_events, n_others = int(is_event.sum()), int((~is_event).sum())
    return (ranks[is_event].sum(0) - n_events * (n_events + 1) / 2) / (n_events * n_others)


def probe(
    x: Float[np.ndarray, "n features"], is_event: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression on standardised scores with a small L2 penalty; gives a score for others."""
    mean, sd = x.mean(0), x.std(0) + 1e-9
    z, sign = (x - mean) / sd, np.where(is_event, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (z @ w[1:] + w[0])
        pull = -sign / (1 + np.exp(np.clip(margin, -500, 500))) / len(z)
        value = np.logaddexp(0, -margin).mean() + 5e-4 * (w[1:] ** 2).sum()
        return float(value), np.r_[pull.sum(), z.T @ pull + 1e-3 * w[1:]]

    w = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return lambda other: (other - mean) / sd @ w[1:] + w[0]


def score_kind(
    val: tuple[list[Span], list[np.ndarray]],
    test: tuple[list[Span], list[np.ndarray]],
    encode: Encode,
) -> dict[str, Any]:
    """The best column of `encode` and a probe on the best five, chosen on val, scored on test."""
    scores = [largest(activations, encode) for _, activations in (val, test)]
    is_event = [np.array([span.is_event for span in spans]) for spans, _ in (val, test)]
    chosen = np.argsort(-auc(scores[0], is_event[0]), kind="stable")[:PROBED]
    probed = probe(scores[0][:, chosen], is_event[0])(scores[1][:, chosen])
    return {
        "feature": int(chosen[0]),
        "auc": float(auc(scores[1][:, chosen[:1]], is_event[1])[0]),
        "val_auc": float(auc(scores[0][:, chosen[:1]], is_event[0])[0]),
        "best_five": [int(i) for i in chosen],
        "probe_auc": float(auc(probed[:, None], is_event[1])[0]),
    }


def both_signs(x: Float[np.ndarray, "tokens d_model"]) -> Float[np.ndarray, "tokens columns"]:
    """Raw dimensions as features."""
    return np.concatenate([x, -x], axis=1)


def principal_components(activations: list[np.ndarray]) -> Encode:
    """All components of the activations, with both signs."""
    x = np.concatenate(activations).astype(np.float64)
    mean = x.mean(0)
    _, directions = np.linalg.eigh(np.cov((x - mean).T))
    return lambda x: both_signs(
        (x - mean).astype(np.float32) @ directions[:, ::-1].astype(np.float32)
    )


def labelled_tokens(
    dataset: Dataset, events: list[Event]
) -> Bool[np.ndarray, "sequences n_patches"]:
    """Which patches an event covers for at least half, on its channels."""
    a = dataset.architecture
    found = np.zeros((len(dataset.recording), a.n_patches), bool)
    for number, name in enumerate(dataset.recordings):
        first, last = dataset.sequences_of(number)
        covered = np.zeros(
            (a.n_vars, (int(dataset.window[last - 1]) + 2) * a.seq_len + 1), np.int64
        )
        for own in (event for event in events if event[0] == name):
            covered[list(own[3]), own[1] + 1 : own[2] + 1] = 1
        before = covered.cumsum(1)  # samples covered before each sample
        sequences, tokens = np.meshgrid(
            np.arange(first, last), _patch_tokens(dataset), indexing="ij"
        )
        begin, channel = dataset.first_samples(sequences, tokens), dataset.channel[sequences]
        found[first:last] = (
            2 * (before[channel, begin + a.patch_len] - before[channel, begin]) >= a.patch_len
        )
    return found


def token_auc(
    dataset: Dataset,
    covered: Bool[np.ndarray, "sequences n_patches"],
    sae: SparseAutoencoder,
    feature: int,
) -> float | None:
    """Of one feature over all patches: those that an event covers against all others. None where there are no two
    kinds."""
    w, b = np.asarray(sae.params["W_enc"][:, feature]), float(sae.params["b_enc"][feature])
    values = np.empty(covered.shape, np.float32)
    for start, x in dataset.batches(512):
        values[start : start + len(x)] = np.maximum(x[:, _patch_tokens(dataset)] @ w + b, 0)
    if covered.all() or not covered.any():
        return None
    return float(auc(values.reshape(-1, 1), covered.reshape(-1))[0])
