"""Checkpoints of a sweep: the whole state and a small JSON beside it, by Orbax, saved while training goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

from minsae_jax.errors import UserError, brief
from minsae_jax.sae.sweep import State

logging.getLogger("absl").setLevel(
    logging.ERROR
)  # Orbax warns of what a kill left behind, which is not seen again


@contextmanager
def _told_as_full_disk(folder: object) -> Iterator[None]:
    """Orbax and what is below it raise all kinds of errors when a checkpoint cannot be written."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        reason = brief(e)
        raise UserError(
            f"a checkpoint could not be written to {folder} ({reason}): make room, and give the same command again"
        ) from e


class Checkpoints:
    """The folder `checkpoints/` of a run. A save that was cut off is not seen again."""

    def __init__(self, folder: Path, max_to_keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with _told_as_full_disk(self._manager.directory):
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, notes: dict[str, Any]) -> None:
        """Returns once the state is copied from the devices; `notes` must be plain JSON."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
        )
        with _told_as_full_disk(self._manager.directory):
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """State and notes, the state of the shapes and laid out over the devices as the abstract state `like` is.
        Raises UserError where the checkpoint is damaged."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), notes=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as e:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} is damaged ({type(e).__name__}): remove that folder "
                "to go on from the one before it, or use --overwrite"
            ) from e
        return restored["state"], restored["notes"]
