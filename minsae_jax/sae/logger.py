"""Metrics files, TensorBoard and W&B of a run in training, and the export of its members."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from minsae_jax.activations.stream import Source
from minsae_jax.files import flush
from minsae_jax.monitor import MemberLog, RunLog, Wandb, append_rows, start_csv
from minsae_jax.sae.checkpoints import Progress
from minsae_jax.sae.config import TrainPlan
from minsae_jax.sae.grid import MemberSpec
from minsae_jax.sae.kinds import Params
from minsae_jax.sae.member import save_member
from minsae_jax.sae.pareto import ParetoPoint, draw_pareto
from minsae_jax.sae.run import HELD_OUT_METRICS, RunFolder
from minsae_jax.sae.snapshot import FeatureMeasures
from minsae_jax.settings import JsonObject

# Least time between two Pareto plots, except at the end: each takes 0.1 s of CPU time.
PARETO_SECONDS = 10.0
# Least time between two writes of rows. A GPU can end 75 log intervals in a second, and each has
# rows in three files of every member.
WRITE_SECONDS = 1.0


class LogInterval(NamedTuple):
    """Values of a log interval that all members share."""

    step: int  # at its end
    tokens: int  # trained on up to its end
    new_tokens: int  # of the interval itself
    lambda_factor: float  # of the schedules, at its last step
    lr_factor: float
    speed: Mapping[str, float]  # for TensorBoard


class RunLogger:
    """Writes the metrics and results of a run. Only one process of a cluster writes."""

    def __init__(
        self, plan: TrainPlan, folder: RunFolder, members: Sequence[MemberSpec], has_held_out: bool
    ):
        self.plan = plan
        self.folder = folder
        self.members = members
        self.writes = jax.process_index() == 0
        self._held_out_names = HELD_OUT_METRICS if has_held_out else ()
        self._member_logs: dict[str, MemberLog] = {}
        self._run_log: RunLog | None = None
        self._wandb: Wandb | None = None
        self._pareto_due = time.monotonic() + PARETO_SECONDS
        self._write_due = time.monotonic()

    def open(self, progress: Progress) -> None:
        """Create the files, or drop their rows after the step of `progress`."""
        if not self.writes:
            return
        step = progress.step
        all_names = (name for member in self.members for name in member.hyper)
        hparam_columns = list(dict.fromkeys(all_names))
        for member in self.members:
            self._member_logs[member.name] = MemberLog(
                self.folder.member(member.name),
                hparams=member.hyper,
                d_sae=member.d_sae,
                step=step,
                tokens=progress.tokens,
                eval_window=self.plan.config.eval_window,
                n_intervals=self.plan.optimizer.num_steps // self.plan.config.eval_window,
                hparam_columns=hparam_columns,
                held_out=self._held_out_names,
            )
        self._run_log = RunLog(self.folder.folder, step, self._held_out_names)
        if self._held_out_names:
            columns = ("step", "tokens", "member", *HELD_OUT_METRICS)
            start_csv(self.folder.held_out_csv, columns, last=step)
        if self.plan.config.wandb:
            self._wandb = Wandb(self.folder.folder, {m.name: m.hyper for m in self.members})

    def close(self) -> None:
        """Write the remaining rows, and end the runs of W&B."""
        try:
            self._write_rows()
        finally:
            if self._wandb:
                self._wandb.close()

    def log_interval(
        self,
        interval: LogInterval,
        member: MemberSpec,
        metrics: Mapping[str, float],
        active: Int[np.ndarray, " d_sae"],
    ) -> None:
        """Add one member's row of a log interval, which `write_rows_if_due` writes.

        active: tokens of the interval with the feature active.
        """
        if not self.writes:
            return
        has_penalty = member.kind.sparsity_name == "lambda_sparsity"
        penalty_weight = member.sparsity if has_penalty else 0.0
        row = {
            "step": interval.step,
            "tokens": interval.tokens,
            **metrics,
            "lr": member.lr * interval.lr_factor,
            "lambda": penalty_weight * interval.lambda_factor,
        }
        self._member_logs[member.name].add(row, active, interval.new_tokens, interval.speed)
        if self._wandb:
            self._wandb.write(member.name, row)

    def write_rows_if_due(self) -> None:
        """Write the rows added so far if the last write was WRITE_SECONDS ago."""
        if time.monotonic() >= self._write_due:
            self._write_rows()

    def _write_rows(self) -> None:
        for log in self._member_logs.values():
            log.write()
        self._write_due = time.monotonic() + WRITE_SECONDS

    def log_divergence(self, member: MemberSpec, step: int) -> None:
        """Report that a member could not make a step and is frozen."""
        if not self.writes:
            return
        text = f"diverged at step {step}, frozen as it was before"
        self._member_logs[member.name].write_text(step, text)
        warnings.warn(
            f"{member.name} diverged at step {step} (loss or gradient is not finite) and is "
            "frozen as it was before; the other members continue",
            stacklevel=2,
        )

    def log_held_out(self, progress: Progress) -> None:
        """Write every member's metrics on held-out tokens, and a Pareto plot if it is due."""
        if not self.writes:
            return
        # Measures of features come next and can take minutes.
        self._write_rows()
        rows = []
        for name, metrics in progress.held_out.items():
            values = [metrics[metric] for metric in HELD_OUT_METRICS]
            rows.append([progress.step, progress.tokens, name, *values])
            self._member_logs[name].write_scalars("eval", progress.step, metrics)
        append_rows(self.folder.held_out_csv, rows)
        if time.monotonic() >= self._pareto_due:
            self._draw_pareto(progress)

    def log_features(self, step: int, measures: FeatureMeasures) -> None:
        """Write measures of the members' features to TensorBoard."""
        for name, metrics in measures.metrics.items():
            self._member_logs[name].write_scalars("features", step, metrics)
        if self._run_log:
            for name, image in measures.images.items():
                self._run_log.add_image(name, image, step)

    def flush(self) -> None:
        """Write everything logged so far, and flush it to the disk.

        Before a checkpoint: a resumed run appends to these files and does not write them again.
        """
        if not self._run_log:
            return
        self._write_rows()
        paths = self._run_log.files()
        for log in self._member_logs.values():
            paths += log.files()
        if self._held_out_names:
            paths.append(self.folder.held_out_csv)
        flush(paths)

    def export(self, progress: Progress, store: Source, weights: Iterator[Params]) -> None:
        """Write every member's weights, for raw activations, then sweep.csv.

        weights: of all members, for the scaled activations of training.
        """
        rows = []
        # Every process consumes `weights`, since fetching from the devices needs all of them.
        for member, params in zip(self.members, weights, strict=True):
            status = "diverged" if member.name in progress.diverged else "finished"
            if self.writes:
                # Training saw scale * x; the exported weights take x.
                raw_params = member.kind.fold_scale(params, progress.scale)
                config = self._member_config(progress, store, member, status)
                save_member(self.folder.member(member.name), raw_params, config)
            metrics = progress.metrics[member.name]
            rows.append({"member": member.name, **member.hyper, **metrics, "status": status})
        if self.writes:
            self._draw_pareto(progress)
            self.folder.finish(rows)

    def _member_config(
        self, progress: Progress, store: Source, member: MemberSpec, status: str
    ) -> JsonObject:
        """Return the content of a member's config.json."""
        config: JsonObject = {
            "format_version": 1,
            "kind": member.kind.name,
            **member.kind.settings,
            "recipe": self.plan.config.recipe,
            "d_model": store.d_model,
            "layer": store.origin.layer,
            "encoder_fingerprint": store.origin.encoder,
            "revin": store.origin.revin,
            "store": str(store.folder),
            "store_fingerprint": store.fingerprint,
            "skipped_recordings": store.origin.skipped,
            "scale": progress.scale,
            "steps": progress.step,
            "tokens": progress.tokens,
            "versions": _versions(),
            **member.hyper,
            "status": status,
        }
        if status == "diverged":
            config["diverged_at_step"] = progress.diverged[member.name]
        held_out = progress.held_out.get(member.name)
        if held_out:
            # JSON has no NaN, which a frozen member's dead fraction is.
            config["held_out"] = {
                name: value if np.isfinite(value) else None for name, value in held_out.items()
            }
        return config

    def _draw_pareto(self, progress: Progress) -> None:
        """Plot L0 against FVU, on held-out tokens if there are any: then also for TensorBoard."""
        points = []
        for member in self.members:
            metrics = progress.held_out.get(member.name) or progress.metrics[member.name]
            points.append(ParetoPoint(member.hyper, metrics["l0"], metrics["fvu"]))
        where = "on held-out tokens" if progress.held_out else "in training"
        title = f"{self.folder.folder.name} {where}, step {progress.step:,}"
        draw_pareto(self.folder.pareto_png, points, title)
        if progress.held_out and self._run_log:
            self._run_log.add_image_file("pareto", self.folder.pareto_png, progress.step)
        self._pareto_due = time.monotonic() + PARETO_SECONDS


@cache  # each member has them, and reading them takes 20 ms
def _versions() -> dict[str, str]:
    """Return the versions of the packages that made a member."""
    versions = {}
    for name in ("minsae_jax", "jax", "flax", "optax"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions
