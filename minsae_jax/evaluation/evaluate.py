"""From a finished sweep to an answer: which autoencoder, and what has it found? `python -m minsae_jax evaluate`."""

import csv
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from minsae_jax.activations.store import Store, sibling_store
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst.architecture import layer_index
from minsae_jax.errors import UserError
from minsae_jax.evaluation import events as planted
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.evaluation.loss_recovered import loss_recovered, substitution_errors
from minsae_jax.files import atomic_write
from minsae_jax.monitor import progress, table
from minsae_jax.parallel.mesh import make_mesh, members_sharding
from minsae_jax.sae import measures
from minsae_jax.sae.config import load_run_config
from minsae_jax.sae.grid import HYPER_NAMES as HYPER
from minsae_jax.sae.kinds import KINDS
from minsae_jax.sae.member import SparseAutoencoder, load_sae
from minsae_jax.sae.plots import draw_pareto

BATCH_SEQUENCES = 64
DENSITY_EDGES = np.arange(-7, 0.51, 0.5)  # log10, of the density histogram
RECOVERED, EXPLAINED = 0.95, 0.85
RULE = (
    f"the member with the fewest active features of those that recover at least {RECOVERED:.0%} of the loss (without a "
    f"pretrain head: explain at least {EXPLAINED:.0%} of the variance); where none does, the one that comes nearest"
)
Found = dict[str, Any]  # of a member


