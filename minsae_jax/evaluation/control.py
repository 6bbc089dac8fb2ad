"""The control of an evaluation: the same sweep, trained on an encoder with random weights.

The control is evaluated first, in its own folder; its measures are read from there.
"""

from collections.abc import Collection
from pathlib import Path

from minsae_jax.checksums import read_npz
from minsae_jax.errors import UserError, brief, join_some
from minsae_jax.evaluation.bootstrap import DIFFERENCE, estimate
from minsae_jax.evaluation.event_results import Control, EventEvaluation
from minsae_jax.evaluation.feature_measures import FeatureResult
from minsae_jax.evaluation.saved import part_file

RANDOM = "random"  # name of the control in results
HOW = "see docs/evaluate.md, `A control with random weights`"


def check_control(folder: Path, members: Collection[str]) -> None:
    """Raise UserError unless the folder has an evaluation of members with these names."""
    missing = [name for name in members if not part_file(folder, name, "features").is_file()]
    if missing:
        raise UserError(
            f"--control {folder} has no evaluation of {join_some(missing, limit=3)}; train and "
            f"evaluate the control with the same settings ({HOW})"
        )


def read_control(folder: Path, member: str, events: EventEvaluation) -> Control:
    """Return the control of a member.

    events: those of the member. Raises UserError if the control was evaluated on other events, or
    if it is not another SAE.
    """
    path = part_file(folder, member, "features")
    try:
        control = FeatureResult.from_arrays(read_npz(path)).events
    except Exception as e:  # damaged, or of another version
        raise UserError(f"{path} cannot be read ({brief(e)}); evaluate the control again") from e
    own = events.resampled
    if control is None or control.resampled.source != own.source:
        raise UserError(
            f"--control {folder} was evaluated on other recordings or events, or with another "
            "--seed; evaluate it like this run"
        )
    if control.scores == events.scores:
        raise UserError(f"--control {folder} has the same SAE as this evaluation ({HOW})")
    gains = own.aucs - control.resampled.aucs
    *n_of_kinds, n_patients = own.n_patients.tolist()
    auc_gain = {
        kind: estimate(gain, n, DIFFERENCE)
        for kind, gain, n in zip(events.scores, gains, n_of_kinds, strict=True)
    }
    mean = estimate(gains.mean(axis=0), n_patients, DIFFERENCE)
    return Control(folder, control, auc_gain, mean)
