"""Prepares all recordings of a folder, in several processes, and writes the folder's tables."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from minsae_jax.checksums import SUMS, write_checksums
from minsae_jax.eeg.description import DESCRIPTION, Description, read_description, write_description
from minsae_jax.eeg.events import EVENTS, write_events
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.labels import LabelTable, read_labels
from minsae_jax.eeg.prepare.plan import Plan, make_plan
from minsae_jax.eeg.prepare.record import RECORDS, Record, Rejected, read_record, record_path
from minsae_jax.eeg.prepare.recording import prepare_recording
from minsae_jax.eeg.prepare.sources import Source, files_of, find_sources
from minsae_jax.eeg.prepare.workers import worker_pool
from minsae_jax.eeg.recordings import LABELS, LENGTHS, list_bad
from minsae_jax.errors import UserError, brief, join_some
from minsae_jax.files import atomic_write, foreign_entries, make_folder, regular_file
from minsae_jax.locks import lock_folder
from minsae_jax.monitor import progress, table

MAX_REASONS = 3  # in an error; those of damaged files are long, and differ
TABLES = (DESCRIPTION, EVENTS, LABELS)  # written after LENGTHS is removed and before it is back
OWNED_FILES = (
    "*_s[0-9]*_t[0-9]*_preprocessed.npy",
    "*.tmp",
    "tuh_patient_splits_*",
    RECORDS,
    LENGTHS,
    SUMS,
    *TABLES,
)


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared recordings."""

    folder: Path
    records: tuple[Record, ...]
    n_new: int  # of these, written now
    rejected: tuple[Rejected, ...]
    patients: tuple[str, ...]  # files that count as a patient each
    unlabelled: tuple[str, ...]  # recordings that the table of labels has no row for

    def findings(self) -> list[str]:
        """Return one line for each finding, with the recordings that have it."""
        recordings_of: dict[str, list[str]] = {}
        for record in self.records:
            for finding in record.findings:
                recordings_of.setdefault(finding, []).append(record.name)
        lines = [
            f"{finding} (in {join_some(names, limit=3)})"
            for finding, names in recordings_of.items()
        ]
        unused = Counter(name for record in self.records for name in record.unused_channels)
        if unused:
            names = [f"{name} ({count})" for name, count in sorted(unused.items())]
            lines.append(f"channels not used (recordings): {join_some(names, limit=20)}")
        if len(self.patients) > 1:
            lines.append(
                f"files that count as a patient each: {join_some(self.patients, limit=3)}; if a "
                "patient has several, give --patient_pattern, or train and test share patients"
            )
        if self.unlabelled:
            listed = join_some(self.unlabelled, limit=3)
            lines.append(f"recordings without a row in the table of labels: {listed}")
        silent = [record.name for record in self.records if not record.events]
        # As if the file of their events was missing.
        if 0 < len(silent) < len(self.records):
            lines.append(f"recordings without events ({len(silent)}): {join_some(silent, limit=3)}")
        lines += [f"left out: {each.source.path} {each.reason}" for each in self.rejected]
        return lines

    def summary(self) -> str:
        """Return a table of counts."""
        seconds = sum(record.description.duration for record in self.records)
        interpolated = [len(record.description.interpolated_channels) for record in self.records]
        columns = {
            "folder": str(self.folder),
            "recordings": str(len(self.records)),
            "new": str(self.n_new),
            "left out": str(len(self.rejected)),
            "patients": str(len({record.patient for record in self.records})),
            "hours": f"{seconds / 3600:.2f}",
            "interpolated channels": str(sum(interpolated)),
            "events": str(sum(len(record.events) for record in self.records)),
        }
        return table(list(columns), [list(columns.values())])


def prepare(config: PrepareConfig) -> Prepared:
    """Write the recordings and tables of all EEG files in --source, or the missing ones.

    Raises UserError if there are no files, some cannot be used, or the folder contains recordings
    of other settings.
    """
    plan = make_plan(config)
    sources = find_sources(config)
    labels = read_labels(config, sources)
    folder = Path(config.out)
    is_new_folder = not folder.exists()
    if not is_new_folder:
        _check_folder(folder)
    make_folder(folder / RECORDS)
    with lock_folder(folder):
        try:
            return _prepare(config, plan, sources, labels, folder)
        finally:
            # Nothing was written.
            if is_new_folder and not any((folder / RECORDS).iterdir()):
                (folder / RECORDS).rmdir()
                folder.rmdir()


def _check_folder(folder: Path) -> None:
    foreign = foreign_entries(folder, OWNED_FILES)
    recordings = sorted(path.name for path in folder.glob("*.npy"))
    foreign += [name for name in recordings if not record_path(folder, name).exists()]
    if foreign:
        raise UserError(
            f"{folder} contains {foreign[0]}, which `prepare` did not write; choose another --out"
        )


