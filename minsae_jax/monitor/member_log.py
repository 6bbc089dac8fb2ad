"""Metrics of one member: metrics.csv, feature frequencies and TensorBoard events."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from minsae_jax.files import make_folder
from minsae_jax.monitor.csv_log import append_rows, start_csv
from minsae_jax.monitor.frequencies import open_frequencies
from minsae_jax.monitor.tensorboard import COMPARED, Board, write_hparams

METRICS = ("step", "tokens", "loss", "mse", "l1", "l0", "dead_fraction", "lr", "lambda")


class MemberLog:
    """Metrics of one member, a row for each log interval.

    Rows and events are added by `add` and written by `write`. On resume at `step` and `tokens`,
    those after that checkpoint are dropped.
    eval_window: steps of a log interval; n_intervals: log intervals of the whole run.
    hparam_columns: names of the hyper-parameters of all members. held_out: names of the metrics on
    held-out tokens, group "eval".
    """

    def __init__(
        self,
        folder: Path,
        hparams: Mapping[str, int | float | str],
        d_sae: int,
        step: int,
        tokens: int,
        eval_window: int,
        n_intervals: int,
        hparam_columns: Sequence[str],
        held_out: Sequence[str],
    ):
        self.folder = folder
        make_folder(folder)
        self.eval_window = eval_window
        self._metrics_csv = folder / "metrics.csv"
        start_csv(self._metrics_csv, METRICS, last=step)
        self._rows: list[list[int | float]] = []  # added, not written
        self._frequencies = open_frequencies(folder, d_sae, n_intervals, tokens)
        self._board = Board(folder, step)
        if not step:
            # With the run's name, since TensorBoard averages members of one name over runs.
            name = f"{folder.resolve().parent.parent.name}/{folder.name}"
            tags = [f"train/{metric}" for metric in COMPARED]
            tags += [f"eval/{metric}" for metric in held_out]
            write_hparams(self._board, name, hparams, hparam_columns, tags)
            self._board.flush()

    def add(
        self,
        row: Mapping[str, int | float],
        active: Int[np.ndarray, " d_sae"],
        n_tokens: int,
        speed: Mapping[str, float],
    ) -> None:
        """Add the metrics of a log interval.

        row: a value for each of METRICS. active: number of the interval's n_tokens tokens on which
        each feature was active. speed: shown in TensorBoard only.
        """
        self._rows.append([row[name] for name in METRICS])
        step = int(row["step"])
        self._frequencies.add(step // self.eval_window - 1, int(row["tokens"]), active)
        train = {name: row[name] for name in METRICS[2:]}
        self._add_scalars({"train": train, "speed": speed}, step)
        # Without silent features, whose logarithm is infinite.
        densities = active[active > 0] / n_tokens
        if len(densities):
            self._board.add_histogram("train_density/log10", np.log10(densities), step)

    def write(self) -> None:
        """Write the rows and events added since the last write; after an error they are lost."""
        rows = self._rows
        self._rows = []
        # First: a reader of metrics.csv must find the frequencies of its rows, after errors too.
        self._frequencies.write()
        append_rows(self._metrics_csv, rows)
        self._board.flush()

    def write_scalars(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics to TensorBoard only, with the names group/name."""
        self._add_scalars({group: metrics}, step)
        self._board.flush()

    def write_text(self, step: int, text: str) -> None:
        """Write to TensorBoard's Text tab."""
        self._board.add_text("status", text, step)
        self._board.flush()

    def files(self) -> list[Path]:
        """Return the paths of the files that this log writes, and their folder."""
        return [self._metrics_csv, self._frequencies.path, self._board.path, self.folder]

    def _add_scalars(self, groups: Mapping[str, Mapping[str, int | float]], step: int) -> None:
        values = {
            f"{group}/{name}": value
            for group, metrics in groups.items()
            for name, value in metrics.items()
            # Metrics of a frozen member are NaN, which TensorBoard cannot draw.
            if np.isfinite(value)
        }
        self._board.add_scalars(values, step)
