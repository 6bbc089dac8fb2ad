"""Foundation models of Braindecode as encoders: their blocks' outputs and the places of the tokens.

Braindecode runs the model; hooks read the residual stream after each block. A model is supported if
its patching says where each token lies.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.description import Unit
from minsae_jax.eeg.montage import canonical
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    BaseEncoder,
    ComputeOptions,
    EncoderSpec,
    HiddenFunction,
)
from minsae_jax.errors import UserError, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

Channels = tuple[str, ...]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Stage:
    """A place in a model where the residual stream can be read: in front of a module or behind."""

    module: "nn.Module"
    in_front: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How to run a model, and the places of its tokens.

    stages: the embedded tokens, then the stream after each layer. seq_len, n_vars: samples and
    channels of a window. channels: their names, where the model depends on them. arguments: further
    ones of its forward.
    """

    stages: tuple[Stage, ...]
    tokens: TokenGrid
    seq_len: int
    n_vars: int
    sampling_rate: float
    unit: Unit | None = None
    channels: Channels | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def _labram(model: Any, channels: Channels | None) -> Layout:
    """CLS, then the patches of each channel; places on the head come from the channels' names."""
    from braindecode.models.labram import LABRAM_CHANNEL_ORDER

    if not model.neural_tokenizer:
        raise UserError("LaBraM is only supported as a neural tokenizer, not as a neural decoder")
    names = channels or _own_channels(model)
    if names is None:
        raise UserError("LaBraM requires the channels' names; prepare the recordings again")
    known = _names_in_model(names, LABRAM_CHANNEL_ORDER, "LaBraM")
    n_patches = model.patch_embed[0].n_patchs
    return Layout(
        stages=_behind_each(model.blocks),
        seq_len=n_patches * model.patch_size,
        tokens=TokenGrid.patches(n_patches, model.patch_size, n_channels=len(names), n_cls=1),
        n_vars=len(names),
        sampling_rate=_stated(model, "sfreq", 200.0),
        unit="100 uV",
        channels=names,
        arguments={"ch_names": known},
    )


def _cbramod(model: Any, channels: Channels | None) -> Layout:
    """The patches of each channel; any channels and any number of patches will do."""
    patch_len = model.patch_embedding.patch_size
    n_vars = len(channels) if channels else model.n_chans
    n_patches = _stated(model, "n_times", 30 * patch_len) // patch_len
    return Layout(
        stages=_behind_each(model.encoder.layers),
        seq_len=n_patches * patch_len,
        tokens=TokenGrid.patches(n_patches, patch_len, n_channels=n_vars),
        n_vars=n_vars,
        sampling_rate=_stated(model, "sfreq", 200.0),
        unit="100 uV",
    )


def _biot(model: Any, channels: Channels | None) -> Layout:
    """The overlapping spectra of each channel."""
    encoder = model.encoder
    n_patches = (model.n_times - encoder.n_fft) // encoder.hop_length + 1
    blocks = encoder.transformer.layers.layers
    return Layout(
        stages=_in_front_of_each(blocks, encoder.transformer),
        seq_len=model.n_times,
        tokens=TokenGrid.patches(
            n_patches, encoder.n_fft, encoder.hop_length, n_channels=model.n_chans
        ),
        n_vars=model.n_chans,
        sampling_rate=_stated(model, "sfreq", 200.0),
        channels=_own_channels(model),
    )


def _reve(model: Any, channels: Channels | None) -> Layout:
    """The overlapping patches of each channel; places come from the channels' names."""
    names = channels or _own_channels(model)
    if names is None:
        raise UserError("REVE requires the channels' names; prepare the recordings again")
    known = _names_in_model(names, model._position_bank.mapping, "REVE")
    # Used for every window, since none are passed to its forward.
    model.default_pos = model.get_positions(known)
    stride = model.patch_size - model.patch_overlap
    n_patches = (model.n_times - model.patch_size) // stride + 1
    return Layout(
        stages=_in_front_of_each(model.transformer.layers, model.transformer),
        seq_len=model.n_times,
        tokens=TokenGrid.patches(n_patches, model.patch_size, stride, n_channels=len(names)),
        n_vars=len(names),
        sampling_rate=_stated(model, "sfreq", 200.0),
        unit="SD",
        channels=names,
    )


