"""The report as pages in a headless Chromium."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.report.folder import write_pages
from minsae_jax.report.pages import Pages
from tests.report.made_up import make_cards, make_dead_card, make_meta, make_pages, make_row

pytestmark = pytest.mark.slow
N = 40
DEAD = (7, 13)
CUT_OFF = """return [...document.querySelectorAll("#rows td, #titles th")]
    .filter((cell) => cell.className !== "label" && cell.scrollWidth > cell.clientWidth)
    .map((cell) => cell.textContent)"""
SHOWN_COLUMNS = """return [...document.querySelectorAll("#titles th")]
    .filter((cell) => cell.clientWidth).map((cell) => cell.className)"""
COURSES = """return [...document.querySelectorAll("path.trace, path.faint")]
    .map((path) => [path.classList[0], path.getAttribute("d")])"""
HOSTILE = "</script><script>hacked=1</script><img src=x onerror='hacked=1'>\u2028\"'&"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    made = make_pages(N)
    pages = Pages(made.recommendation, members=made.members, events=made.events)
    write_pages(folder, make_meta(pages=pages), make_cards(N, DEAD))
    return folder


@pytest.fixture
def page(chromium):
    """A browser whose log is empty after the test."""
    yield chromium
    assert chromium.get_log("browser") == []


def visit(page, folder, hash=""):
    page.get("about:blank")
    page.get(f"{(folder / 'index.html').as_uri()}{hash}")
    wait(page, "return document.querySelector('main:not([hidden]) h1') !== null")


def wait(page, script):
    """Wait until a script returns a true value, and return it."""
    end = time.monotonic() + 20
    while not (value := page.execute_script(script)):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.02)
    return value


def find(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def texts(page, selector):
    """Return the text of all elements at once, since scrolling replaces rows."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def shown(page):
    """Return the ids of the features whose rows are in the document."""
    return [int(text) for text in texts(page, "#rows td.id")]


def wait_for_feature(page, i):
    wait(page, f"return document.querySelector('#feature .eyebrow')?.textContent === 'Feature {i}'")


def test_index_shows_the_run_and_all_features(page, report):
    visit(page, report)
    assert page.title == "Features of a demo encoder"
    assert "16 patients" in find(page, "#corpus")[0].text
    members = make_pages(N).members
    assert len(find(page, "#overview svg circle.point")) == len(members) + 3  # and the legend
    assert len(find(page, "#overview svg circle.ring")) == 1
    assert "k = 8" in texts(page, "#overview svg text.strong")
    assert len(find(page, "#overview svg rect.bar")) > 3
    notes = find(page, "#notes li")
    assert "2 recordings may have shifted" in notes[0].text
    assert [note.get_attribute("class") for note in notes] == ["warn", ""]
    assert find(page, "#labels")[0].text == str(report / "labels.csv")
    visit(page, report, "#sort=id")
    assert shown(page)[:3] == [0, 1, 2]
    assert "never active" in texts(page, "#rows tr.dead")[0]
    assert texts(page, "#rows td.label")[:2] == [
        "Posterior dominant rhythm",
        "frontal blink, below 4 Hz",
    ]
    assert len(find(page, "#rows td.label .suggestion")) == len(shown(page)) - 1


def test_the_most_active_features_are_first(page, report):
    visit(page, report)
    assert shown(page)[0] == max(make_cards(N, DEAD), key=lambda card: card.density).id
    assert find(page, "#titles th.density")[0].get_attribute("aria-sort") == "descending"
    page.execute_script("scrollTo(0, 1e6)")
    wait(page, f"return [...document.querySelectorAll('#rows tr.dead')].length === {len(DEAD)}")
    assert shown(page)[-2:] == list(DEAD)


