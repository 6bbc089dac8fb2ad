"""What TensorBoard and the CSV files show."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from minsae_jax.monitor import METRICS, MemberLog, table

HPARAMS = {"lambda_sparsity": 5.0, "lr": 1e-3, "seed": 0, "d_sae": 4}


def write(log, step):
    row = dict.fromkeys(METRICS, 0.5) | {"step": step, "tokens": 100 * step, "mse": 1 / step}
    log.write(row, np.array([50, 10, 0, 100]) * 10, {"tokens_per_second": 1e6})


def open_log(folder, step=0):
    return MemberLog(folder, HPARAMS, 4, step, 100 * step)


def test_tensorboard(tmp_path):
    log = open_log(tmp_path / "lambda=5")
    for step in (10, 20):
        write(log, step)
    log.close()
    events = EventAccumulator(str(tmp_path / "lambda=5"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {f"train/{n}" for n in ("loss", "mse", "l1", "l0", "dead_fraction", "lr", "lambda")}
    wanted.add("speed/tokens_per_second")
    assert wanted == set(tags["scalars"])
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("train/mse")] == [(10, 0.1), (20, 0.05)]
    (histogram,) = tags["histograms"]
    value = events.Histograms(histogram)[0].histogram_value
    assert value.num == 3  # the silent feature has no logarithm
    np.testing.assert_allclose([value.min, value.max], [np.log10(0.1), 0], atol=1e-6)
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    assert {k: v.number_value for k, v in started.hparams.items()} == HPARAMS
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert {i.name for i in experiment.hparam_infos} == set(HPARAMS)
    assert {"train/mse", "train/l0"} <= {i.name.tag for i in experiment.metric_infos}


def test_going_on_forgets_what_came_after_the_checkpoint(tmp_path):
    log = open_log(tmp_path / "m")
    for step in (10, 20, 30):
        write(log, step)
    log.close()
    with (tmp_path / "m/metrics.csv").open("a") as f:
        f.write("40,40")  # a row that was cut off
    for _ in range(2):
        log = open_log(tmp_path / "m", step=20)
        write(log, 30)
        log.close()
    for name, first in (("metrics.csv", 10), ("act_freqs.csv", 1000)):
        rows = np.loadtxt(tmp_path / "m" / name, delimiter=",", skiprows=1)
        assert rows[:, 0].tolist() == [first, 2 * first, 3 * first]
    events = EventAccumulator(str(tmp_path / "m"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/mse")] == [10, 20, 30]


def test_starting_anew_forgets_all(tmp_path):
    for _ in range(2):
        log = open_log(tmp_path / "m")
        write(log, 10)
        log.close()
    assert len((tmp_path / "m/metrics.csv").read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path / "m"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/mse")] == [10]


def test_table():
    assert (
        table(["member", "λ"], [["lambda=10", "10"], ["x", "2.5"]]) == "member       λ\nlambda=10   10\nx          2.5"
    )
