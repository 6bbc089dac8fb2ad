"""The history of a run's members, from metrics.csv and act_freqs.csv or .npy, finished or not.

While a run is being written, one member may have a row more than another: all members are cut to
the shortest.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.errors import UserError
from minsae_jax.monitor.csv_log import complete_lines, damaged, parse_rows
from minsae_jax.monitor.frequencies import ArrayTable, CsvTable, open_table
from minsae_jax.sae.config import load_run_config
from minsae_jax.sae.grid import groups_of_sizes
from minsae_jax.sae.hyper import Hyper, sort_key

COLUMNS = ("step", "tokens", "mse", "l1")  # of metrics.csv
MAX_FRAMES = 60  # of the densities' animation
BIN_WIDTH = 0.1  # of log10 density
# Binomial weights over 5 bins: the densities 1/n, 2/n, 3/n … leave gaps of up to three bins.
SMOOTHING = np.array([1, 4, 6, 4, 1]) / 16


@dataclass(frozen=True)
class MemberHistory:
    """Metrics of one member, one value per log interval."""

    hyper: Hyper
    step: Int[np.ndarray, " intervals"]
    # Tokens trained on up to the end of the interval
    tokens: Int[np.ndarray, " intervals"]
    mse: Float[np.ndarray, " intervals"]
    l1: Float[np.ndarray, " intervals"]
    frequencies: CsvTable | ArrayTable

    @property
    def tokens_per_interval(self) -> Int[np.ndarray, " intervals"]:
        return np.diff(self.tokens, prepend=0)


@dataclass(frozen=True)
class Densities:
    """Histograms of log10 density, the share of an interval's tokens with the feature active."""

    # Indices of the log intervals
    intervals: Int[np.ndarray, " frames"]
    edges: Float[np.ndarray, " edges"]
    # Percent of all features, smoothed over bins
    percent: Float[np.ndarray, "frames members bins"]
    # Number of features active on no token of the interval
    silent: Int[np.ndarray, "frames members"]


def read_histories(run: Path) -> list[MemberHistory]:
    """Return the history of every member, sorted by hyper-parameters and cut to the same intervals.

    There are none before the first log interval ends. Raises UserError if files are damaged or do
    not match the run's settings.
    """
    folders = sorted(path.parent for path in (run / "members").glob("*/metrics.csv"))
    metrics = {folder.name: _read_metrics(folder / "metrics.csv") for folder in folders}
    intervals = min((len(rows) for rows in metrics.values()), default=0)
    if intervals == 0:
        return []
    frequencies = {folder.name: open_table(folder) for folder in folders}
    config = load_run_config(run).resolved()
    sizes = sorted({table.d_sae for table in frequencies.values()})
    # config.yaml contains no d_model, on which these members do not depend.
    groups = groups_of_sizes(config, sizes, d_model=1)
    hypers = {member.name: member.hyper for group in groups for member in group}
    if metrics.keys() != hypers.keys():
        name = min(metrics.keys() ^ hypers.keys())
        raise UserError(f"the members of {run} do not match its config.yaml: see {name}")
    histories = []
    for name, hyper in sorted(hypers.items(), key=lambda item: sort_key(item[1])):
        step, tokens, mse, l1 = metrics[name][:intervals].T
        history = MemberHistory(
            hyper=hyper,
            step=step.astype(int),
            tokens=tokens.astype(int),
            mse=mse,
            l1=l1,
            frequencies=frequencies[name],
        )
        histories.append(history)
    return histories


def read_densities(histories: list[MemberHistory]) -> Densities:
    """Return densities at up to MAX_FRAMES evenly spaced log intervals, with the last one.

    Of large members, only some log intervals have frequencies.
    """
    written = [_written_intervals(history) for history in histories]
    common = reduce(np.intersect1d, written)
    if not len(common):
        raise damaged(histories[0].frequencies.path, "it has no rows")
    chosen = np.linspace(0, len(common) - 1, MAX_FRAMES).round().astype(int)
    intervals = common[np.unique(chosen)]
    longest = max(int(history.tokens_per_interval.max()) for history in histories)
    # From below the density of a feature active on one token to above 1.
    first_bin = -np.ceil(np.log10(longest) / BIN_WIDTH) - 3
    edges = np.arange(first_bin, 4) * BIN_WIDTH
    percents = []
    silents = []
    for history, of_member in zip(histories, written, strict=True):
        rows = np.searchsorted(of_member, intervals)
        density = _read_density(history, rows, history.tokens_per_interval[intervals])
        percents.append([_smoothed_percent(row, edges) for row in density])
        silents.append((density == 0).sum(axis=1))
    return Densities(intervals, edges, np.stack(percents, axis=1), np.stack(silents, axis=1))


def _smoothed_percent(
    density: Float[np.ndarray, " d_sae"],
    edges: Float[np.ndarray, " edges"],
) -> Float[np.ndarray, " bins"]:
    counts, _ = np.histogram(np.log10(density[density > 0]), edges)
    return 100 * np.convolve(counts, SMOOTHING, "same") / len(density)


def _read_metrics(path: Path) -> Float[np.ndarray, "intervals 4"]:
    """Return the columns step, tokens, mse and l1 of a metrics.csv."""
    lines = complete_lines(path)
    header = next(lines, None)
    if header is None:
        return np.zeros((0, len(COLUMNS)))
    names = header.split(",")
    for name in COLUMNS:
        if name not in names:
            raise damaged(path, f"it has no column {name}")
    table = parse_rows(path, list(lines), len(names))
    rows = table[:, [names.index(name) for name in COLUMNS]]
    counters = [(0.0, 0.0), *rows[:, :2]]
    for (step, tokens), (next_step, next_tokens) in pairwise(counters):
        if not (step < next_step and tokens < next_tokens):
            raise damaged(path, "its steps or tokens do not increase")
    return rows


def _written_intervals(history: MemberHistory) -> Int[np.ndarray, " rows"]:
    """Return the indices of the log intervals with a row of frequencies: every n-th from the first.

    Raises UserError if rows are missing, or do not belong to the log intervals. The last one may
    still be missing.
    """
    n_intervals = len(history.tokens)
    path = history.frequencies.path
    # The run may have continued since metrics.csv was read.
    steps = history.frequencies.steps()
    steps = steps[steps <= history.tokens[-1]]
    intervals = np.searchsorted(history.tokens, steps)
    stride = int(intervals[1]) if len(steps) > 1 else n_intervals
    is_regular = (intervals == stride * np.arange(len(steps))).all()
    if not is_regular or not (history.tokens[intervals] == steps).all():
        raise damaged(path, "its steps are not those of metrics.csv")
    if len(steps) * stride < n_intervals - 1:
        raise damaged(path, f"it has {len(steps)} rows, metrics.csv has {n_intervals}")
    return intervals


def _read_density(
    history: MemberHistory,
    rows: Int[np.ndarray, " frames"],
    n_tokens: Int[np.ndarray, " frames"],
) -> Float[np.ndarray, "frames d_sae"]:
    """Return every feature's density in some rows, whose log intervals have n_tokens tokens."""
    active = history.frequencies.read(rows.tolist())
    is_valid = (active.min(axis=1) >= 0) & (active.max(axis=1) <= n_tokens)
    if not is_valid.all():
        row = int(rows[np.argmin(is_valid)])
        raise damaged(history.frequencies.path, f"row {row + 1} does not match metrics.csv")
    return active / n_tokens[:, None]
