"""The control of an evaluation: the same sweep, trained on an encoder with random weights.

The control is evaluated first, in its own folder; its measures are read from there.
"""

from collections.abc import Sequence
from pathlib import Path

from minsae_jax.checksums import read_npz
from minsae_jax.errors import UserError, join_some, reading
from minsae_jax.evaluation.event_results import EventEvaluation
from minsae_jax.evaluation.feature_measures import FeatureResult
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.saved import part_file

RANDOM = "random"  # name of the control in results
HOW = "see docs/evaluate.md, `A control with random weights`"


def read_control(
    folder: Path, members: Sequence[Member], source: str, encoder: str
) -> dict[str, EventEvaluation]:
    """Return the events of the control of each member, by the member's name.

    source, encoder: those of the members, see `ResampledAUCs`. Raises UserError unless the folder
    has an evaluation of members with these names and sizes, on the same recordings and events and
    of another encoder.
    """
    paths = {member.name: part_file(folder, member.name, "features") for member in members}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise UserError(
            f"--control {folder} has no evaluation of {join_some(missing, limit=3)}; train and "
            f"evaluate the control with the same settings ({HOW})"
        )
    controls = {}
    for member in members:
        with reading(f"{paths[member.name]} cannot be read", "; evaluate the control again"):
            control = FeatureResult.from_arrays(read_npz(paths[member.name])).events
        if control is None or control.resampled.source != source:
            raise UserError(
                f"--control {folder} was evaluated on other recordings or events, on another "
                "layer, or with another --seed; extract and evaluate it like this run"
            )
        if control.resampled.encoder == encoder:
            raise UserError(
                f"--control {folder} is of the encoder of this run, not of one with random weights "
                f"({HOW})"
            )
        d_sae = len(control.features.examples)
        if d_sae != member.sae.d_sae:
            raise UserError(
                f"--control {folder}: {member.name} has d_sae {d_sae}, expected "
                f"{member.sae.d_sae}; train the control with the same settings ({HOW})"
            )
        controls[member.name] = control
    return controls
