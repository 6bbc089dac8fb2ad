"""Finds EEG files, and names the recordings made from them.

Patient, session and token come from BIDS, from names as in the TUH corpus, or from a pattern of the
user. File names of recordings are `<patient>_s<session>_t<token>_preprocessed.npy`.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minsae_jax.eeg.prepare.bids import BIDS, bids_root, bids_sidecar, is_bids
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.edf import has_signals
from minsae_jax.errors import UserError
from minsae_jax.files import regular_file

# Endings of the files that start a recording; a file of any other format can be given by name.
SUFFIXES = (
    ".edf", ".bdf", ".gdf", ".vhdr", ".ahdr", ".set", ".fif", ".fif.gz", ".cnt", ".mff", ".cdt",
    ".nxe", ".lay", ".nedf",
)  # fmt: skip
TUH = r"(?:^|[/\\])(?P<patient>[^_/\\]+)_s(?P<session>\d+)_t(?P<token>\d+)[^/\\]*$"
# Names of the parts of a FIF recording after the first, which MNE reads together with it.
LATER_PART = re.compile(
    r"(?P<start>.+)(-[1-9]\d*|(?P<split>_split-)(?P<number>\d+)(?P<rest>_.*))(?P<end>\.fif(\.gz)?)"
)
# Files of data and markers in a header of BrainVision
BRAINVISION = (".vhdr", ".ahdr")
BRAINVISION_PARTS = re.compile(r"^(?:DataFile|MarkerFile)=(.+?)\s*$", re.MULTILINE)
HASH_LENGTH = 12
NOT_RAW = ("derivatives", "sourcedata")  # folders of a BIDS dataset


@dataclass(frozen=True)
class Source:
    """One EEG file and the recording that is made from it."""

    path: Path
    short_path: str  # its name, with folders if other files have the same name
    name: str  # of the recording's file
    label: str  # of the file in dataset.json: short_path, or a hash of it
    patient: str  # as in the source
    notes: tuple[Path, ...] = ()  # EDF+ files without signals, with annotations of this one

    @property
    def is_patient(self) -> bool:
        """Whether the file counts as a patient, since nothing in its path names one."""
        return self.patient == _stem(self.path)


@dataclass(frozen=True)
class _Parts:
    """Patient, session and token in a path; "" where the path has none."""

    patient: str
    session: str = ""
    token: str = ""


def find_sources(config: PrepareConfig) -> list[Source]:
    """Return all EEG files in the order of their paths.

    An EDF+ file without signals, such as a hypnogram, belongs to the recording of its patient and
    session; if there are none or several, it is a source that cannot be used. Raises UserError if
    there are no files, a pattern does not match, two patients have one name, or names of files that
    should be a patient each occur in several folders, or patients in several BIDS datasets.
    """
    paths: set[Path] = set()
    for source in config.source:
        paths.update(_files_in(source))
    ordered = sorted(paths, key=lambda path: path.as_posix())
    patterns = [BIDS, TUH]
    if config.patient_pattern:
        patterns = [config.patient_pattern]
    parts = {path: _parts_of(path, patterns, bool(config.patient_pattern)) for path in ordered}
    notes_of = _notes(parts)
    for notes in notes_of.values():
        for note in notes:
            del parts[note]
    names = _recording_names(parts, config.hash_patients)
    if not config.patient_pattern:
        _check_patients(parts)
    short_paths = _short_paths(parts)
    sources = []
    for path, part in parts.items():
        label = short_paths[path]
        if config.hash_patients:
            label = _hashed(label) + path.suffix
        sources.append(
            Source(
                path=path,
                short_path=short_paths[path],
                name=names[path],
                label=label,
                patient=part.patient,
                notes=tuple(notes_of.get(path, ())),
            )
        )
    return sources


def files_of(path: Path) -> list[Path]:
    """Return all files that belong to a recording, such as .vhdr, .eeg, .vmrk and BIDS tables."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    stem = path.name.removesuffix(".gz")
    stem = stem[: stem.rfind(".")]
    files = {path, *files_with_stem(path.parent, stem), *_later_parts(path)}
    files.update(files_in_header(path))
    for what in ("events", "channels"):
        sidecar = bids_sidecar(path, what)
        if sidecar is not None:
            files.add(sidecar)
    return sorted(file for file in files if file.is_file())


def files_with_stem(folder: Path, stem: str) -> list[Path]:
    """Return the files and folders in a readable folder that are named `<stem>.*`."""
    if not os.access(folder, os.R_OK):
        return []
    return _by_stem(folder, folder.stat().st_mtime_ns).get(stem, [])


