"""Comparison of a converted encoder with plain torch: `python -m convert encoder … --verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from convert import cbramod
from convert.torch_files import Tensors
from minsae_jax.eeg.recordings import load_recording
from minsae_jax.encoder.native import NativeEncoder
from minsae_jax.errors import UserError, brief
from minsae_jax.monitor import table

# Numbers of one layer for all windows: plain torch keeps several such tensors in memory.
MAX_NUMBERS = 1 << 26
TOLERANCE = 1e-4  # largest allowed difference, in the unit of the activations
N_WINDOWS = 4


@dataclass(frozen=True)
class Difference:
    """Difference in one part of the model, over all windows, channels, tokens and dimensions.

    largest, mean: of |Flax - torch|. sd: SD of torch's values.
    """

    part: str
    largest: float
    mean: float
    sd: float

    @property
    def passes(self) -> bool:
        """Return whether the largest difference is tolerable; NaN is not."""
        return self.largest <= TOLERANCE


def verify(
    encoder: NativeEncoder, tensors: Tensors, windows: Float[np.ndarray, "B seq_len n_vars"]
) -> list[Difference]:
    """Compare Flax with plain torch on the source's tensors, for every layer and the head.

    windows: EEG in the encoder's unit. Both compute in float32.
    """
    import torch

    from convert import cbramod_torch, patchtst_torch

    a = encoder.architecture
    state = {key: torch.tensor(array) for key, array in tensors.items()}
    x = torch.from_numpy(windows)
    with torch.no_grad():
        if isinstance(a, cbramod.Architecture):
            hidden, output = cbramod_torch.forward(a, state, x)
        else:
            hidden, output = patchtst_torch.forward(a, state, x)
    differences = []
    for layer, expected in enumerate(hidden):
        actual = np.asarray(encoder.activations(windows, layer))
        differences.append(_difference(f"layer {layer}", actual, expected.numpy()))
    has_head = isinstance(a, cbramod.Architecture) or a.head_type != "none"
    if has_head and output is not None:
        differences.append(_difference("head", np.asarray(encoder(windows)), output.numpy()))
    return differences


def _difference(part: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    absolute = np.abs(actual.astype(np.float64) - expected)
    return Difference(
        part=part,
        largest=float(absolute.max()),
        mean=float(absolute.mean()),
        sd=float(expected.std()),
    )


def read_windows(
    encoder: NativeEncoder, recording: str | None
) -> Float[np.ndarray, "B seq_len n_vars"]:
    """Return windows spread evenly over a recording, or white noise with SD 1.

    Raises UserError if the recording does not fit the encoder.
    """
    a = encoder.architecture
    numbers = _largest_tensor(a)
    if numbers > MAX_NUMBERS:
        raise UserError(
            f"the encoder is too large to be verified: {numbers:,} numbers per layer and window"
        )
    n_windows = min(N_WINDOWS, MAX_NUMBERS // numbers)
    if recording is None:
        noise = np.random.default_rng(0).normal(size=(n_windows, a.seq_len, a.n_vars))
        return noise.astype(np.float32)
    samples = _load_samples(recording, a)
    # Fewer windows where the recording is short: unique starts.
    last_start = len(samples) - a.seq_len
    starts = np.unique(np.linspace(0, last_start, n_windows).astype(int))
    windows = np.stack([samples[start : start + a.seq_len] for start in starts])
    windows = windows.astype(np.float32)
    if not np.isfinite(windows).all():
        raise UserError(f"{recording} contains NaN or infinity")
    return windows


def _largest_tensor(a: Any) -> int:
    """Return how many numbers the largest tensor of a layer has for one window."""
    if isinstance(a, cbramod.Architecture):
        scores = a.n_heads * max(a.n_vars, a.n_patches)
        return a.n_vars * a.n_patches * max(a.d_model, a.d_ff, scores)
    scores = a.n_heads * a.n_tokens
    return a.n_vars * a.n_tokens * max(a.d_model, a.d_ff, scores)


def _load_samples(recording: str, a: Any) -> np.ndarray:
    """Return a recording [time, n_vars], mapped from disk."""
    try:
        samples = load_recording(Path(recording))
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{recording} cannot be read as a recording ({brief(e, 150)})") from e
    is_matrix = samples.ndim == 2 and samples.dtype.kind == "f"
    if not is_matrix or samples.shape[1] != a.n_vars or len(samples) < a.seq_len:
        raise UserError(
            f"{recording} must be floating-point [time, {a.n_vars} channels] with at least "
            f"{a.seq_len} samples, got {samples.dtype}{list(samples.shape)}"
        )
    return samples


def report(differences: list[Difference]) -> str:
    """Return the table for the terminal."""
    rows = [[d.part, f"{d.largest:.1e}", f"{d.mean:.1e}", f"{d.sd:.3g}"] for d in differences]
    return table(["", "max difference", "mean difference", "SD"], rows)
