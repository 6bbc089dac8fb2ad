"""A sparse autoencoder between two file formats, and parameter changes that preserve x̂."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.torch_files import Tensors
from minsae_jax.errors import UserError
from minsae_jax.sae.kinds import KINDS, Matryoshka
from minsae_jax.sae.member import check_params
from minsae_jax.settings import JsonObject, shown


@dataclass(frozen=True)
class Autoencoder:
    """Parameters for raw activations, under a member's names, and entries of its config.json."""

    params: Tensors
    config: JsonObject

    @property
    def kind(self) -> str:
        return self.config.get("kind", "relu")

    @property
    def d_sae(self) -> int:
        return len(self.params["W_dec"])


def new_config(path: Path, kind: str, **settings: Any) -> JsonObject:
    """Return config.json of an autoencoder that was not trained here."""
    return {"format_version": 1, "kind": kind, "source_file": path.name, **settings}


def member_config(config: Any, kinds: tuple[str, ...]) -> JsonObject | None:
    """Return the member's config.json inside an export, or None if its kind is not in `kinds`."""
    if not isinstance(config, dict) or config.get("format_version") != 1:
        return None
    return config if config.get("kind") in kinds else None


def shift_bias(kind: str, params: Tensors, sign: int) -> Tensors:
    """Return the parameters with sign * b_dec W_enc added to the encoder's bias.

    An encoder of x - b_dec with bias b equals one of x with bias b - b_dec W_enc. Computed in
    float64 and rounded to float32 once. Raises UserError if the result is not finite.
    """
    shift = sign * (params["b_dec"].astype(np.float64) @ params["W_enc"])
    shifts = {"b_enc": shift}
    if kind == "gated":
        # Only the magnitude multiplies the product by exp(r_mag).
        magnitude_shift = np.exp(params["r_mag"].astype(np.float64)) * shift
        shifts = {"b_gate": shift, "b_mag": magnitude_shift}
    shifted = dict(params)
    with np.errstate(over="ignore"):  # check_params reports infinity
        for name, value in shifts.items():
            shifted[name] = (params[name] + value).astype(np.float32)
    check_params(KINDS[kind], shifted, "the autoencoder with the decoder's bias moved")
    return shifted


def fold_decoder_norm(kind: str, params: Tensors) -> Tensors:
    """Return parameters whose features are multiplied by the decoder's norms, for the same x̂.

    Decoder rows then have norm 1. A threshold must already be in the unit of the new features.
    """
    w_dec = params["W_dec"].astype(np.float64)
    norms = np.linalg.norm(w_dec, axis=1)
    # A row of zeros stays 0, and its feature is never active.
    divisors = np.where(norms > 0, norms, 1)[:, None]
    with np.errstate(over="ignore"):  # check_params reports infinity
        folded = params | {
            "W_enc": (params["W_enc"] * norms).astype(np.float32),
            "b_enc": (params["b_enc"] * norms).astype(np.float32),
            "W_dec": (w_dec / divisors).astype(np.float32),
        }
    check_params(KINDS[kind], folded, "the autoencoder with the decoder's norms folded in")
    return folded


def whole_k(k: Any, where: str) -> int:
    """Return a number of features per token. Raises UserError unless it is an integer above 0."""
    is_number = isinstance(k, (int, float)) and not isinstance(k, bool)
    if not is_number or not 1 <= k < 2**31 or k != int(k):
        raise UserError(f"{where} has k {shown(k)}, expected an integer above 0")
    return int(k)


def topk_k(sae: Autoencoder) -> int:
    """Return k of a TopK autoencoder. A fraction selects as many features as the next integer."""
    return min(math.ceil(sae.params["k"]), sae.d_sae)


def shares_from_prefixes(prefixes: list[int], d_sae: int) -> list[float]:
    """Return the setting `shares` of a Matryoshka autoencoder with these prefixes."""
    shares = []
    for prefix in prefixes:
        share = prefix / d_sae
        if math.ceil(share * d_sae) > prefix:  # the quotient was rounded up
            share = math.nextafter(share, 0)
        shares.append(share)
    return shares


def matryoshka_prefixes(sae: Autoencoder) -> tuple[int, ...]:
    """Return the prefixes' sizes. Raises UserError if config.json has invalid shares."""
    shares = sae.config.get("shares", Matryoshka().shares)
    try:
        prefixes = Matryoshka(shares=tuple(shares)).prefixes(sae.d_sae)
        if prefixes[0] > 0 and prefixes[-1] == sae.d_sae:
            return prefixes
    except (TypeError, ValueError, OverflowError, IndexError):
        pass
    raise UserError(f"config.json has shares {shown(shares)}, expected fractions that end with 1")
