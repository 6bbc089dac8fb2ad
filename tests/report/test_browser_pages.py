"""The report's pages of events, labels and members in a headless Chromium, and what it exports."""

import csv
import io
import json
import subprocess
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import minsae_jax as ms
from minsae_jax.report.folder import write_pages
from minsae_jax.report.pages import Pages
from tests.report.made_up import (
    EVENTS,
    make_cards,
    make_dead_card,
    make_meta,
    make_pages,
    make_score,
    with_findings,
)
from tests.report.reading import read_script
from tests.report.test_browser import HOSTILE, find, shown, texts, visit, wait, wait_for_feature

pytestmark = pytest.mark.slow
N = 40
DEAD = (7, 13)
SVG = "{http://www.w3.org/2000/svg}"
VIEWS = ("", "#f=1", "#event=spindle", "#label=age", "#members")


def make_findings():
    for card in make_cards(N, DEAD):
        yield with_findings(card) if card.density else card


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    meta = make_meta(member="topk,k=8", pages=make_pages(N))
    write_pages(folder, meta, make_findings())
    return folder


@pytest.fixture
def page(chromium):
    """A browser whose log is empty after the test."""
    yield chromium
    assert chromium.get_log("browser") == []


def heading(page):
    return texts(page, "main:not([hidden]) h1")[0]


