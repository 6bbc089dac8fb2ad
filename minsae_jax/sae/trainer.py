"""The training loop: one stream of tokens, all members side by side: `python -m minsae_jax train`."""

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import jax
import numpy as np

from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import Source
from minsae_jax.errors import Stopped, UserError
from minsae_jax.monitor import Bar, progress
from minsae_jax.parallel.mesh import product_flops
from minsae_jax.parallel.processes import (
    any_process,
    barrier,
    process_count,
    process_index,
    same_on_all_processes,
)
from minsae_jax.sae.checkpoints import Checkpoints
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import Inputs, check_inputs, held_out_batches
from minsae_jax.sae.logger import Journal
from minsae_jax.sae.measures import measure
from minsae_jax.sae.member import fold_scale
from minsae_jax.sae.run import Run
from minsae_jax.sae.sweep import State, Sweep, read_window

IN_FLIGHT = 2  # steps handed to the devices ahead of the one that is waited for
FLOPS = 10  # of d_model * d_sae: five products a token


def train(
    settings: TrainConfig,
    encoder_fingerprint: str | None = None,
    open_live: Callable[[], Source] | None = None,
) -> str:
    """Train a sweep, or go on with it; returns what to tell.

    With `encoder_fingerprint` the store must be that encoder's; with `open_live` there is none, and that gives what is
    read in its place. In a cluster every process calls this; one writes. Raises UserError on settings, a store or a run
    folder that do not fit, before anything is written.
    """
    settings = settings.resolved()
    run = Run(settings)
    with barrier(f"look at the inputs of {run.folder}"):
        if run.is_finished():
            return f"the run {run.folder} is finished already\n{run.summary()}"
        store = open_live() if open_live else open_store(settings.store, settings.cache_layer)
        inputs = check_inputs(settings, store, encoder_fingerprint, run.is_new())
    seen = [
        run.kept(),
        store.fingerprint,
        inputs.held_out and inputs.held_out.fingerprint,
        run.is_new(),
    ]
    if not same_on_all_processes(json.dumps(seen)):
        raise UserError(
            "the processes were not given the same command, or do not see the same files"
        )
    with ExitStack() as stack:
        with barrier(f"begin {run.folder}"):
            if process_index() == 0:
                stack.enter_context(run.begun())
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, settings.max_to_keep))
        Trainer(inputs, run, checkpoints).train()
    return f"the run {run.folder} is finished\n{run.summary()}"