def test_sorting(page, report):
    density = {card.id: card.density for card in make_cards(N, DEAD)}
    visit(page, report, "#sort=id")
    button = find(page, "#titles th.density button")[0]
    button.click()
    first = shown(page)
    assert first == sorted(density, key=lambda i: -density[i])[: len(first)]
    assert "#" not in page.current_url  # the order without filters
    button.click()
    assert page.current_url.endswith("#sort=density")
    assert find(page, "#titles th.density")[0].get_attribute("aria-sort") == "ascending"
    assert shown(page) == sorted(density, key=lambda i: density[i])[: len(first)]
    find(page, "#titles th.mean button")[0].click()
    page.execute_script("scrollTo(0, 1e6)")
    wait(page, f"return [...document.querySelectorAll('#rows tr.dead')].length === {len(DEAD)}")
    assert shown(page)[-2:] == list(DEAD)  # without a mean: last, whichever the direction


def test_filters(page, report):
    density = {card.id: card.density for card in make_cards(N, DEAD)}
    visit(page, report, "#sort=id")
    low, high = find(page, "#filters td.density input")
    low.send_keys("0.1")  # percent
    high.send_keys("10")
    assert shown(page) == [i for i, d in density.items() if 0.001 <= d <= 0.1]
    find(page, "#search")[0].send_keys("alpha o1")
    assert shown(page) == [i for i, d in density.items() if 0.001 <= d <= 0.1 and i % 5 == 0]
    assert f"of {N} features" in find(page, "#count")[0].text
    find(page, "#search")[0].send_keys(" no such word")
    assert shown(page) == []
    assert find(page, "#nothing")[0].is_displayed()
    find(page, "#clear")[0].click()
    assert find(page, "#count")[0].text == f"{N} features"
    find(page, "#active")[0].click()
    assert find(page, "#count")[0].text == f"{N - len(DEAD)} of {N} features"


def test_page_of_a_feature(page, report):
    visit(page, report, "#sort=id")
    find(page, "#rows td.density")[0].click()
    wait_for_feature(page, 0)
    assert page.current_url.endswith("#f=0")
    assert page.title == "Feature 0: Posterior dominant rhythm"
    assert not find(page, "#index")[0].is_displayed()
    text = find(page, "#feature")[0].text
    assert "Eyes closed in all examples" in text
    assert "exact only after the last layer" in text
    titles = [h.text for h in find(page, "#feature h3")]
    assert titles == [
        "Channels",
        "Spectrum",
        "Activations",
        "Patients",
        "Position in the window",
        "Nearest features",
        "Active together",
        "Waveform",
        "Artefact hints",
    ]
    for figure in find(page, "#feature .figure"):
        size = figure.find_element(By.TAG_NAME, "svg").size
        assert size["width"] > 200
        assert size["height"] > 100
    assert "NaN" not in page.execute_script("return document.querySelector('#feature').outerHTML")
    assert len(find(page, "circle.dot")) == 19
    assert len(find(page, "path.area")) == 1
    assert len(find(page, ".bars a")) == 5 + 3


def test_examples(page, report):
    visit(page, report, "#sort=id")
    page.execute_script("location.hash = '#f=0'")
    wait_for_feature(page, 0)
    example = next(make_cards(1)).examples[0]
    first = find(page, "figure")[0]
    for word in (
        example.recording,
        "O1",
        f"{example.patch[0]:.2f}–{example.patch[1]:.2f} s",
        "SD",
    ):
        assert word in first.text
    assert len(find(page, "figure")) == 8
    assert len(first.find_elements(By.CSS_SELECTOR, "path.other.faint")) == 18
    assert len(first.find_elements(By.CSS_SELECTOR, "path.trace")) == 1
    assert len(first.find_elements(By.CSS_SELECTOR, "rect.patch")) == 1
    assert len(first.find_elements(By.CSS_SELECTOR, "rect.strip")) > 2

    def tab(name):
        next(b for b in find(page, ".tabs button") if b.text.startswith(name)).click()

    tab("All channels")
    assert "T6" in find(page, "figure")[0].text
    tab("Weak to strong")
    deciles = [c.text for c in find(page, "figcaption .chip:not(.warn)")]
    assert deciles == [f"decile {k}" for k in range(10, 0, -1)]
    assert "CLS token, the whole window" in find(page, "figure")[7].text
    assert len(find(page, "rect.patch")) == 9
    tab("Random")
    assert len(find(page, "figure")) == 10
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    wait_for_feature(page, 1)
    assert (
        find(page, '.tabs [aria-pressed="true"]')[0].text == "Random 10"
    )  # kept for the next feature


