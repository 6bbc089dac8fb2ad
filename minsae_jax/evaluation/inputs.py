"""Inputs of an evaluation: members, settings of their runs and stores, each opened once."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from minsae_jax.activations.manifest import Manifest
from minsae_jax.activations.store import (
    Store,
    open_store,
    sibling_store,
    warn_of_common_patients,
)
from minsae_jax.eeg.events import EVENTS
from minsae_jax.eeg.recordings import LENGTHS, read_lengths, recordings_folder
from minsae_jax.eeg.splits import patient_of, read_splits, splits_path
from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.errors import UserError, join_some
from minsae_jax.evaluation.config import EvaluationInputConfig
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.evaluation.events import LabelledEvent, read_events
from minsae_jax.evaluation.members import Member, open_members, training_of
from minsae_jax.locks import lock_folder
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.data import mismatch_of
from minsae_jax.sae.member import SparseAutoencoder


class SplitEvents(NamedTuple):
    """Labelled events by kind; both have the same kinds, some without any event."""

    val: dict[str, list[LabelledEvent]]
    test: dict[str, list[LabelledEvent]]


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that `evaluate` reads; the report uses the same objects."""

    # A run, or the folder of a single SAE
    run: Path
    # Where measures and report are written: the run, or another folder
    out: Path
    # None without an encoder
    encoder: BaseEncoder | None
    # Sorted by hyper-parameters
    members: tuple[Member, ...]
    test: Dataset
    # None if there is no store of the val patients
    val: Dataset | None
    # None unless there are labelled events of both val and test patients
    events: SplitEvents | None
    # The run's train store; None if it does not exist any more, or for a single SAE
    train: Store | None

    @property
    def pca_store(self) -> Store | None:
        """The store whose principal components are the baseline: as the members, of train patients.

        It is that of the val patients if there is no train store, or None.
        """
        if self.train is not None or self.val is None:
            return self.train
        return self.val.store

    @property
    def is_one_run(self) -> bool:
        """Whether all members are of the run."""
        folders = [member.folder for member in self.members if member.folder is not None]
        return all(folder.parent.parent == self.run for folder in folders)

    @property
    def source(self) -> Path:
        """The run, or `out` if not all members are of the run; as given, often a relative path."""
        return self.run if self.is_one_run else self.out

    @property
    def name(self) -> str:
        """Name of the folder in titles."""
        # Resolved, since "." has no name.
        return self.source.resolve().name

    @property
    def layer(self) -> int:
        """Index of the encoder's layer, from 0."""
        return self.test.store.require_manifest().layer_index

    @property
    def event_files(self) -> list[Path]:
        """events.csv of the val and of the test recordings; empty without events."""
        if self.val is None or self.events is None:
            return []
        return [self.val.folder / EVENTS, self.test.folder / EVENTS]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock stores and recordings, so that no other command replaces them while they are read.

        Raises UserError if one does so already.
        """
        datasets = [self.test] if self.val is None else [self.test, self.val]
        folders = {dataset.folder for dataset in datasets}
        folders |= {dataset.store.folder for dataset in datasets}
        if self.train is not None:
            folders.add(self.train.folder)
        with ExitStack() as stack:
            for folder in sorted(folders):
                stack.enter_context(lock_folder(folder, shared=True))
            yield


def open_inputs(
    settings: EvaluationInputConfig,
    encoder: BaseEncoder | None,
    train_config: TrainConfig | None = None,
    member: str | None = None,
    out: str | None = None,
    compare_with: Sequence[str] = (),
) -> EvaluationInputs:
    """Open members and stores; train_config is read from the run unless it is passed.

    member: one that there must be. out: folder of the results, by default the run. compare_with:
    folders of other runs, and of single SAEs. Raises UserError if run, members, stores, encoder and
    recordings do not belong together.
    """
    run = Path(settings.run)
    folders = [run, *map(Path, compare_with)]
    members = open_members(folders)
    names = [each.name for each in members]
    if member is not None and member not in names:
        raise UserError(f"unknown member {member} in {run}; members: {', '.join(names)}")
    if encoder is not None:
        for each in members:
            check_encoder(each.sae, encoder, each.name)
    trainings = [train_config or training_of(run), *map(training_of, folders[1:])]
    train_configs = [config for config in trainings if config is not None]
    # Only for the places of stores that are not given.
    first = train_configs[0] if train_configs else None
    layer = members[0].sae.config.get("layer") if first is None else first.cache_layer
    test = _open_split(settings, first, layer, encoder, "test", settings.store)
    if test is None:
        default = None if first is None else _default_store(first, "test")
        place = "" if default is None else f" at {default}"
        raise UserError(
            f"there is no store of the test patients{place}; set --store, or run extract with "
            "--split test"
        )
    val = _open_split(settings, first, layer, encoder, "val", settings.val_store)
    datasets = [test] if val is None else [test, val]
    for dataset in datasets:
        _check_store(members, dataset, encoder)
    if val is not None:
        # An imported SAE does not say of which encoder and layer it is.
        mismatch = mismatch_of(test.store, val.store, "test")
        if mismatch:
            raise UserError(f"{val.store.folder} {mismatch}; choose another --val_store")
    train_stores = [_train_store(config) for config in train_configs]
    train_recordings: set[str] = set()
    for config, store in zip(train_configs, train_stores, strict=True):
        train_recordings |= _train_recordings(config, store)
    _warn_of_training_patients(train_configs, train_recordings, test)
    if val is not None:
        warn_of_common_patients(val.store, train_recordings)
        _warn_of_val_patients(val, test)
    return EvaluationInputs(
        run=run,
        out=Path(out or run),
        encoder=encoder,
        members=members,
        test=test,
        val=val,
        events=_read_events(test, val),
        train=next((store for store in train_stores if _is_like(store, test.store)), None),
    )


def _read_events(test: Dataset, val: Dataset | None) -> SplitEvents | None:
    """Return the events of the kinds that val or test recordings have, or None if one has no file.

    Warns if events of the test patients cannot be used.
    """
    path = test.folder / EVENTS
    if not path.exists():
        return None
    if val is None:
        reason = (
            "there is no store of the val patients to choose features on; set --val_store, or run "
            "extract with --split val"
        )
    elif not (val.folder / EVENTS).exists():
        reason = f"{val.folder} has no {EVENTS} to choose features on; set --val_root_path"
    else:
        of_test = read_events(test.folder)
        of_val = of_test if val.folder == test.folder else read_events(val.folder)
        _warn_of_shifted_columns(val, of_val)
        _warn_of_shifted_columns(test, of_test)
        kinds = sorted(of_val.keys() | of_test.keys())
        return SplitEvents(
            {kind: of_val.get(kind, []) for kind in kinds},
            {kind: of_test.get(kind, []) for kind in kinds},
        )
    warnings.warn(f"events in {path} are not evaluated, since {reason}", stacklevel=2)
    return None


def _warn_of_shifted_columns(
    dataset: Dataset, events: Mapping[str, Sequence[LabelledEvent]]
) -> None:
    """Warn if recordings whose columns are not those of the channel names have events on some."""
    shifted = {dataset.recordings[i] for i in np.flatnonzero(dataset.shifted)}
    affected = set()
    for event in chain.from_iterable(events.values()):
        if event.recording in shifted and len(set(event.channels)) < dataset.n_vars:
            affected.add(event.recording)
    if affected:
        warnings.warn(
            f"events in {join_some(sorted(affected), limit=3)} are compared on wrong channels: "
            "the last channel is all zero, since missing electrodes shifted the columns; remove "
            f"their rows from {dataset.folder / EVENTS}",
            stacklevel=2,
        )


def _train_store(config: TrainConfig) -> Store | None:
    """Return the store of a run, or None if it has none or it was moved or removed since."""
    if config.live:
        return None
    try:
        return open_store(config.store, config.cache_layer)
    except UserError:
        return None


def _is_like(store: Store | None, test: Store) -> bool:
    """Return whether there is a store, and it is of the test store's encoder and layer."""
    return store is not None and mismatch_of(store, test) is None


