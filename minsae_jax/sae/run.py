"""The folder of a run: `RunFolder` for training, `Run` for reading its results.

`runs/<name>/` contains config.yaml, checkpoints/, one folder for each member in members/,
TensorBoard events, eval.csv if there are held-out tokens, pareto.png, and, once the run is
finished, sweep.csv; plots/, report/ and wandb/ on request.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minsae_jax.checksums import SUMS, files_below, write_checksums
from minsae_jax.errors import UserError
from minsae_jax.files import (
    atomic_write,
    empty_folder,
    foreign_entries,
    make_folder,
    regular_file,
    sha256_of,
)
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import TFEVENTS_PREFIX, table, wrap
from minsae_jax.sae.config import TrainConfig, TrainPlan, load_run_config
from minsae_jax.sae.hyper import INTEGERS, SYMBOLS, Hyper
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import SparseAutoencoder, load_sae
from minsae_jax.settings import JsonObject, Values, to_dict

SWEEP_CSV = "sweep.csv"
EVAL_CSV = "eval.csv"
_FILES = (
    "config.yaml",
    SWEEP_CSV,
    EVAL_CSV,
    "pareto.png",
    "evaluation.json",
    "evaluation.csv",
    "evaluation.png",
    SUMS,
)
# A report that was interrupted can leave .report.tmp or .report.old, see `replaced_folder`.
_FOLDERS = (
    "checkpoints",
    "members",
    "plots",
    "evaluation",
    "steering",
    "report",
    ".report.tmp",
    ".report.old",
    "wandb",
)
# Lock files of plots/ and report/, where the file system has no locks, see `lock_folder`.
_LOCKS = (".plots.lock", ".report.tmp.lock")
# Names, and patterns of names, that a run may have in its folder.
RUN_ENTRIES = (
    *_FILES,
    *(f"{name}.tmp" for name in _FILES),
    *_FOLDERS,
    *_LOCKS,
    f"{TFEVENTS_PREFIX}*",
)
# Settings that do not change the result, and so may differ when a run resumes.
_CHANGEABLE = (
    "run_dir",
    "mesh",
    "resident",
    "distributed",
    "checkpoint_every",
    "checkpoint_minutes",
    "max_to_keep",
    "events_path",
    "wandb",
)
_PATHS = ("store", "val_store", "checkpoint_path", "config_path", "init", "root_path")

TRAIN_METRICS = ("loss", "mse", "l1", "l0", "fvu", "dead_fraction")
HELD_OUT_METRICS = (
    "fvu",
    "explained_variance",
    "l0",
    "l1",
    "dead_fraction",
    "dense_fraction",
    "cosine",
    "norm_ratio",
)
Metrics = dict[str, float]  # metric name -> value
L0_TOLERANCE = 0.1  # share of k or target L0 by which L0 may differ without a warning


class RunFolder:
    """The folder of a run in training."""

    def __init__(self, plan: TrainPlan):
        self.folder = plan.run_dir
        self.config = plan.config
        self.settings = saved_settings(plan.config)
        self.checkpoints = self.folder / "checkpoints"
        self.held_out_csv = self.folder / EVAL_CSV
        self.pareto_png = self.folder / "pareto.png"

    def member(self, name: str) -> Path:
        return self.folder / "members" / name

    def check(self) -> None:
        """Raise UserError if the folder contains other files, or a run with other settings."""
        has_config = (self.folder / "config.yaml").exists()
        foreign = foreign_entries(self.folder, RUN_ENTRIES)
        # Other files do not disturb a run that resumes, but --overwrite would delete them.
        if foreign and (self.config.overwrite or not has_config):
            raise UserError(
                f"{self.folder} contains {foreign[0]}, which is not part of a run; "
                "choose another --run_dir"
            )
        if self.config.overwrite:
            init = self.config.init
            if init is not None and Path(init).resolve().is_relative_to(self.folder.resolve()):
                raise UserError(
                    f"--init {init} is in the run that --overwrite would delete; choose another "
                    "--run_dir"
                )
        elif has_config:
            self._refuse_other_settings()
        elif self.checkpoints.exists():
            raise UserError(
                f"{self.folder} contains checkpoints but no config.yaml; use --overwrite to start "
                "anew"
            )

    def is_finished(self) -> bool:
        """Return whether nothing is left to do."""
        return not self.config.overwrite and (self.folder / SWEEP_CSV).exists()

    def _refuse_other_settings(self) -> None:
        # Resolved again for settings that did not exist when the run was started.
        before = saved_settings(load_run_config(self.folder).resolved())
        changes = {}
        for name, now in self.settings.items():
            if _differs(name, before[name], now):
                changes[name] = f"{name} ({before[name]}, now {now})"
        if changes:
            advice = "choose another --run_dir, or use --overwrite"
            if "num_steps" in changes and self.is_finished():
                # Not resumed, since the schedules of lr and λ depend on num_steps.
                member = self.member("MEMBER")
                advice += f"; to train a member longer, start another run with --init {member}"
            raise UserError(
                f"{self.folder} contains a run with other settings: {', '.join(changes.values())}; "
                f"{advice}"
            )

    def is_new(self) -> bool:
        """Return whether there is no checkpoint to resume from."""
        if self.config.overwrite or not self.checkpoints.is_dir():
            return True
        # A checkpoint that was interrupted has a suffix to its number.
        return not any(path.name.isdecimal() for path in self.checkpoints.iterdir())

    @contextmanager
    def locked(self, was_new: bool) -> Iterator[None]:
        """Create the folder, or empty it with --overwrite, and lock it.

        was_new: the earlier result of `is_new`. Raises UserError if another command has used the
        folder since then.
        """
        # Before --overwrite discards anything.
        content = yaml.safe_dump({"train": self.settings}, sort_keys=False)
        make_folder(self.folder)
        with lock_folder(self.folder):
            if self.is_finished() or self.is_new() != was_new:
                raise UserError(f"another command has just used {self.folder}; rerun")
            if self.config.overwrite:
                empty_folder(self.folder)
            # Also on resume, since the settings in _CHANGEABLE may be others now.
            with atomic_write(self.folder / "config.yaml") as file:
                file.write_text(content)
            yield

    def finish(self, rows: list[JsonObject]) -> None:
        """Write sweep.csv, one row for each member, which marks the run as finished."""
        used = [name for name in SYMBOLS if any(name in row for row in rows)]
        columns = ("member", *used, *TRAIN_METRICS, "status")
        with (
            atomic_write(self.folder / SWEEP_CSV) as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
            # Before sweep.csv gets its name.
            file.flush()
            write_checksums(self.folder, self._results(), {SWEEP_CSV: sha256_of(path)})

    def _results(self) -> list[str]:
        """Return the files that training does not change any more, other than sweep.csv."""
        names = [f"members/{name}" for name in files_below(self.folder / "members")]
        names += ["config.yaml", EVAL_CSV, self.pareto_png.name]
        # TensorBoard's files are still open; their records have their own checksums.
        return [n for n in names if TFEVENTS_PREFIX not in n and (self.folder / n).is_file()]


@dataclass(frozen=True)
class RunMember:
    """A member of a finished run."""

    name: str
    folder: Path
    hyper: Hyper
    metrics: Metrics  # of the last log interval
    held_out: Metrics  # of the last measurement on held-out tokens; empty if there are none
    status: str  # finished, or diverged

    def load(self) -> SparseAutoencoder:
        """Load the member's weights."""
        return load_sae(self.folder)

    def is_unsettled(self, num_steps: int) -> bool:
        """Return whether its threshold had too few steps; no if L0 on held-out tokens is near k."""
        if self.status == "diverged" or num_steps >= KINDS[str(self.hyper["kind"])].settling_steps:
            return False
        if not self.held_out:
            return True
        k = float(self.hyper["k"])
        return abs(self.held_out["l0"] - k) > L0_TOLERANCE * k

    def misses_target(self) -> bool:
        """Return whether L0 in training is far from --target_l0."""
        target = self.hyper.get("target_l0")
        if self.status == "diverged" or target is None:
            return False
        return abs(self.metrics["l0"] - float(target)) > L0_TOLERANCE * float(target)

    def read_metrics(self) -> np.ndarray:
        """Return metrics.csv as a structured array, one row for each log interval."""
        # np.genfromtxt returns an array of no dimensions for a single row.
        return np.atleast_1d(np.genfromtxt(self.folder / "metrics.csv", delimiter=",", names=True))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    members: tuple[RunMember, ...]
    num_steps: int
    was_finished: bool = False  # before `train` was called

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder}, {len(self.members)} members)"

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Every member's metrics of its last log interval."""
        return {member.name: member.metrics for member in self.members}

    def summary(self) -> str:
        """Return the members as a table for the terminal, with warnings of bad ones."""
        has_held_out = any(member.held_out for member in self.members)
        columns = ["member", "MSE", "L0", "FVU", "dead"]
        if has_held_out:
            columns += ["val L0", "val FVU"]
        rows = []
        for member in self.members:
            m = member.metrics
            row = [
                member.name,
                f"{m['mse']:.4g}",
                f"{m['l0']:.1f}",
                f"{m['fvu']:.3f}",
                f"{m['dead_fraction']:.1%}",
            ]
            if has_held_out:
                row += [f"{member.held_out['l0']:.1f}", f"{member.held_out['fvu']:.3f}"]
            rows.append([*row, member.status])
        warnings = [self._threshold_warning(), self._target_warning(), self._variance_warning()]
        paragraphs = [wrap(warning) for warning in warnings if warning is not None]
        return "\n".join([table([*columns, "status"], rows), *paragraphs])

    def _threshold_warning(self) -> str | None:
        """Return a warning if thresholds for use after training had too few steps, else None."""
        unsettled = [m for m in self.members if m.is_unsettled(self.num_steps)]
        if not unsettled:
            return None
        required = max(KINDS[str(m.hyper["kind"])].settling_steps for m in unsettled)
        return (
            f"warning: the threshold of {', '.join(m.name for m in unsettled)} is an average over "
            f"steps that has not settled, so that L0 after training can be far from k: it takes "
            f"{required} steps, and the run has {self.num_steps}"
        )

    def _target_warning(self) -> str | None:
        """Return a warning if members are far from their target L0, else None."""
        far = [m for m in self.members if m.misses_target()]
        if not far:
            return None
        values = [f"{m.name} ({m.metrics['l0']:.1f})" for m in far]
        return (
            f"warning: L0 is far from the target of {', '.join(values)}; it takes more steps, or a "
            "higher lr"
        )

    def _variance_warning(self) -> str | None:
        """Return a warning if members explain no variance of the tokens, else None."""
        metrics = {m.name: m.held_out or m.metrics for m in self.members if m.status != "diverged"}
        useless = [f"{name} ({m['fvu']:.3g})" for name, m in metrics.items() if m["fvu"] >= 1]
        if not useless:
            return None
        return (
            f"warning: FVU is 1 or more, no better than the mean of all tokens, for "
            f"{', '.join(useless)}; try more steps, a lower lr, or less sparse features"
        )


