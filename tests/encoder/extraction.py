"""Extraction all at once, and what it leaves."""

from dataclasses import replace

from minsae_jax.encoder import extract as extraction


def extract(encoder, settings, *splits):
    """All at once, and what was told."""
    return "\n".join(extraction.extract(encoder, replace(settings, split=splits)))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}
