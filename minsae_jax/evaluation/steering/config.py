"""Settings of steering."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from minsae_jax.evaluation.config import EvaluationInputConfig, ReportConfig, parse_bands
from minsae_jax.settings import (
    AtLeastOne,
    NonNegative,
    Range,
    check_no_duplicates,
    check_settings,
    require,
)


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Features to steer, and windows to measure."""

    heading: ClassVar[str] = "Steering"

    feature: tuple[Annotated[int, NonNegative], ...]
    """Features whose activations are scaled, all at once."""
    scale: tuple[Annotated[float, Range()], ...] = (0.0, 2.0, 5.0)
    """Factors of the activations: 0 ablates the features, 1 leaves the model as it is."""
    member: str | None = None
    """Member of the run (default: the one recommended in its evaluation.json)."""
    recording: str | None = None
    """File name of a recording (default: the test recordings where the features are strongest)."""
    window: tuple[Annotated[int, NonNegative], ...] = ()
    """Windows of the recording, from 0 (default: those where the features are strongest)."""
    windows: Annotated[int, AtLeastOne] = 8
    """Number of windows, if they are not given by --window."""
    bands: tuple[str, ...] = ReportConfig.bands
    """Frequency bands, each with a name and limits in Hz."""
    seed: Annotated[int, NonNegative] = 0
    """Seed of the spans without an event."""


# Bases in reverse order: dataclasses list the fields of the last base first.
@dataclass(frozen=True, kw_only=True)
class SteerConfig(EditConfig, EvaluationInputConfig):
    """Scale features of a run's SAE and measure what changes downstream.

    `minsae steer --help` explains all settings.
    """

    def __post_init__(self) -> None:
        check_settings(self)
        check_no_duplicates(self, "feature", "scale", "window")
        require(bool(self.feature), "--feature requires at least one feature")
        require(bool(self.scale), "--scale requires at least one number")
        require(not self.window or self.recording is not None, "--window requires --recording")
        parse_bands(self.bands)