def _train_recordings(config: TrainConfig, store: Store | None) -> set[str]:
    """Return the file names of the recordings that members were trained on; none if unknown."""
    try:
        if not config.live:
            return set() if store is None else store.recordings()
        root = Path(str(config.root_path))
        names = set(read_lengths(recordings_folder(root) / LENGTHS))
        if config.split == "all":
            return names
        # In `root`, also where the recordings are in its tuhab_preprocessed.
        patients = set(read_splits(splits_path(root, config.split_seed))[config.split])
    except UserError:
        return set()  # they were moved or removed since, or are damaged
    return {name for name in names if patient_of(name) in patients}


def _warn_of_training_patients(
    train_configs: Sequence[TrainConfig], train_recordings: set[str], test: Dataset
) -> None:
    """Warn if patients to evaluate on are among those that the members were trained on."""
    folder = test.store.folder.resolve()
    is_train_split = test.store.require_manifest().data.get("split") == "train"
    train_stores = [Path(config.store).resolve() for config in train_configs]
    is_train_store = folder in train_stores or folder.parent in train_stores
    if not (is_train_split or is_train_store):
        warn_of_common_patients(test.store, train_recordings)
    else:
        warnings.warn(
            f"{test.store.folder} contains the patients that the members were trained on; the "
            "measures are not those of held-out patients",
            stacklevel=2,
        )


