"""The interface of encoders: required by extraction, and optional capabilities.

To add an encoder, derive a class from `BaseEncoder`: set `spec`, `fingerprint` and `params`, and
define `function`. Extraction, `--live` training, evaluation and report use nothing else. A family
of Flax models whose parameters are converted once derives from `NativeEncoder` in native.py, and
adds itself to FAMILIES in converted.py. Any other callable is wrapped by `from_function`.

Three capabilities are optional: `reconstruction` for the measure "loss recovered", `waveform` for
the report, and `function_from` for steering. Without the first two, evaluation and report leave
these parts out.
"""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.description import DESCRIPTION, TUH, Description, Unit
from minsae_jax.eeg.montage import canonical
from minsae_jax.eeg.recordings import WindowShape
from minsae_jax.errors import UserError

MAX_DEVIATION = 0.02  # of activations that are the same but for rounding, relative to their SD
Params = Any  # a pytree of arrays, for native encoders nested dicts and lists of float32
Precision = Literal["float32", "tf32", "bfloat16"]  # of the products in the layers
# (params, windows [batch, seq_len, n_vars]) -> the activations of each requested layer.
HiddenFunction = Callable[[Params, Any], tuple[Any, ...]]
# (parameters of the substitutes, tokens of a sequence) -> the tokens of every variant
Substitutes = Callable[[Any, Float[Array, "T d_model"]], Float[Array, "variants T d_model"]]


class Downstream(NamedTuple):
    """Model outputs after a layer's output was replaced by each of its variants."""

    # The layer's output before it is replaced
    hidden: Float[Array, "batch sequences n_tokens d_model"]
    # Output of the last layer
    last: Float[Array, "batch variants sequences n_tokens d_model"]
    # The head's reconstruction of each token with samples, in the order of the tokens; None if the
    # encoder has no head that reconstructs
    patches: Float[Array, "batch variants sequences n_located patch_len"] | None


# (params, parameters of the substitutes, windows [batch, seq_len, n_vars])
FunctionFrom = Callable[[Params, Any, Any], Downstream]


@dataclass(frozen=True)
class ComputeOptions:
    """Settings of extraction that change the activations; few encoders have them."""

    precision: Precision = "float32"
    force_revin: bool = False


DEFAULT_OPTIONS = ComputeOptions()


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder's input windows, and the tokens of one window."""

    # Samples per window
    seq_len: int
    # Channels per window
    n_vars: int
    # In Hz; None accepts any rate
    sampling_rate: float | None
    # None accepts any
    unit: Unit | None = None
    # Channel names in order; None accepts any
    channels: tuple[str, ...] | None
    # Layer numbers in ascending order; range(n) for most encoders
    layers: tuple[int, ...]
    d_model: int
    # Channel and samples of each token in a sequence
    tokens: TokenGrid
    # True: each channel of a window is a sequence; False: the whole window is one
    per_channel: bool = False
    # Samples left out after each window. gPatchTST reserves a patch there for a forecasting target.
    reserved_samples: int = 0

    @property
    def window_shape(self) -> WindowShape:
        return WindowShape(self.seq_len, self.reserved_samples, self.n_vars)

    @property
    def n_sequences(self) -> int:
        """Sequences per window."""
        return self.n_vars if self.per_channel else 1

    def layer_index(self, layer: int) -> int:
        """Return the number of a layer, where negative numbers count from the end.

        Raises UserError if there is no such layer.
        """
        if layer in self.layers:
            return layer
        n = len(self.layers)
        if -n <= layer < 0:
            return self.layers[layer]
        if self.layers == tuple(range(n)):
            raise UserError(
                f"there is no layer {layer}: this encoder has {n} layers, {-n} to {n - 1}"
            )
        listed = ", ".join(map(str, self.layers))
        raise UserError(f"there is no layer {layer}: this encoder has the layers {listed}")


