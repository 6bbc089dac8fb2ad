"""Foundation models of Braindecode as encoders: `minsae extract --model braindecode:LaBraM`.

Braindecode runs the model; hooks read the residual stream after each block.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from convert.braindecode_layouts import MODELS, Channels, Layout, Stage
from minsae_jax.encoder.base import (
    DEFAULT_OPTIONS,
    BaseEncoder,
    ComputeOptions,
    EncoderSpec,
    HiddenFunction,
)
from minsae_jax.errors import UserError, brief, join_some, system_reason
from minsae_jax.files import replaced_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

HUB_SECONDS = 10  # that the Hugging Face Hub may take to answer


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
        self.model = model.eval().float().to(device)
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
        self.fingerprint = _fingerprint(model, self.spec, self.layout)

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

    def depends_on(self, names: Collection[str]) -> bool:
        """Return whether the streams depend on any of these tensors of the model.

        They do not depend on its heads, for example.
        """
        import torch

        rng = np.random.default_rng(0)
        x = rng.normal(size=(1, self.layout.seq_len, self.layout.n_vars)).astype(np.float32)
        stages = tuple(range(len(self.layout.stages)))
        state = self.model.state_dict()
        tensors = [state[name] for name in names if state[name].is_floating_point()]
        originals = [tensor.clone() for tensor in tensors]
        before = self._streams(x, stages)
        for tensor in tensors:
            # Not a constant, which LayerNorm can remove.
            tensor += torch.from_numpy(rng.normal(size=tensor.shape)).to(tensor)
        after = self._streams(x, stages)
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)
        return not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    def _streams(
        self, x: Float[np.ndarray, "batch seq_len n_vars"], stages: tuple[int, ...]
    ) -> tuple[Float[np.ndarray, "batch n_tokens d_model"], ...]:
        """Return the residual stream at some stages; the model does not run beyond the last."""
        import torch

        streams: dict[int, np.ndarray] = {}

        def record(stage: int, z: "Tensor") -> None:
            # A copy, since the model may change a tensor in place. Blocks can have sequences of
            # their own, such as the channels of one patch.
            copy = z.cpu().numpy().copy()
            streams[stage] = copy.reshape(len(x), -1, z.shape[-1])
            if len(streams) == len(stages):
                raise _AllRecorded

        if self.layout.divides_by_quantile:
            x = _divided_by_quantile(x)
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


def _divided_by_quantile(
    x: Float[np.ndarray, "batch seq_len n_vars"],
) -> Float[np.ndarray, "batch seq_len n_vars"]:
    """Divide each channel of a window by the 95 % quantile of its absolute values, as BIOT does."""
    scale = np.quantile(np.abs(x), 0.95, axis=1, keepdims=True) + 1e-8
    return (x / scale).astype(np.float32)


def _fingerprint(model: Any, spec: EncoderSpec, layout: Layout) -> str:
    """Return the SHA-256 of a model's class, windows, settings and weights."""
    settings = {
        "class": type(model).__name__,
        "windows": [spec.seq_len, spec.n_vars, spec.channels],
        "config": model.get_config(),
    }
    if layout.divides_by_quantile:
        settings["normalization"] = "95 % quantile"
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
    Raises UserError if Braindecode, the class or the weights are missing, or cannot be downloaded.
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
            if e.name == "torchaudio":
                raise UserError(
                    "Braindecode requires torchaudio, of the same version and build as torch: "
                    "install it from the same index"
                ) from None
            raise UserError(
                f"{name} requires Braindecode: install minsae_jax[braindecode] ({e})"
            ) from None
        # PyPI's torchaudio needs CUDA: with a torch for CPUs it raises OSError.
        except (ImportError, OSError) as e:
            raise UserError(
                f"Braindecode cannot be imported ({brief(e)}); torch and torchaudio must be of the "
                "same build"
            ) from e
        _check_download(weights)
        try:
            model = getattr(models, entry.class_name).from_pretrained(weights)
            missing = _load_again(model, weights)
        except Exception as e:  # the library raises many types
            raise UserError(
                f"{weights} cannot be loaded as Braindecode's {entry.class_name} ({brief(e)})"
            ) from e
        encoder = BraindecodeEncoder(model, channels)
    if missing and encoder.depends_on(missing):
        raise UserError(
            f"{weights} lacks weights of Braindecode's {entry.class_name}, which would be random: "
            f"{join_some(missing, limit=3)}"
        )
    return encoder


def save_random_weights(encoder: BraindecodeEncoder, folder: Path, seed: int) -> str:
    """Write the model with permuted weights, and return the fingerprint of that encoder.

    The entries of each parameter keep their distribution, and nothing else. The encoder itself is
    changed. Raises UserError if the folder is not empty or cannot be written.
    """
    import torch

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} must be empty or new: it would be replaced")
    rng = np.random.default_rng(seed)
    model: Any = encoder.model
    with torch.no_grad():
        for parameter in model.parameters():
            flat = rng.permutation(parameter.cpu().numpy().reshape(-1))
            parameter.copy_(torch.from_numpy(flat.reshape(parameter.shape)))
    try:
        with replaced_folder(folder) as temporary, _quiet():
            model.save_pretrained(temporary)
    except OSError as e:
        raise UserError(f"{folder} could not be written ({system_reason(e)})") from e
    return _fingerprint(model, encoder.spec, encoder.layout)


def _load_again(model: "nn.Module", weights: str) -> list[str]:
    """Load weights as `from_pretrained` did, and return the model's tensors that they lack.

    `from_pretrained` leaves these at their random initial values without a warning. Here they
    become 0, so that the fingerprint does not change from call to call.
    """
    import torch
    from huggingface_hub import try_to_load_from_cache
    from safetensors.torch import load_model

    def find(name: str) -> Path | None:
        if Path(weights).is_dir():
            return Path(weights, name)
        cached = try_to_load_from_cache(weights, name)
        return Path(cached) if isinstance(cached, str) else None

    if file := find("model.safetensors"):
        missing, _ = load_model(model, file, strict=False)
    elif file := find("pytorch_model.bin"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = model.load_state_dict(state, strict=False).missing_keys
    else:
        raise FileNotFoundError("no file of weights in the cache")
    tensors = model.state_dict()
    for name in missing:
        tensors[name].zero_()
    return sorted(missing)


def _check_download(weights: str) -> None:
    """Raise UserError if weights are neither here nor on the Hugging Face Hub.

    Without a network, the download itself would retry for half a minute.
    """
    from huggingface_hub import model_info, try_to_load_from_cache

    if Path(weights).is_dir():
        return
    try:
        if try_to_load_from_cache(weights, "config.json") is None:
            model_info(weights, timeout=HUB_SECONDS)
    except Exception as e:  # many types, which differ between versions
        raise UserError(
            f"{weights} is not a folder and cannot be downloaded from the Hugging Face Hub "
            f"({brief(e)})"
        ) from e
