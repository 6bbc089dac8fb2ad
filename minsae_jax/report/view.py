"""`minsae view`: features over a whole recording, as one HTML file that needs no other.

The file contains the report's style and scripts, the activations of the shown features on every
token (uint8), and the EEG (int16). The browser bins activations to the width of the screen.
"""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16, UInt8

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import TokenPlaces
from minsae_jax.files import atomic_write, make_folder
from minsae_jax.json_values import to_json
from minsae_jax.locks import lock_folder
from minsae_jax.report.excerpts import (
    MONTAGE_RATE,
    EventSpan,
    channel_name,
    events_between,
    montage_eeg,
    montage_step,
    read_events_by_recording,
)
from minsae_jax.report.folder import ASSETS, read_index
from minsae_jax.report.montages import Chain, bipolar_chains
from minsae_jax.report.naming import LABELS_CSV, Label, read_feature_labels
from minsae_jax.report.recording import EncodedRecording, FeatureTotals, RecordingEncoder
from minsae_jax.report.view_config import ViewConfig
from minsae_jax.sae.member import SparseAutoencoder, check_features

SCRIPTS = ("base.js", "figures.js", "eeg.js", "montage.js", "export.js", "recording.js", "view.js")
STYLES = ("report.css", "view.css")
MARKER = '<meta name="generator" content="minsae view">'
EEG_RATE = 100  # Hz, at least, of the EEG in a page
EEG_STEP = 0.02  # SD per unit
MAX_EEG_SAMPLES = 50_000_000  # of all channels at EEG_RATE; longer recordings have MONTAGE_RATE
EEG_CHUNK = 6000  # samples of the page that are filtered at a time
DENSE = 0.1  # share of tokens above which an active feature says little about any of them
MAX_RATIO = 1024  # of the mean here over that elsewhere, also for features never active there


@dataclass(frozen=True)
class ViewPage:
    """A page that `view` wrote."""

    path: Path
    n_bytes: int
    # In the order of the page
    features: tuple[int, ...]


@dataclass(frozen=True)
class Elsewhere:
    """Features on the report's test patients, by their numbers."""

    # Mean activation over all tokens, and share of tokens with the feature active
    mean: Mapping[int, float]
    density: Mapping[int, float]
    suggestions: Mapping[int, str]


@dataclass(frozen=True)
class ViewedFeature:
    """A feature in the page; means are over all tokens."""

    id: int
    label: str
    note: str
    suggestion: str
    max: float
    mean: float
    # Share of tokens with the feature active
    density: float
    # Mean on the report's test patients; None without a report
    mean_elsewhere: float | None


@dataclass(frozen=True)
class ViewMeta:
    """All that the page shows; field names are the keys in its data."""

    recording: str
    member: str
    encoder: str
    layer: int
    created_with: str
    # How the features were chosen
    rule: str
    # In Hz: of the recording, and of the EEG in the page
    sampling_rate: float
    eeg_rate: float
    # Of the recording, and up to the end of the last window
    samples: int
    encoded_samples: int
    channels: Sequence[str]
    # On a unit head seen from above; empty if unknown
    positions: Float[np.ndarray, "placed_channels 2"]
    bipolar: Sequence[Chain]
    # µV in an SD of each channel; None if unknown
    uv_per_sd: Float[np.ndarray, " channels"] | None
    # Whether tokens are of single channels; False if all are over all channels
    channel_tokens: bool
    # Samples of a window, and of a window's distinct token starts: the first one and the length
    seq_len: int
    starts: Sequence[int]
    lengths: Sequence[int]
    events: Sequence[EventSpan]
    features: Sequence[ViewedFeature]
    # SD per unit of the EEG
    eeg_step: float
    # base64 of gzipped bytes, see `token_table` and `pack_eeg`
    activations: str
    eeg: str


def view(
    config: ViewConfig, encoder: BaseEncoder, sae: SparseAutoencoder, run: Path | None
) -> list[ViewPage]:
    """Write the page of each recording.

    run: folder of the run, whose report is used if it is of this member. Raises UserError before
    anything is written if a recording, a feature or an existing file does not fit.
    """
    member = Path(config.member).resolve().name
    check_features(sae, config.feature, member)
    targets = choose_targets(config)
    runners = [
        RecordingEncoder(
            encoder, sae, path, config.layer, config.allow_mismatch, config.force_revin
        )
        for path in config.recording
    ]
    labels: Mapping[int, Label] = {}
    elsewhere = None
    if run is not None:
        labels = read_feature_labels(run / "report" / LABELS_CSV, sae.d_sae, member)
        elsewhere = read_elsewhere(run / "report", member)
    pages = []
    for runner, target in zip(runners, targets, strict=True):
        with lock_folder(runner.places.folder, shared=True):
            meta = make_meta(config, runner, member, encoder.fingerprint, labels, elsewhere)
        write_view(target, meta)
        features = tuple(feature.id for feature in meta.features)
        pages.append(ViewPage(target, target.stat().st_size, features))
    return pages


