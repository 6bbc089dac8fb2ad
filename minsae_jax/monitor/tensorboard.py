"""TensorBoard events of a member and of a run as a whole."""

import io
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from minsae_jax.files import named_errors

if TYPE_CHECKING:  # tensorboard takes 0.2 seconds to import
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

TFEVENTS_PREFIX = "events.out.tfevents."  # of the names of TensorBoard's files
FILE_VERSION = "brain.Event:2"  # of TensorBoard's format
COMPARED = ("mse", "l1", "l0", "dead_fraction")  # metrics in charts that compare members


class Board:
    """A file of TensorBoard events. They are written by `flush`.

    The file is open only then, and there is no thread, unlike in the SummaryWriter of PyTorch or
    tensorboardX, which has open files and threads for each of 200 members.
    """

    def __init__(self, folder: Path, step: int):
        """Start a new file that hides events of earlier files after `step`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        earlier = len(list(folder.glob(f"{TFEVENTS_PREFIX}*")))
        # Names contain the second of their creation; the suffix distinguishes two of the same
        # second.
        suffix = f".{earlier}" if earlier else ""
        name = f"{TFEVENTS_PREFIX}{int(time.time())}.{socket.gethostname()}{suffix}"
        self.path = folder / name
        self._records = io.BytesIO()
        self._writer = RecordWriter(self._records)
        self._add(Event(file_version=FILE_VERSION))
        if earlier:
            self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values by tag, as one event: nine take a third of the time of nine events."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.add_summary(Summary(value=scalars), step)

    def add_histogram(self, tag: str, values: Float[np.ndarray, " values"], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.add_summary(Summary(value=[Summary.Value(tag=tag, histo=_histogram(values))]), step)

    def add_image(self, tag: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        height, width, channels = image.shape
        content = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=content)]), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add_summary(text_pb(f"{tag}/text_summary", text), step)

    def add_summary(self, content: "Summary", step: int = 0) -> None:
        """Add an event of any kind."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(summary=content, step=step))

    def _add(self, event: "Event") -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        """Write the events since the last time."""
        records = self._records.getvalue()
        if not records:
            return
        # Not a second time, should this fail.
        self._records.seek(0)
        self._records.truncate()
        with named_errors(self.path), self.path.open("ab") as file:
            file.write(records)


def _histogram_edges() -> Float[np.ndarray, " edges"]:
    """Return TensorFlow's edges of bins: from 1e-12 to 1e20 by factors of 1.1, and their mirror."""
    positive = [1e-12]
    while positive[-1] * 1.1 < 1e20:
        positive.append(positive[-1] * 1.1)
    return np.array([*(-edge for edge in reversed(positive)), 0.0, *positive])


HISTOGRAM_EDGES = _histogram_edges()


def _histogram(values: Float[np.ndarray, " values"]) -> "HistogramProto":
    """Return the counts of the bins from the first to the last that is not empty."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    counts, edges = np.histogram(values, HISTOGRAM_EDGES)
    occupied = np.flatnonzero(counts)
    first, last = occupied[0], occupied[-1]
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=values @ values,
        # A bin is listed by its right edge: an empty bin gives the first one its left edge.
        bucket_limit=edges[first : last + 2],
        bucket=[0, *counts[first : last + 1]],
    )


class RunLog:
    """TensorBoard events of a run as a whole: charts of all members together, and images.

    held_out: names of the metrics on held-out tokens, if there are any.
    """

    def __init__(self, folder: Path, step: int, held_out: Sequence[str]):
        self.folder = folder
        self._board = Board(folder, step)
        charts = {"training": _tags("train", COMPARED)}
        if held_out:
            charts["held-out tokens"] = _tags("eval", held_out)
        self._board.add_summary(_custom_charts(charts))
        self._board.flush()

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
        """Return the paths of the files that this log writes, and their folder."""
        return [self._board.path, self.folder]


def _tags(prefix: str, names: Sequence[str]) -> dict[str, str]:
    # Tags of custom charts are regular expressions, matched from the start.
    return {name: f"{prefix}/{name}$" for name in names}


def _custom_charts(categories: Mapping[str, Mapping[str, str]]) -> "Summary":
    """Return the layout of charts of several members. categories: category -> chart -> tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    layout = layout_pb2.Layout()
    for title, charts in categories.items():
        category = layout.category.add(title=title)
        for name, tag in charts.items():
            category.chart.add(title=name, multiline={"tag": [tag]})
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=make_tensor_proto(layout.SerializeToString()),
    )
    return Summary(value=[value])


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

    experiment = hparams_protos.hparams_config_pb(
        [hparams_protos.HParam(column) for column in columns],
        [hparams_protos.Metric(tag) for tag in tags],
    )
    member = hparams_protos.hparams_pb(dict(hparams), trial_id=name)
    for content in (experiment, member):
        board.add_summary(content)