def load_run(folder: str | Path, was_finished: bool = False) -> Run:
    """Read the results of a finished run. Raises UserError if it is unfinished or damaged."""
    folder = Path(folder)
    path = folder / SWEEP_CSV
    if not path.is_file():
        raise UserError(f"{folder} is not a finished run; rerun its train command")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        held_out = read_held_out(folder)
        members = tuple(_read_member(folder, row, held_out) for row in rows)
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{SWEEP_CSV} or {EVAL_CSV} in {folder} is damaged ({e}); use --overwrite to train anew"
        ) from e
    num_steps = load_run_config(folder).resolved().num_steps
    assert num_steps is not None  # every recipe has a number
    return Run(folder, members, num_steps, was_finished)


def _read_member(folder: Path, row: dict[str, str], held_out: dict[str, Metrics]) -> RunMember:
    name = row["member"]
    return RunMember(
        name=name,
        folder=folder / "members" / name,
        hyper=_read_hyper(row),
        metrics={key: float(row[key]) for key in TRAIN_METRICS},
        held_out=held_out[name] if held_out else {},
        status=row["status"],
    )


def _read_hyper(row: dict[str, str]) -> Hyper:
    """Return the hyper-parameters in a row of sweep.csv, in which others' columns are empty."""
    # The first runs had one kind and no column for it.
    hyper: dict[str, int | float | str] = {"kind": row.get("kind", "relu")}
    for name in SYMBOLS:
        if name != "kind" and row.get(name):
            hyper[name] = int(row[name]) if name in INTEGERS else float(row[name])
    return hyper


def read_held_out(folder: Path) -> dict[str, Metrics]:
    """Return every member's last metrics on held-out tokens; empty if there are none."""
    path = folder / EVAL_CSV
    if not path.exists():
        return {}
    with regular_file(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Later rows of a member replace earlier ones.
    return {row["member"]: {name: float(row[name]) for name in HELD_OUT_METRICS} for row in rows}


def saved_settings(config: TrainConfig) -> Values:
    """Return the settings as in config.yaml, without `overwrite`, which is an action."""
    return to_dict(replace(config, overwrite=False))


def _differs(name: str, before: Any, now: Any) -> bool:
    """Return whether a setting that matters has changed; paths are compared after resolving."""
    if name in _PATHS and before and now:
        return Path(before).resolve() != Path(now).resolve()
    return name not in _CHANGEABLE and before != now