def _eegpt(model: Any, channels: Channels | None) -> Layout:
    """For each patch of time, a token of every channel, then the summary tokens.

    With a projection in front of the encoder, its channels are mixtures of all channels.
    """
    encoder = model.target_encoder
    n_channels, n_patches = encoder.num_patches
    is_mixed = model.chan_proj_type != "none"
    of_channels = np.full(n_channels, -1) if is_mixed else np.arange(n_channels)
    summaries = np.full(model.embed_num, -1)
    per_patch = np.concatenate([of_channels, summaries])
    stride = model.patch_stride or model.patch_size
    first = np.repeat(np.arange(n_patches) * stride, len(per_patch))
    tokens = TokenGrid(np.tile(per_patch, n_patches), first, first + model.patch_size - 1)
    return Layout(
        stages=_behind_each(encoder.blocks),
        seq_len=model.n_times,
        tokens=tokens,
        n_vars=model.n_chans,
        sampling_rate=_stated(model, "sfreq", 256.0),
        channels=_own_channels(model),
    )


@dataclass(frozen=True)
class Model:
    """A supported class of Braindecode, and its published weights."""

    class_name: str
    weights: str
    layout: Callable[[Any, Channels | None], Layout]


MODELS = {
    "biot": Model("BIOT", "braindecode/biot-pretrained-prest-16chs", _biot),
    "cbramod": Model("CBraMod", "braindecode/cbramod-pretrained", _cbramod),
    "eegpt": Model("EEGPT", "braindecode/eegpt-pretrained", _eegpt),
    "labram": Model("Labram", "braindecode/labram-pretrained", _labram),
    "reve": Model("REVE", "brain-bzh/reve-base", _reve),
}


def _behind_each(blocks: Any) -> tuple[Stage, ...]:
    return (Stage(blocks[0], in_front=True), *(Stage(block) for block in blocks))


def _in_front_of_each(blocks: Any, backbone: "nn.Module") -> tuple[Stage, ...]:
    """Return the stages of blocks whose branches the backbone adds to the stream itself.

    The stream after a block is then the input of the first branch of the next one.
    """
    return (*(Stage(block[0], in_front=True) for block in blocks), Stage(backbone))


def _own_channels(model: Any) -> Channels | None:
    """Return the channels' names that a model was saved with, None if it has none."""
    try:
        return tuple(channel["ch_name"] for channel in model.chs_info)
    except ValueError:
        return None


def _stated(model: Any, name: str, published: Number) -> Number:
    """Return a setting that a model was saved with, or else that of its pretraining."""
    try:
        return type(published)(getattr(model, name))
    except ValueError:
        return published


def _names_in_model(names: Channels, known: Iterable[str], model: str) -> list[str]:
    """Return the model's spelling of channel names. Raises UserError if it lacks some of them."""
    spelling = {name.upper(): name for name in known}
    # As spelled first: some models know both T3 and T7, which are one electrode.
    spelled = [spelling.get(name.upper(), spelling.get(canonical(name))) for name in names]
    unknown = [name for name, found in zip(names, spelled, strict=True) if found is None]
    if unknown:
        raise UserError(
            f"{model} does not know the channels {', '.join(unknown)}; leave them out of the "
            "recordings with `minsae prepare --channels`"
        )
    return [name for name in spelled if name is not None]