# All recordings may be in one folder, which is not listed again for each of them. The time of its
# last change is an argument, so that a new file is seen.
@lru_cache(maxsize=16)
def _by_stem(folder: Path, modified_ns: int) -> dict[str, list[Path]]:
    """Return the content of a folder by each part of a name that ends before a dot."""
    by_stem: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        for dot in re.finditer(r"\.", path.name):
            by_stem.setdefault(path.name[: dot.start()], []).append(path)
    return by_stem


def files_in_header(path: Path) -> list[Path]:
    """Return the files that a header of BrainVision names; none for other or unreadable files."""
    if path.suffix.lower() not in BRAINVISION:
        return []
    try:
        text = regular_file(path).read_text(encoding="latin-1")
    except OSError:
        return []
    return [path.parent / _in_utf_8(name) for name in BRAINVISION_PARTS.findall(text)]


def _in_utf_8(name: str) -> str:
    """Return a name that was decoded as Latin-1, which any bytes can be, as UTF-8 if it is."""
    try:
        return name.encode("latin-1").decode()
    except UnicodeDecodeError:
        return name


def _later_parts(path: Path) -> list[Path]:
    """Return the files of a split FIF recording after the first."""
    if not path.name.endswith((".fif", ".fif.gz")) or not os.access(path.parent, os.R_OK):
        return []
    return _parts_by_first(path.parent, path.parent.stat().st_mtime_ns).get(path.name, [])


# As in _by_stem
@lru_cache(maxsize=16)
def _parts_by_first(folder: Path, modified_ns: int) -> dict[str, list[Path]]:
    """Return the later parts of split FIF recordings in a folder by the name of the first part."""
    parts: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        first = _first_part(path.name)
        if first is not None:
            parts.setdefault(first, []).append(path)
    return parts


def _first_part(name: str) -> str | None:
    """Return the name of a FIF recording's first file if this is that of a later one.

    >>> _first_part("a_raw-1.fif"), _first_part("s_split-02_eeg.fif"), _first_part("a_raw.fif")
    ('a_raw.fif', 's_split-01_eeg.fif', None)
    """
    match = LATER_PART.fullmatch(name)
    if match is None:
        return None
    if match["split"] is None:
        return match["start"] + match["end"]
    first = f"{1:0{len(match['number'])}d}"
    if match["number"] == first:
        return None
    return f"{match['start']}_split-{first}{match['rest']}{match['end']}"


def _files_in(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir() and path.suffix.lower() not in SUFFIXES:
        return _files_below(path)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(source, recursive=True))
    if not matches:
        raise UserError(f"there is no file, folder or match of {source}")
    # A glob may match data files too, such as .eeg of a .vhdr.
    files = [match for match in matches if _starts_a_recording(match)]
    files += [file for match in matches if match.is_dir() for file in _search(match)]
    if not files:
        raise UserError(f"{source} matches no EEG file ({', '.join(SUFFIXES)})")
    return files


def _files_below(folder: Path) -> list[Path]:
    if not is_bids(folder):
        files = _search(folder)
        if not files:
            raise UserError(f"there is no EEG file in {folder} ({', '.join(SUFFIXES)})")
        return files
    subjects = sorted(path for path in folder.iterdir() if path.name.startswith("sub-"))
    subjects = [path for path in subjects if path.is_dir()]
    files = [file for subject in subjects for file in _search(subject)]
    files = [file for file in files if file.parent.name == "eeg" and "_eeg." in file.name]
    if not files:
        raise UserError(f"the BIDS dataset {folder} has no EEG file sub-*/**/eeg/*_eeg.*")
    return files


def _search(folder: Path) -> list[Path]:
    """Return the EEG files below a folder, without processed copies in BIDS datasets there."""
    files = [path for path in _content(folder) if _starts_a_recording(path)]
    return [path for path in files if not _is_derived(path, folder)]


def _content(folder: Path) -> list[Path]:
    """Return the files and folders below a folder, also behind links; each folder once.

    Raises OSError if one cannot be read, whose content Path.rglob would leave out.
    """

    def refuse(error: OSError) -> None:
        raise error

    paths = []
    # A link to a folder above it would have no end.
    seen = {folder.resolve()}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        below = [Path(parent, name) for name in sorted(folders)]
        folders.clear()
        for path in sorted(below, key=Path.is_symlink):  # a folder itself before links to it
            if path.resolve() not in seen:
                seen.add(path.resolve())
                folders.append(path.name)
        paths += [Path(parent, name) for name in (*folders, *files)]
    return sorted(paths)


def _is_derived(path: Path, folder: Path) -> bool:
    parents = [parent for parent in path.parents if parent.is_relative_to(folder)]
    return any(parent.name in NOT_RAW and is_bids(parent.parent) for parent in parents[:-1])


