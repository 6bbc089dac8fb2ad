"""The training loop: one stream of tokens, all members: `python -m minsae_jax train`."""

import csv
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from minsae_jax.activations.shards import Store, open_store
from minsae_jax.activations.stream import files_in_order, shuffled_tokens
from minsae_jax.config import Train, UserError, load_settings, to_dict
from minsae_jax.monitor import MemberLog, progress, table
from minsae_jax.sae.checkpoints import Checkpoints
from minsae_jax.sae.model import fold_scale, load_sae, save_member
from minsae_jax.sae.sweep import Group, Member, State, Sweep, Window, make_groups, read_window

SWEEP_COLUMNS = (
    "member", "lambda_sparsity", "lr", "seed", "d_sae", "loss", "mse", "l1", "l0", "fvu", "dead_fraction", "status",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What has been checked before a run folder appears."""

    settings: Train
    store: Store
    groups: tuple[Group, ...]
    start: dict[str, np.ndarray] | None  # weights of --init, for raw activations


def train(settings: Train, encoder_fingerprint: str | None = None) -> str:
    """Train the sweep, or go on with it; returns what to tell.

    Raises UserError on settings, store or run folder that do not fit, before anything is written.
    """
    settings = settings.resolved()
    run = Path(str(settings.run_dir))
    if not settings.overwrite and _is_finished(run, settings):
        return f"the run {run} is finished already\n{_sweep_table(run)}"
    inputs = _check_inputs(settings, encoder_fingerprint)
    _begin_run(run, settings)
    with Checkpoints(run / "checkpoints", settings.max_to_keep) as checkpoints:
        _Trainer(inputs, run, checkpoints).train()
    return f"run {run}\n{_sweep_table(run)}"


def _is_finished(run: Path, settings: Train) -> bool:
    """Whether the run is there to its end. Raises UserError where the folder holds a run of other settings."""
    config = run / "config.yaml"
    if not config.exists():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"{run} holds files but no run: name another folder with --run_dir")
        return False
    now, before = to_dict(_kept(settings)), to_dict(_kept(load_settings(Train, config)))
    other = [f"{k} ({before[k]}, now {now[k]})" for k in now if now[k] != before[k]]
    if other:
        raise UserError(
            f"{run} holds a run of other settings: {', '.join(other)}; name another --run_dir, or use --overwrite"
        )
    return (run / "sweep.csv").exists()


def _kept(settings: Train) -> Train:
    """The settings that a run keeps; overwriting is an act, not a property."""
    return replace(settings, overwrite=False)


def _begin_run(run: Path, settings: Train) -> None:
    if settings.overwrite and run.exists():
        if not (run / "config.yaml").exists() and any(run.iterdir()):
            raise UserError(f"{run} holds files but no run, and is not overwritten: name another folder with --run_dir")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    aside = run / "config.yaml.tmp"
    aside.write_text(yaml.safe_dump({"train": to_dict(_kept(settings))}, sort_keys=False))
    aside.rename(run / "config.yaml")


def _check_inputs(settings: Train, encoder_fingerprint: str | None) -> Inputs:
    store = open_store(settings.store, settings.cache_layer)
    made_by = store.manifest.get("encoder")
    if encoder_fingerprint and made_by and made_by != encoder_fingerprint:
        raise UserError(
            f"the store {store.folder} is of another encoder ({made_by[:12]}…) than {settings.checkpoint_path} "
            f"({encoder_fingerprint[:12]}…): extract it again, or name its own"
        )
    groups = make_groups(settings, store.d_model)
    start = None
    if settings.init:
        sae = load_sae(settings.init)
        wrong = [g[0].d_sae for g in groups if (sae.d_model, sae.d_sae) != (store.d_model, g[0].d_sae)]
        if wrong:
            raise UserError(
                f"--init {settings.init} is of d_model {sae.d_model} and d_sae {sae.d_sae}, but the sweep wants "
                f"{store.d_model} and {wrong[0]}: see --feature_dim_factor"
            )
        start = {name: np.asarray(value) for name, value in sae.params.items()}
    if settings.number_of_arrays:
        files_in_order(store, settings.number_of_arrays)
    store.verify()
    return Inputs(settings, store, groups, start)


class _Trainer:
    """A run from its last checkpoint, or its beginning, to its end."""

    def __init__(self, inputs: Inputs, run: Path, checkpoints: Checkpoints):
        self.inputs, self.settings, self.run, self.checkpoints = inputs, inputs.settings, run, checkpoints
        self.sweep = Sweep(inputs.settings, inputs.groups, inputs.store.d_model)
        self.stream = self._stream()
        self.step, self.tokens = 0, 0
        self.figures: list[list[dict[str, float]]] = []  # of every group's members, over the last window
        latest = checkpoints.latest()
        if latest is None:
            self.scale = self._measure_scale()
            start = fold_scale(inputs.start, 1 / self.scale) if inputs.start else None
            self.state = self.sweep.init(start)
        else:
            self._restore(latest)
        self.logs = [
            [MemberLog(run / "members" / m.name, _hparams(m), m.d_sae, self.step, self.tokens) for m in group]
            for group in inputs.groups
        ]

    def _stream(self) -> Iterator[np.ndarray]:
        s = self.settings
        if s.recipe == "minsae":
            return files_in_order(self.inputs.store, s.number_of_arrays)
        return shuffled_tokens(self.inputs.store, s.batch_size, s.shuffle_seed)

    def _measure_scale(self) -> float:
        """√d_model / mean ‖x‖₂ over the stream's first scale_tokens tokens, or one epoch if that is less."""
        if self.settings.recipe == "minsae":
            return 1.0
        wanted = min(self.settings.scale_tokens or 0, self.inputs.store.rows)
        total, left, stream = 0.0, wanted, self._stream()
        while left:
            norms = np.linalg.norm(next(stream)[:left], axis=1)
            total += norms.sum(dtype=np.float64)
            left -= len(norms)
        if not np.isfinite(total) or total == 0:
            raise UserError(f"the store {self.inputs.store.folder} holds NaN, infinity or nothing but zeros")
        return float(np.float32(self.inputs.store.d_model**0.5 * wanted / total))

    def _restore(self, step: int) -> None:
        self.state, notes = self.checkpoints.restore(step, self.sweep.init())
        if notes["store"] != self.inputs.store.fingerprint:
            raise UserError(
                f"the store {self.inputs.store.folder} has changed since {self.run} began: bring the old one back, or "
                "use --overwrite"
            )
        self.step, self.tokens, self.scale = step, notes["tokens"], notes["scale"]
        self.figures = notes["figures"]
        self.stream.set_state(notes["stream"])

    def _save(self) -> None:
        notes = {
            "tokens": self.tokens,
            "scale": self.scale,
            "figures": self.figures,
            "stream": self.stream.get_state(),
            "store": self.inputs.store.fingerprint,
        }
        self.checkpoints.save(self.step, self.state, notes)

    def train(self) -> None:
        s, total = self.settings, int(self.settings.num_steps or 0)
        scale = np.float32(self.scale)
        in_flight: deque[jax.Array] = deque()
        ended: tuple[int, int, State] | None = None
        self._window_began = time.perf_counter()
        n_members = sum(map(len, self.inputs.groups))
        with progress("train", total, "steps") as bar:
            bar.start_at(self.step)
            while self.step < total:
                x = next(self.stream)
                self.state, loss = self.sweep.step(self.state, self.sweep.hyper, self.sweep.put(x), scale, tokens=len(x))
                self.step, self.tokens = self.step + 1, self.tokens + len(x)
                in_flight.append(loss)
                if len(in_flight) > 2:  # the devices always have a next step, and the host never runs far ahead
                    in_flight.popleft().block_until_ready()
                if ended is not None:  # a step late, so that the devices need not wait while it is written
                    bar.advance(0, **{"tokens/s": f"{n_members} x {self._write(ended):,.0f}"})
                    ended = None
                bar.advance(1)
                last = self.step == total
                saving = last or self.step % s.checkpoint_every == 0
                if last or self.step % s.eval_window == 0:
                    self.state, window = self.sweep.take_window(self.state)
                    ended = (self.step, self.tokens, window)
                    if saving:
                        self._write(ended)
                        ended = None
                if saving:
                    self._save()
        for log in (log for group in self.logs for log in group):
            log.close()
        self._export()

    def _write(self, ended: tuple[int, int, State]) -> float:
        """A window's row of every member. Returns tokens a second."""
        step, tokens, on_devices = ended
        windows = read_window(on_devices)
        now = time.perf_counter()
        seconds, self._window_began = now - self._window_began, now
        rate = (tokens - self.logs[0][0].tokens) / seconds
        lambda_factor, lr_factor = map(float, self.sweep.schedules(step - 1))
        self.figures = []
        for group, logs, window in zip(self.inputs.groups, self.logs, windows, strict=True):
            self.figures.append([_figures(window, i, member, self.settings) for i, member in enumerate(group)])
            for member, log, figures, active in zip(group, logs, self.figures[-1], window.active, strict=True):
                schedule = {"lr": member.lr * lr_factor, "lambda": member.lambda_sparsity * lambda_factor}
                log.write({"step": step, "tokens": tokens} | figures | schedule, active, rate)
        return rate

    def _export(self) -> None:
        """Every member's weights for raw activations, and sweep.csv, which says that the run is finished."""
        store = self.inputs.store
        common = {
            "format_version": 1,
            "kind": "relu",
            "d_model": store.d_model,
            "recipe": self.settings.recipe,
            "layer": store.manifest.get("layer"),
            "encoder_fingerprint": store.manifest.get("encoder"),
            "store": self.settings.store,
            "store_fingerprint": store.fingerprint,
            "scale": self.scale,
            "steps": self.step,
            "tokens": self.tokens,
            "versions": {name: version(name) for name in ("minsae_jax", "jax", "flax", "optax")},
        }
        rows = []
        groups = jax.device_get([g["params"] for g in self.state["groups"]])
        for group, params, all_figures in zip(self.inputs.groups, groups, self.figures, strict=True):
            for i, (member, figures) in enumerate(zip(group, all_figures, strict=True)):
                own = {name: value[i] for name, value in params.items()}
                finite = all(np.isfinite(v).all() for v in own.values()) and np.isfinite(figures["loss"])
                status = "finished" if finite else "not finite"
                rows.append({"member": member.name, **_hparams(member), **figures, "status": status})
                config = common | _hparams(member) | {"status": status}
                save_member(self.run / "members" / member.name, fold_scale(own, self.scale), config)
        aside = self.run / "sweep.csv.tmp"
        with aside.open("w", newline="") as f:
            writer = csv.DictWriter(f, SWEEP_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.checkpoints.wait()
        aside.rename(self.run / "sweep.csv")


def _hparams(member: Member) -> dict[str, Any]:
    return {k: getattr(member, k) for k in ("lambda_sparsity", "lr", "seed", "d_sae")}


def _figures(window: Window, i: int, member: Member, settings: Train) -> dict[str, float]:
    """One member's means over a window; under minsae, l1 has λ inside, as the reference logs it."""
    names = ("loss", "mse", "l1", "l0", "fvu", "dead_fraction")
    figures = {name: float(getattr(window, name)[i]) for name in names}
    if settings.recipe == "minsae":
        figures["l1"] *= member.lambda_sparsity
    return figures


def _sweep_table(run: Path) -> str:
    """The members of a finished run, for the terminal."""
    with (run / "sweep.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    columns = ["member", "λ", "MSE", "L0", "FVU", "dead", "status"]
    cells = [
        [
            r["member"],
            f"{float(r['lambda_sparsity']):g}",
            f"{float(r['mse']):.4g}",
            f"{float(r['l0']):.1f}",
            f"{float(r['fvu']):.3f}",
            f"{float(r['dead_fraction']):.1%}",
            r["status"],
        ]
        for r in rows
    ]
    return table(columns, cells)
