"""The kinds of sparse autoencoder, one file each. To add a kind, add its file and a line here."""

from minsae_jax.sae.kinds.base import Batch, BatchContext, Objective, Params, SAEKind
from minsae_jax.sae.kinds.batchtopk import BatchTopK
from minsae_jax.sae.kinds.gated import Gated
from minsae_jax.sae.kinds.jumprelu import JumpReLU
from minsae_jax.sae.kinds.matryoshka import Matryoshka
from minsae_jax.sae.kinds.relu import ReLU
from minsae_jax.sae.kinds.topk import TopK
from minsae_jax.settings import JsonObject, from_dict

__all__ = ["KINDS", "Batch", "BatchContext", "Objective", "Params", "SAEKind", "kind_of"]

KINDS: dict[str, SAEKind] = {
    "relu": ReLU(),
    "topk": TopK(),
    "batchtopk": BatchTopK(),
    "matryoshka": Matryoshka(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
}


def kind_of(config: JsonObject) -> SAEKind:
    """Return the kind, with its settings, in a member's config.json; ReLU without an entry.

    Raises UserError if a setting is invalid. The kind's name must be known.
    """
    kind = KINDS[config.get("kind", "relu")]
    saved = {name: config[name] for name in kind.settings if name in config}
    return from_dict(type(kind), saved)
