"""The page of a recording in a headless Chromium, compared with bins and differences by NumPy."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import minsae_jax as ms
from tests.report.test_browser import find, texts, wait
from tests.report.viewing import bins_by_hand, encode_by_hand

pytestmark = pytest.mark.slow
MEMBER = "lambda=1"
N_FEATURES = 3


@pytest.fixture
def page(chromium):
    """A browser that remembers no montage, and whose log is empty after the test."""
    yield chromium
    chromium.execute_script("localStorage.clear()")
    assert chromium.get_log("browser") == []


@pytest.fixture(scope="module")
def recording(trained) -> Path:
    paths = sorted(trained.recordings.glob("*.npy"))
    return max(paths, key=lambda path: len(np.load(path, mmap_mode="r")))


@pytest.fixture(scope="module")
def tokens(trained, recording):
    return encode_by_hand(trained.encoder, trained.sae(MEMBER), np.load(recording))


@pytest.fixture(scope="module")
def features(tokens):
    total = np.sum([token.features for token in tokens], axis=0)
    return np.argsort(-total)[:N_FEATURES].tolist()


@pytest.fixture(scope="module")
def view(trained, recording, features, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("view") / "view.html"
    settings = ms.ViewConfig(
        recording=(str(recording),),
        member=str(trained.run / "members" / MEMBER),
        out=str(out),
        feature=tuple(features),
    )
    ms.view(settings, trained.encoder)
    return out.as_uri()


def visit(page, address):
    page.get("about:blank")
    page.get(address)
    wait(page, "return document.querySelector('#eeg .figure > svg') !== null")


def press(page, *keys):
    page.find_element(By.TAG_NAME, "body").send_keys(*keys)


def state(page, name):
    return page.execute_script(f"return state.{name}")


@pytest.mark.parametrize(("first", "last", "columns"), [(0, 2000, 137), (310, 1290, 980)])
def test_bins_are_the_largest_activations(
    page, view, tokens, features, recording, first, last, columns
):
    visit(page, view)
    n_vars = np.load(recording, mmap_mode="r").shape[1]
    for i, feature in enumerate(features):
        call = f"return Array.from(binned({i}, {first / 100}, {last / 100}, {columns}))"
        levels = np.array(page.execute_script(call)).reshape(n_vars, columns)
        largest = max(token.features[feature] for token in tokens)
        expected = bins_by_hand(tokens, feature, n_vars, first, last, columns)
        assert expected.any()
        np.testing.assert_allclose(levels / 255 * largest, expected, atol=1.01 * largest / 255)


def test_heatmap_is_as_wide_as_its_element_and_dark_where_a_feature_is_active(page, view):
    visit(page, view)
    for i, canvas in enumerate(find(page, ".row canvas")):
        columns, rows, width = page.execute_script(
            "const c = arguments[0]; return [c.width, c.height, c.clientWidth]", canvas
        )
        assert columns == width
        pixels = page.execute_script(
            "const c = arguments[0];"
            "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)",
            canvas,
        )
        shown = f"return Array.from(binned({i}, 0, seconds(), {columns}))"
        levels = np.array(page.execute_script(shown))
        red, green, blue, alpha = np.array(pixels).reshape(rows * columns, 4).T
        np.testing.assert_array_equal(alpha > 0, levels > 0)
        brightness = (red + green + blue)[levels > 0]
        order = np.argsort(levels[levels > 0], kind="stable")
        assert (np.diff(brightness[order]) <= 3).all()


def test_click_shows_the_eeg_there_with_active_tokens_shaded(
    page, view, tokens, features, recording
):
    visit(page, view)
    canvas = find(page, ".row canvas")[1]
    width = canvas.size["width"]
    rate = width / page.execute_script("return seconds()")
    ActionChains(page).move_to_element_with_offset(
        canvas, round(12 * rate - width / 2), 0
    ).click().perform()
    assert state(page, "feature") == 1
    time = state(page, "time")
    assert abs(time - 12) <= 1 / rate
    assert f"f={features[1]}&t={time:.2f}" in page.current_url
    start, stop = page.execute_script("return shownSpan(state.time)")
    assert start == pytest.approx(time - 5)
    begin = round(start * 100)
    in_view = [token for token in tokens if token.start < stop * 100 and token.stop > start * 100]
    cells = page.execute_script(
        "return excerpt(1, state.time).cells.filter((cell) => cell.kind === 'strip')"
    )
    found = {(cell["channels"][0], cell["from"], cell["to"]) for cell in cells}
    # Rounding decides whether a feature is active where it is all but 0.
    expected = {
        (token.channel, token.start / 100, token.stop / 100)
        for token in in_view
        if token.features[features[1]] > 1e-4
    }
    assert expected <= found
    assert len(found - expected) <= 2
    assert len(expected) < len(in_view)
    assert len(expected) > 10
    assert len(find(page, "#eeg rect.strip[opacity]")) == len(cells)
    drawn = page.execute_script("return Array.from(excerpt(1, state.time).others)")
    eeg = np.load(recording)[begin : begin + 1000].T
    np.testing.assert_allclose(np.array(drawn).reshape(eeg.shape) * 0.02, eeg, atol=0.01001)


def test_keys_move_zoom_and_choose(page, view, features, tokens):
    visit(page, view)
    strongest = max(tokens, key=lambda token: token.features[features[0]])
    assert strongest.start / 100 <= state(page, "time") <= strongest.stop / 100
    press(page, "0")
    page.execute_script("update({ time: 8 })")
    press(page, Keys.ARROW_RIGHT)
    assert state(page, "time") == 13
    press(page, Keys.ARROW_DOWN)
    assert state(page, "feature") == 1
    assert [row.get_attribute("class") for row in find(page, ".row")] == [
        "row",
        "row selected",
        "row",
    ]
    press(page, "+")
    length = page.execute_script("return seconds()")
    assert state(page, "to") - state(page, "from") == pytest.approx(max(10, length / 2))
    address = page.current_url
    press(page, "r")
    assert texts(page, ".references [aria-pressed='true']") == ["Bipolar"]
    press(page, Keys.ARROW_UP, "0")
    assert (state(page, "feature"), state(page, "from")) == (0, 0)
    visit(page, address)  # the address restores what was shown
    assert (state(page, "feature"), state(page, "time")) == (1, 13)
    assert state(page, "to") - state(page, "from") == pytest.approx(max(10, length / 2), abs=0.02)


def test_strongest_moments_are_apart_and_in_order(page, view, tokens, features):
    visit(page, view)
    press(page, "n")
    moments = page.execute_script("return peaks.map((p) => places.begin[p])")
    assert abs(state(page, "time") - moments[1]) < 2
    assert all(abs(a - b) >= 10 for i, a in enumerate(moments) for b in moments[:i])
    largest = [
        max(token.features[features[0]] for token in tokens if token.start == round(100 * moment))
        for moment in moments
    ]
    assert all(b <= 1.01 * a for a, b in pairwise(largest))


def test_events_are_bars_on_the_axis(page, view, recording):
    visit(page, view)
    rows = [line.split(",") for line in (recording.parent / "events.csv").read_text().split("\n")]
    events = [row for row in rows if row[0] == recording.name]
    assert len(find(page, "#axis .event-bar")) == len(events) > 0
    kinds = sorted({row[1] for row in events})
    counts = [sum(row[1] == kind for row in events) for kind in kinds]
    expected = [f"{kind} {count}" for kind, count in zip(kinds, counts, strict=True)]
    assert texts(page, "#kinds > span") == expected
