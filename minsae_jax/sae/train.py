"""The training loop: one stream of tokens, all members side by side: `python -m minsae_jax train`."""

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from minsae_jax.activations.shards import open_store
from minsae_jax.activations.stream import Source, TokenStream, files_in_order, shuffled_tokens
from minsae_jax.config import Stopped, Train, UserError
from minsae_jax.monitor import MemberLog, progress
from minsae_jax.sae.checkpoints import Checkpoints
from minsae_jax.sae.model import Params, fold_scale, load_sae, save_member
from minsae_jax.sae.run import FIGURES, HYPER, Run
from minsae_jax.sae.sweep import Group, Member, State, Sweep, Window, make_groups, read_window

IN_FLIGHT = 2  # steps handed to the devices ahead of the one that is waited for


@dataclass(frozen=True)
class Inputs:
    """What is checked before a run folder appears."""

    settings: Train
    store: Source
    groups: tuple[Group, ...]
    start: Params | None  # weights of --init, for raw activations
    stream: TokenStream
    scale: float | None  # of the activations before they are trained on; None where the checkpoint has it


def train(
    settings: Train, encoder_fingerprint: str | None = None, open_live: Callable[[], Source] | None = None
) -> str:
    """Train a sweep, or go on with it; returns what to tell.

    With `encoder_fingerprint` the store must be that encoder's; with `open_live` there is none, and that gives what is
    read in its place. Raises UserError on settings, a store or a run folder
    that do not fit, before anything is written.
    """
    settings = settings.resolved()
    run = Run(settings)
    if run.is_finished():
        return f"the run {run.folder} is finished already\n{run.summary()}"
    store = open_live() if open_live else open_store(settings.store, settings.cache_layer)
    inputs = check_inputs(settings, store, encoder_fingerprint, run.is_new())
    with run.begun(), Checkpoints(run.checkpoints, settings.max_to_keep) as checkpoints:
        Trainer(inputs, run, checkpoints).train()
    return f"the run {run.folder} is finished\n{run.summary()}"


def check_inputs(settings: Train, store: Source, encoder_fingerprint: str | None, is_new: bool) -> Inputs:
    """Store, members and initial weights, all fitting one another. Raises UserError where they do not.

    A new run reads the whole store once, to hold it against its checksums.
    """
    made_by = store.manifest.get("encoder")
    if encoder_fingerprint and made_by and made_by != encoder_fingerprint:
        raise UserError(
            f"the store {store.folder} is of another encoder ({made_by[:12]}…) than {settings.checkpoint_path} "
            f"({encoder_fingerprint[:12]}…): extract it again, or name the encoder that it is of"
        )
    groups = make_groups(settings, store.d_model)
    start = load_sae(settings.init) if settings.init else None
    wanted = [(store.d_model, group[0].d_sae) for group in groups]
    if start and set(wanted) != {(start.d_model, start.d_sae)}:
        raise UserError(
            f"--init {settings.init} is of d_model {start.d_model} and d_sae {start.d_sae}, but the sweep wants "
            f"{' and '.join(f'{d_model} and {d_sae}' for d_model, d_sae in wanted)}: see --feature_dim_factor"
        )
    stream = open_stream(settings, store)
    window = settings.eval_window * _tokens_a_step(settings, store)
    if window >= 2**31:
        raise UserError(f"--eval_window {settings.eval_window} is {window:,} tokens: it must be below {2**31:,}")
    if not is_new:
        return Inputs(settings, store, groups, None, stream, None)
    store.verify()
    scale = measure_scale(settings, store)
    return Inputs(settings, store, groups, start.params if start else None, stream, scale)


def _tokens_a_step(settings: Train, store: Source) -> int:
    """At the most."""
    if settings.recipe == "minsae":
        return (settings.number_of_arrays or 1) * max(store.rows_of_shards)
    return settings.batch_size or 1


