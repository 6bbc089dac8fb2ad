"""The folder of a run: its settings, whether it is finished, and what it gives in the end.

`runs/<name>/` holds config.yaml, checkpoints/, a folder a member in members/, TensorBoard events, eval.csv where tokens
are held out, pareto.png, and, once it is finished, sweep.csv; plots/ and wandb/ where they were asked for.
"""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minsae_jax.errors import UserError
from minsae_jax.files import atomic_write, lock_folder
from minsae_jax.monitor import EVENTS, table
from minsae_jax.sae.config import TrainConfig, load_run_config
from minsae_jax.sae.sweep import Member
from minsae_jax.settings import to_dict

FILES = (
    "config.yaml", "sweep.csv", "eval.csv", "pareto.png", "evaluation.json", "evaluation.csv", "evaluation.png",
)  # fmt: skip
FOLDERS = ("checkpoints", "members", "plots", "report", ".report.tmp", ".report.old", "wandb")
OURS = {*FILES, *(f"{name}.tmp" for name in FILES), *FOLDERS}
# Not what is trained
HOW = (
    "run_dir",
    "mesh",
    "distributed",
    "checkpoint_every",
    "checkpoint_minutes",
    "max_to_keep",
    "wandb",
)
HYPER = ("lambda_sparsity", "lr", "seed", "d_sae")
FIGURES = ("loss", "mse", "l1", "l0", "fvu", "dead_fraction")
HELD_OUT = (
    "fvu",
    "explained_variance",
    "l0",
    "l1",
    "dead_fraction",
    "dense_fraction",
    "cosine",
    "norm_ratio",
)


class Run:
    """A run's folder. `settings` are resolved."""

    def __init__(self, settings: TrainConfig):
        self.folder, self.settings = Path(str(settings.run_dir)), settings

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def held_out(self) -> Path:
        return self.folder / "eval.csv"

    @property
    def pareto(self) -> Path:
        return self.folder / "pareto.png"

    def member(self, member: Member) -> Path:
        return self.folder / "members" / member.name

    def is_finished(self) -> bool:
        """Whether there is nothing left to do. Raises UserError where the folder holds anything but this run."""
        config = self.folder / "config.yaml"
        names = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else set()
        foreign = sorted(name for name in names - OURS if not name.startswith(EVENTS))
        if foreign and (self.settings.overwrite or not config.exists()):
            raise UserError(
                f"{self.folder} holds {foreign[0]}, which is no run's: name another folder with --run_dir"
            )
        if self.settings.overwrite:
            return False
        if not config.exists():
            if self.checkpoints.exists():
                raise UserError(
                    f"{self.folder} holds checkpoints but no config.yaml: use --overwrite to start anew"
                )
            return False
        now, before = self.kept(), _kept(load_run_config(self.folder))
        other = [f"{k} ({before[k]}, now {now[k]})" for k in now if _differs(k, before[k], now[k])]
        if other:
            raise UserError(
                f"{self.folder} holds a run of other settings: {', '.join(other)}; name another --run_dir, or use "
                "--overwrite"
            )
        return (self.folder / "sweep.csv").exists()

    def kept(self) -> dict[str, Any]:
        """What is remembered of the settings."""
        return _kept(self.settings)

    def is_new(self) -> bool:
        """Whether there is nothing to go on from."""
        saved = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return self.settings.overwrite or not any(
            p.name.isdecimal() for p in saved
        )  # others were cut off

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The folder made, or cleared where it is to be overwritten, and locked."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder):
            if self.settings.overwrite:
                for path in self.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with atomic_write(self.folder / "config.yaml") as aside:
                aside.write_text(yaml.safe_dump({"train": self.kept()}, sort_keys=False))
            yield

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Write sweep.csv, a row a member: its name, HYPER, FIGURES, status."""
        with atomic_write(self.folder / "sweep.csv") as aside, aside.open("w", newline="") as f:
            writer = csv.DictWriter(f, ("member", *HYPER, *FIGURES, "status"))
            writer.writeheader()
            writer.writerows(rows)

    def read_held_out(self) -> dict[str, dict[str, float]]:
        """HELD_OUT of every member when it was last measured; empty where there was no such thing."""
        if not self.held_out.exists():
            return {}
        with self.held_out.open(newline="") as f:
            rows = list(csv.DictReader(f))
        return {row["member"]: {name: float(row[name]) for name in HELD_OUT} for row in rows}

    def summary(self) -> str:
        """The members of a finished run, as a table for the terminal."""
        formats = {
            "lambda_sparsity": "g",
            "mse": ".4g",
            "l0": ".1f",
            "fvu": ".3f",
            "dead_fraction": ".1%",
        }
        try:
            with (self.folder / "sweep.csv").open(newline="") as f:
                rows = list(csv.DictReader(f))
            cells = [
                [r["member"], *(format(float(r[k]), f) for k, f in formats.items())] for r in rows
            ]
            held_out = self.read_held_out()
            for row, line in zip(rows, cells, strict=True):
                if held_out:
                    line += [
                        format(held_out[row["member"]][name], formats[name])
                        for name in ("l0", "fvu")
                    ]
                line.append(row["status"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"sweep.csv or eval.csv in {self.folder} is damaged ({e}): use --overwrite to train anew"
            ) from e
        columns = [
            "member",
            "λ",
            "MSE",
            "L0",
            "FVU",
            "dead",
            *(["val L0", "val FVU"] if held_out else []),
            "status",
        ]
        return table(columns, cells)


def _kept(settings: TrainConfig) -> dict[str, Any]:
    """What a run remembers of its settings; overwriting is an act, not a property."""
    return to_dict(replace(settings, overwrite=False))


def _differs(name: str, before: Any, now: Any) -> bool:
    """Whether a setting that matters has changed; paths are compared for where they lead."""
    if name in ("store", "val_store", "checkpoint_path", "init", "root_path") and before and now:
        return Path(before).resolve() != Path(now).resolve()
    return name not in HOW and before != now
