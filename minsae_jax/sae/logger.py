"""What a run tells while it goes on and when it ends: every member's files, measures on held-out tokens, the table."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from minsae_jax.monitor import Csv, MemberLog, RunLog, Wandb, open_csv
from minsae_jax.sae.data import Inputs
from minsae_jax.sae.measures import Measures
from minsae_jax.sae.member import Params, fold_scale, save_member
from minsae_jax.sae.plots import ParetoPoint, draw_pareto
from minsae_jax.sae.run import FIGURES, HELD_OUT, HYPER, Run
from minsae_jax.sae.sweep import Member, Window

Figures = dict[str, float]


class Journal:
    """A run's notes. figures, measured and diverged go into checkpoints. In a cluster one process alone writes."""

    def __init__(self, inputs: Inputs, run: Run, writes: bool):
        self.settings, self.store, self.groups = inputs.settings, inputs.store, inputs.groups
        self.run, self.writes = run, writes
        self.members = [member for group in self.groups for member in group]
        self.figures: dict[str, Figures] = {}  # of every member in the last window
        self.measured: dict[str, Figures] = {}  # HELD_OUT of every member when it was last measured
        self.diverged: dict[
            str, int
        ] = {}  # members that were frozen, and the step that they could not make
        self._logs: dict[str, MemberLog] = {}
        self._run_log: RunLog | None = None
        self._wandb: Wandb | None = None
        self._held_out: Csv | None = None
        self._measures = HELD_OUT if inputs.held_out else ()

    @contextmanager
    def opened(self, step: int, tokens: int) -> Iterator[None]:
        """To be written from a step on: what was written beyond it is forgotten."""
        if not self.writes:
            yield
            return
        with ExitStack() as stack:
            for m in self.members:
                log = MemberLog(self.run.member(m), hyper(m), m.d_sae, step, tokens, self._measures)
                self._logs[m.name] = stack.enter_context(log)
            self._run_log = stack.enter_context(
                closing(RunLog(self.run.folder, step, self._measures))
            )
            if self._measures:
                held_out = open_csv(
                    self.run.held_out, ("step", "tokens", "member", *HELD_OUT), last=step
                )
                self._held_out = stack.enter_context(closing(held_out))
            if self.settings.wandb:
                wandb = Wandb(self.run.folder, {m.name: hyper(m) for m in self.members})
                self._wandb = stack.enter_context(closing(wandb))
            yield

    def window(self, step: int, tokens: int, windows: list[Window], schedules: tuple[float, float],
               speed: Mapping[str, float]) -> None:  # fmt: skip
        """Every member's row of a window; of a shorter one at the end only `figures`."""
        lambda_factor, lr_factor = schedules
        for group, window in zip(self.groups, windows, strict=True):
            for i, member in enumerate(group):
                figures = self.figures[member.name] = self._figures(window, i, member)
                if window.frozen[i] and member.name not in self.diverged:
                    self._tell_of_divergence(member, int(window.steps[i]) + 1)
                if self.writes and step % self.settings.eval_window == 0:
                    schedule = {
                        "lr": member.lr * lr_factor,
                        "lambda": member.lambda_sparsity * lambda_factor,
                    }
                    row = {"step": step, "tokens": tokens} | figures | schedule
                    self._logs[member.name].write(row, window.active[i], speed)
                    if self._wandb:
                        self._wandb.write(member.name, row)

    def _figures(self, window: Window, i: int, member: Member) -> Figures:
        """One member's means over a window; under minsae l1 has λ inside, as the reference logs it."""
        figures = {name: float(getattr(window, name)[i]) for name in FIGURES}
        if self.settings.recipe == "minsae":
            figures["l1"] *= member.lambda_sparsity
        return figures

    def _tell_of_divergence(self, member: Member, step: int) -> None:
        self.diverged[member.name] = step
        if not self.writes:
            return
        self._logs[member.name].note(step, f"diverged at step {step}, and frozen as it was before")
        warnings.warn(
            f"{member.name} diverged at step {step} (loss or gradient is not finite) and is frozen as it was before; "
            "the others go on",
            stacklevel=2,
        )

    def held_out(self, step: int, tokens: int, groups: list[Measures], dead: list[Any]) -> None:
        """Every member's measures on held-out tokens; `dead` are each group's dead fractions."""
        for group, measures, dead_fractions in zip(self.groups, groups, dead, strict=True):
            for i, member in enumerate(group):
                own = {n: float(getattr(measures, n)[i]) for n in HELD_OUT if n != "dead_fraction"}
                self.measured[member.name] = own | {"dead_fraction": float(dead_fractions[i])}
        if not self._held_out or not self._run_log:
            return
        for name, own in self.measured.items():
            self._held_out.writerow([step, tokens, name, *(own[measure] for measure in HELD_OUT)])
            self._logs[name].measured(step, own)
        self._held_out.flush()
        self.draw(step)
        self._run_log.show("pareto", self.run.pareto, step)

    def draw(self, step: int) -> None:
        """Write pareto.png: FVU over L0 of all members."""
        points = []
        for member in self.members:
            figures = self.measured.get(member.name) or self.figures[member.name]
            points.append(ParetoPoint(hyper(member), figures["l0"], figures["fvu"]))
        where = "on held-out tokens" if self.measured else "in training"
        draw_pareto(self.run.pareto, points, f"{self.run.folder.name} {where}, step {step:,}")

    def export(self, step: int, tokens: int, scale: float, weights: Iterator[Params]) -> None:
        """Every member's weights, for raw activations, and the sweep's table, which marks the run as finished."""
        about = {
            "format_version": 1,
            "kind": "relu",
            "recipe": self.settings.recipe,
            "d_model": self.store.d_model,
            "layer": self.store.manifest.get("layer"),
            "encoder_fingerprint": self.store.manifest.get("encoder"),
            "store": str(self.store.folder),
            "store_fingerprint": self.store.fingerprint,
            "skipped_recordings": self.store.manifest.get("skipped", {}),
            "scale": scale,
            "steps": step,
            "tokens": tokens,
            "versions": {name: version(name) for name in ("minsae_jax", "jax", "flax", "optax")},
        }
        rows = []
        for member, params in zip(self.members, weights, strict=True):
            diverged = self.diverged.get(member.name)
            status = {"status": "diverged" if diverged else "finished"}
            since = {"diverged_at_step": diverged} if diverged else {}
            own = {
                name: value if np.isfinite(value) else None
                for name, value in self.measured.get(member.name, {}).items()
            }
            measured = {"held_out": own} if own else {}
            if self.writes:
                config = about | hyper(member) | status | since | measured
                save_member(self.run.member(member), fold_scale(params, scale), config)
            rows.append(
                {"member": member.name} | hyper(member) | self.figures[member.name] | status
            )
        if self.writes:
            self.draw(step)
            self.run.finish(rows)


def hyper(member: Member) -> dict[str, Any]:
    """What tells members apart."""
    return {name: asdict(member)[name] for name in HYPER}
