"""A trained sparse autoencoder: `load_sae`, and the files of a member's folder."""

import json
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from types import NoneType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save

from minsae_jax.errors import UserError, reading
from minsae_jax.files import atomic_write, flush, make_folder, sha256_of
from minsae_jax.sae.hyper import SYMBOLS
from minsae_jax.sae.kinds import KINDS, Params, SAEKind, kind_of
from minsae_jax.sae.padding import pad_rows, power_of_two
from minsae_jax.settings import JsonObject, read_json, shown

WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
# Entries of config.json that commands read; None where a value is unknown.
_NUMBER = (int, float, NoneType)
_TEXT = (str, NoneType)
_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    **{name: _NUMBER for name in SYMBOLS if name != "kind"},
    "scale": (int, float),
    "layer": (int, NoneType),
    "revin": (bool, NoneType),
    "encoder_fingerprint": _TEXT,
    "store": _TEXT,
    "status": _TEXT,
}


class SparseAutoencoder:
    """A trained autoencoder of any kind, for raw activations, in full float32.

    >>> sae = SparseAutoencoder({
    ...     "W_enc": np.eye(2, 3), "b_enc": np.zeros(3), "W_dec": np.eye(3, 2), "b_dec": np.zeros(2)
    ... })
    >>> sae.encode(np.array([[1.0, -1.0]])).tolist()
    [[1.0, 0.0, 0.0]]
    >>> sae.decode(np.array([[1.0, 0.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    >>> sae
    SparseAutoencoder(relu, d_model 2, d_sae 3)
    """

    def __init__(self, params: Params, config: JsonObject | None = None):
        """Create an autoencoder from parameters; `config` is the content of config.json."""
        self.config = config or {}
        self.kind: SAEKind = kind_of(self.config)
        self.params: Params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}

    @property
    def d_model(self) -> int:
        return self.params["b_dec"].shape[0]

    @property
    def d_sae(self) -> int:
        return self.params["W_dec"].shape[0]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.kind.name}, d_model {self.d_model}, d_sae {self.d_sae})"
        )

    @property
    def decoder_directions(self) -> Float[np.ndarray, "d_sae d_model"]:
        """The direction that each feature adds to x̂."""
        return np.asarray(self.params["W_dec"])

    @property
    def unit_directions(self) -> Float[np.ndarray, "d_sae d_model"]:
        """Decoder directions of L2 norm 1, so that their products are cosines."""
        return unit_rows(self.decoder_directions)

    def encode(self, x: Array | np.ndarray) -> Float[Array, "*tokens d_sae"]:
        """Return the features of raw activations [..., d_model].

        Raises UserError if the last axis of x is not d_model.
        """
        x = self._to_array(x, self.d_model)
        with jax.default_matmul_precision("highest"):
            return _encode(self.kind, self.params, x)

    def decode(self, features: Array | np.ndarray) -> Float[Array, "*tokens d_model"]:
        """Return reconstructed raw activations from features [..., d_sae].

        Raises UserError if the last axis of features is not d_sae.
        """
        features = self._to_array(features, self.d_sae)
        with jax.default_matmul_precision("highest"):
            return _decode(self.kind, self.params, features)

    def __call__(self, x: Array | np.ndarray) -> Float[Array, "*tokens d_model"]:
        """Return x̂ = decode(encode(x))."""
        return self.decode(self.encode(x))

    def encode_features(
        self, x: Array | np.ndarray, indices: Sequence[int]
    ) -> Float[np.ndarray, "*tokens indices"]:
        """Return some of the features of raw activations [..., d_model], without the others.

        Raises UserError if the last axis of x is not d_model, or if there is no such feature.
        """
        # JAX would return the last feature.
        check_features(self, indices)
        x = np.asarray(self._to_array(x, self.d_model))
        tokens = x.reshape(-1, self.d_model)
        padded = pad_rows(tokens, power_of_two(len(tokens)))
        with jax.default_matmul_precision("highest"):
            index = np.asarray(indices, np.int32)
            features = _encode_features(self.kind, self.params, padded, index)
        without_padding = np.asarray(features)[: len(tokens)]
        return without_padding.reshape(*x.shape[:-1], len(indices))

    def _to_array(self, x: Array | np.ndarray, size: int) -> Array:
        shape = np.shape(x)
        if not shape or shape[-1] != size:
            raise UserError(f"the last axis must have {size} entries, got shape {list(shape)}")
        return jnp.asarray(x, jnp.float32)


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return rows of L2 norm 1; a row of zeros has no direction and stays 0."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def check_features(sae: SparseAutoencoder, features: Collection[int], name: str = "it") -> None:
    """Raise UserError if an SAE does not have one of the features."""
    for feature in features:
        if not 0 <= feature < sae.d_sae:
            raise UserError(
                f"there is no feature {feature}: {name} has the features 0 to {sae.d_sae - 1}"
            )


