"""The switch between montages in a headless Chromium, compared with differences by NumPy."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.report.folder import write_pages
from minsae_jax.report.montages import bipolar_chains
from tests.report.made_up import make_cards, make_meta, make_pages
from tests.report.test_browser import find, texts, visit, wait, wait_for_feature

pytestmark = pytest.mark.slow
N = 6
UV = np.linspace(5, 40, 19)
PAIRS = [pair for chain in bipolar_chains(CHANNELS) for pair in chain]
PAIR_NAMES = [f"{CHANNELS[a]}–{CHANNELS[b]}" for a, b in PAIRS]
DRAWN = """
const svg = arguments[0].querySelector(".figure > svg");
const names = [...svg.querySelectorAll(":scope > text")].filter((t) => t.getAttribute("x") === "0");
const rows = [...svg.querySelectorAll("path.trace, path.other")];
const isBar = (path) => path.getAttribute("d").includes("v-");
const bar = [...svg.querySelectorAll("path.axis")].find(isBar);
return [
  names.map((t) => [t.textContent, t.classList.contains("strong")]),
  rows.map((path) => [path.classList.value, path.getAttribute("d")]),
  bar.getAttribute("d"),
  bar.nextElementSibling.textContent,
];
"""
CHOSEN = ".references [aria-pressed='true']"


@pytest.fixture
def page(chromium):
    """A browser that remembers no montage, and whose log is empty after the test."""
    yield chromium
    chromium.execute_script("localStorage.clear()")
    assert chromium.get_log("browser") == []


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    write_pages(folder, make_meta(pages=make_pages(N)), make_cards(N))
    return folder


def in_uv(card):
    """Return a card with the SDs of its channels in µV."""
    examples = []
    for example in card.examples:
        uv = UV[CHANNELS.index(example.channel)]
        others_uv = None if example.others is None else UV
        examples.append(replace(example, uv_per_sd=float(uv), others_uv=others_uv))
    return replace(card, examples=examples)


def choose(page, name):
    next(b for b in find(page, ".references button") if b.text == name).click()


def drawn(page, figure):
    """Return the names of the rows of a figure, and their values in the unit of its scale bar."""
    names, paths, bar, unit = page.execute_script(DRAWN, figure)
    size, unit = unit.split()
    px = float(bar.split("v-")[1]) / float(size)
    signals = {}
    for kind, d in paths:
        y = np.array([float(v) for v in re.findall(r" (-?[\d.]+)", d)])
        signals.setdefault(kind, []).append(-y / px)
    return names, signals, unit, 0.06 / px


def assert_same_course(drawn_row, expected, rounding):
    """Rows have offsets of their own."""
    assert len(drawn_row) == len(expected)
    np.testing.assert_allclose(
        drawn_row - drawn_row.mean(), expected - expected.mean(), atol=2 * rounding
    )


@pytest.mark.parametrize(("unit", "scales"), [("SD", np.ones(19)), ("µV", UV)])
def test_bipolar_rows_are_differences_of_neighbours(page, report, tmp_path, unit, scales):
    cards = [card if unit == "SD" else in_uv(card) for card in make_cards(N)]
    if unit == "µV":
        report = tmp_path / "report"
        write_pages(report, make_meta(), cards)
    visit(page, report, "#f=0&montage=1&reference=bipolar")
    wait_for_feature(page, 0)
    assert texts(page, CHOSEN) == ["Bipolar"]
    notes = " ".join(texts(page, "#feature .note"))
    assert ("differences of SD, not of µV" in notes) == (unit == "SD")
    for figure, example in zip(find(page, "figure"), cards[0].examples, strict=False):
        names, signals, drawn_unit, rounding = drawn(page, figure)
        assert drawn_unit == unit
        assert [name for name, _ in names] == PAIR_NAMES
        own = CHANNELS.index(example.channel)
        is_own = [own in pair for pair in PAIRS]
        assert [strong for _, strong in names] == is_own
        eeg = example.others / 10 * scales[:, None]
        differences = np.array([eeg[a] - eeg[b] for a, b in PAIRS])
        # Those of the token's channel are drawn last.
        others = differences[~np.array(is_own)]
        for row, expected in zip(signals["other"], others, strict=True):
            assert_same_course(row, expected, rounding)
        for row, expected in zip(signals["trace"], differences[is_own], strict=True):
            assert_same_course(row, expected, rounding)


def test_one_channel_is_shown_by_the_pairs_that_it_is_in(page, report):
    """The phase of what is largest at the channel is reversed between them."""
    (card, *_) = make_cards(N)
    visit(page, report, "#f=0&reference=bipolar")
    wait_for_feature(page, 0)
    names, signals, _, rounding = drawn(page, find(page, "figure")[0])
    assert names == [["T5–O1", True], ["P3–O1", True]]
    eeg = card.examples[0].others / 10
    row = CHANNELS.index
    assert card.examples[0].channel == "O1"
    assert_same_course(signals["trace"][0], eeg[row("T5")] - eeg[row("O1")], rounding)
    assert_same_course(signals["trace"][1], eeg[row("P3")] - eeg[row("O1")], rounding)
    assert "other" not in signals


def test_average_reference_is_the_mean_of_channels_with_a_place(page, tmp_path):
    cards = [in_uv(card) for card in make_cards(N)]
    positions = POSITIONS.copy()
    positions[3] = np.nan
    write_pages(tmp_path / "report", make_meta(positions=positions), cards)
    visit(page, tmp_path / "report", "#f=1&montage=1&reference=average")
    wait_for_feature(page, 1)
    names, signals, unit, rounding = drawn(page, find(page, "figure")[2])
    assert [name for name, _ in names] == list(CHANNELS)
    assert unit == "µV"
    example = cards[1].examples[2]
    eeg = example.others / 10 * UV[:, None]
    placed = np.arange(19) != 3
    eeg[placed] -= eeg[placed].mean(axis=0)
    own = CHANNELS.index(example.channel)
    assert_same_course(signals["trace"][0], eeg[own], rounding)
    for row, expected in zip(signals["other"], np.delete(eeg, own, axis=0), strict=True):
        assert_same_course(row, expected, rounding)


def test_recorded_montage_is_in_uv_where_all_channels_are(page, tmp_path):
    cards = [in_uv(card) for card in make_cards(2)]
    write_pages(tmp_path / "report", make_meta(), cards)
    visit(page, tmp_path / "report", "#f=0&montage=1")
    wait_for_feature(page, 0)
    _, signals, unit, rounding = drawn(page, find(page, "figure")[0])
    assert unit == "µV"
    example = cards[0].examples[0]
    own = CHANNELS.index(example.channel)
    assert_same_course(signals["trace"][0], example.trace / 10 * UV[own], rounding)
    rest = np.delete(example.others / 10 * UV[:, None], own, axis=0)
    for row, expected in zip(signals["other"], rest, strict=True):
        assert_same_course(row, expected, rounding)


def test_key_and_address_and_memory(page, report):
    visit(page, report, "#f=0")
    # So that feature 1 is the next one.
    page.execute_script("location.hash = '#sort=id'")
    wait(page, "return !document.querySelector('#index').hidden")
    page.execute_script("location.hash = '#f=0'")
    wait_for_feature(page, 0)
    assert texts(page, CHOSEN) == ["As recorded"]
    body = page.find_element(By.TAG_NAME, "body")
    for hash, name in (
        ("#f=0&reference=bipolar", "Bipolar"),
        ("#f=0&reference=average", "Average"),
        ("#f=0", "As recorded"),
        ("#f=0&reference=bipolar", "Bipolar"),
    ):
        body.send_keys("r")
        wait(page, f"return location.hash === '{hash}'")
        assert texts(page, CHOSEN) == [name]
    body.send_keys(Keys.ARROW_RIGHT)
    wait_for_feature(page, 1)
    assert page.current_url.endswith("#f=1&reference=bipolar")
    # The next visit starts with it, but the address of a page says what is shown there.
    visit(page, report, "#f=0")
    wait_for_feature(page, 0)
    assert texts(page, CHOSEN) == ["As recorded"]
    visit(page, report, "#sort=id")
    find(page, "#rows td.id a")[0].click()
    wait_for_feature(page, 0)
    assert texts(page, CHOSEN) == ["Bipolar"]


def test_examples_of_an_event_have_montages(page, report):
    visit(page, report, "#event=alpha")
    wait(page, "return document.querySelectorAll('#page figure').length === 8")
    choose(page, "Average")
    wait(page, "return location.hash === '#event=alpha&reference=average'")
    assert "Average reference: each channel minus" in " ".join(texts(page, "#page .note"))


def test_montages_without_their_channels_are_not_offered(page, tmp_path):
    positions = np.full((19, 2), np.nan)
    positions[:7] = POSITIONS[:7]
    write_pages(tmp_path / "a", make_meta(bipolar=[], positions=positions), make_cards(1))
    visit(page, tmp_path / "a", "#f=0&reference=bipolar")
    wait_for_feature(page, 0)
    assert not find(page, ".references")
    assert len(find(page, "figure path.other.faint")) == 8 * 18
    page.find_element(By.TAG_NAME, "body").send_keys("r")
    assert page.current_url.endswith("#f=0&reference=bipolar")
    write_pages(tmp_path / "b", make_meta(bipolar=[]), make_cards(1))
    visit(page, tmp_path / "b", "#f=0")
    wait_for_feature(page, 0)
    assert texts(page, ".references button") == ["As recorded", "Average"]


def test_examples_without_the_channels_are_as_recorded(page, tmp_path):
    """The second has one trace only, and the columns of the third may not be the channels."""
    (card,) = make_cards(1)
    first, second, third, *rest = card.examples
    second = replace(second, others=None)
    third = replace(third, channel="column 18")
    card = replace(card, examples=[first, second, third, *rest])
    write_pages(tmp_path / "report", make_meta(), [card])
    visit(page, tmp_path / "report", "#f=0&reference=bipolar")
    wait_for_feature(page, 0)
    figures = find(page, "figure")
    recorded = ["as recorded" in figure.text for figure in figures]
    assert recorded == [False, True, True, *[False] * 5]
    assert len(figures[1].find_elements(By.CSS_SELECTOR, "path.trace")) == 1
    visit(page, tmp_path / "report", "#f=0&montage=1&reference=average")
    wait_for_feature(page, 0)
    names, *_ = drawn(page, find(page, "figure")[2])
    assert names == [[f"column {i}", i == 18] for i in range(1, 20)]


def test_long_montages_have_the_whole_width(page, tmp_path):
    (card,) = make_cards(1)
    examples = [
        replace(
            example,
            trace=np.tile(example.trace, 5),
            others=None if example.others is None else np.tile(example.others, 5),
        )
        for example in card.examples
    ]
    write_pages(tmp_path / "report", make_meta(), [replace(card, examples=examples)])
    places = "return [...document.querySelectorAll('figure')].map((f) => f.offsetLeft)"
    for hash, n_columns in (("#f=0", 2), ("#f=0&montage=1", 1)):
        visit(page, tmp_path / "report", hash)
        wait_for_feature(page, 0)
        assert len(set(page.execute_script(places))) == n_columns
