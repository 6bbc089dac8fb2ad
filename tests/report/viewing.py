"""Features on the tokens of a recording, in plain NumPy, and the data of a page of `view`."""

import base64
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.sae.member import SparseAutoencoder


@dataclass(frozen=True)
class Token:
    """A token with samples, and all features on it."""

    channel: int
    start: int
    stop: int
    features: np.ndarray


def encode_by_hand(encoder: BaseEncoder, sae: SparseAutoencoder, eeg: np.ndarray) -> list[Token]:
    """Return the tokens of all whole windows, one by one, with the features of a ReLU SAE."""
    spec = encoder.spec
    grid = spec.tokens
    w_enc = np.asarray(sae.params["W_enc"], np.float64)
    b_enc = np.asarray(sae.params["b_enc"], np.float64)
    tokens = []
    for window in range(len(eeg) // spec.seq_len):
        offset = window * spec.seq_len
        x = eeg[offset : offset + spec.seq_len][None]
        z = np.asarray(encoder.activations(x.astype(np.float32)), np.float64)
        z = z.reshape(spec.n_sequences, grid.n_tokens, spec.d_model)
        for sequence in range(spec.n_sequences):
            for i in range(grid.n_tokens):
                if grid.first[i] < 0:
                    continue
                channel = sequence if spec.per_channel else int(grid.channel[i])
                features = np.maximum(z[sequence, i] @ w_enc + b_enc, 0)
                start = offset + int(grid.first[i])
                stop = offset + int(grid.last[i]) + 1
                tokens.append(Token(channel, start, stop, features))
    return tokens


def bins_by_hand(
    tokens: list[Token], feature: int, n_rows: int, first: float, last: float, columns: int
) -> np.ndarray:
    """Return the largest activation of the tokens that overlap each column between two samples."""
    edges = np.linspace(first, last, columns + 1)
    result = np.zeros((n_rows, columns))
    for token in tokens:
        rows = slice(None) if token.channel < 0 else token.channel
        is_touched = (token.start < edges[1:] - 1e-6) & (token.stop > edges[:-1] + 1e-6)
        result[rows, is_touched] = np.maximum(result[rows, is_touched], token.features[feature])
    return result


def read_view(path: Path) -> dict[str, Any]:
    """Return the data of a page; activations and eeg are arrays of bytes."""
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("start({")]
    data = json.loads(line.removeprefix("start(").removesuffix(");"))
    for name in ("activations", "eeg"):
        packed = gzip.decompress(base64.b64decode(data[name]))
        data[name] = np.frombuffer(packed, np.uint8)
    return data