# Jitted here and not in a method: all autoencoders of one kind and size share a compilation.
@partial(jax.jit, static_argnums=0)
def _encode(kind: SAEKind, params: Params, x: Array) -> Array:
    return kind.encode(params, x)


@partial(jax.jit, static_argnums=0)
def _encode_features(kind: SAEKind, params: Params, x: Array, indices: Array) -> Array:
    return kind.encode_features(params, x, indices)


@partial(jax.jit, static_argnums=0)
def _decode(kind: SAEKind, params: Params, features: Array) -> Array:
    return kind.decode(params, features)


def save_member(folder: Path, params: Params, config: JsonObject) -> None:
    """Write config.json and sae.safetensors; the folder is a member once the latter exists.

    The SHA-256 of sae.safetensors is added to the config.
    """
    make_folder(folder)
    kind = KINDS[config.get("kind", "relu")]
    arrays = {name: np.asarray(params[name], np.float32, order="C") for name in kind.param_names}
    # Context managers exit in reverse order: the config is renamed before the weights.
    with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as about:
        weights.write_bytes(save(arrays))
        config = {**config, "sha256": sha256_of(weights)}
        about.write_text(json.dumps(config, indent=2) + "\n")
        # Old weights must never be seen with the new config, not even after a power cut.
        (folder / WEIGHTS).unlink(missing_ok=True)
        flush([folder])


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """Load the autoencoder in a member's folder, such as runs/demo/members/lambda=5.

    Raises UserError if there is none, or if its kind, names, shapes or values are invalid.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; convert it with `python -m convert sae {folder} --to member`"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}; choose a member's folder, runs/NAME/members/MEMBER"
        )
    weights = folder / WEIGHTS
    with reading(f"{weights} contains a damaged autoencoder"):
        params = load_file(weights)
    config = {}
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG)
    kind = config.get("kind", "relu")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{folder / CONFIG} has the unknown kind {shown(kind)}")
    for name, types in _CONFIG_TYPES.items():
        # Not isinstance, since bool is a subclass of int.
        if name in config and type(config[name]) not in types:
            raise UserError(f"{folder / CONFIG} has an invalid {name}: {shown(config[name])}")
    # Members of earlier versions have no checksum. It leaves the config, since that is also
    # written with the weights in other formats.
    digest = config.pop("sha256", None)
    if digest is not None and digest != sha256_of(weights):
        raise UserError(f"{weights} differs from its checksum in {CONFIG}")
    check_params(KINDS[kind], params, str(weights))
    return SparseAutoencoder(params, config)


def check_params(kind: SAEKind, params: dict[str, np.ndarray], where: str) -> None:
    """Raise UserError if names, shapes, dtypes or values are not those of this kind."""
    if set(params) != set(kind.param_names):
        expected = ", ".join(kind.param_names)
        raise UserError(f"{where} must contain exactly {expected}, got {', '.join(sorted(params))}")
    d_model = params["b_dec"].size
    d_sae = len(params["W_dec"]) if params["W_dec"].ndim else 0
    mismatches = []
    for name, shape in kind.shapes(d_model, d_sae).items():
        array = params[name]
        if array.shape != shape or array.dtype != np.float32:
            mismatches.append(f"{name} is {array.dtype}{list(array.shape)}")
    if mismatches or d_model == 0 or d_sae == 0:
        raise UserError(
            f"{where} has inconsistent shapes for float32, d_model {d_model}, d_sae {d_sae}: "
            f"{', '.join(mismatches)}"
        )
    if not all(np.isfinite(array).all() for array in params.values()):
        raise UserError(f"{where} contains NaN or infinity; the member may have diverged")