class Trainer:
    """A run from its last checkpoint, or from its beginning, to its end."""

    def __init__(self, inputs: Inputs, run: Run, checkpoints: Checkpoints):
        self.settings, self.store, self.stream = inputs.settings, inputs.store, inputs.stream
        self.held_out, self.checkpoints = inputs.held_out, checkpoints
        self.sweep = Sweep(self.settings, inputs.groups, self.store.d_model)
        self.journal = Journal(inputs, run, writes=process_index() == 0)
        self.step, self.tokens = 0, 0
        latest = checkpoints.latest()
        if latest is not None:
            self._restore(latest, run)
        else:
            assert inputs.scale is not None
            self.scale = inputs.scale
            self.state = self.sweep.init(
                fold_scale(inputs.start, 1 / self.scale) if inputs.start else None
            )

    def _restore(self, step: int, run: Run) -> None:
        state, notes = self.checkpoints.restore(step, self.sweep.abstract_portable())
        if notes["store"] != self.store.fingerprint:
            raise UserError(
                f"the store {self.store.folder} has changed since {run.folder} began: bring the old one back, or "
                "use --overwrite"
            )
        if notes["held_out"] != self._held_out_fingerprint():
            raise UserError(
                f"the held-out store is not the one that {run.folder} began with: bring that back, or use --overwrite"
            )
        self.state = self.sweep.from_portable(state)
        self.step, self.tokens, self.scale = step, notes["tokens"], notes["scale"]
        self.journal.figures, self.journal.diverged = notes["figures"], notes["diverged"]
        self.journal.measured = notes["measured"]
        self.stream.set_state(notes["stream"])

    def _save(self) -> None:
        notes = {
            "tokens": self.tokens,
            "scale": self.scale,
            "figures": self.journal.figures,
            "measured": self.journal.measured,
            "diverged": self.journal.diverged,
            "stream": self.stream.get_state(),
            "store": self.store.fingerprint,
            "held_out": self._held_out_fingerprint(),
        }
        self.checkpoints.save(self.step, self.sweep.portable(self.state), notes)
        self.saved_at = time.monotonic()

    def _held_out_fingerprint(self) -> str | None:
        return self.held_out.fingerprint if self.held_out else None

    def train(self) -> None:
        """Steps to the end, then the exports."""
        with self.journal.opened(self.step, self.tokens):
            self._loop()
        self.checkpoints.wait()
        with barrier("write the members"):
            self.journal.export(self.step, self.tokens, self.scale, self.sweep.weights(self.state))

    def _loop(self) -> None:
        s, num_steps, scale = self.settings, self.settings.num_steps or 0, np.float32(self.scale)
        in_flight: deque[jax.Array] = deque()
        ended: tuple[int, int, State] | None = None  # step, tokens, and the window that ended there
        self.saved_at = time.monotonic()
        self.pace = Pace(self.sweep, s.precision, self.tokens)
        with progress("train", num_steps, "steps") as bar, stop_signals() as stop:
            bar.start_at(self.step)
            while self.step < num_steps:
                with self.pace.waiting():
                    x = next(self.stream)
                self.state, loss = self.sweep.step(
                    self.state, self.sweep.hyper, self.sweep.put(x), scale, tokens=len(x)
                )
                self.step, self.tokens = self.step + 1, self.tokens + len(x)
                in_flight.append(loss)
                if len(in_flight) > IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
                if (
                    ended
                ):  # a step late, so that the devices have work while it is fetched and written
                    self._log(*ended, bar)
                    ended = None
                bar.advance(1)
                last, window_ends = self.step == num_steps, self.step % s.eval_window == 0
                if last or window_ends:
                    self.state, window = self.sweep.take_window(self.state)
                    ended = (self.step, self.tokens, window)
                if self.held_out and (last or self.step % s.eval_every == 0):
                    jax.block_until_ready(self.state)
                    with self.pace.paused():
                        self._measure()
                stopped, late = self._asked(bool(stop), window_ends)
                if last or stopped or late or self.step % s.checkpoint_every == 0:
                    if ended:
                        self._log(*ended, bar)
                        ended = None
                    self._save()
                if stopped and not last:
                    self.checkpoints.wait()
                    number = stop[0] if stop else signal.SIGTERM
                    raise Stopped(
                        number,
                        f"stopped at step {self.step}, and saved: the same command goes on from there",
                    )

    def _asked(self, stop: bool, window_ends: bool) -> tuple[bool, bool]:
        """Whether a process was asked to stop, and whether a checkpoint is overdue; processes ask one another when a
        window ends."""
        late = time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes
        if process_count() > 1 and not window_ends:
            return False, False
        return any_process(stop, late)

    def _log(self, step: int, tokens: int, ended: State, bar: Bar) -> None:
        with barrier("write metrics"):
            windows = read_window(ended)
            if windows is None:
                raise UserError(
                    f"the store {self.store.folder} holds NaN or infinity: extract it again"
                )
            speed = self.pace.since_last(tokens)
            schedules = self.sweep.schedules(step - 1)
            self.journal.window(
                step, tokens, windows, (float(schedules[0]), float(schedules[1])), speed
            )
        bar.note(
            f"{self.pace.members} x {speed['tokens_per_second'] / 1e3:,.0f}k tokens/s, "
            f"{speed['share_of_limit']:.0%} of limit, {speed['waiting']:.0%} waiting"
        )

    def _measure(self) -> None:
        """Measures on held-out tokens of the members as they are now."""
        assert self.held_out
        batches = held_out_batches(self.settings, self.held_out)
        groups = measure(
            self.sweep.mesh, [g["params"] for g in self.state["groups"]], batches, self.scale
        )
        with barrier("write measures"):
            self.journal.held_out(
                self.step, self.tokens, groups, self.sweep.dead_fractions(self.state)
            )


class Pace:
    """How fast it goes, against what the devices could do."""

    def __init__(self, sweep: Sweep, precision: str, tokens: int):
        self.members = sum(map(len, sweep.groups))
        flops = (
            FLOPS * sweep.d_model * sum(member.d_sae for group in sweep.groups for member in group)
        )
        self.limit = product_flops(sweep.mesh, precision) / flops  # tokens a second
        self.tokens, self.began, self.waited = tokens, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the stream: time that the devices may, or may not, have work for."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training: it counts for nothing."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def since_last(self, tokens: int) -> dict[str, float]:
        """Over the steps since this was asked last."""
        now = time.perf_counter()
        seconds, rate = now - self.began, (tokens - self.tokens) / (now - self.began)
        speed = {
            "tokens_per_second": rate,
            "share_of_limit": rate / self.limit,
            "waiting": self.waited / seconds,
        }
        self.tokens, self.began, self.waited = tokens, now, 0.0
        return speed


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