def table(page, selector):
    """Return the texts of a table's cells by row."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.trim()))",
        selector,
    )


def press(page, key):
    page.find_element(By.TAG_NAME, "body").send_keys(key)


def downloaded(page, folder, click):
    """Return name and text of the file that a click saves."""
    folder.mkdir()
    page.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    click()
    end = time.monotonic() + 20
    while True:
        files = [p for p in folder.iterdir() if p.suffix in (".csv", ".svg")]
        if files and files[0].stat().st_size:
            return files[0].name, files[0].read_bytes().decode()
        assert time.monotonic() < end, "no file was saved"
        time.sleep(0.05)


def test_overview_shows_the_recommendation(page, report):
    visit(page, report)
    pages = make_pages(N)
    recommendation = pages.recommendation
    text = find(page, "#recommended")[0].text
    for words in (recommendation.reason, pages.rule, pages.as_good, *recommendation.runners_up):
        assert words in text
    assert recommendation.warnings[recommendation.member][0] in text
    assert "This report is about" not in text
    assert find(page, "#overview path.curve.pca")


def test_overview_compares_features_with_their_baselines_by_event(page, report):
    visit(page, report)
    titles, *rows = table(page, "#events")
    assert titles[0] == "Event"
    assert titles[3:] == [
        "AUC",
        "0.5 to 1",
        "Recall",
        "Token AUC",
        "Precision",
        "Pure",
        "Probe, 2",
        "Probe, 5",
    ]
    assert len(rows) == 3 * (len(EVENTS) + 1)
    scores = make_pages(N).events[0].scores
    kind, name, best, auc, _, recall, token_auc, precision, pure, probe_2, probe_5 = rows[0]
    assert (kind, name, best) == ("alpha83 test events", "SAE feature", "4 tied")
    assert auc == f"{scores['sae'].auc.value:.3f} 0.960–1.000"
    assert token_auc == "0.690"
    assert probe_2 == "0.994 0.970–1.000"
    assert probe_5.startswith("0.998 0.98")
    assert [recall, precision, pure] == ["97 %", "98 %", str(scores["sae"].pure_features)]
    assert rows[1][0] == "raw dimension"
    assert rows[2][0] == "principal component"
    assert rows[-3][0] == "mean over kinds"
    assert rows[3][2].startswith("1 ")


def test_parts_without_data_are_left_out(page, tmp_path):
    (card,) = make_cards(1)
    examples = [replace(example, events=[], other_features=[]) for example in card.examples]
    cards = [replace(card, examples=examples)]
    write_pages(tmp_path / "report", make_meta(pages=Pages()), cards)
    visit(page, tmp_path / "report")
    for part in ("#recommended", "#events", "#by-label"):
        assert not find(page, part)[0].is_displayed()
    titles = texts(page, "#titles th")
    assert "Seeds" not in titles
    assert "Event" not in titles
    visit(page, tmp_path / "report", "#f=0")
    wait_for_feature(page, 0)
    assert find(page, "#feature .badge, #feature .legend, #feature .also") == []
    assert "What else explains it" not in texts(page, "#feature h3")


def test_the_best_detectors_of_events_are_first(page, tmp_path):
    """Then features that detect no event, the most active first; inactive ones are last."""
    active = [card for card in make_findings() if card.density]
    detectors = active[::2]
    others = [replace(card, events=[make_score("spike", card.id, 0.7)]) for card in active[1::2]]
    dead = [make_dead_card(i, N) for i in DEAD]
    cards = sorted([*detectors, *others, *dead], key=lambda card: card.id)
    write_pages(tmp_path / "report", make_meta(pages=make_pages(N)), cards)
    visit(page, tmp_path / "report")
    expected = sorted(detectors, key=lambda card: -max(event.auc for event in card.events))
    expected += sorted(others, key=lambda card: -card.density)
    order = page.execute_script("return shown.map((feature) => feature.id)")
    assert order == [card.id for card in [*expected, *dead]]
    assert shown(page) == order[: len(shown(page))]
    assert find(page, "#titles th.event_auc")[0].get_attribute("aria-sort") == "descending"


def test_search_and_columns_of_events_and_seeds(page, report):
    visit(page, report, "#sort=id")
    find(page, "#search")[0].send_keys("spike")
    spike = EVENTS.index("spike")
    assert shown(page) == [i for i in range(N) if i % 6 == spike and i not in DEAD]
    assert set(texts(page, "#rows td.event")) == {"spike"}
    assert find(page, "#rows td.seeds .dots i.on")


def test_a_feature_of_two_kinds_of_events_is_found_by_both(page, tmp_path):
    """The kind with the highest AUC need not be the one that the feature is about."""
    cards = [with_findings(card) for card in make_cards(2)]
    scores = [make_score(kind, 0, auc) for kind, auc in (("blink", 0.99), ("spike", 0.97))]
    cards[0] = replace(cards[0], events=[*scores, make_score("muscle", 0, 0.79)])
    write_pages(tmp_path / "report", make_meta(pages=make_pages(2)), cards)
    visit(page, tmp_path / "report", "#sort=id")
    assert texts(page, "#rows td.event")[0] == "blink +1"
    for kind, found in (("spike", [0]), ("blink", [0, 1]), ("muscle", [])):
        search = find(page, "#search")[0]
        search.clear()
        search.send_keys(kind)
        assert shown(page) == found
    visit(page, tmp_path / "report", "#f=0")
    wait_for_feature(page, 0)
    badges = texts(page, "#feature .badge")[1:]
    assert badges == ["blink, AUC 0.990", "spike, AUC 0.970"]


def test_filters_and_order_are_in_the_address(page, report):
    visit(page, report)
    find(page, "#search")[0].send_keys("o1")
    find(page, "#filters td.density input")[0].send_keys("0.1")
    find(page, "#active")[0].click()
    find(page, "#titles th.max button")[0].click()
    first = shown(page)
    address = page.current_url
    assert address.endswith("#q=o1&density.min=0.1&active=1&sort=-max")
    visit(page, report, address[address.index("#") :])
    assert shown(page) == first
    assert find(page, "#search")[0].get_attribute("value") == "o1"
    find(page, "#rows td.density")[0].click()
    wait_for_feature(page, first[0])
    assert f"1 of {len(first)}" in find(page, "#feature nav")[0].text
    press(page, Keys.ARROW_RIGHT)
    wait_for_feature(page, first[1])
    press(page, Keys.ESCAPE)
    wait(page, "return !document.querySelector('#index').hidden")
    assert page.current_url == address
    find(page, "#clear")[0].click()
    assert len(find(page, "#rows td.id")) > len(first)
    assert "#" not in page.current_url


def test_page_of_an_event_of_few_val_patients(page, report):
    visit(page, report, "#event=blink")
    assert make_pages(N).events[1].scores["sae"].n_ties is None
    lead = texts(page, "#page .lead")[0]
    assert "it is unknown which other features could be the best one" in lead
    assert not find(page, "#page tr.marked")


def test_page_of_an_event(page, report):
    visit(page, report, "#event=alpha")
    event = make_pages(N).events[0]
    assert heading(page) == "alpha"
    lead = texts(page, "#page .lead")[0]
    assert "Feature 0 separates events from spans without one with an AUC of 0.990" in lead
    assert "By the val patients, the best one can be any of 4 features" in lead
    assert "The AUC of feature 0 is 0.012 below that of the random encoder's best feature" in lead
    assert "(95 % interval of the difference −0.052 to 0.018)" in lead
    titles, *rows = table(page, "#page table:not(.scores)")
    assert titles == ["Feature", "Seeds", "AUC, val", "AUC, test", "Recall", "Precision", "Density"]
    assert [int(row[0].split()[0]) for row in rows] == [f.feature for f in event.features]
    assert len(find(page, "#page tr.marked")) == 4
    assert [h.text for h in find(page, "#page .cards h3")] == [
        "Probes of events",
        "Waveform",
        "Bands",
    ]
    assert len(find(page, "#page rect.group")) == 3 * (len(EVENTS) + 5)
    wait(page, "return document.querySelectorAll('#page figure').length === 8")
    find(page, "#page th:nth-child(4) button")[-1].click()
    find(page, "#page table:not(.scores) th:nth-child(4) button")[0].click()
    assert page.current_url.endswith("#event=alpha&sort=auc")
    assert [row[0] for row in table(page, "#page table:not(.scores)")[1:]] == [
        row[0] for row in rows[::-1]
    ]
    press(page, Keys.ARROW_RIGHT)
    wait(page, "return document.title === 'Event: blink'")
    press(page, Keys.ESCAPE)
    wait(page, "return !document.querySelector('#index').hidden")


def test_baselines_that_are_better_are_named(page, report):
    visit(page, report, "#event=slow%20wave")
    assert heading(page) == "slow wave"
    assert "The best principal component does as well or better." in texts(page, "#page .lead")[0]
    assert not find(page, "#page .cards")


def test_page_of_a_label(page, report):
    visit(page, report)
    find(page, "#by-label a")[0].click()
    wait(page, "return document.title === 'Label: age'")
    lead, notes = texts(page, "#page .lead")[0], " ".join(texts(page, "#page .note"))
    assert lead.startswith(f"Of {N} features tested with patients as the unit, 3 are associated")
    assert "Features predict age better than permuted labels do" in notes
    assert "less well than raw dimensions" in notes
    warned = find(page, "#page .chip.warn")
    assert [chip.text for chip in warned] == ["42 %"]
    press(page, Keys.ARROW_RIGHT)
    wait(page, "return document.title === 'Label: sex'")
    assert "none is associated with sex" in texts(page, "#page .lead")[0]
    notes = " ".join(texts(page, "#page .note"))
    assert "Features do not predict sex better than permuted labels do." in notes
    assert "2 patients without a value are left out." in notes


def test_comparison_of_members(page, report):
    visit(page, report, "#members")
    members = make_pages(N).members
    titles, *rows = table(page, "#page > section")
    assert len(rows) == len(members)
    assert titles[:3] == ["Member", "L0", "FVU"]
    (marked,) = find(page, "#page tr.marked")
    assert marked.text.startswith("topk,k=8 recommended this report")
    assert len(find(page, "#page .pair svg circle.point")) == len(members) + 3  # and the legend
    assert len(find(page, "#page .pair svg .ring")) == 1
    assert len(find(page, "#page .pair svg path.curve")) == 3  # of two kinds and of PCA
    Select(find(page, "[data-axis=y]")[0]).select_by_visible_text("Bits")
    wait(page, "return location.hash === '#members&y=description_bits'")
    labels = texts(page, "#page .pair svg text.label")
    assert any(label.startswith("Bits") for label in labels)
    Select(find(page, "[data-member=b]")[0]).select_by_visible_text("pca,k=8")
    assert "b=pca%2Ck%3D8" in page.current_url
    sides = {row[0]: row[1:] for row in table(page, "#page .two") if len(row) == 3}
    assert sides["Stability, %"] == ["15.0", "–"]
    assert sides["FVU"] == ["0.0360", "0.0531"]
    assert sides["Loss recovered, %"] == ["96.9 95.9–97.7", "96.9 95.9–97.7"]
    find(page, "#page > section th button")[1].click()
    address = page.current_url
    assert address.endswith("#members&y=description_bits&b=pca%2Ck%3D8&sort=-l0")
    visit(page, report, address[address.index("#") :])
    assert [row[1] for row in table(page, "#page > section")[1:4]] == ["32", "32", "32"]
    assert {row[0]: row[1:] for row in table(page, "#page .two") if len(row) == 3} == sides


def test_a_single_member_is_shown(page, tmp_path):
    """A run of one SAE, without principal components."""
    pages = replace(make_pages(N), members=make_pages(N).members[:1])
    write_pages(tmp_path / "report", make_meta(pages=pages), [make_dead_card(0, 1)])
    visit(page, tmp_path / "report", "#members")
    assert len(table(page, "#page > section")) == 1 + 1
    assert len(find(page, "#page .pair svg circle.point")) == 2  # one of the legend


def test_names_of_members_in_a_plot_do_not_overlap(page, tmp_path):
    """Those of seeds, which are long and of neighbouring points."""
    pages = make_pages(1)
    members = [
        replace(
            member, l0=member.l0 + 0.3 * seed, setting=f"target L0 = {member.l0:g}, seed {seed}"
        )
        for member in pages.members
        for seed in range(3)
    ]
    write_pages(
        tmp_path / "report",
        make_meta(pages=replace(pages, members=members)),
        [make_dead_card(0, 1)],
    )
    visit(page, tmp_path / "report", "#members")
    boxes = [name.rect for name in find(page, "#page .pair svg text.halo")]
    assert len(boxes) > 3
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
            down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
            assert across < 2 or down < 5


def test_findings_on_the_page_of_a_feature(page, report):
    visit(page, report, "#f=1")
    wait_for_feature(page, 1)
    card = next(card for card in make_findings() if card.id == 1)
    badges = texts(page, "#feature .badge")
    assert badges[0] == "found with 2 of 3 seeds"
    assert badges[1].startswith("blink, AUC 0.")
    titles = texts(page, "#feature .columns h3")
    assert titles[:4] == ["What else explains it", "Events", "Labels", "Other seeds"]
    seeds = [cell.text for cell in find(page, "#feature .columns td[title*='seed=']")]
    assert seeds == ["seed=1", "seed=2"]
    (warning,) = texts(page, "#feature .warning")
    assert warning == (
        "It may mark the patient rather than what happens in the EEG. "
        "61 % of its activation is from demo007."
    )
    bands = [span for e in card.examples for span in e.events if e.group == "top"]
    assert len(find(page, "#feature rect.event-bar")) == len(bands)
    assert len(find(page, "#feature rect.event-band")) == 8
    assert texts(page, "#feature .legend a") == ["blink"]
    assert texts(page, "figure:first-child .also a") == ["4", "7", "10"]
    find(page, "#feature .columns a[href='#label=age']")[0].click()
    wait(page, "return document.title === 'Label: age'")
    visit(page, report, "#f=2")
    wait_for_feature(page, 2)
    assert find(page, "#feature .warning") == []


def test_traces_of_a_gallery_have_the_same_gain(page, report):
    """The bar of 2 SD is equally long in all panels."""
    visit(page, report, "#f=3")
    wait_for_feature(page, 3)
    lengths = page.execute_script(
        "return [...document.querySelectorAll('figure svg > text')]"
        ".filter((t) => t.textContent.endsWith(' SD'))"
        ".map((t) => t.textContent + t.previousElementSibling.getAttribute('d').split('v')[1])"
    )
    assert len(lengths) == 8
    assert len(set(lengths)) == 1
    assert "the same gain in all panels" in texts(page, "#feature .note")[0]


def test_chosen_examples_are_in_the_address(page, report):
    visit(page, report, "#f=2&show=q&montage=1")
    wait_for_feature(page, 2)
    pressed = '.tabs [aria-pressed="true"]'
    assert texts(page, pressed) == ["Weak to strong 10"]  # these have no montage
    find(page, ".tabs button")[0].click()
    wait(page, "return location.hash === '#f=2&montage=1'")
    assert texts(page, pressed) == ["Strongest 8", "All channels", "As recorded"]
    find(page, ".tabs button")[3].click()
    wait(page, "return location.hash === '#f=2'")


def test_examples_are_saved_as_csv(page, report, tmp_path):
    visit(page, report, "#f=1")
    wait_for_feature(page, 1)
    card = next(card for card in make_findings() if card.id == 1)
    name, text = downloaded(page, tmp_path / "csv", find(page, "#feature .link")[0].click)
    assert name == "feature-1-examples.csv"
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(card.examples)
    assert Counter(row["group"] for row in rows)["top"] == 8
    for row, example in zip(rows, card.examples, strict=True):
        assert row["recording"] == example.recording
        assert row["channel"] == example.channel
        np.testing.assert_allclose(float(row["activation"]), example.activation, rtol=1e-3)
        assert row["other_features"] == "4 7 10"
        assert row["events"].startswith("blink ")
        assert (row["patch_start_s"] == "") == (example.patch is None)


def test_figures_are_saved_as_svg(page, report, tmp_path):
    """The file has the drawn paths, and colours of its own instead of the page's style sheet."""
    visit(page, report, "#f=1")
    wait_for_feature(page, 1)
    (card,) = (c for c in find(page, "#feature .card") if c.text.startswith("Spectrum"))
    drawn = card.find_element(By.CSS_SELECTOR, "path.curve").get_attribute("d")
    save = card.find_element(By.CSS_SELECTOR, ".save")
    name, text = downloaded(
        page, tmp_path / "svg", lambda: page.execute_script("arguments[0].click()", save)
    )
    assert name.startswith("feature-1-")
    assert name.endswith("spectrum.svg")
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    (curve,) = (p for p in root.iter(f"{SVG}path") if p.get("class") == "curve")
    assert curve.get("d") == drawn
    assert "stroke:rgb(42, 111, 151)" in curve.get("style").replace("; ", ";")
    assert "frequency [Hz]" in [t.text for t in root.iter(f"{SVG}text")]