def open_stream(settings: Train, store: Source) -> TokenStream:
    """The recipe's batches, from the first."""
    if settings.recipe == "minsae":
        return files_in_order(store, settings.number_of_arrays or 1)
    return shuffled_tokens(store, settings.batch_size or 1, settings.shuffle_seed or 0)


def measure_scale(settings: Train, store: Source) -> float:
    """√d_model / mean ‖x‖₂ over the stream's first scale_tokens tokens, or over one epoch if that is less."""
    if settings.recipe == "minsae":
        return 1.0
    stream = open_stream(settings, store)
    wanted = min(settings.scale_tokens or 1, store.rows)
    total, left = 0.0, wanted
    while left:
        norms = np.linalg.norm(next(stream)[:left], axis=1)
        total += norms.sum(dtype=np.float64)
        left -= len(norms)
    if not np.isfinite(total) or total == 0:
        raise UserError(f"the store {store.folder} holds NaN, infinity, or nothing but zeros: extract it again")
    return float(np.float32(store.d_model**0.5 * wanted / total))


class Trainer:
    """A run from its last checkpoint, or from its beginning, to its end."""

    def __init__(self, inputs: Inputs, run: Run, checkpoints: Checkpoints):
        self.settings, self.store, self.groups = inputs.settings, inputs.store, inputs.groups
        self.run, self.checkpoints = run, checkpoints
        self.sweep = Sweep(self.settings, self.groups, self.store.d_model)
        self.stream = inputs.stream
        self.step, self.tokens = 0, 0
        self.figures: list[list[dict[str, float]]] = []  # of every group's members, in the last window
        self.diverged: dict[str, int] = {}  # members that were frozen, and the step that they could not make
        latest = checkpoints.latest()
        if latest is not None:
            self._restore(latest)
        else:
            self.scale = inputs.scale or measure_scale(self.settings, self.store)
            self.state = self.sweep.init(fold_scale(inputs.start, 1 / self.scale) if inputs.start else None)
        self.logs: list[list[MemberLog]] = []

    def _restore(self, step: int) -> None:
        self.state, notes = self.checkpoints.restore(step, self.sweep.abstract_state())
        if notes["store"] != self.store.fingerprint:
            raise UserError(
                f"the store {self.store.folder} has changed since {self.run.folder} began: bring the old one back, or "
                "use --overwrite"
            )
        self.step, self.tokens, self.scale = step, notes["tokens"], notes["scale"]
        self.figures, self.diverged = notes["figures"], notes["diverged"]
        self.stream.set_state(notes["stream"])

    def _save(self) -> None:
        notes = {
            "tokens": self.tokens,
            "scale": self.scale,
            "figures": self.figures,
            "diverged": self.diverged,
            "stream": self.stream.get_state(),
            "store": self.store.fingerprint,
        }
        self.checkpoints.save(self.step, self.state, notes)

    def train(self) -> None:
        """Steps to the end, then the exports."""
        with ExitStack() as open_logs:
            self.logs = [
                [
                    open_logs.enter_context(MemberLog(self.run.member(m), hyper(m), m.d_sae, self.step, self.tokens))
                    for m in group
                ]
                for group in self.groups
            ]
            self._loop()
        self._export()

    def _loop(self) -> None:
        num_steps = self.settings.num_steps or 0
        scale = np.float32(self.scale)
        in_flight: deque[jax.Array] = deque()
        ended: tuple[int, int, State] | None = None  # step, tokens, and the window that ended there
        self.window_began = time.perf_counter()
        with progress("train", num_steps, "steps") as bar, stop_signals() as stop:
            bar.start_at(self.step)
            while self.step < num_steps:
                x = next(self.stream)
                self.state, loss = self.sweep.step(
                    self.state, self.sweep.hyper, self.sweep.put(x), scale, tokens=len(x)
                )
                self.step, self.tokens = self.step + 1, self.tokens + len(x)
                in_flight.append(loss)
                if len(in_flight) > IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
                if ended:  # a step late, so that the devices have work while it is fetched and written
                    bar.note(f"{sum(map(len, self.groups))} x {self._log(*ended):,.0f} tokens/s")
                    ended = None
                bar.advance(1)
                last, stopped = self.step == num_steps, bool(stop)
                if last or self.step % self.settings.eval_window == 0:
                    self.state, window = self.sweep.take_window(self.state)
                    ended = (self.step, self.tokens, window)
                if last or stopped or self.step % self.settings.checkpoint_every == 0:
                    if ended:
                        self._log(*ended)
                        ended = None
                    self._save()
                if stopped and not last:
                    self.checkpoints.wait()
                    raise Stopped(
                        stop[0], f"stopped at step {self.step}, and saved: the same command goes on from there"
                    )

    def _log(self, step: int, tokens: int, ended: State) -> float:
        """Every member's row of a window; of a shorter one at the end only `figures`. Returns tokens a second."""
        windows = read_window(ended)
        if windows is None:
            raise UserError(f"the store {self.store.folder} holds NaN or infinity: extract it again")
        now = time.perf_counter()
        rate = (tokens - self.logs[0][0].tokens) / (now - self.window_began)
        self.window_began = now
        lambda_factor, lr_factor = map(float, self.sweep.schedules(step - 1))
        self.figures = []
        for group, logs, window in zip(self.groups, self.logs, windows, strict=True):
            self.figures.append([self._figures(window, i, member) for i, member in enumerate(group)])
            for member, log, own_steps, frozen in zip(group, logs, window.steps, window.frozen, strict=True):
                if frozen and member.name not in self.diverged:
                    self._tell_of_divergence(member, log, int(own_steps) + 1)
            for member, log, figures, active in zip(group, logs, self.figures[-1], window.active, strict=True):
                if step % self.settings.eval_window:
                    continue
                schedule = {"lr": member.lr * lr_factor, "lambda": member.lambda_sparsity * lambda_factor}
                log.write({"step": step, "tokens": tokens} | figures | schedule, active, rate)
        return rate

    def _tell_of_divergence(self, member: Member, log: MemberLog, step: int) -> None:
        self.diverged[member.name] = step
        log.note(step, f"diverged at step {step}, and frozen as it was before")
        warnings.warn(
            f"{member.name} diverged at step {step} (loss or gradient is not finite) and is frozen as it was before; "
            "the others go on",
            stacklevel=2,
        )

    def _figures(self, window: Window, i: int, member: Member) -> dict[str, float]:
        """One member's means over a window; under minsae l1 has λ inside, as the reference logs it."""
        figures = {name: float(getattr(window, name)[i]) for name in FIGURES}
        if self.settings.recipe == "minsae":
            figures["l1"] *= member.lambda_sparsity
        return figures

    def _export(self) -> None:
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
            "scale": self.scale,
            "steps": self.step,
            "tokens": self.tokens,
            "versions": {name: version(name) for name in ("minsae_jax", "jax", "flax", "optax")},
        }
        rows = []
        all_params = jax.device_get([group["params"] for group in self.state["groups"]])
        for group, params, all_figures in zip(self.groups, all_params, self.figures, strict=True):
            for i, (member, figures) in enumerate(zip(group, all_figures, strict=True)):
                own = {name: value[i] for name, value in params.items()}
                diverged = self.diverged.get(member.name)
                status = {"status": "diverged" if diverged else "finished"}
                since = {"diverged_at_step": diverged} if diverged else {}
                config = about | hyper(member) | status | since
                save_member(self.run.member(member), fold_scale(own, self.scale), config)
                rows.append({"member": member.name} | hyper(member) | figures | status)
        self.checkpoints.wait()
        self.run.finish(rows)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted in the list, for the loop to end in good order; a second one ends it at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be caught
        yield asked
        return

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hyper(member: Member) -> dict[str, Any]:
    """What tells members apart."""
    return {name: asdict(member)[name] for name in HYPER}
