"""Inputs of an evaluation: the members of a run, its settings and the stores, each opened once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minsae_jax.activations.store import sibling_store
from minsae_jax.encoder.converted import Encoder
from minsae_jax.encoder.patchtst.architecture import layer_index
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.evaluation.events import EVENTS_CSV
from minsae_jax.sae.config import TrainConfig, load_run_config
from minsae_jax.sae.hyper import Hyper, member_hyper, sort_key
from minsae_jax.sae.member import SparseAutoencoder, load_sae


@dataclass(frozen=True)
class Member:
    """A trained member of a run."""

    name: str
    sae: SparseAutoencoder

    @property
    def hyper(self) -> Hyper:
        return member_hyper(self.sae.config)


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that `evaluate` reads; the report uses the same objects."""

    run: Path
    encoder: Encoder
    # Sorted by hyper-parameters
    members: tuple[Member, ...]
    test: Dataset
    # None if there is no store of the val patients
    val: Dataset | None
    has_events: bool

    @property
    def layer(self) -> int:
        """Index of the encoder's layer, from 0."""
        return self.test.store.require_manifest().layer_index


def open_inputs(
    settings: EvaluateConfig, encoder: Encoder, train_config: TrainConfig | None = None
) -> EvaluationInputs:
    """Open members and stores; train_config is read from the run unless it is passed.

    Raises UserError if run, members, stores, encoder and recordings do not belong together.
    """
    run = Path(settings.run)
    members = open_members(run, settings.member, encoder)
    train_config = train_config or load_run_config(run)
    test = _open_split(settings, train_config, encoder, "test", settings.store)
    if test is None:
        raise UserError(
            "there is no store of the test patients; set --store, or run extract with --split test"
        )
    val = _open_split(settings, train_config, encoder, "val", settings.val_store)
    has_events = (test.folder / EVENTS_CSV).exists()
    if has_events and val is None:
        raise UserError(
            f"{test.folder} has {EVENTS_CSV}, which requires a store of the val patients to "
            "choose features on; set --val_store, or run extract with --split val"
        )
    return EvaluationInputs(run, encoder, members, test, val, has_events)


def open_members(run: Path, name: str | None, encoder: Encoder) -> tuple[Member, ...]:
    """Load all members of a run, or the one called `name`, sorted by hyper-parameters.

    Raises UserError if the run is not finished or members were trained on another encoder.
    """
    folder = run / "members"
    names = []
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names or not (run / "sweep.csv").exists():
        raise UserError(f"{run} is not a finished run; choose one with --run, or rerun `train`")
    if name is not None and name not in names:
        raise UserError(f"unknown member {name} in {run}; members: {', '.join(names)}")
    selected = names if name is None else [name]
    members = [Member(n, load_sae(folder / n)) for n in selected]
    for member in members:
        _check_member(member, encoder)
    return tuple(sorted(members, key=lambda member: sort_key(member.hyper)))


def _check_member(member: Member, encoder: Encoder) -> None:
    trained_on = member.sae.config.get("encoder_fingerprint")
    if trained_on and trained_on != encoder.fingerprint:
        raise UserError(
            f"{member.name} was trained on another encoder ({trained_on[:12]}…) than "
            f"--checkpoint_path ({encoder.fingerprint[:12]}…)"
        )
    d_model = encoder.architecture.d_model
    if member.sae.d_model != d_model:
        raise UserError(
            f"{member.name} has d_model {member.sae.d_model}, but the encoder has {d_model}"
        )


def _open_split(
    settings: EvaluateConfig,
    train_config: TrainConfig,
    encoder: Encoder,
    split: Literal["val", "test"],
    named: str | None,
) -> Dataset | None:
    """Open the store at `named`, else the sibling of the train store, or None if it is missing."""
    path = Path(named) if named else sibling_store(Path(train_config.store), split)
    if path is None:
        return None
    if not named and not path.is_dir():
        return None
    layer = train_config.cache_layer
    dataset = open_dataset(path, layer, encoder.architecture, settings.root_path)
    manifest = dataset.store.require_manifest()
    if manifest.encoder != encoder.fingerprint:
        raise UserError(
            f"{dataset.store.folder} was extracted with another encoder than --checkpoint_path; "
            "extract it again"
        )
    if manifest.layer_index != layer_index(layer, encoder.architecture.n_layers):
        raise UserError(
            f"{dataset.store.folder} is of layer {manifest.layer}, but the members are not"
        )
    return dataset
