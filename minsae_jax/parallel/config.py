"""Settings that several commands share about the processes they run in."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Whether several processes share the work."""

    heading: ClassVar[str] = "Compute"

    distributed: bool = False
    """Share the work with the other processes of a cluster, each started with the same command."""
