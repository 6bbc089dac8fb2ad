"""Contents of TensorBoard events, W&B and CSV files, and lines of progress."""

import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from minsae_jax.monitor import (
    METRICS,
    MemberLog,
    RunLog,
    Throughput,
    Wandb,
    append_rows,
    progress,
    start_csv,
    table,
    wrap,
)
from minsae_jax.monitor.tensorboard import Board

COLUMNS = ["lambda_sparsity", "k", "lr", "seed", "d_sae"]  # some members have k
FULL = Path("/dev/full")
HPARAMS = {"lambda_sparsity": 5.0, "lr": 1e-3, "seed": 0, "d_sae": 4}


def write(log, step):
    row = dict.fromkeys(METRICS, 0.5) | {"step": step, "tokens": 100 * step, "mse": 1 / step}
    log.add(row, np.array([50, 10, 0, 100]) * 10, 1000, {"tokens_per_second": 1e6})
    log.write()


def open_log(folder, step=0):
    return MemberLog(folder, HPARAMS, 4, step, 100 * step, 10, 3, COLUMNS, ("fvu",))


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux, as if the disk were full")
def test_full_disk_is_named(tmp_path):
    board = Board(tmp_path, step=0)
    board.path = FULL
    board.add_scalars({"train/mse": 0.5}, step=1)
    for write_file in (board.flush, partial(append_rows, FULL, [[1, 0.5]])):
        with pytest.raises(OSError, match="No space left") as error:
            write_file()
        assert error.value.filename == str(FULL)


