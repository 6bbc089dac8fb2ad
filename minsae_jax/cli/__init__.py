"""Command lines of `minsae_jax` and `convert`: verbs, flags from settings classes, errors."""

from minsae_jax.cli.flags import Flag, parse
from minsae_jax.cli.lost_peer import watch as watch_cluster
from minsae_jax.cli.process import is_command, run
from minsae_jax.cli.verbs import Verb, parse_verb

__all__ = [
    "Flag",
    "Verb",
    "is_command",
    "parse",
    "parse_verb",
    "run",
    "watch_cluster",
]
