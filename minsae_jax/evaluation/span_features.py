"""The features of an autoencoder on the spans of one kind of events, for `event_measures`."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minsae_jax.evaluation.events import (
    BATCH_TOKENS,
    SpanActivations,
    max_over_spans,
    span_groups,
)
from minsae_jax.parallel.mesh import fetch_late, start_fetch
from minsae_jax.sae.kinds import Params, SAEKind
from minsae_jax.sae.member import SparseAutoencoder
from minsae_jax.sae.padding import pad_rows, power_of_two


class EncodedSpans(NamedTuple):
    """The features of one autoencoder on the spans of one kind."""

    # Largest activation of each feature over the tokens of each span
    maxima: Float[np.ndarray, "spans d_sae"]
    # Mean activations over the tokens of events, and of other spans
    means: Float[np.ndarray, "2 d_sae"]
    # Of every kind's probe on x̂, without bias
    logits: Float[np.ndarray, "tokens kinds"]
    # Of the chosen features
    chosen: Float[np.ndarray, "tokens chosen"]
    # Number of active features
    n_active: Int[np.ndarray, " tokens"]


def encode_spans(
    sae: SparseAutoencoder,
    spans: SpanActivations,
    probes: Float[np.ndarray, "d_model kinds"],
    chosen: Int[np.ndarray, " chosen"],
) -> EncodedSpans:
    """Encode spans; probes: weights of every kind's, chosen: features to return of every token."""
    lengths = spans.lengths
    maxima = []
    logits = []
    of_chosen = []
    n_active = []
    sums = np.zeros((2, sae.d_sae))

    def run_groups() -> Iterator[tuple[np.ndarray, list[Any]]]:
        for group in span_groups(spans.activations):
            x = np.concatenate([spans.activations[i] for i in group])
            side = np.repeat(spans.is_event[group], lengths[group])
            # Padded, so that all groups but those of a longer span share one compiled program.
            n_rows = max(BATCH_TOKENS, power_of_two(len(x)))
            sides = np.stack([side, ~side], axis=1).astype(np.float32)
            rows = (pad_rows(x, n_rows), pad_rows(sides, n_rows).T)
            with jax.default_matmul_precision("highest"):
                features, *others = _encode(sae.kind, sae.params, *rows, probes, chosen)
            yield group, [start_fetch(features), *others]

    for group, encoded in fetch_late(run_groups()):
        features, side_sums, group_logits, group_chosen, group_active = encoded
        n_tokens = lengths[group].sum()
        maxima.append(max_over_spans(features[:n_tokens], lengths[group]))
        logits.append(group_logits[:n_tokens])
        of_chosen.append(group_chosen[:n_tokens])
        n_active.append(group_active[:n_tokens])
        sums += side_sums
    is_event = np.repeat(spans.is_event, lengths)
    counts = np.array([is_event.sum(), (~is_event).sum()])
    return EncodedSpans(
        maxima=np.concatenate(maxima),
        means=sums / counts[:, None],
        logits=np.concatenate(logits),
        chosen=np.concatenate(of_chosen),
        n_active=np.concatenate(n_active),
    )


@partial(jax.jit, static_argnums=0)
def _encode(
    kind: SAEKind,
    params: Params,
    x: Float[Array, "tokens d_model"],
    sides: Float[Array, "2 tokens"],
    probes: Float[Array, "d_model kinds"],
    chosen: Int[Array, " chosen"],
) -> tuple[Array, ...]:
    """Return features, their sums over each side, the probes on x̂, and the chosen features.

    And the number of active features of each token.
    """
    features = kind.encode(params, x)
    logits = kind.decode(params, features) @ probes
    n_active = (features > 0).sum(axis=1)
    return features, sides @ features, logits, features[:, chosen], n_active
