"""The report as files."""

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minsae_jax.errors import UserError
from minsae_jax.estimates import Estimate, Interval
from minsae_jax.report.budget import PAGE_BYTES, SAMPLE_BYTES
from minsae_jax.report.folder import PACK, PAGE_FILES, read_member, write_pages
from tests.report.made_up import (
    make_cards,
    make_dead_card,
    make_meta,
    make_pages,
    make_row,
    make_score,
    with_findings,
)
from tests.report.reading import read_cards, read_script

N = 40
DEAD = (7, 13)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    write_pages(folder, make_meta(), make_cards(N, DEAD))
    return folder


def test_files(report):
    assert {p.name for p in report.iterdir()} == {
        *PAGE_FILES,
        "index_data.js",
        "data",
        "SHA256SUMS",
    }
    assert [p.name for p in report.parent.iterdir()] == ["report"]
    assert [p.name for p in (report / "data").iterdir()] == ["p0000.js"]
    index = read_script(report / "index_data.js")
    assert len(index["meta"]["positions"]) == 19
    cards = zip(index["rows"], make_cards(N, DEAD), read_cards(report), strict=True)
    for row, card, data in cards:
        assert index["columns"][-5:] == ["seeds", "detects", "event", "event_auc", "pack"]
        assert row == [*(data[name] for name in index["columns"][:-5]), None, [], "", None, 0]
        assert len(data["examples"]) == len(card.examples)
        for written, example in zip(data["examples"], card.examples, strict=True):
            assert abs(written["start"] - example.start) < 0.006
            np.testing.assert_allclose(written["strip"], example.strip, rtol=1e-3)
            for name in ("trace", "others"):
                array = getattr(example, name)
                if array is None:
                    assert written[name] is None
                else:
                    values = np.frombuffer(base64.b64decode(written[name]), np.int8)
                    np.testing.assert_array_equal(values, array.ravel())


def test_keys_of_the_data_files(report):
    """report.js and other programs read these."""
    index = read_script(report / "index_data.js")
    assert index["columns"] == [
        "id",
        "label",
        "suggestion",
        "density",
        "mean",
        "max",
        "channel",
        "band",
        "patients",
        "artefact",
        "artefact_top",
        "support",
        "seeds",
        "detects",
        "event",
        "event_auc",
        "pack",
    ]
    data = read_cards(report)[0]
    assert " ".join(data) == (
        "id density mean max channel band patients artefact artefact_top label suggestion support "
        "stability events patient_share cls note examples histogram channel_ratio spectrum "
        "position patient_list nearest coactive waveform artefacts artefacts_top explained labels"
    )
    assert " ".join(data["examples"][0]) == (
        "group activation recording patient channel start patch trace others strip strip_start "
        "hints trace_channel uv_per_sd others_uv events other_features"
    )


def test_findings_of_the_evaluation(tmp_path):
    """Columns of the table of features, and keys of the pages."""
    cards = [with_findings(card) for card in make_cards(6)]
    write_pages(tmp_path / "report", make_meta(pages=make_pages(6)), cards)
    index = read_script(tmp_path / "report/index_data.js")
    for row, card in zip(index["rows"], cards, strict=True):
        best = max(card.events, key=lambda event: event.auc)
        assert row[-5:] == [card.stability.found, [best.kind], best.kind, best.auc, 0]
    pages = index["meta"]["pages"]
    assert (
        " ".join(pages) == "recommendation rule as_good members events event_means labels n_seeds"
    )
    assert pages["events"][0]["kind"] == "alpha"
    assert pages["events"][0]["steering"]["effects"][1]["scale"] == 2
    assert pages["members"][0]["loss"]["loss_recovered_interval"] == [0.9275, 0.9455]


def test_a_feature_that_separates_nothing_has_no_event():
    (card,) = make_cards(1)
    weak = [make_score("spike", 0, 0.79), make_score("blink", 0, float("nan"))]
    assert replace(card, events=weak).event == ""
    assert replace(card, events=weak).event_auc is None
    assert replace(card, events=weak).detects == []
    strong = [*weak, make_score("alpha", 0, 0.8)]
    assert replace(card, events=strong[::-1]).event == "alpha"
    assert replace(card, events=strong).event == "alpha"
    both = [*strong, make_score("blink", 0, 0.9)]
    assert replace(card, events=both).detects == ["blink", "alpha"]


def test_nothing_is_loaded_from_elsewhere(report):
    for name in PAGE_FILES:
        for word in ("https:", "//cdn", "@import", "fetch(", "innerHTML"):
            assert word not in (report / name).read_text()


