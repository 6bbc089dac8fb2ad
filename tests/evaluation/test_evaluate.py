"""The whole evaluation of the small sweep: figures against definitions, refusals, files, the recommended member."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from minsae_jax import UserError
from minsae_jax.evaluation import events as planted
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.evaluate import evaluate, recommend, summary
from minsae_jax.evaluation.loss_recovered import substitution_errors


@pytest.fixture(scope="module")
def settings(trained):
    return EvaluateConfig(
        run=str(trained.run), root_path=str(trained.recordings), substitution_windows=4
    )


@pytest.fixture(scope="module")
def evaluation(trained, settings):
    return evaluate(settings, trained.encoder)


def test_figures(trained, evaluation):
    dataset = trained.dataset("test")
    x = dataset.read(0, len(dataset.recording)).reshape(-1, 128)
    assert [m["member"] for m in evaluation.members] == ["lambda=0.1", "lambda=1"]
    for own in evaluation.members:
        sae = trained.sae(own["member"])
        f = np.asarray(sae.encode(x))
        r = np.asarray(sae.decode(f)) - x
        assert own["fvu"] == pytest.approx((r**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
        assert own["l0"] == pytest.approx((f > 0).sum(1).mean(), rel=1e-3)
        assert own["dead_fraction"] == pytest.approx((f == 0).all(0).mean(), abs=0.02)
        rows = np.array(sae.params["W_dec"])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T - 2 * np.eye(len(rows))
        assert own["decoder_cosine_mean"] == pytest.approx(cosine.max(1).mean(), rel=1e-4)
        alive = (f > 0).any(0).sum()
        assert sum(own["log10_density"]["features"]) == pytest.approx(alive, abs=1)
        assert own["loss_recovered"] < 1
        kinds = {"alpha", "blink", "muscle", "slow_wave", "spike", "spindle"}
        assert own["events"].keys() <= kinds
        for score in own["events"].values():
            assert 0 <= score["auc"] <= 1
            assert len(set(score["best_five"])) == 5
    assert evaluation.baselines.keys() == evaluation.members[0]["events"].keys()
    assert evaluation.about["tokens"] == len(x)
    alone = substitution_errors(trained.encoder, dataset, 2, [], x.mean(0), 4, 0.3)
    assert evaluation.about["substitution"]["mean_ablation"] == pytest.approx(
        alone["mean_ablation"], rel=1e-4
    )


def test_files(trained, evaluation):
    told = json.loads((trained.run / "evaluation.json").read_text())
    assert told["recommended"] == evaluation.recommended
    assert told["members"] == evaluation.members
    with (trained.run / "evaluation.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["fvu"]) for r in rows] == [m["fvu"] for m in evaluation.members]
    kind = next(iter(evaluation.baselines))
    assert float(rows[0][f"{kind}_auc"]) == evaluation.members[0]["events"][kind]["auc"]
    assert (trained.run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    text = summary(evaluation)
    assert f"recommended: {evaluation.recommended}" in text
    assert "raw dimension" in text


def test_one_member(trained, settings):
    only = evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert [m["member"] for m in only.members] == ["lambda=1"]
    assert only.recommended == "lambda=1"
    assert "rule: the member that was asked for" in summary(only)


def test_the_rule():
    def member(name, l0, recovered, status="finished"):
        return {
            "member": name, "l0": l0, "loss_recovered": recovered, "explained_variance": recovered, "status": status
        }  # fmt: skip

    found = [
        member("a", 90, 0.99),
        member("b", 50, 0.96),
        member("c", 20, 0.94),
        member("d", 10, 0.97),
    ]
    assert recommend(found) == "d"
    assert recommend([*found[:3], member("d", 10, 0.97, "diverged")]) == "b"
    assert recommend([found[2]]) == "c"
    assert recommend([member("e", 5, 0.2), member("f", 50, 0.5)]) == "f"
    for own in found:
        del own["loss_recovered"]
    assert recommend(found[:3]) == "c"


def test_refusals(trained, settings, tmp_path, monkeypatch):
    encoder = trained.encoder

    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            evaluate(replace(settings, **changes), encoder)

    refused("there is no member lambda=7 in .*: it has lambda=0.1, lambda=1", member="lambda=7")
    refused("there is no store", store=str(tmp_path / "nowhere"))
    refused("there is no file_lengths_map.csv", root_path=str(tmp_path))
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file_lengths_map.csv").write_text("filename,time_len\n")
    refused("does not hold demo.*, of which the store", root_path=str(tmp_path / "others"))
    (tmp_path / "run").mkdir()
    refused("holds no finished run", run=str(tmp_path / "run"))
    other = tmp_path / "other"
    shutil.copytree(trained.run, other)
    config = other / "members/lambda=1/config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"encoder_fingerprint": "f" * 64})
    )
    refused("lambda=1 was trained on another encoder", run=str(other))


def test_without_events(trained, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "EVENTS", "none.csv")
    found = evaluate(replace(settings, member="lambda=1"), trained.encoder)
    assert found.baselines == {}
    assert "events" not in found.members[0]
    assert "raw dimension" not in summary(found)
