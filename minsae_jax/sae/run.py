"""The folder of a run: its settings, whether it is finished, and what it gives in the end.

`runs/<name>/` holds config.yaml, checkpoints/, a folder a member in members/, and, once it is finished, sweep.csv.
"""

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minsae_jax.config import Train, UserError, load_settings, to_dict
from minsae_jax.monitor import table
from minsae_jax.sae.sweep import Member

HYPER = ("lambda_sparsity", "lr", "seed", "d_sae")
FIGURES = ("loss", "mse", "l1", "l0", "fvu", "dead_fraction")


class Run:
    """A run's folder. `settings` are resolved."""

    def __init__(self, settings: Train):
        self.folder, self.settings = Path(str(settings.run_dir)), settings

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def member(self, member: Member) -> Path:
        return self.folder / "members" / member.name

    def is_finished(self) -> bool:
        """Whether there is nothing left to do. Raises UserError where the folder is not this run's."""
        config = self.folder / "config.yaml"
        if not config.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} holds files but no run: name another folder with --run_dir")
            return False
        if self.settings.overwrite:
            return False
        now, before = _kept(self.settings), _kept(load_settings(Train, config))
        other = [f"{k} ({before[k]}, now {now[k]})" for k in now if now[k] != before[k]]
        if other:
            raise UserError(
                f"{self.folder} holds a run of other settings: {', '.join(other)}; name another --run_dir, or use "
                "--overwrite"
            )
        return (self.folder / "sweep.csv").exists()

    def begin(self) -> None:
        """Make the folder, or clear it where it is to be overwritten."""
        if self.settings.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / "config.yaml.tmp"
        aside.write_text(yaml.safe_dump({"train": _kept(self.settings)}, sort_keys=False))
        aside.rename(self.folder / "config.yaml")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Write sweep.csv, a row a member: its name, HYPER, FIGURES, status."""
        aside = self.folder / "sweep.csv.tmp"
        with aside.open("w", newline="") as f:
            writer = csv.DictWriter(f, ("member", *HYPER, *FIGURES, "status"))
            writer.writeheader()
            writer.writerows(rows)
        aside.rename(self.folder / "sweep.csv")

    def summary(self) -> str:
        """The members of a finished run, as a table for the terminal."""
        with (self.folder / "sweep.csv").open(newline="") as f:
            rows = list(csv.DictReader(f))
        formats = {"lambda_sparsity": "g", "mse": ".4g", "l0": ".1f", "fvu": ".3f", "dead_fraction": ".1%"}
        cells = [[r["member"], *(format(float(r[k]), f) for k, f in formats.items()), r["status"]] for r in rows]
        return table(["member", "λ", "MSE", "L0", "FVU", "dead", "status"], cells)


def _kept(settings: Train) -> dict[str, Any]:
    """What a run remembers of its settings; overwriting is an act, not a property."""
    return to_dict(replace(settings, overwrite=False))
