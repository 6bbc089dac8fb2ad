"""From numbers to a folder of static files. What is drawn, and how, stands in report.js and figures.js.

A page opened from disk may not fetch files, but it may load scripts: so all data are small scripts that call `receive`,
`index_data.js` with what the first page shows, `data/f00012.js` with feature 12, loaded when somebody looks at it.
"""

import base64
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minsae_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"
PAGE = ("index.html", "report.css", "report.js", "figures.js")
OURS = (*PAGE, "index_data.js", "data")
# What the table of all features shows; the rest of a feature waits in its own file.
COLUMNS = (
    "id", "label", "suggestion", "density", "mean", "max", "channel", "band", "patients", "artefact",
)  # fmt: skip


def write_report(folder: Path, meta: dict[str, Any], features: Iterable[dict[str, Any]]) -> None:
    """Write the report to `folder`, or none at all. An older report there is replaced; what else lies beside it, the
    user's labels.csv above all, is kept.

    meta: title, member, run, encoder, layer, split, created_with; n_tokens, n_windows, n_recordings, n_patients;
      sampling_rate [Hz], patch_seconds, n_patches, has_cls; channels and positions [n, 2] (a unit head from above, x
      right, y front); bands [(name, from Hz, to Hz)]; summary [(label, text)]; members [{name, lambda_sparsity, l0,
      fvu, d_sae, recommended}]; events [{kind, feature, auc, probe_auc, raw_auc, pca_auc}]; waveform_exact;
      shifted_recordings; notes [str].
    features: taken one by one, none kept. Of each the COLUMNS, and patient_share, cls, note; examples [{group: top,
      q1 … q10 or random, recording, patient, channel, start [s], patch (from s, to s) or None for the CLS token,
      activation, trace int8 [samples] in SD/10, others int8 [channels, samples/2] or None, strip [patches] of
      activations, strip_start [s], hints}]; histogram {edges, counts}; channel_ratio [channels]; spectrum {hz, ratio,
      low, high} or None; position [n_patches]; patient_list [(name, share)]; nearest and coactive [(id, value)];
      waveform [samples] or None; artefacts {name: share}. Of a feature that was never active, whatever there is.

    Raises UserError where `folder` holds something else than a report.
    """
    folder = folder.resolve()
    there = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if "index_data.js" not in there and there - {"labels.csv"}:
        raise UserError(
            f"{folder} holds files that are no report: name another folder for it, or empty this one"
        )
    with _replaced(folder) as aside:
        (aside / "data").mkdir(parents=True)
        rows = []
        for feature in features:
            _write_script(aside / f"data/f{feature['id']:05d}.js", feature)
            rows.append([feature.get(name) for name in COLUMNS])
        _write_script(aside / "index_data.js", {"meta": meta, "columns": COLUMNS, "rows": rows})
        for name in PAGE:
            shutil.copyfile(ASSETS / name, aside / name)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place at the end with all there that is not OURS."""
    aside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield aside
        if folder.exists():
            shutil.copytree(
                folder,
                aside,
                ignore=lambda at, _: OURS if at == str(folder) else (),
                dirs_exist_ok=True,
            )
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_script(path: Path, value: Any) -> None:
    text = json.dumps(
        _compact(value), allow_nan=False, separators=(",", ":")
    )  # ASCII: the same in every encoding
    path.write_text(f"receive({text});\n")


def _compact(value: Any) -> Any:
    """As JSON has it, and short: int8 arrays as base64, numbers with four digits, or two decimals where that is more
    (seconds in a recording, say); what is not finite as null.

    >>> _compact({"trace": np.array([1, -1], np.int8), "strip": np.array([0.123456, 4321.987, np.nan])})
    {'trace': 'Af8=', 'strip': [0.1235, 4321.99, None]}
    """
    match value:
        case dict():
            return {str(key): _compact(item) for key, item in value.items()}
        case np.ndarray() if value.dtype == np.int8:
            return base64.b64encode(value.tobytes()).decode()
        case np.ndarray() | np.generic():
            return _compact(value.tolist())
        case list() | tuple():
            return [_compact(item) for item in value]
        case float():
            if not math.isfinite(value):
                return None
            return round(value, 2) if abs(value) >= 100 else float(f"{value:.4g}")
    return value
