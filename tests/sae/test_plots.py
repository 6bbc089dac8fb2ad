"""The pictures of a run, drawn from its CSV files."""

import numpy as np
import pytest
from PIL import Image

from minsae_jax import UserError
from minsae_jax.sae.config import PlotConfig
from minsae_jax.sae.plots import draw_pareto, plot, read_courses, read_densities

WINDOWS = 70


@pytest.fixture
def run(tmp_path):
    """Two members of 8 and 16 features, of which 3 are never active; a window is 1,000 tokens, but the last 500."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    tokens = np.minimum(1000 * np.arange(1, WINDOWS + 1), 1000 * WINDOWS - 500)
    for name, d_sae in (("lambda=10,d_sae=16", 16), ("lambda=10,d_sae=8", 8)):
        member = folder / "members" / name
        member.mkdir(parents=True)
        metrics = ["step,tokens,loss,mse,l1"]
        active = ["step," + ",".join(f"feat_{i}" for i in range(d_sae))]
        for i, total in enumerate(tokens):
            metrics.append(f"{10 * (i + 1)},{total},1,{1 / (i + 1)},{'nan' if d_sae == 16 else 2}")
            active.append(",".join(map(str, [total, 0, 0, 0, *rng.integers(1, 501, d_sae - 3)])))
        (member / "metrics.csv").write_text("\r\n".join(metrics) + "\r\n", newline="")
        (member / "act_freqs.csv").write_text("\r\n".join(active) + "\r\n", newline="")
    (folder / "config.yaml").write_text("train: {recipe: minsae}")
    return folder


def test_what_is_drawn(run, tmp_path):
    told = plot(PlotConfig(run=str(run)))
    assert "mse_l1.png" in told
    assert sorted(p.name for p in (run / "plots").iterdir()) == ["density.gif", "mse_l1.png"]
    with Image.open(run / "plots/mse_l1.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1320)
    with Image.open(run / "plots/density.gif") as animation:
        assert animation.n_frames == 60
        first = np.asarray(animation.convert("RGB"))
        animation.seek(59)
        last = np.asarray(animation.convert("RGB"))
    differs = (first != last).any(2)
    assert differs.any()
    assert not differs[-40:].any()  # the x axis stays
    plot(PlotConfig(run=str(run), out=str(tmp_path / "elsewhere")))
    assert (tmp_path / "elsewhere/density.gif").read_bytes() == (
        run / "plots/density.gif"
    ).read_bytes()


def test_what_is_read(run):
    courses = read_courses(run / "members")
    assert [course.label for course in courses] == ["d_sae 8", "d_sae 16"]
    assert courses[0].step.tolist() == list(range(10, 710, 10))
    densities = read_densities(courses)
    assert (densities.windows[0], densities.windows[-1], len(densities.windows)) == (
        0,
        WINDOWS - 1,
        60,
    )
    assert (densities.silent == 3).all()
    np.testing.assert_allclose(
        densities.percent.sum(2), np.broadcast_to(100 * (1 - 3 / np.array([8, 16])), (60, 2))
    )
    last = np.loadtxt(run / "members/lambda=10,d_sae=16/act_freqs.csv", delimiter=",", skiprows=1)[
        -1, 4:
    ]
    middles = (densities.edges[1:] + densities.edges[:-1]) / 2
    mean = (middles * densities.percent[-1, 1]).sum() / densities.percent[-1, 1].sum()
    assert mean == pytest.approx(np.log10(last / 500).mean(), abs=0.05)  # half a bin


def test_a_run_that_goes_on(run):
    """Its last rows may not yet be whole, nor there for every member."""
    metrics, active = (
        run / "members/lambda=10,d_sae=8" / name for name in ("metrics.csv", "act_freqs.csv")
    )
    for path, lines in ((metrics, 31), (active, 30)):
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:lines], rows[lines][:4]]))
    courses = read_courses(run / "members")
    assert [len(course.step) for course in courses] == [30, 30]
    assert read_densities(courses).windows.tolist() == list(range(29))
    plot(PlotConfig(run=str(run)))


def test_before_the_first_row(run):
    path = run / "members/lambda=10,d_sae=8/metrics.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has no rows of metrics yet"):
        plot(PlotConfig(run=str(run)))


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("metrics.csv", "step,", "stop,", "it has no column 'step'"),
        ("metrics.csv", "\n20,2000,", "\n20,x,", "invalid literal"),
        ("metrics.csv", "\n20,2000,1,0.5,2", "\n20,2000", "NoneType"),
        ("metrics.csv", "\n20,", "\n10,", "do not grow"),
        ("metrics.csv", "\n20,2000,", "\n20,2500,", "row 2 does not fit"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,1001,", "row 2 does not fit"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,-1,", "row 2 does not fit"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,", "row 2 does not fit"),
        ("act_freqs.csv", "\n2000,0,", "\n2000,\x00,", "invalid literal"),
        ("act_freqs.csv", "", None, "it has 0 rows, but metrics.csv 70"),
    ],
)
def test_damaged_files(run, name, old, new, told):
    path = run / "members/lambda=10,d_sae=8" / name
    text = path.read_text()
    path.write_text("" if new is None else text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"\.csv is damaged \(.*{told}"):
        plot(PlotConfig(run=str(run)))
    assert not (run / "plots").exists()


def test_folders_of_others(run, tmp_path):
    with pytest.raises(UserError, match="is no run: it needs"):
        plot(PlotConfig(run=str(tmp_path)))
    (run / "members/notes").mkdir()
    with pytest.raises(UserError, match="notes is no member's folder"):
        plot(PlotConfig(run=str(run)))


def test_names_are_no_formulas(tmp_path):
    point = {"lambda_sparsity": 1.0, "l0": 5.0, "fvu": 0.1}
    draw_pareto(tmp_path / "pareto.png", {"": [point]}, r"$\frac$")
    assert (tmp_path / "pareto.png").exists()