def check_recordings(spec: EncoderSpec, description: Description, allow_mismatch: bool) -> None:
    """Raise UserError if the recordings' channels, sampling rate or unit are not the encoder's.

    allow_mismatch: accept another sampling rate or unit and other names.
    """
    is_described = description is not TUH
    names = description.channels
    if is_described and len(names) != spec.n_vars:
        raise UserError(
            f"the encoder reads {spec.n_vars} channels, but the recordings have {len(names)} "
            f"({DESCRIPTION})"
        )
    if allow_mismatch:
        return
    advice = "prepare the recordings for this encoder, or use --allow_mismatch"
    rate = description.sampling_rate
    if spec.sampling_rate is not None and spec.sampling_rate != rate:
        source = DESCRIPTION if is_described else f"there is no {DESCRIPTION}"
        raise UserError(
            f"the encoder expects {spec.sampling_rate:g} Hz, but the recordings are at {rate:g} Hz "
            f"({source}); {advice}"
        )
    if spec.unit is not None and spec.unit != description.unit:
        raise UserError(
            f"the encoder expects EEG in {spec.unit}, but the recordings are in "
            f"{description.unit}; {advice}"
        )
    if spec.channels is None or len(names) != spec.n_vars:
        return
    for column, (expected, name) in enumerate(zip(spec.channels, names, strict=True), start=1):
        if canonical(expected) != canonical(name):
            raise UserError(
                f"the encoder expects channel {expected} in column {column}, but the recordings "
                f"have {name} there; {advice}"
            )


