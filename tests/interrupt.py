"""Interrupt a training run at a chosen step, as a crash would, by the hook of `train`."""

import pytest

from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.trainer import train


class Interrupted(Exception):
    """Raised in the middle of a run."""


def train_until(settings: TrainConfig, step: int, *args, **kwargs) -> None:
    """Train, and raise inside the loop when `step` steps are done: nothing is saved on the way out.

    Further arguments are those of `train`. Fails if the run ends before that step.
    """

    def on_step(finished: int) -> None:
        if finished == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(settings, *args, on_step=on_step, **kwargs)