def test_tensorboard(tmp_path):
    folder = tmp_path / "run/members/lambda=5"
    log = open_log(folder)
    for step in (10, 20):
        write(log, step)
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    expected = {f"train/{n}" for n in ("loss", "mse", "l1", "l0", "dead_fraction", "lr", "lambda")}
    expected.add("speed/tokens_per_second")
    assert expected == set(tags["scalars"])
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("train/mse")] == [
        (10, 0.1),
        (20, 0.05),
    ]
    (histogram,) = tags["histograms"]
    value = events.Histograms(histogram)[0].histogram_value
    assert value.num == 3  # the silent feature has no logarithm
    np.testing.assert_allclose([value.min, value.max], [np.log10(0.1), 0], atol=1e-6)
    bins = np.searchsorted(value.bucket_limit, np.log10([0.5, 0.1, 1]), side="right")
    assert value.bucket == np.bincount(bins, minlength=len(value.bucket_limit)).tolist()
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    assert {k: v.number_value for k, v in started.hparams.items()} == HPARAMS
    assert started.group_name == "run/lambda=5"  # else members of two runs would be one
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert [i.name for i in experiment.hparam_infos] == COLUMNS
    assert {"train/mse", "train/l0", "eval/fvu"} <= {i.name.tag for i in experiment.metric_infos}


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    log = open_log(tmp_path / "m")
    for step in (10, 20, 30):
        write(log, step)
    with (tmp_path / "m/metrics.csv").open("a") as f:
        f.write("40,40")  # a row that was cut off
    for _ in range(2):
        log = open_log(tmp_path / "m", step=20)
        write(log, 30)
    for name, first in (("metrics.csv", 10), ("act_freqs.csv", 1000)):
        rows = np.loadtxt(tmp_path / "m" / name, delimiter=",", skiprows=1)
        assert rows[:, 0].tolist() == [first, 2 * first, 3 * first]
    events = EventAccumulator(str(tmp_path / "m"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/mse")] == [10, 20, 30]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="requires Linux")
def test_logs_keep_no_file_open(tmp_path):
    """A run can have hundreds of members."""
    write(open_log(tmp_path / "first"), 10)  # imports
    before = len(list(Path("/proc/self/fd").iterdir()))
    n_threads = threading.active_count()
    logs = [open_log(tmp_path / str(i)) for i in range(10)]
    for log in logs:
        write(log, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert threading.active_count() == n_threads
    assert len((tmp_path / "9/metrics.csv").read_text().splitlines()) == 2


def test_new_log_replaces_an_old_one(tmp_path):
    for _ in range(2):
        log = open_log(tmp_path / "m")
        write(log, 10)
    assert len((tmp_path / "m/metrics.csv").read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path / "m"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/mse")] == [10]


def test_run_log_has_images_and_charts(tmp_path):
    for step, image_steps in ((0, (10, 20, 30)), (10, (20,))):
        log = RunLog(tmp_path, step, ("fvu",))
        for at in image_steps:
            Image.new("RGBA", (8, 6), (at, 0, 0, 255)).save(tmp_path / "pareto.png")
            log.add_image_file("pareto", tmp_path / "pareto.png", at)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert [(e.step, e.width, e.height) for e in events.Images("pareto")] == [
        (10, 8, 6),
        (20, 8, 6),
    ]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    tags = {
        category.title: [c.multiline.tag[0] for c in category.chart] for category in layout.category
    }
    assert tags == {
        "training": [f"train/{name}$" for name in ("mse", "l1", "l0", "dead_fraction")],
        "held-out tokens": ["eval/fvu$"],
    }


class FakeWandb(ModuleType):
    """Record calls; raise in the one that `failing` names."""

    def __init__(self, failing=""):
        super().__init__("wandb")
        self.failing = failing
        self.started = []  # arguments of init
        self.logged = []  # (run, step, metrics)
        self.finished = []

    def init(self, **arguments):
        self._fail("init")
        self.started.append(arguments)
        name = arguments["name"]

        def log(metrics, step):
            self._fail("log")
            self.logged.append((name, step, metrics))

        def finish():
            self.finished.append(name)
            self._fail("finish")

        run = ModuleType(name)
        run.log = log
        run.finish = finish
        return run

    def _fail(self, name):
        if name == self.failing:
            raise RuntimeError(f"no\n{name}")


MEMBERS = {"lambda=5": HPARAMS, "lambda=10": HPARAMS | {"lambda_sparsity": 10.0}}


def test_wandb(tmp_path, monkeypatch):
    """Members are runs with minSAE's names; a resumed run has the same ids, another run others."""
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for folder in ("run", "run", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = Wandb(tmp_path / folder, MEMBERS)
        log.write("lambda=10", {"step": 50, "mse": 1.0, "l1": 2.0, "l0": 3.0, "loss": 4.0})
        log.write("lambda=5", {"step": 50, "mse": np.nan, "l1": np.nan, "l0": np.nan})  # frozen
        log.close()
    metrics = {"avg_mse": 1.0, "avg_l1": 2.0, "avg_active_features": 3.0}
    assert fake.logged == 3 * [("lambda=10", 50, metrics)]
    assert fake.finished == 3 * list(MEMBERS)
    first = fake.started[1]
    expected = {
        "project": "minSAE",
        "group": "run",
        "name": "lambda=10",
        "config": MEMBERS["lambda=10"],
        "resume": "allow",
        "dir": str(tmp_path / "run"),
    }
    assert {name: first[name] for name in expected} == expected
    ids = [arguments["id"] for arguments in fake.started]
    assert ids[:2] == ids[2:4]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("failing", ["import", "init", "log", "finish"])
def test_wandb_error_does_not_stop_training(tmp_path, monkeypatch, failing):
    """There is one warning, and runs that were started are ended."""
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "import" else fake)

    def run():
        log = Wandb(tmp_path, MEMBERS)
        for step in (50, 100):
            for name in MEMBERS:
                log.write(name, {"step": step, "mse": 1.0, "l1": 2.0, "l0": 3.0})
        log.close()

    with pytest.warns(
        UserWarning, match=r"W&B failed and is disabled \(.*\); training continues"
    ) as seen:
        run()
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    assert fake.finished == (list(MEMBERS) if failing in ("log", "finish") else [])


def test_table():
    assert (
        table(["member", "λ"], [["lambda=10", "10"], ["x", "2.5"]])
        == "member       λ\nlambda=10   10\nx          2.5"
    )


def advance(bar, times: int) -> None:
    for _ in range(times):
        bar.advance(2)


def test_progress_in_a_pipe_is_lines(capsys, monkeypatch):
    monkeypatch.setattr("minsae_jax.monitor.progress_bar.LINE_SECONDS", 0)
    with progress("train", 10, "steps") as bar:
        bar.start_at(4)
        bar.note("waiting 3%")
        advance(bar, 3)
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert lines[0] == "train 60%, 6/10, waiting 3%"
    counts = ("80%, 8/10", "100%, 10/10")  # the last one once
    assert [line.split(", 00:00 left, ")[0] for line in lines[1:]] == [f"train {c}" for c in counts]
    assert all(line.endswith("steps/s, waiting 3%") for line in lines[1:])


def test_rate_in_a_pipe_is_of_the_time_after_compilation(capsys, monkeypatch):
    """The first step takes 100 seconds, each of the others a second."""
    times = [0.0, 100.0, 101.0, 102.0]
    monkeypatch.setattr("minsae_jax.monitor.progress_bar.LINE_SECONDS", 0)
    monkeypatch.setattr("minsae_jax.monitor.progress_bar.time.monotonic", lambda: times[0])
    with progress("train", 20, "steps") as bar:
        for _ in range(3):
            times.pop(0)
            bar.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "train 10%, 2/20",
        "train 20%, 4/20, 00:08 left,  2.00 steps/s",
        "train 30%, 6/20, 00:07 left,  2.00 steps/s",
    ]


def test_progress_of_finished_work_has_no_rate(capsys):
    with progress("prepare", 3, "recordings") as bar:
        bar.start_at(3)
        bar.advance(0)
    assert set(capsys.readouterr().err.splitlines()) == {"prepare 100%, 3/3"}


def test_short_progress_in_a_pipe_is_a_line_at_start_and_end_or_none(capsys):
    with progress("train", 8, "steps") as bar:
        advance(bar, 4)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train 25%, 2/8"
    assert last.startswith("train 100%, 8/8, ")
    with progress("check", 4, "files", delay=2.0) as bar:
        advance(bar, 2)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("train", 4, "steps") as bar:
        advance(bar, 2)
        bar.note("waiting 3%")
    err = capsys.readouterr().err
    assert "\r" in err
    assert "train 100%|" in err
    assert "4/4" in err
    assert "waiting 3%" in err


def test_note_is_on_the_terminal_before_the_first_update(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("train", 4, "steps") as bar:
        bar.note("compiling")
        assert "compiling" in capsys.readouterr().err
        bar.note("")
        advance(bar, 2)
        assert "compiling" not in capsys.readouterr().err


def test_progress_is_closed_on_error(capsys):
    with pytest.raises(RuntimeError), progress("train", 4, "steps"):
        raise RuntimeError
    assert "train 0%, 0/4" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("200", 100)])
def test_paragraphs_fit_into_the_terminal(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    text = "rule: " + " ".join(f"word-{i}" for i in range(80))
    first, *others = wrap(text).splitlines()
    assert width - len("word-00") <= len(first) <= width
    assert all(line.startswith("  word") and len(line) <= width for line in others)
    assert " ".join([first, *map(str.strip, others)]) == text
    path = "/" + 250 * "a"
    assert wrap(f"reason: {path}").splitlines() == ["reason:", f"  {path}"]


def test_csv_of_a_resumed_run_is_rewritten_only_to_drop_rows(tmp_path):
    """Those of the members of a sweep can be gigabytes."""
    path = tmp_path / "metrics.csv"
    columns = ("step", "mse")
    start_csv(path, columns, last=0)
    append_rows(path, [[50, 1.5]])
    file = path.stat().st_ino
    start_csv(path, columns, last=50)
    assert path.stat().st_ino == file
    append_rows(path, [[100, 1.25]])
    start_csv(path, columns, last=50)
    assert path.read_bytes() == b"step,mse\r\n50,1.5\r\n"


def test_speed_is_averaged_over_half_a_second_without_pauses(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    throughput = Throughput(tokens=500)
    clock.now += 2
    assert throughput.recent(1500) == {"tokens_per_second": 500, "waiting": 0}
    # Two log intervals that the host sees end together.
    clock.now += 0.25
    assert throughput.recent(2400)["tokens_per_second"] == pytest.approx(1900 / 2.25)
    clock.now += 0.25
    assert throughput.recent(2500)["tokens_per_second"] == pytest.approx(1000 / 0.5)
    with throughput.paused():
        clock.now += 60
    with throughput.waiting():
        clock.now += 1
    clock.now += 1
    assert throughput.recent(4500) == {"tokens_per_second": 1000, "waiting": 0.5}
