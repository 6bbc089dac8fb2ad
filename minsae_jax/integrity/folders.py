"""Kinds of folders that `verify` knows: how they are recognised, and the checks of their files."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from minsae_jax.activations.manifest import MANIFEST, read_manifest
from minsae_jax.activations.shards import PROVENANCE, shard_files
from minsae_jax.activations.store import open_store
from minsae_jax.activations.tokens import TOKENS
from minsae_jax.checksums import SUMS, read_checksums
from minsae_jax.eeg.description import DESCRIPTION, read_description
from minsae_jax.eeg.events import EVENTS
from minsae_jax.eeg.recordings import LABELS, LENGTHS, read_lengths
from minsae_jax.encoder.converted import is_encoder, load_encoder
from minsae_jax.errors import UserError
from minsae_jax.integrity.files import differs, unreadable
from minsae_jax.sae.config import load_run_config
from minsae_jax.sae.history import read_histories
from minsae_jax.sae.member import WEIGHTS, load_sae
from minsae_jax.sae.run import SWEEP_CSV, load_run
from minsae_jax.settings import read_json

RESTORE = "restore it from a copy"
EXTRACT = "remove it, then rerun `extract` to write it again"
EVALUATION = "evaluation.json"  # of an evaluation with --out; others are part of their runs
EVALUATE = "remove it, then rerun `evaluate`"
EXPORT = f"remove {SWEEP_CSV}, then rerun `train` to export the members again"
# Kind of folder -> pattern of paths below it (the first match counts) -> remedy
REMEDIES = {
    "store": {
        MANIFEST: f"{RESTORE}, or rerun `extract` with --overwrite",
        TOKENS: f"remove it and {PROVENANCE}, then rerun `extract`",
        "*": EXTRACT,
    },
    "encoder": {"*": "convert the encoder again"},
    "run": {
        "report/*": EVALUATE,
        "evaluation*": EVALUATE,
        "*tfevents*": "remove it; metrics.csv has the same metrics",
        "checkpoints/*": "remove the folder of its step",
        "plots/*": "rerun `plot`",
        "steering/*": "rerun `steer`",
        "members/*/sae.safetensors": EXPORT,
        "members/*/config.json": EXPORT,
        SWEEP_CSV: EXPORT,
        "pareto.png": EXPORT,
        "*": f"{RESTORE}, or rerun `train` with --overwrite",
    },
    "member": {"*": f"{RESTORE}, or export the member again"},
    "evaluation": {"*": EVALUATE},
    "recordings": {
        "*tuh_patient_splits_*": f"{RESTORE}, or remove it to draw the same split again",
        "*": f"{RESTORE}, or remove it and write the recordings again",
    },
}
# Files in a folder of recordings whose format is known; others, of users, are only read.
RECORDINGS = ("*.npy", LENGTHS, DESCRIPTION, EVENTS, LABELS, "tuh_patient_splits_*.pkl")


@dataclass(frozen=True)
class Check:
    """A check of one file, not made yet."""

    path: Path
    find_problem: Callable[[], str | None]
    has_checksum: bool  # finds every change


@dataclass(frozen=True)
class KnownFolder:
    """A store, encoder, run, member, evaluation, or folder of recordings."""

    folder: Path
    kind: str

    def checks(self) -> list[Check]:
        """Return the checks of all files, in order of their paths."""
        checks = {}
        for path in self._files():
            is_recording = any(fnmatch(path.name, pattern) for pattern in RECORDINGS)
            is_known = self.kind != "recordings" or is_recording
            checks[path] = Check(path, partial(unreadable, path, is_known), False)
        if self.kind == "store":
            checks |= {check.path: check for check in _shard_checks(self.folder)}
        for path in list(checks):
            if path.name == SUMS:
                checks |= {check.path: check for check in _listed_checks(path)}
        return [checks[path] for path in sorted(checks)]

    def check_whole(self) -> None:
        """Open the folder as other commands do. Raises UserError if its files do not fit."""
        OPEN[self.kind](self.folder)

    def remedy(self, path: Path) -> str:
        """Return the remedy for a damaged file."""
        if path.name == SUMS:
            return "remove it, since nothing else needs it"
        name = Path(os.path.relpath(path, self.folder)).as_posix()
        patterns = REMEDIES[self.kind]
        return next(remedy for pattern, remedy in patterns.items() if fnmatch(name, pattern))

    def _files(self) -> Iterator[Path]:
        # A folder of recordings can contain the folders of other kinds.
        pattern = "*" if self.kind == "recordings" else "**/*"
        for path in self.folder.glob(pattern):
            if path.is_file() and path.suffix != ".tmp":
                yield path
        if self.folder.name == "tuhab_preprocessed":
            yield from self.folder.parent.glob("tuh_patient_splits_*.pkl")


def _shard_checks(folder: Path) -> Iterator[Check]:
    try:
        manifest = read_manifest(folder)
    except UserError:
        return  # reported by the check of the whole
    if manifest is not None:
        for entry in manifest.shards:
            path = folder / entry.file
            yield Check(path, partial(differs, path, entry.sha256), True)


def _listed_checks(sums: Path) -> Iterator[Check]:
    """Yield the checks of the files that a SHA256SUMS lists, and of this file itself."""
    try:
        digests = read_checksums(sums.parent)
    except UserError:
        yield Check(sums, lambda: "is damaged", True)
        return
    yield Check(sums, lambda: None, True)
    for name, digest in digests.items():
        path = sums.parent / name
        yield Check(path, partial(differs, path, digest), True)


def _open_run(folder: Path) -> None:
    load_run_config(folder)
    if (folder / SWEEP_CSV).is_file():
        load_run(folder)
    if any((folder / "members").glob("*/metrics.csv")):
        read_histories(folder)


def _open_recordings(folder: Path) -> None:
    if (folder / DESCRIPTION).is_file():
        read_description(folder)
    missing = [name for name in read_lengths(folder / LENGTHS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]} is missing: {REMEDIES['recordings']['*']}")


OPEN: dict[str, Callable[[Path], object]] = {
    "store": open_store,
    "encoder": load_encoder,
    "run": _open_run,
    "member": load_sae,
    "evaluation": lambda folder: read_json(folder / EVALUATION),
    "recordings": _open_recordings,
}


def find_folders(root: Path) -> Iterator[KnownFolder]:
    """Yield the folders of known kinds in `root` and below, in order of their paths.

    Raises UserError if there are none.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    n_found = 0
    for name, children, _ in os.walk(root):
        folder = Path(name)
        kind = _kind_of(folder)
        children.sort()
        if kind is not None:
            n_found += 1
            yield KnownFolder(folder, kind)
        # All below is part of it.
        if kind not in (None, "recordings"):
            children.clear()
    if not n_found:
        raise UserError(
            f"{root} does not contain a store, encoder, run, member, evaluation or recordings"
        )


def _kind_of(folder: Path) -> str | None:
    if (folder / MANIFEST).is_file() or shard_files(folder):
        return "store"
    if is_encoder(folder):
        return "encoder"
    if (folder / "config.yaml").is_file() and (folder / "members").is_dir():
        return "run"
    if (folder / WEIGHTS).is_file():
        return "member"
    if (folder / EVALUATION).is_file():
        return "evaluation"
    if (folder / LENGTHS).is_file():
        return "recordings"
    return None
