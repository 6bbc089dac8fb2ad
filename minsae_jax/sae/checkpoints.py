"""Checkpoints of a sweep by Orbax: the state and the progress of the run, saved during training."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from minsae_jax.checksums import files_below, read_checksums, write_checksums
from minsae_jax.errors import UserError, is_system_error, system_reason
from minsae_jax.files import flush, flush_tree, regular_file, remove_folder, sha256_of
from minsae_jax.parallel.processes import any_process, same_on_all_processes
from minsae_jax.sae.run import Metrics
from minsae_jax.sae.step import MemberState, SweepState, TokenMoments
from minsae_jax.settings import JsonObject

# Orbax logs, with tracebacks, errors that it also raises, and leftovers of a killed process.
logging.getLogger("absl").setLevel(logging.CRITICAL)

STUCK_SECONDS = 3.0  # all processes waiting, but at different barriers

Tree = dict[str, Any]  # nested dicts and lists of arrays, as Orbax stores them


@dataclass
class Progress:
    """Progress of a run; together with the sweep's state, all that a resumed run needs."""

    scale: float  # factor of the activations in training
    store: str  # fingerprint of the train store
    held_out_store: str | None  # fingerprint of the held-out store
    step: int = 0  # steps made
    tokens: int = 0  # tokens trained on
    metrics: dict[str, Metrics] = field(default_factory=dict)  # member -> last log interval
    held_out: dict[str, Metrics] = field(default_factory=dict)  # member -> last measurement
    diverged: dict[str, int] = field(default_factory=dict)  # member -> the step that failed

    def to_json(self) -> JsonObject:
        """Return a copy, which Orbax writes while training changes the progress."""
        content = {stored: getattr(self, name) for name, stored in _STORED_PROGRESS.items()}
        return deepcopy(content)