def test_navigation(page, report):
    visit(page, report, "#sort=id")
    find(page, "#titles th.id button")[0].click()  # largest number first
    page.execute_script("scrollTo(0, 900)")
    wait(page, "return scrollY === 900")
    find(page, "#rows td.id a")[15].send_keys(Keys.ENTER)
    here = int(
        wait(page, "return document.querySelector('#feature .eyebrow')?.textContent").split()[-1]
    )
    scroll = page.execute_script("return indexScroll")
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_LEFT)
    wait_for_feature(page, here + 1)  # the table's order
    find(page, "#feature .bars a")[0].click()
    wait(page, f"return location.hash === '#f={(here + 1 + 5) % N}'")
    page.back()
    wait_for_feature(page, here + 1)
    page.back()
    wait_for_feature(page, here)
    page.back()
    wait(page, f"return !document.querySelector('#index').hidden && scrollY === {scroll}")
    page.execute_script("location.hash = '#f=3'")
    wait_for_feature(page, 3)
    body.send_keys(Keys.ESCAPE)
    wait(page, "return !document.querySelector('#index').hidden")
    find(page, "#events td.which a")[1].click()
    wait_for_feature(page, 1)


def test_page_of_a_dead_feature(page, report):
    visit(page, report, f"#f={DEAD[0]}")
    wait_for_feature(page, DEAD[0])
    assert find(page, "#feature h1")[0].text == "never active"
    assert [h.text for h in find(page, "#feature h3")] == ["Nearest features"]


def test_unknown_feature_is_reported(page, report):
    visit(page, report, "#f=99999")
    assert find(page, "#feature h1")[0].text == "There is no feature 99999"
    assert not find(page, "#index")[0].is_displayed()


def test_names_are_never_markup(page, tmp_path):
    card = next(make_cards(1))
    examples = [
        replace(e, recording=HOSTILE, patient=HOSTILE, hints=[HOSTILE]) for e in card.examples
    ]
    card = replace(
        card,
        label=HOSTILE,
        note=HOSTILE,
        suggestion=HOSTILE,
        channel=HOSTILE,
        band=HOSTILE,
        examples=examples,
        patient_list=[(HOSTILE, 1.0)],
        artefacts={HOSTILE: 0.5},
        mean=float("nan"),
    )
    names = dict.fromkeys(("title", "run", "member", "encoder", "split", "created_with"), HOSTILE)
    meta = make_meta(**names, pages_rule=HOSTILE, summary=[(HOSTILE, HOSTILE)])
    first, *others = make_pages(1).members
    first = replace(first, name=HOSTILE, setting=HOSTILE, fvu=float("inf"))
    meta = replace(meta, pages=Pages(members=[first, *others]))
    write_pages(tmp_path / "report #1 %41", meta, [card])
    visit(page, tmp_path / "report #1 %41")
    assert page.title == HOSTILE
    assert find(page, "#title")[0].get_attribute("textContent") == HOSTILE
    assert find(page, "#labels")[0].text == str(tmp_path / "report #1 %41/labels.csv")
    find(page, "#rows td.density")[0].click()
    wait_for_feature(page, 0)
    assert find(page, "figcaption .where")[0].get_attribute("textContent") == HOSTILE
    assert find(page, "img") == []
    assert page.execute_script("return typeof hacked") == "undefined"


