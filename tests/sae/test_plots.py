"""The plots of a run, drawn from its CSV files."""

import numpy as np
import pytest
from PIL import Image

from minsae_jax import UserError
from minsae_jax.sae.config import PlotConfig, TrainConfig
from minsae_jax.sae.plots import member_styles, penalty_title, plot


@pytest.mark.slow
def test_plot_writes_a_picture_and_an_animation(plain_run, tmp_path):
    files = plot(PlotConfig(run=str(plain_run)))
    assert files.metrics == plain_run / "plots/mse_l1.png"
    assert files.densities == plain_run / "plots/density.gif"
    assert sorted(p.name for p in (plain_run / "plots").iterdir()) == ["density.gif", "mse_l1.png"]
    with Image.open(files.metrics) as picture:
        assert (picture.format, picture.width) == ("PNG", 1320)
    with Image.open(files.densities) as animation:
        assert animation.n_frames == 60
        first = np.asarray(animation.convert("RGB"))
        animation.seek(59)
        last = np.asarray(animation.convert("RGB"))
    differs = (first != last).any(2)
    assert differs.any()
    assert not differs[-40:].any()  # the x axis does not move
    elsewhere = plot(PlotConfig(run=str(plain_run), out=str(tmp_path / "elsewhere")))
    assert elsewhere.densities.read_bytes() == files.densities.read_bytes()


def test_members_without_an_l1_get_no_plot_of_it(plain_run):
    """That of top-k kinds is 0, which a logarithmic axis cannot show."""
    for path in plain_run.glob("members/*/metrics.csv"):
        rows = path.read_text().splitlines()
        rows[1:] = [row.rsplit(",", 1)[0] + ",0" for row in rows[1:]]
        path.write_text("\n".join(rows) + "\n")
    with Image.open(plot(PlotConfig(run=str(plain_run))).metrics) as picture:
        assert picture.width == 780


@pytest.mark.parametrize(
    ("kinds", "settings", "title"),
    [
        (["relu"], {}, "L1"),
        (["relu"], {"recipe": "minsae"}, "λ · L1"),
        (["topk", "relu"], {}, "L1"),
        (["jumprelu", "topk"], {}, "L0"),
        (["jumprelu", "relu"], {}, "L1, of jumprelu L0"),
        (["jumprelu"], {"lambda_sparsity": (1.0,), "jumprelu_penalty": "step"}, "L0"),
        (["jumprelu"], {"lambda_sparsity": (1.0,)}, "penalty"),
    ],
)
def test_title_of_the_penalty(kinds, settings, title):
    """The column l1 of metrics.csv has another content for jumprelu (docs/train.md)."""
    hypers = [{"kind": kind} for kind in kinds]
    if "jumprelu" in kinds and "lambda_sparsity" not in settings:
        hypers[0]["target_l0"] = 16.0
    assert penalty_title(TrainConfig(**settings), hypers) == title


def test_members_of_one_colour_have_different_dashes():
    hypers = [
        {"kind": kind, "k": k, "lr": 1e-3, "seed": seed, "d_sae": 64}
        for kind in ("batchtopk", "topk")
        for k in (4.0, 8.0)
        for seed in (0, 1)
    ]
    styles = member_styles(hypers)
    assert len({(style.color, style.linestyle) for style in styles}) == 8
    assert len({style.color for style in styles}) == 2


def test_damaged_run_gets_no_plots(plain_run):
    path = plain_run / "members/lambda=10,d_sae=8/metrics.csv"
    path.write_text(path.read_text().replace("step,", "stop,", 1))
    with pytest.raises(UserError, match="is damaged"):
        plot(PlotConfig(run=str(plain_run)))
    assert not (plain_run / "plots").exists()


def test_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is not a run: it needs"):
        plot(PlotConfig(run=str(tmp_path)))
