"""The report as files, and as a page in a headless Chromium."""

import base64
import json
import time
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from minsae_jax.errors import UserError
from minsae_jax.report.page import write_report
from tests.report import made_up

N, DEAD = 40, (7, 13)
HOSTILE = "</script><script>hacked=1</script><img src=x onerror='hacked=1'>\u2028\"'&"


def read(script: Path):
    def refuse(constant):
        raise ValueError(f"{script} has {constant}, which is no JSON")

    text = script.read_text()
    assert text.startswith("receive(")
    assert text.endswith(");\n")
    return json.loads(text[len("receive(") : -len(");\n")], parse_constant=refuse)


def small(**changes):
    """Features that take little time to make, with what the table shows."""
    return (
        made_up.dead_feature(0, 1)
        | {"density": 0.01, "mean": 1.0, "max": 2.0, "channel": "O1", "band": "alpha"}
        | changes
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    write_report(folder, made_up.meta(), made_up.features(N, DEAD))
    return folder


def test_files(report):
    assert {p.name for p in report.iterdir()} == {
        "index.html", "report.css", "report.js", "figures.js", "index_data.js", "data",
    }  # fmt: skip
    assert [p.name for p in report.parent.iterdir()] == ["report"]
    assert {p.name for p in (report / "data").iterdir()} == {f"f{i:05d}.js" for i in range(N)}
    index = read(report / "index_data.js")
    assert len(index["meta"]["positions"]) == 19
    for row, feature in zip(index["rows"], made_up.features(N, DEAD), strict=True):
        own = read(report / f"data/f{feature['id']:05d}.js")
        assert row == [own[name] for name in index["columns"]]
        assert len(own["examples"]) == len(feature["examples"])
        for written, example in zip(own["examples"], feature["examples"], strict=True):
            assert abs(written["start"] - example["start"]) < 0.006
            np.testing.assert_allclose(written["strip"], example["strip"], rtol=1e-3)
            for name in ("trace", "others"):
                if example[name] is None:
                    assert written[name] is None
                else:
                    values = np.frombuffer(base64.b64decode(written[name]), np.int8)
                    np.testing.assert_array_equal(values, example[name].ravel())


def test_nothing_comes_from_elsewhere(report):
    for name in ("index.html", "report.css", "report.js", "figures.js"):
        for word in ("https:", "//cdn", "@import", "fetch(", "innerHTML"):
            assert word not in (report / name).read_text()


def test_a_thousand_features_are_small(report):
    size = sum(p.stat().st_size for p in (report / "data").iterdir())
    assert size / (N - len(DEAD)) * 1024 < 60e6


def test_rewriting_keeps_labels(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "labels.csv").write_text("feature,label,note\n")  # written before the first report
    write_report(folder, made_up.meta(), [small(id=i) for i in range(5)])
    (folder / "labels.csv").write_text("feature,label,note\n3,spindle,\n")
    (folder / "labels.csv.backup").write_text("mine")
    write_report(folder, made_up.meta(), [small(id=i) for i in range(3)])
    assert (folder / "labels.csv").read_text() == "feature,label,note\n3,spindle,\n"
    assert (folder / "labels.csv.backup").read_text() == "mine"
    assert (
        len(list((folder / "data").iterdir())) == len(read(folder / "index_data.js")["rows"]) == 3
    )
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_failure_leaves_the_older_report(tmp_path):
    folder = tmp_path / "report"
    write_report(folder, made_up.meta(title="older"), [small(id=0)])

    def broken():
        yield small(id=0)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        write_report(folder, made_up.meta(title="newer"), broken())
    assert read(folder / "index_data.js")["meta"]["title"] == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_killed_between_the_renames(tmp_path):
    folder = tmp_path / "report"
    write_report(folder, made_up.meta(), [small(id=0)])
    (folder / "labels.csv").write_text("mine")
    folder.rename(tmp_path / ".report.old")
    write_report(folder, made_up.meta(), [small(id=0)])
    assert (folder / "labels.csv").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_no_other_folder_is_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no report"):
        write_report(tmp_path, made_up.meta(), [small(id=0)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# The page


@pytest.fixture
def page(chromium):
    """A browser that has nothing to complain about in the end."""
    yield chromium
    assert chromium.get_log("browser") == []


def visit(page, folder, hash=""):
    page.get("about:blank")
    page.get(f"{(folder / 'index.html').as_uri()}{hash}")
    wait(
        page,
        "return !document.querySelector('#index').hidden || document.querySelector('#feature h1') !== null",
    )


def wait(page, script):
    """Until a script returns something true, which is returned."""
    end = time.monotonic() + 20
    while not (value := page.execute_script(script)):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.02)
    return value


def find(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def texts(page, selector):
    """Read at once: rows are made anew as one scrolls."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def shown(page):
    """Numbers of the features whose rows are in the document."""
    return [int(text) for text in texts(page, "#rows td.id")]


def wait_for_feature(page, i):
    wait(page, f"return document.querySelector('#feature .eyebrow')?.textContent === 'Feature {i}'")


def test_index(page, report):
    visit(page, report)
    assert page.title == "Features of a demo encoder"
    assert "16 patients" in find(page, "#corpus")[0].text
    assert len(find(page, "#overview svg circle.point")) == 5
    assert len(find(page, "#overview svg circle.chosen")) == 1
    assert len(find(page, "#overview svg rect.bar")) > 3
    assert "2 recordings may have shifted" in find(page, "#notes")[0].text
    assert find(page, "#labels")[0].text == str(report / "labels.csv")
    assert shown(page)[:3] == [0, 1, 2]
    assert "never active" in texts(page, "#rows tr.dead")[0]
    assert texts(page, "#rows td.label")[:2] == [
        "Posterior dominant rhythm",
        "frontal blink, below 4 Hz",
    ]
    assert len(find(page, "#rows td.label .suggestion")) == len(shown(page)) - 1


def test_sorting(page, report):
    density = {f["id"]: f["density"] for f in made_up.features(N, DEAD)}
    visit(page, report)
    button = find(page, "#titles th.density button")[0]
    button.click()
    first = shown(page)
    assert first == sorted(density, key=lambda i: -density[i])[: len(first)]
    button.click()
    assert find(page, "#titles th.density")[0].get_attribute("aria-sort") == "ascending"
    assert shown(page) == sorted(density, key=lambda i: density[i])[: len(first)]
    find(page, "#titles th.mean button")[0].click()
    page.execute_script("scrollTo(0, 1e6)")
    wait(page, f"return [...document.querySelectorAll('#rows tr.dead')].length === {len(DEAD)}")
    assert shown(page)[-2:] == list(DEAD)  # without a mean: last, whichever the direction


def test_filters(page, report):
    density = {f["id"]: f["density"] for f in made_up.features(N, DEAD)}
    visit(page, report)
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


def test_a_feature(page, report):
    visit(page, report)
    find(page, "#rows td.density")[0].click()
    wait_for_feature(page, 0)
    assert page.current_url.endswith("#f=0")
    assert page.title == "Feature 0: Posterior dominant rhythm"
    assert not find(page, "#index")[0].is_displayed()
    text = find(page, "#feature")[0].text
    assert "Eyes closed in all that I looked at" in text
    assert "exact only after the last layer" in text
    titles = [h.text for h in find(page, "#feature h3")]
    assert titles == [
        "Channels", "Spectrum", "Activations", "Patients", "Position in the window", "Nearest features",
        "Active together", "Waveform", "Artefact hints",
    ]  # fmt: skip
    for figure in find(page, "#feature .figure"):
        size = figure.find_element(By.TAG_NAME, "svg").size
        assert size["width"] > 200
        assert size["height"] > 100
    assert "NaN" not in page.execute_script("return document.querySelector('#feature').outerHTML")
    assert len(find(page, "circle.dot")) == 19
    assert len(find(page, "path.area")) == 1
    assert len(find(page, ".bars a")) == 5 + 3


def test_examples(page, report):
    visit(page, report, "#f=0")
    wait_for_feature(page, 0)
    example = next(made_up.features(1))["examples"][0]
    first = find(page, "figure")[0]
    for word in (
        example["recording"],
        "O1",
        f"{example['patch'][0]:.2f}–{example['patch'][1]:.2f} s",
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
    assert find(page, '.tabs [aria-pressed="true"]')[0].text == "Random 10"  # stays as one goes on


def test_navigation(page, report):
    visit(page, report)
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
    find(page, "#events tbody a")[1].click()
    wait_for_feature(page, 1)


def test_a_dead_feature(page, report):
    visit(page, report, f"#f={DEAD[0]}")
    wait_for_feature(page, DEAD[0])
    assert find(page, "#feature h1")[0].text == "never active"
    assert [h.text for h in find(page, "#feature h3")] == ["Nearest features"]


def test_hostile_names(page, tmp_path):
    feature = next(made_up.features(1))
    feature |= {
        "label": HOSTILE,
        "note": HOSTILE,
        "suggestion": HOSTILE,
        "channel": HOSTILE,
        "band": HOSTILE,
    }
    feature["examples"] = [
        e | {"recording": HOSTILE, "patient": HOSTILE, "hints": [HOSTILE]}
        for e in feature["examples"]
    ]
    feature |= {"patient_list": [[HOSTILE, 1.0]], "artefacts": {HOSTILE: 0.5}, "mean": float("nan")}
    names = dict.fromkeys(("title", "run", "member", "encoder", "split", "created_with"), HOSTILE)
    meta = made_up.meta(**names, notes=[HOSTILE], summary=[(HOSTILE, HOSTILE)])
    meta["members"][0] |= {"name": HOSTILE, "fvu": float("inf")}
    meta["events"] = [{"kind": HOSTILE, "feature": 0, "auc": None}]
    write_report(tmp_path / "report #1 %41", meta, [feature])
    visit(page, tmp_path / "report #1 %41")
    assert page.title == HOSTILE
    assert find(page, "#title")[0].get_attribute("textContent") == HOSTILE
    assert find(page, "#labels")[0].text == str(tmp_path / "report #1 %41/labels.csv")
    find(page, "#rows td.density")[0].click()
    wait_for_feature(page, 0)
    assert find(page, "figcaption .where")[0].get_attribute("textContent") == HOSTILE
    assert find(page, "img") == []
    assert page.execute_script("return typeof hacked") == "undefined"


@pytest.mark.parametrize("width", [420, 1280, 1920])
def test_nothing_is_cut_off(page, report, width):
    """No horizontal scrolling, on either view. A window has borders, so the page itself is a little narrower."""
    page.set_window_size(width, 900)
    for hash in ("", "#f=0"):
        visit(page, report, hash)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.set_window_size(1280, 900)


def test_sixteen_thousand_features(page, tmp_path):
    rng = np.random.default_rng(0)
    density = 10 ** rng.uniform(-5, 0, 16_000)
    write_report(
        tmp_path / "report", made_up.meta(), (small(id=i, density=d) for i, d in enumerate(density))
    )
    visit(page, tmp_path / "report")
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
        f"return [...document.querySelectorAll('#rows td.id')].at(-1)?.textContent === '{density.argmin()}'",
    )
