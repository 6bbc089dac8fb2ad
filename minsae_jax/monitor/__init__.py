"""What a person watches: progress bars, tables, CSV files, TensorBoard and W&B."""

import csv
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from minsae_jax.files import atomic_write

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS = ("step", "tokens", "loss", "mse", "l1", "l0", "dead_fraction", "lr", "lambda")
COMPARED = (
    "mse",
    "l1",
    "l0",
    "dead_fraction",
)  # of METRICS: what TensorBoard holds members against one another by
EVENTS = "events.out.tfevents."  # how TensorBoard's files are called

BAR = "{desc} {percentage:.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left, {rate_noinv_fmt}{postfix}"


class Bar:
    """A progress bar with a rate and the time left."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def start_at(self, done: int) -> None:
        """So much was done before, and does not count for the rate."""
        self._bar.initial = self._bar.n = done

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def note(self, text: str) -> None:
        """Shown after the rate."""
        self._bar.set_postfix_str(text, refresh=False)


@contextmanager
def progress(title: str, total: int, unit: str, delay: float = 0) -> Iterator[Bar]:
    """A bar on stderr, shown after `delay` seconds; where that is no terminal, a line every ten seconds."""
    terminal = sys.stderr.isatty()
    pace = (
        {"mininterval": 0.1} if terminal else {"mininterval": 10, "maxinterval": 30, "ascii": True}
    )
    with tqdm(
        total=total, desc=title, unit=unit, bar_format=BAR, dynamic_ncols=True, delay=delay, **pace
    ) as bar:
        yield Bar(bar)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [columns, *rows]
    ]
    return "\n".join("  ".join(line) for line in lines)


class MemberLog:
    """metrics.csv, act_freqs.csv and TensorBoard events of one member, a row every window.

    A log that goes on from a checkpoint forgets what was written after it: no row is lost, and none comes twice.
    `held_out` names the measures that `measured` will get.
    """

    def __init__(
        self,
        folder: Path,
        hparams: Mapping[str, Any],
        d_sae: int,
        step: int,
        tokens: int,
        held_out: Sequence[str] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.tokens = tokens
        self._metrics = open_csv(folder / "metrics.csv", METRICS, last=step)
        self._act_freqs = open_csv(
            folder / "act_freqs.csv", ("step", *(f"feat_{i}" for i in range(d_sae))), last=tokens
        )
        self._board = open_board(folder, step)
        if not step:
            # Members of two runs may have one name: TensorBoard would take their mean.
            name = f"{folder.resolve().parent.parent.name}/{folder.name}"
            tags = [f"train/{metric}" for metric in COMPARED] + [
                f"eval/{measure}" for measure in held_out
            ]
            self._write_hparams(name, hparams, tags)

    def _write_hparams(self, name: str, hparams: Mapping[str, Any], tags: list[str]) -> None:
        from tensorboard.plugins.hparams import summary_v2 as hparams_protos
        from tensorboardX.proto.summary_pb2 import Summary

        metrics = [hparams_protos.Metric(tag) for tag in tags]
        experiment = hparams_protos.hparams_config_pb(
            [hparams_protos.HParam(k) for k in hparams], metrics
        )
        for proto in (experiment, hparams_protos.hparams_pb(dict(hparams), trial_id=name)):
            self._board.file_writer.add_summary(Summary.FromString(proto.SerializeToString()))

    def __enter__(self) -> "MemberLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self,
        row: Mapping[str, int | float],
        active: Int[np.ndarray, " d_sae"],
        speed: Mapping[str, float],
    ) -> None:
        """`active` counts the tokens of the window on which each feature was active; `speed` is for TensorBoard."""
        tokens_in_window = int(row["tokens"]) - self.tokens
        self.tokens = int(row["tokens"])
        self._metrics.writerow([row[name] for name in METRICS])
        self._act_freqs.writerow([self.tokens, *active.tolist()])
        self._metrics.flush()
        self._act_freqs.flush()
        step = int(row["step"])
        for name in METRICS[2:]:
            if np.isfinite(row[name]):  # a frozen member has no figures
                self._board.add_scalar(f"train/{name}", row[name], step)
        for name, value in speed.items():
            self._board.add_scalar(f"speed/{name}", value, step)
        alive = active[active > 0] / tokens_in_window
        if len(alive):
            self._board.add_histogram("train_density/log10", np.log10(alive), step)
        self._board.flush()

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """Measures on held-out tokens."""
        for name, value in figures.items():
            if np.isfinite(value):  # a frozen member has no dead fraction
                self._board.add_scalar(f"eval/{name}", value, step)
        self._board.flush()

    def note(self, step: int, text: str) -> None:
        """Text in TensorBoard's own tab."""
        self._board.add_text("status", text, step)

    def close(self) -> None:
        self._metrics.close()
        self._act_freqs.close()
        self._board.close()


