"""Histories of members, read from CSV files that may be growing or damaged."""

import numpy as np
import pytest
import yaml

import minsae_jax as ms
from minsae_jax import UserError
from minsae_jax.sae.history import read_densities, read_histories
from tests.sae.conftest import INTERVALS


def test_histories_have_hyper_parameters_from_config_yaml(plain_run):
    histories = read_histories(plain_run)
    expected = {"kind": "relu", "lambda_sparsity": 10.0, "lr": 0.001, "seed": 0}
    assert [h.hyper for h in histories] == [expected | {"d_sae": 8}, expected | {"d_sae": 16}]
    assert histories[0].step.tolist() == list(range(10, 710, 10))
    np.testing.assert_allclose(histories[0].mse, 1 / np.arange(1, 71))
    assert np.isnan(histories[1].l1).all()


def test_densities_are_histograms_of_act_freqs(plain_run):
    densities = read_densities(read_histories(plain_run))
    assert densities.intervals[0] == 0
    assert densities.intervals[-1] == INTERVALS - 1
    assert len(densities.intervals) == 60
    assert (densities.silent == 3).all()
    alive = 100 * (1 - 3 / np.array([8, 16]))
    np.testing.assert_allclose(densities.percent.sum(2), np.broadcast_to(alive, (60, 2)))
    path = plain_run / "members/lambda=10,d_sae=16/act_freqs.csv"
    last = np.loadtxt(path, delimiter=",", skiprows=1)[-1, 4:]
    middles = (densities.edges[1:] + densities.edges[:-1]) / 2
    percent = densities.percent[-1, 1]
    mean = (middles * percent).sum() / percent.sum()
    assert mean == pytest.approx(np.log10(last / 500).mean(), abs=0.05)  # half a bin


def test_incomplete_last_rows_are_ignored(plain_run):
    member = plain_run / "members/lambda=10,d_sae=8"
    for name, n_lines in (("metrics.csv", 31), ("act_freqs.csv", 30)):
        path = member / name
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:n_lines], rows[n_lines][:4]]))
    histories = read_histories(plain_run)
    assert [len(history.step) for history in histories] == [30, 30]
    assert read_densities(histories).intervals.tolist() == list(range(29))


def test_run_without_rows_cannot_be_plotted_and_is_not_damaged(plain_run):
    path = plain_run / "members/lambda=10,d_sae=8/metrics.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has no metrics"):
        ms.plot(ms.PlotConfig(run=str(plain_run)))
    assert ms.verify(ms.VerifyConfig(path=(str(plain_run),))).problems == []


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("metrics.csv", "step,", "stop,", "it has no column step"),
        ("metrics.csv", "\n20,2000,", "\n20,x,", "could not convert string 'x'"),
        ("metrics.csv", "\n20,2000,1,0.5,2", "\n20,2000", "number of columns changed"),
        ("metrics.csv", "\n20,", "\n10,", "do not increase"),
        ("metrics.csv", "\n20,2000,", "\n20,2500,", "its steps are not those"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,1001,", "row 2 does not match"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,-1,", "row 2 does not match"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,", "number of columns changed"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,\x00,", "could not convert string"),
        ("act_freqs.csv", "", None, "it has no header"),
    ],
)
def test_damaged_files_are_errors(plain_run, name, old, new, reason):
    path = plain_run / "members/lambda=10,d_sae=8" / name
    text = path.read_text()
    path.write_text("" if new is None else text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"\.csv is damaged \(.*{reason}"):
        read_densities(read_histories(plain_run))


def test_missing_rows_of_act_freqs_are_an_error(plain_run):
    path = plain_run / "members/lambda=10,d_sae=8/act_freqs.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:41]))
    with pytest.raises(UserError, match=r"it has 40 rows, metrics\.csv has 70"):
        read_densities(read_histories(plain_run))


def test_members_of_other_settings_are_an_error(plain_run):
    (plain_run / "members/lambda=10,d_sae=8").rename(plain_run / "members/notes")
    with pytest.raises(UserError, match=r"do not match its config\.yaml: see lambda=10,d_sae=8"):
        read_histories(plain_run)


def test_sizes_below_d_model(plain_run):
    """Several d_model give one d_sae where factors are below 1."""
    path = plain_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["train"]["feature_dim_factor"] = [0.5, 0.25]
    path.write_text(yaml.safe_dump(config))
    assert [h.hyper["d_sae"] for h in read_histories(plain_run)] == [8, 16]