def choose_targets(config: ViewConfig) -> list[Path]:
    """Return the path of each page. Raises UserError if another file would be overwritten."""
    out = Path(config.out)
    if out.suffix == ".html":
        if len(config.recording) > 1:
            raise UserError(f"--out {out} is one page; name a folder for several recordings")
        targets = [out]
    else:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} exists and is not a folder; choose another --out")
        targets = [out / f"{Path(recording).stem}.html" for recording in config.recording]
    for target in targets:
        if targets.count(target) > 1:
            raise UserError(f"several recordings would have the page {target}; view them apart")
        if target.exists() and not _is_view(target):
            raise UserError(f"{target} exists and is not a page of `view`; choose another --out")
    return targets


def _is_view(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARKER.encode() in file.read(500)


def read_elsewhere(report: Path, member: str) -> Elsewhere | None:
    """Return the features of a run's report; None without one, or if it is of another member."""
    index = read_index(report)
    if index is None or index["meta"]["member"] != member:
        return None
    rows = [dict(zip(index["columns"], row, strict=True)) for row in index["rows"]]
    return Elsewhere(
        # The mean of a feature that is never active is null.
        mean={row["id"]: row["density"] * (row["mean"] or 0) for row in rows},
        density={row["id"]: row["density"] for row in rows},
        suggestions={row["id"]: row["suggestion"] or "" for row in rows},
    )


def choose_shown(
    sae: SparseAutoencoder, totals: FeatureTotals, elsewhere: Elsewhere | None, count: int
) -> tuple[list[int], str]:
    """Return the features to show by default, and the rule as a sentence.

    Contribution is the mean activation times the norm of the decoder row, the mean length of the
    feature's part in x̂. With a report the order is by contribution times log2 of the ratio of the
    mean here to that elsewhere, so that features that are as active everywhere are not in front.
    Dense features come last.
    """
    mean = totals.total / totals.n_tokens
    score = mean * np.linalg.norm(sae.decoder_directions, axis=1)
    density = totals.active / totals.n_tokens
    order_of = "mean activation × decoder norm"
    if elsewhere is not None:
        features = range(sae.d_sae)
        there = np.array([elsewhere.mean.get(feature, 0.0) for feature in features])
        density = np.array([elsewhere.density.get(feature, 0.0) for feature in features])
        ratio = mean / np.maximum(there, mean / MAX_RATIO + np.finfo(float).tiny)
        score = score * np.log2(np.maximum(ratio, 1 / MAX_RATIO))
        order_of += " × log₂ (mean here / mean of the report's test patients)"
    order = np.lexsort((-score, density > DENSE))
    chosen = order[totals.active[order] > 0][:count].tolist()
    n_active = int((totals.active > 0).sum())
    dense = f"those on over {DENSE * 100:.0f} % of tokens last"
    return chosen, f"{len(chosen)} of {n_active:,} active features, by {order_of}; {dense}."


def make_meta(
    config: ViewConfig,
    runner: RecordingEncoder,
    member: str,
    fingerprint: str,
    labels: Mapping[int, Label],
    elsewhere: Elsewhere | None,
) -> ViewMeta:
    """Encode a recording and return the content of its page."""
    places = runner.places
    shown = list(config.feature)
    rule = "The features that --feature names."
    if not shown:
        totals = runner.totals()
        shown, rule = choose_shown(runner.sae, totals, elsewhere, config.num_features)
    if not shown:
        raise UserError(f"no feature is active in {places.recordings[0]}; name some with --feature")
    encoded = runner.encode(shown)
    table = token_table(places, encoded, shown)
    n_samples = places.recording_length(0)
    rate = EEG_RATE
    if n_samples / places.sampling_rate * rate * places.n_vars > MAX_EEG_SAMPLES:
        rate = MONTAGE_RATE
    names = places.channel_names
    positions = places.positions
    has_names = names is not None and not places.shifted[0]
    grid = places.tokens
    length = places.lengths(np.arange(grid.n_tokens))
    of_slot = [int(length[grid.slot == slot].max()) for slot in range(len(grid.starts))]
    return ViewMeta(
        recording=places.recordings[0],
        member=member,
        encoder=fingerprint[:12],
        layer=runner.layer,
        created_with=f"minsae_jax {version('minsae_jax')}",
        rule=rule,
        sampling_rate=places.sampling_rate,
        eeg_rate=places.sampling_rate / montage_step(places.sampling_rate, rate),
        samples=n_samples,
        encoded_samples=(int(places.window[-1]) + 1) * places.seq_len,
        channels=[channel_name(places, 0, channel) for channel in range(places.n_vars)],
        positions=positions if has_names and positions is not None else np.zeros((0, 2)),
        bipolar=bipolar_chains(names) if has_names and names else [],
        uv_per_sd=places.uv_per_sd(0),
        channel_tokens=places.has_channels,
        seq_len=places.seq_len,
        starts=grid.starts.tolist(),
        lengths=of_slot,
        events=events_between(places, 0, 0, n_samples, read_events_by_recording(places)),
        features=[viewed_feature(encoded, feature, labels, elsewhere) for feature in shown],
        activations=pack(table),
        eeg_step=EEG_STEP,
        eeg=pack(pack_eeg(page_eeg(places, rate))),
    )


def viewed_feature(
    encoded: EncodedRecording,
    feature: int,
    labels: Mapping[int, Label],
    elsewhere: Elsewhere | None,
) -> ViewedFeature:
    """Return names and numbers of a feature."""
    values = encoded.activations[:, [feature]].data
    n_tokens = len(encoded.start)
    label = labels.get(feature, Label())
    return ViewedFeature(
        id=feature,
        label=label.label,
        note=label.note,
        suggestion="" if elsewhere is None else elsewhere.suggestions.get(feature, ""),
        max=float(values.max(initial=0)),
        mean=float(values.sum(dtype=np.float64)) / n_tokens,
        density=len(values) / n_tokens,
        mean_elsewhere=None if elsewhere is None else elsewhere.mean.get(feature, 0.0),
    )


def token_table(
    places: TokenPlaces, encoded: EncodedRecording, features: Sequence[int]
) -> UInt8[np.ndarray, "features rows places"]:
    """Return activations on every row and token start, in 255ths of the feature's largest one.

    A row is a channel; there is a single one if all tokens are over all channels. Places are the
    starts of tokens, window after window. Where tokens share one, the largest activation counts; a
    token over all channels counts on every row. Only what is not active is 0.
    """
    n_rows = places.n_vars if places.has_channels else 1
    starts = places.tokens.starts
    window, sample = np.divmod(encoded.start, places.seq_len)
    place = window * len(starts) + np.searchsorted(starts, sample)
    n_places = (int(places.window[-1]) + 1) * len(starts)
    table = np.zeros((len(features), n_rows, n_places), np.uint8)
    for i, feature in enumerate(features):
        column = encoded.activations[:, [feature]]
        if not column.nnz:
            continue
        token = column.indices
        largest = column.data.max()
        level = np.rint(column.data * (255 / largest)).clip(1, 255).astype(np.uint8)
        is_of_all = encoded.channel[token] < 0
        of_all = token[is_of_all]
        of_one = token[~is_of_all]
        np.maximum.at(table[i].T, place[of_all], level[is_of_all, None])
        np.maximum.at(table[i], (encoded.channel[of_one], place[of_one]), level[~is_of_all])
    return table


def page_eeg(places: TokenPlaces, rate: int) -> Int16[np.ndarray, "n_vars samples"]:
    """Return the EEG of a recording in units of EEG_STEP SD, at `rate` [Hz] or a little more."""
    chunk = EEG_CHUNK * montage_step(places.sampling_rate, rate)
    stop = places.recording_length(0)
    parts = []
    for begin in range(0, stop, chunk):
        eeg = montage_eeg(places, 0, begin, min(begin + chunk, stop), rate)
        parts.append(np.rint(eeg.T / EEG_STEP).clip(-32767, 32767).astype(np.int16))
    return np.concatenate(parts, axis=1)


def pack_eeg(eeg: Int16[np.ndarray, "n_vars samples"]) -> UInt8[np.ndarray, "2 n_vars samples"]:
    """Return EEG as bytes that gzip makes a third smaller: low bytes, then high ones.

    They are of the differences from sample to sample (modulo 2^16, the first from 0), folded to
    numbers without a sign: 0, -1, 1, -2, … become 0, 1, 2, 3, …
    """
    difference = np.diff(eeg, axis=1, prepend=np.int16(0))
    folded = ((difference << 1) ^ (difference >> 15)).view(np.uint16)
    return np.stack([folded & 255, folded >> 8]).astype(np.uint8)


def pack(array: UInt8[np.ndarray, "..."]) -> str:
    """Return the bytes of an array, gzipped, in base64."""
    # Without a time, so that the same data are the same bytes.
    return base64.b64encode(gzip.compress(array.tobytes(), 6, mtime=0)).decode()


def write_view(path: Path, meta: ViewMeta) -> None:
    """Write a page with all its styles, scripts and data."""
    data = json.dumps(to_json(meta), allow_nan=False, separators=(",", ":"))
    # "<" is only in texts; without it no text can end the script.
    scripts = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "<!-- generator -->": MARKER,
        "<!-- title -->": html.escape(meta.recording),
        "/* styles */": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in STYLES),
        "/* scripts */": scripts,
        "/* data */": f"start({data.replace('<', chr(92) + 'u003c')});",
    }
    page = (ASSETS / "view.html").read_text(encoding="utf-8")
    for place, content in parts.items():
        page = page.replace(place, content)
    make_folder(path.parent)
    with atomic_write(path, shared=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
