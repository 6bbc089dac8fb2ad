"""Holding a converted encoder against plain torch on the PyTorch weights: `python -m convert encoder … --verify`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.checkpoint import Tensors
from minsae_jax.encoder.converted import Encoder
from minsae_jax.errors import UserError
from minsae_jax.monitor import table

MOST_NUMBERS = (
    1 << 26
)  # that a layer may have for all windows: plain torch keeps several such tensors
TOLERANCE = 1e-4  # largest difference allowed, in the unit of the activations
WINDOWS = 4


@dataclass(frozen=True)
class Difference:
    """Of one layer, over all windows, channels, tokens and dimensions; sd is the layer's own."""

    part: str
    largest: float
    mean: float
    sd: float

    @property
    def passes(self) -> bool:
        return self.largest <= TOLERANCE  # NaN does not


def verify(encoder: Encoder, tensors: Tensors, windows: np.ndarray) -> list[Difference]:
    """Flax against plain torch on the source's own tensors, for every layer and the head, both in float32.

    windows: [B, seq_len, n_vars] in SD.
    """
    import torch

    from convert.plain_torch import forward

    a = encoder.architecture
    with torch.no_grad():
        hidden, output = forward(
            a, {k: torch.tensor(t) for k, t in tensors.items()}, torch.from_numpy(windows)
        )
    expected = {f"layer {i}": h for i, h in enumerate(hidden)}
    got = {f"layer {i}": encoder.activations(windows, i) for i in range(a.n_layers)}
    if a.head_type != "none" and output is not None:
        expected["head"], got["head"] = output, encoder(windows)
    return [_difference(part, np.asarray(got[part]), expected[part].numpy()) for part in expected]


def _difference(part: str, got: np.ndarray, expected: np.ndarray) -> Difference:
    off = np.abs(got.astype(np.float64) - expected)
    return Difference(part, float(off.max()), float(off.mean()), float(expected.std()))


def read_windows(encoder: Encoder, recording: str | None) -> np.ndarray:
    """Windows evenly spread over a recording, or white noise of SD 1. Raises UserError where the recording does not fit
    the encoder."""
    a = encoder.architecture
    numbers = a.n_vars * a.n_tokens * max(a.d_model, a.d_ff, a.n_heads * a.n_tokens)
    if numbers > MOST_NUMBERS:
        raise UserError(
            f"the encoder is too large to be verified: {numbers:,} numbers a layer and window"
        )
    n_windows = min(WINDOWS, MOST_NUMBERS // numbers)
    if recording is None:
        return (
            np.random.default_rng(0)
            .normal(size=(n_windows, a.seq_len, a.n_vars))
            .astype(np.float32)
        )
    try:
        samples = np.load(Path(recording), allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(
            f"{recording} is no recording that can be read ({' '.join(str(e).split())[:150]})"
        ) from e
    if not isinstance(samples, np.ndarray):
        raise UserError(f"{recording} is an archive of arrays, not one recording")
    samples = samples[:, None] if samples.ndim == 1 else samples
    if (
        samples.ndim != 2
        or samples.dtype.kind != "f"
        or samples.shape[1] != a.n_vars
        or len(samples) < a.seq_len
    ):
        raise UserError(
            f"{recording} is {samples.dtype}{list(samples.shape)}, but must be floating-point [time, {a.n_vars} "
            f"channels] of at least {a.seq_len} samples"
        )
    starts = np.unique(np.linspace(0, len(samples) - a.seq_len, n_windows).astype(int))
    windows = np.stack([samples[i : i + a.seq_len] for i in starts]).astype(np.float32)
    if not np.isfinite(windows).all():
        raise UserError(f"{recording} holds NaN or infinity")
    return windows


def report(differences: list[Difference]) -> str:
    """The table for the terminal."""
    rows = [[d.part, f"{d.largest:.1e}", f"{d.mean:.1e}", f"{d.sd:.3g}"] for d in differences]
    return table(["", "max difference", "mean difference", "its SD"], rows)
