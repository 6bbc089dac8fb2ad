"""TensorBoard events of a member and of a run as a whole."""

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:  # tensorboardX imports torch if it is installed, which takes a second
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

TFEVENTS_PREFIX = "events.out.tfevents."  # of the names of TensorBoard's files
FILE_VERSION = "brain.Event:2"  # of TensorBoard's format
COMPARED = ("mse", "l1", "l0", "dead_fraction")  # metrics in charts that compare members


class Board:
    """A file of TensorBoard events. They are written by `flush` and `close`.

    The file is open only then, and there is no thread: tensorboardX's SummaryWriter has four open
    files and two threads, for each of 200 members.
    """

    def __init__(self, folder: Path, step: int):
        """Start a new file that hides events of earlier files after `step`."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        earlier = len(event_files(folder))
        # Names contain the second of their creation; the suffix keeps two of one second apart.
        suffix = f".{earlier}" if earlier else ""
        name = f"{TFEVENTS_PREFIX}{int(time.time())}.{socket.gethostname()}{suffix}"
        self.path = folder / name
        self._records = bytearray()
        self._add(Event(file_version=FILE_VERSION))
        if earlier:
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        from tensorboardX import summary

        self.add_summary(summary.scalar(tag, value), step)

    def add_histogram(self, tag: str, values: Float[np.ndarray, " values"], step: int) -> None:
        from tensorboardX import summary

        self.add_summary(summary.histogram(tag, values, HISTOGRAM_EDGES), step)

    def add_image(self, tag: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        from tensorboardX import summary

        self.add_summary(summary.image(tag, image, dataformats="HWC"), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        from tensorboardX import summary

        self.add_summary(summary.text(tag, text), step)

    def add_summary(self, content: "Summary", step: int = 0) -> None:
        """Add an event of any kind."""
        from tensorboardX.proto.event_pb2 import Event

        self._add(Event(summary=content, step=step))

    def _add(self, event: "Event") -> None:
        """Append an event as a TFRecord: length, its checksum, content, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        self._records += length + struct.pack("<I", masked_crc32c(length))
        self._records += content + struct.pack("<I", masked_crc32c(content))

    def flush(self) -> None:
        """Write the events since the last time."""
        if not self._records:
            return
        records = self._records
        # Not a second time, should this fail.
        self._records = bytearray()
        with self.path.open("ab") as file:
            file.write(records)

    def close(self) -> None:
        self.flush()


def _histogram_edges() -> Float[np.ndarray, " edges"]:
    """Return TensorFlow's edges of bins: from 1e-12 to 1e20 by factors of 1.1, and their mirror."""
    positive = [1e-12]
    while positive[-1] * 1.1 < 1e20:
        positive.append(positive[-1] * 1.1)
    return np.array([*(-edge for edge in reversed(positive)), 0.0, *positive])


HISTOGRAM_EDGES = _histogram_edges()


class RunLog:
    """TensorBoard events of a run as a whole: charts of all members together, and images.

    held_out: names of the metrics on held-out tokens, if there are any.
    """

    def __init__(self, folder: Path, step: int, held_out: Sequence[str] = ()):
        self.folder = folder
        from tensorboardX.summary import custom_scalars

        self._board = Board(folder, step)
        layout = {"training": _multiline_charts("train", COMPARED)}
        if held_out:
            layout["held-out tokens"] = _multiline_charts("eval", held_out)
        self._board.add_summary(custom_scalars(layout))

    def add_image_file(self, name: str, path: Path, step: int) -> None:
        """Add the image in a file."""
        from PIL import Image

        with Image.open(path) as image:
            self.add_image(name, np.asarray(image.convert("RGB")), step)

    def add_image(self, name: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Add an image."""
        self._board.add_image(name, image, step)
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


def write_hparams(
    board: Board,
    name: str,
    hparams: Mapping[str, int | float | str],
    columns: Sequence[str],
    tags: Sequence[str],
) -> None:
    """Write a member's hyper-parameters for the HParams tab, with the metrics to show there.

    columns: names of the hyper-parameters of all members. TensorBoard shows those that the first
    member lists, and members of other kinds have other ones.
    """
    from tensorboard.plugins.hparams import summary_v2 as hparams_protos
    from tensorboardX.proto.summary_pb2 import Summary

    experiment = hparams_protos.hparams_config_pb(
        [hparams_protos.HParam(column) for column in columns],
        [hparams_protos.Metric(tag) for tag in tags],
    )
    member = hparams_protos.hparams_pb(dict(hparams), trial_id=name)
    for proto in (experiment, member):
        # TensorBoard's protos and tensorboardX's are different classes of the same message.
        board.add_summary(Summary.FromString(proto.SerializeToString()))
