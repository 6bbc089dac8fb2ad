"""Token grids and layers of Braindecode's foundation models.

A model is supported if its patching determines the place of each token.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from minsae_jax.activations.tokens import TokenGrid
from minsae_jax.eeg.description import Unit
from minsae_jax.eeg.montage import canonical
from minsae_jax.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Channels = tuple[str, ...]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Stage:
    """A place in a model where the residual stream can be read: before or after a module."""

    module: "nn.Module"
    in_front: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How to run a model, and the places of its tokens.

    stages: the embedded tokens, then the stream after each layer. seq_len, n_vars: samples and
    channels of a window. unit: unit of the EEG in pretraining. channels: channel names in the
    model's spelling, if it depends on them. divides_by_quantile: pretraining divides each channel
    of a window by the 95 % quantile of its absolute values. arguments: additional arguments of its
    forward.
    """

    stages: tuple[Stage, ...]
    tokens: TokenGrid
    seq_len: int
    n_vars: int
    sampling_rate: float
    unit: Unit | None = None
    channels: Channels | None = None
    divides_by_quantile: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def _labram(model: Any, channels: Channels | None) -> Layout:
    """CLS, then the patches of each channel; places on the head come from the channels' names."""
    from braindecode.models.labram import LABRAM_CHANNEL_ORDER

    if not model.neural_tokenizer:
        raise UserError("LaBraM is only supported as a neural tokenizer, not as a neural decoder")
    names = channels or _saved_channels(model)
    if names is None:
        raise UserError("LaBraM requires the channels' names; prepare the recordings again")
    known = _names_in_model(names, LABRAM_CHANNEL_ORDER, "LaBraM")
    n_patches = model.patch_embed[0].n_patchs
    return Layout(
        stages=_behind_each(model.blocks),
        seq_len=n_patches * model.patch_size,
        tokens=TokenGrid.patches(n_patches, model.patch_size, n_channels=len(known), n_cls=1),
        n_vars=len(known),
        sampling_rate=_stated(model, "sfreq", 200.0),
        unit="100 uV",
        channels=tuple(known),
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
    """The overlapping spectra of each channel. Any unit will do, since windows are normalised."""
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
        channels=_saved_channels(model),
        divides_by_quantile=True,
    )


def _reve(model: Any, channels: Channels | None) -> Layout:
    """The overlapping patches of each channel; places come from the channels' names."""
    names = channels or _saved_channels(model)
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
        tokens=TokenGrid.patches(n_patches, model.patch_size, stride, n_channels=len(known)),
        n_vars=len(known),
        sampling_rate=_stated(model, "sfreq", 200.0),
        unit="SD",
        channels=tuple(known),
    )


def _eegpt(model: Any, channels: Channels | None) -> Layout:
    """For each patch of time, a token of every channel, then the summary tokens.

    Pretraining divides µV by 1000.

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
        unit="mV",
        channels=_saved_channels(model),
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


def _saved_channels(model: Any) -> Channels | None:
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
    unknown = [name for name, in_model in zip(names, spelled, strict=True) if in_model is None]
    if unknown:
        raise UserError(
            f"{model} does not know the channels {', '.join(unknown)}; leave them out of the "
            "recordings with `minsae prepare --channels`"
        )
    return [name for name in spelled if name is not None]
