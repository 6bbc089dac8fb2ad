"""Evaluation of the small sweep: measures against definitions, errors, files, recommendation."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import mannwhitneyu

import minsae_jax as ms
from minsae_jax import UserError
from minsae_jax.activations.store import open_store
from minsae_jax.checksums import read_npz, write_npz
from minsae_jax.eeg.montage import CHANNELS
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.extract import extract
from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation import feature_measures, figure, inputs, saved, summary
from minsae_jax.evaluation import members as evaluation_members
from minsae_jax.evaluation.associations import Associations, LabelAssociation
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import open_dataset
from minsae_jax.evaluation.evaluate import evaluate
from minsae_jax.evaluation.event_results import Gain
from minsae_jax.evaluation.events import event_share, read_events
from minsae_jax.evaluation.inputs import open_inputs
from minsae_jax.evaluation.label_tests import compare_labels
from minsae_jax.evaluation.labels import PatientLabel
from minsae_jax.evaluation.loss_recovered import substitution_errors
from minsae_jax.evaluation.pooling import PatientValues
from minsae_jax.evaluation.recordings import check_unchanged
from minsae_jax.evaluation.token_pass import read_features
from minsae_jax.evaluation.variance import VarianceShares
from minsae_jax.json_values import to_json
from minsae_jax.report.event_pages import event_pages
from minsae_jax.sae.config import load_run_config
from minsae_jax.sae.figures import KIND_COLOURS, make_figure
from minsae_jax.sae.hyper import SYMBOLS
from minsae_jax.sae.member import load_sae, save_member
from tests.evaluation import planted
from tests.report.reading import read_script

# Every evaluation runs an encoder, which takes longer than optimizing it.
pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def settings(trained):
    # Windows on which mean-ablation raises the error of this encoder with random weights
    return EvaluateConfig(
        run=str(trained.run),
        root_path=str(trained.recordings),
        substitution_windows=6,
        mask_ratio=0.4,
    )


@pytest.fixture(scope="module")
def evaluation(trained, settings):
    # Measures that another module saved can differ in the last digits, if it measured one member.
    shutil.rmtree(trained.run / "evaluation", ignore_errors=True)
    return evaluate(settings, trained.encoder)


def test_measures_match_their_definitions(trained, evaluation):
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording)).reshape(-1, 128)
    assert [m.member for m in evaluation.members] == ["lambda=0.1", "lambda=1"]
    for member in evaluation.members:
        sae = trained.sae(member.member)
        f = np.asarray(sae.encode(x))
        r = np.asarray(sae.decode(f)) - x
        variance = ((x - x.mean(0)) ** 2).sum()
        assert member.tokens.fvu == pytest.approx((r**2).sum() / variance, rel=1e-4)
        assert member.tokens.l0 == pytest.approx((f > 0).sum(1).mean(), rel=1e-3)
        assert member.tokens.never_active_fraction == pytest.approx(
            (f == 0).all(0).mean(), abs=0.02
        )
        rows = np.array(sae.params["W_dec"])
        # In the unit of training, in which decoder rows are longer.
        norms = sae.config["scale"] * np.linalg.norm(rows, axis=1)
        assert sae.config["scale"] != 1
        assert member.tokens.l1 == pytest.approx((f @ norms).mean(), rel=1e-4)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T - 2 * np.eye(len(rows))
        assert member.decoder.mean == pytest.approx(cosine.max(1).mean(), rel=1e-4)
        n_alive = (f > 0).any(0).sum()
        assert sum(member.tokens.log10_density.features) == pytest.approx(n_alive, abs=1)
        loss = member.loss
        recovered = loss.mean_ablation_error - loss.masked_error
        assert recovered / (loss.mean_ablation_error - loss.untouched_error) == pytest.approx(
            loss.loss_recovered.value
        )
        kinds = {"alpha", "blink", "muscle", "slow_wave", "spike", "spindle"}
        assert member.events.keys() <= kinds
        for score in member.events.values():
            assert 0 <= score.auc.value <= 1
            assert len(set(score.best_five)) == 5
    assert evaluation.baselines.keys() == evaluation.members[0].events.keys()
    sae = trained.sae()
    (alone,) = substitution_errors(trained.encoder, dataset, 2, [sae], x.mean(0), 6, 0.4)
    expected = pytest.approx(alone.mean_ablation, rel=1e-4)
    assert evaluation.substitution.mean_ablation == expected


def test_files_contain_the_evaluation(trained, evaluation):
    content = json.loads((trained.run / "evaluation.json").read_text())
    dataset = trained.dataset("test")
    assert content["recommended"] == evaluation.recommended
    assert content["tokens"] == dataset.store.total_tokens
    assert content == evaluation.to_record()
    with (trained.run / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    members = [row for row in rows if row["kind"] != "pca"]
    assert [float(row["fvu"]) for row in members] == [m.tokens.fvu for m in evaluation.members]
    assert [row["member"] for row in rows[2:]] == ["pca,k=4", "pca,k=8", "pca,k=16", "pca,k=32"]
    assert [float(row["fvu"]) for row in rows[2:]] == [pca.fvu for pca in evaluation.pca]
    kind = next(iter(evaluation.baselines))
    assert float(rows[0][f"{kind}_auc"]) == evaluation.members[0].events[kind].auc.value
    assert (trained.run / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_nan_is_null_in_evaluation_json(evaluation, tmp_path):
    """As targeted probe perturbation of a single kind of events."""
    member = evaluation.members[0]
    of_events = replace(
        member.event_evaluation, summary=replace(member.event_summary, tpp=Estimate(float("nan")))
    )
    changed = replace(
        evaluation,
        inputs=replace(evaluation.inputs, out=tmp_path),
        members=(replace(member, event_evaluation=of_events),),
        selected=member.member,
    )
    summary.write_files(changed)
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["members"][0]["event_summary"]["tpp"] is None


LOSS_KEYS = (
    "masked_error loss_recovered loss_recovered_interval loss_recovered_of_zero_ablation "
    "untouched_error mean_ablation_error zero_ablation_error"
)


def test_keys_of_evaluation_json(evaluation):
    """Other programs read these."""
    record = evaluation.to_record()
    assert " ".join(record) == (
        "rule run folders store tokens substitution recommended recommendation baselines "
        "baseline_summaries gains members pca"
    )
    assert " ".join(record["substitution"]) == (
        "windows untouched mean_ablation zero_ablation mask_ratio"
    )
    assert " ".join(record["members"][0]) == (
        "member kind lambda_sparsity lr seed d_sae status fvu explained_variance l0 l1 "
        "dense_fraction cosine norm_ratio never_active_fraction log10_density decoder_cosine_mean "
        "decoder_cosine_median decoder_cosine_over_0.9 description_bits "
        f"{LOSS_KEYS} event_summary events"
    )
    assert " ".join(record["pca"][0]) == (
        f"k fvu explained_variance description_bits {LOSS_KEYS} event_summary events"
    )
    score = next(iter(record["members"][0]["events"].values()))
    assert " ".join(score) == (
        "val_events test_events feature auc auc_interval val_auc n_ties ties ties_auc recall "
        "recall_interval best_five probe_2_auc probe_2_auc_interval probe_auc probe_auc_interval "
        "x_probe_auc x_hat_probe_auc x_hat_probe_auc_interval ablation_drop "
        "ablation_drop_interval ablation_drop_others ablation_drop_others_interval token_auc "
        "token_base_rate precision precision_interval examples pure_features"
    )
    baseline = next(iter(record["baselines"].values()))
    assert list(baseline) == ["raw_auc", "pca_auc", "raw", "pca"]
    assert baseline["raw"].keys() == baseline["pca"].keys() == score.keys()


def change_part(folder: Path, name: str, **changes: np.ndarray) -> None:
    path = folder / f"evaluation/{name}.features.npz"
    write_npz(path, {**read_npz(path), **changes})


def write_control(run: Path, control: Path) -> None:
    """Write an evaluation of another encoder, with the features of each member at the other."""
    folder = control / "evaluation"
    shutil.copytree(run / "evaluation", folder)
    for name, other in (("lambda=0.1", "lambda=1"), ("lambda=1", "lambda=0.1")):
        source = run / "evaluation" / f"{other}.features.npz"
        shutil.copy(source, folder / f"{name}.features.npz")
        change_part(control, name, encoder=np.array("random"))


def test_control_is_a_row_beside_the_baselines(trained, evaluation, settings, tmp_path):
    write_control(trained.run, tmp_path / "control")
    settings = replace(settings, out=str(tmp_path / "out"), control=str(tmp_path / "control"))
    shutil.copytree(trained.run / "evaluation", tmp_path / "out/evaluation")
    result = evaluate(settings, trained.encoder)
    (other,) = (m for m in result.members if m.member != result.selected)
    for kind, scores in result.baselines.items():
        assert scores["random"] == other.events[kind]
    selected = result.find(result.selected)
    assert list(result.gains) == ["raw", "pca", "random"]
    for name, (gains, mean) in result.gains.items():
        for kind, gain in gains.items():
            difference = selected.events[kind].auc.value - result.baselines[kind][name].auc.value
            assert gain.value == pytest.approx(difference)
            if gain.interval is not None:
                assert gain.interval.low <= gain.value <= gain.interval.high
        assert mean.value == pytest.approx(np.mean([gain.value for gain in gains.values()]))
    record = result.to_record()
    assert record["control"] == settings.control
    assert record["gains"] == {n: to_json(gain._asdict()) for n, gain in result.gains.items()}
    assert record["baseline_summaries"]["random"] == to_json(other.event_summary)
    text = result.summary()
    (row,) = (line for line in text.splitlines() if line.startswith("random encoder "))
    assert f" {other.event_summary.auc.value:.3f} " in row
    assert f"random: {result.selected}, trained on" in text
    assert re.search(r"^event +over PCA +over raw$", text, re.M)
    assert re.search(r"^event +over random$", text, re.M)
    means = [float(line.split()[1]) for line in text.splitlines() if line.startswith("mean ")]
    expected = [result.gains[name].mean_auc_gain.value for name in ("pca", "random")]
    assert means == pytest.approx(expected, abs=5e-4)
    pages = event_pages(result, {})
    assert all(page.scores["random"] == other.events[page.kind] for page in pages)


@pytest.mark.parametrize(
    ("low", "words"),
    [(0.01, None), (0.0, "the best raw dimension (mean gain in AUC 0.020 [0.000, 0.030])")],
)
def test_features_that_others_equal_are_named(evaluation, low, words):
    gains = {
        "raw": Gain({}, Estimate(0.02, Interval(low, 0.03))),
        "pca": Gain({}, Estimate(0.02, Interval(0.01, 0.03))),
    }
    empty = replace(evaluation, gains=gains, baseline_events={})
    text = " ".join(empty.summary().split())
    sentence = f"events: {evaluation.selected} does not clearly detect them better than"
    assert (sentence in text) == (words is not None)
    assert words is None or f"{sentence} {words} rule:" in text


def test_legend_with_a_control_fits_the_figure(
    trained, evaluation, settings, tmp_path, monkeypatch, without_figure
):
    write_control(trained.run, tmp_path / "control")
    settings = replace(settings, out=str(tmp_path / "out"), control=str(tmp_path / "control"))
    shutil.copytree(trained.run / "evaluation", tmp_path / "out/evaluation")
    result = evaluate(settings, trained.encoder)
    member = result.members[0]
    kinds = [replace(member, hyper={"kind": kind}) for kind in KIND_COLOURS]
    drawn = make_figure(13.2, 7.8)
    monkeypatch.setattr(figure, "make_figure", lambda *size: drawn)
    figure.draw_evaluation(tmp_path / "evaluation.png", replace(result, members=tuple(kinds)))
    (legend,) = drawn.legends
    assert f"control of {result.selected}" in [text.get_text() for text in legend.get_texts()]
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= drawn.bbox.x1


def test_a_control_that_does_not_fit_is_an_error(trained, evaluation, settings, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    settings = replace(settings, control=str(control), out=str(tmp_path / "out"))

    def error(message, settings=settings):
        with pytest.raises(UserError, match=message):
            ms.evaluate(settings, trained.encoder)
        # Nothing was measured.
        assert not (tmp_path / "out/evaluation").exists()

    error("no evaluation of lambda=0.1, lambda=1; train")
    shutil.copytree(trained.run / "evaluation", control / "evaluation")
    error("is of the encoder of this run")
    for name in ("lambda=0.1", "lambda=1"):
        change_part(control, name, encoder=np.array("random"))
    error("was evaluated on other recordings or events", settings=replace(settings, seed=1))
    part = read_npz(control / "evaluation/lambda=1.features.npz")
    of_features = ("val_auc", "auc", "recall", "precision", "examples", "is_pure")
    change_part(control, "lambda=1", **{name: part[name][..., :-1] for name in of_features})
    error(r"lambda=1 has d_sae \d+, expected")
    (control / "evaluation/lambda=1.features.npz").write_bytes(b"PK")
    error("evaluate the control again")


def test_only_auc_of_one_layer_can_be_compared(settings):
    opened = inputs.open_inputs(settings, None)
    source = feature_measures.source_of(settings, opened)
    store = opened.test.store
    other = replace(store, manifest=replace(store.require_manifest(), layer_index=0))
    of_other = replace(opened, test=replace(opened.test, store=other))
    assert feature_measures.source_of(settings, opened) == source
    assert feature_measures.source_of(settings, of_other) != source


def test_control_requires_events(trained, evaluation, settings, tmp_path):
    recordings = shutil.copytree(trained.recordings, tmp_path / "recordings")
    (recordings / "events.csv").unlink()
    write_control(trained.run, tmp_path / "control")
    settings = replace(settings, control=str(tmp_path / "control"), root_path=str(recordings))
    with pytest.raises(UserError, match="--control requires labelled events"):
        ms.evaluate(replace(settings, out=str(tmp_path / "out")), trained.encoder)


def test_other_files_are_not_taken_for_an_evaluation(trained, settings, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"contains notes\.txt, which is not part of an evaluation"):
        ms.evaluate(replace(settings, out=str(tmp_path)), trained.encoder)
    with pytest.raises(NotADirectoryError):
        ms.evaluate(replace(settings, out=str(tmp_path / "notes.txt")), trained.encoder)


def test_control_must_be_another_folder(trained, settings, tmp_path):
    for control, message in ((tmp_path / "x", "is not a folder"), (trained.run, "another folder")):
        with pytest.raises(UserError, match=message):
            ms.evaluate(replace(settings, control=str(control)), trained.encoder)


def test_summary(evaluation):
    text = evaluation.summary()
    assert "stability over seeds:" not in text
    assert text.splitlines()[3].startswith("pca,k=4 ")
    assert f"recommended: {evaluation.recommended}" in text
    assert "raw dimensions" in text
    tables = [part.splitlines() for part in text.split("\n\n")]
    assert max(len(line) for table in tables[:-1] for line in table) <= 80
    by_kind = [table for table in tables if "by kind of event" in table[0]]
    n_kinds = len(evaluation.baselines)
    assert [len(table) - 2 for table in by_kind] == [3 * n_kinds, 3 * n_kinds, n_kinds + 1]
    assert max(map(len, tables[-1])) <= 100
    words = " ".join(text.split())
    assert f"reason: {evaluation.recommendation.reason}" in words
    assert f"rule: {evaluation.rule}" in words
    for member in evaluation.members:
        recovered, (low, high) = member.loss.loss_recovered
        assert f"{recovered:.1%} [{low:.1%}, {high:.1%}]" in text


def test_summary_says_that_components_are_of_few_patients(evaluation):
    """The demo of ten patients has one in val."""
    note = "pca: principal components of fewer than three val patients"
    assert note not in evaluation.summary()  # they are of the train patients
    evaluation = replace(evaluation, inputs=replace(evaluation.inputs, train=None))
    assert note in evaluation.summary()
    val = evaluation.inputs.val
    names = tuple(f"p{i}_s001_t000_preprocessed.npy" for i in range(3))
    several = replace(evaluation.inputs, val=replace(val, recordings=names))
    assert note not in replace(evaluation, inputs=several).summary()
    assert note not in replace(evaluation, pca=()).summary()


def test_summary_of_labels(evaluation):
    patients = tuple(f"p{i}" for i in range(10))
    group = PatientLabel("group", patients, np.arange(10) % 2.0, ("control", "epilepsy"))
    site = PatientLabel("site", patients[:2], np.zeros(2), ("a",))
    values = np.random.default_rng(0).normal(size=(10, 4))
    values[:, 2] = group.values
    labels = []
    for result in compare_labels(PatientValues(patients, values), [group, site]):
        label = group if result.label == "group" else site
        labels.append(LabelAssociation(label, result.test, None, result.note, "no probe"))
    shares = VarianceShares(*np.zeros((4, 4)), ("p0",) * 4, np.zeros(4))
    associations = Associations(shares, tuple(labels), "active", patients)
    text = replace(evaluation, associations=associations).summary()
    assert f"features of {evaluation.selected} by label:\n" in text
    assert "group        10      1 of 4  control 5, epilepsy 5\n" in text
    assert "site          2  not tested                    a 2\n" in text
    assert "site: not tested: fewer than two categories with 3 patients: a (2)\n" in text
    assert "Train patients can be tested too" in text
    assert "no probe" not in text


def test_components_are_those_of_the_train_store(trained, evaluation, settings, tmp_path):
    """Those of the members' data, or of the val patients if it is not there any more."""
    train = open_store(trained.stores, -1)
    assert evaluation.inputs.pca_store.folder == train.folder
    tokens = np.concatenate([train.read(i) for i in range(len(train.shards))])
    test = evaluation.inputs.test.store
    x = np.concatenate([test.read(i) for i in range(len(test.shards))]).astype(np.float64)
    _, directions = np.linalg.eigh(np.cov(tokens.T.astype(np.float64)))
    mean = tokens.mean(axis=0, dtype=np.float64)
    parts = (x - mean) @ directions
    is_left_out = np.abs(parts).argsort(axis=1).argsort(axis=1) < x.shape[1] - 4
    fvu = np.square(parts * is_left_out).sum() / np.square(x - x.mean(axis=0)).sum()
    assert evaluation.pca[0].fvu == pytest.approx(fvu, rel=1e-4)

    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    config = run / "config.yaml"
    moved = config.read_text().replace(f"store: {trained.stores}\n", f"store: {tmp_path}\n")
    config.write_text(moved)
    val_store = str(trained.stores.with_name(trained.stores.name + "_val"))
    changed = replace(settings, run=str(run), store=str(test.folder), val_store=val_store)
    opened = inputs.open_inputs(changed, None)
    assert (opened.train, opened.pca_store) == (None, opened.val.store)