def test_keys(page, report):
    visit(page, report, "#event=blink")
    press(page, "?")
    wait(page, "return document.querySelector('#help').open")
    press(page, Keys.ARROW_RIGHT)
    press(page, Keys.ESCAPE)
    wait(page, "return !document.querySelector('#help').open")
    assert page.title == "Event: blink"
    press(page, "/")
    wait(page, "return document.activeElement.id === 'search'")
    assert find(page, "#index")[0].is_displayed()
    find(page, "#search")[0].send_keys("m?")
    assert not page.execute_script("return document.querySelector('#help').open")
    find(page, "#search")[0].send_keys(Keys.ESCAPE)
    press(page, "m")
    wait(page, "return document.title === 'Members'")


def test_command_for_the_whole_recording(page, tmp_path):
    """A shell reads the paths in it as they are, and the address shows the example."""
    member = "/data/Ann's runs/a b/members/lambda=5,lr=5e-05"
    encoder_flags = ["--checkpoint_path", "/data/my encoder"]
    meta = make_meta(member_folder=member, recordings="/data/my EEG", encoder_flags=encoder_flags)
    card = with_findings(next(make_cards(1)))
    write_pages(tmp_path / "report", meta, [card])
    visit(page, tmp_path / "report", "#f=0")
    wait_for_feature(page, 0)
    find(page, "figcaption button")[0].click()
    example = card.examples[0]
    expected = ["minsae", "view", f"/data/my EEG/{example.recording}"]
    expected += ["--member", member, *encoder_flags, "--feature", "0", "--out", "views"]
    script = "printf '%s\\n' " + texts(page, "#view-command")[0]
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == expected
    middle = sum(example.patch) / 2
    address, second = texts(page, "#view-page")[0].split("&t=")
    assert address == f"views/{example.recording.removesuffix('.npy')}.html#f=0"
    assert float(second) == pytest.approx(middle, abs=0.01)
    press(page, Keys.ESCAPE)
    wait(page, "return !document.querySelector('#whole').open")
    assert page.title.startswith("Feature 0")