class _FlushedStep(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that Orbax writes under a temporary name; a checkpoint survives a power cut.

    A checkpoint is a folder with one folder for each item (the state, the notes), which are
    finalized first. Orbax itself flushes the arrays, but no JSON and no names.
    """

    async def finalize(self) -> None:
        temporary = Path(self.get())
        folder = Path(self.get_final())
        if not folder.name.isdecimal():
            # An item, which is flushed with its checkpoint.
            await super().finalize()
            return
        # Without the files directly in the folder, of which Orbax still writes two.
        write_checksums(temporary, (name for name in files_below(temporary) if "/" in name))
        flush_tree(temporary)
        await super().finalize()
        flush([folder, *folder.iterdir()])
        flush([folder.parent])


class Checkpoints:
    """The folder `checkpoints/` of a run. Interrupted saves are ignored."""

    def __init__(self, folder: Path, max_to_keep: int):
        self._directory = folder.absolute()
        self._barrier_key: str | None = None  # that a thread of Orbax waits at
        self._may_be_saving = False  # in a cluster
        # When, for the last time, all processes waited at the same barrier or one did not wait.
        self._agreed_at = 0.0
        for path in self._directory.glob("*/_CHECKPOINT_METADATA"):
            # Orbax reads these files of all steps; it would wait forever for a named pipe.
            if path.parent.name.isdecimal():
                regular_file(path)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            # Of a process that was killed while it saved.
            cleanup_tmp_directories=True,
            temporary_path_class=_FlushedStep,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_at_barrier),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            # Closing would wait for the other processes, which may have ended.
            return
        try:
            with self._write_errors():
                self._manager.close()
        except UserError:
            # The first error is the one to report.
            if error is None:
                raise
        finally:
            # No save is running any more.
            if jax.process_index() == 0:
                for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    remove_folder(path)

    def wait(self) -> None:
        """Wait until everything saved is on disk. Every process of a cluster must call this."""
        while self._may_be_saving:
            self.check_save()
            time.sleep(0.05)
        with self._write_errors():
            self._manager.wait_until_finished()

    def check_save(self) -> None:
        """Raise UserError if a process of a cluster failed to write the last checkpoint.

        Every process must call this. Without it the others would wait for ten minutes, at the next
        barrier of Orbax, which the failed process leaves out.
        """
        if not self._may_be_saving:
            return
        key = self._barrier_key
        is_same_barrier = same_on_all_processes(key or "")
        any_at_none, any_saving = any_process(key is None, self._manager.is_saving_in_progress())
        if is_same_barrier or any_at_none:
            self._agreed_at = time.monotonic()
        (is_stuck,) = any_process(time.monotonic() - self._agreed_at > STUCK_SECONDS)
        if is_stuck:
            raise UserError(
                f"a process of the cluster could not write a checkpoint to {self._directory}; "
                "rerun the same command to resume"
            )
        self._may_be_saving = any_saving

    def _wait_at_barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes, in a thread of Orbax."""
        self._barrier_key = key
        try:
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
        finally:
            self._barrier_key = None

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, progress: Progress, state: SweepState, stream: JsonObject) -> None:
        """Save a checkpoint; returns once the state is copied from the devices.

        stream: the position in the token stream.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_to_tree(state)),
            notes=ocp.args.JsonSave(progress.to_json() | {"stream": stream}),
        )
        # Before the next save Orbax waits for the last one.
        self.wait()
        with self._write_errors():
            # The trainer decides when to save; `force` turns off Orbax's own policy.
            self._manager.save(progress.step, args=items, force=True)
        self._may_be_saving = jax.process_count() > 1
        self._agreed_at = time.monotonic()

    def restore(self, step: int, abstract: SweepState) -> tuple[SweepState, Progress, JsonObject]:
        """Return the state, the progress and the position in the stream.

        The state gets the shapes and shardings of `abstract`. Raises UserError if the checkpoint
        is damaged.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_to_tree(abstract)), notes=ocp.args.JsonRestore()
        )
        try:
            _check_files(self._directory / str(step))
            restored = self._manager.restore(step, args=items)
            notes = restored["notes"]
            values = {name: notes[stored] for name, stored in _STORED_PROGRESS.items()}
            progress = Progress(step=step, **values)
            return _from_tree(restored["state"]), progress, notes["stream"]
        # Orbax and TensorStore raise many types on damaged files.
        except Exception as e:
            if is_system_error(e):
                raise UserError(
                    f"checkpoint {step} in {self._directory} could not be read "
                    f"({system_reason(e)}); rerun the same command"
                ) from e
            # Messages of Orbax and TensorStore are long.
            reason = str(e) if isinstance(e, UserError) else type(e).__name__
            raise UserError(
                f"checkpoint {step} in {self._directory} is damaged ({reason}); "
                "remove that folder to resume from the one before it, or use --overwrite"
            ) from e

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn the many kinds of errors of a failed write, such as on a full disk, into one."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(
                f"a checkpoint could not be written to {self._directory} ({system_reason(e)}); "
                "rerun the same command to resume"
            ) from e


def _check_files(folder: Path) -> None:
    """Raise UserError if a file of a checkpoint differs from its checksum, if it has one."""
    for name, digest in read_checksums(folder).items():
        if sha256_of(folder / name) != digest:
            raise UserError(f"{name} differs from its checksum")


# Names in the files, which are older than those in the code. They stay, so that old runs resume.
_STORED_NAMES = {
    "params": "params",
    "opt_state": "opt",
    "tokens_since_fired": "silent",
    "steps": "steps",
    "frozen": "frozen",
    "metrics": "window",
}
_STORED_PROGRESS = {
    "tokens": "tokens",
    "scale": "scale",
    "metrics": "figures",
    "held_out": "measured",
    "diverged": "diverged",
    "store": "store",
    "held_out_store": "held_out",
}


def _to_tree(state: SweepState) -> Tree:
    groups = [
        {stored: getattr(group, name) for name, stored in _STORED_NAMES.items()}
        for group in state.groups
    ]
    return {
        "groups": groups,
        "step": state.step,
        "seen": state.tokens_seen,
        "moments": state.moments._asdict(),
    }


def _from_tree(tree: Tree) -> SweepState:
    groups = []
    for group in tree["groups"]:
        values = {name: group[stored] for name, stored in _STORED_NAMES.items()}
        groups.append(MemberState(**values))
    return SweepState(
        groups=tuple(groups),
        step=tree["step"],
        tokens_seen=tree["seen"],
        moments=TokenMoments(**tree["moments"]),
    )