def test_run_is_shown_as_it_was_given(evaluation):
    """A report that is passed on does not contain the folders of its author."""
    here = replace(evaluation.inputs, run=Path("."), members=())
    assert (here.source, here.name) == (Path("."), Path.cwd().name)


def test_features_of_an_event_are_active(evaluation):
    """A feature that is never active has an AUC of 0.5, above that of many others."""
    selected = evaluation.find(evaluation.selected)
    events = selected.event_evaluation
    kind = events.features.kinds[0]
    best = events.scores[kind].feature
    # One that is active, and the best one, which is of the val patients.
    active = next(i for i in np.flatnonzero(events.features.examples) if i != best)
    examples = np.zeros_like(events.features.examples)
    examples[active] = 16
    few = replace(events, features=replace(events.features, examples=examples))
    members = [
        replace(member, event_evaluation=few) if member is selected else member
        for member in evaluation.members
    ]
    (page, *_) = event_pages(replace(evaluation, members=tuple(members)), {})
    assert {score.feature for score in page.features} == {best, active}


def test_summary_of_undefined_loss_recovered(evaluation):
    members = []
    for member in evaluation.members:
        loss = replace(member.loss, loss_recovered=Estimate(float("nan")))
        members.append(replace(member, loss=loss))
    lines = replace(evaluation, members=tuple(members)).summary().splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["undefined", "undefined"]