class Reconstruction(Protocol):
    """The encoder's pretraining task: to reconstruct the masked parts of a window.

    Loss recovered compares the error with a layer's activations to the error with their
    substitutes: their mean, zero, and each SAE's x̂.
    """

    def draw_mask(self, ratio: float, rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
        """Return which parts of one window are masked: a share `ratio`, at least one.

        The shape is the encoder's own and always the same, such as [n_patches].
        """

    def masked_errors(
        self, mesh: Mesh, layer: int, options: ComputeOptions, substitutes: Substitutes
    ) -> Callable[[Any, Any, Any], Float[Array, "batch variants"]]:
        """Return the jitted (params, substitutes' params, (windows, masks)) -> errors.

        The batch is split over the mesh's `data` axis. Masked parts of a window are hidden from
        the encoder; the layer's output for each sequence [n_tokens, d_model] is replaced by each of
        its substitutes in turn, and the rest of the model runs. An error is the mean over the
        masked parts of a window of (output - input)², both normalised as in pretraining.
        """


class BaseEncoder(ABC):
    """An encoder of EEG: windows to activations of its layers."""

    spec: EncoderSpec
    # Identifies the encoder and its weights; stores, runs and evaluations must match it.
    fingerprint: str
    # Whether the fingerprint is of a name that the user chose, which does not change with weights.
    is_named: bool = False
    # First argument of the function; extraction puts them on the devices once.
    params: Params = ()
    # True: `function` returns a host function of NumPy arrays, which is called once per batch.
    runs_on_host: bool = False
    # None if there is no pretraining task to measure; then `reconstruction_note` says why.
    reconstruction: Reconstruction | None = None
    reconstruction_note: str = "the encoder has no reconstruction head"

    def __repr__(self) -> str:
        spec = self.spec
        tokens = f"{spec.tokens.n_tokens} tokens"
        if spec.per_channel:
            tokens += " per channel"
        return (
            f"{type(self).__name__}({spec.seq_len} samples x {spec.n_vars} channels -> {tokens}, "
            f"d_model {spec.d_model}, layers {spec.layers[0]} to {spec.layers[-1]}, fingerprint "
            f"{self.fingerprint[:12]})"
        )

    @abstractmethod
    def function(
        self, layers: tuple[int, ...], options: ComputeOptions = DEFAULT_OPTIONS
    ) -> HiddenFunction:
        """Return the function (params, windows) -> outputs of the layers, in the order of `layers`.

        layers: numbers in `spec.layers`. windows: float32 [batch, seq_len, n_vars] in the unit of
        the recordings (SD). An output is [batch, ..., n_tokens, d_model] with `spec.n_sequences`
        sequences per window; any shape [batch, ...] with the numbers in this order will do, such as
        [batch, n_vars, n_patches, d_model] for tokens that are ordered by channel.

        The function is pure and traced by jax.jit, unless `runs_on_host`. Batches are padded with
        zeros to one size, so that windows must not influence each other. Equal arguments should
        return the same function object, so that all splits share one compilation.
        """

    def function_from(
        self, layer: int, substitutes: Substitutes, options: ComputeOptions = DEFAULT_OPTIONS
    ) -> FunctionFrom | None:
        """Return the function that runs the rest of the model on substitutes of a layer's output.

        layer: a number in `spec.layers`. Nothing in the windows is masked. The function is pure and
        traced by jax.jit. A substitute replaces all tokens of a sequence; the other inputs of the
        later layers, such as the residual scores of PatchTST's attention, are those of the
        original. None if the encoder cannot run from a layer on.
        """
        return None

    def check_options(self, options: ComputeOptions) -> None:
        """Raise UserError if the encoder cannot compute with these options."""
        if options.precision != "float32":
            raise UserError(
                f"this encoder cannot be extracted with --precision {options.precision}"
            )
        if options.force_revin:
            raise UserError("--force_revin requires a PatchTST encoder")

    def applies_revin(self, options: ComputeOptions) -> bool:
        """Return whether windows are normalised by RevIN; part of a store's identity."""
        return False

    def waveform(
        self, direction: Float[np.ndarray, " d_model"]
    ) -> Float[np.ndarray, " samples"] | None:
        """Return the samples that a direction of the last layer adds to the EEG by a linear head.

        None if the encoder has no such head.
        """
        return None

    def activations(
        self, past_values: Float[Array | np.ndarray, "batch seq_len n_vars"], layer: int = -1
    ) -> Float[Array, "batch ... n_tokens d_model"]:
        """Return the output of a layer, float32, for windows of EEG in SD.

        [batch, n_vars, n_tokens, d_model] for PatchTST. Raises UserError if the windows do not
        have the encoder's length and channels, or if there is no such layer.
        """
        run = self.function((self.spec.layer_index(layer),))
        x = self.checked(past_values)
        if self.runs_on_host:
            # A copy that can be written to, as PyTorch expects.
            return jnp.asarray(run(self.params, np.array(x))[0], jnp.float32)
        with jax.default_matmul_precision("highest"):
            return jax.jit(run)(self.params, x)[0]

    def checked(self, past_values: Array | np.ndarray) -> Array:
        """Return windows as a float32 JAX array. Raises UserError if the shape is wrong."""
        seq_len = self.spec.seq_len
        n_vars = self.spec.n_vars
        if np.ndim(past_values) != 3 or past_values.shape[1:] != (seq_len, n_vars):
            raise UserError(
                f"past_values must be [batch, {seq_len} samples, {n_vars} channels] for this "
                f"encoder, got {list(np.shape(past_values))}"
            )
        return jnp.asarray(past_values, jnp.float32)


def fingerprint_of(architecture: Any, params: Params) -> str:
    """Return the SHA-256 of an architecture and all parameters."""
    # Fields that have their default are left out, so that a new field of an architecture does not
    # change the fingerprints of known encoders.
    settings = {}
    for setting in dataclasses.fields(architecture):
        value = getattr(architecture, setting.name)
        if value != setting.default:
            settings[setting.name] = value
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        # Names and shapes too, since equal bytes can be different parameters.
        digest.update(f"{parameter_path(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def differs(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether activations differ by more than rounding, also that of half precision."""
    # Dropout of 1 % exceeds it.
    deviation = np.sqrt(np.square(actual - expected).mean())
    return bool(deviation > MAX_DEVIATION * np.std(expected))


def parameter_path(keys: tuple[object, ...]) -> str:
    """Return the path of a parameter as text, `layers/0/ff_in/bias`, from JAX's tuple of keys."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)
