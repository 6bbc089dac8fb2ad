"""The members to evaluate: those of runs, and SAEs that belong to no run, such as imported ones."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minsae_jax.errors import UserError
from minsae_jax.sae.config import TrainConfig, hint_at_runs, load_run_config, run_of
from minsae_jax.sae.hyper import Hyper, member_hyper, sort_key
from minsae_jax.sae.member import WEIGHTS, SparseAutoencoder, load_sae


@dataclass(frozen=True)
class Member:
    """A trained SAE."""

    name: str
    sae: SparseAutoencoder
    # None for one that has no files, such as a baseline
    folder: Path | None = None

    @property
    def hyper(self) -> Hyper:
        return member_hyper(self.sae.config)


def is_sae(folder: Path) -> bool:
    """Return whether a folder is that of a single SAE, not of a run."""
    return (folder / WEIGHTS).is_file()


def training_of(folder: Path) -> TrainConfig | None:
    """Return the settings of a run, or of the run that an SAE belongs to; None if to no run.

    Raises UserError if the folder is neither a run nor an SAE.
    """
    run: Path | None = folder
    if is_sae(folder):
        run = run_of(folder)
    return None if run is None else load_run_config(run)


def open_members(folders: Sequence[Path]) -> tuple[Member, ...]:
    """Load all members of runs, and single SAEs, sorted by hyper-parameters.

    Members are called like their folders. Those of different runs that have the same name get
    that of their run too: `topk,k=8,from=demo`. Raises UserError if a folder is neither a finished
    run nor an SAE, or if a member is there twice.
    """
    paths = [path for folder in folders for path in _member_folders(folder)]
    members = [Member(path.name, load_sae(path), path) for path in paths]
    members = _with_distinct_names(members)
    return tuple(sorted(members, key=lambda member: sort_key(member.hyper)))


def _member_folders(folder: Path) -> list[Path]:
    """Return the folders of a run's members, or that of a single SAE."""
    if is_sae(folder):
        # Resolved, since "." has no name.
        return [folder.resolve()]
    members = folder / "members"
    paths = []
    if members.is_dir():
        paths = sorted(path for path in members.iterdir() if path.is_dir())
    if not paths or not (folder / "sweep.csv").exists():
        raise UserError(
            f"{folder} is not a finished run, nor the folder of an SAE; choose another, or rerun "
            f"`train`{hint_at_runs(folder)}"
        )
    return paths


def _with_distinct_names(members: Sequence[Member]) -> list[Member]:
    """Add the name of the run, or else of the folder that contains the SAE, to equal names."""
    count = Counter(member.name for member in members)
    renamed = []
    for member in members:
        name = member.name
        if count[name] > 1:
            assert member.folder is not None
            source = run_of(member.folder) or member.folder.resolve().parent
            name = f"{name},from={source.name}"
        renamed.append(replace(member, name=name))
    (name, n), *_ = Counter(member.name for member in renamed).most_common(1)
    if n > 1:
        raise UserError(f"--run and --compare_with contain {n} members called {name}")
    return renamed