def test_summary_says_of_what_intervals_are(evaluation):
    """Of a single patient they are over recordings, and too short for other patients."""
    assert "intervals over patients." in evaluation.summary()
    test = evaluation.inputs.test
    names = tuple(f"p_{i}_preprocessed.npy" for i in range(len(test.recordings)))
    inputs = replace(evaluation.inputs, test=replace(test, recordings=names))
    assert "over the recordings of the only" in replace(evaluation, inputs=inputs).summary()


@pytest.fixture(scope="module")
def new_recordings(trained, tmp_path_factory):
    """Copies of the test recordings with other names, too few patients for a split, extracted."""
    folder = tmp_path_factory.mktemp("new")
    recordings = folder / "recordings"
    recordings.mkdir()
    names = {
        name: f"new_{i}_preprocessed.npy"
        for i, name in enumerate(trained.dataset("test").recordings)
    }
    for table in ("file_lengths_map.csv", "events.csv"):
        head, *rows = (trained.recordings / table).read_text().splitlines()
        renamed = [row.replace(row.split(",")[0], names.get(row.split(",")[0], "")) for row in rows]
        kept = [row for row in renamed if row.startswith("new_")]
        (recordings / table).write_text("\n".join([head, *kept]) + "\n")
    for name, copy in names.items():
        shutil.copy(trained.recordings / name, recordings / copy)
    extract_config = ms.ExtractConfig(
        root_path=str(recordings), batch_size=4, out=str(folder / "store"), split=("all",)
    )
    with pytest.warns(UserWarning, match="are of one patient, new, since"):
        ms.extract(trained.encoder, extract_config)
    return folder