def test_sixteen_thousand_features_are_sorted_in_a_second(page, tmp_path):
    """`test_131072_features_are_shown` opens more of them."""
    n = 16_384
    density = 10 ** np.random.default_rng(0).uniform(-5, 0, n)
    rows = (make_row(i, density=float(value), channel="O1") for i, value in enumerate(density))
    write_pages(tmp_path / "report", make_meta(), [], rows)
    start = time.monotonic()
    visit(page, tmp_path / "report", "#sort=id")
    assert time.monotonic() - start < 2
    assert len(find(page, "#overview svg rect.bar")) > 3
    assert find(page, "#count")[0].text == f"{n:,} features"
    assert len(find(page, "#rows tr")) < 100
    seconds = page.execute_script(
        "const t = performance.now(); document.querySelector('#titles .density button').click();"
        "return (performance.now() - t) / 1000"
    )
    assert seconds < 1
    assert shown(page)[0] == density.argmax()
    page.execute_script("scrollTo(0, document.documentElement.scrollHeight)")
    wait(
        page,
        "return [...document.querySelectorAll('#rows td.id')].at(-1)?.textContent"
        f" === '{density.argmin()}'",
    )


def test_tokens_over_all_channels(page, tmp_path):
    """Amplitudes in µV, and a map of power without the channel whose place is unknown."""
    (card,) = make_cards(1)
    examples = []
    for example in card.examples:
        others_uv = None if example.others is None else np.full(19, 12.5)
        in_uv = {"uv_per_sd": 12.5, "others_uv": others_uv}
        examples.append(replace(example, channel="all channels", trace_channel="O1", **in_uv))
    positions = POSITIONS.copy()
    positions[3] = np.nan
    meta = make_meta(channel_tokens=False, positions=positions)
    write_pages(tmp_path / "report", meta, [replace(card, examples=examples)])
    visit(page, tmp_path / "report", "#f=0")
    first = find(page, "figure")[0].text
    for word in ("all channels", "shown: O1", "µV"):
        assert word in first
    notes = " ".join(texts(page, "#feature .note"))
    assert "Amplitudes in µV, with the same gain in all panels" in notes
    assert "over its base rate. Tokens are over all channels." in notes
    names = texts(page, "#feature text.channel")
    assert names == [name for i, name in enumerate(CHANNELS) if i != 3]


def test_channels_without_places_are_bars(page, tmp_path):
    (card,) = make_cards(1)
    meta = make_meta(positions=np.zeros((0, 2)))
    write_pages(tmp_path / "report", meta, [card])
    visit(page, tmp_path / "report", "#f=0")
    order = np.argsort(-card.channel_ratio)
    names = texts(page, "#feature aside .bars dt")
    assert names == [CHANNELS[i] for i in order[:12]]


def test_every_feature_of_a_pack_and_those_without_a_page(page, tmp_path):
    without = [make_row(200, density=0.0), make_row(201)]
    meta = make_meta(pages_rule="Pages were written for 200 features.")
    cards = (make_dead_card(i, 200) for i in range(200))
    write_pages(tmp_path / "report", meta, cards, without)
    visit(page, tmp_path / "report", "#f=0")
    for feature in (0, 63, 64, 199, 5):
        page.execute_script(f"location.hash = '#f={feature}'")
        wait_for_feature(page, feature)
    page.execute_script("location.hash = '#f=201'")
    wait_for_feature(page, 201)
    assert "Pages were written for 200 features." in find(page, "#feature")[0].text
    page.execute_script("location.hash = '#f=200'")
    wait_for_feature(page, 200)
    assert find(page, "#feature h1")[0].text == "never active"


def test_events_and_other_features_of_an_example(page, report):
    visit(page, report, "#f=0")
    wait_for_feature(page, 0)
    first = find(page, "figure")[0]
    assert len(first.find_elements(By.CSS_SELECTOR, "rect.event-bar")) == 1
    assert "spindle" in find(page, "#feature .legend")[0].text
    links = first.find_elements(By.CSS_SELECTOR, ".also a")
    assert [link.text for link in links] == ["1", "2"]
    links[0].click()
    wait_for_feature(page, 1)


