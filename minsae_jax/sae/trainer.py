"""The training loop: all members of a sweep train on one stream of tokens."""

import json
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from minsae_jax.activations.store import open_store
from minsae_jax.activations.stream import Source
from minsae_jax.errors import Stopped, UserError
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import Bar, Throughput, short_count
from minsae_jax.monitor import progress as progress_bar
from minsae_jax.parallel.agreement import Agreement
from minsae_jax.parallel.processes import any_process, barrier, same_on_all_processes
from minsae_jax.sae.batches import DeviceBatches
from minsae_jax.sae.checkpoints import Checkpoints, Progress
from minsae_jax.sae.config import TrainConfig, TrainPlan
from minsae_jax.sae.data import (
    TrainData,
    bad_activations,
    measure_scale_and_median,
    open_train_data,
    sample_batches,
)
from minsae_jax.sae.logger import LogInterval, RunLogger
from minsae_jax.sae.measures import measure
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.run import HELD_OUT_METRICS, TRAIN_METRICS, Run, RunFolder, load_run
from minsae_jax.sae.snapshot import MeasureFeatures, Snapshot
from minsae_jax.sae.stop_signals import stop_signals
from minsae_jax.sae.sweep import DeviceMetrics, Sweep, read_metrics

# Calls queued on the devices before the host waits for the first of them. The devices work through
# the others while the host logs metrics.
CALLS_IN_FLIGHT = 2
# Measures of features that take longer, as with several seeds of large members, take at most this
# share of the time.
SLOW_MEASURE_SECONDS = 20.0
MEASURE_SHARE = 0.1


def train(
    config: TrainConfig,
    encoder_fingerprint: str | None = None,
    open_live: Callable[[], Source] | None = None,
    on_step: Callable[[int], None] | None = None,
    open_monitor: Callable[[Path], MeasureFeatures] | None = None,
) -> Run:
    """Train a sweep, or resume it from its last checkpoint, and return its results.

    encoder_fingerprint: of the encoder that the store must come from. open_live: opens live
    activations, which replace the store. on_step: called with the number of each finished step.
    open_monitor: opens a monitor for the held-out store in a folder; it is called with all members
    when they are measured there. In a cluster every process calls this and one writes. Raises
    UserError before anything is written if settings, store or run folder do not fit one another.
    """
    plan = config.plan()
    folder = RunFolder(plan)
    with ExitStack() as stack:
        with barrier(f"open the inputs of {folder.folder}"):
            folder.check()
            if folder.is_finished():
                return load_run(folder.folder, was_finished=True)
            store: Source
            if open_live is None:
                store = open_store(plan.config.store, plan.config.cache_layer)
            else:
                store = open_live()
            # Until the end, so that no other command replaces the stream's files.
            stack.enter_context(lock_folder(store.folder, shared=True))
            is_new = folder.is_new()
            data = open_train_data(plan, store, encoder_fingerprint, is_new)
            if data.held_out is not None:
                stack.enter_context(lock_folder(data.held_out.folder, shared=True))
            measure_features = None
            if open_monitor is not None and data.held_out is not None:
                measure_features = open_monitor(data.held_out.folder)
        _check_processes_agree(folder, data)
        if is_new:
            data = measure_scale_and_median(plan, data)
        with barrier(f"create {folder.folder}"):
            if jax.process_index() == 0:
                stack.enter_context(folder.locked(is_new))
        checkpoints = Checkpoints(folder.checkpoints, plan.config.max_to_keep)
        stack.enter_context(checkpoints)
        trainer = Trainer(plan, folder, data, checkpoints, on_step, measure_features)
        with closing(trainer.logger):
            # One process opens them. The others wait here: Gloo ends a program's first sum if one
            # process starts it 30 s before another.
            with barrier("open the logs"):
                trainer.logger.open(trainer.progress)
            trainer.run_steps()
        trainer.export()
    return load_run(folder.folder)


def _check_processes_agree(folder: RunFolder, data: TrainData) -> None:
    stores = [data.store.fingerprint, data.held_out_fingerprint]
    facts = [folder.settings, stores, folder.is_new()]
    if not same_on_all_processes(json.dumps(facts)):
        raise UserError(
            "the processes got different commands or see different files; start all with the "
            "same command on a shared file system"
        )


class Call(NamedTuple):
    """A call of the sweep's program, which the devices may not have finished."""

    done: jax.Array  # ready when the call has finished
    step: int  # after it
    tokens: int  # trained on after it
    metrics: DeviceMetrics | None  # of a log interval that it ended