def test_whole_recording_of_an_encoder_that_no_flag_names(page, tmp_path):
    meta = make_meta(member_folder="/runs/a", recordings="/data/my EEG", view_in_python=True)
    card = with_findings(next(make_cards(1)))
    write_pages(tmp_path / "report", meta, [card])
    visit(page, tmp_path / "report", "#f=0")
    wait_for_feature(page, 0)
    find(page, "figcaption button")[0].click()
    configs = []
    names = {"ms": ms, "encoder": "mine"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms, "view", lambda config, encoder: configs.append((config, encoder)))
        exec(texts(page, "#view-command")[0], names)
    expected = ms.ViewConfig(
        recording=(f"/data/my EEG/{card.examples[0].recording}",),
        member="/runs/a",
        feature=(0,),
        out="views",
    )
    assert configs == [(expected, "mine")]


def test_broadband_is_explained(page, tmp_path):
    cards = list(make_cards(2))
    cards = [
        replace(card, band=band) for card, band in zip(cards, ("alpha", "broadband"), strict=True)
    ]
    write_pages(tmp_path / "report", make_meta(), cards)
    for feature, is_explained in ((0, False), (1, True)):
        visit(page, tmp_path / "report", f"#f={feature}")
        wait_for_feature(page, feature)
        text = find(page, "#feature")[0].text
        assert ("Broadband: no band stands out." in text) == is_explained