class BraindecodeEncoder(BaseEncoder):
    """A model of Braindecode, in evaluation mode and float32, on a GPU if torch has one.

    channels: names of the recordings' channels, for models that take their places from these.
    Raises UserError if the class is not supported or does not know a channel.
    """

    runs_on_host = True
    reconstruction_note = "loss recovered is not available for models of Braindecode"

    def __init__(self, model: "nn.Module", channels: Channels | None = None):
        import torch

        supported = {entry.class_name: entry for entry in MODELS.values()}
        name = type(model).__name__
        if name not in supported:
            raise UserError(f"{name} is not supported; choose one of {', '.join(supported)}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(device)
        self.layout = supported[name].layout(model, channels)
        silence = np.zeros((1, self.layout.seq_len, self.layout.n_vars), np.float32)
        self.spec = EncoderSpec(
            seq_len=self.layout.seq_len,
            n_vars=self.layout.n_vars,
            sampling_rate=self.layout.sampling_rate,
            unit=self.layout.unit,
            channels=self.layout.channels,
            layers=tuple(range(len(self.layout.stages) - 1)),
            d_model=self.embedding(silence).shape[-1],
            tokens=self.layout.tokens,
        )
        self.fingerprint = _fingerprint(model, self.spec)

    def function(
        self, layers: tuple[int, ...], options: ComputeOptions = DEFAULT_OPTIONS
    ) -> HiddenFunction:
        """Return the host function (params, windows) -> outputs [batch, n_tokens, d_model]."""
        # Stage 0 is the embedding.
        stages = tuple(layer + 1 for layer in layers)
        return lambda params, x: self._streams(x, stages)

    def embedding(
        self, past_values: Float[np.ndarray, "batch seq_len n_vars"]
    ) -> Float[np.ndarray, "batch n_tokens d_model"]:
        """Return the tokens in front of the first layer."""
        return self._streams(past_values, (0,))[0]

    def _streams(
        self, x: Float[np.ndarray, "batch seq_len n_vars"], stages: tuple[int, ...]
    ) -> tuple[Float[np.ndarray, "batch n_tokens d_model"], ...]:
        """Return the residual stream at some stages; the model does not run beyond the last."""
        import torch

        streams: dict[int, np.ndarray] = {}

        def record(stage: int, z: "Tensor") -> None:
            # A copy, since the model may change a tensor in place. Blocks can have sequences of
            # their own, such as the channels of one patch.
            streams[stage] = z.cpu().numpy().copy().reshape(len(x), -1, z.shape[-1])
            if len(streams) == len(stages):
                raise _AllRecorded

        windows = torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2)))
        device = next(self.model.parameters()).device
        with (
            ExitStack() as hooks,
            torch.inference_mode(),
            contextlib.suppress(_AllRecorded),
            _quiet(),
        ):
            for stage in stages:
                hooks.callback(_hook(self.layout.stages[stage], partial(record, stage)).remove)
            self.model(windows.to(device), **self.layout.arguments)
        return tuple(streams[stage] for stage in stages)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ignore the library's warnings, which are about training and deprecations within it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _AllRecorded(Exception):
    """Raised by a hook to leave the model."""


def _hook(stage: Stage, record: "Callable[[Tensor], None]") -> Any:
    """Record the stream at a stage, and return the handle that removes the hook."""
    if stage.in_front:
        return stage.module.register_forward_pre_hook(lambda module, inputs: record(inputs[0]))
    return stage.module.register_forward_hook(lambda module, inputs, output: record(output))


def _fingerprint(model: Any, spec: EncoderSpec) -> str:
    """Return the SHA-256 of a model's class, windows, settings and weights."""
    settings = {
        "class": type(model).__name__,
        "windows": [spec.seq_len, spec.n_vars, spec.channels],
        "config": model.get_config(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        array = np.ascontiguousarray(tensor.cpu().numpy())
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def load_braindecode(
    name: str, weights: str | None = None, channels: Channels | None = None
) -> BraindecodeEncoder:
    """Load a model with Braindecode's `from_pretrained`.

    name: of its class, in any case. weights: a folder written by `save_pretrained`, or a model of
    the Hugging Face Hub; by default the published weights. channels: see BraindecodeEncoder.
    Raises UserError if Braindecode, the class or the weights are missing.
    """
    if name.lower() not in MODELS:
        listed = ", ".join(entry.class_name for entry in MODELS.values())
        raise UserError(f"there is no supported model {name!r} of Braindecode; choose {listed}")
    entry = MODELS[name.lower()]
    weights = weights or entry.weights
    with _quiet():
        try:
            from braindecode import models
        except ModuleNotFoundError as e:
            raise UserError(
                f"{name} requires Braindecode: install minsae_jax[braindecode] ({e})"
            ) from None
        # PyPI's torchaudio needs CUDA: with a torch for CPUs it raises OSError.
        except (ImportError, OSError) as e:
            raise UserError(
                f"Braindecode cannot be imported ({brief(e)}); torch and torchaudio must be of the "
                "same build"
            ) from e
        try:
            model = getattr(models, entry.class_name).from_pretrained(weights)
        except Exception as e:  # the library raises many types
            raise UserError(
                f"{weights} cannot be loaded as Braindecode's {entry.class_name} ({brief(e)})"
            ) from e
        return BraindecodeEncoder(model, channels)