@pytest.mark.slow
def test_other_recordings_have_an_evaluation_of_their_own(
    trained, settings, evaluation, new_recordings, without_figure
):
    """That of copies of the test recordings is equal, with features chosen on the val patients."""
    before = (trained.run / "evaluation.json").read_bytes()
    out = new_recordings / "evaluation of new"
    config = replace(
        settings,
        root_path=str(new_recordings / "recordings"),
        store=str(new_recordings / "store"),
        val_root_path=str(trained.recordings),
        out=str(out),
        report=False,
    )
    result = ms.evaluate(config, trained.encoder)
    assert (trained.run / "evaluation.json").read_bytes() == before
    assert json.loads((out / "evaluation.json").read_text())["recommended"] == result.recommended
    for member, expected in zip(result.members, evaluation.members, strict=True):
        assert member.tokens.fvu == pytest.approx(expected.tokens.fvu, rel=1e-4)
        assert member.events.keys() == expected.events.keys()
        for kind, score in member.events.items():
            assert score.feature == expected.events[kind].feature
            assert score.val_auc == expected.events[kind].val_auc
            assert score.test_events == expected.events[kind].test_events
    with pytest.raises(UserError, match="that of a val store with --val_root_path"):
        ms.evaluate(replace(config, val_root_path=None), trained.encoder)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains notes\.txt"):
        ms.evaluate(config, trained.encoder)