def _warn_of_val_patients(val: Dataset, test: Dataset) -> None:
    """Warn if features are chosen and measured on the same recordings, as with --split all."""
    if val.folder == test.folder and not set(val.recordings).isdisjoint(test.recordings):
        warnings.warn(
            f"{test.store.folder} contains recordings of {val.store.folder}, on which features and "
            "probes are chosen; the measures of events and labels are too high",
            stacklevel=2,
        )


def check_encoder(sae: SparseAutoencoder, encoder: BaseEncoder, name: str) -> None:
    """Raise UserError if an SAE was trained on another encoder or is of another size."""
    trained_on = sae.config.get("encoder_fingerprint")
    if trained_on and trained_on != encoder.fingerprint:
        raise UserError(
            f"{name} was trained on another encoder ({trained_on[:12]}…) than this one "
            f"({encoder.fingerprint[:12]}…); choose its encoder with --checkpoint_path"
        )
    d_model = encoder.spec.d_model
    if sae.d_model != d_model:
        raise UserError(f"{name} has d_model {sae.d_model}, but the encoder has {d_model}")


def _check_store(members: Sequence[Member], dataset: Dataset, encoder: BaseEncoder | None) -> None:
    """Raise UserError if a store is not of the encoder and layer of all members."""
    store = dataset.store
    manifest = store.require_manifest()
    if encoder is not None and manifest.encoder != encoder.fingerprint:
        raise UserError(
            f"{store.folder} was extracted with another encoder than --checkpoint_path; "
            "extract it again"
        )
    for member in members:
        trained_on = member.sae.config.get("encoder_fingerprint")
        is_other = trained_on is not None and trained_on != manifest.encoder
        if is_other or member.sae.d_model != manifest.d_model:
            raise UserError(
                f"{member.name} was trained on activations of another encoder than those of "
                f"{store.folder}; choose its store with --store and --val_store"
            )
        revin = member.sae.config.get("revin")
        if revin is not None and manifest.data.get("revin", revin) != revin:
            raise UserError(
                f"{store.folder} was extracted with another --force_revin than the activations "
                f"that {member.name} was trained on"
            )
        layer = member.sae.config.get("layer")
        if layer is not None and not _is_layer(layer, manifest, encoder):
            raise UserError(
                f"{store.folder} is of layer {manifest.layer}, but {member.name} was trained on "
                f"layer {layer}"
            )


def _is_layer(layer: int, manifest: Manifest, encoder: BaseEncoder | None) -> bool:
    """Return whether a store can be of a layer, which counts from the end if it is negative."""
    if encoder is not None:
        return encoder.spec.layer_index(layer) == manifest.layer_index
    # The number of the encoder's layers is unknown in some stores.
    is_unknown = layer < 0 <= manifest.layer and manifest.layer_from_end is None
    return is_unknown or manifest.is_layer(layer)


def _default_store(config: TrainConfig, split: Literal["val", "test"]) -> Path | None:
    """Return the run's --val_store if it exists, or else the sibling of the train store.

    A run with --live has no train store.
    """
    sibling = None if config.live else sibling_store(Path(config.store), split)
    if split == "test" or config.val_store is None:
        return sibling
    # The members were measured on this store while they were trained.
    if Path(config.val_store).is_dir():
        return Path(config.val_store)
    if sibling is not None and sibling.is_dir():
        warnings.warn(
            f"the run's --val_store {config.val_store} is missing; using {sibling}", stacklevel=2
        )
    return sibling


def _open_split(
    settings: EvaluationInputConfig,
    train_config: TrainConfig | None,
    layer: int | None,
    encoder: BaseEncoder | None,
    split: Literal["val", "test"],
    named: str | None,
) -> Dataset | None:
    """Open the store at `named`, else the default of the run, or None if it is missing."""
    default = None if train_config is None else _default_store(train_config, split)
    path = Path(named) if named else default
    if path is None or not (named or path.is_dir()):
        return None
    root_path = settings.root_path
    if split == "val" and settings.val_root_path is not None:
        root_path = settings.val_root_path
    return open_dataset(path, layer, encoder, root_path)
