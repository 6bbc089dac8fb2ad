"""Sparse autoencoders on the activations of EEG transformers: `python -m minsae_jax --help`."""

from minsae_jax.encoder.converted import Encoder, load_encoder
from minsae_jax.errors import UserError
from minsae_jax.sae.member import SparseAutoencoder, load_sae

__all__ = ["Encoder", "SparseAutoencoder", "UserError", "load_encoder", "load_sae"]
