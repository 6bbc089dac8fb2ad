"""The sparse autoencoder: x̂ = relu(x W_enc + b_enc) W_dec + b_dec, its parameters, and the files that hold them.

Parameters are a plain dict of W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model].
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from safetensors.numpy import load_file, save

from minsae_jax.errors import UserError, brief
from minsae_jax.files import atomic_write

WEIGHTS, CONFIG = "sae.safetensors", "config.json"
Params = dict[str, Any]  # name -> array, numpy's or JAX's


NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def shapes(d_model: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    return {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }


def init_tied(key: Key[Array, ""], d_model: int, d_sae: int, decoder_norm: float) -> Params:
    """Decoder rows of random direction and the same norm, W_enc = W_decᵀ, biases 0 (Anthropic, April 2024)."""
    rows = jax.random.normal(key, (d_sae, d_model))
    w_dec = decoder_norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return {
        "W_enc": w_dec.T,
        "b_enc": jnp.zeros(d_sae),
        "W_dec": w_dec,
        "b_dec": jnp.zeros(d_model),
    }


def init_torch(key: Key[Array, ""], d_model: int, d_sae: int) -> Params:
    """The law of torch's nn.Linear, as minSAE starts: uniform in ±1/√fan_in, biases too."""
    fan_in = {"W_enc": d_model, "b_enc": d_model, "W_dec": d_sae, "b_dec": d_sae}
    keys = dict(zip(fan_in, jax.random.split(key, 4), strict=True))
    return {
        name: jax.random.uniform(keys[name], shape, minval=-1, maxval=1) / fan_in[name] ** 0.5
        for name, shape in shapes(d_model, d_sae).items()
    }


def encode(params: Params, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens d_sae"]:
    pre = x @ params["W_enc"]
    return jax.nn.relu(pre + jnp.broadcast_to(params["b_enc"], pre.shape))


def decode(
    params: Params, features: Float[Array, "*tokens d_sae"]
) -> Float[Array, "*tokens d_model"]:
    x_hat = features @ params["W_dec"]
    return x_hat + jnp.broadcast_to(params["b_dec"], x_hat.shape)


def fold_scale(params: Params, scale: float) -> Params:
    """From parameters for scale * x to ones for x itself: the same features, and x̂ in x's own unit."""
    return {
        "W_enc": params["W_enc"] * scale,
        "b_enc": params["b_enc"],
        "W_dec": params["W_dec"] / scale,
        "b_dec": params["b_dec"] / scale,
    }


class SparseAutoencoder:
    """A trained autoencoder for raw activations, in full float32.

    >>> W, b = np.eye(2, 3), np.zeros
    >>> sae = SparseAutoencoder({"W_enc": W, "b_enc": b(3), "W_dec": W.T, "b_dec": b(2)})
    >>> sae.encode(np.array([[1.0, -1.0]])).tolist()
    [[1.0, 0.0, 0.0]]
    >>> sae.decode(np.array([[1.0, 0.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, params: dict[str, Any], config: dict[str, Any] | None = None):
        self.params: Params = {
            name: jnp.asarray(value, jnp.float32) for name, value in params.items()
        }
        self.config = config or {}

    @property
    def d_model(self) -> int:
        return self.params["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        return self.params["W_enc"].shape[1]

    def encode(self, x: Array | np.ndarray) -> Float[Array, "*tokens d_sae"]:
        """Features of raw activations [..., d_model]."""
        with jax.default_matmul_precision("highest"):
            return _encode(self.params, self._checked(x, self.d_model))

    def decode(self, features: Array | np.ndarray) -> Float[Array, "*tokens d_model"]:
        """Raw activations from features [..., d_sae]."""
        with jax.default_matmul_precision("highest"):
            return _decode(self.params, self._checked(features, self.d_sae))

    def _checked(self, x: Array | np.ndarray, size: int) -> Array:
        if np.ndim(x) < 1 or x.shape[-1] != size:
            raise UserError(
                f"the last axis must have {size} entries for this autoencoder, but shape is {list(np.shape(x))}"
            )
        return jnp.asarray(x, jnp.float32)


_encode, _decode = jax.jit(encode), jax.jit(decode)


def save_member(folder: Path, params: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """config.json, and sae.safetensors, without which it is no member; written aside, renamed once both are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as about:
        weights.write_bytes(
            save({name: np.ascontiguousarray(params[name], np.float32) for name in NAMES})
        )
        about.write_text(json.dumps(config, indent=2) + "\n")
        (folder / WEIGHTS).unlink(
            missing_ok=True
        )  # so that it never stands beside another's config


def load_sae(folder: str | Path) -> SparseAutoencoder:
    """The autoencoder in a member's folder. Raises UserError where there is none, or one of other names or shapes."""
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"there is no {WEIGHTS} in {folder}: name a member's folder, runs/NAME/members/MEMBER"
        )
    try:
        params = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        if not isinstance(config, dict) or config.get("kind", "relu") != "relu":
            raise ValueError(f"{CONFIG} is not that of a ReLU autoencoder")
    except Exception as e:
        raise UserError(f"{folder} holds a damaged autoencoder ({brief(e)})") from e
    check_params(params, str(folder / WEIGHTS))
    return SparseAutoencoder(params, config)


def check_params(params: dict[str, np.ndarray], where: str) -> None:
    """Raise UserError where names, shapes, dtypes or values are not those of an autoencoder."""
    if set(params) != set(NAMES):
        raise UserError(
            f"{where} must hold exactly {', '.join(NAMES)}, but holds {', '.join(sorted(params))}"
        )
    d_model, d_sae = params["b_dec"].size, params["b_enc"].size
    wrong = [
        f"{n} is {params[n].dtype}{list(params[n].shape)}" for n, s in shapes(d_model, d_sae).items()
        if params[n].shape != s or params[n].dtype != np.float32
    ]  # fmt: skip
    if wrong or not d_model or not d_sae:
        raise UserError(
            f"{where} does not fit together as float32 of d_model {d_model}, d_sae {d_sae}: {', '.join(wrong)}"
        )
    if not all(np.isfinite(p).all() for p in params.values()):
        raise UserError(f"{where} holds NaN or infinity: it is of a member that diverged")
