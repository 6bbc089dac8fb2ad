"""How well single features separate labelled EEG events from spans without an event.

`events.csv` (see minsae_jax/eeg/events.py) is in the folder of the recordings. The score of an
event is the largest activation of a feature over the tokens of its channels that it touches. Each
event is compared with a random span of the same length, on the same channels of the same recording,
that touches no event of its kind. The best features for a kind are chosen by their AUC on the val
patients, and scored on the test patients.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.stats import rankdata

from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.events import EVENTS, split_channels
from minsae_jax.eeg.montage import canonical
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.sae.member import SparseAutoencoder

PROBE_FEATURES = 5
BATCH_TOKENS = 8192  # encoded at a time
BATCH_SEQUENCES = 512
Encode = Callable[[np.ndarray], np.ndarray]  # [tokens, d_model] -> [tokens, n]


@dataclass(frozen=True)
class LabelledEvent:
    """One line of events.csv without its kind; start and stop in samples of the recording."""

    recording: str
    start: int
    stop: int
    # Columns of the recording
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of a recording, with an event or without one."""

    recording: int
    # First sample of the recording, and the one after the last
    start: int
    stop: int
    channels: tuple[int, ...]
    is_event: bool


@dataclass(frozen=True)
class SpanActivations:
    """Spans, and for each the activations of the tokens that it touches."""

    spans: list[Span]
    # [tokens, d_model] of each span
    activations: list[np.ndarray]

    @property
    def is_event(self) -> Bool[np.ndarray, " spans"]:
        return np.array([span.is_event for span in self.spans], bool)

    @property
    def has_both(self) -> bool:
        """Whether there are spans with and without an event."""
        return len({span.is_event for span in self.spans}) == 2


@dataclass(frozen=True)
class EventScore:
    """How well the features of one SAE separate one kind of events; AUCs on test unless said."""

    # The feature with the largest AUC on val
    feature: int
    auc: float
    val_auc: float
    # The features of the probe: the five with the largest AUC on val
    best_five: tuple[int, ...]
    probe_auc: float
    # AUC of `feature` over single tokens
    token_auc: float | None = None


def read_events(folder: Path) -> dict[str, list[LabelledEvent]]:
    """Return the events of every kind. Raises UserError if events.csv is invalid."""
    names = [canonical(name) for name in read_description(folder).channels]
    events: dict[str, list[LabelledEvent]] = {}
    path = folder / EVENTS
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                in_cell = split_channels(row["channels"])
                channels = tuple(names.index(canonical(name)) for name in in_cell)
                event = LabelledEvent(
                    row["recording"], int(row["start"]), int(row["stop"]), channels
                )
                if not (0 <= event.start < event.stop and channels):
                    raise ValueError("the event is empty")
                events.setdefault(row["event"], []).append(event)
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise UserError(
                    f"{path}, line {number}: expected recording, event, start, stop and channels "
                    f"({e})"
                ) from None
    return events


def draw_spans(dataset: Dataset, events: list[LabelledEvent], seed: int) -> list[Span]:
    """Return the events inside the dataset's windows, each followed by a span without an event.

    An event without any free place of its length in the recording has no such span.
    """
    rng = np.random.default_rng(seed)
    spans = []
    for recording, name in enumerate(dataset.recordings):
        in_recording = [event for event in events if event.recording == name]
        end = _windows_end(dataset, recording)
        # is_taken[i + 1] says whether sample i is part of an event, so that its cumulative sum
        # counts the event samples before each sample. A span is free if it does not grow in it.
        is_taken = np.zeros(end + 1, np.int64)
        for event in in_recording:
            is_taken[event.start + 1 : min(event.stop, end) + 1] = 1
        n_taken = np.cumsum(is_taken)
        for event in in_recording:
            if event.stop > end:
                continue
            span = Span(recording, event.start, event.stop, event.channels, is_event=True)
            spans.append(span)
            length = event.stop - event.start
            n_before_start = n_taken[: end + 1 - length]
            n_before_stop = n_taken[length:]
            free_starts = np.flatnonzero(n_before_start == n_before_stop)
            if len(free_starts):
                start = int(rng.choice(free_starts))
                spans.append(replace(span, start=start, stop=start + length, is_event=False))
    return spans


