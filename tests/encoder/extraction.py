"""Helpers for tests of extraction."""

from dataclasses import replace

from minsae_jax.encoder import extract as extraction


def extract(encoder, config, *splits):
    """Extract some splits and return the stores."""
    return extraction.extract(encoder, replace(config, split=splits))


def contents(folder):
    """Return file name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