@pytest.fixture(scope="module")
def mixed_run(trained, tmp_path_factory):
    """A run with members of four kinds; k = 8 of topk has two seeds with features in common."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    shutil.copytree(trained.run, run)
    rng = np.random.default_rng(0)
    d_sae = 40
    parts = {"W_enc": (128, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, 128), "b_dec": (128,)}
    settings = {
        "topk": ({"k": 8.0}, {"k": np.float32(8)}),
        "batchtopk": ({"k": 8.0}, {"threshold": np.float32(0.5)}),
        "jumprelu": (
            {"mode": "target_l0", "target_l0": 8.0},
            {"threshold": np.full(d_sae, 0.5, np.float32)},
        ),
    }
    for kind, (sparsity, extra) in settings.items():
        params = {name: rng.normal(size=shape) / 10 for name, shape in parts.items()} | extra
        config = {"kind": kind, **sparsity, "lr": 3e-3, "seed": 0, "d_sae": d_sae}
        save_member(run / f"members/{kind}", params, config)
        if kind == "topk":
            other = params | {"W_dec": params["W_dec"] + (np.arange(d_sae) % 4 == 0)[:, None]}
            save_member(run / "members/topk,seed=1", other, config | {"seed": 1})
    return run


def test_members_of_several_kinds(trained, settings, mixed_run):
    evaluation = evaluate(replace(settings, run=str(mixed_run)), trained.encoder)
    record = json.loads((mixed_run / "evaluation.json").read_text())
    expected = {
        "batchtopk": {"kind": "batchtopk", "k": 8},
        "jumprelu": {"kind": "jumprelu", "target_l0": 8},
        "lambda=0.1": {"kind": "relu", "lambda_sparsity": 0.1},
        "lambda=1": {"kind": "relu", "lambda_sparsity": 1},
        "topk": {"kind": "topk", "k": 8},
        "topk,seed=1": {"kind": "topk", "k": 8},
    }
    names = ("kind", "lambda_sparsity", "k", "target_l0")
    for member in record["members"]:
        values = {name: member[name] for name in names if name in member}
        assert values == expected.pop(member["member"])
        if "target_l0" in values:
            assert member["l1"] == pytest.approx(member["l0"])
    assert not expected
    with (mixed_run / "evaluation.csv").open(newline="") as file:
        rows = {row["member"]: row for row in csv.DictReader(file)}
    assert list(rows["topk"])[:8] == ["member", *SYMBOLS]
    assert float(rows["topk"]["k"]) == float(rows["pca,k=8"]["k"]) == 8
    assert rows["lambda=1"]["k"] == rows["topk"]["target_l0"] == ""
    # Stability against its definition: 30 of 40 rows of the decoder are equal.
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording)).reshape(-1, 128)
    saes = [load_sae(mixed_run / "members" / name) for name in ("topk", "topk,seed=1")]
    is_live = [(np.asarray(sae.encode(x)) > 0).any(0) for sae in saes]
    units = []
    for sae, live in zip(saes, is_live, strict=True):
        rows_live = np.float64(sae.params["W_dec"])[live]
        units.append(rows_live / np.linalg.norm(rows_live, axis=1, keepdims=True))
    cosines = units[0] @ units[1].T
    matched = linear_sum_assignment(np.maximum(cosines, 0), maximize=True)
    n_reappearing = (cosines[matched] > 0.7).sum()
    for member, live in zip(("topk", "topk,seed=1"), is_live, strict=True):
        share = n_reappearing / live.sum()
        assert 0.5 < share < 1
        assert float(rows[member]["stability"]) == pytest.approx(share)
    assert rows["batchtopk"]["stability"] == ""
    share = evaluation.find("topk").stability.share()
    assert f"topk             {share:.1%}" in evaluation.summary()


def test_one_member_leaves_the_others_in_the_evaluation(
    trained, settings, evaluation, tmp_path, without_figure
):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    # As if only one member had been measured before
    (run / "evaluation.json").unlink()
    for path in (run / "evaluation").glob("lambda=0.1.*"):
        path.unlink()
    settings = replace(settings, run=str(run))
    only = evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert [m.member for m in only.members] == ["lambda=1"]
    complete = evaluate(settings, trained.encoder)
    before = (run / "evaluation.json").read_text()
    again = evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert [m.member for m in again.members] == ["lambda=0.1", "lambda=1"]
    assert again.selected == "lambda=1"
    assert again.recommended == complete.recommended == complete.selected
    assert (run / "evaluation.json").read_text() == before


def test_saved_measures_are_used_until_something_changes(
    trained, settings, tmp_path, monkeypatch, without_figure
):
    """Counts the members that are measured again, by part."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    recordings = tmp_path / "recordings"
    shutil.copytree(trained.recordings, recordings)
    settings = replace(settings, run=str(run), root_path=str(recordings))
    evaluate(settings, trained.encoder)
    first = (run / "evaluation.json").read_text()
    written = []
    save_part = saved.save_part

    def count(run, name, part, key, arrays):
        written.append((name, part))
        save_part(run, name, part, key, arrays)

    monkeypatch.setattr(saved, "save_part", count)
    evaluate(settings, trained.encoder)
    assert written == []
    assert (run / "evaluation.json").read_text() == first
    evaluate(replace(settings, substitution_windows=3), trained.encoder)
    assert {part for _, part in written} == {"loss"}
    assert {"lambda=0.1", "lambda=1", "pca,k=4"} <= {name for name, _ in written}
    written.clear()
    # A retrained member: its parts alone.
    member = run / "members/lambda=1"
    sae = load_sae(member)
    save_member(member, sae.params | {"b_dec": sae.params["b_dec"] + 1}, sae.config)
    evaluate(replace(settings, substitution_windows=3), trained.encoder)
    assert set(written) == {("lambda=1", part) for part in ("tokens", "loss", "features")}
    written.clear()
    # New labels: the events of all, and no loss.
    with (recordings / "events.csv").open("a") as file:
        file.write(f"{next(recordings.glob('*.npy')).name},alpha,10,90,O1\n")
    (run / "evaluation/lambda=1.tokens.npz").write_bytes(b"damaged")
    evaluate(replace(settings, substitution_windows=3), trained.encoder)
    assert {part for name, part in written if name == "lambda=1"} == {"tokens", "features"}
    assert {part for name, part in written if name != "lambda=1"} == {"features"}