def _windows_end(dataset: Dataset, recording: int) -> int:
    """Return the sample after the last window of a recording."""
    first, last = dataset.sequences_of(recording)
    if first == last:
        return 0
    return (int(dataset.window[last - 1]) + 1) * dataset.seq_len


def tokens_of(dataset: Dataset, span: Span) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return sequence and position of the tokens whose samples a span touches on its channels.

    Tokens over all channels are among them; a CLS token never is.
    """
    first, last = dataset.sequences_of(span.recording)
    windows = dataset.window[first:last]
    first_window = span.start // dataset.seq_len
    last_window = (span.stop - 1) // dataset.seq_len
    is_near = (windows >= first_window) & (windows <= last_window)
    is_near &= np.isin(dataset.channel[first:last], [*span.channels, -1])
    near = np.arange(first, last)[is_near]
    grid = np.meshgrid(near, dataset.tokens.located, indexing="ij")
    sequences = grid[0].reshape(-1)
    tokens = grid[1].reshape(-1)
    begin = dataset.first_samples(sequences, tokens)
    is_touched = (begin < span.stop) & (begin + dataset.lengths(tokens) > span.start)
    is_touched &= np.isin(dataset.channels_of(sequences, tokens), [*span.channels, -1])
    return sequences[is_touched], tokens[is_touched]


def gather(dataset: Dataset, spans: list[Span]) -> SpanActivations:
    """Return the spans that touch at least one token, by recording, with their activations."""
    gathered = SpanActivations([], [])
    for recording in sorted({span.recording for span in spans}):
        first, last = dataset.sequences_of(recording)
        x = dataset.read(first, last)
        for span in spans:
            if span.recording != recording:
                continue
            sequences, tokens = tokens_of(dataset, span)
            if len(sequences):
                gathered.spans.append(span)
                gathered.activations.append(x[sequences - first, tokens])
    return gathered


def max_per_span(
    activations: list[np.ndarray],
    encode: Encode,
) -> Float[np.ndarray, "spans n"]:
    """Return the largest value of each feature over the tokens of every span."""
    # Spans are encoded in groups of about BATCH_TOKENS tokens. reduceat takes the maximum from each
    # span's first row to that of the next.
    lengths = np.array([len(x) for x in activations])
    groups = np.cumsum(lengths) // BATCH_TOKENS
    scores = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        values = encode(np.concatenate([activations[i] for i in members]))
        starts = np.cumsum(lengths[members]) - lengths[members]
        scores.append(np.maximum.reduceat(values, starts, axis=0))
    return np.concatenate(scores)


def auc(
    scores: Float[np.ndarray, "n features"],
    is_event: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, " features"]:
    """Return each column's area under the ROC curve.

    It is the probability that an event scores higher than a span without one, where ties count
    half; computed from ranks as the Mann-Whitney U.

    >>> auc(np.array([[1.0], [2.0], [2.0], [3.0]]), np.array([False, False, True, True])).tolist()
    [0.875]
    """
    # U is the number of pairs (event, other) in which the event scores higher. An event of rank r
    # is above r - 1 scores; summed over events, n (n - 1) / 2 of these are other events.
    ranks = rankdata(scores, axis=0)
    n_events = int(is_event.sum())
    n_others = len(is_event) - n_events
    u = ranks[is_event].sum(axis=0) - n_events * (n_events + 1) / 2
    return u / (n_events * n_others)


def fit_probe(
    x: Float[np.ndarray, "n features"],
    is_event: Bool[np.ndarray, " n"],
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a logistic regression on standardised scores; return the function from scores to logits.

    Minimises mean_i log(1 + exp(-margin_i)) + 5e-4 ‖w‖², where margin_i = ±(w·z_i + bias) is
    positive if i is classified correctly. The bias is not penalised.
    """
    mean = x.mean(axis=0)
    sd = x.std(axis=0) + 1e-9
    z = (x - mean) / sd
    sign = np.where(is_event, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        bias = parameters[0]
        w = parameters[1:]
        margin = sign * (z @ w + bias)
        value = np.logaddexp(0, -margin).mean() + 5e-4 * (w**2).sum()
        # d/dm log(1 + exp(-m)) = -1 / (1 + exp(m)); the clip avoids an overflow.
        d_margin = -1 / (1 + np.exp(np.clip(margin, -500, 500)))
        d_logit = sign * d_margin / len(z)
        d_w = z.T @ d_logit + 1e-3 * w
        return float(value), np.concatenate([[d_logit.sum()], d_w])

    fit = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return lambda scores: (scores - mean) / sd @ fit[1:] + fit[0]


def score_kind(val: SpanActivations, test: SpanActivations, encode: Encode) -> EventScore:
    """Score the columns of `encode` on one kind of events: chosen on val, measured on test."""
    val_scores = max_per_span(val.activations, encode)
    test_scores = max_per_span(test.activations, encode)
    val_auc = auc(val_scores, val.is_event)
    best = np.argsort(-val_auc, kind="stable")[:PROBE_FEATURES]
    probe = fit_probe(val_scores[:, best], val.is_event)
    probe_scores = probe(test_scores[:, best])
    return EventScore(
        feature=int(best[0]),
        auc=float(auc(test_scores[:, best[:1]], test.is_event)[0]),
        val_auc=float(val_auc[best[0]]),
        best_five=tuple(int(i) for i in best),
        probe_auc=float(auc(probe_scores[:, None], test.is_event)[0]),
    )


def both_signs(x: Float[np.ndarray, "tokens d_model"]) -> Float[np.ndarray, "tokens columns"]:
    """Return raw dimensions and their negatives as features, [x, -x]."""
    return np.concatenate([x, -x], axis=1)


def principal_components(activations: list[np.ndarray]) -> Encode:
    """Return the function from activations to all their principal components, with both signs."""
    x = np.concatenate(activations).astype(np.float64)
    mean = x.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov((x - mean).T))
    largest_first = directions[:, ::-1].astype(np.float32)
    return lambda x: both_signs((x - mean).astype(np.float32) @ largest_first)


