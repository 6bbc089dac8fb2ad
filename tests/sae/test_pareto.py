"""The Pareto plot of a run's members."""

import numpy as np
from PIL import Image, ImageColor

from minsae_jax.sae import pareto
from minsae_jax.sae.figures import KIND_COLOURS, make_figure
from minsae_jax.sae.pareto import Box, ParetoPoint, draw_pareto


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


def test_seeds_have_one_label_and_a_line_through_their_means(tmp_path, monkeypatch):
    figure = make_figure(7.0, 5.0)
    monkeypatch.setattr(pareto, "make_figure", lambda *_: figure)
    l0 = {0.5: (88.6, 87.4, 91.2), 1.0: (58.6, 59.6, 63.5), 2.0: (39.6, 42.4, 37.8)}
    points = []
    for lambda_sparsity, values in l0.items():
        for seed, value in enumerate(values):
            hyper = {"lambda_sparsity": lambda_sparsity, "seed": seed}
            points.append(ParetoPoint(hyper, value, 0.03 * lambda_sparsity))
    draw_pareto(tmp_path / "pareto.png", points, "seeds")
    (axes,) = figure.axes
    line, dots = axes.lines
    means = sorted(sum(values) / 3 for values in l0.values())
    np.testing.assert_allclose(line.get_xdata(), means)
    np.testing.assert_allclose(line.get_ydata(), [0.06, 0.03, 0.015])
    assert len(dots.get_xdata()) == 9
    assert sorted(text.get_text() for text in axes.texts) == ["0.5", "1", "2"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert max(box.count_overlaps(boxes) for box in boxes) == 1  # with itself


def test_pareto_of_no_finite_point(tmp_path):
    draw_pareto(tmp_path / "pareto.png", [ParetoPoint({"k": 8.0}, np.nan, 0.1)], "diverged")
    assert (tmp_path / "pareto.png").exists()


def test_legend_of_many_lines_ends_inside_the_picture(tmp_path):
    points = []
    for i in range(200):
        hyper = {"kind": ("relu", "topk")[i % 2], "lr": 1e-3 * (i // 10 % 4 + 1), "seed": i % 10}
        points.append(ParetoPoint(hyper | {"k": float(i // 40)}, 5.0 + i, 0.1))
    draw_pareto(tmp_path / "pareto.png", points, "many")
    picture = np.asarray(Image.open(tmp_path / "pareto.png").convert("L"))
    assert (picture[-10:, -150:] == 255).all()  # where the legend would be cut off
