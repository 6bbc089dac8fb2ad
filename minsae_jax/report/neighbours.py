"""The features next to a feature: by decoder direction, and by the tokens where both are active."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.sparse import csr_array

NEIGHBOURS = 8
BLOCK = 256  # features compared with all others at a time


def nearest_features(
    directions: Float[np.ndarray, "d_sae d_model"], features: Sequence[int]
) -> Iterator[list[tuple[int, float]]]:
    """Yield for each feature the others with the largest cosine, and this cosine, largest first.

    directions: decoder rows of norm 1.
    """
    rows = jnp.asarray(directions)
    # One shape for all blocks, but no larger than needed.
    size = min(BLOCK, len(features))
    for begin in range(0, len(features), BLOCK):
        block = np.asarray(features[begin : begin + BLOCK], np.int32)
        padded = np.resize(block, size)
        with jax.default_matmul_precision("highest"):
            cosines, others = map(np.asarray, _largest_cosines(rows, padded))
        for i in range(len(block)):
            yield list(zip(others[i].tolist(), cosines[i].tolist(), strict=True))


@jax.jit
def _largest_cosines(
    rows: Float[Array, "d_sae d_model"], block: Int[Array, " block"]
) -> tuple[Float[Array, "block n"], Int[Array, "block n"]]:
    cosine = rows[block] @ rows.T
    # Smaller than any cosine.
    cosine = cosine.at[jnp.arange(len(block)), block].set(-2)
    largest, other = jax.lax.top_k(cosine, min(NEIGHBOURS, len(rows) - 1))
    return largest, other


def coactive_features(
    together: csr_array, features: Sequence[int]
) -> Iterator[list[tuple[int, float]]]:
    """Yield for each feature those most often active together with it, and their Jaccard index.

    The Jaccard index is tokens with both features active over tokens with either. together: see
    `Activity`.
    """
    each = together.diagonal()
    for feature in features:
        of_feature = slice(together.indptr[feature], together.indptr[feature + 1])
        other = together.indices[of_feature]
        both = together.data[of_feature]
        jaccard = both / (each[other] + each[feature] - both)
        jaccard = np.where(other == feature, -1, jaccard)
        # Largest first; of equal ones the first feature.
        order = np.lexsort((other, -jaccard))[:NEIGHBOURS]
        yield [(int(other[i]), float(jaccard[i])) for i in order if jaccard[i] > 0]