class RunLog:
    """TensorBoard events of a run as a whole: charts that lay all members over one another, and pictures."""

    def __init__(self, folder: Path, step: int, held_out: Sequence[str] = ()):
        self._board = open_board(folder, step)
        tags = {"training": ("train", COMPARED), "held-out tokens": ("eval", held_out)}
        self._board.add_custom_scalars(
            {
                title: {name: ["Multiline", [f"{prefix}/{name}$"]] for name in names}
                for title, (prefix, names) in tags.items()
                if names
            }
        )

    def show(self, name: str, picture: Path, step: int) -> None:
        """A picture in a file."""
        from PIL import Image

        with Image.open(picture) as image:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def open_board(folder: Path, step: int) -> "SummaryWriter":
    """TensorBoard events of a folder that go on from a step: what an earlier file holds beyond it is hidden."""
    from tensorboardX import (
        SummaryWriter,  # imports torch where it is installed: a second that few verbs need
    )

    earlier = len(list(folder.glob(f"{EVENTS}*")))
    # The suffix keeps two of one second apart.
    purge = {"purge_step": step + 1, "filename_suffix": f".{earlier}"} if earlier else {}
    return SummaryWriter(str(folder), flush_secs=10, **purge)


class Wandb:
    """A run a member in W&B, with minSAE's project and names. Whatever fails there is told once, and no more is sent.

    W&B's own files are in `folder`/wandb, with an id by which a run that goes on is the same one there.
    """

    def __init__(self, folder: Path, members: Mapping[str, Mapping[str, Any]]):
        self._runs: dict[str, Any] = {}
        with self._failing_alone():
            import wandb

            own = folder / "wandb" / "id"
            if not own.exists():
                own.parent.mkdir(exist_ok=True)
                own.write_text(uuid.uuid4().hex[:8])
            for i, (name, hparams) in enumerate(members.items()):
                self._runs[name] = wandb.init(
                    project="minSAE", group=folder.resolve().name, name=name, config=dict(hparams), dir=str(folder),
                    id=f"{own.read_text()}-{i}", resume="allow", reinit="create_new", settings={"console": "off"},
                )  # fmt: skip

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            self._runs = {}
            why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            warnings.warn(f"nothing more goes to W&B ({why}); training goes on", stacklevel=2)

    def write(self, member: str, row: Mapping[str, int | float]) -> None:
        figures = {"avg_mse": row["mse"], "avg_l1": row["l1"], "avg_active_features": row["l0"]}
        if (
            member in self._runs and np.isfinite(list(figures.values())).all()
        ):  # a frozen member has none
            with self._failing_alone():
                self._runs[member].log(figures, step=int(row["step"]))

    def close(self) -> None:
        with self._failing_alone():
            for run in self._runs.values():
                run.finish()


class Csv:
    """A CSV file that grows by rows."""

    def __init__(self, path: Path):
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)
        self.writerow, self.flush, self.close = (
            self._writer.writerow,
            self._file.flush,
            self._file.close,
        )


def open_csv(path: Path, header: tuple[str, ...], last: int) -> Csv:
    """Append to the rows whose first column is at most `last`; a fresh file where last is 0."""
    kept = [",".join(header)]
    if last and path.exists():
        for line in path.read_text(errors="replace").splitlines()[1:]:
            first = line.split(",", 1)[0]
            cells = len(next(csv.reader([line]))) if '"' in line else line.count(",") + 1
            if cells == len(header) and first.isdecimal() and int(first) <= last:
                kept.append(line)
    with atomic_write(path) as aside:
        aside.write_text("\r\n".join(kept) + "\r\n", newline="")
    return Csv(path)