def covered_tokens(
    dataset: Dataset, events: list[LabelledEvent]
) -> Bool[np.ndarray, "sequences n_located"]:
    """Return which tokens have at least half of their samples in an event on their channel.

    Tokens without samples are left out. A token over all channels may be in an event on any.
    """
    located = dataset.tokens.located
    is_covered = np.zeros((len(dataset.recording), len(located)), bool)
    for recording, name in enumerate(dataset.recordings):
        first, last = dataset.sequences_of(recording)
        # The last patch of a window may end after it: one more window of room.
        n_samples = _windows_end(dataset, recording) + dataset.seq_len
        # The last row is of any channel, so that -1 is its index.
        is_event = np.zeros((dataset.n_vars + 1, n_samples + 1), np.int64)
        for event in events:
            if event.recording == name:
                samples = slice(event.start + 1, event.stop + 1)
                is_event[[*event.channels, -1], samples] = 1
        n_before = is_event.cumsum(axis=1)  # event samples before each sample
        sequences, tokens = np.meshgrid(np.arange(first, last), located, indexing="ij")
        begin = dataset.first_samples(sequences, tokens)
        length = dataset.lengths(tokens)
        channel = dataset.channels_of(sequences, tokens)
        n_inside = n_before[channel, begin + length] - n_before[channel, begin]
        is_covered[first:last] = 2 * n_inside >= length
    return is_covered


def token_auc(
    dataset: Dataset,
    is_covered: Sequence[Bool[np.ndarray, "sequences n_located"]],
    sae: SparseAutoencoder,
    features: Sequence[int],
) -> list[float | None]:
    """Return for each feature its AUC over all tokens with samples: covered by an event or not.

    is_covered: by the events of each feature. None if all tokens are covered, or no token is. The
    features are computed in one pass, since some kinds must compute all of them for any.
    """
    if not features:
        return []
    values = np.empty((len(features), *is_covered[0].shape), np.float32)
    for start, x in dataset.batches(BATCH_SEQUENCES):
        batch = sae.encode_features(x[:, dataset.tokens.located], features)
        values[:, start : start + len(x)] = np.moveaxis(batch, -1, 0)
    aucs: list[float | None] = []
    for covered, of_feature in zip(is_covered, values, strict=True):
        if covered.all() or not covered.any():
            aucs.append(None)
        else:
            aucs.append(float(auc(of_feature.reshape(-1, 1), covered.reshape(-1))[0]))
    return aucs