def _starts_a_recording(path: Path) -> bool:
    name = path.name.lower()
    if not name.endswith(SUFFIXES) or name.startswith("."):
        return False
    # Only recordings of EGI are folders; the files in them are not recordings.
    is_folder = name.endswith(".mff")
    is_inside = any(parent.suffix.lower() == ".mff" for parent in path.parents)
    if path.is_dir() != is_folder or is_inside:
        return False
    first = _first_part(path.name)
    return first is None or not path.with_name(first).is_file()


def _parts_of(path: Path, patterns: Sequence[str], is_given: bool) -> _Parts:
    for pattern in patterns:
        match = re.search(pattern, path.as_posix())
        if match and match["patient"]:
            groups = {name: text or "" for name, text in match.groupdict().items()}
            return _Parts(groups["patient"], groups.get("session", ""), groups.get("token", ""))
    if is_given:
        raise UserError(f"--patient_pattern does not match {path}")
    return _Parts(_stem(path))


def _notes(parts: dict[Path, _Parts]) -> dict[Path, list[Path]]:
    """Return recordings and the files of annotations for them.

    Tokens are not compared: a recording and its hypnogram have different ones.
    """
    recordings: dict[tuple[str, str], list[Path]] = {}  # by patient and session
    without_signals: dict[tuple[str, str], list[Path]] = {}
    for path, part in parts.items():
        files = recordings if has_signals(path) else without_signals
        files.setdefault((part.patient, part.session), []).append(path)
    notes = {}
    for session, paths in without_signals.items():
        matching = recordings.get(session, [])
        if len(matching) == 1:
            notes[matching[0]] = paths
    return notes


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _check_patients(parts: dict[Path, _Parts]) -> None:
    """Raise UserError if several persons would be one patient.

    They are if the name of a file, which is its patient, occurs in several folders, or a name of a
    patient in several BIDS datasets.
    """
    first_file: dict[str, Path] = {}
    first_root: dict[str, Path] = {}
    for path, part in parts.items():
        if part.patient == _stem(path):
            file = first_file.setdefault(path.name, path)
            if file != path:
                raise UserError(
                    f"{file} and {path} have the same name, which does not identify the patient; "
                    "give --patient_pattern, such as '(?P<patient>[^/]+)/[^/]+$' if each patient "
                    "has a folder"
                )
        root = bids_root(path)
        if root is None:
            continue
        first = first_root.setdefault(part.patient, root)
        if first != root:
            raise UserError(
                f"the BIDS datasets {first} and {root} both have a patient {part.patient}; prepare "
                "them into different folders, or give a --patient_pattern"
            )


def _recording_names(parts: dict[Path, _Parts], is_hashed: bool) -> dict[Path, str]:
    """Return the name of each recording: its patient, and numbers of its session and token."""
    patient_of: dict[str, str] = {}  # by the patient's part of a name
    sessions: dict[str, dict[str, list[Path]]] = {}  # patient -> session -> paths
    for path, part in parts.items():
        # The patient ends at the first _ of a file name.
        name = re.sub(r"[^A-Za-z0-9-]+", "-", part.patient)
        if is_hashed:
            name = _hashed(part.patient)
        other = patient_of.setdefault(name, part.patient)
        if other != part.patient:
            raise UserError(
                f"patients {other!r} and {part.patient!r} would both be {name}; choose another "
                f"--patient_pattern ({path})"
            )
        sessions.setdefault(part.patient, {}).setdefault(part.session, []).append(path)
    names = {}
    for name, patient in patient_of.items():
        session_numbers = _numbers(sessions[patient], first=1)
        for session, paths in sessions[patient].items():
            tokens = [parts[path].token for path in paths]
            if len(set(tokens)) < len(tokens):
                tokens = [path.as_posix() for path in paths]
            token_numbers = _numbers(tokens, first=0)
            for path, token in zip(paths, tokens, strict=True):
                numbers = f"s{session_numbers[session]:03d}_t{token_numbers[token]:03d}"
                names[path] = f"{name}_{numbers}_preprocessed.npy"
    return names


def _short_paths(paths: Collection[Path]) -> dict[Path, str]:
    """Return each path's name, with as many of its folders as tell it from the others."""
    short_paths: dict[Path, str] = {}
    n_parts = 1
    while remaining := [path for path in paths if path not in short_paths]:
        ends = {path: "/".join(path.parts[-n_parts:]) for path in remaining}
        n_equal = Counter(ends.values())
        short_paths |= {
            path: end
            for path, end in ends.items()
            if n_equal[end] == 1 or n_parts == len(path.parts)
        }
        n_parts += 1
    return short_paths


def _numbers(texts: Iterable[str], first: int) -> dict[str, int]:
    """Return the numbers that texts spell if all do and they differ, else their places in order."""
    ordered = sorted(texts)
    if all(text.isdecimal() for text in ordered):
        numbers = {text: int(text) for text in ordered}
        if len(set(numbers.values())) == len(ordered):
            return numbers
    return {text: place for place, text in enumerate(ordered, first)}


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]
