"""The result of steering, with its table and files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.errors import join_some
from minsae_jax.evaluation.steering.edit import Place
from minsae_jax.evaluation.steering.output import ExampleTrace, Reconstruction
from minsae_jax.evaluation.steering.probes import ProbeReading, Target
from minsae_jax.files import replaced_folder
from minsae_jax.json_values import to_json
from minsae_jax.monitor import table, wrap

MAX_NAME = 200  # bytes of a folder name; that of its temporary folder is longer
MIN_CHANGE = 0.01  # SD of a probe's logits, below which a ratio of changes is noise


@dataclass(frozen=True)
class Effect:
    """Everything that is measured at one scale; at scale 1 all changes are 0."""

    scale: float
    # ‖change‖ / ‖activation‖ of the last layer, root mean square over affected tokens and over the
    # other tokens of the windows
    last_layer: float
    last_layer_elsewhere: float
    # None if the encoder has no head that reconstructs
    reconstruction: Reconstruction | None
    # By kind of event; empty without labelled events
    probes: tuple[ProbeReading, ...]

    def selectivity(self, target: Target) -> float | None:
        """Return |change| of the target's probe over the largest |change| of another's.

        None if there is no other probe, or no probe changes by MIN_CHANGE.
        """
        changes = {reading.kind: abs(reading.change) for reading in self.probes}
        of_target = changes.pop(target.kind)
        largest = max(changes.values(), default=0.0)
        if largest == 0 or max(of_target, largest) < MIN_CHANGE:
            return None
        return of_target / largest


@dataclass(frozen=True)
class Steering:
    """Changes in an encoder when features of an SAE at one of its layers are scaled."""

    # Folder of the run
    run: str
    member: str
    # Index of the encoder's layer, from 0
    layer: int
    features: tuple[int, ...]
    # Windows over which changes of the last layer and of the reconstruction are measured
    windows: tuple[Place, ...]
    n_tokens: int
    # Tokens on which a steered feature is active
    n_affected: int
    # Of the reconstruction
    unit: str
    sampling_rate: float
    channels: tuple[str, ...]
    # On a unit head, NaN where unknown; None if all are
    positions: Float[np.ndarray, "n_vars 2"] | None
    # Frequencies of the spectra
    hz: Float[np.ndarray, " n_hz"]
    # Correlation of the untouched reconstruction with the EEG; None without such a head
    r: float | None
    # None without labelled events
    target: Target | None
    # Scale 1
    untouched: Effect
    # One for each scale
    effects: tuple[Effect, ...]
    examples: tuple[ExampleTrace, ...]

    def __repr__(self) -> str:
        features = join_some(list(map(str, self.features)))
        return f"{type(self).__name__}({self.run}, {self.member}, features {features})"

    @property
    def folder(self) -> Path:
        """The folder of the files, steering/MEMBER/f00012 in the run.

        File systems limit names to 255 bytes, so many features are named by their hash.
        """
        name = "+".join(f"f{feature:05d}" for feature in sorted(self.features))
        if len(name) > MAX_NAME:
            digest = hashlib.sha256(name.encode()).hexdigest()
            name = f"{len(self.features)}-features-{digest[:12]}"
        return Path(self.run) / "steering" / self.member / name

    def summary(self) -> str:
        """Return a table for the terminal, a column for each scale, with an explanation."""
        return "\n".join([_table(self), *map(wrap, _explanation(self))])

    def write(self) -> None:
        """Write steering.json, steering.png and steering.svg; existing ones are replaced."""
        from minsae_jax.evaluation.steering.figure import draw

        with replaced_folder(self.folder) as folder:
            record = to_json(self, _six_digits)
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / "steering.json").write_text(text + "\n", encoding="utf-8")
            draw(self, folder)


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _table(steering: Steering) -> str:
    effects = steering.effects
    rows = [["last layer", *(f"{effect.last_layer:.3f}" for effect in effects)]]
    reconstructions = [effect.reconstruction for effect in effects if effect.reconstruction]
    if reconstructions:
        rms = [np.sqrt(np.square(each.rms).mean()) for each in reconstructions]
        rows.append(["output RMS", *(f"{value:.3f}" for value in rms)])
        for band in reconstructions[0].band_ratio:
            ratios = [each.band_ratio[band] for each in reconstructions]
            rows.append([f"output {band}", *(f"×{ratio:.2f}" for ratio in ratios)])
    for probes in zip(*(effect.probes for effect in effects), strict=True):
        changes = [f"{reading.change:+.2f}" for reading in probes]
        rows.append([f"probe {probes[0].kind}", *changes])
    if steering.target is not None:
        row = ["selectivity"]
        for effect in effects:
            selectivity = effect.selectivity(steering.target)
            row.append("" if selectivity is None else f"{selectivity:.2f}")
        rows.append(row)
    return table(["scale", *(f"{effect.scale:g}" for effect in effects)], rows)


def _explanation(steering: Steering) -> list[str]:
    lines = [
        f"last layer: change of activations over their norm, on the {steering.n_affected:,} of "
        f"{steering.n_tokens:,} tokens where the features are active"
    ]
    if steering.untouched.reconstruction is not None:
        lines.append(
            f"output: RMS of the change of the reconstruction ({steering.unit}), and its power in "
            "each band over that of the untouched one"
        )
    target = steering.target
    if target is not None:
        lines.append(
            f"target: {target.kind}, which feature {target.feature} detects best on val patients "
            f"(test AUC {target.test_auc:.3f})"
        )
        lines.append(
            "probe: change of the logit of each kind's probe on its test events, in SD; "
            "selectivity: that of the target over the largest of the others"
        )
    return lines
