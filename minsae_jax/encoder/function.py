"""Any callable as an encoder: `from_function`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.description import Unit
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    BaseEncoder,
    ComputeOptions,
    EncoderSpec,
    HiddenFunction,
    Params,
    differs,
    fingerprint_of,
)
from minsae_jax.errors import UserError, brief


class FunctionEncoder(BaseEncoder):
    """An encoder made by `from_function`."""

    is_named = True

    def __init__(
        self,
        f: Callable[..., Any],
        spec: EncoderSpec,
        fingerprint: str,
        params: Params,
        runs_on_host: bool,
    ):
        self.spec = spec
        self.fingerprint = fingerprint
        self.params = params
        self.runs_on_host = runs_on_host
        self._f = f
        # A function object for each choice of layers, so that splits share a compilation.
        self._functions: dict[tuple[int, ...], HiddenFunction] = {}

    def function(
        self, layers: tuple[int, ...], options: ComputeOptions = DEFAULT_OPTIONS
    ) -> HiddenFunction:
        def hidden(params: Params, windows: Any) -> tuple[Any, ...]:
            outputs = _call(self._f, params, windows)
            return tuple(_readable(outputs[layer]) for layer in layers)

        return self._functions.setdefault(layers, hidden)


def from_function(
    f: Callable[..., Any],
    *,
    name: str,
    seq_len: int,
    channels: int | Sequence[str],
    tokens: TokenGrid,
    sampling_rate: int | float | None = None,
    unit: Unit | None = None,
    params: Params = None,
    backend: Literal["jax", "host"] = "jax",
) -> FunctionEncoder:
    """Return an encoder that calls `f` on windows of EEG.

    f: `f(windows)`, or `f(params, windows)` if `params` is given. windows are float32
    [batch, seq_len, n_vars] in the unit of the recordings. It returns the activations of a layer,
    [batch, n_tokens, d_model], or [batch, n_vars, n_patches, d_model] or another shape with the
    numbers in the order of the tokens; four axes are those of channels and times. Several layers,
    all of one shape, are {number: activations}, or a list or tuple of layers from 0 on. A single
    layer has the number 0.
    name: identifies the model and its weights. Stores, runs and evaluations are matched by it (and
    by `params`), so that another checkpoint needs another name. `extract` compares a batch with
    each store that exists already.
    seq_len: samples per window. channels: names, or their number if names do not matter.
    tokens: places of the tokens of a window, such as `TokenGrid.patches(10, 200, n_channels=30)`.
    sampling_rate: in Hz; None accepts recordings of any rate.
    unit: of the EEG that `f` expects: "uV", "100 uV", "mV" or "SD" (z-scored); None accepts any.
    params: a pytree of arrays, which are put on the devices once. Without it, weights that `f`
    refers to become constants of the compiled program.
    backend: "jax" for a pure function of JAX arrays, which is compiled; "host" for one that takes
    and returns NumPy arrays, or PyTorch tensors on the CPU, and is called for one batch at a time:

        @torch.inference_mode()
        def f(windows):
            return model(torch.from_numpy(windows))

    Raises UserError if the output of `f` does not fit `tokens`. Warns if a host function depends on
    chance or on other windows, as models in training mode do.
    """
    runs_on_host = backend == "host"
    # Integers of NumPy are no JSON, of which the fingerprint is made.
    seq_len = int(seq_len)
    names: tuple[str, ...] | None = None
    if isinstance(channels, int | np.integer):
        n_vars = int(channels)
    else:
        names = tuple(channels)
        n_vars = len(names)
    if unit is not None and unit not in get_args(Unit):
        raise UserError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
    if tokens.last.max() >= seq_len or tokens.channel.max() >= n_vars:
        raise UserError(
            f"the tokens reach to sample {tokens.last.max()} and channel {tokens.channel.max()}, "
            f"but windows have {seq_len} samples and {n_vars} channels"
        )
    shapes = _output_shapes(f, params, (1, seq_len, n_vars), runs_on_host)
    d_model = _d_model(shapes, tokens)
    if runs_on_host:
        _warn_of_chance(f, params, (2, seq_len, n_vars))
    spec = EncoderSpec(
        seq_len=seq_len,
        n_vars=n_vars,
        sampling_rate=None if sampling_rate is None else float(sampling_rate),
        unit=unit,
        channels=names,
        layers=tuple(sorted(shapes)),
        d_model=d_model,
        tokens=tokens,
    )
    identity = _Identity(
        name=name,
        seq_len=seq_len,
        n_vars=n_vars,
        channel=tokens.channel.tolist(),
        first=tokens.first.tolist(),
        last=tokens.last.tolist(),
    )
    fingerprint = fingerprint_of(identity, params)
    return FunctionEncoder(f, spec, fingerprint, params, runs_on_host)


@dataclass(frozen=True)
class _Identity:
    name: str
    seq_len: int
    n_vars: int
    channel: list[int]
    first: list[int]
    last: list[int]


def _call(f: Callable[..., Any], params: Params, windows: Any) -> Mapping[Any, Any]:
    outputs = f(windows) if params is None else f(params, windows)
    if isinstance(outputs, Mapping):
        return outputs
    if isinstance(outputs, tuple | list):
        return dict(enumerate(outputs))
    return {0: outputs}


def _readable(z: Any) -> Any:
    """Return the output of a layer as an array that NumPy can read."""
    # NumPy reads no tensors of PyTorch in bfloat16, and none with a gradient.
    return z.detach().float() if hasattr(z, "detach") else z


def _output_shapes(
    f: Callable[..., Any], params: Params, shape: tuple[int, ...], runs_on_host: bool
) -> dict[int, tuple[int, ...]]:
    """Return the shape of every layer for windows of `shape`."""
    if runs_on_host:
        outputs = _call(f, params, np.zeros(shape, np.float32))
    else:
        windows = jax.ShapeDtypeStruct(shape, np.float32)
        try:
            outputs = jax.eval_shape(lambda params, x: _call(f, params, x), params, windows)
        except TypeError as e:
            raise UserError(
                f'JAX cannot trace the function ({brief(e)}); set backend="host" if it calls '
                "PyTorch or NumPy"
            ) from e
    if not outputs or not all(type(layer) is int and layer >= 0 for layer in outputs):
        listed = ", ".join(map(repr, outputs)) or "nothing"
        raise UserError(f"the function must return its layers by numbers from 0, but has {listed}")
    for layer, x in outputs.items():
        if not hasattr(x, "shape"):
            raise UserError(
                f"layer {layer} of the function must be an array or a tensor, got "
                f"{type(x).__name__}; return nothing but the layers"
            )
    return {layer: tuple(x.shape) for layer, x in outputs.items()}


def _d_model(shapes: Mapping[int, tuple[int, ...]], tokens: TokenGrid) -> int:
    """Return the last size of all shapes. Raises UserError if they do not fit the tokens."""
    n_tokens = tokens.n_tokens
    d_model = next((shape[-1] for shape in shapes.values() if shape), 0)
    for layer, shape in shapes.items():
        is_valid = len(shape) > 2 and shape[0] == 1 and shape[-1] == d_model
        if not is_valid or np.prod(shape[1:-1]) != n_tokens:
            raise UserError(
                f"layer {layer} of one window has the shape {list(shape)}, but the {n_tokens} "
                f"tokens require [1, {n_tokens}, {d_model or 'd_model'}]"
            )
        if len(shape) == 4 and not _are_axes(tokens, shape[1:3]):
            raise UserError(
                f"layer {layer} of one window has the shape {list(shape)}, but its second and "
                "third axes are not the channels and times of the tokens, or the reverse: "
                f"transpose them, change the tokens, or return [1, {n_tokens}, {d_model}] if the "
                "order is that of the tokens"
            )
    return d_model


def _are_axes(tokens: TokenGrid, shape: tuple[int, ...]) -> bool:
    """Return whether the channels of tokens change along one axis only, and so do their times."""
    grids = (tokens.channel.reshape(shape), tokens.first.reshape(shape))
    return all((grid == grid[:1]).all() or (grid == grid[:, :1]).all() for grid in grids)


def _warn_of_chance(f: Callable[..., Any], params: Params, shape: tuple[int, ...]) -> None:
    """Warn if a window has other activations alone than beside another window."""
    windows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    beside = _call(f, params, windows)
    alone = _call(f, params, windows[:1])
    for layer, output in alone.items():
        expected = np.asarray(_readable(output), np.float64)[0]
        actual = np.asarray(_readable(beside[layer]), np.float64)[0]
        if differs(actual, expected):
            warnings.warn(
                f"layer {layer} of the function differs each time, or depends on other windows; "
                "for the activations of a trained model, call model.eval(), and mask nothing",
                stacklevel=3,
            )
            return
