"""The kinds of sparse autoencoder, one file each. To add a kind, add its file and a line here."""

from minsae_jax.sae.kinds.base import (
    Batch,
    BatchContext,
    BatchMetrics,
    HyperArrays,
    Objective,
    Params,
    SAEKind,
)
from minsae_jax.sae.kinds.batchtopk import BatchTopK
from minsae_jax.sae.kinds.gated import Gated
from minsae_jax.sae.kinds.jumprelu import JumpReLU
from minsae_jax.sae.kinds.matryoshka import Matryoshka
from minsae_jax.sae.kinds.relu import ReLU
from minsae_jax.sae.kinds.topk import TopK

KINDS: dict[str, SAEKind] = {
    "relu": ReLU(),
    "topk": TopK(),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
}

__all__ = [
    "KINDS",
    "Batch",
    "BatchContext",
    "BatchMetrics",
    "BatchTopK",
    "Gated",
    "HyperArrays",
    "JumpReLU",
    "Matryoshka",
    "Objective",
    "Params",
    "ReLU",
    "SAEKind",
    "TopK",
]
