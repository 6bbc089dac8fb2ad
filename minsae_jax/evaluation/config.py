"""Settings of evaluation and report."""

import re
from dataclasses import dataclass

from minsae_jax.settings import require, require_positive


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the members of a run on held-out recordings, recommend one, and show its features."""

    run: str | None = None
    """Folder of the finished run."""
    store: str | None = None
    """Store of the test patients (default: the train store's sibling, store_test for store)."""
    val_store: str | None = None
    """Store of the val patients, on which features are chosen for events (default: the sibling store_val)."""
    root_path: str | None = None
    """Folder of the recordings; labelled events are looked for in its events.csv."""
    checkpoint_path: str | None = None
    """The encoder that the members were trained on (default: what the run was trained with)."""
    config_path: str | None = None
    """That encoder's YAML, where it is a .pth file that needs one."""
    member: str | None = None
    """Evaluate this member alone, and show its features (default: all, and the recommended one's)."""
    substitution_windows: int = 64
    """Windows on which x̂ is put in the place of the layer's activations."""
    mask_ratio: float = 0.3
    """Share of the patches that is hidden there, as in gPatchTST's pretraining."""
    report: bool = True
    """Write the report of the member's features: report/index.html in the run."""
    w: int = 10
    """Patches shown to either side of an example."""
    top: int = 16
    """Strongest examples of a feature."""
    per_recording: int = 3
    """Of these, the most from one recording."""
    bands: tuple[str, ...] = ("delta 1-4", "theta 4-8", "alpha 8-13", "beta 13-25", "gamma 25-35")
    """Frequency bands, each a name and its limits in Hz."""
    seed: int = 0
    """Seed of masks, spans without an event, and random examples."""

    def __post_init__(self) -> None:
        require_positive(self, "substitution_windows", "top", "per_recording")
        require(
            0 < self.mask_ratio < 1,
            f"--mask_ratio must be between 0 and 1, but is {self.mask_ratio}",
        )
        require(self.w >= 0, f"--w must be 0 or more, but is {self.w}")
        require(self.seed >= 0, f"--seed must be 0 or more, but is {self.seed}")
        for band in self.bands:
            match = _BAND.fullmatch(band)
            fits = match is not None and float(match[2]) < float(match[3])
            require(
                fits,
                f'--bands must be a name and two limits in Hz like "alpha 8-13", but is {band!r}',
            )

    def band_limits(self) -> tuple[tuple[str, float, float], ...]:
        """Name, lower and upper limit in Hz."""
        matches = [match for band in self.bands if (match := _BAND.fullmatch(band))]
        return tuple((m[1], float(m[2]), float(m[3])) for m in matches)


_BAND = re.compile(r"(\w+) (\d+\.?\d*)-(\d+\.?\d*)")