def test_measures_of_tokens_in_other_places_are_not_used(tmp_path, monkeypatch, without_figure):
    """The activations stay, as if the names of recordings in `write_store` had been corrected."""
    x = np.random.default_rng(0).normal(size=(6, planted.TOKENS, 4))
    save_member(tmp_path / "sae", planted.true_autoencoder(np.eye(4)).params, {})
    (tmp_path / "out").mkdir()
    fingerprints = set()
    measured = []
    read = feature_measures.read_features

    def count(dataset, *arguments):
        measured.append(dataset.recordings[0])
        return read(dataset, *arguments)

    monkeypatch.setattr(feature_measures, "read_features", count)

    def evaluate_with(first_patient):
        folder = tmp_path / str(first_patient)
        folder.mkdir(exist_ok=True)
        places = planted.make_places(n_patients=2, n_windows=1, first_patient=first_patient)
        shutil.rmtree(folder / "store_test", ignore_errors=True)
        dataset = planted.write_planted(folder, x, places)
        fingerprints.add(dataset.store.fingerprint)
        config = EvaluateConfig(
            run=str(tmp_path / "sae"),
            root_path=str(dataset.folder),
            store=str(dataset.store.folder),
            out=str(tmp_path / "out"),
        )
        evaluate(config, None)

    for first_patient in (0, 0, 2):
        evaluate_with(first_patient)
    assert measured == ["p000_s001_t000_preprocessed.npy", "p002_s001_t000_preprocessed.npy"]
    assert len(fingerprints) == 1