def test_sizes_are_as_planned(report):
    """The plan of what fits into a report relies on these estimates."""
    size = sum(p.stat().st_size for p in (report / "data").iterdir()) / (N - len(DEAD))
    examples = next(make_cards(1)).examples
    n_samples = sum(e.trace.size for e in examples)
    n_samples += sum(e.others.size for e in examples if e.others is not None)
    planned = PAGE_BYTES + SAMPLE_BYTES * n_samples
    assert 0.7 * planned < size < planned


def test_features_are_packed(tmp_path):
    """In files of PACK features; those without a page are in the table only."""
    cards = [make_dead_card(i, 1, density=0.5) for i in range(0, 400, 2)]
    without = [make_row(i) for i in range(1, 400, 2)]
    write_pages(tmp_path / "report", make_meta(), iter(cards), iter(without))
    assert len(list((tmp_path / "report/data").iterdir())) == -(-200 // PACK)
    assert [card["id"] for card in read_cards(tmp_path / "report")] == list(range(0, 400, 2))
    rows = read_script(tmp_path / "report/index_data.js")["rows"]
    assert [row[0] for row in rows] == list(range(400))
    assert [row[-1] for row in rows[::2]] == [i // PACK for i in range(200)]
    assert [row[-1] for row in rows[1::2]] == [None] * 200


def test_the_same_cards_are_the_same_bytes(tmp_path, report):
    write_pages(tmp_path / "report", make_meta(), make_cards(N, DEAD))
    for path in (report / "data").iterdir():
        assert (tmp_path / "report/data" / path.name).read_bytes() == path.read_bytes()


def test_the_member_of_a_report(tmp_path, report):
    assert read_member(report) == "lambda=5"
    assert read_member(tmp_path) is None


@pytest.mark.parametrize("content", [b"receive({", b"receive({});\n", b"receive(\xff);\n"])
def test_a_damaged_report_is_about_no_member(tmp_path, content):
    (tmp_path / "index_data.js").write_bytes(content)
    assert read_member(tmp_path) is None


def test_rewriting_keeps_other_files(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "labels.csv").write_text("feature,label,note\n")  # before the first report
    write_pages(folder, make_meta(), make_cards(5, dead=(0, 1, 2, 3, 4)))
    (folder / "labels.csv").write_text("feature,label,note\n3,spindle,\n")
    (folder / "labels.csv.backup").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine")
    write_pages(folder, make_meta(), make_cards(3, dead=(0, 1, 2)))
    assert (folder / "labels.csv").read_text() == "feature,label,note\n3,spindle,\n"
    assert (folder / "labels.csv.backup").read_text() == "mine"
    assert (folder / "notes/a.txt").read_text() == "mine"
    assert len(read_cards(folder)) == 3
    assert len(read_script(folder / "index_data.js")["rows"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_failure_leaves_the_older_report(tmp_path):
    folder = tmp_path / "report"
    write_pages(folder, make_meta(title="older"), [make_dead_card(0, 1)])

    def failing_cards():
        yield make_dead_card(0, 1)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        write_pages(folder, make_meta(title="newer"), failing_cards())
    assert read_script(folder / "index_data.js")["meta"]["title"] == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_kill_between_the_renames_loses_nothing(tmp_path):
    folder = tmp_path / "report"
    write_pages(folder, make_meta(), [make_dead_card(0, 1)])
    (folder / "labels.csv").write_text("mine")
    folder.rename(tmp_path / ".report.old")
    write_pages(folder, make_meta(), [make_dead_card(0, 1)])
    assert (folder / "labels.csv").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"contains thesis\.tex and is not a report"):
        write_pages(tmp_path, make_meta(), [make_dead_card(0, 1)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_aucs_have_the_third_digit_of_the_terminal(tmp_path):
    """Also near a half of that digit: 0.95449 is 0.954, but rounded to four digits first, 0.955."""
    for i, auc in enumerate((0.95449, 0.954495, 0.9345001, 0.88851)):
        (card,) = make_cards(1)
        events = [make_score("spike", 0, auc)]
        card = replace(card, events=events)
        pages = make_pages(1)
        means = replace(pages.members[0].events, auc=Estimate(auc, Interval(auc - 0.2, auc)))
        member = replace(pages.members[0], events=means)
        meta = replace(make_meta(), pages=replace(pages, members=[member]))
        row = make_row(1, events=events)
        folder = tmp_path / f"report{i}"
        write_pages(folder, meta, [card], [row])
        index = read_script(folder / "index_data.js")
        (written,) = index["meta"]["pages"]["members"]
        column = index["columns"].index("event_auc")
        shown = [written["events"]["auc"], written["events"]["auc_interval"][1]]
        shown += [row[column] for row in index["rows"]]
        shown += [event["auc"] for card in read_cards(folder) for event in card["events"]]
        assert len(shown) == 5
        assert {f"{value:.3f}" for value in shown} == {f"{auc:.3f}"}
