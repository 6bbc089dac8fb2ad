"""Settings of evaluation and report."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from minsae_jax.errors import UserError
from minsae_jax.settings import AtLeastOne, NonNegative, Range, check_settings, require

_BAND = re.compile(r"(\w+) (\d+\.?\d*)-(\d+\.?\d*)")


class Band(NamedTuple):
    """A frequency band, limits in Hz."""

    name: str
    low: float
    high: float

    def contains(self, hz: Float[np.ndarray, " n_hz"]) -> Bool[np.ndarray, " n_hz"]:
        """Return which frequencies are in the band; its upper limit is not."""
        return (hz >= self.low) & (hz < self.high)


def parse_bands(bands: Sequence[str]) -> tuple[Band, ...]:
    """Return bands such as "alpha 8-13". Raises UserError if one is invalid, or a name repeated."""
    parsed: dict[str, Band] = {}
    for text in bands:
        match = _BAND.fullmatch(text)
        if match is None or float(match[2]) >= float(match[3]):
            raise UserError(
                f'--bands must be a name and two limits in Hz like "alpha 8-13", got {text!r}'
            )
        require(match[1] not in parsed, f"--bands contains the name {match[1]} twice")
        parsed[match[1]] = Band(match[1], float(match[2]), float(match[3]))
    return tuple(parsed.values())


@dataclass(frozen=True, kw_only=True)
class EvaluationInputConfig:
    """Run, stores, recordings and encoder of an evaluation."""

    heading: ClassVar[str] = "Inputs"

    run: str
    """Folder of the finished run; for `evaluate` also that of a single SAE, such as an imported
    one."""
    root_path: str
    """Folder of the recordings; its events.csv, if any, has labelled events."""
    store: str | None = None
    """Store of the test patients (default: that beside the train store, stores/mine_test for
    stores/mine)."""
    val_store: str | None = None
    """Store of the val patients, on which principal components and probes are fitted and features
    for events are chosen (default: the run's --val_store, or else that beside the train store,
    stores/mine_val for stores/mine)."""
    val_root_path: str | None = None
    """Folder of the recordings of the val store, with their events.csv (default: --root_path)."""
    checkpoint_path: str | None = None
    """Encoder that the members were trained on (default: the one in the run's config.yaml)."""
    config_path: str | None = None
    """YAML of the encoder, if it is a .pth file that needs one."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measures of the members."""

    heading: ClassVar[str] = "Measures"

    compare_with: tuple[str, ...] = ()
    """Other runs, and folders of single SAEs, to evaluate together with the run; requires --out."""
    control: str | None = None
    """Folder of the evaluation of a control: the same members, trained on an encoder with random
    weights. Its best features for events are shown beside those of the member
    (docs/evaluate.md)."""
    member: str | None = None
    """Evaluate and report only this member (default: evaluate all, report the recommended)."""
    out: str | None = None
    """Folder for measures and report (default: the run). With other recordings than those of the
    test patients, choose another folder, so that their evaluation is not replaced."""
    substitution_windows: Annotated[int, AtLeastOne] = 64
    """Number of windows for the loss-recovered measure."""
    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.3
    """Share of patches masked for it, as in gPatchTST's pretraining."""
    pooling: Literal["mean", "maximum", "active"] = "active"
    """How activations are pooled over a recording to compare labels (labels.csv): their mean, their
    maximum, or the share of tokens with the feature active."""
    seed: Annotated[int, NonNegative] = 0
    """Seed of masks, of spans without an event and of random examples."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Content of the report."""

    heading: ClassVar[str] = "Report"

    report: bool = True
    """Write the report of the member's features, report/index.html in the run."""
    w: Annotated[int, NonNegative] = 10
    """Patches shown before and after the patch of an example, up to 6 s in all."""
    top: Annotated[int, AtLeastOne] = 16
    """Number of strongest examples per feature, each from another sequence."""
    per_recording: Annotated[int, AtLeastOne] = 3
    """Maximum number of strongest examples from one recording."""
    context_seconds: Annotated[float, Range(above=0)] | None = None
    """Seconds of EEG shown with an example (default: those of its patches, up to 6 s)."""
    report_features: Annotated[int, AtLeastOne] | None = None
    """Number of features with a page, the most relevant (default: as many as fit in 250 MB)."""
    bands: tuple[str, ...] = ("delta 1-4", "theta 4-8", "alpha 8-13", "beta 13-25", "gamma 25-35")
    """Frequency bands, each with a name and limits in Hz."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReportConfig, MeasureConfig, EvaluationInputConfig):
    """Evaluate the members of a run on held-out recordings and report on the features of one.

    `minsae evaluate --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        is_elsewhere = self.out is not None
        require(is_elsewhere or not self.compare_with, "--compare_with requires --out")
        parse_bands(self.bands)
