"""Tokens of some chunks of a source, for tests."""

import numpy as np


def read_chunks(source, chunks):
    tokens = np.empty((len(chunks) * source.tokens_per_chunk, source.d_model), source.dtype)
    return tokens[: source.read_chunks(chunks, tokens)]
