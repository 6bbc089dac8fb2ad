"""TensorBoard events of a member and of a run as a whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

TFEVENTS_PREFIX = "events.out.tfevents."  # of the names of TensorBoard's files
COMPARED = ("mse", "l1", "l0", "dead_fraction")  # metrics in charts that compare members


class RunLog:
    """TensorBoard events of a run as a whole: charts of all members together, and images.

    held_out: names of the metrics on held-out tokens, if there are any.
    """

    def __init__(self, folder: Path, step: int, held_out: Sequence[str] = ()):
        self.folder = folder
        self._board = open_board(folder, step)
        layout = {"training": _multiline_charts("train", COMPARED)}
        if held_out:
            layout["held-out tokens"] = _multiline_charts("eval", held_out)
        self._board.add_custom_scalars(layout)

    def add_image_file(self, name: str, path: Path, step: int) -> None:
        """Add the image in a file."""
        from PIL import Image

        with Image.open(path) as image:
            self.add_image(name, np.asarray(image.convert("RGB")), step)

    def add_image(self, name: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Add an image."""
        self._board.add_image(name, image, step, dataformats="HWC")
        self._board.flush()

    def files(self) -> list[Path]:
        """Return the paths of all files, whose content is handed to the system."""
        self._board.flush()
        return [*event_files(self.folder), self.folder]

    def close(self) -> None:
        self._board.close()


def _multiline_charts(prefix: str, names: Sequence[str]) -> dict[str, list[object]]:
    # Tags of custom charts are regular expressions, matched from the start.
    return {name: ["Multiline", [f"{prefix}/{name}$"]] for name in names}


def event_files(folder: Path) -> list[Path]:
    """Return the paths of TensorBoard's files in a folder."""
    return list(folder.glob(f"{TFEVENTS_PREFIX}*"))


def open_board(folder: Path, step: int) -> "SummaryWriter":
    """Return a writer of TensorBoard events that hides events of earlier files after `step`."""
    # Imports torch if it is installed, which takes a second that few verbs need.
    from tensorboardX import SummaryWriter

    earlier = len(event_files(folder))
    if not earlier:
        return SummaryWriter(str(folder), flush_secs=10)
    # File names contain the second of their creation; the suffix keeps two of one second apart.
    return SummaryWriter(
        str(folder), flush_secs=10, purge_step=step + 1, filename_suffix=f".{earlier}"
    )


def write_hparams(
    board: "SummaryWriter", name: str, hparams: Mapping[str, int | float | str], tags: Sequence[str]
) -> None:
    """Write a member's hyper-parameters for the HParams tab, with the metrics to show there."""
    from tensorboard.plugins.hparams import summary_v2 as hparams_protos
    from tensorboardX.proto.summary_pb2 import Summary

    experiment = hparams_protos.hparams_config_pb(
        [hparams_protos.HParam(name) for name in hparams],
        [hparams_protos.Metric(tag) for tag in tags],
    )
    member = hparams_protos.hparams_pb(dict(hparams), trial_id=name)
    for proto in (experiment, member):
        # TensorBoard's protos and tensorboardX's are different classes of the same message.
        board.file_writer.add_summary(Summary.FromString(proto.SerializeToString()))
