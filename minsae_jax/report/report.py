"""The report of one member: what `evaluate` found, and every feature in the EEG, as pages to look at."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import SAMPLING_RATE
from minsae_jax.encoder.converted import Encoder
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.evaluate import Evaluation, open_members, open_split
from minsae_jax.report.describe import describe_all, make_context, read_labels
from minsae_jax.report.examples import collect
from minsae_jax.report.page import write_report
from minsae_jax.sae.member import SparseAutoencoder

LABELS = "labels.csv"


def show(settings: EvaluateConfig, encoder: Encoder, evaluation: Evaluation) -> Path:
    """Write report/ in the run, for the recommended member or the one asked for; returns its index.html."""
    run = Path(str(settings.run))
    (member,) = open_members(run, evaluation.recommended, encoder)
    test = open_split(settings, encoder, "test")
    if test is None:
        raise UserError(
            "there is no store of the test patients: name one with --store, or extract --split test"
        )
    activity = collect(test, member.sae, settings.top, settings.per_recording, seed=settings.seed)
    folder = run / "report"
    context = make_context(
        test,
        member.sae,
        activity,
        encoder,
        settings.w,
        settings.band_limits(),
        read_labels(folder / LABELS),
    )
    write_report(
        folder, _meta(settings, encoder, evaluation, test, member.sae), describe_all(context)
    )
    return folder / "index.html"


def _meta(
    settings: EvaluateConfig,
    encoder: Encoder,
    evaluation: Evaluation,
    test: Dataset,
    sae: SparseAutoencoder,
) -> dict[str, Any]:
    a, run = encoder.architecture, Path(str(settings.run)).resolve()
    own = next(m for m in evaluation.members if m["member"] == evaluation.recommended)
    shifted = int(test.shifted.sum())
    notes = [] if settings.member else [f"recommended: {evaluation.about['rule']}"]
    if shifted:
        notes.append(f"{shifted} recordings with shifted columns are left out of the channels")
    return {
        "title": f"{run.name}: {own['member']}",
        "member": own["member"],
        "run": str(run),
        "encoder": encoder.fingerprint[:12],
        "layer": test.store.require_manifest().layer,
        "created_with": f"minsae_jax {version('minsae_jax')}",
        "n_tokens": test.store.total_tokens,
        "n_windows": len(test.recording) // a.n_vars,
        "n_recordings": len(test.recordings),
        "n_patients": len(set(test.patients)),
        "split": test.store.require_manifest().data.get("split", "test"),
        "sampling_rate": SAMPLING_RATE,
        "patch_seconds": a.stride / SAMPLING_RATE,
        "n_patches": a.n_patches,
        "has_cls": a.use_cls_token,
        "channels": list(CHANNELS) if a.n_vars == len(CHANNELS) else [str(i) for i in range(a.n_vars)],
        "positions": POSITIONS.tolist() if a.n_vars == len(CHANNELS) else [],
        "bands": [list(band) for band in settings.band_limits()],
        "summary": _summary(own, sae),
        "members": [
            {"name": m["member"], "lambda_sparsity": m["lambda_sparsity"], "l0": m["l0"], "fvu": m["fvu"],
             "recommended": m["member"] == evaluation.recommended}
            for m in evaluation.members
        ],
        "events": [
            {"kind": kind, "feature": score["feature"], "auc": score["auc"], "probe_auc": score["probe_auc"]}
            | evaluation.baselines[kind]
            for kind, score in own.get("events", {}).items()
        ],
        "waveform_exact": test.store.require_manifest().layer_index == a.n_layers - 1,
        "shifted_recordings": shifted,
        "notes": notes,
    }  # fmt: skip


def _summary(own: dict[str, Any], sae: SparseAutoencoder) -> list[list[str]]:
    rows = [
        ["features", f"{sae.d_sae:,}"],
        ["active a token (L0)", f"{own['l0']:.1f}"],
        ["variance not explained (FVU)", f"{own['fvu']:.3f}"],
        ["never active here", f"{own['dead_fraction']:.1%}"],
        ["active on over 10 % of tokens", f"{own['dense_fraction']:.1%}"],
    ]
    if "loss_recovered" in own:
        rows.append(["loss recovered", f"{own['loss_recovered']:.1%}"])
    return rows
