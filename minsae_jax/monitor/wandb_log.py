"""Metrics in Weights & Biases, with the project and names that minSAE uses."""

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minsae_jax.errors import brief
from minsae_jax.files import regular_file


class Wandb:
    """One W&B run for each member. On any error there: warn once, stop sending, keep training.

    `folder`/wandb contains the files of W&B and an id, by which a resumed run is the same there.
    """

    def __init__(self, folder: Path, members: Mapping[str, Mapping[str, int | float | str]]):
        self._runs: dict[str, Any] = {}
        self._has_failed = False
        with self._disabled_on_error():
            # In here, since a missing package must not stop training either.
            import wandb

            run_id = _read_or_make_id(folder / "wandb" / "id")
            for i, (name, hparams) in enumerate(members.items()):
                self._runs[name] = wandb.init(
                    project="minSAE",
                    group=folder.resolve().name,
                    name=name,
                    config=dict(hparams),
                    dir=str(folder),
                    id=f"{run_id}-{i}",
                    resume="allow",
                    # One process has several runs open, one per member.
                    reinit="create_new",
                    # Otherwise each of them would capture the output of the process.
                    settings={"console": "off"},
                )

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if not self._has_failed:
                reason = f"{type(e).__name__}: {brief(e)}"
                message = f"W&B failed and is disabled ({reason}); training continues"
                warnings.warn(message, stacklevel=2)
            self._has_failed = True

    def write(self, member: str, row: Mapping[str, int | float]) -> None:
        """Send the metrics of a log interval; those of a frozen member are NaN and not sent."""
        metrics = {"avg_mse": row["mse"], "avg_l1": row["l1"], "avg_active_features": row["l0"]}
        is_finite = np.isfinite(list(metrics.values())).all()
        if is_finite and not self._has_failed:
            with self._disabled_on_error():
                self._runs[member].log(metrics, step=int(row["step"]))

    def close(self) -> None:
        """End all runs, also after an error in one of them."""
        for run in self._runs.values():
            with self._disabled_on_error():
                run.finish()


def _read_or_make_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return regular_file(path).read_text(encoding="utf-8")