class Trainer:
    """Trains a run from its last checkpoint, or from its start, to its end."""

    def __init__(
        self,
        plan: TrainPlan,
        folder: RunFolder,
        data: TrainData,
        checkpoints: Checkpoints,
        on_step: Callable[[int], None] | None,
        measure_features: MeasureFeatures | None,
    ):
        self.plan = plan
        self.config = plan.config
        self.num_steps = plan.optimizer.num_steps
        self.folder = folder
        self.data = data
        self.checkpoints = checkpoints
        self.on_step = on_step
        self.measure_features = measure_features
        self.sweep = Sweep(plan, data.groups, data.store.d_model)
        self.logger = RunLogger(plan, folder, data.members, has_held_out=data.held_out is not None)
        self.batches = DeviceBatches(plan, data, self.sweep)
        self.calls: deque[Call] = deque()  # started, and not finished or not logged
        latest = checkpoints.latest()
        if latest is None:
            self._start()
        else:
            self._resume(latest)
        self.saved_at = time.monotonic()
        self.features_due = self.saved_at
        self.agreement = Agreement()
        # Of logging, which the other processes of a cluster do not know yet
        self.failure: Exception | None = None
        self.throughput = Throughput(self.progress.tokens)

    def _start(self) -> None:
        assert self.data.scale is not None
        self.progress = Progress(
            scale=self.data.scale,
            store=self.data.store.fingerprint,
            held_out_store=self.data.held_out_fingerprint,
        )
        start = self.data.start
        if start is not None:
            # Training sees scale * x, and `start` is for x.
            kind = self.data.groups[0][0].kind
            start = kind.normalize_decoder(kind.fold_scale(start, 1 / self.data.scale))
        self.state = self.sweep.init(start, self.data.median)

    def _resume(self, step: int) -> None:
        abstract = self.sweep.abstract_portable()
        state, self.progress, position = self.checkpoints.restore(step, abstract)
        changed = None
        if self.progress.store != self.data.store.fingerprint:
            changed = f"store {self.data.store.folder}"
        elif self.progress.held_out_store != self.data.held_out_fingerprint:
            changed = "held-out store"
        if changed is not None:
            raise UserError(
                f"the {changed} has changed since {self.folder.folder} was started; restore it, "
                "or use --overwrite"
            )
        self.state = self.sweep.from_portable(state)
        self.batches.go_to(position)

    def export(self) -> None:
        """Write the weights of the members, and the table that marks the run as finished."""
        self.checkpoints.wait()
        weights = self.sweep.weights(self.state)
        with barrier("write the members"):
            try:
                self.logger.export(self.progress, self.data.store, weights)
            except Exception:
                # The other processes of a cluster cannot fetch weights without this one.
                for _ in weights:
                    pass
                raise

    def run_steps(self) -> None:
        """Run the remaining steps."""
        scale = np.float32(self.progress.scale)
        first_step = self.progress.step
        with (
            progress_bar("train", self.num_steps, "steps") as bar,
            stop_signals(bar.print) as signals,
        ):
            bar.start_at(self.progress.step)
            if first_step < self.num_steps:
                bar.note("compiling")
            while self.progress.step < self.num_steps:
                n_steps = self.batches.steps_in_call(self.progress.step)
                with self.throughput.waiting():
                    x = self.batches.read(n_steps)
                n_tokens = x.shape[-2]
                self.state, done = self.sweep.step(
                    self.state, self.sweep.hyper, self.batches.put(x), scale, n_tokens=n_tokens
                )
                if self.progress.step == first_step:
                    bar.note("")
                    # Without the compilation.
                    self.throughput = Throughput(self.progress.tokens)
                self.progress.step += n_steps
                self.progress.tokens += n_steps * n_tokens
                bar.advance(n_steps)

                step = self.progress.step
                is_last = step == self.num_steps
                ends_interval = step % self.config.eval_window == 0
                metrics = None
                if is_last or ends_interval:
                    self.state, metrics = self.sweep.take_metrics(self.state)
                self.calls.append(Call(done, step, self.progress.tokens, metrics))
                # Metrics are fetched late, while the devices work on the calls after theirs.
                self._finish_calls(CALLS_IN_FLIGHT, bar)
                if self.data.held_out and (is_last or step % self.config.eval_every == 0):
                    self._finish_calls(0, bar)
                    self._measure_held_out(is_last)
                stopped, is_late = self._agree_on_stop_or_save(bool(signals), ends_interval)
                if is_last or stopped or is_late or step % self.config.checkpoint_every == 0:
                    self._finish_calls(0, bar)
                    self._save()
                if stopped and not is_last:
                    self.checkpoints.wait()
                    raise Stopped(
                        signals[0] if signals else signal.SIGTERM,
                        f"stopped at step {step}, checkpoint saved; rerun the same command to "
                        "resume",
                    )
                if self.on_step:
                    for finished in range(step - n_steps + 1, step + 1):
                        self.on_step(finished)

    def _agree_on_stop_or_save(self, stop: bool, ends_interval: bool) -> tuple[bool, ...]:
        """Return whether a process was asked to stop, and whether a checkpoint is overdue.

        In a cluster the processes agree on this, and on failures of logging, now and then.
        """
        if not self.agreement.is_due(ends_interval):
            return False, False
        self._raise_failure_of_any()
        self.checkpoints.check_save()
        minutes = (time.monotonic() - self.saved_at) / 60
        return self.agreement.exchange(stop, minutes > self.config.checkpoint_minutes)

    def _raise_failure_of_any(self) -> None:
        """Raise on all processes if logging failed on one."""
        with barrier("write metrics"):
            if self.failure is not None:
                raise self.failure

    def _finish_calls(self, n_left: int, bar: Bar) -> None:
        """Wait for all calls but the last n_left, and log the intervals that they ended."""
        while len(self.calls) > n_left:
            call = self.calls.popleft()
            call.done.block_until_ready()
            if call.metrics is not None and self.failure is None:
                try:
                    self._log_interval(call, call.metrics, bar)
                except Exception as e:
                    if jax.process_count() == 1:
                        raise
                    # The other processes continue until they agree the next time.
                    self.failure = e

    def _log_interval(self, call: Call, device_metrics: DeviceMetrics, bar: Bar) -> None:
        """Fetch the metrics of the log interval that a call ended, and log them."""
        progress = self.progress
        groups = read_metrics(device_metrics)
        if groups is None:
            raise bad_activations(self.config, self.data.store, "NaN or infinity")
        interval = LogInterval(
            step=call.step,
            tokens=call.tokens,
            new_tokens=groups[0].tokens,
            lambda_factor=groups[0].lambda_factor,
            lr_factor=groups[0].lr_factor,
            speed=self.throughput.recent(call.tokens),
        )
        is_complete = call.step % self.config.eval_window == 0
        for group, metrics in zip(self.data.groups, groups, strict=True):
            for i, member in enumerate(group):
                values = {name: float(getattr(metrics, name)[i]) for name in TRAIN_METRICS}
                if self.plan.logs_weighted_l1:
                    values["l1"] *= member.sparsity
                progress.metrics[member.name] = values
                if metrics.frozen[i] and member.name not in progress.diverged:
                    progress.diverged[member.name] = int(metrics.steps[i]) + 1
                    self.logger.log_divergence(member, progress.diverged[member.name])
                # A shorter interval at the end counts for sweep.csv only.
                if is_complete:
                    self.logger.log_interval(interval, member, values, metrics.active[i])
        self.logger.write_rows_if_due()
        n_members = len(self.data.members)
        rate = interval.speed["tokens_per_second"]
        note = f"{n_members} x {short_count(rate)} tokens/s"
        # Left out if it rounds to 0 %, so that the line fits into 80 columns.
        waiting = interval.speed["waiting"]
        if waiting > 0.005:
            note += f", waiting {waiting:.0%}"
        bar.note(note)

    def _measure_held_out(self, is_last: bool) -> None:
        assert self.data.held_out
        jax.block_until_ready(self.state)
        with self.throughput.paused():
            batches = sample_batches(self.data.held_out, self.config.eval_tokens)
            params = [group.params for group in self.state.groups]
            kinds = self.sweep.program.kinds
            measures = measure(self.sweep.mesh, kinds, params, batches, self.progress.scale)
            dead_fractions = self.sweep.dead_fractions(self.state)
            names = [name for name in HELD_OUT_METRICS if name != "dead_fraction"]
            is_live = []
            for group, of_group, dead in zip(
                self.data.groups, measures, dead_fractions, strict=True
            ):
                for i, member in enumerate(group):
                    values = {name: float(getattr(of_group, name)[i]) for name in names}
                    values["dead_fraction"] = float(dead[i])
                    self.progress.held_out[member.name] = values
                    is_live.append(of_group.density[i] > 0)
            with barrier("write metrics on held-out tokens"):
                self.logger.log_held_out(self.progress)
            (is_due,) = any_process(is_last or time.monotonic() >= self.features_due)
            if self.measure_features and is_due:
                self._measure_features(self.measure_features, is_live)

    def _measure_features(
        self, measure_features: MeasureFeatures, is_live: Sequence[Bool[np.ndarray, " _"]]
    ) -> None:
        """Log measures of all members; is_live: of each, its features active on held-out tokens."""
        started_at = time.monotonic()
        # Every process fetches the weights, since that needs all devices; one measures.
        weights = self.sweep.weights(self.state)
        snapshots = []
        for member, params, live in zip(self.data.members, weights, is_live, strict=True):
            if jax.process_index() == 0:
                raw_params = member.kind.fold_scale(params, self.progress.scale)
                sae = SparseAutoencoder(raw_params, {**member.kind.settings, **member.hyper})
                snapshots.append(Snapshot(member.name, sae, live))
        with barrier("measure features"):
            if jax.process_index() == 0:
                self.logger.log_features(self.progress.step, measure_features(snapshots))
        self.features_due = time.monotonic()
        seconds = self.features_due - started_at
        if seconds > SLOW_MEASURE_SECONDS:
            self.features_due += seconds / MEASURE_SHARE

    def _save(self) -> None:
        self._raise_failure_of_any()
        with barrier("write metrics"):
            self.logger.flush()
        state = self.sweep.portable(self.state)
        self.checkpoints.save(self.progress, state, self.batches.position())
        self.saved_at = time.monotonic()
