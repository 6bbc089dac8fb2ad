"""Members to evaluate: of a run, of several runs, and SAEs that belong to no run."""

import json
import re
import shutil
from dataclasses import replace

import pytest

import minsae_jax as ms
from minsae_jax import UserError
from minsae_jax.evaluation.members import open_members, training_of
from minsae_jax.locks import lock_folder
from minsae_jax.sae.member import load_sae, save_member


@pytest.fixture
def config(trained, tmp_path):
    return ms.EvaluateConfig(
        run=str(trained.run),
        root_path=str(trained.recordings),
        checkpoint_path=str(trained.encoder_folder),
        out=str(tmp_path / "evaluation"),
        substitution_windows=2,
        report=False,
    )


def imported_sae(trained, folder, **config):
    """Write the weights of a member as an SAE of another program."""
    sae = load_sae(trained.run / "members/lambda=1")
    save_member(folder, sae.params, {"kind": "relu"} | config)
    return folder


def check_equal(a, b):
    """Check that two members have the same measures but for the rounding of other scales.

    L1 has the unit of training, which an imported SAE does not have.
    """
    values = []
    for member in (a, b):
        measured = [vars(member.tokens)[name] for name in ("fvu", "l0", "cosine", "norm_ratio")]
        measured += [member.description_bits, member.loss.masked_error]
        values.append([*measured, member.event_summary.auc.value])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_runs_and_saes_are_evaluated_together(trained, config, tmp_path, without_figure):
    other = shutil.copytree(trained.run, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    theirs = imported_sae(trained, tmp_path / "theirs")
    compared = ms.evaluate(replace(config, compare_with=(str(other), str(theirs)), report=True))
    name = trained.run.name
    expected = {f"lambda=0.1,from={name}", "lambda=0.1,from=other", "theirs"}
    expected |= {f"lambda=1,from={name}", "lambda=1,from=other"}
    assert {member.member for member in compared.members} == expected
    of_run = compared.find(f"lambda=1,from={name}")
    check_equal(compared.find("lambda=1,from=other"), of_run)
    check_equal(compared.find("theirs"), of_run)
    assert of_run.fvu != compared.find("lambda=0.1,from=other").fvu
    l1 = {member.member: member.tokens.l1 for member in compared.members}
    scale = load_sae(other / "members/lambda=1").config["scale"]
    assert l1["lambda=1,from=other"] == l1[f"lambda=1,from={name}"]
    assert l1["theirs"] * scale == pytest.approx(l1["lambda=1,from=other"], rel=1e-4)
    assert scale != 1
    content = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert content["folders"]["theirs"] == str(theirs)
    assert content["folders"]["lambda=1,from=other"] == str(other / "members/lambda=1")
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    # The report names settings by the members' names, since the runs have the same ones.
    pages = (tmp_path / "evaluation/report/index_data.js").read_text()
    assert '"setting":"lambda=1,from=other"' in pages


def test_sae_of_no_run_is_evaluated_alone(trained, config, tmp_path, without_figure):
    sae = imported_sae(trained, tmp_path / "theirs")
    alone = replace(config, run=str(sae), report=True)
    with pytest.raises(UserError, match="no store of the test patients; set --store"):
        ms.evaluate(alone)
    stores = {"store": f"{trained.stores}_test", "val_store": f"{trained.stores}_val"}
    evaluation = ms.evaluate(replace(alone, **stores))
    assert [member.member for member in evaluation.members] == ["theirs"]
    of_run = ms.evaluate(replace(config, out=str(tmp_path / "of_run"), member="lambda=1"))
    check_equal(evaluation.find("theirs"), of_run.find("lambda=1"))
    meta = (tmp_path / "evaluation/report/index_data.js").read_text()
    assert f'"title":"evaluation: theirs","member":"theirs","member_folder":"{sae}"' in meta


def test_val_store_of_another_layer_than_the_test_store_is_refused(trained, config, tmp_path):
    """An imported SAE fits both."""
    sae = imported_sae(trained, tmp_path / "theirs")
    val = tmp_path / "val"
    shutil.copytree(f"{trained.stores}_val", val)
    (manifest,) = val.rglob("manifest.json")
    content = json.loads(manifest.read_text())
    content |= {"layer": 0, "layer_index": 0, "layer_from_end": -3}
    manifest.write_text(json.dumps(content))
    stores = {"store": f"{trained.stores}_test", "val_store": str(val)}
    with pytest.raises(UserError, match=r"val.* is from another layer than the test store"):
        ms.evaluate(replace(config, run=str(sae), **stores))


def test_sae_in_a_run_has_its_encoder_and_stores(trained, config, without_figure):
    member = str(trained.run / "members/lambda=1")
    evaluation = ms.evaluate(replace(config, run=member, checkpoint_path=None))
    assert [each.member for each in evaluation.members] == ["lambda=1"]
    assert evaluation.members[0].loss is not None


def test_patients_that_a_compared_run_was_trained_on_are_a_warning(trained, config, tmp_path):
    other = shutil.copytree(trained.run, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    changed = re.sub(r"store: .*", f"store: {trained.stores}_test", text, count=1)
    assert changed != text
    (other / "config.yaml").write_text(changed)
    # Warnings are errors in tests.
    with pytest.raises(UserWarning, match=r"_test.* contains the patients that the members"):
        ms.evaluate(replace(config, compare_with=(str(other),)))


def test_unfit_members_are_refused(trained, config, tmp_path):
    def check(message, *folders, **changes):
        with pytest.raises(UserError, match=message):
            ms.evaluate(replace(config, compare_with=tuple(map(str, folders)), **changes))

    check("--compare_with .*nowhere is not a folder", tmp_path / "nowhere")
    check("is not a finished run, nor the folder of an SAE", trained.recordings)
    check("contain 2 members called lambda=0.1,from=run", trained.run)
    other_layer = imported_sae(trained, tmp_path / "layer", layer=0)
    check("is of layer -1, but layer was trained on layer 0", other_layer)
    other_revin = imported_sae(trained, tmp_path / "revin", revin=True)
    check("extracted with another --force_revin than .* that revin was", other_revin)
    other_encoder = imported_sae(trained, tmp_path / "encoder", encoder_fingerprint="f" * 64)
    check("encoder was trained on another", other_encoder)
    check("pca,k=4 is the name of a baseline", imported_sae(trained, tmp_path / "pca,k=4"))
    sae = imported_sae(trained, tmp_path / "theirs")
    check("is an SAE and not a run; set --out", run=str(sae), out=None)
    with pytest.raises(UserError, match="--compare_with requires --out"):
        replace(config, compare_with=(str(sae),), out=None)


def test_evaluation_elsewhere_is_made_again_after_it_was_killed(trained, config, tmp_path):
    out = tmp_path / "evaluation"
    for folder in (out / "evaluation", out / ".report.tmp/data", out / ".report.old"):
        folder.mkdir(parents=True)
    for name in ("SHA256SUMS.tmp", "evaluation.json.tmp"):
        (out / name).write_text("half")
    # The next check after that of the folder
    with pytest.raises(UserError, match="contain 2 members called"):
        ms.evaluate(replace(config, compare_with=(str(trained.run),)))


def test_run_of_a_single_member_is_locked(trained, config):
    member = str(trained.run / "members/lambda=1")
    with (
        lock_folder(trained.run),
        pytest.raises(UserError, match="run is being written by another process"),
    ):
        ms.evaluate(replace(config, run=member))


def test_imported_sae_beside_the_yaml_of_an_encoder_is_not_in_a_run(trained, tmp_path):
    (tmp_path / "config.yaml").write_text("data: {}")
    (tmp_path / "checkpoints").mkdir()
    assert training_of(imported_sae(trained, tmp_path / "members/theirs")) is None
    assert training_of(trained.run / "members/lambda=1") == training_of(trained.run)


def test_equal_names_get_those_of_their_folders(trained, tmp_path):
    a = imported_sae(trained, tmp_path / "a/sae")
    b = imported_sae(trained, tmp_path / "b/sae")
    c = imported_sae(trained, tmp_path / "b/other")
    assert {member.name for member in open_members([a, b, c])} == {
        "sae,from=a",
        "sae,from=b",
        "other",
    }
    with pytest.raises(UserError, match="contain 2 members called other,from=b"):
        open_members([c, c])
