"""The report as a folder of static files; the scripts in assets/ draw it in the browser.

A page opened from disk may not fetch files, but it may load scripts. So all data are small scripts
that call `receive`: `index_data.js` for the first page, and `data/p0000.js`, `data/p0001.js` and so
on with PACK features each, as base64 of gzipped JSON, which are loaded when a page is opened.
"""

import base64
import gzip
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minsae_jax.checksums import SUMS, files_below, write_checksums
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import Band
from minsae_jax.files import foreign_entries, regular_file, replaced_folder
from minsae_jax.json_values import to_json
from minsae_jax.report.describe import FeatureCard, FeatureRow
from minsae_jax.report.montages import Chain
from minsae_jax.report.naming import LABELS_CSV
from minsae_jax.report.pages import Pages
from minsae_jax.settings import JsonObject

ASSETS = Path(__file__).parent / "assets"
PAGE_FILES = (
    "index.html",
    "report.css",
    "base.js",
    "figures.js",
    "eeg.js",
    "montage.js",
    "tables.js",
    "export.js",
    "feature.js",
    "pages.js",
    "members.js",
    "report.js",
)
WRITTEN = (*PAGE_FILES, "index_data.js", "data", SUMS)
PACK = 64  # features in a file
# Of FeatureRow, in the table of all features
COLUMNS = (
    "id", "label", "suggestion", "density", "mean", "max", "channel", "band", "patients",
    "artefact", "artefact_top", "support", "seeds", "detects", "event", "event_auc",
)  # fmt: skip


@dataclass(frozen=True)
class ReportMeta:
    """The report except for its features; field names are the keys in index_data.js."""

    title: str
    member: str
    member_folder: str
    # Or the folder of the evaluation, if not all members are of one run
    run: str
    # Fingerprint of the encoder
    encoder: str
    layer: int | str
    created_with: str
    n_tokens: int
    n_windows: int
    n_recordings: int
    n_patients: int
    split: str
    # In Hz
    sampling_rate: int | float
    # From the start of a patch to the start of the next
    patch_seconds: float
    n_patches: int
    has_cls: bool
    channels: Sequence[str]
    # On a unit head seen from above; x right, y front
    positions: Float[np.ndarray, "placed_channels 2"]
    bands: Sequence[Band]
    # Label and text of each row
    summary: Sequence[tuple[str, str]]
    waveform_exact: bool
    waveform_unit: str
    shifted_recordings: int
    # Folder of the recordings, for the command that shows one in full
    recordings: str = ""
    # Further flags of that command, which name the encoder
    encoder_flags: Sequence[str] = ()
    # Whether no flag can name the encoder, such as one of `from_function`
    view_in_python: bool = False
    # Chains of the longitudinal bipolar montage, as pairs of channels; empty without its channels
    bipolar: Sequence[Chain] = ()
    # Whether tokens are of single channels; False if all are over all channels
    channel_tokens: bool = True
    # How features with a page were chosen, if not all have one
    pages_rule: str = ""
    # Recommendation, members, events and labels
    pages: Pages = field(default_factory=Pages)


def write_pages(
    folder: Path,
    meta: ReportMeta,
    cards: Iterable[FeatureCard],
    without_page: Iterable[FeatureRow] = (),
) -> None:
    """Write the report to `folder`, or nothing if anything fails.

    without_page: further features, which are in the table only.

    An older report is replaced; other files in the folder, such as the user's labels.csv, stay.
    Cards are written one by one and not kept in memory. Raises UserError if `folder` contains
    files but no report.
    """
    folder = folder.resolve()
    # This file marks a folder as a report.
    if not (folder / "index_data.js").exists():
        foreign = foreign_entries(folder, [LABELS_CSV])
        if foreign:
            raise UserError(
                f"{folder} contains {foreign[0]} and is not a report; empty it or move it away"
            )
    with replaced_folder(folder) as temporary:
        (temporary / "data").mkdir()
        rows = list(_write_packs(temporary / "data", cards))
        rows += [[*_to_row(row), None] for row in without_page]
        rows.sort(key=lambda row: row[0])
        # The numbers beside the features are rounded only once, by the page, as the terminal does.
        index = {"meta": to_json(meta), "columns": (*COLUMNS, "pack"), "rows": rows}
        _write_script(temporary / "index_data.js", index)
        for name in PAGE_FILES:
            shutil.copyfile(ASSETS / name, temporary / name)
        write_checksums(temporary, files_below(temporary))
        for name in foreign_entries(folder, WRITTEN):
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copy2
            copy(folder / name, temporary / name)


def read_index(folder: Path) -> JsonObject | None:
    """Return meta, columns and rows of the report in a folder; None without a readable report."""
    path = folder / "index_data.js"
    if not path.exists():
        return None
    try:
        text = regular_file(path).read_text(encoding="utf-8")
        index = json.loads(text.removeprefix("receive(").removesuffix(");\n"))
        str(index["meta"]["member"])
    except (ValueError, KeyError, TypeError):  # a damaged report is written anew
        return None
    return index


def read_member(folder: Path) -> str | None:
    """Return the member that the report in a folder is about, or None if there is no report."""
    index = read_index(folder)
    return None if index is None else str(index["meta"]["member"])


def _to_row(feature: FeatureRow) -> list[Any]:
    row = {name: to_json(getattr(feature, name), _short) for name in COLUMNS}
    return list((row | {"event_auc": feature.event_auc}).values())


def _write_packs(folder: Path, cards: Iterable[FeatureCard]) -> Iterator[list[Any]]:
    """Write the data of features, and yield the row of each in the table."""
    iterator = iter(cards)
    pack = 0
    while of_pack := list(islice(iterator, PACK)):
        records = [to_json(card, _short) | {"events": to_json(card.events)} for card in of_pack]
        content = _to_text(records)
        # Without a time, so that the same data are the same bytes.
        packed = base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()
        _write_script(folder / f"p{pack:04d}.js", {"pack": pack, "cards": packed})
        for card in of_pack:
            yield [*_to_row(card), pack]
        pack += 1


def _write_script(path: Path, value: Any) -> None:
    path.write_text(f"receive({_to_text(value)});\n")


def _to_text(value: Any) -> str:
    # ASCII, so that the page's encoding does not matter.
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _short(value: float) -> float:
    """Return four significant digits, or two decimals if that is more, as of seconds."""
    return round(value, 2) if abs(value) >= 100 else float(f"{value:.4g}")