def test_measures_are_rounded_in_the_same_way_after_a_kill(
    trained, settings, tmp_path, monkeypatch, without_figure
):
    """Members are measured together again, since their number changes the size of a batch."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    settings = replace(settings, run=str(run))
    save_part = saved.save_part
    written = []
    limit = 3

    def save(run, name, part, key, arrays):
        if len(written) == limit:
            raise KeyboardInterrupt
        save_part(run, name, part, key, arrays)
        if part == "tokens":
            written.append(name)

    monkeypatch.setattr(saved, "save_part", save)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings, trained.encoder)
    before = set(written)
    written.clear()
    limit = None
    evaluate(settings, trained.encoder)
    assert len(before) == 3
    assert before < set(written)
    assert not list(run.rglob("*.unfinished.json"))


def test_member_without_any_active_feature_has_no_nan_in_its_table(trained, settings, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    for name in ("lambda=0.1", "lambda=1"):
        sae = load_sae(run / "members" / name)
        save_member(
            run / "members" / name, sae.params | {"b_enc": sae.params["b_enc"] - 1e6}, sae.config
        )
    evaluation = evaluate(replace(settings, run=str(run)), trained.encoder)
    dead = evaluation.members[0]
    assert dead.tokens.never_active_fraction == 1
    assert dead.description_bits == 0
    assert dead.event_summary.auc.value == 0.5
    assert dead.event_summary.pure_features == 0
    assert "nan" not in evaluation.summary()


def test_evaluation_on_training_patients_warns(trained, settings):
    """Warnings are errors in tests, so that nothing is measured."""
    with pytest.raises(UserWarning, match="contains the patients that the members were trained on"):
        evaluate(replace(settings, store=str(trained.stores)), trained.encoder)


def test_patients_that_are_also_in_the_train_store_are_a_warning(trained, settings):
    """As if the val patients had been trained on, from their store or from their recordings."""
    val = f"{trained.stores}_val"
    settings = replace(settings, store=f"{trained.stores}_test", val_store=val)
    config = load_run_config(trained.run)
    live = replace(config, live=True, root_path=str(trained.recordings), val_store=val)
    for right in (config, live, replace(config, store="moved")):
        inputs.open_inputs(settings, trained.encoder, right)
    n = len(set(trained.dataset("val").patients))
    for wrong in (replace(config, store=val), replace(live, split="val")):
        with pytest.warns(UserWarning, match=f"{n} of the {n} patients in .*_val.* train store"):
            inputs.open_inputs(settings, trained.encoder, wrong)
    with pytest.warns(UserWarning, match="patients in the train store") as caught:
        inputs.open_inputs(settings, trained.encoder, replace(live, split="all"))
    assert len(caught) == 2  # of val and test


def test_patients_of_a_live_run_are_known_if_its_root_is_above_the_recordings(
    trained, settings, tmp_path
):
    folder = shutil.copytree(trained.recordings, tmp_path / "tuhab_preprocessed")
    (folder / "tuh_patient_splits_seed_42.pkl").rename(tmp_path / "tuh_patient_splits_seed_42.pkl")
    config = replace(load_run_config(trained.run), live=True, root_path=str(tmp_path), split="test")
    settings = replace(settings, store=f"{trained.stores}_test", val_store=f"{trained.stores}_val")
    with pytest.warns(UserWarning, match="patients in .*_test.* train store"):
        inputs.open_inputs(settings, trained.encoder, config)


def test_live_run_does_not_take_the_stores_beside_the_default_store(trained, settings):
    """Those of a run with a train store are taken."""
    config = load_run_config(trained.run)
    with_store = replace(settings, store=f"{trained.stores}_test", val_store=None)
    assert inputs.open_inputs(with_store, trained.encoder, config).val is not None
    live = replace(config, live=True, root_path=str(trained.recordings))
    with pytest.warns(UserWarning, match="no store of the val patients .*; set --val_store"):
        assert inputs.open_inputs(with_store, trained.encoder, live).val is None
    without_store = replace(settings, store=None, val_store=None)
    with pytest.raises(UserError, match="no store of the test patients; set --store"):
        inputs.open_inputs(without_store, trained.encoder, live)


def test_val_store_of_the_run_comes_before_the_one_beside_the_train_store(
    trained, settings, tmp_path
):
    stores = trained.stores
    beside = stores.with_name(f"{stores.name}_val")
    copy = tmp_path / "copy"
    shutil.copytree(beside, copy)
    settings = replace(settings, store=f"{stores}_test", val_store=None)
    config = replace(load_run_config(trained.run), val_store=str(copy))

    def val_store(config, **changes):
        val = inputs.open_inputs(replace(settings, **changes), trained.encoder, config).val
        assert val is not None
        return val.store.folder.parent

    live = replace(config, live=True, root_path=str(trained.recordings))
    assert val_store(config) == val_store(live) == copy
    assert val_store(config, val_store=str(beside)) == beside
    shutil.rmtree(copy)
    with pytest.warns(UserWarning, match=r"--val_store .*copy is missing; using .*_val"):
        assert val_store(config) == beside


def test_evaluation_on_val_patients_warns(trained, settings):
    val = trained.stores.with_name(f"{trained.stores.name}_val")
    with pytest.warns(UserWarning, match="on which features and probes are chosen"):
        inputs.open_inputs(replace(settings, store=str(val)), trained.encoder)


def test_each_input_is_opened_once(trained, settings, monkeypatch, without_figure):
    opened = []

    def counting(function):
        def call(path, *args, **kwargs):
            opened.append(str(path))
            return function(path, *args, **kwargs)

        return call

    for module, name in (
        (evaluation_members, "load_sae"),
        (evaluation_members, "load_run_config"),
        (inputs, "open_dataset"),
    ):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert len(opened) == len(set(opened)) == 5  # two members, two stores, config.yaml


def test_members_that_do_not_fit_the_memory_together_are_scored_in_turn(
    trained, settings, evaluation, tmp_path, monkeypatch, without_figure
):
    passes = []

    def counting(dataset, saes, *args):
        passes.append(list(saes))
        return read_features(dataset, saes, *args)

    monkeypatch.setattr(feature_measures, "read_features", counting)
    monkeypatch.setattr(feature_measures, "MAX_TOKEN_VALUES", 1)
    in_turn = evaluate(replace(settings, out=str(tmp_path)), trained.encoder)
    assert len(passes) > 2
    assert all(len(names) == 1 for names in passes)
    # As text, since NaN does not equal NaN.
    assert json.dumps(to_json(in_turn.members)) == json.dumps(to_json(evaluation.members))


def test_inputs_that_do_not_belong_together_are_errors(trained, settings, tmp_path):
    def check(match, **changes):
        with pytest.raises(UserError, match=match):
            evaluate(replace(settings, **changes), trained.encoder)

    check("unknown member lambda=7 in .*: lambda=0.1, lambda=1", member="lambda=7")
    check("there is no store", store=str(tmp_path / "nowhere"))
    check("there is no file_lengths_map.csv", root_path=str(tmp_path))
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file_lengths_map.csv").write_text("filename,time_len\n")
    check("does not contain demo.*, which the store", root_path=str(tmp_path / "others"))
    (tmp_path / "run").mkdir()
    check("is not a finished run, nor", run=str(tmp_path / "run"))
    check(f"runs in it: {trained.run.name}", run=str(trained.run.parent))
    other = tmp_path / "other"
    shutil.copytree(trained.run, other)
    path = other / "members/lambda=1/config.json"
    config = json.loads(path.read_text()) | {"encoder_fingerprint": "f" * 64}
    path.write_text(json.dumps(config))
    check("lambda=1 was trained on another encoder", run=str(other))


def test_equal_tokens_are_an_error(trained, settings, tmp_path):
    """As of an encoder whose output does not depend on the EEG."""
    store = tmp_path / "store"
    shutil.copytree(f"{trained.stores}_test", store)
    for path in store.glob("l-1/b*.npy"):
        shape = np.load(path).shape
        token = np.random.default_rng(0).normal(size=shape[-1])
        np.save(path, np.broadcast_to(token, shape).astype(np.float32))
    with pytest.raises(UserError, match=r"all tokens of .*l-1 are equal"):
        evaluate(replace(settings, store=str(store), out=str(tmp_path)), trained.encoder)


def test_recordings_that_have_changed_since_the_extraction_are_refused(trained, settings, tmp_path):
    recordings = shutil.copytree(trained.recordings, tmp_path / "recordings")
    path = recordings / trained.dataset("test").recordings[0]
    eeg = np.load(path)
    config = replace(settings, root_path=str(recordings))

    def check(changed, match):
        np.save(path, changed)
        with pytest.raises(UserError, match=match):
            evaluate(config, trained.encoder)

    check(eeg[:50], "has 50 samples of 19 channels, but the store .*_test/l-1 is of")
    check(eeg[::-1], "recordings in .* are not those that the store .* was extracted from")
    eeg[3] = np.nan
    check(eeg, "are not those that the store")


@pytest.mark.parametrize("max_batches", [None, 1])
def test_recordings_beside_skipped_ones_with_nan_are_accepted(trained, tmp_path, max_batches):
    recordings = shutil.copytree(trained.recordings, tmp_path / "recordings")
    path = recordings / trained.dataset("test").recordings[0]
    eeg = np.load(path)
    eeg[3] = np.nan
    np.save(path, eeg)
    config = ExtractConfig(
        root_path=str(recordings),
        split=("test",),
        out=str(tmp_path / "store"),
        max_batches=max_batches,
        batch_size=4,
        on_bad_recording="skip",
    )
    with pytest.warns(UserWarning, match="left out of split test"):
        extract(trained.encoder, config)
    dataset = open_dataset(tmp_path / "store", None, trained.encoder, recordings)
    check_unchanged(dataset)
    other = recordings / dataset.recordings[0]
    np.save(other, np.load(other)[:50])
    with pytest.raises(UserError, match="has 50 samples"):
        check_unchanged(dataset)


@pytest.mark.slow
def test_events_in_recordings_with_shifted_columns_are_a_warning(trained, settings, tmp_path):
    """Their channel names are wrong, unless an event is on all channels."""
    shutil.copytree(f"{trained.stores}_test", tmp_path / "store")
    (path,) = tmp_path.rglob("provenance.npz")
    arrays = read_npz(path)
    arrays["shifted"][0] = True
    write_npz(path, arrays)
    shutil.copytree(trained.recordings, tmp_path / "recordings")
    settings = replace(
        settings, store=str(tmp_path / "store"), root_path=str(tmp_path / "recordings")
    )
    name = str(arrays["recordings"][0])
    with pytest.warns(UserWarning, match=f"events in {name} are compared on wrong channels"):
        open_inputs(settings, trained.encoder)
    row = f"{name},seizure,0,100,{' '.join(CHANNELS)}"
    events = tmp_path / "recordings/events.csv"
    events.write_text(f"recording,event,start,stop,channels\n{row}\n")
    open_inputs(settings, trained.encoder)  # warnings are errors


def test_without_a_val_store_events_are_not_evaluated(trained, settings, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    config = run / "config.yaml"
    store = trained.stores
    moved = tmp_path / "store"
    config.write_text(config.read_text().replace(f"store: {store}\n", f"store: {moved}\n"))
    test_store = store.with_name(f"{store.name}_test")
    changed = replace(
        settings,
        run=str(run),
        store=str(test_store),
        report=True,
        checkpoint_path=str(trained.encoder_folder),
    )
    with pytest.raises(UserError, match=f"no store of the test patients at {moved}_test; set"):
        ms.evaluate(replace(changed, store=None), trained.encoder)
    with pytest.warns(UserWarning, match=r"events.csv are not evaluated, since there is no store"):
        result = ms.evaluate(changed, trained.encoder)
    assert result.members[0].events is None
    assert (result.pca, result.baselines) == ((), {})
    assert np.isfinite(result.members[0].loss.loss_recovered.value)
    # The report's command for a whole recording works without the encoder in the run's settings.
    meta = read_script(run / "report/index_data.js")["meta"]
    assert meta["encoder_flags"] == ["--checkpoint_path", str(trained.encoder_folder.resolve())]
    assert not meta["view_in_python"]


def test_without_events_of_val_patients_events_are_not_evaluated(
    trained, settings, tmp_path, without_figure
):
    val_recordings = tmp_path / "recordings"
    shutil.copytree(trained.recordings, val_recordings)
    (val_recordings / "events.csv").unlink()
    (tmp_path / "out").mkdir()
    changed = replace(settings, val_root_path=str(val_recordings), out=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match=r"has no events.csv to choose features on"):
        result = evaluate(changed, trained.encoder)
    assert result.members[0].events is None
    assert result.pca


@pytest.mark.slow
def test_kinds_without_spans_are_named_in_a_warning(trained, settings, tmp_path, without_figure):
    """In the val recordings one kind is missing, and another covers each of them."""
    recordings = tmp_path / "recordings"
    shutil.copytree(trained.recordings, recordings)
    val = trained.dataset("val")
    with (recordings / "events.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["event"] != "alpha"]
    covering, *scored = sorted({row["event"] for row in rows})
    for i, name in enumerate(val.recordings):
        stop = (val.window[val.recording == i].max() + 1) * val.seq_len
        row = {"recording": name, "event": covering, "start": 0, "stop": stop}
        rows = [row for row in rows if (row["recording"], row["event"]) != (name, covering)]
        rows.append(row | {"channels": "FP1"})
    with (recordings / "events.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "out"
    out.mkdir()
    changed = replace(settings, member="lambda=1", val_root_path=str(recordings), out=str(out))
    match = rf"not evaluated: alpha \(val\), {covering} \(val\).*; of these patients, no event"
    with pytest.warns(UserWarning, match=match) as caught:
        result = evaluate(changed, trained.encoder)
    (warning,) = caught
    assert "\n" not in str(warning.message)
    assert result.members[0].events.keys() <= set(scored)
    # From saved measures
    with pytest.warns(UserWarning, match=match) as caught_again:
        evaluate(changed, trained.encoder)
    assert [str(w.message) for w in caught_again] == [str(warning.message)]


def test_tokens_of_recordings_without_labels_do_not_count(
    trained, settings, tmp_path, without_figure
):
    recordings = tmp_path / "recordings"
    shutil.copytree(trained.recordings, recordings)
    test = trained.dataset("test")
    lines = (recordings / "events.csv").read_text().splitlines(keepends=True)
    unlabelled = test.recordings[0]
    kept = [line for line in lines if not line.startswith(f"{unlabelled},")]
    assert len(kept) < len(lines)
    (recordings / "events.csv").write_text("".join(kept))
    out = tmp_path / "out"
    out.mkdir()
    changed = replace(settings, member="lambda=1", root_path=str(recordings), out=str(out))
    result = evaluate(changed, trained.encoder)
    is_labelled = test.recording != 0
    assert 0 < is_labelled.sum() < len(is_labelled)
    f = np.asarray(trained.sae().encode(test.read(0, len(test.recording))))
    f = f[is_labelled][:, test.tokens.located]
    for kind, events in read_events(recordings).items():
        if kind not in result.members[0].events:
            continue
        share = event_share(test, events)[is_labelled]
        score = result.members[0].events[kind]
        assert score.token_base_rate == (share > 0).mean()
        values = f[..., score.feature]
        # Each sequence has one of the strongest tokens.
        strongest = np.argsort(-values.max(axis=1), kind="stable")[: score.examples]
        hits = share[strongest, values[strongest].argmax(axis=1)] > 0
        assert score.precision.value == pytest.approx(hits.mean(), abs=0.03)
        covered = share >= 0.5
        if not covered.any():
            assert np.isnan(score.token_auc)
            continue
        u = mannwhitneyu(values[covered], values[~covered]).statistic
        expected = u / (covered.sum() * (~covered).sum())
        assert score.token_auc == pytest.approx(expected, abs=1e-3)


def test_without_events_there_are_no_scores(trained, settings, monkeypatch, without_figure):
    monkeypatch.setattr(inputs, "EVENTS", "none.csv")
    evaluation = evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert evaluation.baselines == {}
    assert "events" not in evaluation.members[0].to_record()
    assert "raw dimensions" not in evaluation.summary()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bands": ("alpha",)}, "--bands must be a name and two limits"),
        ({"bands": ("alpha 13-8",)}, "--bands must be a name and two limits"),
        # Results are by name: the second one would replace the first.
        ({"bands": ("a 8-10", "b 13-25", "a 10-13")}, "--bands contains the name a twice"),
        ({"mask_ratio": 1.0}, "--mask_ratio must be above 0 and below 1, got 1.0"),
        ({"w": -1}, "--w must be at least 0"),
        ({"top": 0}, "--top must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, changes, match):
    with pytest.raises(UserError, match=match):
        replace(settings, **changes)