def _prepare(
    config: PrepareConfig,
    plan: Plan,
    sources: Sequence[Source],
    labels: LabelTable,
    folder: Path,
) -> Prepared:
    rejected: list[Rejected] = []
    done = {source.name: read_record(source, plan, folder) for source in sources}
    records = {name: record for name, record in done.items() if record is not None}
    missing = [source for source in sources if source.name not in records]
    _remove_stale(folder, plan, {source.name for source in sources}, config.overwrite)
    if missing:
        # Without this file, programs do not accept the folder as a complete set of recordings.
        (folder / LENGTHS).unlink(missing_ok=True)
    with progress("prepare", len(sources), "recordings") as bar:
        bar.start_at(len(records))
        for outcome in _outcomes(missing, plan, folder, config.jobs):
            if isinstance(outcome, Record):
                records[outcome.name] = outcome
            else:
                rejected.append(outcome)
            bar.advance(1)
    rejected += _remove_copies(folder, sources, records)
    rejected.sort(key=lambda each: each.source.path.as_posix())
    bad = {str(each.source.path): each.reason for each in rejected if each.is_bad}
    if bad and config.on_bad_recording == "error":
        raise UserError(
            f"{list_bad(bad, limit=MAX_REASONS)}: repair or remove them, or skip them with "
            "--on_bad_recording skip, which lists them all"
        )
    if not records:
        reasons = {str(each.source.path): each.reason for each in rejected}
        raise UserError(
            f"none of the recordings can be used: {list_bad(reasons, limit=MAX_REASONS)}"
        )
    ordered = tuple(records[name] for name in sorted(records))
    _write_tables(folder, plan, ordered, labels)
    patients = [each.label for each in sources if each.is_patient and each.name in records]
    return Prepared(
        folder=folder,
        records=ordered,
        n_new=sum(source.name in records for source in missing),
        rejected=tuple(rejected),
        patients=() if config.patient_pattern else tuple(patients),
        unlabelled=tuple(name for name in labels.without if name in records),
    )


def _remove_stale(folder: Path, plan: Plan, names: set[str], overwrite: bool) -> None:
    """Remove recordings of other settings or sources. Raises UserError unless it may overwrite."""
    stale = []
    for path in sorted((folder / RECORDS).glob("*.json")):
        name = path.name.removesuffix(".json")
        try:
            key = json.loads(regular_file(path).read_text(encoding="utf-8"))["key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            key = None
        if key != plan.key or name not in names:
            stale.append(name)
    if stale and not overwrite:
        changes = _changes(folder, plan)
        others = f"other settings, versions or sources, such as {stale[0]}"
        if changes:
            others = f"other settings or versions: {', '.join(changes)}"
        raise UserError(
            f"{folder} contains recordings of {others}; use --overwrite to replace them, or choose "
            "another --out"
        )
    if stale:
        (folder / LENGTHS).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
        record_path(folder, name).unlink()


def _changes(folder: Path, plan: Plan) -> list[str]:
    """Return how settings and versions differ from those in dataset.json, if it has them."""
    try:
        before = read_description(folder).preparation
    except UserError:
        return []
    if before is None:
        return []
    old = {**before.settings, **before.versions}
    new = {**plan.preparation.settings, **plan.preparation.versions}
    return [
        f"{name} ({brief(old.get(name), 60)}, now {brief(value, 60)})"
        for name, value in new.items()
        if old.get(name) != value
    ]


def _remove_copies(
    folder: Path, sources: Sequence[Source], records: dict[str, Record]
) -> list[Rejected]:
    """Remove recordings of the same samples as an earlier one, which could be of another patient.

    Their files can differ, as those of a copy with another header do.
    """
    first_of: dict[str, Source] = {}
    copies = []
    for source in sources:
        if source.name not in records:
            continue
        first = first_of.setdefault(records[source.name].sha256, source)
        if first is not source:
            del records[source.name]
            (folder / source.name).unlink()
            record_path(folder, source.name).unlink()
            copies.append(Rejected(source, f"is a copy of {first.path}"))
    if copies:
        (folder / LENGTHS).unlink(missing_ok=True)
    return copies


def _outcomes(
    sources: Sequence[Source], plan: Plan, folder: Path, jobs: int
) -> Iterator[Record | Rejected]:
    """Prepare recordings and yield their outcomes, with several jobs in any order."""
    if jobs == 1 or len(sources) <= 1:
        for source in sources:
            yield prepare_recording(source, plan, folder)
        return
    # With a long recording at the end, one process would be busy and the others idle.
    longest_first = sorted(sources, key=_n_bytes, reverse=True)
    pool = worker_pool(min(jobs, len(sources)))
    try:
        futures = [pool.submit(prepare_recording, each, plan, folder) for each in longest_first]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of --jobs ended, perhaps for lack of memory; rerun with fewer --jobs "
            '(a script must call prepare below `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _n_bytes(source: Source) -> int:
    return sum(file.stat().st_size for file in files_of(source.path))


def _write_tables(
    folder: Path,
    plan: Plan,
    records: Sequence[Record],
    labels: LabelTable,
) -> None:
    description = Description(
        sampling_rate=plan.filters.sampling_rate,
        channels=plan.channels,
        positions=plan.positions,
        unit=plan.unit,
        preparation=plan.preparation,
        recordings={record.name: record.description for record in records},
    )
    write_description(folder, description)
    events = [(record.name, event) for record in records for event in record.events]
    (folder / EVENTS).unlink(missing_ok=True)
    if events:
        with atomic_write(folder / EVENTS) as temporary:
            write_events(temporary, events)
    names = {record.name for record in records}
    rows = [tuple(row.values()) for row in labels.rows if row["recording"] in names]
    columns = tuple(labels.rows[0]) if labels.rows else ()
    _write_csv(folder / LABELS, columns, rows)
    lengths = [(record.name, record.n_samples) for record in records]
    _write_csv(folder / LENGTHS, ("filename", "time_len"), lengths)
    tables = [name for name in (LENGTHS, *TABLES) if (folder / name).is_file()]
    small = [*tables, *(f"{RECORDS}/{record.name}.json" for record in records)]
    # Recordings are not read again.
    digests = {record.name: record.sha256 for record in records}
    write_checksums(folder, small, digests)


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple]) -> None:
    """Write a table, or remove it if there are no rows."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
