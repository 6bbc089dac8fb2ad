"""Settings of `view`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from minsae_jax.cli import Flag
from minsae_jax.settings import (
    AtLeastOne,
    NonNegative,
    check_no_duplicates,
    check_settings,
    require,
)


@dataclass(frozen=True, kw_only=True)
class ViewEncoder:
    """The encoder of the viewed recordings."""

    heading: ClassVar[str] = "Encoder"

    checkpoint_path: str | None = None
    """Encoder that the member was trained on (default: the one in the run's config.yaml)."""
    config_path: str | None = None
    """YAML of the encoder, if it is a .pth file that needs one."""
    layer: int | None = None
    """Layer that the member was trained on (default: the one in its config.json, else -1)."""
    allow_mismatch: bool = False
    """Accept recordings with another sampling rate, unit or channel names than the encoder's."""
    force_revin: bool = False
    """Apply RevIN even if the encoder's settings disable it, if `extract` did so too."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig(ViewEncoder):
    """Show features over whole recordings.

    `minsae view --help` explains all settings.
    """

    recording: Annotated[tuple[str, ...], Flag(positional=True)]
    """Recordings, .npy files of [time, channels]; dataset.json and events.csv are read if they are
    in the same folder."""
    member: str
    """Folder of a trained SAE, such as runs/mine/members/lambda=5."""
    out: str
    """Folder of the pages, RECORDING.html each; for one recording also the name of its page, a file
    that ends in .html. Pages that `view` wrote before are replaced, other files are not."""
    feature: tuple[Annotated[int, NonNegative], ...] = ()
    """Features to show, in this order (default: chosen by a rule that the page states)."""
    num_features: Annotated[int, AtLeastOne] = 12
    """Number of features to show, unless --feature names them."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_no_duplicates(self, "feature")
        require(bool(self.recording), "minsae view requires at least one RECORDING")