@dataclass(frozen=True)
class Member:
    name: str
    sae: SparseAutoencoder


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found, as it is written to evaluation.json."""

    members: list[Found]
    recommended: str
    baselines: dict[
        str, dict[str, float]
    ]  # AUC of raw dimensions and principal components, of each kind of event
    about: dict[str, Any]


def open_members(run: Path, name: str | None, encoder: Encoder) -> list[Member]:
    """The members of a run, or one of them. Raises UserError where they are not of this encoder, or of two layers."""
    folder = run / "members"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names or not (run / "sweep.csv").exists():
        raise UserError(
            f"{run} holds no finished run: name one with --run, or give its train command again"
        )
    if name is not None and name not in names:
        raise UserError(f"there is no member {name} in {run}: it has {', '.join(names)}")
    members = [Member(n, load_sae(folder / n)) for n in names if name in (None, n)]
    for member in members:
        made_by = member.sae.config.get("encoder_fingerprint")
        if made_by and made_by != encoder.fingerprint:
            raise UserError(
                f"{member.name} was trained on another encoder ({made_by[:12]}…) than --checkpoint_path "
                f"({encoder.fingerprint[:12]}…)"
            )
        if member.sae.d_model != encoder.architecture.d_model:
            raise UserError(
                f"{member.name} is of d_model {member.sae.d_model}, but the encoder is not"
            )
    return sorted(members, key=lambda m: tuple(m.sae.config.get(key, 0) for key in HYPER))


def open_split(
    settings: EvaluateConfig, encoder: Encoder, split: Literal["val", "test"]
) -> Dataset | None:
    """The store of a split: the one that is named, else the sibling of the run's train store. None where there is no
    such sibling."""
    trained = load_run_config(Path(str(settings.run)))
    named = {"test": settings.store, "val": settings.val_store}[split]
    path = Path(named) if named else sibling_store(Path(trained.store), split)
    if path is None or (not named and not path.is_dir()):
        return None
    dataset = open_dataset(path, trained.cache_layer, encoder.architecture, str(settings.root_path))
    _refuse_other(
        dataset.store, encoder, layer_index(trained.cache_layer, encoder.architecture.n_layers)
    )
    return dataset


def _refuse_other(store: Store, encoder: Encoder, layer: int) -> None:
    if store.require_manifest().encoder != encoder.fingerprint:
        raise UserError(
            f"the store {store.folder} is of another encoder than --checkpoint_path: extract it again"
        )
    if store.require_manifest().layer_index != layer:
        raise UserError(
            f"the store {store.folder} is of layer {store.require_manifest().layer}, but the members are not"
        )


def evaluate(settings: EvaluateConfig, encoder: Encoder) -> Evaluation:
    """Measure the members of a run on held-out recordings, and write evaluation.json, .csv and .png beside them.

    Raises UserError where run, store, encoder and recordings do not fit one another.
    """
    run = Path(str(settings.run))
    members = open_members(run, settings.member, encoder)
    test = open_split(settings, encoder, "test")
    if test is None:
        raise UserError(
            "there is no store of the test patients: name one with --store, or extract --split test"
        )
    found = [
        {"member": m.name} | {key: m.sae.config.get(key) for key in (*HYPER, "status")}
        for m in members
    ]
    measured, mean = _measure(members, test)
    for own, measures_of_own in zip(found, measured, strict=True):
        own |= measures_of_own
    about = {
        "rule": "the member that was asked for" if settings.member else RULE,
        "run": str(run),
        "store": str(test.store.folder),
        "tokens": test.store.total_tokens,
    }
    about |= _substitute(settings, encoder, test, members, found, mean)
    baselines = _find_events(settings, encoder, test, members, found)
    evaluation = Evaluation(found, recommend(found), baselines, about)
    _write(run, evaluation)
    return evaluation


def _measure(members: list[Member], test: Dataset) -> tuple[list[Found], np.ndarray]:
    """Measures of all members, and of their decoders, and the mean activation, in one pass over the store."""
    sizes = sorted({m.sae.d_sae for m in members})
    groups = [[m for m in members if m.sae.d_sae == size] for size in sizes]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m.sae.params for m in group))
        for group in groups
    ]
    mesh = make_mesh(*map(len, groups))
    stacked = jax.device_put(stacked, members_sharding(mesh))
    by_name: dict[str, Found] = {}
    total = np.zeros(test.store.d_model)
    with progress("measure", len(test.recording), "sequences", delay=2.0) as bar:

        def batches():
            for start in range(0, len(test.recording), BATCH_SEQUENCES):
                x = test.read(start, min(start + BATCH_SEQUENCES, len(test.recording)))
                bar.advance(len(x))
                np.add(total, x.sum((0, 1), dtype=np.float64), out=total)
                yield x.reshape(-1, x.shape[-1])

        for group, measured in zip(
            groups,
            measures.measure(mesh, [KINDS["relu"]] * len(stacked), stacked, batches()),
            strict=True,
        ):
            for i, member in enumerate(group):
                by_name[member.name] = _of_member(measured, i) | _of_decoder(member.sae)
    return [by_name[m.name] for m in members], (total / test.store.total_tokens).astype(np.float32)


def _of_member(m: measures.Measures, i: int) -> Found:
    names = ("fvu", "explained_variance", "l0", "l1", "dense_fraction", "cosine", "norm_ratio")
    density = m.density[i]
    counts, _ = np.histogram(np.log10(density[density > 0]), DENSITY_EDGES)
    return {name: float(getattr(m, name)[i]) for name in names} | {
        "dead_fraction": float((density == 0).mean()),
        "log10_density": {"edges": DENSITY_EDGES.tolist(), "features": counts.tolist()},
    }


def _of_decoder(sae: SparseAutoencoder) -> Found:
    """Of the largest cosine that each decoder row has with another: near 1 where features are doubles."""
    rows = np.asarray(sae.params["W_dec"])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    largest = np.full(len(rows), -1.0)
    for start in range(0, len(rows), 1024):
        cosine = rows[start : start + 1024] @ rows.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -1
        largest[start : start + 1024] = cosine.max(1)
    return {
        "decoder_cosine_mean": float(largest.mean()),
        "decoder_cosine_median": float(np.median(largest)),
        "decoder_cosine_over_0.9": float((largest > 0.9).mean()),
    }


def _substitute(
    settings: EvaluateConfig,
    encoder: Encoder,
    test: Dataset,
    members: list[Member],
    found: list[Found],
    mean: np.ndarray,
) -> Found:
    """Adds loss_recovered to every member; returns the errors they come from."""
    if encoder.architecture.head_type != "pretrain":
        head = encoder.architecture.head_type
        return {
            "substitution": f"not measured: the encoder's head is {head}, not the pretrain head"
        }
    errors = substitution_errors(
        encoder, test, test.store.require_manifest().layer_index, [m.sae for m in members], mean,
        settings.substitution_windows, settings.mask_ratio, settings.seed,
    )  # fmt: skip
    for own, error in zip(found, errors.pop("members"), strict=True):
        own["masked_error"] = error
        own["loss_recovered"] = loss_recovered(errors["mean_ablation"], error, errors["untouched"])
        own["loss_recovered_of_zero_ablation"] = loss_recovered(
            errors["zero_ablation"], error, errors["untouched"]
        )
    return {"substitution": errors | {"mask_ratio": settings.mask_ratio}}


def _find_events(
    settings: EvaluateConfig,
    encoder: Encoder,
    test: Dataset,
    members: list[Member],
    found: list[Found],
) -> dict[str, dict[str, float]]:
    """Adds `events` to every member; returns the AUC of raw dimensions and principal components."""
    if not (test.folder / planted.EVENTS).exists():
        return {}
    val = open_split(settings, encoder, "val")
    if val is None:
        raise UserError(
            f"{test.folder} has events.csv, so features are chosen on val patients, but there is no store of them: "
            "name one with --val_store, or extract --split val"
        )
    all_events = planted.read_events(test.folder)
    baselines: dict[str, dict[str, float]] = {}
    for own in found:
        own["events"] = {}
    with progress("find events", len(all_events), "kinds", delay=2.0) as bar:
        for kind, events in sorted(all_events.items()):
            on_val, on_test = (
                planted.gather(d, planted.spans_of(d, events, settings.seed)) for d in (val, test)
            )
            if any(len({span.is_event for span in spans}) < 2 for spans, _ in (on_val, on_test)):
                continue  # nothing to choose on, or to score on
            components = planted.principal_components(on_val[1])
            baselines[kind] = {
                "raw_auc": planted.score_kind(on_val, on_test, planted.both_signs)["auc"],
                "pca_auc": planted.score_kind(on_val, on_test, components)["auc"],
            }
            truth = planted.labelled_tokens(test, events)
            for own, member in zip(found, members, strict=True):
                score = planted.score_kind(on_val, on_test, partial(_encode, member.sae))
                score["token_auc"] = planted.token_auc(test, truth, member.sae, score["feature"])
                own["events"][kind] = score
            bar.advance(1)
    return baselines


def _encode(sae: SparseAutoencoder, x: np.ndarray) -> np.ndarray:
    return np.asarray(sae.encode(x))


def recommend(found: list[Found]) -> str:
    """The member that RULE chooses; none that diverged, unless all did."""
    well = [own for own in found if own.get("status") != "diverged"] or found
    name, least = (
        ("loss_recovered", RECOVERED)
        if "loss_recovered" in well[0]
        else ("explained_variance", EXPLAINED)
    )
    enough = [own for own in well if own[name] >= least]
    best = (
        min(enough, key=lambda own: own["l0"]) if enough else max(well, key=lambda own: own[name])
    )
    return best["member"]


def summary(evaluation: Evaluation) -> str:
    """The members as a table for the terminal, and the one that is recommended."""
    recovered = "loss_recovered" in evaluation.members[0]
    kinds = list(evaluation.baselines)
    columns = ["member", "L0", "FVU", "dead", *(["recovered"] if recovered else []), *kinds]
    rows = [
        [
            own["member"], f"{own['l0']:.1f}", f"{own['fvu']:.3f}", f"{own['dead_fraction']:.1%}",
            *([f"{own['loss_recovered']:.1%}"] if recovered else []),
            *(f"{own['events'][kind]['auc']:.3f}" for kind in kinds),
        ]
        for own in evaluation.members
    ]  # fmt: skip
    blank = ["", "", "", *([""] if recovered else [])]
    for name, label in (("raw_auc", "raw dimension"), ("pca_auc", "principal component")):
        if kinds:
            rows.append(
                [label, *blank, *(f"{evaluation.baselines[kind][name]:.3f}" for kind in kinds)]
            )
    told = [table(columns, rows)]
    if kinds:
        told.append(
            "Under an event's name: AUC of its best single feature, chosen on val, scored on test patients."
        )
    told.append(f"recommended: {evaluation.recommended}\nrule: {evaluation.about['rule']}")
    return "\n".join(told)


def _write(run: Path, evaluation: Evaluation) -> None:
    content = evaluation.about | {
        "recommended": evaluation.recommended,
        "baselines": evaluation.baselines,
        "members": evaluation.members,
    }
    with atomic_write(run / "evaluation.json") as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")
    flat = [_flat(own) for own in evaluation.members]
    with atomic_write(run / "evaluation.csv") as aside, aside.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    points: dict[str, list[Found]] = {}
    for own in evaluation.members:
        points.setdefault(own["member"].partition(",")[2], []).append(own)
    draw_pareto(run / "evaluation.png", points, f"{run.resolve().name} on test patients")


def _flat(own: Found) -> Found:
    row = {name: value for name, value in own.items() if not isinstance(value, dict)}
    for kind, score in own.get("events", {}).items():
        row |= {
            f"{kind}_{name}": score[name] for name in ("feature", "auc", "probe_auc", "token_auc")
        }
    return row
