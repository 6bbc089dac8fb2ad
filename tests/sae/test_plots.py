"""The plots of a run, drawn from its CSV files."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from minsae_jax import UserError
from minsae_jax.sae.config import PlotConfig
from minsae_jax.sae.plots import KIND_COLOURS, Box, ParetoPoint, draw_pareto, plot


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


def test_damaged_run_gets_no_plots(plain_run):
    path = plain_run / "members/lambda=10,d_sae=8/metrics.csv"
    path.write_text(path.read_text().replace("step,", "stop,", 1))
    with pytest.raises(UserError, match="is damaged"):
        plot(PlotConfig(run=str(plain_run)))
    assert not (plain_run / "plots").exists()


def test_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is not a run: it needs"):
        plot(PlotConfig(run=str(tmp_path)))


def test_titles_are_not_formulas(tmp_path):
    point = ParetoPoint({"lambda_sparsity": 1.0}, l0=5.0, fvu=0.1)
    draw_pareto(tmp_path / "pareto.png", [point], r"$\frac$")
    assert (tmp_path / "pareto.png").exists()


def test_pareto_of_members_without_a_sparsity_setting(tmp_path):
    points = [ParetoPoint({"d_sae": 8}, 5.0, 0.1), ParetoPoint({"d_sae": 16}, np.nan, 0.1)]
    draw_pareto(tmp_path / "pareto.png", points, "imported")
    assert (tmp_path / "pareto.png").exists()


def test_every_kind_has_its_colour_in_the_pareto_plot(tmp_path):
    settings = {
        "relu": ("lambda_sparsity", (1.0, 2.0, 5.0)),
        "topk": ("k", (8.0, 16.0, 32.0)),
        "batchtopk": ("k", (8.0, 16.0, 32.0)),
        "matryoshka": ("k", (8.0, 16.0)),
        "jumprelu": ("target_l0", (16.0,)),
        "pca": ("k", (4, 8, 16, 32)),
    }
    points = []
    for i, (kind, (name, values)) in enumerate(settings.items()):
        for value in values:
            l0 = 200 / value if kind == "relu" else float(value)
            points.append(ParetoPoint({"kind": kind, name: value}, l0, (5 - i / 2) / l0 / 10))
    draw_pareto(tmp_path / "pareto.png", points, "many")
    with Image.open(tmp_path / "pareto.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    for kind in settings:
        assert ImageColor.getrgb(KIND_COLOURS[kind]) in colours


def test_labels_of_points_do_not_overlap():
    taken = [Box(0, 0, 10, 10)]
    assert Box(9, 9, 12, 12).overlaps_any(taken)
    assert Box(2, 2, 3, 3).overlaps_any(taken)
    assert not Box(10, 0, 12, 10).overlaps_any(taken)
    assert not Box(3, -5, 5, 0).overlaps_any(taken)


def test_pareto_of_no_finite_point(tmp_path):
    draw_pareto(tmp_path / "pareto.png", [ParetoPoint({"k": 8.0}, np.nan, 0.1)], "diverged")
    assert (tmp_path / "pareto.png").exists()
