"""The kinds of sparse autoencoder, one file each. To add a kind, add its file and a line here."""

from minsae_jax.sae.kinds.base import Batch, BatchMetrics, Hyper, Objective, Params, SAEKind
from minsae_jax.sae.kinds.relu import ReLU

KINDS: dict[str, SAEKind] = {"relu": ReLU()}

__all__ = ["KINDS", "Batch", "BatchMetrics", "Hyper", "Objective", "Params", "ReLU", "SAEKind"]
