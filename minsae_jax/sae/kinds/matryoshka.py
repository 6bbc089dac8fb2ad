"""Matryoshka BatchTopK: the first features alone reconstruct x too (Bussmann et al. 2025).

    loss = mean over prefixes F_1 < … < F_L = d_sae of ‖x - b_dec - Σ_{i < F_l} f_i W_dec,i‖² + AuxK

Features are those of BatchTopK, over all of d_sae. Early features learn what is general.
"""

import math
from dataclasses import dataclass

from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.kinds.batchtopk import BatchTopK


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """shares: of d_sae in each prefix, increasing to 1."""

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    name = "matryoshka"

    def for_run(self, config: TrainConfig, d_model: int) -> "Matryoshka":
        return Matryoshka(shares=config.matryoshka_shares)

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Return the prefixes' sizes; shares that round to the same size count once."""
        return tuple(sorted({math.ceil(share * d_sae) for share in self.shares}))
