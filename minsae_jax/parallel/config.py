"""Settings that several commands share about the processes they run in."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Compute"""

    distributed: bool = False
    """Share the work with the other processes of a cluster, each started with the same command."""
