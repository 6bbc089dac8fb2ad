"""The history of a run's members, from metrics.csv and act_freqs.csv or .npy, finished or not.

While a run is being written, the last line of a file may be incomplete, and one member may have a
row more than another: incomplete lines are ignored, and all members are cut to the shortest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from minsae_jax.errors import UserError
from minsae_jax.files import regular_file
from minsae_jax.monitor import ACT_FREQS_CSV, ACT_FREQS_NPY, damaged, open_table
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
    frequencies: Path  # act_freqs.csv or act_freqs.npy

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
    d_saes = {_count_features(_frequencies_of(folder)) for folder in folders}
    config = load_run_config(run).resolved()
    # config.yaml contains no d_model, on which these members do not depend.
    groups = groups_of_sizes(config, sorted(d_saes), d_model=1)
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
            frequencies=_frequencies_of(run / "members" / name),
        )
        histories.append(history)
    return histories


def read_densities(histories: list[MemberHistory]) -> Densities:
    """Return densities at up to MAX_FRAMES evenly spaced log intervals, with the last one.

    Of large members, only some log intervals have frequencies.
    """
    written = np.arange(len(histories[0].step))
    for history in histories:
        written = np.intersect1d(written, _written_intervals(history))
    if not len(written):
        raise damaged(histories[0].frequencies, "it has no rows")
    chosen = np.linspace(0, len(written) - 1, MAX_FRAMES).round().astype(int)
    intervals = written[np.unique(chosen)]
    longest = max(int(history.tokens_per_interval.max()) for history in histories)
    # From below the density of a feature active on one token to above 1.
    first_bin = -np.ceil(np.log10(longest) / BIN_WIDTH) - 3
    edges = np.arange(first_bin, 4) * BIN_WIDTH
    percents = []
    silents = []
    for history in histories:
        density = _read_density(history, intervals)
        percents.append([_smoothed_percent(row, edges) for row in density])
        silents.append((density == 0).sum(axis=1))
    # A member whose last row is being written may have one frame less.
    frames = min(map(len, silents))
    percent = np.stack([member[:frames] for member in percents], axis=1)
    silent = np.stack([member[:frames] for member in silents], axis=1)
    return Densities(intervals[:frames], edges, percent, silent)


def _smoothed_percent(
    density: Float[np.ndarray, " d_sae"],
    edges: Float[np.ndarray, " edges"],
) -> Float[np.ndarray, " bins"]:
    counts, _ = np.histogram(np.log10(density[density > 0]), edges)
    return 100 * np.convolve(counts, SMOOTHING, "same") / len(density)


def _read_metrics(path: Path) -> Float[np.ndarray, "intervals 4"]:
    """Return the columns step, tokens, mse and l1 of a metrics.csv."""
    lines = _complete_lines(path)
    header = next(lines, None)
    if header is None:
        return np.zeros((0, len(COLUMNS)))
    names = header.split(",")
    for name in COLUMNS:
        if name not in names:
            raise damaged(path, f"it has no column {name}")
    table = _parse_rows(path, list(lines), len(names))
    rows = table[:, [names.index(name) for name in COLUMNS]]
    counters = [(0.0, 0.0), *rows[:, :2]]
    for (step, tokens), (next_step, next_tokens) in pairwise(counters):
        if not (step < next_step and tokens < next_tokens):
            raise damaged(path, "its steps or tokens do not increase")
    return rows


def _frequencies_of(folder: Path) -> Path:
    """Return the file of a member's feature frequencies."""
    table = folder / ACT_FREQS_NPY
    return table if table.exists() else folder / ACT_FREQS_CSV


def _written_intervals(history: MemberHistory) -> Int[np.ndarray, " rows"]:
    """Return the indices of the log intervals with a row; all for a CSV, which may lack the last.

    Raises UserError if rows of a .npy file are missing, or do not belong to the log intervals.
    """
    n_intervals = len(history.tokens)
    path = history.frequencies
    if path.suffix == ".csv":
        return np.arange(n_intervals)
    # The run may have continued since metrics.csv was read.
    steps = open_table(path).steps()
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
    intervals: Int[np.ndarray, " frames"],
) -> Float[np.ndarray, "written d_sae"]:
    """Return every feature's density in those log intervals whose rows are written."""
    if history.frequencies.suffix == ".csv":
        tokens, active = _read_csv_rows(history, intervals)
    else:
        tokens, active = _read_table_rows(history, intervals)
    intervals = intervals[: len(tokens)]
    limit = history.tokens_per_interval[intervals]
    is_valid = (tokens == history.tokens[intervals]) & (active.min(axis=1) >= 0)
    is_valid &= active.max(axis=1) <= limit
    if not is_valid.all():
        row = int(intervals[np.argmin(is_valid)])
        raise damaged(history.frequencies, f"row {row + 1} does not match metrics.csv")
    return active / limit[:, None]


def _read_table_rows(
    history: MemberHistory, intervals: Int[np.ndarray, " frames"]
) -> tuple[Int[np.ndarray, " frames"], Int[np.ndarray, "frames d_sae"]]:
    """Return the columns `step` and `active` of some log intervals, from act_freqs.npy."""
    table = open_table(history.frequencies)
    steps = table.steps()
    rows = np.searchsorted(steps, history.tokens[intervals])
    return steps[rows], np.stack([table.read(int(row)) for row in rows])


def _read_csv_rows(
    history: MemberHistory, intervals: Int[np.ndarray, " frames"]
) -> tuple[Float[np.ndarray, " written"], Float[np.ndarray, "written d_sae"]]:
    """Return the column `step` and the others of some log intervals, from act_freqs.csv."""
    path = history.frequencies
    lines = _complete_lines(path)
    n_features = next(lines, "").count(",")
    # Only these rows are parsed: with large d_sae the whole table does not fit into memory.
    selected = set(intervals.tolist())
    texts = []
    n_rows = 0
    for line, _ in zip(lines, history.tokens, strict=False):
        if n_rows in selected:
            texts.append(line)
        n_rows += 1
    if n_rows < max(len(history.tokens) - 1, 1):
        raise damaged(path, f"it has {n_rows} rows, metrics.csv has {len(history.tokens)}")
    table = _parse_rows(path, texts, 1 + n_features)
    return table[:, 0], table[:, 1:]


def _count_features(path: Path) -> int:
    if path.suffix == ".npy":
        return open_table(path).d_sae
    n_features = next(_complete_lines(path), "").count(",")
    if n_features == 0:
        raise damaged(path, "it has no header")
    return n_features


def _complete_lines(path: Path) -> Iterator[str]:
    """Yield the lines that end with a line break."""
    with regular_file(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.rstrip("\n")


def _parse_rows(path: Path, lines: list[str], n_columns: int) -> Float[np.ndarray, "rows columns"]:
    if not lines:
        return np.zeros((0, n_columns))
    try:
        table = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
    except (ValueError, OverflowError) as error:
        raise damaged(path, error) from error
    if table.shape != (len(lines), n_columns):
        raise damaged(path, f"expected {n_columns} columns, got {table.shape[1]}")
    return table