def test_bands_of_the_spectrum_are_as_wide_as_their_frequencies(page, report):
    visit(page, report, "#f=1")
    wait_for_feature(page, 1)
    widths = page.execute_script(
        "return [...document.querySelectorAll('svg rect.band')]"
        ".map((band) => band.getBoundingClientRect().width)"
    )
    hz = [high - low for _, low, high in make_meta().bands][::2]
    # Bands are in the order in which they were put before the others.
    assert np.divide(widths[::-1], widths[-1]) == pytest.approx(np.divide(hz, hz[0]), rel=0.01)


@pytest.mark.parametrize("hash", ["#event=none", "#label=none"])
def test_unknown_pages_are_reported(page, report, hash):
    visit(page, report, hash)
    assert heading(page).startswith("There is no ")
    find(page, "#page nav a")[0].click()
    wait(page, "return !document.querySelector('#index').hidden")


# The scheme changes colours alone.
@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (1280, "light"), (1920, "light"), (390, "dark")]
)
def test_pages_fit_their_width(page, report, width, scheme):
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for hash in VIEWS:
            visit(page, report, hash)
            scroll = page.execute_script("return document.documentElement.scrollWidth")
            assert scroll <= width, hash
            wait(page, "return document.querySelectorAll('main:not([hidden]) svg').length")
            drawn = find(page, "main:not([hidden])")[0]
            for word in ("NaN", "undefined", "[object"):
                assert word not in drawn.get_attribute("outerHTML")
            assert "null" not in drawn.text
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_names_in_findings_are_never_markup(page, tmp_path):
    pages = make_pages(N)
    event = replace(pages.events[0], kind=HOSTILE)
    label = replace(pages.labels[0], name=HOSTILE, values=HOSTILE, notes=[HOSTILE])
    member = replace(pages.members[0], name=HOSTILE)
    warned = replace(pages.recommendation, warnings={HOSTILE: (HOSTILE,)})
    members = [member, *pages.members[1:]]
    pages = replace(pages, recommendation=warned, events=[event], labels=[label], members=members)
    write_pages(tmp_path / "report", make_meta(pages=pages), make_findings())
    visit(page, tmp_path / "report")
    find(page, "#events th a")[0].click()
    wait(page, "return !document.querySelector('#page').hidden")
    assert heading(page) == HOSTILE
    visit(page, tmp_path / "report")
    find(page, "#by-label a")[0].click()
    wait(page, "return !document.querySelector('#page').hidden")
    assert heading(page) == HOSTILE
    visit(page, tmp_path / "report", "#members")
    assert find(page, "img") == []
    assert page.execute_script("return typeof hacked") == "undefined"


def test_131072_features_are_shown(page, tmp_path):
    """So many arguments of a function would be an error."""
    folder = tmp_path / "report"
    write_pages(folder, make_meta(pages=make_pages(N)), [make_dead_card(0, 1)])
    n = 131_072
    density = 10 ** np.random.default_rng(0).uniform(-5, 0, n)
    index = read_script(folder / "index_data.js")
    row = dict(zip(index["columns"], index["rows"][0], strict=True))
    rows = [list((row | {"id": i, "density": float(x)}).values()) for i, x in enumerate(density)]
    (folder / "index_data.js").write_text(f"receive({json.dumps(index | {'rows': rows})});\n")
    start = time.monotonic()
    visit(page, folder, "#sort=id")
    wait(page, "return document.querySelectorAll('#rows td.id').length > 10")
    assert time.monotonic() - start < 8
    assert find(page, "#count")[0].text == f"{n:,} features"
    assert len(find(page, "#overview rect.bar")) == 10  # half decades from 1e-5 to 1
    find(page, "#titles .density button")[0].click()
    assert shown(page)[0] == density.argmax()
