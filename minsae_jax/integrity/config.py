"""Settings of `verify`."""

from dataclasses import dataclass
from typing import Annotated

from minsae_jax.cli import Flag
from minsae_jax.settings import check_settings


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Folders to verify."""

    path: Annotated[tuple[str, ...], Flag(positional=True)]
    """Stores, encoders, runs, members, evaluations, recordings, or folders that contain these."""

    def __post_init__(self) -> None:
        check_settings(self)