@pytest.mark.parametrize("uv_per_sd", [12.5, 40.0, 400.0])
def test_size_of_the_gain_is_not_cut_off(page, tmp_path, uv_per_sd):
    card = next(make_cards(1))
    example = replace(card.examples[0], uv_per_sd=uv_per_sd, others=None)
    visit(page, write_one(tmp_path, replace(card, examples=[example])), "#f=0")
    wait_for_feature(page, 0)
    ((right, of_figure),) = page.execute_script(
        "return [...document.querySelectorAll('#feature .gallery svg text')]"
        ".filter((e) => e.textContent.endsWith(' µV'))"
        ".map((e) => [e, e.ownerSVGElement].map((each) => each.getBoundingClientRect().right))"
    )
    assert right <= of_figure


@pytest.mark.parametrize("width", [800, 1000, 1225, 1440])
def test_numbers_of_the_table_are_not_cut_off(page, report, width):
    page.set_window_size(width, 760)
    visit(page, report)
    assert page.execute_script(CUT_OFF) == []
    assert {"density", "channel"} <= set(page.execute_script(SHOWN_COLUMNS))
    page.set_window_size(1280, 900)


def write_one(folder: Path, card, **changes) -> Path:
    write_pages(folder / "report", make_meta(pages=make_pages(N), **changes), [card])
    return folder / "report"


def test_samples_of_other_channels_are_drawn_at_their_times(page, tmp_path):
    """A peak at sample 300 of 538, on a channel at 256 Hz and on others at a fifth of that rate."""
    card = next(make_cards(1))
    trace = np.zeros(538, np.int8)
    trace[300] = 100
    others = np.zeros((19, 108), np.int8)
    others[:, 60] = 100
    example = replace(card.examples[0], trace=trace, others=others, events=[])
    folder = write_one(tmp_path, replace(card, examples=[example]), sampling_rate=256)
    visit(page, folder, "#f=0")
    wait_for_feature(page, 0)
    peaks = {}
    for kind, d in page.execute_script(COURSES):
        points = [point.split() for point in d[1:].split("L")]
        x, y = np.array(points, float).T
        peaks.setdefault(kind, []).append(x[y.argmin()])
    assert len(peaks["other"]) == 18
    np.testing.assert_allclose(peaks["other"], peaks["trace"][0], atol=0.11)


def test_scale_of_channels_says_where_ratios_are_beyond_it(page, tmp_path):
    card = next(make_cards(1))
    one = np.zeros(19)
    one[3] = 19.0
    folder = write_one(tmp_path, replace(card, channel_ratio=one, channel="F3"))
    visit(page, folder, "#f=0")
    wait_for_feature(page, 0)
    assert {"≥×8", "×1", "≤×1/8"} <= set(texts(page, "aside svg text"))


def test_unknown_ratios_of_channels_have_no_map(page, tmp_path):
    card = next(make_cards(1))
    folder = write_one(
        tmp_path, replace(card, channel_ratio=np.zeros(19), channel="", artefacts={})
    )
    visit(page, folder, "#f=0")
    wait_for_feature(page, 0)
    titles = texts(page, "#feature h3")
    assert "Spectrum" in titles
    assert not {"Channels", "Artefact hints"} & set(titles)


def test_printed_pages_are_complete(page, report):
    """Paper is narrower than the window, and nothing is drawn again for it."""
    visit(page, report, "#f=0")
    wait_for_feature(page, 0)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        page.execute_script("document.body.style.width = '700px'")
        cut = page.execute_script(
            """return [...document.querySelectorAll("#feature .figure")].filter((node) =>
                node.firstChild.getBoundingClientRect().width > node.clientWidth + 1).length"""
        )
        assert cut == 0
        visit(page, report)
        page.execute_script("scrollTo(0, 1e6)")
        # As high as all rows that are not in the document.
        spacers = (
            "return [...document.querySelectorAll('#rows .spacer')].map((r) => r.clientHeight)"
        )
        assert page.execute_script(spacers) == [0, 0]
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
